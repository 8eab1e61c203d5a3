// The words of a program's code, one after the other; see Program.encode in pyflow/program.py.
#pragma once

#include <algorithm>
#include <charconv>
#include <string>
#include <string_view>
#include <system_error>

#include "device.h"

namespace pyflow {
namespace {

inline void require(bool fits) { STD_TORCH_CHECK(fits, "flow_program: the code does not fit its tensors"); }

// a process may have a locale with another decimal point, which from_chars does not heed
class Words {
 public:
  explicit Words(const std::string& text) : at_(text.data()), end_(at_ + text.size()) {}

  int64_t integer() { return number<int64_t>(); }
  double real() { return number<double>(); }
  bool flag() { return integer() != 0; }
  int below(size_t count) {
    const int64_t value = integer();
    require(value >= 0 && value < int64_t(count));
    return int(value);
  }
  // the place of the next word among `names`
  template <size_t N>
  int word(const char* const (&names)[N]) {
    skip();
    const char* last = std::find(at_, end_, ' ');
    const std::string_view found(at_, size_t(last - at_));
    const size_t place = size_t(std::find(names, names + N, found) - names);
    require(place < N);
    at_ = last;
    return int(place);
  }
  bool end() const { return at_ == end_; }

 private:
  void skip() {
    if (at_ != end_ && *at_ == ' ') ++at_;
  }

  template <class V>
  V number() {
    skip();
    V value{};
    const std::from_chars_result read = std::from_chars(at_, end_, value);
    require(read.ec == std::errc() && (read.ptr == end_ || *read.ptr == ' '));
    at_ = read.ptr;
    return value;
  }

  const char* at_;
  const char* end_;
};

}  // namespace
}  // namespace pyflow
