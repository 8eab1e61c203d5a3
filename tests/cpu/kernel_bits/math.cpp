#include "../../../csrc/args/math.h"

#include "common.h"

namespace pyflow {

PYFLOW_BITS(math) {
  int function = 0;
  for (const char* name : kMathFunctionNames) {
    const auto in = values(4099, 20);
    std::vector<float> out(in.size());
    cpu::math_evaluate({MathFunction(function++), in.data(), out.data()}, 0, int64_t(in.size()));
    print(name, out);
  }
}

}  // namespace pyflow
