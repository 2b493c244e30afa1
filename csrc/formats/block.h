// 8 bits a number: small floats under one power of two for each block of 128.
//
// A block's scale is the exponent field of the least power of two that is not below its largest
// magnitude. That power has a code, so that the largest can be rounded up: without it a falling
// average's top would be cut off in every step. Codes count float's own patterns from a base that
// the scale gives, exponent and mantissa in one: encoding is one addition and one shift.
//
// Whatever is stored is exactly a bfloat16, and storing what was loaded gives the same values,
// though the scale may come out one lower: a checkpoint of bfloat16 tensors resumes bit for bit.
//
// A tensor's codes lie in row-major order, one byte each, behind them its scales, one a block; a
// block lies within one row, which is all dimensions but the first: a parameter sharded along its
// first dimension has the blocks of the whole.
#pragma once

#include <cstdint>

#include "nearest.h"

namespace fastopt {

constexpr int64_t kBlock = 128;

// Sign, 4 exponent and 3 mantissa bits, rounded to nearest even; the least become 0.
struct BlockSigned {
  static constexpr uint32_t kOctaves = 15;  // from the scale down
  static constexpr bool kSigned = true;
};

// 5 exponent and 3 mantissa bits of what is never negative, rounded stochastically. Nothing above 0
// is kept as 0: an average of squares that is 0 beside a momentum that is not makes an update of
// momentum / eps.
struct BlockUnsigned {
  static constexpr uint32_t kOctaves = 31;
  static constexpr bool kSigned = false;
};

// What a block's largest is found by, NaN as one pattern above all others.
FASTOPT_RULE uint32_t magnitude_of(float x) {
  const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7FFFFFFFu;
  return magnitude > 0x7F800000u ? 0x7FC00000u : magnitude;
}

// Never so low that a code would be subnormal.
template <class Kind>
FASTOPT_RULE uint32_t scale_of(uint32_t largest) {
  const uint32_t exponent = (largest + 0x7FFFFFu) >> 23;
  return exponent <= Kind::kOctaves ? Kind::kOctaves + 1 : exponent > 255 ? 255 : exponent;
}

// The pattern of code 0, if that were not 0.
template <class Kind>
FASTOPT_RULE uint32_t base_of(uint32_t scale) {
  return (scale - Kind::kOctaves) << 23;
}

// The bit of a code that is the number's sign.
template <class Kind>
constexpr uint32_t kSignBit = Kind::kSigned ? 0x80 : 0;

FASTOPT_RULE float decode(uint8_t code, uint32_t base, uint32_t sign_bit) {
  const uint32_t magnitude = code & ~sign_bit, sign = (code & sign_bit) << 24;
  return bit_cast<float>((magnitude != 0 ? (magnitude << 20) + base : 0) | sign);
}
template <class Kind>
FASTOPT_RULE float decode(uint8_t code, uint32_t base) {
  return decode(code, base, kSignBit<Kind>);
}

// Of a number whose magnitude is no NaN, or the one pattern of it.
template <class Kind>
FASTOPT_RULE uint8_t encode(float x, uint32_t magnitude, uint32_t base, uint32_t random) {
  const int32_t above = static_cast<int32_t>(magnitude - base);
  if constexpr (Kind::kSigned) {
    const int32_t rounded = (above + 0x7FFFF + ((above >> 20) & 1)) >> 20;
    const uint32_t sign = bit_cast<uint32_t>(x) >> 24 & 0x80u;
    return static_cast<uint8_t>((rounded < 0 ? 0 : rounded) | static_cast<int32_t>(sign));
  } else {
    const int32_t rounded = (above + static_cast<int32_t>(random << 4)) >> 20;
    const int32_t least = static_cast<int32_t>(magnitude < 1 ? magnitude : 1);
    return static_cast<uint8_t>(rounded < least ? least : rounded);
  }
}
template <class Kind>
FASTOPT_RULE uint8_t encode(float x, uint32_t base, uint32_t random) {
  return encode<Kind>(x, magnitude_of(x), base, random);
}

// How a tensor of so many rows is cut into blocks; the last of a row is what is left.
struct Blocks {
  int64_t row, in_row;  // elements of a row, and its blocks

  FASTOPT_RULE Blocks(int64_t numel, int64_t rows)
      : row(rows > 0 ? numel / rows : 0), in_row((row + kBlock - 1) / kBlock) {}

  // The element a block begins with.
  FASTOPT_RULE int64_t begin(int64_t block) const {
    return in_row == 0 ? 0 : block / in_row * row + block % in_row * kBlock;
  }
};

// Whole tensors, on the host: for checkpoints, and for states that come as something else. Of
// unsigned numbers that are no bfloat16 the nearest is taken.
void encode_blocks(const float* from, int64_t rows, int64_t numel, bool is_signed, uint8_t* to);
void decode_blocks(const uint8_t* from, int64_t rows, int64_t numel, bool is_signed, BFloat16* to);

}  // namespace fastopt
