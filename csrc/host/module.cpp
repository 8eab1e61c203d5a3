// pyflow._host: what Python asks the native side without torch in between.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "../cpu/dispatch.h"
#include "../cpu/math.h"

namespace py = pybind11;

namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

FloatArray evaluate(const std::string& name, const FloatArray& x) {
  const pyflow::CpuTable* table = pyflow::cpu_table();
  if (!table) throw std::runtime_error("evaluate: none of the compiled instruction sets runs on this CPU");
  int index = 0;
  for (const char* known : pyflow::kMathFunctions) {
    if (name == known) {
      FloatArray y(x.size());
      table->math_evaluate({pyflow::MathFunction(index), x.data(), y.mutable_data()}, 0, x.size());
      return y;
    }
    ++index;
  }
  throw py::value_error("evaluate: unknown function " + name);
}

}  // namespace

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
  m.def("evaluate", &evaluate, py::arg("name"), py::arg("x"),
        "An elementary function of csrc/math of every float32 in x, flat.");
  m.def("compiler", []() { return __VERSION__; }, "Version of the C++ compiler of this build.");
}
