// Prints the kernel results of this build on fixed inputs, bit by bit, to compare builds for different CPUs.
#include "common.h"

int main() {
  using namespace pyflow;
  if (cpu_isa() < 0) {
    std::fprintf(stderr, "none of the compiled instruction sets (%s) runs on this CPU\n", compiled_isas());
    return 1;
  }
  std::fprintf(stderr, "%s\n", cpu_isa_name());
  for (const auto& [family, bits] : families()) {
    used_values = false;
    for (const bool with : {true, false}) {
      if (!with && !used_values) continue;
      specials = with;
      state = 1;
      bits();
    }
  }
  return 0;
}
