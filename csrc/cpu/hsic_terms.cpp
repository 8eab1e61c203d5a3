// HSIC of pairs of variables from their row sums and sums of products, and the gradients. Sums have sixteen lanes, so
// that every instruction set gives the same bits.
#include "../args/hsic.h"
#include "sums.h"

namespace pyflow::PYFLOW_ISA {
namespace {

// one variable of an item
struct Rows {
  const double *rows, *diagonal;
  int64_t step;
  double shift;
  bool unbiased;

  Rows(const TermsArgs& a, int64_t item, int64_t m)
      : rows(a.rows + (item * a.variables + m) * a.n),
        diagonal(a.diagonals + item * a.stride[0] + m * a.stride[1]),
        step(a.stride[2]),
        shift(a.shift[item * a.variables + m]),
        unbiased(a.unbiased) {}

  double own(int64_t i) const { return diagonal[i * step] - shift; }
  double sum(int64_t i) const { return unbiased ? rows[i] : rows[i] + own(i); }
};

// divides the product of two totals
double product_divisor(const TermsArgs& a) {
  const double n = double(a.n);
  return a.unbiased ? (n - 1) * (n - 2) : n * n;
}
double rows_factor(const TermsArgs& a) { return 2 / double(a.unbiased ? a.n - 2 : a.n); }

void terms(const Terms& a, int64_t item) {
  double* totals = a.totals + item * a.variables;
  for (int64_t m = 0; m < a.variables; ++m) {
    const Rows k(a, item, m);
    totals[m] = sum_lanes(0, a.n, [&](double lane, int64_t i) { return lane + k.sum(i); });
  }
  for (int64_t p = 0; p < a.pairs; ++p) {
    const int64_t first = a.pair[2 * p], second = a.pair[2 * p + 1], at = item * a.pairs + p;
    const Rows k(a, item, first), l(a, item, second);
    double more = a.cross[at];
    if (!a.unbiased) more += sum_lanes(0, a.n, [&](double lane, int64_t i) { return lane + k.own(i) * l.own(i); });
    a.more[at] = more + totals[first] * totals[second] / product_divisor(a);
    a.less[at] = rows_factor(a) * sum_lanes(0, a.n, [&](double lane, int64_t i) { return lane + k.sum(i) * l.sum(i); });
  }
}

// adds the gradients of a pair to those of one of its variables
void add_gradients(const TermsBackward& a, int64_t item, int64_t pair, int64_t m, int64_t other) {
  const int64_t at = item * a.pairs + pair, first = (item * a.variables + m) * a.n;
  const double of_more = a.grad_more ? a.grad_more[at] : 0, of_less = a.grad_less ? a.grad_less[at] : 0;
  const double same = of_more * a.totals[item * a.variables + other] / product_divisor(a);
  const double by_row = of_less * rows_factor(a);
  const Rows l(a, item, other);
  for (int64_t i = 0; i < a.n; ++i) {
    const double grad = same + by_row * l.sum(i);
    a.grad_rows[first + i] += grad;
    if (!a.unbiased) a.grad_diagonals[first + i] += grad + of_more * l.own(i);
  }
}

}  // namespace

void hsic_terms(const Terms& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) terms(a, item);
}

void hsic_terms_backward(const TermsBackward& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    fill(a.grad_rows + u * a.n, 0.0, a.n);
    fill(a.grad_diagonals + u * a.n, 0.0, a.n);
    const int64_t item = u / a.variables, m = u % a.variables;
    for (int64_t p = 0; p < a.pairs; ++p) {
      const int64_t first = a.pair[2 * p], second = a.pair[2 * p + 1];
      if (first == m) add_gradients(a, item, p, m, second);
      if (second == m) add_gradients(a, item, p, m, first);
    }
  }
}

}  // namespace pyflow::PYFLOW_ISA
