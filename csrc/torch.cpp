#include "torch.h"

#include <stdexcept>

namespace fastopt {
namespace {

// The index of the word, among the first after the object's head, that holds `value`; else 0.
int word_holding(const void* object, py::handle value) {
  for (int i = 2; i < 4; ++i) {
    if (static_cast<void* const*>(object)[i] == PyLong_AsVoidPtr(value.ptr())) return i;
  }
  return 0;
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
  const py::object sample = py::module_::import("torch").attr("empty")(1);
  const py::object impl = sample.attr("_cdata");
  const py::object storage = sample.attr("untyped_storage")().attr("_cdata");
  return {reinterpret_cast<PyTypeObject*>(tensor.ptr()),
          reinterpret_cast<PyTypeObject*>(parameter.ptr()),
          api,
          py::module_::import("torch.autograd.graph").attr("increment_version"),
          word_holding(sample.ptr(), impl),
          word_holding(PyLong_AsVoidPtr(impl.ptr()), storage)};
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
