// What the CUDA runtime says of devices. Built with the runtime's headers; no kernels here.
#include "device.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <iterator>

namespace fastopt::cuda {
namespace {

constexpr int kLargeArguments = 12010;  // the first CUDA whose kernels take 32 kB of them

int attribute(cudaDeviceAttr name, DLDevice device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, name, device.device_id);
  return value;
}

int capability_of(DLDevice device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

std::string version(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

}  // namespace

std::string why_not(DLDevice device) {
  if (device.device_type != kDLCUDA) return "the CUDA backend takes CUDA tensors only";
  int major = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.device_id);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    return "there is no CUDA device, or its driver is too old for this build's CUDA";
  }
  if (error != cudaSuccess) return std::string("CUDA says: ") + cudaGetErrorString(error);
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver < kLargeArguments) return "its driver is older than R530 (CUDA 12.1); update it";
  const int capability = capability_of(device);
  // Machine code runs on later devices of its own generation, PTX on all to come.
  if (capability >= FASTOPT_CUDA_PTX) return "";
  constexpr int kBuilt[] = {FASTOPT_CUDA_ARCHITECTURES};
  for (const int built : kBuilt) {
    if (built <= capability && built / 10 == major) return "";
  }
  std::string versions;
  for (const int built : kBuilt) versions += version(built) + ", ";
  return "the GPU has compute capability " + version(capability) + ", this build is for " +
         versions +
         "and later; rebuild with FASTOPT_CUDA_ARCHITECTURES=" + std::to_string(capability);
}

bool can_overlap(DLDevice device) {
  // Code for earlier capabilities, which does not wait, must not be what runs there.
  constexpr int kFirst = 90, kBuilt[] = {FASTOPT_CUDA_ARCHITECTURES};
  const int capability = capability_of(device);
  return std::any_of(std::begin(kBuilt), std::end(kBuilt),
                     [&](int built) { return built >= kFirst && built <= capability; });
}

int multiprocessors(DLDevice device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

DeviceGuard::DeviceGuard(DLDevice device) {
  int current = 0;
  cudaGetDevice(&current);
  if (current == device.device_id) return;
  cudaSetDevice(device.device_id);
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

}  // namespace fastopt::cuda
