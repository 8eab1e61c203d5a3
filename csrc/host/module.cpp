// pyflow._host: what Python asks the native side without torch in between.
#include <pybind11/pybind11.h>

#include "../cpu/dispatch.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "CPU features, the chosen instruction set and build facts.";
  m.def("cpu_features", &pyflow::cpu_features, "Comma-separated features of this CPU that matter here.");
  m.def("compiled_isas", &pyflow::compiled_isas, "Comma-separated instruction sets in this build.");
  m.def(
      "isa",
      []() -> py::object {
        const pyflow::CpuTable* table = pyflow::cpu_table();
        return table ? py::object(py::str(table->isa)) : py::object(py::none());
      },
      "The instruction set in use, or None where none of this build runs on this CPU.");
  m.def("compiler", []() { return __VERSION__; }, "Version of the C++ compiler of this build.");
}
