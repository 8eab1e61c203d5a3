// Launch errors and sums of partial sums, for csrc/torch.
#include "shared.h"
#include "tile.h"

namespace pyflow::cuda {

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

namespace {

// sums partial (rows, segments) to out (rows,); one tile of columns steps along each row
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    sum_segments_kernel(const T* partial, T* out, int64_t rows, int64_t segments, int cols) {
  const int width = cols / kEach;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / width) + threadIdx.x / width;
  Group<T, kEach> acc{};
  for (int64_t first = 0; first < segments; first += cols) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t c = first + threadIdx.x % width * kEach + i;
      if (row < rows && c < segments) acc.v[i] += partial[row * segments + c];
    }
  }
  const T sum = fold(acc, cols);
  if (row < rows && threadIdx.x % width == 0) out[row] = sum;
}

template <class T>
void launch_sum_segments(const RowSums& sums, int64_t rows, int64_t segments, Stream stream) {
  int64_t cols = next_power_of_two(segments);
  cols = cols < kEach ? kEach : cols > kTile ? kTile : cols;
  launch(sum_segments_kernel<T>, ceil_div(rows, kTile / cols), stream, (const T*)sums.partial, (T*)sums.out, rows,
         segments, int(cols));
}

}  // namespace

void sum_segments(const RowSums& sums, int64_t rows, int64_t segments, bool f64, Stream stream) {
  f64 ? launch_sum_segments<double>(sums, rows, segments, stream)
      : launch_sum_segments<float>(sums, rows, segments, stream);
}

}  // namespace pyflow::cuda
