// What the core knows of torch without including any of it: two types whose memory is read as it
// is, DLPack's exchange API to read it with, and where a tensor keeps what DLPack leaves out.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "dlpack_abi.h"

namespace py = pybind11;

namespace fastopt {

// Between two steps a model's forward and backward pass have emptied the caches, and reading a
// tensor is mostly waiting for memory. So memory is asked for ahead of its use: first a tensor's
// TensorImpl, then its storage. A cold step on 1000 small tensors takes half the time for it.
enum class Ahead { kTensor, kStorage };

// For functions that only prefetch: compilers drop calls that compute nothing.
#define FASTOPT_PREFETCHES __attribute__((always_inline)) inline

// Words of torch's objects, found at import on tensors of which torch says what must be there; 0
// where one was not found. They save a thousand calls a step; without them torch is asked.
struct Words {
  int impl;            // of a tensor object: points to its TensorImpl
  int storage;         // of a TensorImpl: points to its storage
  int keys;            // of a TensorImpl: its dispatch keys
  uint64_t lazy_keys;  // those of a pending conjugation or negation
  int data;            // of a storage: points to its memory
};

struct Torch {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  const DLPackExchangeAPI* api;
  py::object increment_version;
  Words words;

  bool is_tensor(py::handle object) const { return PyObject_TypeCheck(object.ptr(), tensor); }

  // A tensor that is no subclass's: its memory is what it says it is.
  bool is_plain(PyObject* object) const {
    return Py_TYPE(object) == tensor || Py_TYPE(object) == parameter;
  }

  FASTOPT_PREFETCHES void prefetch(PyObject* object, Ahead ahead) const {
    if (!object || !is_plain(object) || !words.impl || !words.storage) return;
    const char* address = reinterpret_cast<char* const*>(object)[words.impl];
    if (ahead == Ahead::kStorage && address) {
      address = reinterpret_cast<char* const*>(address)[words.storage];
    }
    for (int line = 0; line < 4; ++line) __builtin_prefetch(address + 64 * line);
  }

  // False, and no Python error, where a tensor has no memory of its own (sparse, quantized, meta).
  bool read(py::handle tensor, DLTensor* out) const;

  // Whether conjugation or negation is pending: a flag on a view, which DLPack does not pass on.
  bool is_lazy(py::handle tensor) const;

  // Whether a tensor's storage has been freed, as FSDP does by resizing it to nothing.
  bool is_freed(py::handle tensor) const;

  // The stream torch is working on; null where the device has none.
  void* stream(DLDevice device) const;
};

const Torch& torch();

// Memory from torch's allocator, given back to it with this object: on an accelerator its next
// owner is behind all work launched meanwhile on the current stream.
class Scratch {
 public:
  Scratch(DLDevice device, int64_t bytes);
  ~Scratch() { tensor_->deleter(tensor_); }
  Scratch(const Scratch&) = delete;
  void* data() const { return tensor_->tensor.data; }

 private:
  DLManagedTensorVersioned* tensor_ = nullptr;
};

// float(value); of a tensor on an accelerator, its work is waited for.
double number(py::handle value);

std::string text(py::handle object);

}  // namespace fastopt
