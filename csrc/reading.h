// Reading Python: what a native call finds in the objects it is given. Memory is read as DLPack
// tensors; nothing is kept from call to call.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "devices.h"
#include "table.h"
#include "torch.h"

namespace fastopt {

// The memory of a tensor that fastopt/tensors.py has made: contiguous, and plain.
template <class T>
T* memory_of(py::handle tensor) {
  DLTensor read;
  if (!torch().read(tensor, &read)) throw std::invalid_argument("a tensor has no memory");
  return reinterpret_cast<T*>(static_cast<char*>(read.data) + read.byte_offset);
}

// Reads tensors as memory.
class Reader {
 public:
  // Returns the tensor whose memory it is. Throws NotOurs when there is none that a backend could
  // use, or none like the parameter's; std::invalid_argument, which calls it `name`, when it has
  // been freed.
  py::handle read(py::handle param, py::handle tensor, const char* name, DLTensor* out) {
    py::handle memory = own_memory(param, tensor);
    if (!memory) {
      keep(helper("fastopt.tensors", "memory")(param, tensor));
      memory = kept_.back();
      if (py::isinstance<py::str>(memory)) throw NotOurs{text(memory)};
    }
    return read(memory, name, out);
  }

  // Of the gradient's own memory, or else of a copy that goes with the parameter; returns whether.
  bool read_grad(py::handle param, py::handle grad, const DLTensor& param_memory, DLTensor* out) {
    if (const py::handle memory = own_memory(param, grad)) {
      read(memory, "grad", out);
      if (!torch_.is_lazy(memory) && in_double(*out) == in_double(param_memory)) return false;
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
  // The tensor whose memory it is: itself, or a DTensor's shard; null where Python is to find out.
  py::handle own_memory(py::handle param, py::handle tensor) {
    if (torch_.is_plain(tensor.ptr())) return tensor;
    py::object shard = shard_like(param, tensor);
    if (!shard) return {};
    keep(std::move(shard));
    return kept_.back();
  }

  // A DTensor's plain shard, where it is laid out as the parameter's; else null. For each of a
  // thousand tensors Python would take four times as long as all the rest.
  py::object shard_like(py::handle param, py::handle tensor);

  py::handle read(py::handle memory, const char* name, DLTensor* out) const {
    if (!torch_.read(memory, out)) {
      throw NotOurs{"a tensor has layout " + text(memory.attr("layout")) + " on device " +
                    text(memory.attr("device"))};
    }
    // Asked of the storage: a view into a freed one lies at its offset from null.
    if (torch_.is_freed(memory) && numel_of(*out) != 0) {
      throw std::invalid_argument(
          std::string(name) +
          " has elements but no memory: its storage has been freed, as FSDP does between uses; "
          "gather it before the step, or set the parameter's grad to None");
    }
    return memory;
  }

  const Torch& torch_ = torch();
  std::optional<py::object> dtensor_;  // torch's class, or null where nothing has loaded it
  std::vector<py::object> kept_;
};

// param.grad, without looking the attribute up anew for each of a thousand plain tensors.
PyObject* grad_of(PyObject* param);

// A tuple of an iterable's items: theirs to keep while other code may change what they came from.
py::tuple items_of(py::handle iterable);

// A mapping to look things up in: Python's own, which has no methods of its own, directly.
class Mapping {
 public:
  explicit Mapping(py::object object) : object_(std::move(object)) {
    static PyObject* const default_dict =
        PyObject_GetAttrString(py::module_::import("collections").ptr(), "defaultdict");
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object_.ptr()));
    is_dict_ = PyDict_CheckExact(object_.ptr()) || type == default_dict;
  }

  // What the key leads to, or null.
  py::object find(py::handle key) const {
    if (!is_dict_) return object_.contains(key) ? object_[key] : py::object();
    return checked(PyDict_GetItemWithError(object_.ptr(), key.ptr()));
  }

  // The same for a tensor, which torch hashes by its address, but through a Python call.
  py::object find_tensor(py::handle tensor) const {
    const auto hash = static_cast<Py_hash_t>(reinterpret_cast<uintptr_t>(tensor.ptr()));
    static const bool hashed_by_address = py::hash(tensor) == hash;
    if (!is_dict_ || !torch().is_plain(tensor.ptr()) || !hashed_by_address) return find(tensor);
    return checked(_PyDict_GetItem_KnownHash(object_.ptr(), tensor.ptr(), hash));
  }

  void set(py::handle key, py::object value) { object_[key] = std::move(value); }

 private:
  static py::object checked(PyObject* found) {
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return py::reinterpret_borrow<py::object>(found);
  }

  py::object object_;
  bool is_dict_;
};

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
