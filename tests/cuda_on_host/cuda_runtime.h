// As much of CUDA as the sources in csrc/cuda may use, on the host: compiled against this header
// the kernels are plain functions, and a launch runs them block by block, thread by thread. A
// thread runs to its end, or to a shuffle, where it waits for the other lanes of its warp.
//
// A kernel that may overlap the one before it can be made to: see hold_back.
//
// It refuses what a device would: misaligned vectors and words, impossible grids, arguments that
// are too large; and of shuffles all but those in which the whole warp takes part at one place.
// What it cannot show is listed in tests/test_cuda_source.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__

struct dim3 {
  constexpr dim3(unsigned x = 1) : x(x) {}
  unsigned x;
};
extern thread_local dim3 threadIdx, blockIdx, gridDim;

// Throws std::runtime_error unless so many bytes can be accessed there at once. (By number: to a
// pointer's memory the compiler would expect an access.)
void check_aligned(uintptr_t address, size_t bytes);
template <class T>
void check_aligned(const T* words) {
  check_aligned(reinterpret_cast<uintptr_t>(words), sizeof *words);
}

// Words that a device reads or writes at once: every copy, to memory or from it, is checked.
template <int kWords>
struct alignas(4 * kWords) VectorOnHost {
  uint32_t words[kWords];

  VectorOnHost() = default;
  VectorOnHost(const VectorOnHost& from) { *this = from; }
  VectorOnHost& operator=(const VectorOnHost& from) {
    check_aligned(this);
    check_aligned(&from);
    for (int i = 0; i < kWords; ++i) words[i] = from.words[i];
    return *this;
  }
};
using uint2 = VectorOnHost<2>;
using uint4 = VectorOnHost<4>;

extern int64_t vectors_streamed;  // from memory, by the launch that runs

template <int kWords>
VectorOnHost<kWords> __ldcs(const VectorOnHost<kWords>* from) {
  ++vectors_streamed;
  return *from;
}
template <int kWords>
void __stcs(VectorOnHost<kWords>* to, const VectorOnHost<kWords>& value) {
  *to = value;
}

// A single word is no vector, and not counted.
inline uint32_t __ldcs(const uint32_t* from) {
  check_aligned(from);
  return *from;
}
inline void __stcs(uint32_t* to, uint32_t value) {
  check_aligned(to);
  *to = value;
}

// A place where the lanes of a warp wait for each other.
struct Meeting {
  std::string_view file;
  int line;
  unsigned mask;
  int lane_mask;
};

// Returns, once all lanes of the warp are there, what lane (own ^ lane_mask) brought.
uint32_t meet(const Meeting& meeting, uint32_t value);

inline uint32_t __shfl_xor_sync(unsigned mask, uint32_t value, int lane_mask,
                                const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return meet({file, line, mask, lane_mask}, value);
}
inline void __syncwarp(unsigned mask = 0xffffffff, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  meet({file, line, mask, 0}, 0);
}

// Where a kernel waits for the one before it. If that one is held back, it runs now, and in a
// kernel launched to overlap it every thread must come here.
void cudaGridDependencySynchronize();
inline void cudaTriggerProgrammaticLaunchCompletion() {}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
const char* cudaGetErrorString(cudaError_t error);

using cudaStream_t = struct StreamOnHost*;
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// Calls the kernel once for each thread of the grid.
cudaError_t run_on_host(const cudaLaunchConfig_t& config, size_t argument_bytes,
                        const std::function<void()>& kernel);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  constexpr size_t kBytes = (sizeof(Parameters) + ...);
  static_assert(kBytes <= 32764);
  return run_on_host(*config, kBytes, [kernel, copies = std::tuple<Parameters...>(arguments...)] {
    std::apply(kernel, copies);
  });
}
