// A device that the host plays: CPU memory, a few multiprocessors, warps whose lanes can wait for
// each other, and a record of its launches.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "../../csrc/cuda/device.h"

// AddressSanitizer must know which stack is in use.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

thread_local dim3 threadIdx, blockIdx, gridDim;
int64_t vectors_streamed;

void check_aligned(uintptr_t address, size_t bytes) {
  if (address % bytes != 0) {
    throw std::runtime_error("an access to " + std::to_string(bytes) + " bytes is misaligned");
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 << 10;  // a kernel's arguments, passed on by value, are 32 KiB

// A stack that can be left and come back to.
struct Fiber {
  ucontext_t context;
  const void* stack = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's own
};

void switch_fibers(Fiber& from, const Fiber& to) {
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
  swapcontext(&from.context, &to.context);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

// Runs one warp at a time. A fiber takes lane after lane until one waits, and stays with that one;
// the next fiber takes the rest. So a warp in which no lane waits costs a single fiber.
class Warp {
 public:
  // A warp of a kernel that a lane of `outer` waits for, if there is such.
  explicit Warp(Warp* outer = nullptr) : outer_(outer) {}

  // Of the block's threads those in [begin, end). Whether each must wait for the kernel before.
  void run(const std::function<void()>& kernel, int begin, int end, bool backwards,
           bool must_wait) {
    if (outer_) {
      host_.stack = outer_->fibers_[outer_->running_].stack;
      host_.bytes = outer_->fibers_[outer_->running_].bytes;
    }
    kernel_ = &kernel;
    must_wait_ = must_wait;
    begin_ = begin;
    count_ = end - begin;
    backwards_ = backwards;
    started_ = 0;
    error_ = nullptr;
    for (used_ = 0; !error_ && started_ < count_;) resume(used_++);
    const auto waits = [](const Lane& lane) { return lane.waits; };
    while (std::any_of(lanes_, lanes_ + kLanes, waits)) {
      if (!error_) exchange();
      resume(0);
    }
    if (error_) std::rethrow_exception(error_);
  }

  // In a lane: it has waited for the kernel before.
  void note_wait() { lanes_[threadIdx.x % kLanes].waited = true; }

  // In a lane.
  uint32_t meet(const Meeting& meeting, uint32_t value) {
    if (meeting.mask != 0xffffffff || meeting.lane_mask < 0 || meeting.lane_mask >= kLanes) {
      throw std::runtime_error("only shuffles of whole warps are known here: " + name(meeting));
    }
    const unsigned thread = threadIdx.x;
    Lane& lane = lanes_[thread % kLanes];
    lane = {true, meeting, value, lane.waited};
    give_way();
    lane.waits = false;
    if (error_) throw Abandoned();
    threadIdx.x = thread;
    return lane.value;
  }

 private:
  struct Lane {
    bool waits;
    Meeting meeting;
    uint32_t value;  // that it brings, and then that it takes away
    bool waited;     // for the kernel before
  };

  struct Abandoned {};  // unwinds the stack of a lane that waits in vain

  static std::string name(const Meeting& m) {
    return std::string(m.file) + ":" + std::to_string(m.line) + " (lane mask " +
           std::to_string(m.lane_mask) + ")";
  }

  std::string whereabouts(int lane) const {
    const Lane& l = lanes_[lane];
    return "lane " + std::to_string(lane) +
           (l.waits ? " waits at " + name(l.meeting) : " has returned or never was");
  }

  // What the lanes brought, if all of them wait at one place.
  void exchange() {
    const auto place = [](const Lane& lane) {
      const Meeting& m = lane.meeting;
      return std::tie(lane.waits, m.file, m.line, m.lane_mask);
    };
    uint32_t values[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      if (place(lanes_[i]) != place(lanes_[0])) {
        error_ = std::make_exception_ptr(std::runtime_error(
            "block " + std::to_string(blockIdx.x) + ", warp " + std::to_string(begin_ / kLanes) +
            ": " + whereabouts(0) + ", " + whereabouts(i)));
        return;
      }
      values[i] = lanes_[i].value;
    }
    for (int i = 0; i < kLanes; ++i) lanes_[i].value = values[i ^ lanes_[i].meeting.lane_mask];
  }

  void resume(int fiber) {
    Fiber& to = fibers_[running_ = fiber];
    if (!stacks_[fiber]) {
      stacks_[fiber].reset(new char[kStackBytes]);
      to.stack = stacks_[fiber].get();
      to.bytes = kStackBytes;
      getcontext(&to.context);
      to.context.uc_stack.ss_sp = stacks_[fiber].get();
      to.context.uc_stack.ss_size = kStackBytes;
      makecontext(&to.context, run_lanes, 0);
      // Else AddressSanitizer would forget at each switch what it knows of the stack.
      to.context.uc_stack = {};
    }
    switch_fibers(host_, to);
  }

  // To the next lane that waits, if there is one.
  void give_way() {
    Fiber& from = fibers_[running_];
    switch_fibers(from, ++running_ < used_ ? fibers_[running_] : host_);
  }

  void run_lane(int thread) {
    threadIdx.x = thread;
    Lane& lane = lanes_[thread % kLanes];
    lane.waited = false;
    (*kernel_)();
    if (must_wait_ && !lane.waited) {
      throw std::runtime_error("block " + std::to_string(blockIdx.x) + ", thread " +
                               std::to_string(thread) + " has not waited for the kernel before");
    }
  }

  static void run_lanes();

  Warp* outer_;
  const std::function<void()>* kernel_;
  bool must_wait_;
  int begin_, count_, started_;
  int used_, running_;  // fibers
  bool backwards_;
  std::exception_ptr error_;
  Lane lanes_[kLanes] = {};
  Fiber host_, fibers_[kLanes];
  std::unique_ptr<char[]> stacks_[kLanes];
};
thread_local Warp of_host, of_lane(&of_host);
thread_local Warp* running = nullptr;

// A fiber's life: it never returns, and serves warp after warp.
void Warp::run_lanes() {
  Warp& warp = *running;
  __sanitizer_finish_switch_fiber(nullptr, &warp.host_.stack, &warp.host_.bytes);
  for (;;) {
    try {
      while (!warp.error_ && warp.started_ < warp.count_) {
        const int i = warp.started_++;
        warp.run_lane(warp.begin_ + (warp.backwards_ ? warp.count_ - 1 - i : i));
      }
    } catch (const Abandoned&) {
    } catch (...) {
      warp.error_ = std::current_exception();
    }
    warp.give_way();
  }
}

struct Launch {
  int64_t blocks, threads, vectors_streamed, argument_bytes, overlaps;
};
std::vector<Launch> launches;
unsigned launches_ever = 0;

// A launch, by its place among them, with what it is to run.
struct Kernel {
  size_t launch;
  bool backwards;
  std::function<void()> call;
};
bool holding_back = false;
std::optional<Kernel> held_back;

// One thread's kernels at a time; while a lane waits for the kernel before, that one's, too.
std::recursive_mutex device;

void run(const Kernel& kernel) {
  const Launch launch = launches[kernel.launch];
  const auto outside = std::make_tuple(running, threadIdx, blockIdx, gridDim, vectors_streamed);
  running = running ? &of_lane : &of_host;
  gridDim = dim3(static_cast<unsigned>(launch.blocks));
  vectors_streamed = 0;
  const int64_t warps = (launch.threads + kLanes - 1) / kLanes;  // of a block
  const int64_t count = launch.blocks * warps;
  std::exception_ptr error;
  for (int64_t i = 0; i < count && !error; ++i) {
    const int64_t at = kernel.backwards ? count - 1 - i : i;
    blockIdx.x = static_cast<unsigned>(at / warps);
    const int64_t begin = at % warps * kLanes;
    try {
      running->run(kernel.call, begin, std::min(begin + kLanes, launch.threads), kernel.backwards,
                   launch.overlaps);
    } catch (...) {
      error = std::current_exception();
    }
  }
  launches[kernel.launch].vectors_streamed = vectors_streamed;
  std::tie(running, threadIdx, blockIdx, gridDim, vectors_streamed) = outside;
  if (error) std::rethrow_exception(error);
}

void run_held_back() {
  if (held_back) run(*std::exchange(held_back, std::nullopt));
}

}  // namespace

// Whether a kernel runs only when the next is launched, or waits for it if it overlaps: then what
// that one reads too early is what was there before. Returns whether one had yet to run, which it
// then never will.
extern "C" __attribute__((visibility("default"))) bool hold_back(bool from_now_on) {
  const std::lock_guard lock(device);
  holding_back = from_now_on;
  return std::exchange(held_back, std::nullopt).has_value();
}

// The launches since the last call, at most so many; returns how many there were.
extern "C" __attribute__((visibility("default"))) int64_t past_launches(Launch* to, int64_t room) {
  const std::lock_guard lock(device);
  run_held_back();
  const auto count = static_cast<int64_t>(launches.size());
  std::copy_n(launches.begin(), std::min(count, room), to);
  launches.clear();
  return count;
}

uint32_t meet(const Meeting& meeting, uint32_t value) { return running->meet(meeting, value); }

void cudaGridDependencySynchronize() {
  running->note_wait();
  run_held_back();
}

// Nothing says in which order threads run: here forwards in two launches, backwards in the next
// two, so that both kernels of a step meet both.
cudaError_t run_on_host(const cudaLaunchConfig_t& config, size_t argument_bytes,
                        const std::function<void()>& call) {
  const bool overlaps =
      config.numAttrs > 0 && config.attrs->val.programmaticStreamSerializationAllowed;
  const Launch launch{config.gridDim.x, config.blockDim.x, 0, static_cast<int64_t>(argument_bytes),
                      overlaps};
  if (launch.blocks < 1 || launch.blocks > INT32_MAX || launch.threads < 1 ||
      launch.threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const std::lock_guard lock(device);
  const bool backwards = ++launches_ever / 2 % 2 == 1;
  launches.push_back(launch);
  const Kernel kernel{launches.size() - 1, backwards, call};
  if (!overlaps) run_held_back();
  if (holding_back && !overlaps) {
    held_back = kernel;
  } else {
    run(kernel);
  }
  return cudaSuccess;
}

namespace fastopt::cuda {

std::string why_not(DLDevice device) {
  return device.device_type == kDLCPU ? "" : "in this build it takes CPU tensors only";
}

bool can_overlap(DLDevice) { return true; }

// Few, so that every block takes several turns.
int multiprocessors(DLDevice) { return 3; }

DeviceGuard::DeviceGuard(DLDevice) {}
DeviceGuard::~DeviceGuard() = default;

}  // namespace fastopt::cuda
