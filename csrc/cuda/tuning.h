// What can be tried on a device against what is usual, in one place: no choice changes a bit of any
// result.
//
// The build: FASTOPT_CUDA_TUNE="THREADS=512;BYTES=128", an option of CMake and for pip an
// environment variable, sets any of these; a semicolon ends each.
//   THREADS   of a block of update: 128, 256 (as usual) or 512
//   BYTES     that a thread of update asks for at a time, or as much more as makes whole vectors:
//             32, 64, 96, 128 or 192. As usual 64, and 96 of float64
//   BLOCKS    of update that a multiprocessor has registers for: 1 to 12. As usual as many as have
//             768 threads where a thread asks for less than 96 bytes, and else 512
//   RULES     whose kernels are built, such as adam+sgd: the names in csrc/rules. As usual all
// BYTES and BLOCKS are of kernels that know their formats when they are compiled.
//
// A run: FASTOPT_CUDA_VARIANT="overlap,few" in the environment, read anew at each step, asks for
//   overlap   update's blocks start while advance runs, and wait there for its end; on devices of
//             compute capability 9.0 and later, and in graphs with a driver of CUDA 12.3 or later
//   few       a table of few slots, but of float64, is sent to the device in 4 KiB; as usual in 32
#pragma once

#include <algorithm>
#include <string_view>

#include "../rules/arithmetic.h"

namespace fastopt::cuda {
namespace {

#ifndef FASTOPT_CUDA_THREADS
#define FASTOPT_CUDA_THREADS 256
#endif
#ifndef FASTOPT_CUDA_BYTES
#define FASTOPT_CUDA_BYTES 0
#endif
#ifndef FASTOPT_CUDA_BLOCKS
#define FASTOPT_CUDA_BLOCKS 0
#endif
#ifndef FASTOPT_CUDA_RULES
#define FASTOPT_CUDA_RULES
#endif
#define FASTOPT_TEXT_(...) #__VA_ARGS__
#define FASTOPT_TEXT(...) FASTOPT_TEXT_(__VA_ARGS__)

constexpr int kThreads = FASTOPT_CUDA_THREADS;
static_assert(kThreads == 128 || kThreads == 256 || kThreads == 512, "FASTOPT_CUDA_TUNE: THREADS");

// Of a thread's loads at a time, at least, and of blocks for which there are registers, by the
// bytes that this makes.
FASTOPT_RULE constexpr int bytes_ahead(bool in_double) {
  return FASTOPT_CUDA_BYTES > 0 ? FASTOPT_CUDA_BYTES : in_double ? 96 : 64;
}
FASTOPT_RULE constexpr int blocks_for(int bytes) {
  if (FASTOPT_CUDA_BLOCKS > 0) return FASTOPT_CUDA_BLOCKS;
  const int threads = bytes < 96 ? 768 : 512;
  return threads < kThreads ? 1 : threads / kThreads;
}

constexpr bool names(std::string_view list, std::string_view name) {
  while (!list.empty()) {
    const size_t end = std::min(list.find_first_of("+,"), list.size());
    if (list.substr(0, end) == name) return true;
    list.remove_prefix(std::min(end + 1, list.size()));
  }
  return false;
}

constexpr std::string_view kRules = FASTOPT_TEXT(FASTOPT_CUDA_RULES);
constexpr bool is_built(std::string_view rule) { return kRules.empty() || names(kRules, rule); }

}  // namespace
}  // namespace fastopt::cuda
