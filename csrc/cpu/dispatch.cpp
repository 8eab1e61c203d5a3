#include "dispatch.h"

#include <cstdlib>
#include <cstring>

// one line per kernel: declared in each namespace and entered in each table
#define PYFLOW_DECLARE(isa)                                            \
  namespace pyflow::isa {                                              \
  void coupling_forward(const CouplingForward&, int64_t, int64_t);     \
  void coupling_backward(const CouplingBackward&, int64_t, int64_t);   \
  }
#define PYFLOW_TABLE(name, isa) {name, isa::coupling_forward, isa::coupling_backward}

#if defined(__x86_64__)
PYFLOW_DECLARE(v4)
PYFLOW_DECLARE(v3)
#elif defined(__aarch64__)
PYFLOW_DECLARE(neon)
#endif

namespace pyflow {
namespace {

struct Candidate {
  CpuTable table;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("bmi");
}
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
const Candidate kCandidates[] = {
    {PYFLOW_TABLE("x86-64-v4", v4), has_v4},
    {PYFLOW_TABLE("x86-64-v3", v3), has_v3},
};
const char kCompiled[] = "x86-64-v4,x86-64-v3";
#elif defined(__aarch64__)
bool has_neon() { return true; }
const Candidate kCandidates[] = {{PYFLOW_TABLE("neon", neon), has_neon}};
const char kCompiled[] = "neon";
#endif

const CpuTable* choose() {
  const char* wanted = std::getenv("PYFLOW_CPU_ISA");
  for (const Candidate& c : kCandidates) {
    const bool named = wanted == nullptr || *wanted == 0 || std::strcmp(wanted, c.table.isa) == 0;
    if (named && c.supported()) return &c.table;
  }
  return nullptr;
}

}  // namespace

const CpuTable* cpu_table() {
  static const CpuTable* table = choose();
  return table;
}

const char* cpu_features() {
  static char text[128] = "";
  if (text[0]) return text;
#if defined(__x86_64__)
#define PYFLOW_FEATURE(name) \
  if (__builtin_cpu_supports(name)) std::strcat(text, text[0] ? "," name : name)
  PYFLOW_FEATURE("sse4.2");
  PYFLOW_FEATURE("avx");
  PYFLOW_FEATURE("avx2");
  PYFLOW_FEATURE("fma");
  PYFLOW_FEATURE("bmi2");
  PYFLOW_FEATURE("avx512f");
  PYFLOW_FEATURE("avx512bw");
  PYFLOW_FEATURE("avx512dq");
  PYFLOW_FEATURE("avx512vl");
#elif defined(__aarch64__)
  std::strcat(text, "neon");
#endif
  return text;
}

const char* compiled_isas() { return kCompiled; }

}  // namespace pyflow
