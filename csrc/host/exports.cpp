// Functions of _C.so that are no operators: pyflow/_native.py calls them through ctypes, which releases the GIL.
#include <algorithm>
#include <memory>
#include <new>

#include "../args/math.h"
#include "../args/sector.h"
#include "../cpu/dispatch.h"

#define PYFLOW_EXPORT extern "C" __attribute__((visibility("default")))

// null: none of the compiled instruction sets runs on this CPU
PYFLOW_EXPORT const char* pyflow_isa() { return pyflow::cpu_isa_name(); }
PYFLOW_EXPORT const char* pyflow_compiled_isas() { return pyflow::compiled_isas(); }
PYFLOW_EXPORT const char* pyflow_supported_isas() { return pyflow::supported_isas(); }
PYFLOW_EXPORT const char* pyflow_cpu_features() { return pyflow::cpu_features(); }
PYFLOW_EXPORT const char* pyflow_compiler() { return __VERSION__; }

// false: out of memory
PYFLOW_EXPORT bool pyflow_sector_probability(const int64_t* n, const double* theta, int64_t size, bool complement,
                                             bool log, double* out) {
  const int64_t room = size ? pyflow::path_room(*std::max_element(n, n + size)) : 0;
  const std::unique_ptr<double[]> work(new (std::nothrow) double[size_t(room)]());
  if (work == nullptr) return false;
  pyflow::cpu::sector_formula({n, theta, complement, log, work.get(), out}, 0, size);
  return true;
}

// runs `rounds` rounds of multiply-adds in registers; returns how many
PYFLOW_EXPORT int64_t pyflow_multiply_adds(int64_t rounds) {
  int64_t count = 0;
  float sum[pyflow::kMultiplyAddLanes] = {};
  pyflow::cpu::math_multiply_add({&count, sum}, 0, rounds);
  return count * rounds;
}
