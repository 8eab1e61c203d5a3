// Chooses the first compiled instruction set that this CPU supports, widest first.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace pyflow {
namespace {

struct Candidate {
  const char* name;
  bool (*supported)();
};

// in the order of PYFLOW_ISAS
#if defined(__x86_64__)
bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("bmi");
}
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
const Candidate kCandidates[] = {{"x86-64-v4", has_v4}, {"x86-64-v3", has_v3}};
const char kCompiled[] = "x86-64-v4,x86-64-v3";
#elif defined(__aarch64__)
bool has_neon() { return true; }
const Candidate kCandidates[] = {{"neon", has_neon}};
const char kCompiled[] = "neon";
#endif

int choose() {
  const char* wanted = std::getenv("PYFLOW_CPU_ISA");
  int index = 0;
  for (const Candidate& c : kCandidates) {
    const bool named = wanted == nullptr || *wanted == 0 || std::strcmp(wanted, c.name) == 0;
    if (named && c.supported()) return index;
    ++index;
  }
  return -1;
}

}  // namespace

int cpu_isa() {
  static const int index = choose();
  return index;
}

const char* cpu_isa_name() { return cpu_isa() < 0 ? nullptr : kCandidates[cpu_isa()].name; }

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
    std::strcat(text, c.name);
  }
  return text;
}

}  // namespace pyflow
