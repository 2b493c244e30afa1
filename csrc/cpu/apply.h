// The CPU backend's border: one step of one rule over one table.
#pragma once

#include "../table.h"

namespace fastopt::cpu {

// Fewer elements than this run on the calling thread: waking others costs more than they save.
constexpr int64_t kSerial = 32768;

// What apply.cpp reads. Raw pointers only: apply.cpp is compiled once per instruction set, and any
// inline function of the standard library in it could reach processors that lack the instructions.
struct Work {
  int rule;  // place in rules/rules.h
  int states, counts;
  const Format* format;
  const Group* groups;
  const Slot* slots;
  int64_t slot_count;
  int64_t chunk_count;
  const int64_t* layouts;
  int64_t numel;
  void* scalars;        // room for each slot's
  float grad_scale;     // gradients are divided by it and written back; 1 leaves them alone
  double clip;          // and then multiplied by this
  const Work* average;  // of the rule Average, for the same slots, or null
  int threads;
};

// The name of the instruction set in use: "avx512", "avx2" or "baseline".
const char* instruction_set();

// Whether this build can step on more than one thread.
bool openmp();

// The sums of the squares of a table's gradients, one a chunk, and their sum. Needs no GIL.
void sum_squares(const Table& table, double* sums, int threads);
double total(const std::vector<double>& sums);

// The averages of the parameters, if any, are moved by chunks, too, while these are in the cache.
// Both phases, advance and update, on the best instruction set this processor has.
// Needs no GIL.
void apply(int rule, const Table& table, const Group* groups, const Table* averages,
           const Group& decay, float grad_scale, double clip, int threads);

}  // namespace fastopt::cpu
