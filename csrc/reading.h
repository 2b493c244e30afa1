// Reading Python: what a native call finds in the objects it is given, and which backend is to step
// on a device. Memory is read as DLPack tensors; nothing is kept from call to call.
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

// The memory of a tensor that fastopt/tensors.py has made: contiguous, and plain.
template <class T>
T* memory_of(py::handle tensor) {
  DLTensor read;
  if (!torch().read(tensor, &read)) throw std::invalid_argument("a tensor has no memory");
  return reinterpret_cast<T*>(static_cast<char*>(read.data) + read.byte_offset);
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

// Reads tensors as memory.
class Reader {
 public:
  // Returns the tensor whose memory it is. Throws NotOurs when there is none that a backend could
  // use, or none like the parameter's; std::invalid_argument, which calls it `name`, when it has
  // been freed.
  py::handle read(py::handle param, py::handle tensor, const char* name, DLTensor* out) {
    if (!torch_.is_plain(tensor.ptr())) {
      keep(helper("fastopt.tensors", "memory")(param, tensor));
      tensor = kept_.back();
      if (py::isinstance<py::str>(tensor)) throw NotOurs{text(tensor)};
    }
    if (!torch_.read(tensor, out)) {
      throw NotOurs{"a tensor has layout " + text(tensor.attr("layout")) + " on device " +
                    text(tensor.attr("device"))};
    }
    // Asked of the storage: a view into a freed one lies at its offset from null.
    if (torch_.is_freed(tensor) && numel_of(*out) != 0) {
      throw std::invalid_argument(
          std::string(name) +
          " has elements but no memory: its storage has been freed, as FSDP does between uses; "
          "gather it before the step, or set the parameter's grad to None");
    }
    return tensor;
  }

  // Of the gradient's own memory, or else of a copy that goes with the parameter; returns whether.
  bool read_grad(py::handle param, py::handle grad, const DLTensor& param_memory, DLTensor* out) {
    if (torch_.is_plain(grad.ptr())) {
      read(param, grad, "grad", out);
      if (!torch_.is_lazy(grad) && in_double(*out) == in_double(param_memory)) return false;
    }
    const py::object found = helper("fastopt.tensors", "gradient")(param, grad);
    if (py::isinstance<py::str>(found)) throw NotOurs{text(found)};
    const py::object tensor = found[py::int_(0)];
    keep(tensor);
    read(param, tensor, "grad", out);
    return found[py::int_(1)].cast<bool>();
  }

  // What must live as long as what was read.
  void keep(py::object object) { kept_.push_back(std::move(object)); }

 private:
  const Torch& torch_ = torch();
  std::vector<py::object> kept_;
};

// param.grad, without looking the attribute up anew for each of a thousand plain tensors.
PyObject* grad_of(PyObject* param);

// A tuple of an iterable's items: theirs to keep while other code may change what they came from.
py::tuple items_of(py::handle iterable);

// A number, or the tensor that holds it.
struct Value {
  double number = 0;
  py::object tensor;

  // Whether it can be read without waiting for an accelerator.
  bool on_host() const { return !tensor || tensor.attr("is_cpu").cast<bool>(); }
  double read() const { return tensor ? fastopt::number(tensor) : number; }
  py::object object() const { return tensor ? tensor : py::object(py::float_(number)); }
};

Value value_of(const py::object& object);

// A value as the device's backend reads it: on an accelerator without waiting for it.
Number number_on(const Value& value, DLDevice device, const Devices& devices, Reader& reader);

}  // namespace fastopt
