// What the backend asks of CUDA besides launches: which devices it can use, and how large they are.
#pragma once

#include <string>

#include "../dlpack_abi.h"

namespace fastopt::cuda {

// Why tensors on this device cannot be stepped by this build's kernels; empty where they can.
std::string why_not(DLDevice device);

int multiprocessors(DLDevice device);

// Whether a kernel can start there while the one before it runs, and wait for it.
bool can_overlap(DLDevice device);

// Makes a device the calling thread's current one, and what was current before so again.
class DeviceGuard {
 public:
  explicit DeviceGuard(DLDevice device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;  // negative where nothing had to change
};

}  // namespace fastopt::cuda
