// pyflow._host: native functions that Python calls without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../args/coupling.h"
#include "../args/flow_head.h"
#include "../args/flow_program.h"
#include "../args/fsq.h"
#include "../args/gan_qp.h"
#include "../args/hsic.h"
#include "../args/math.h"
#include "../args/sector.h"
#include "../args/spline.h"
#include "../cpu/dispatch.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using FloatArray = Array<float>;

void need_kernels(const std::string& function) {
  if (pyflow::cpu_isa() >= 0) return;
  throw std::runtime_error(function + ": none of the compiled instruction sets runs on this CPU");
}

FloatArray evaluate(const std::string& name, const FloatArray& x) {
  need_kernels("evaluate");
  int index = 0;
  for (const char* known : pyflow::kMathFunctionNames) {
    if (name == known) {
      FloatArray y(x.size());
      pyflow::cpu::math_evaluate({pyflow::MathFunction(index), x.data(), y.mutable_data()}, 0, x.size());
      return y;
    }
    ++index;
  }
  throw py::value_error("evaluate: unknown function " + name);
}

Array<double> sector_probability(const Array<int64_t>& n, const Array<double>& theta, bool complement, bool log) {
  need_kernels("sector_probability");
  const int64_t size = n.size();
  if (theta.size() != size) throw py::value_error("sector_probability: n and theta must have the same size");
  Array<double> out(size);
  pyflow::SectorFormula a{n.data(), theta.data(), complement, log, nullptr, out.mutable_data()};
  const py::gil_scoped_release release;
  std::vector<double> work(size ? pyflow::path_room(*std::max_element(a.n, a.n + size)) : 0);
  a.work = work.data();
  pyflow::cpu::sector_formula(a, 0, size);
  return out;
}

// runs `rounds` rounds of multiply-adds in registers; returns how many
int64_t multiply_adds(int64_t rounds) {
  const py::gil_scoped_release release;
  int64_t count = 0;
  float sum[pyflow::kMultiplyAddLanes] = {};
  pyflow::cpu::math_multiply_add({&count, sum}, 0, rounds);
  return count * rounds;
}

// the names of every enum that operators take as an integer, in the order of that integer
py::dict enums() {
  py::dict all;
  const auto add = [&](const char* name, const auto& texts) {
    py::list names;
    for (const char* text : texts) names.append(text);
    all[name] = py::tuple(names);
  };
  add("SCALE_MAPS", pyflow::kScaleMapNames);
  add("PACKINGS", pyflow::kPackingNames);
  add("SPLINE_VARIANTS", pyflow::kSplineVariantNames);
  add("PRIORS", pyflow::kPriorNames);
  add("NOISES", pyflow::kNoiseKindNames);
  add("PURPOSES", pyflow::kPurposeNames);
  add("DISTANCES", pyflow::kDistanceNames);
  add("FSQ_VARIANTS", pyflow::kFsqVariantNames);
  add("HSIC_KERNELS", pyflow::kGramKernelNames);
  add("ACTIVATIONS", pyflow::kActivationNames);
  return all;
}

// rounds of pairs of blocks
py::list tournament(int64_t n) {
  const pyflow::Tournament t = pyflow::tournament_of(n);
  py::list rounds;
  for (int64_t round = 0; round < t.seats; ++round) {
    py::list tiles;
    for (int64_t i = 0; i < pyflow::tiles_of(t, round); ++i) {
      const pyflow::Pairing p = pyflow::pairing(t, round, i);
      tiles.append(py::make_tuple(p.first, p.second));
    }
    rounds.append(tiles);
  }
  return rounds;
}

py::tuple gram_schedule(int64_t batch, int64_t bytes, int64_t threads) {
  const pyflow::GramSchedule s = pyflow::gram_schedule(batch, bytes, threads);
  return py::make_tuple(s.teams, s.items);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "CPU features, the chosen instruction set and build facts.";
  m.def("cpu_features", &pyflow::cpu_features, "Comma-separated features of this CPU that matter here.");
  m.def("compiled_isas", &pyflow::compiled_isas, "Comma-separated instruction sets in this build.");
  m.def("supported_isas", &pyflow::supported_isas, "Those of compiled_isas() that run on this CPU, likewise.");
  m.def(
      "isa",
      []() -> py::object {
        const char* name = pyflow::cpu_isa_name();
        return name ? py::object(py::str(name)) : py::object(py::none());
      },
      "The instruction set in use, or None where none of this build runs on this CPU.");
  m.def("evaluate", &evaluate, py::arg("name"), py::arg("x"),
        "An elementary function of csrc/math of every float32 in x, flat.");
  m.def("multiply_adds", &multiply_adds, py::arg("rounds"),
        "Runs rounds of float32 multiply-adds in the registers of the calling thread, without the GIL; how many they "
        "were.");
  m.def("sector_probability", &sector_probability, py::arg("n"), py::arg("theta"), py::arg("complement"),
        py::arg("log"), "Probability that n points of a disc lie inside one sector of angle theta, elementwise, flat.");
  m.def("enums", &enums, "Names of the integer arguments of operators, as in pyflow._schemas.");
  m.def("tournament", &tournament, py::arg("n"),
        "Rounds of pairs of row blocks that HSIC visits for n rows; the number of blocks stands for no partner.");
  m.def("gram_schedule", &gram_schedule, py::arg("batch"), py::arg("bytes"), py::arg("threads"),
        "(teams, items per group) of HSIC for a batch whose items need `bytes` of workspace each.");
  m.def("compiler", []() { return __VERSION__; }, "Version of the C++ compiler of this build.");
}
