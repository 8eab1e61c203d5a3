// Streaming (non-temporal) stores, which bypass the caches. An ordinary store first reads the cache line it writes to.
// For an output too large to stay in a cache, that read is a fifth of a coupling's traffic (two cores of a Zen 5,
// forward at 6.4 M floats: see README). Intrinsics are used only here and in lanes.h; plain C++ has no such store.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../math/fn.h"

namespace pyflow {

constexpr int64_t kStreamBytes = 16 << 20;  // smallest output for which streaming pays

// copies n floats: whole cache lines by streaming stores, the ends by ordinary ones
PYFLOW_FN void stream(float* __restrict dst, const float* __restrict src, int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i < n && (uintptr_t(dst + i) & 63) != 0; ++i) dst[i] = src[i];
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) _mm512_stream_ps(dst + i, _mm512_loadu_ps(src + i));
#else
  for (; i + 16 <= n; i += 16) {
    _mm256_stream_ps(dst + i, _mm256_loadu_ps(src + i));
    _mm256_stream_ps(dst + i + 8, _mm256_loadu_ps(src + i + 8));
  }
#endif
#endif
  for (; i < n; ++i) dst[i] = src[i];
}

PYFLOW_FN void stream(double* __restrict dst, const double* __restrict src, int64_t n) {
  stream((float*)dst, (const float*)src, 2 * n);
}

// orders this thread's streaming stores before its later stores
PYFLOW_FN void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace pyflow
