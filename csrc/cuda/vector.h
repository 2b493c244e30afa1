// Between memory and arithmetic: a few neighbouring numbers of one tensor, in any format.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../formats/formats.h"

namespace fastopt::cuda {
namespace {

// A number of a block in memory.
template <class Kind>
struct Code {
  uint8_t bits;
};

// What a tensor is to its slot, which says in which formats it can be.
enum class Role { kParam, kGrad, kState, kBlocks, kRemainder };

// What a format is in C++: calls use with an element of it. The last of each is the only one left.
template <class T, class Use>
__device__ void with_type(Role role, Format format, Use use) {
  if constexpr (std::is_same_v<T, double>) {
    use(double());
  } else if (role == Role::kRemainder) {
    use(Remainder());
  } else if (role == Role::kBlocks) {
    if (format == Format::kBlockSigned) return use(Code<BlockSigned>());
    use(Code<BlockUnsigned>());
  } else {
    if (format == Format::kFloat32) return use(float());
    if (format == Format::kBFloat16) return use(BFloat16());
    if (role != Role::kGrad && format == Format::kBFloat16Stochastic) {
      return use(StochasticBFloat16());
    }
    if (role == Role::kParam && format == Format::kSplit) return use(SplitBFloat16());
    use(Float16());
  }
}

// How numbers of one tensor are rounded: their random bits, the base of their block.
struct Rounding {
  Random random;
  uint32_t base;
};

// Between an element in memory and its number. A remainder completes the number that the
// parameter's upper half has made.
template <class T, class E>
__device__ void read_element(E element, uint32_t, T& x) {
  x = widen(element);
}
__device__ void read_element(Remainder remainder, uint32_t, float& x) { x = join(x, remainder); }
template <class Kind>
__device__ void read_element(Code<Kind> code, uint32_t base, float& x) {
  x = decode<Kind>(code.bits, base);
}

template <class T, class E>
__device__ void write_element(T x, const Rounding&, uint32_t, E& to) {
  to = narrow<E>(x);
}
__device__ void write_element(float x, const Rounding& rounding, uint32_t index,
                              StochasticBFloat16& to) {
  to = narrow<StochasticBFloat16>(x, rounding.random.bits(index));
}
template <class Kind>
__device__ void write_element(float x, const Rounding& rounding, uint32_t index, Code<Kind>& to) {
  to = {encode<Kind>(x, rounding.base, Kind::kSigned ? 0 : rounding.random.bits(index))};
}

// A few neighbours in one tensor, at most 16 bytes, between memory and arithmetic.
struct Vector {
  uint32_t words[4];
};

// The words that so many bytes are moved in.
template <int kBytes>
using Words = std::conditional_t<
    kBytes == 1, uint8_t,
    std::conditional_t<
        kBytes == 2, uint16_t,
        std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>>>;

// One of them. (Taken out by shifts: of memcpy the compiler would make a register for each.)
template <class E>
__device__ E element_of(const Vector& vector, int i) {
  if constexpr (sizeof(E) == 8) {
    return bit_cast<E>(vector.words[2 * i] | uint64_t{vector.words[2 * i + 1]} << 32);
  } else {
    constexpr int kInWord = 4 / sizeof(E);
    const uint32_t word = vector.words[i / kInWord] >> i % kInWord * 8 * sizeof(E);
    return bit_cast<E>(static_cast<Words<sizeof(E)>>(word));
  }
}

// Those of a word are set in turn.
template <class E>
__device__ void set_element(Vector& vector, int i, E e) {
  if constexpr (sizeof(E) == 8) {
    const uint64_t bits = bit_cast<uint64_t>(e);
    vector.words[2 * i] = static_cast<uint32_t>(bits);
    vector.words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
  } else {
    constexpr int kInWord = 4 / sizeof(E);
    const uint32_t bits = bit_cast<Words<sizeof(E)>>(e);
    uint32_t& word = vector.words[i / kInWord];
    word = i % kInWord == 0 ? bits : word | bits << i % kInWord * 8 * sizeof(E);
  }
}

// Calls use with the words in memory that N elements are.
template <int N, class T, class Data, class Use>
__device__ void with_words(Data* data, Role role, Format format, int64_t at, Use use) {
  const auto in = [&](auto bytes) {
    using W = Words<N* decltype(bytes)::value>;
    using Pointer = std::conditional_t<std::is_const_v<Data>, const W*, W*>;
    use(reinterpret_cast<Pointer>(data + at * decltype(bytes)::value));
  };
  if constexpr (std::is_same_v<T, double>) {
    in(std::integral_constant<int, 8>());
  } else {
    if (role == Role::kBlocks) return in(std::integral_constant<int, 1>());
    if (role != Role::kRemainder && format == Format::kFloat32) {
      return in(std::integral_constant<int, 4>());
    }
    in(std::integral_constant<int, 2>());
  }
}

// Vectors pass through the cache once: the next step comes after a model's forward and backward
// pass.
template <int N, class T>
__device__ Vector load(const void* data, Role role, Format format, int64_t at) {
  Vector vector;
  with_words<N, T>(static_cast<const char*>(data), role, format, at, [&](const auto* from) {
    std::decay_t<decltype(*from)> words;
    if constexpr (N > 1) {
      words = __ldcs(from);
    } else {
      words = *from;
    }
    memcpy(vector.words, &words, sizeof words);
  });
  return vector;
}

// Brings what lies there into the cache, which takes no register.
__device__ void prefetch(const void* data) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(data));
#else
  (void)data;
#endif
}

template <int N, class T>
__device__ void store(void* data, Role role, Format format, int64_t at, const Vector& vector) {
  with_words<N, T>(static_cast<char*>(data), role, format, at, [&](auto* to) {
    std::decay_t<decltype(*to)> words;
    memcpy(&words, vector.words, sizeof words);
    if constexpr (N > 1) {
      __stcs(to, words);
    } else {
      *to = words;
    }
  });
}

// N numbers of a vector, from element `first` on.
template <int N, class T>
__device__ void unpack(const Vector& vector, int first, Role role, Format format, uint32_t base,
                       T* to) {
  const bool is_bfloat16 = format == Format::kBFloat16Stochastic || format == Format::kSplit;
  with_type<T>(role, is_bfloat16 ? Format::kBFloat16 : format, [&](auto e) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      read_element(element_of<decltype(e)>(vector, first + i), base, to[i]);
    }
  });
}

// The first one's index in the whole parameter is `index`.
template <int N, class T>
__device__ void pack(const T* from, Role role, Format format, const Rounding& rounding,
                     uint32_t index, int first, Vector& vector) {
  with_type<T>(role, format, [&](auto e) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      write_element(from[i], rounding, index + i, e);
      set_element(vector, first + i, e);
    }
  });
}

// The same where only the device knows the format, once in a kernel: more would be too large.
constexpr int kAnyPiece = 4;
struct Numbers {
  float x[kAnyPiece];
};
__device__ __noinline__ Numbers unpack_any(Vector vector, Format format) {
  Numbers to;
  unpack<kAnyPiece>(vector, 0, Role::kParam, format, 0, to.x);
  return to;
}
__device__ __noinline__ Vector pack_any(Numbers from, Format format, Random random,
                                        uint32_t index) {
  Vector to;
  pack<kAnyPiece>(from.x, Role::kParam, format, {random, 0}, index, 0, to);
  return to;
}
__device__ __noinline__ Vector pack_codes(Numbers from, Format format, Rounding rounding,
                                          uint32_t index) {
  Vector to;
  pack<kAnyPiece>(from.x, Role::kBlocks, format, rounding, index, 0, to);
  return to;
}

}  // namespace
}  // namespace fastopt::cuda
