// What the kernels' launches share, and how kernels read a Number.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../slot.h"

namespace fastopt::cuda {
namespace {

__device__ inline double read(const Number& number) {
  if (!number.tensor) return number.value;
  switch (number.format) {
    case Format::kFloat32: return *static_cast<const float*>(number.tensor);
    case Format::kFloat64: return *static_cast<const double*>(number.tensor);
    case Format::kBFloat16: return widen(*static_cast<const BFloat16*>(number.tensor));
    case Format::kFloat16: return widen(*static_cast<const Float16*>(number.tensor));
    default: return 0;  // as_number has checked
  }
}

// A kernel whose grid overlaps the one before it on its stream calls this in every thread, before
// it reads what that one wrote and before it writes: it returns when that one has ended.
__device__ inline void wait_for_kernel_before() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// From here on the next kernel's blocks may start, if its grid overlaps. They wait for the end.
__device__ inline void let_next_kernel_start() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

struct Grid {
  int64_t blocks;
  int threads;
  void* stream;
  bool overlaps = false;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, const Arguments&... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.stream = static_cast<cudaStream_t>(grid.stream);
  config.attrs = &overlap;
  config.numAttrs = grid.overlaps ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA did not launch a step: ") +
                             cudaGetErrorString(error));
  }
}

}  // namespace
}  // namespace fastopt::cuda
