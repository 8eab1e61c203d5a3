// Arguments of the spectral kernels.
#pragma once

#include "../tiles/plan.h"

namespace pyflow {

constexpr int64_t kSpectralUnit = 131072;    // approximate elements per unit
constexpr int64_t kSpectralGroup = 8 << 20;  // bytes of weights per group: its passes run back to back, in cache
constexpr int64_t kSpectralRows = 32;        // rows summed in the compute type before the sum is added in double

// one weight as (rows, cols), split into units of whole rows; the rows per unit depend on cols only
struct SpectralLayer {
  Space space;
  View w, u, v;            // u (rows), v (cols), absent for a vector, which is one row
  View out, u_out, v_out;  // forward
  View grad, grad_sigma;   // backward: grad like w, grad_sigma a scalar
  View sigma;              // written forward, read backward
  bool f64;
  int64_t unit_rows, units, first_unit;
  double* y;        // (rows): W v
  double* partial;  // (units, cols): W' y per unit; backward (units): sum(grad * W) per unit
  char* sum;        // (units, cols) of the compute type: up to kSpectralRows rows of partial
  char* right;      // (cols) of the compute type: the current v
  double divisor;   // the returned sigma
};

struct SpectralArgs {
  SpectralLayer* layers;
  int64_t count;
  bool iterates;  // power iteration updates u and v
  bool last;      // last round: results are written
};

#define PYFLOW_SPECTRAL_KERNELS(F)  \
  F(spectral_start, SpectralArgs)   \
  F(spectral_product, SpectralArgs) \
  F(spectral_iterate, SpectralArgs) \
  F(spectral_scale, SpectralArgs)   \
  F(spectral_dot, SpectralArgs)     \
  F(spectral_gradient, SpectralArgs)

}  // namespace pyflow
