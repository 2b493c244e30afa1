// What the core knows of torch without including any of it: two types whose memory is read as it is
// and DLPack's exchange API to read it with.
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

struct Torch {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  const DLPackExchangeAPI* api;
  py::object increment_version;
  int impl_word;     // the word of a tensor object that points to its TensorImpl, 0 if not found
  int storage_word;  // the word of a TensorImpl that points to its storage

  bool is_tensor(py::handle object) const { return PyObject_TypeCheck(object.ptr(), tensor); }

  // A tensor that is no subclass's: its memory is what it says it is.
  bool is_plain(PyObject* object) const {
    return Py_TYPE(object) == tensor || Py_TYPE(object) == parameter;
  }

  FASTOPT_PREFETCHES void prefetch(PyObject* object, Ahead ahead) const {
    if (!object || !is_plain(object) || !impl_word || !storage_word) return;
    const char* address = reinterpret_cast<char* const*>(object)[impl_word];
    if (ahead == Ahead::kStorage && address) {
      address = reinterpret_cast<char* const*>(address)[storage_word];
    }
    for (int line = 0; line < 4; ++line) __builtin_prefetch(address + 64 * line);
  }

  // False, and no Python error, where a tensor has no memory of its own (sparse, quantized, meta).
  bool read(py::handle tensor, DLTensor* out) const;

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
