// Writing past the caches. An ordinary store first reads the line it writes to; for an output that no
// cache will hold until it is read, that is a fifth of a coupling's traffic (two cores of a Zen 5, forward
// at 6.4 M floats: see README). With lanes.h the one place with intrinsics: the compiler has no other
// word for it.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../math/fn.h"

namespace pyflow {

constexpr int64_t kStreamBytes = 16 << 20;  // written in one call, from which on it pays

// n floats from src to dst: whole lines past the caches, the ends as usual
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

// streamed stores of this thread come before whatever it stores next
PYFLOW_FN void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace pyflow
