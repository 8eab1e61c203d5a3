#include "../../../csrc/args/sector.h"

#include <cstring>

#include "common.h"

namespace pyflow {
namespace {

// counts are integers below 2^24, exact as floats
void sector(int64_t points, int64_t trials) {
  std::vector<double> thresholds;
  for (int k = 0; k < 16; ++k) thresholds.push_back(double(k * k) / 256);
  std::vector<int64_t> counts(thresholds.size()), seeds(1);
  const int64_t begin = int64_t(1) << 33;  // blocks beyond 32 bits
  cpu::sector_trials({thresholds.data(), 16, points, trials, stream(seeds, false), counts.data()}, begin,
                     begin + trials);
  print("sector_trials", std::vector<float>(counts.begin(), counts.end()));
}

// prints the bits of the float64 results
void sector_formula() {
  std::vector<int64_t> n;
  std::vector<double> theta;
  for (int64_t points : {1, 2, 5, 64, 500, 3000}) {
    for (double x : {0.9, 0.5, 2.0 / double(points), 3.0 / double(points), 6.5 / double(points)}) {
      n.push_back(points);
      theta.push_back(kTwoPi.hi * (1 - x));
    }
  }
  std::vector<double> work(path_room(3000)), out(n.size());
  for (int flags = 0; flags < 2; ++flags) {
    cpu::sector_formula({n.data(), theta.data(), flags == 1, false, work.data(), out.data()}, 0, int64_t(n.size()));
    std::printf("sector_formula");
    for (double v : out) {
      uint64_t bits;
      std::memcpy(&bits, &v, sizeof bits);
      std::printf(" %llx", (unsigned long long)bits);
    }
    std::printf("\n");
  }
}

}  // namespace

PYFLOW_BITS(sector) {
  for (int64_t points : {1, 4, 7, 33}) sector(points, 1000);
  sector_formula();
}

}  // namespace pyflow
