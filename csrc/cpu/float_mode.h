// A thread's floating-point mode: how it rounds and, torch.set_flush_denormal, whether it flushes.
//
// Part of apply.cpp, and bound by what is said there.
#pragma once

#include <cstdint>

namespace fastopt::cpu {
namespace {

#if defined(__x86_64__)
using FloatMode = uint32_t;
FloatMode float_mode() { return __builtin_ia32_stmxcsr(); }
void set_float_mode(FloatMode mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined(__aarch64__)
using FloatMode = uint64_t;
FloatMode float_mode() {
  FloatMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
void set_float_mode(FloatMode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else  // unknown: every thread keeps its own
using FloatMode = uint32_t;
FloatMode float_mode() { return 0; }
void set_float_mode(FloatMode) {}
#endif

}  // namespace
}  // namespace fastopt::cpu
