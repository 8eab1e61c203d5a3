// An enum from one list of names. PYFLOW_ENUM(Name, LIST), where LIST(F) expands to F(first) F(second) ..., defines
//   enum class Name
//   kNameNames       the names as text, in order
//   as_constant(v, f)  calls f with v as a compile-time constant: f(Constant<Name, v>{})
#pragma once

#include "../math/fn.h"

// f may be host or device code
#if defined(__CUDACC__)
#define PYFLOW_ANY_CODE _Pragma("nv_exec_check_disable")
#else
#define PYFLOW_ANY_CODE
#endif

namespace pyflow {

// not std's: its name would be in the symbols of kernels
template <class E, E V>
struct Constant {
  static constexpr E value = V;
};

}  // namespace pyflow

#define PYFLOW_ENUM_ITEM(name) name,
#define PYFLOW_ENUM_TEXT(name) #name,
#define PYFLOW_ENUM_CASE(name) \
  case Enum::name: return f(pyflow::Constant<Enum, Enum::name>{});
#define PYFLOW_ENUM(Name, LIST)                                      \
  enum class Name : int { LIST(PYFLOW_ENUM_ITEM) };                  \
  constexpr const char* k##Name##Names[] = {LIST(PYFLOW_ENUM_TEXT)}; \
  PYFLOW_ANY_CODE                                                    \
  template <class F>                                                 \
  PYFLOW_FN void as_constant(Name value, F f) {                      \
    using Enum = Name;                                               \
    switch (value) { LIST(PYFLOW_ENUM_CASE) }                        \
  }
