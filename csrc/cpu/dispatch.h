// Table of the kernels of one instruction set; the process chooses its table once. Each kernel runs units [begin, end).
#pragma once

#include "../args/center.h"
#include "../args/coupling.h"
#include "../args/energy.h"
#include "../args/flow_head.h"
#include "../args/fsq.h"
#include "../args/gan_qp.h"
#include "../args/hsic.h"
#include "../args/math.h"
#include "../args/noise.h"
#include "../args/sde.h"
#include "../args/sector.h"
#include "../args/spectral.h"

// F(name, Args) for every kernel
#define PYFLOW_KERNELS(F)     \
  PYFLOW_CENTER_KERNELS(F)    \
  PYFLOW_COUPLING_KERNELS(F)  \
  PYFLOW_ENERGY_KERNELS(F)    \
  PYFLOW_FLOW_HEAD_KERNELS(F) \
  PYFLOW_FSQ_KERNELS(F)       \
  PYFLOW_GAN_QP_KERNELS(F)    \
  PYFLOW_HSIC_KERNELS(F)      \
  PYFLOW_MATH_KERNELS(F)      \
  PYFLOW_NOISE_KERNELS(F)     \
  PYFLOW_SDE_KERNELS(F)       \
  PYFLOW_SECTOR_KERNELS(F)    \
  PYFLOW_SPECTRAL_KERNELS(F)

namespace pyflow {

struct CpuTable {
  const char* isa;
#define PYFLOW_FIELD(name, Args) void (*name)(const Args&, int64_t begin, int64_t end);
  PYFLOW_KERNELS(PYFLOW_FIELD)
#undef PYFLOW_FIELD
};

// null if no compiled instruction set runs on this CPU, or not the one named by the variable PYFLOW_CPU_ISA
const CpuTable* cpu_table();

// comma-separated: features of this CPU, instruction sets of this build, and those of them that this CPU supports
const char* cpu_features();
const char* compiled_isas();
const char* supported_isas();

}  // namespace pyflow
