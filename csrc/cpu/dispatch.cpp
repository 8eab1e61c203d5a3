// Builds one kernel table per compiled instruction set and chooses the first that this CPU supports, widest first.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#define PYFLOW_DECLARE_KERNEL(name, Args) void name(const Args&, int64_t, int64_t);
#define PYFLOW_ENTER_KERNEL(name, Args) , name
#define PYFLOW_INSTRUCTION_SET(isa, text)                                \
  namespace pyflow::isa {                                                \
  PYFLOW_KERNELS(PYFLOW_DECLARE_KERNEL)                                  \
  static const CpuTable table{text PYFLOW_KERNELS(PYFLOW_ENTER_KERNEL)}; \
  }

#if defined(__x86_64__)
PYFLOW_INSTRUCTION_SET(v4, "x86-64-v4")
PYFLOW_INSTRUCTION_SET(v3, "x86-64-v3")
#elif defined(__aarch64__)
PYFLOW_INSTRUCTION_SET(neon, "neon")
#endif

namespace pyflow {
namespace {

struct Candidate {
  const CpuTable& table;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("bmi");
}
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
const Candidate kCandidates[] = {
    {v4::table, has_v4},
    {v3::table, has_v3},
};
const char kCompiled[] = "x86-64-v4,x86-64-v3";
#elif defined(__aarch64__)
bool has_neon() { return true; }
const Candidate kCandidates[] = {{neon::table, has_neon}};
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

const char* supported_isas() {
  static char text[64] = "";
  if (text[0]) return text;
  for (const Candidate& c : kCandidates) {
    if (!c.supported()) continue;
    if (text[0]) std::strcat(text, ",");
    std::strcat(text, c.table.isa);
  }
  return text;
}

}  // namespace pyflow
