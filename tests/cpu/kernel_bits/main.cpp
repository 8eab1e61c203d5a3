// Prints the kernel results of this build on fixed inputs, bit by bit, to compare builds for different CPUs.
#include "common.h"

#define PYFLOW_BITS(F) \
  F(center) F(coupling) F(energy) F(flow_head) F(fsq) F(gan_qp) F(hsic) F(math) F(noise) F(sde) F(sector) F(spectral)

namespace pyflow {

#define PYFLOW_DECLARE(family) void family##_bits();
PYFLOW_BITS(PYFLOW_DECLARE)

}  // namespace pyflow

int main() {
  using namespace pyflow;
  table = cpu_table();
  if (!table) {
    std::fprintf(stderr, "none of the compiled instruction sets (%s) runs on this CPU\n", compiled_isas());
    return 1;
  }
  std::fprintf(stderr, "%s\n", table->isa);
#define PYFLOW_CALL(family) \
  state = 1;                \
  family##_bits();
  PYFLOW_BITS(PYFLOW_CALL)
  return 0;
}
