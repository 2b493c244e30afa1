// The devices of a step's tensors, and which backend steps on each.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "table.h"
#include "torch.h"

namespace fastopt {

// What the core leaves to Python: fastopt/tensors.py, fastopt/clip.py, the Triton backend's
// package.
py::object helper(const char* module, const char* name);

inline bool same(DLDevice a, DLDevice b) {
  return a.device_type == b.device_type && a.device_id == b.device_id;
}

enum class Backend { kCpu, kCuda, kTriton };

// The devices that a step has met, each with the backend that steps its tensors: the one asked for
// by name, else the first that can.
class Devices {
 public:
  explicit Devices(const std::optional<std::string>& backend) : name_(backend) {}

  // To be called with a tensor of each device first. Throws NotOurs where no backend can step it.
  void meet(DLDevice device, py::handle tensor) {
    for (const Known& known : known_) {
      if (same(known.device, device)) return;
    }
    known_.push_back({device, tensor, choose(device, tensor)});
  }

  Backend backend_of(DLDevice device) const { return find(device).backend; }
  // DLPack's names are not torch's: a tensor is asked.
  py::object torch_device(DLDevice device) const { return find(device).tensor.attr("device"); }

 private:
  struct Known {
    DLDevice device;
    py::handle tensor;
    Backend backend;
  };
  struct Candidate {
    const char* name;
    Backend backend;
    std::string (*why_not)(DLDevice, py::handle tensor);
  };
  static constexpr Candidate kCandidates[] = {
      {"cpu", Backend::kCpu,
       [](DLDevice device, py::handle) -> std::string {
         return device.device_type == kDLCPU ? "" : "it takes CPU tensors only";
       }},
      {"cuda", Backend::kCuda, [](DLDevice device, py::handle) { return cuda::why_not(device); }},
      {"triton", Backend::kTriton,
       [](DLDevice, py::handle tensor) {
         const py::object reason = helper("fastopt.triton", "why_not")(tensor.attr("device"));
         return reason.is_none() ? std::string() : text(reason);
       }},
  };

  const Known& find(DLDevice device) const {
    return *std::find_if(known_.begin(), known_.end(),
                         [&](const Known& known) { return same(known.device, device); });
  }

  Backend choose(DLDevice device, py::handle tensor) const {
    std::string reasons;
    for (const Candidate& candidate : kCandidates) {
      if (name_ && *name_ != candidate.name) continue;
      const std::string reason = candidate.why_not(device, tensor);
      if (reason.empty()) return candidate.backend;
      reasons += (reasons.empty() ? "" : "; ") + std::string(candidate.name) + ": " + reason;
    }
    throw NotOurs{"no fastopt backend for parameters on " + text(tensor.attr("device")) + " (" +
                  reasons + ")"};
  }

  std::optional<std::string> name_;
  std::vector<Known> known_;
};

}  // namespace fastopt
