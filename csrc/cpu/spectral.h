// Arguments of the spectral kernels; the functions live in one namespace per instruction set.
#pragma once

#include "view.h"

namespace pyflow {

constexpr int64_t kSpectralUnit = 131072;    // elements of a unit, about
constexpr int64_t kSpectralGroup = 8 << 20;  // bytes of weights whose passes follow each other, for the cache
constexpr int64_t kSpectralRows = 32;        // added in the compute type before the sum goes on in double

// one weight as (rows, cols), cut into units of whole rows by its number of columns alone
struct SpectralLayer {
  Space space;
  View w, u, v;            // u and v along the rows and the columns; absent of a vector, which is one row
  View out, u_out, v_out;  // forward
  View grad, grad_sigma;   // backward: grad like w, grad_sigma a scalar
  View sigma;              // written forward, read backward
  bool f64;
  int64_t unit_rows, units, first_unit;
  double* y;        // (rows): W v
  double* partial;  // (units, cols): every unit's part of W' y; backward (units): of sum(grad W)
  char* sum;        // (units, cols) of the compute type
  char* right;      // (cols) of the compute type: v as the rounds go on
  double divisor;   // sigma as it is returned
};

struct SpectralArgs {
  SpectralLayer* layers;
  int64_t count;
  bool iterates;  // u and v move
  bool last;      // this is the last round
};

}  // namespace pyflow
