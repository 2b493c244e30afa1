#include "reading.h"

#include "cuda/apply.h"

namespace fastopt {

py::object helper(const char* module, const char* name) {
  return py::module_::import(module).attr(name);
}

py::object Reader::shard_like(py::handle param, py::handle tensor) {
  if (!dtensor_) {
    const py::dict modules = py::module_::import("sys").attr("modules");
    const char* const name = "torch.distributed.tensor";
    dtensor_ = modules.contains(name) ? modules[name].attr("DTensor") : py::object();
  }
  const py::handle type = *dtensor_;
  if (!type || !py::type::handle_of(tensor).is(type) || !py::type::handle_of(param).is(type)) {
    return {};
  }
  if (!tensor.is(param)) {
    const py::object spec = tensor.attr("_spec"), own = param.attr("_spec");
    if (!spec.attr("mesh").is(own.attr("mesh")) ||
        !spec.attr("placements").equal(own.attr("placements"))) {
      return {};
    }
  }
  py::object shard = tensor.attr("_local_tensor");
  return torch_.is_plain(shard.ptr()) ? shard : py::object();
}

PyObject* grad_of(PyObject* param) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  static PyObject* const property =
      PyObject_GetAttr(reinterpret_cast<PyObject*>(torch().tensor), name);
  if (!torch().is_plain(param)) return PyObject_GetAttr(param, name);
  return Py_TYPE(property)->tp_descr_get(property, param, nullptr);
}

py::tuple items_of(py::handle iterable) {
  auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(iterable.ptr()));
  if (!items) throw py::error_already_set();
  return items;
}

Value value_of(const py::object& object) {
  return torch().is_tensor(object) ? Value{0, object} : Value{number(object), {}};
}

Number number_on(const Value& value, DLDevice device, const Devices& devices, Reader& reader) {
  if (!value.tensor || devices.backend_of(device) == Backend::kCpu) {
    return {value.read(), nullptr, {}, {}};
  }
  DLTensor tensor;
  const auto read = [&](const py::object& object) {
    reader.read(object, object, "an option", &tensor);
    reader.keep(object);
  };
  read(value.tensor);
  if (!same(tensor.device, device)) {
    if (value.on_host()) return {value.read(), nullptr, {}, {}};
    read(helper("fastopt.tensors", "moved")(value.tensor, devices.torch_device(device)));
  }
  return as_number(tensor);
}

}  // namespace fastopt
