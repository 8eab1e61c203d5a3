#include "common.h"

namespace pyflow {

void math_bits() {
  int function = 0;
  for (const char* name : kMathFunctionNames) {
    const auto in = values(4099, 20);
    std::vector<float> out(in.size());
    table->math_evaluate({MathFunction(function++), in.data(), out.data()}, 0, int64_t(in.size()));
    print(name, out);
  }
}

}  // namespace pyflow
