// The ceiling of a CUDA step: its tensors read and written in the launch shape of csrc/cuda's
// update, with no arithmetic. Compiled by ceiling.py for one mix of tensors:
//
//   -DWIDTHS=4411  digits: bytes of an element of the parameter, the gradient (read only), states
//   -DPIECE=4      elements of a piece: what a thread moves of a tensor in one access
//   -DPIECES=4     pieces of each tensor that it asks for before it waits for the first
//   -DRESIDENT=2   blocks that a multiprocessor is to hold
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace {

constexpr int kThreads = 256;  // of a block, as in csrc/cuda/apply.cu
constexpr int kGrad = 1;

constexpr int digits_of(int number) { return number == 0 ? 0 : 1 + digits_of(number / 10); }
constexpr int kTensors = digits_of(WIDTHS);

// Of the tensor of this number.
template <int J>
constexpr int digit() {
  int first = WIDTHS;
  for (int i = kTensors - 1; i > J; --i) first /= 10;
  return first % 10;
}

// Calls use with each tensor's number and the bytes of its elements, known to the compiler.
template <class Use, int... J>
__device__ void for_each(Use use, std::integer_sequence<int, J...>) {
  (use(std::integral_constant<int, J>(), std::integral_constant<int, digit<J>()>()), ...);
}
template <class Use>
__device__ void for_each_tensor(Use use) {
  for_each(use, std::make_integer_sequence<int, kTensors>());
}

// What is moved in one access.
template <int kBytes>
using Access =
    std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>;
struct Words {
  uint32_t word[4];
};
template <int kBytes>
__device__ Words read(const char* from) {
  const Access<kBytes> access = __ldcs(reinterpret_cast<const Access<kBytes>*>(from));
  Words words;
  memcpy(words.word, &access, kBytes);
  return words;
}
template <int kBytes>
__device__ void write(char* to, const Words& words) {
  Access<kBytes> access;
  memcpy(&access, words.word, kBytes);
  __stcs(reinterpret_cast<Access<kBytes>*>(to), access);
}

// An element where tensors are not aligned.
template <int kBytes>
using Element = std::conditional_t<
    kBytes == 1, uint8_t,
    std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>>;

// A chunk a turn, as update takes them: chunk c is the elements [begin[c], end[c]) of the tensors
// tensor[c]. What is written is what was read, exclusive-or of the gradient's bits under `mask`:
// it is 0, which the compiler does not know, or it would leave out what changes nothing.
__global__ void __launch_bounds__(kThreads, RESIDENT)
    stream_chunks(char* const* pointers, const int64_t* tensor, const int64_t* begin,
                  const int64_t* end, int64_t chunks, uint32_t mask) {
  for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    char* data[kTensors];
    bool is_aligned = true;
    for_each_tensor([&](auto j, auto bytes) {
      data[j] = pointers[tensor[c] * kTensors + j] + begin[c] * bytes;
      is_aligned &= reinterpret_cast<uintptr_t>(data[j]) % (PIECE * bytes) == 0;
    });
    const int n = static_cast<int>(end[c] - begin[c]);
    const int in_pieces = is_aligned ? n / PIECE * PIECE : 0;
#pragma unroll 1
    for (int i = in_pieces + threadIdx.x; i < n; i += kThreads) {
      const auto changed = mask & reinterpret_cast<Element<digit<kGrad>()>*>(data[kGrad])[i];
      for_each_tensor([&](auto j, auto bytes) {
        auto* const elements = reinterpret_cast<Element<bytes>*>(data[j]);
        if constexpr (j != kGrad) elements[i] ^= static_cast<Element<bytes>>(changed);
      });
    }
#pragma unroll 1
    for (int i = threadIdx.x * PIECE; i < in_pieces; i += kThreads * PIECE * PIECES) {
      constexpr int kStride = kThreads * PIECE;  // from a thread's piece to its next
      const auto has = [&](int q) { return q == 0 || i + q * kStride < in_pieces; };
      Words words[kTensors][PIECES];
      for_each_tensor([&](auto j, auto bytes) {
#pragma unroll
        for (int q = 0; q < PIECES; ++q) {
          if (has(q)) words[j][q] = read<PIECE * bytes>(data[j] + (i + q * kStride) * bytes);
        }
      });
#pragma unroll
      for (int q = 0; q < PIECES; ++q) {
        if (!has(q)) continue;
        uint32_t changed = 0;
#pragma unroll
        for (int w = 0; w < PIECE * digit<kGrad>() / 4; ++w) changed ^= words[kGrad][q].word[w];
        changed &= mask;
        for_each_tensor([&](auto j, auto bytes) {
          if constexpr (j != kGrad) {
#pragma unroll
            for (int w = 0; w < PIECE * bytes / 4; ++w) words[j][q].word[w] ^= changed;
            write<PIECE * bytes>(data[j] + (i + q * kStride) * bytes, words[j][q]);
          }
        });
      }
    }
  }
}

}  // namespace

// Null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* stream(
    char* const* pointers, const int64_t* tensor, const int64_t* begin, const int64_t* end,
    int64_t chunks, int64_t multiprocessors, uint32_t mask, void* on) {
  const int64_t most = RESIDENT * multiprocessors;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(chunks < most ? chunks : most));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(on);
  const cudaError_t error =
      cudaLaunchKernelEx(&config, stream_chunks, pointers, tensor, begin, end, chunks, mask);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
