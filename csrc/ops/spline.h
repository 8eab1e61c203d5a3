// Rational-quadratic splines: one element. Widths w and heights h are softmaxes, knots their sums, and inside the bin
// (x0, y0, w, h) with the slopes d0 and d1 at its ends, with s = h / w, theta = (x - x0) / w, rest = theta (1 - theta):
//   y = y0 + h (s theta^2 + d0 rest) / over          over = s + (d0 + d1 - 2 s) rest
//   y' = slope (s / over)^2                          slope = d1 theta^2 + 2 s rest + d0 (1 - theta)^2
// The knots, with sums in the order of j and the outer ones exactly low and high:
//   part_j = fma(e_j, rest / sum e, least)   e_j = spline_exp(logit_j, largest logit)
//   knot_j+1 = fma(high - low, part_0 + ... + part_j, low)
#pragma once

#include "../math/exp.h"
#include "../math/log.h"
#include "../tiles/enum.h"

// in the order of SPLINE_VARIANTS in pyflow/_schemas.py
#define PYFLOW_SPLINE_VARIANTS(F) \
  F(nflows)                       \
  F(normflows)                    \
  F(zuko)

namespace pyflow {

PYFLOW_ENUM(SplineVariant, PYFLOW_SPLINE_VARIANTS)

constexpr int kMostBins = 32;

template <class T>
struct SplineConstants {
  T scale;      // factor of the logits of widths and heights
  T limit;      // zuko: logits of slopes stay within +-limit, those of widths and heights within half of it
  T least;      // smallest part of the domain that a bin takes
  T rest;       // 1 - bins * least, shared out by the softmax
  T min_slope;  // added to slopes
};

// v / (1 + |v| / limit)
template <class T>
PYFLOW_FN T saturated(T v, T limit) {
  return v / (T(1) + abs_(v) / limit);
}

// the logit of a width or height as the softmax takes it
template <SplineVariant V, class T>
PYFLOW_FN T spline_logit(T v, const SplineConstants<T>& c) {
  if constexpr (V == SplineVariant::zuko) {
    return saturated(v, c.limit * T(0.5));
  } else {
    return v * c.scale;
  }
}

// derivative of spline_logit
template <SplineVariant V, class T>
PYFLOW_FN T spline_logit_rate(T v, const SplineConstants<T>& c) {
  if constexpr (V == SplineVariant::zuko) {
    const T rest = T(1) + abs_(v) / (c.limit * T(0.5));
    return T(1) / (rest * rest);
  } else {
    return c.scale;
  }
}

// v <= most
template <class T>
PYFLOW_FN T spline_exp(T v, T most) {
  return exp_less(v - most, T(0));
}

template <SplineVariant V, class T>
PYFLOW_FN T spline_slope(T v, const SplineConstants<T>& c) {
  if constexpr (V == SplineVariant::zuko) {
    return exp_(saturated(v, c.limit));
  } else {
    return c.min_slope + softplus(v);
  }
}

// derivative of spline_slope
template <SplineVariant V, class T>
PYFLOW_FN T spline_slope_rate(T v, const SplineConstants<T>& c) {
  if constexpr (V == SplineVariant::zuko) {
    const T rest = T(1) + abs_(v) / c.limit;
    return exp_(v / rest) / (rest * rest);
  } else {
    return sigmoid(v);
  }
}

// `closed`: the domain contains its lower end, in zuko only without tails
template <class T>
PYFLOW_FN bool spline_inside(T x, T low, T high, bool closed) {
  // bitwise, because gcc does not vectorise the branches of && and ||
  return ((x > low) | (closed & (x == low))) & (x <= high);
}

// whether a value belongs to the bins right of a knot
template <SplineVariant V, class T>
PYFLOW_FN bool right_of(T x, T knot) {
  return V == SplineVariant::zuko ? x > knot : x >= knot;
}

template <class T>
struct SplineBin {
  T x0, w, y0, h, d0, d1;
};

// a place in a bin; terms of y and y'
template <class T>
struct SplinePlace {
  T theta, s, rest, top, over, slope;
};

// theta at the height u above y0: a root of a t^2 + b t + c by the formula that does not cancel, a + b = h s > 0
template <class T>
PYFLOW_FN T spline_root(T u, T s, const SplineBin<T>& b) {
  const T q = b.d0 + b.d1 - T(2) * s;
  const T qa = fma_(u, q, b.h * (s - b.d0)), qb = fma_(-u, q, b.h * b.d0), qc = -s * u;
  const T square = fma_(qb, qb, T(-4) * qa * qc);
  const T r = sqrt_(square < T(0) ? T(0) : square);
  const bool falls = qb >= T(0);
  const T under = falls ? -qb - r : T(2) * qa;
  const T theta = (falls ? T(2) * qc : r - qb) / (under == T(0) ? T(-1) : under);
  return theta < T(0) ? T(0) : theta > T(1) ? T(1) : theta;
}

// theta of x, or of y of an inverse
template <bool Inverse, class T>
PYFLOW_FN T spline_theta(T value, T s, const SplineBin<T>& b) {
  return Inverse ? spline_root(value - b.y0, s, b) : (value - b.x0) / b.w;
}

template <class T>
PYFLOW_FN SplinePlace<T> spline_place(T theta, T s, const SplineBin<T>& b) {
  SplinePlace<T> p;
  p.s = s;
  p.theta = theta;
  const T left = T(1) - theta, q = b.d0 + b.d1 - T(2) * s;
  p.rest = theta * left;
  p.top = fma_(s * theta, theta, b.d0 * p.rest);
  p.over = fma_(q, p.rest, s);
  p.slope = fma_(b.d1 * theta, theta, fma_(b.d0 * left, left, T(2) * s * p.rest));
  return p;
}

// value is x, or y of an inverse
template <bool Inverse, class T>
PYFLOW_FN SplinePlace<T> spline_place(T value, const SplineBin<T>& b) {
  const T s = b.h / b.w;
  return spline_place(spline_theta<Inverse>(value, s, b), s, b);
}

template <bool Inverse, class T>
PYFLOW_FN T spline_value(const SplinePlace<T>& p, const SplineBin<T>& b) {
  return Inverse ? fma_(p.theta, b.w, b.x0) : b.y0 + b.h * (p.top / p.over);
}

// y'
template <class T>
PYFLOW_FN T spline_rise(const SplinePlace<T>& p) {
  const T ratio = p.s / p.over;
  return p.slope * ratio * ratio;
}

// gradients of x (or of y, inverse), of the ends of the bin, and of both slopes
template <class T>
struct SplineGrad {
  T value, x0, x1, y0, y1, d0, d1;
};

// gy, gl: gradients of the result and of the log-determinant
template <bool Inverse, class T>
PYFLOW_FN SplineGrad<T> spline_gradient(T gy, T gl, const SplinePlace<T>& p, const SplineBin<T>& b) {
  const T left = T(1) - p.theta, step = T(1) - T(2) * p.theta, q = b.d0 + b.d1 - T(2) * p.s;
  const T by_slope = T(1) / p.slope, by_over = T(1) / p.over, by_w = T(1) / b.w;
  const T rise = spline_rise(p);
  // d log(y') / d theta
  const T of_theta = T(2) * ((b.d1 * p.theta + p.s * step - b.d0 * left) * by_slope - q * step * by_over);
  T gx = T(0);
  if constexpr (Inverse) {
    // x(y) solves y(x) = y: other parameters move x by -dy / y'
    gx = (gy - gl * of_theta * by_w) / rise;
    gy = -gx;
    gl = -gl;
  }
  const T per = gy * b.h * by_over * by_over;
  const T twice = T(2) * p.rest, stay = T(1) - twice;
  const T g_theta = fma_(gy * b.w, rise, gl * of_theta);
  const T of_s = T(2) / p.s + twice * by_slope - T(2) * stay * by_over;
  const T g_s = fma_(per, p.theta * p.theta * p.over - p.top * stay, gl * of_s);
  SplineGrad<T> g;
  g.d0 = fma_(per * p.rest, p.over - p.top, gl * (left * left * by_slope - twice * by_over));
  g.d1 = fma_(-per * p.rest, p.top, gl * (p.theta * p.theta * by_slope - twice * by_over));
  const T g_w = -(g_theta * p.theta + g_s * p.s) * by_w;
  const T g_h = fma_(gy, p.top * by_over, g_s * by_w);
  g.x0 = -g_theta * by_w - g_w;
  g.x1 = g_w;
  g.y0 = gy - g_h;
  g.y1 = g_h;
  g.value = Inverse ? gx : g_theta * by_w;
  return g;
}

}  // namespace pyflow
