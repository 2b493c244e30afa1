// Blocks: runs of them, as the innermost loop takes them. What a block's codes are counted from is
// laid beside each of its elements: so one loop, in vectors, takes rows of a few elements, too.
//
// Part of apply.cpp, and bound by what is said there.
#pragma once

#include "../slot.h"
#include "arrays.h"

namespace fastopt::cpu {
namespace {

// Elements of a run at most.
constexpr int64_t kRun = 512;

// So many elements at once get a base beside them: there must be room for it behind the last.
constexpr int64_t kLaid = 8;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Neighbouring blocks of a slot.
struct Run {
  Blocks blocks;
  int64_t first, count;
  int64_t numel;  // of the slot

  // Calls visit(block, begin, n) in order: which of the run, and its elements in it.
  template <class Visit>
  FASTOPT_RULE void for_each(Visit visit) const {
    if (blocks.in_row == 1) {  // of a few elements, perhaps: those are many blocks
      for (int64_t block = 0; block < count; ++block) visit(block, block * blocks.row, blocks.row);
      return;
    }
    int64_t in_row = first % blocks.in_row, begin = 0;
    for (int64_t block = 0; block < count; ++block) {
      const int64_t n = smaller(kBlock, blocks.row - in_row * kBlock);
      visit(block, begin, n);
      begin += n;
      if (++in_row == blocks.in_row) in_row = 0;
    }
  }
};

inline int64_t blocks_in_run(const Blocks& blocks) {
  return blocks_in_chunk(blocks) * kRun / kChunk;
}

FASTOPT_RULE void lay(uint32_t base, uint32_t* beside, int64_t n) {
  for (int64_t i = 0; i < n; i += kLaid) {
    for (int64_t k = 0; k < kLaid; ++k) beside[i + k] = base;
  }
}

template <class Kind>
__attribute__((noinline)) void lay_bases(const Run& run, const void* data, uint32_t* base) {
  const uint8_t* const scales = static_cast<const uint8_t*>(data) + run.numel + run.first;
  uint32_t of_block[kRun];
  for (int64_t block = 0; block < run.count; ++block) {
    of_block[block] = base_of<Kind>(scales[block]);
  }
  run.for_each(
      [&](int64_t block, int64_t begin, int64_t n) { lay(of_block[block], base + begin, n); });
}

FASTOPT_RULE uint32_t largest_of(const float* from, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bit_cast<uint32_t>(from[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// The largest magnitude of each block.
inline __attribute__((noinline)) void find_largest(const Run& run, const float* from,
                                                   uint32_t* largest) {
  run.for_each([=](int64_t block, int64_t begin, int64_t n) {
    largest[block] = largest_of(from + begin, n);
  });
}

// Stores the n numbers of a run that begins with this element; `bits` are an element's random ones.
template <class Kind, class Bits>
void store_run(const Run& run, const float* from, int64_t begin, int64_t n, void* data, Bits bits) {
  uint8_t* const codes = static_cast<uint8_t*>(data) + begin;
  uint8_t* const scales = static_cast<uint8_t*>(data) + run.numel + run.first;
  alignas(64) uint32_t largest[kRun], base[kRun + kLaid];
  find_largest(run, from, largest);
  uint32_t largest_of_all = 0;
  const int64_t count = run.count;  // for all the compiler knows, a scale is stored there
  FASTOPT_INDEPENDENT
  for (int64_t block = 0; block < count; ++block) {
    largest_of_all = largest[block] > largest_of_all ? largest[block] : largest_of_all;
    scales[block] = static_cast<uint8_t>(scale_of<Kind>(largest[block]));
  }
  lay_bases<Kind>(run, data, base);
  const auto encode_all = [&](auto magnitude) {
    FASTOPT_INDEPENDENT
    for (int i = 0; i < static_cast<int>(n); ++i) {  // an int, as in update
      const uint32_t random = Kind::kSigned ? 0 : bits(i);
      codes[i] = encode<Kind>(from[i], magnitude(from[i]), base[i], random);
    }
  };
  // To look for NaN in each element takes a quarter of the loop.
  if (largest_of_all > 0x7F800000u) return encode_all([](float x) { return magnitude_of(x); });
  encode_all([](float x) { return bit_cast<uint32_t>(x) & 0x7FFFFFFFu; });
}

// The codes of a run. What is to be stored waits until the largest of each block is known.
struct Codes {
  const uint8_t* code;
  const uint32_t* base;
  uint32_t sign_bit;
  float* values;

  FASTOPT_RULE float load(int64_t i) const { return decode(code[i], base[i], sign_bit); }
  FASTOPT_RULE void store(int64_t i, float x, uint32_t) const { values[i] = x; }
};

// Room for a state's codes in the innermost loop.
struct CodesRoom {
  alignas(64) uint32_t base[kRun + kLaid];
  alignas(64) float values[kRun];
};

template <class Kind>
FASTOPT_RULE Codes load_codes(const Run& run, int64_t begin, const void* data, CodesRoom* room) {
  lay_bases<Kind>(run, data, room->base);
  return {static_cast<const uint8_t*>(data) + begin, room->base, kSignBit<Kind>, room->values};
}

template <class Kind>
__attribute__((noinline)) void store_codes(const Run& run, int64_t begin, int64_t n, void* data,
                                           const CodesRoom& room, Random random, uint32_t index) {
  store_run<Kind>(run, room.values, begin, n, data,
                  [=](int i) { return random.bits(index + static_cast<uint32_t>(i)); });
}

}  // namespace
}  // namespace fastopt::cpu
