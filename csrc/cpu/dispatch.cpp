// Picks, once, the copy of apply.cpp that suits this processor.
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "apply.h"

namespace fastopt::cpu {

#define FASTOPT_DECLARE(isa) void apply_##isa(const Work&);
FASTOPT_DECLARE(baseline)
#ifdef FASTOPT_X86
FASTOPT_DECLARE(avx2)
FASTOPT_DECLARE(avx512)
#endif

namespace {

struct InstructionSet {
  const char* name;
  void (*apply)(const Work&);
};

InstructionSet choose() {
#ifdef FASTOPT_X86
  // FASTOPT_ISA holds a processor to a smaller set: for tests, and to rule a set out in the field.
  const char* limit = std::getenv("FASTOPT_ISA");
  const auto allowed = [&](const char* name) { return !limit || !std::strcmp(limit, name); };
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return {"avx512", apply_avx512};
  }
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {"avx2", apply_avx2};
#endif
  return {"baseline", apply_baseline};
}

const InstructionSet& chosen() {
  static const InstructionSet set = choose();
  return set;
}

// A forked child has its parent's OpenMP runtime without the threads, and would wait for them. Who
// started them does not matter (torch's operations do, too): so this is registered at import.
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

const char* instruction_set() { return chosen().name; }

void apply(int rule, const Table& table, const Group* groups, float grad_scale, int threads) {
  const std::unique_ptr<unsigned char[]> scalars(
      new unsigned char[table.slots.size() * kScalarBytes]);
  chosen().apply({rule, table.states, table.counts, table.format, groups, table.slots.data(),
                  static_cast<int64_t>(table.slots.size()), table.chunk_count, table.layouts.data(),
                  table.numel, scalars.get(), grad_scale, forked ? 1 : threads});
}

}  // namespace fastopt::cpu
