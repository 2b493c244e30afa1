#include "members.h"

#include "reading.h"

namespace fastopt {

void collect(py::handle param_group, int group, std::vector<Member>& members) {
  static PyObject* const key = PyUnicode_InternFromString("params");
  const Torch& torch = fastopt::torch();
  const py::tuple params = items_of(param_group[py::handle(key)]);
  members.reserve(members.size() + params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    PyObject* param = PyTuple_GET_ITEM(params.ptr(), i);
    if (i + 4 < params.size()) {
      torch.prefetch(PyTuple_GET_ITEM(params.ptr(), i + 4), Ahead::kTensor);
    }
    auto grad = py::reinterpret_steal<py::object>(grad_of(param));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) continue;
    if (!torch.is_tensor(param) || !torch.is_tensor(grad)) {
      throw NotOurs{"a parameter or gradient is no tensor"};
    }
    Member& member = members.emplace_back();
    member.group = group;
    member.index = static_cast<int>(i);
    member.param = py::reinterpret_borrow<py::object>(param);
    member.grad = std::move(grad);
  }
}

bool has_duplicates(const std::vector<Member>& members) {
  int bits = 4;
  while ((size_t{1} << bits) < 2 * members.size()) ++bits;
  const size_t mask = (size_t{1} << bits) - 1;
  std::vector<PyObject*> table(mask + 1);  // open addressing: a few ns a parameter
  for (const Member& member : members) {
    PyObject* const param = member.param.ptr();
    size_t at = reinterpret_cast<uintptr_t>(param) * 0x9E3779B97F4A7C15u >> (64 - bits);
    for (; table[at]; at = (at + 1) & mask) {
      if (table[at] == param) return true;
    }
    table[at] = param;
  }
  return false;
}

std::string name_of(py::handle param_group, const Member& member) {
  if (param_group.contains("param_names")) {
    const py::sequence param_names = param_group["param_names"];
    return "parameter '" + text(param_names[member.index]) + "'";
  }
  return "parameter " + std::to_string(member.index) + " of group " + std::to_string(member.group);
}

}  // namespace fastopt
