// pyflow._host: what tests read of the kernels, without torch. Wheels leave it out; csrc/host/exports.cpp is in all.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "../args/coupling.h"
#include "../args/flow_head.h"
#include "../args/flow_program.h"
#include "../args/fsq.h"
#include "../args/gan_qp.h"
#include "../args/hsic.h"
#include "../args/math.h"
#include "../args/noise.h"
#include "../args/spline.h"
#include "../cpu/dispatch.h"

namespace py = pybind11;

namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

FloatArray evaluate(const std::string& name, const FloatArray& x) {
  if (pyflow::cpu_isa() < 0) {
    throw std::runtime_error("evaluate: none of the compiled instruction sets runs on this CPU");
  }
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
  m.doc() = "What the tests of the kernels read.";
  m.def("evaluate", &evaluate, py::arg("name"), py::arg("x"),
        "An elementary function of csrc/math of every float32 in x, flat.");
  m.def("enums", &enums, "Names of the integer arguments of operators, as in pyflow._schemas.");
  m.def("tournament", &tournament, py::arg("n"),
        "Rounds of pairs of row blocks that HSIC visits for n rows; the number of blocks stands for no partner.");
  m.def("gram_schedule", &gram_schedule, py::arg("batch"), py::arg("bytes"), py::arg("threads"),
        "(teams, items per group) of HSIC for a batch whose items need `bytes` of workspace each.");
}
