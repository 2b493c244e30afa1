// As much of CUDA as csrc/cuda/apply.cu uses, on the host: compiled against this header the kernels
// are plain functions, and a launch runs them block by block, thread by thread.
//
// It refuses what a device would: misaligned vectors, impossible grids, arguments that are too
// large. What it cannot show is listed in tests/test_cuda_source.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  constexpr dim3(unsigned x = 1) : x(x) {}
  unsigned x;
};
extern thread_local dim3 threadIdx, blockIdx, gridDim;

// Throws std::runtime_error unless the address suits a vector of so many bytes.
void check_aligned(const void* address, size_t bytes);

// Words that a device reads or writes at once: every copy, to memory or from it, is checked.
template <int kWords>
struct alignas(4 * kWords) VectorOnHost {
  uint32_t words[kWords];

  VectorOnHost() = default;
  VectorOnHost(const VectorOnHost& from) { *this = from; }
  VectorOnHost& operator=(const VectorOnHost& from) {
    check_aligned(this, sizeof words);
    check_aligned(&from, sizeof words);
    for (int i = 0; i < kWords; ++i) words[i] = from.words[i];
    return *this;
  }
};
using uint2 = VectorOnHost<2>;
using uint4 = VectorOnHost<4>;

extern int64_t vectors_streamed;  // from memory, by the launch that runs

template <class Vector>
Vector __ldcs(const Vector* from) {
  ++vectors_streamed;
  return *from;
}
template <class Vector>
void __stcs(Vector* to, const Vector& value) {
  *to = value;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
const char* cudaGetErrorString(cudaError_t error);

using cudaStream_t = struct StreamOnHost*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

// Calls the kernel once for each thread of the grid.
cudaError_t run_on_host(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ...) <= 32764);
  return run_on_host(*config, [&] { kernel(arguments...); });
}
