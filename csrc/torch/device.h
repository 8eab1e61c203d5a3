// The device that this build of csrc/torch runs its kernels on. Every file is compiled into _C.so for the CPU; with
// PYFLOW_CUDA those with a csrc/cuda/<op>.cu are compiled again, into _CUDA.so. With PYFLOW_EMULATED as well the tests
// run csrc/cuda on CPU tensors (tests/cuda/emulated).
#pragma once

#include "../cpu/dispatch.h"
#include "../cuda/shared.h"
#include "tensor.h"

#if defined(PYFLOW_EMULATED)
#include <cstdlib>
#elif defined(PYFLOW_CUDA)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// PYFLOW_OPERATORS(m) { m.impl(...); } registers the operators of a file
#if defined(PYFLOW_EMULATED)
#define PYFLOW_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(pyflow_cuda, CPU, m)
#elif defined(PYFLOW_CUDA)
#define PYFLOW_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(pyflow_cuda, CUDA, m)
#else
// none on a CPU that runs none of the compiled instruction sets
#define PYFLOW_OPERATORS(m)                                              \
  static void register_operators(torch::stable::detail::StableLibrary&); \
  STABLE_TORCH_LIBRARY_IMPL(pyflow, CPU, library) {                      \
    if (cpu_isa() >= 0) register_operators(library);                     \
  }                                                                      \
  static void register_operators(torch::stable::detail::StableLibrary& m)
#endif

namespace pyflow {

#if defined(PYFLOW_CUDA)
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

// PYFLOW_RUN(kernel, args, on) runs the kernel of that name over all units of args.plan, on the device of the tensor
// `on`
#define PYFLOW_RUN(kernel, args, on)                                         \
  do {                                                                       \
    if constexpr (kCuda) {                                                   \
      launch(on, [&](cuda::Stream stream) { cuda::kernel(args, stream); });  \
    } else {                                                                 \
      run_units(cpu::kernel, args, 0, (args).plan.units, (args).plan.grain); \
    }                                                                        \
  } while (0)

// CPU: splits the units [first, last) among torch's threads
template <class Args>
void run_units(void (*kernel)(const Args&, int64_t, int64_t), const Args& a, int64_t first, int64_t last,
               int64_t grain) {
  torch::stable::parallel_for(first, last, grain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

#if defined(PYFLOW_CUDA)
inline void check_launch() {
  const char* error = cuda::launch_error();
  STD_TORCH_CHECK(error == nullptr, "pyflow: a CUDA kernel could not be launched: ", error ? error : "");
}
#endif

#if defined(PYFLOW_EMULATED)
template <class F>
void launch(const Tensor&, F f) {
  f(cuda::Stream(nullptr));
  check_launch();
}
#elif defined(PYFLOW_CUDA)
// calls f with the current stream of the tensor's device
template <class F>
void launch(const Tensor& on, F f) {
  const int32_t device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  f(cuda::Stream(stream));
  check_launch();
}
#else
template <class F>
void launch(const Tensor&, F) {}
#endif

// whether t holds one number that goes to the kernel by value; kernels read numbers in GPU memory themselves
inline bool is_host_number(const Tensor& t) {
#if defined(PYFLOW_EMULATED)
  if (std::getenv("PYFLOW_EMULATED_NUMBERS_IN_MEMORY")) return false;
#endif
  return t.dim() == 0 && t.is_cpu();
}

inline Plan plan_of(const Space& s, bool flat) { return kCuda ? gpu_plan(s) : cpu_plan(s, flat); }

// call after every view was added to the layout
template <class Args>
void plan(Args& a, Layout& layout) {
  a.space = layout.merge();
  a.plan = plan_of(a.space, layout.flat());
}

inline ScalarType compute_type(bool f64) { return f64 ? ScalarType::Double : ScalarType::Float; }

// float64 x is computed in float64, everything else in float32
inline bool is_f64(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

// a tensor without elements, for a result that is not requested
inline Tensor new_none(const Tensor& like, ScalarType dtype) {
  const int64_t none = 0;
  return new_empty(like, &none, 1, dtype);
}

// (rows,)
inline Tensor new_rows(const Tensor& like, int64_t rows, ScalarType dtype) { return new_empty(like, &rows, 1, dtype); }

// a number per row of a (rows,) tensor, or the single number of a 0-d one
RowView row_view(const Tensor& t);

// Row sums of a kernel: memory for them and for the partial sums of long rows.
//   SumTensors logdet(a.logdet, x, a.space, a.plan, dtype);  run the kernel;  logdet.finish();  return logdet.out;
class SumTensors {
 public:
  // sizes of the result: (count, rows), or the given ones
  SumTensors(RowSums& sums, const Tensor& like, const Space& space, const Plan& plan, ScalarType dtype,
             int64_t count = 1);
  SumTensors(RowSums& sums, const Tensor& like, const int64_t* sizes, int64_t dims, const Space& space,
             const Plan& plan, ScalarType dtype);
  // adds the partial sums; sums over no elements are 0
  void finish();

  Tensor out;

 private:
  RowSums& sums_;
  Tensor partial_;
  int64_t rows_, segments_;
  bool none_;
};

}  // namespace pyflow
