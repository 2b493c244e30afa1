// Picks, once, the copy of apply.cpp that suits this processor.
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "apply.h"

namespace fastopt::cpu {

#define FASTOPT_DECLARE(isa)     \
  void apply_##isa(const Work&); \
  void sum_squares_##isa(const Work&, double*);
FASTOPT_DECLARE(baseline)
#ifdef FASTOPT_X86
FASTOPT_DECLARE(avx2)
FASTOPT_DECLARE(avx512)
#endif

namespace {

struct InstructionSet {
  const char* name;
  void (*apply)(const Work&);
  void (*sum_squares)(const Work&, double*);
};

InstructionSet choose() {
#ifdef FASTOPT_X86
  // FASTOPT_ISA holds a processor to a smaller set: for tests, and to rule a set out in the field.
  const char* limit = std::getenv("FASTOPT_ISA");
  const auto allowed = [&](const char* name) { return !limit || !std::strcmp(limit, name); };
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return {"avx512", apply_avx512, sum_squares_avx512};
  }
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {"avx2", apply_avx2, sum_squares_avx2};
#endif
  return {"baseline", apply_baseline, sum_squares_baseline};
}

const InstructionSet& chosen() {
  static const InstructionSet set = choose();
  return set;
}

// A forked child has its parent's OpenMP runtime without the threads, and would wait for them. Who
// started them does not matter (torch's operations do, too): so this is registered at import.
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// What a table says of the work on it.
Work work_of(const Table& table, int threads) {
  Work work{};
  work.states = table.states;
  work.counts = table.counts;
  work.format = table.format;
  work.slots = table.slots.data();
  work.slot_count = static_cast<int64_t>(table.slots.size());
  work.chunk_count = table.chunk_count;
  work.layouts = table.layouts.data();
  work.numel = table.numel;
  work.threads = forked || !openmp() ? 1 : threads;
  return work;
}

}  // namespace

const char* instruction_set() { return chosen().name; }

bool openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

void apply(int rule, const Table& table, const Group* groups, const Table* averages,
           const Group& decay, float grad_scale, double clip, int threads) {
  const auto scalars = [&] {
    return std::unique_ptr<unsigned char[]>(new unsigned char[table.slots.size() * kScalarBytes]);
  };
  const auto own = scalars(), of_averages = averages ? scalars() : nullptr;
  Work average{};
  if (averages) {
    average = work_of(*averages, threads);
    average.groups = &decay;
    average.scalars = of_averages.get();
    average.grad_scale = 1;
    average.clip = 1;
  }
  Work work = work_of(table, threads);
  work.rule = rule;
  work.groups = groups;
  work.scalars = own.get();
  work.grad_scale = grad_scale;
  work.clip = clip;
  work.average = averages ? &average : nullptr;
  chosen().apply(work);
}

void sum_squares(const Table& table, double* sums, int threads) {
  chosen().sum_squares(work_of(table, threads), sums);
}

double total(const std::vector<double>& sums) {
  double lane[kLanes] = {};
  for (size_t i = 0; i < sums.size(); ++i) lane[i % kLanes] += sums[i];
  return add_lanes(lane);
}

}  // namespace fastopt::cpu
