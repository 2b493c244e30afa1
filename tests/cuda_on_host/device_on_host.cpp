// A device that the host plays: CPU memory, a few multiprocessors, and a record of its launches.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "../../csrc/cuda/device.h"

thread_local dim3 threadIdx, blockIdx, gridDim;
int64_t vectors_streamed;

void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    throw std::runtime_error("a vector of " + std::to_string(bytes) + " bytes is misaligned");
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace {

struct Launch {
  int64_t blocks, threads, vectors_streamed;
};
std::vector<Launch> launches;
unsigned launches_ever = 0;

}  // namespace

// The launches since the last call, at most so many; returns how many there were.
extern "C" __attribute__((visibility("default"))) int64_t past_launches(Launch* to, int64_t room) {
  const auto count = static_cast<int64_t>(launches.size());
  std::copy_n(launches.begin(), std::min(count, room), to);
  launches.clear();
  return count;
}

// Nothing says in which order threads run: here forwards in two launches, backwards in the next
// two, so that both kernels of a step meet both.
cudaError_t run_on_host(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  Launch launch{config.gridDim.x, config.blockDim.x, 0};
  if (launch.blocks < 1 || launch.blocks > INT32_MAX || launch.threads < 1 ||
      launch.threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const bool backwards = ++launches_ever / 2 % 2 == 1;
  gridDim = config.gridDim;
  vectors_streamed = 0;
  const int64_t count = launch.blocks * launch.threads;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t thread = backwards ? count - 1 - i : i;
    blockIdx.x = static_cast<unsigned>(thread / launch.threads);
    threadIdx.x = static_cast<unsigned>(thread % launch.threads);
    kernel();
  }
  launch.vectors_streamed = vectors_streamed;
  launches.push_back(launch);
  return cudaSuccess;
}

namespace fastopt::cuda {

std::string why_not(DLDevice device) {
  return device.device_type == kDLCPU ? "" : "in this build it takes CPU tensors only";
}

// Few, so that every block takes several turns.
int multiprocessors(DLDevice) { return 3; }

DeviceGuard::DeviceGuard(DLDevice) {}
DeviceGuard::~DeviceGuard() = default;

}  // namespace fastopt::cuda
