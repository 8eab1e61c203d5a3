// Table of the kernels of one instruction set; the process chooses its table once. Each kernel runs units [begin, end).
#pragma once

#include <cstdint>

namespace pyflow {

struct CouplingForward;
struct CouplingBackward;
struct FlowHeadForward;
struct FlowHeadBackward;
struct FsqForward;
struct FsqBackward;
struct FsqDecode;
struct ResidualFsqForward;
struct ResidualFsqBackward;
struct NoiseArgs;
struct PhiloxArgs;
struct SdeArgs;
struct GramArgs;
struct GramSums;
struct GramBackward;
struct PermutedArgs;
struct CenterArgs;
struct SectorFormula;
struct SectorTrials;
struct GanQpSums;
struct GanQpLoss;
struct GanQpLossBackward;
struct MalaArgs;
struct SquaresArgs;
struct SpectralArgs;
struct MathArgs;

struct CpuTable {
  const char* isa;
  void (*coupling_forward)(const CouplingForward&, int64_t begin, int64_t end);
  void (*coupling_backward)(const CouplingBackward&, int64_t begin, int64_t end);
  void (*flow_head_forward)(const FlowHeadForward&, int64_t begin, int64_t end);
  void (*flow_head_backward)(const FlowHeadBackward&, int64_t begin, int64_t end);
  void (*flow_head_reduce)(const FlowHeadBackward&, int64_t begin, int64_t end);
  void (*fsq_forward)(const FsqForward&, int64_t begin, int64_t end);
  void (*fsq_backward)(const FsqBackward&, int64_t begin, int64_t end);
  void (*fsq_decode)(const FsqDecode&, int64_t begin, int64_t end);
  void (*residual_fsq_forward)(const ResidualFsqForward&, int64_t begin, int64_t end);
  void (*residual_fsq_backward)(const ResidualFsqBackward&, int64_t begin, int64_t end);
  void (*noise)(const NoiseArgs&, int64_t begin, int64_t end);
  void (*philox_words)(const PhiloxArgs&, int64_t begin, int64_t end);
  void (*sde_step)(const SdeArgs&, int64_t begin, int64_t end);
  void (*sde_step_backward)(const SdeArgs&, int64_t begin, int64_t end);
  void (*denoising_loss)(const SdeArgs&, int64_t begin, int64_t end);
  void (*langevin_squares)(const SdeArgs&, int64_t begin, int64_t end);
  void (*gram_stats)(const GramArgs&, int64_t begin, int64_t end);
  void (*gram_pack)(const GramArgs&, int64_t begin, int64_t end);
  void (*gram_sums)(const GramSums&, int64_t begin, int64_t end);
  void (*gram_clear)(const GramBackward&, int64_t begin, int64_t end);
  void (*gram_backward)(const GramBackward&, int64_t begin, int64_t end);
  void (*gram_finish)(const GramBackward&, int64_t begin, int64_t end);
  void (*gram_permuted)(const PermutedArgs&, int64_t begin, int64_t end);
  void (*center_sums)(const CenterArgs&, int64_t begin, int64_t end);
  void (*center_means)(const CenterArgs&, int64_t begin, int64_t end);
  void (*center_apply)(const CenterArgs&, int64_t begin, int64_t end);
  void (*sector_formula)(const SectorFormula&, int64_t begin, int64_t end);
  void (*sector_trials)(const SectorTrials&, int64_t begin, int64_t end);
  void (*gan_qp_sums)(const GanQpSums&, int64_t begin, int64_t end);
  void (*gan_qp_loss)(const GanQpLoss&, int64_t begin, int64_t end);
  void (*gan_qp_loss_backward)(const GanQpLossBackward&, int64_t begin, int64_t end);
  void (*mala_sums)(const MalaArgs&, int64_t begin, int64_t end);
  void (*mala_accept)(const MalaArgs&, int64_t begin, int64_t end);
  void (*row_squares)(const SquaresArgs&, int64_t begin, int64_t end);
  void (*spectral_start)(const SpectralArgs&, int64_t begin, int64_t end);
  void (*spectral_product)(const SpectralArgs&, int64_t begin, int64_t end);
  void (*spectral_iterate)(const SpectralArgs&, int64_t begin, int64_t end);
  void (*spectral_scale)(const SpectralArgs&, int64_t begin, int64_t end);
  void (*spectral_dot)(const SpectralArgs&, int64_t begin, int64_t end);
  void (*spectral_gradient)(const SpectralArgs&, int64_t begin, int64_t end);
  void (*math_evaluate)(const MathArgs&, int64_t begin, int64_t end);
};

// null if no compiled instruction set runs on this CPU, or not the one named by the variable PYFLOW_CPU_ISA
const CpuTable* cpu_table();

// comma-separated: features of this CPU, instruction sets of this build, and those of them that this CPU supports
const char* cpu_features();
const char* compiled_isas();
const char* supported_isas();

}  // namespace pyflow
