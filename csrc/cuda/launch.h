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

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA did not launch a step: ") +
                             cudaGetErrorString(error));
  }
}

}  // namespace
}  // namespace fastopt::cuda
