#include "block.h"

namespace fastopt {
namespace {

constexpr uint32_t kNearest = 0x8000u;  // random bits that round up from one half on

// Calls visit(begin, n, scale) for every block: its elements, and where its scale is.
template <class Visit>
void for_each_block(int64_t rows, int64_t numel, Visit visit) {
  const Blocks blocks(numel, rows);
  for (int64_t block = 0; block < rows * blocks.in_row; ++block) {
    const int64_t begin = blocks.begin(block);
    const int64_t rest = (block / blocks.in_row + 1) * blocks.row - begin;
    visit(begin, rest < kBlock ? rest : kBlock, numel + block);
  }
}

template <class Kind>
void encode_as(const float* from, int64_t rows, int64_t numel, uint8_t* to) {
  for_each_block(rows, numel, [=](int64_t begin, int64_t n, int64_t at) {
    uint32_t largest = 0;
    for (int64_t i = begin; i < begin + n; ++i) {
      const uint32_t magnitude = magnitude_of(from[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    const uint32_t scale = scale_of<Kind>(largest);
    const uint32_t base = base_of<Kind>(scale);
    to[at] = static_cast<uint8_t>(scale);
    for (int64_t i = begin; i < begin + n; ++i) to[i] = encode<Kind>(from[i], base, kNearest);
  });
}

template <class Kind>
void decode_as(const uint8_t* from, int64_t rows, int64_t numel, BFloat16* to) {
  for_each_block(rows, numel, [=](int64_t begin, int64_t n, int64_t at) {
    const uint32_t base = base_of<Kind>(from[at]);
    for (int64_t i = begin; i < begin + n; ++i) {
      to[i] = narrow<BFloat16>(decode<Kind>(from[i], base));
    }
  });
}

}  // namespace

void encode_blocks(const float* from, int64_t rows, int64_t numel, bool is_signed, uint8_t* to) {
  (is_signed ? encode_as<BlockSigned> : encode_as<BlockUnsigned>)(from, rows, numel, to);
}

void decode_blocks(const uint8_t* from, int64_t rows, int64_t numel, bool is_signed, BFloat16* to) {
  (is_signed ? decode_as<BlockSigned> : decode_as<BlockUnsigned>)(from, rows, numel, to);
}

}  // namespace fastopt
