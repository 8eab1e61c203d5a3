// Kernels of a CPU: compiled once per instruction set, of which the process chooses one.
#pragma once

#include <cstdint>

// F(instruction set, name, Args) for every compiled instruction set, widest first
#if defined(__x86_64__)
#define PYFLOW_ISAS(F, name, Args) F(v4, name, Args) F(v3, name, Args)
#elif defined(__aarch64__)
#define PYFLOW_ISAS(F, name, Args) F(neon, name, Args)
#endif

// PYFLOW_CPU_KERNEL(name, Args) in csrc/args declares void cpu::name(const Args&, int64_t begin, int64_t end), which
// runs units [begin, end) by the kernel `name` of the instruction set in use; csrc/cpu defines that kernel.
#define PYFLOW_DECLARE_KERNEL(isa, name, Args)        \
  namespace isa {                                     \
  void name(const Args&, int64_t begin, int64_t end); \
  }
#define PYFLOW_ENTER_KERNEL(isa, name, Args) isa::name,
#if defined(PYFLOW_ISA)
#define PYFLOW_CPU_KERNEL(name, Args)
#elif defined(PYFLOW_CUDA)
// never called
#define PYFLOW_CPU_KERNEL(name, Args) PYFLOW_DECLARE_KERNEL(cpu, name, Args)
#else
#define PYFLOW_CPU_KERNEL(name, Args)                                                    \
  PYFLOW_ISAS(PYFLOW_DECLARE_KERNEL, name, Args)                                         \
  namespace cpu {                                                                        \
  inline void name(const Args& a, int64_t begin, int64_t end) {                          \
    using Kernel = void(const Args&, int64_t, int64_t);                                  \
    static constexpr Kernel* kernels[] = {PYFLOW_ISAS(PYFLOW_ENTER_KERNEL, name, Args)}; \
    kernels[cpu_isa()](a, begin, end);                                                   \
  }                                                                                      \
  }
#endif

namespace pyflow {

// index in PYFLOW_ISAS of the instruction set in use: the first that runs on this CPU, or the one named by the variable
// PYFLOW_CPU_ISA; negative if there is none
int cpu_isa();
// its name; null if there is none
const char* cpu_isa_name();

// comma-separated: features of this CPU, instruction sets of this build, and those of them that this CPU supports
const char* cpu_features();
const char* compiled_isas();
const char* supported_isas();

}  // namespace pyflow
