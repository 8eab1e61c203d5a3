// Arguments of the spectral kernels.
#pragma once

#include "../cpu/dispatch.h"
#include "../cuda/shared.h"
#include "../ops/spectral.h"
#include "../tiles/plan.h"

namespace pyflow {

constexpr int64_t kSpectralUnit = 131072;    // CPU: approximate elements per unit
constexpr int64_t kSpectralGroup = 8 << 20;  // CPU: bytes of weights per group: its passes run back to back, in cache
constexpr int64_t kSpectralRows = 32;        // CPU: rows summed in the compute type before the sum is added in double
constexpr int64_t kSpectralBlock = 16;       // GPU: rows per unit

// one weight as (rows, cols), split into units of whole rows; on a GPU every tensor is contiguous
struct SpectralLayer {
  Space space;
  View w, u, v;            // u (rows), v (cols), absent for a vector, which is one row
  View out, u_out, v_out;  // forward
  View grad, grad_sigma;   // backward: grad like w, grad_sigma a scalar
  View sigma;              // written forward, read backward
  bool f64;
  int64_t unit_rows;  // depends on cols only
  int64_t units, first_unit;
  char* scratch;  // GPU: gpu_scratch_forward or gpu_scratch_backward elements of the compute type
  // the rest: CPU
  double* y;        // (rows): W v
  double* partial;  // (units, cols): W' y per unit; backward (units): sum(grad * W) per unit
  char* sum;        // (units, cols) of the compute type: up to kSpectralRows rows of partial
  char* right;      // (cols) of the compute type: the current v
  double divisor;   // the returned sigma
};

struct SpectralArgs {
  SpectralLayer* layers;
  int64_t count;
  int64_t n_iter;  // rounds of the power iteration, which updates u and v
  bool last;       // CPU: last round: results are written
};

// GPU, forward: W' y per unit (units, cols), its sum (cols), W v (rows), and u and v between rounds
inline int64_t gpu_scratch_forward(const SpectralLayer& l) {
  return l.units * l.space.cols + 2 * (l.space.rows + l.space.cols);
}

// GPU, backward: a sum(grad * W) per tile and the slope
inline int64_t gpu_tiles(const SpectralLayer& l) { return ceil_div(l.space.rows * l.space.cols, kTile); }
inline int64_t gpu_scratch_backward(const SpectralLayer& l) { return gpu_tiles(l) + 1; }

PYFLOW_CPU_KERNEL(spectral_start, SpectralArgs)
PYFLOW_CPU_KERNEL(spectral_product, SpectralArgs)
PYFLOW_CPU_KERNEL(spectral_iterate, SpectralArgs)
PYFLOW_CPU_KERNEL(spectral_scale, SpectralArgs)
PYFLOW_CPU_KERNEL(spectral_dot, SpectralArgs)
PYFLOW_CPU_KERNEL(spectral_gradient, SpectralArgs)

namespace cuda {
void spectral_normalize(const SpectralArgs&, Stream);
void spectral_normalize_backward(const SpectralArgs&, Stream);
}  // namespace cuda

}  // namespace pyflow
