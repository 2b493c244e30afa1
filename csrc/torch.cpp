#include "torch.h"

#include <algorithm>
#include <stdexcept>

namespace fastopt {
namespace {

uint64_t word(const void* object, int index) { return static_cast<const uint64_t*>(object)[index]; }

// Where a tensor's TensorImpl, a storage's StorageImpl is.
const void* address_of(py::handle object) { return PyLong_AsVoidPtr(object.attr("_cdata").ptr()); }

// The first of the words [begin, end) of an object that points to an address; 0 where none does.
int find_word(const void* object, int begin, int end, const void* address) {
  for (int i = begin; i < end; ++i) {
    if (word(object, i) == reinterpret_cast<uintptr_t>(address)) return i;
  }
  return 0;
}

Words find_words() {
  const py::object torch = py::module_::import("torch");
  const auto zeros = [&](const char* dtype) {
    return torch.attr("zeros")(1, py::arg("dtype") = torch.attr(dtype), py::arg("device") = "cpu");
  };
  const py::object real = zeros("float32"), complex = zeros("complex64");
  const py::object conjugate = complex.attr("conj")(), negative = conjugate.attr("imag");
  const void* const impl = address_of(real);

  Words words{};
  words.impl = find_word(real.ptr(), 2, 4, impl);
  words.storage = find_word(impl, 2, 4, address_of(real.attr("untyped_storage")()));
  // The keys of a pending view are those of a tensor that has its values, and one more.
  const auto one_bit = [](uint64_t bits) { return bits != 0 && (bits & (bits - 1)) == 0; };
  for (int i = 4; i < 22; ++i) {  // all of a TensorImpl since torch 2.10
    const uint64_t negation = word(impl, i) ^ word(address_of(negative), i);
    const uint64_t conjugation = word(address_of(complex), i) ^ word(address_of(conjugate), i);
    const uint64_t lazy = negation | conjugation;
    if (!one_bit(negation) || !one_bit(conjugation) || one_bit(lazy)) continue;
    if ((word(impl, i) | word(address_of(complex), i)) & lazy) continue;
    words.keys = words.keys ? -1 : i;  // more than one word like it: none is taken
    words.lazy_keys = lazy;
  }
  words.keys = std::max(words.keys, 0);
  // torch's own allocations have their address in two words, memory of others' in the one.
  const py::object others = torch.attr("frombuffer")(py::bytearray("12345678", 8),
                                                     py::arg("dtype") = torch.attr("uint8"));
  words.data = find_word(address_of(others.attr("untyped_storage")()), 1, 6,
                         PyLong_AsVoidPtr(others.attr("data_ptr")().ptr()));
  return words;
}

Torch find_torch() {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  const py::object parameter = py::module_::import("torch.nn").attr("Parameter");
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) {
    throw py::import_error("fastopt needs torch >= 2.10; pip install -U torch");
  }
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  while (api && api->version.major > kDLMajorVersion) api = api->older;
  if (!api || api->version.major != kDLMajorVersion || !api->dltensor_from_py_object_no_sync) {
    throw py::import_error(
        "fastopt does not know this torch's version of DLPack; "
        "pip install -U fastopt");
  }
  return {reinterpret_cast<PyTypeObject*>(tensor.ptr()),
          reinterpret_cast<PyTypeObject*>(parameter.ptr()), api,
          py::module_::import("torch.autograd.graph").attr("increment_version"), find_words()};
}

}  // namespace

const Torch& torch() {
  static const Torch* const torch = new Torch(find_torch());
  return *torch;
}

bool Torch::read(py::handle tensor, DLTensor* out) const {
  if (api->dltensor_from_py_object_no_sync(tensor.ptr(), out) == 0) return true;
  PyErr_Clear();
  return false;
}

bool Torch::is_lazy(py::handle tensor) const {
  if (words.impl && words.keys) {
    return word(reinterpret_cast<const void*>(word(tensor.ptr(), words.impl)), words.keys) &
           words.lazy_keys;
  }
  return tensor.attr("is_conj")().cast<bool>() || tensor.attr("is_neg")().cast<bool>();
}

bool Torch::is_freed(py::handle tensor) const {
  if (words.impl && words.storage && words.data) {
    const auto* const impl = reinterpret_cast<const void*>(word(tensor.ptr(), words.impl));
    return !word(reinterpret_cast<const void*>(word(impl, words.storage)), words.data);
  }
  return tensor.attr("untyped_storage")().attr("data_ptr")().cast<uintptr_t>() == 0;
}

void* Torch::stream(DLDevice device) const {
  void* stream = nullptr;
  if (api->current_work_stream(device.device_type, device.device_id, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

Scratch::Scratch(DLDevice device, int64_t bytes) {
  int64_t shape = bytes, stride = 1;
  const DLTensor like{nullptr, device, 1, {kDLUInt, 8, 1}, &shape, &stride, 0};
  std::string error;
  const auto set_error = [](void* context, const char*, const char* message) {
    *static_cast<std::string*>(context) = message;
  };
  if (torch().api->managed_tensor_allocator(&like, &tensor_, &error, set_error) != 0) {
    throw std::runtime_error(error);
  }
}

double number(py::handle value) {
  const double x = PyFloat_AsDouble(value.ptr());
  if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}

std::string text(py::handle object) { return py::str(object).cast<std::string>(); }

}  // namespace fastopt
