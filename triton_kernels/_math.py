"""Device mathematics: csrc/math, operation for operation.

float32 functions return the same bits as the C++ ones: the same polynomials in the same order, fma only where
written (kernels are launched with fusion off), IEEE division. float64 functions are within a few ulp of libm.
Functions take tensors of the compute type, float32 or float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._backend import interpreting

LOG2E = tl.constexpr(1.44269504)
LN2_HI = tl.constexpr(0.693145752)
LN2_LO = tl.constexpr(1.42860677e-6)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to nearest even
ROUND_F64 = tl.constexpr(1.5 * 2.0**52)
ROUND_BITS = tl.constexpr(0x4B400000)
SMALLEST = tl.constexpr(2.0**-126)  # smallest normal float32; a smaller literal would become float64
BITS_OF_4 = tl.constexpr(0x40800000)
BITS_OF_20 = tl.constexpr(0x41A00000)
BITS_OF_104 = tl.constexpr(0x42D00000)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)


if interpreting():

    def on_nvidia() -> bool:
        return False

else:

    @tl.core.builtin
    def on_nvidia(_semantic=None):
        """Whether the kernel is compiled for an NVIDIA GPU, also ahead of time without one."""
        return tl.constexpr(_semantic.builder.options.backend_name == "cuda")


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(i):
    return i.to(tl.float32, bitcast=True)


@triton.jit
def div(a, b):
    """IEEE division (`/` is approximate in float32)."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def sqrt(x):
    """IEEE square root."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def div_normal(a, b):
    """IEEE division for 1 <= b < 2**32 and a, a / b of at least 2**-60; or b = 1 or 2 and any a >= +0.0.

    The instructions that ptxas makes of div.rn for normal operands, without its branch to the slow path. NaN stays NaN.
    """
    if on_nvidia() and a.dtype == tl.float32:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], tl.float32, True, 1)
        minus = neg(b)
        y = tl.fma(y, tl.fma(minus, y, constant(1.0, b)), y)
        q = a * y
        return tl.fma(y, tl.fma(minus, q, a), q)
    else:
        return div(a, b)


@triton.jit
def sqrt_normal(x):
    """Correctly rounded square root of -0.0 or a float32 in [2**-101, infinity).

    The instructions that ptxas makes of sqrt.rn for this range, without its branch to the slow path.
    """
    if on_nvidia():
        # the lower bound keeps -0.0 away from its infinite reciprocal root
        above = tl.maximum(x, SMALLEST)
        y = tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [above], tl.float32, True, 1)
        root = x * y
        return tl.fma(tl.fma(neg(root), root, x), 0.5 * y, root)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def constant(value: tl.constexpr, like):
    """A scalar of the compute type (a bare literal may be rounded to float32 first)."""
    return tl.full([], value, like.dtype)


@triton.jit
def neg(x):
    """-x, also for signed zeros (unary minus compiles to 0 - x)."""
    return x * -1.0


@triton.jit
def copysign(x, s):
    return from_bits((bits(x) & 0x7FFFFFFF) | (bits(s) & -0x80000000))


@triton.jit
def mul_add(a, b, c, FUSED: tl.constexpr):
    """a * b + c, rounded once if FUSED, else twice."""
    if FUSED:
        return tl.fma(a, b, c)
    else:
        return a * b + c


@triton.jit
def expm1_reduced(x, FUSED: tl.constexpr = True):
    """expm1(r) and k with x = k ln2 + r, |r| <= ln2 / 2."""
    shifted = mul_add(x, LOG2E, ROUND, FUSED)
    kf = shifted - ROUND
    k = bits(shifted) - ROUND_BITS
    r = mul_add(kf, -LN2_HI, x, FUSED)
    r = mul_add(kf, -LN2_LO, r, FUSED)
    q = mul_add(r, 0.0013946447288617492, 0.008366581983864307, FUSED)
    q = mul_add(q, r, 0.04166628047823906, FUSED)
    q = mul_add(q, r, 0.1666654348373413, FUSED)
    q = mul_add(q, r, 0.5, FUSED)
    return mul_add(r * r, q, r, FUSED), k


@triton.jit
def pow2(k):
    return from_bits((k + 127) << 23)


@triton.jit
def clamp_magnitude(x, LIMIT_BITS: tl.constexpr):
    """min(|x|, limit) with the sign of x; NaN becomes the limit."""
    i = bits(x)
    return from_bits(tl.minimum(i & 0x7FFFFFFF, LIMIT_BITS) | (i & -0x80000000))


@triton.jit
def exp(x, FUSED: tl.constexpr = True):
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        m, k = expm1_reduced(clamp_magnitude(x, BITS_OF_104), FUSED)
        p = 1.0 + m
        half = k >> 1
        y = p * pow2(half) * pow2(k - half)
        return tl.where(x == x, y, x)


@triton.jit
def exp_less(x, shift):
    """exp(x) - shift for x <= 0 and a shift of 0 or 1; see csrc/math/exp.h."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
        # Kahan's expm1: exp and log of the same rounded number
        less = tl.where(y == 1.0, x, (y - 1.0) * (x / tl.where(y == 1.0, 1.0, tl.log(y))))
        less = tl.where(y < 0.25, y - 1.0, less)
        return tl.where(shift != 0, less, y)
    else:
        p, k = expm1_reduced(tl.where(x < -87.0, -87.0, x))
        scale = pow2(k)
        return tl.fma(scale, p, scale - shift)


@triton.jit
def exp_unfused(x):
    return exp(x, False)


@triton.jit
def log1p_tail(f):
    p = tl.fma(f, -0.07857371121644974, 0.1288098394870758)
    p = tl.fma(p, f, -0.13129225373268127)
    p = tl.fma(p, f, 0.14181305468082428)
    p = tl.fma(p, f, -0.1662452220916748)
    p = tl.fma(p, f, 0.20002280175685883)
    p = tl.fma(p, f, -0.25000810623168945)
    p = tl.fma(p, f, 0.33333316445350647)
    f2 = f * f
    return tl.fma(f2 * f, p, -0.5 * f2)


@triton.jit
def log(x):
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        denormal = x < SMALLEST
        scaled = tl.where(denormal, x * 8388608.0, x)
        i = bits(scaled) - SQRT_HALF_BITS
        k = (i >> 23).to(tl.float32) - tl.where(denormal, 23.0, 0.0)
        f = from_bits((i & 0x007FFFFF) + SQRT_HALF_BITS) - 1.0
        y = tl.fma(k, LN2_HI, f + tl.fma(k, LN2_LO, log1p_tail(f)))
        y = tl.where(x == 0.0, float("-inf"), y)
        y = tl.where(x < float("inf"), y, x)
        return tl.where(x < 0.0, float("nan"), y)


@triton.jit
def log1p01(e):
    """log(1 + e) for 0 <= e <= 1."""
    if e.dtype == tl.float64:
        # the rounding of 1 + e cancels between numerator and denominator
        u = 1.0 + e
        exact = u == 1.0
        return tl.where(exact, e, tl.log(u) * (e / tl.where(exact, 1.0, u - 1.0)))
    else:
        big = e > 0.41421356
        f = tl.where(big, 0.5 * (e - 1.0), e)
        k = tl.where(big, 1.0, 0.0)
        return tl.fma(k, LN2_HI, f + tl.fma(k, LN2_LO, log1p_tail(f)))


@triton.jit
def softplus(x):
    return tl.where(x > 0.0, x, 0.0) + log1p01(exp(neg(tl.abs(x))))


@triton.jit
def sigmoid(x):
    e = exp(neg(tl.abs(x)))
    return div_normal(tl.where(x < 0.0, e, 1.0), 1.0 + e)


@triton.jit
def tanh(x):
    a = tl.abs(x)
    if x.dtype == tl.float64:
        # expm1(y) = (u - 1) y / log(u) with u = exp(y): the rounding of u cancels
        y = tl.where(a > 20.0, 40.0, 2.0 * a)
        u = tl.exp(y)
        tiny = u == 1.0
        m = tl.where(tiny, y, (u - 1.0) * (y / tl.where(tiny, 1.0, tl.log(u))))
        t = m / (m + 2.0)
        return tl.where(x < 0.0, neg(t), tl.where(x == 0.0, x, t))
    else:
        m, k = expm1_reduced(clamp_magnitude(2.0 * a, BITS_OF_20))
        e = (1.0 + m) * pow2(k)
        large = 1.0 - div_normal(constant(2.0, x), e + 1.0)
        z = a * a
        p = tl.fma(z, 0.016454307362437248, -0.05268188938498497)
        p = tl.fma(p, z, 0.13320907950401306)
        p = tl.fma(p, z, -0.33332955837249756)
        small = tl.fma(z * a, p, a)
        return copysign(tl.where(a >= 0.55, large, small), x)


@triton.jit
def tanh_unfused(x):
    if x.dtype == tl.float64:
        return tanh(x)
    else:
        a = tl.abs(x)
        m, k = expm1_reduced(clamp_magnitude(2.0 * a, BITS_OF_20), False)
        p = pow2(k)
        t = m * p + (p - 1.0)
        return copysign(tl.where(a == a, div_normal(t, t + 2.0), a), x)


@triton.jit
def round_even(x):
    """Nearest integer, ties to even, for |x| < 2**22 (float64: 2**51)."""
    if x.dtype == tl.float64:
        shift = constant(ROUND_F64, x)
    else:
        shift = constant(ROUND, x)
    return x + shift - shift


@triton.jit
def floor(x):
    """Floor on the range of `round_even`; an integer conversion would be slow and flush denormals."""
    y = round_even(x)
    return tl.where(y > x, y - 1.0, y)


@triton.jit
def atan(x):
    a = tl.abs(x)
    if x.dtype == tl.float64:
        return tl.where(x < 0.0, neg(atan_f64(a)), tl.where(x == 0.0, x, atan_f64(a)))
    else:
        large = a > 1.0
        z = tl.where(large, div(constant(-1.0, x), a), a)
        z2 = z * z
        p = tl.fma(z2, -0.0018272094892200563, 0.01106442604213953)
        p = tl.fma(p, z2, -0.03145567327737808)
        p = tl.fma(p, z2, 0.058234523981809616)
        p = tl.fma(p, z2, -0.08419457823038101)
        p = tl.fma(p, z2, 0.10957575589418411)
        p = tl.fma(p, z2, -0.1426524519920349)
        p = tl.fma(p, z2, 0.19998638331890106)
        p = tl.fma(p, z2, -0.33333301544189453)
        y = tl.fma(z2 * z, p, z)
        return copysign(tl.where(large, 1.57079637 + (y - 4.37113883e-8), y), x)


@triton.jit
def atan_f64(a):
    """atan of a >= 0, the rational approximation of Cephes' atan.c (Moshier)."""
    large = a > 2.414213562373095
    middle = a > 0.66
    num = tl.where(large, -1.0, tl.where(middle, a - 1.0, a))
    den = tl.where(large, a, tl.where(middle, a + 1.0, 1.0))
    z = num / den
    quarter = constant(0.7853981633974483, a)
    quarter_lo = constant(3.061616997868383e-17, a)
    z2 = z * z
    p = z2 * -8.750608600031904122785e-1 - 1.615753718733365076637e1
    p = p * z2 - 7.500855792314704667340e1
    p = p * z2 - 1.228866684490136173410e2
    p = p * z2 - 6.485021904942025371773e1
    q = z2 + 2.485846490142306297962e1
    q = q * z2 + 1.650270098316988542046e2
    q = q * z2 + 4.328810604912902668951e2
    q = q * z2 + 4.853903996359136964868e2
    q = q * z2 + 1.945506571482613964425e2
    turns = tl.where(large, 2.0, tl.where(middle, 1.0, 0.0))
    return turns * quarter + (z * (z2 * p / q) + z + turns * quarter_lo)


@triton.jit
def erf(x):
    if x.dtype == tl.float64:
        return tl.erf(x)
    else:
        a = tl.abs(x)
        s = a * a
        p = tl.fma(s, 8.34521561046131e-05, -0.0008137435070239007)
        p = tl.fma(p, s, 0.005200634244829416)
        p = tl.fma(p, s, -0.02685927040874958)
        p = tl.fma(p, s, 0.11283694207668304)
        p = tl.fma(p, s, -0.37612634897232056)
        p = tl.fma(p, s, 0.12837916612625122)
        small = tl.fma(p, a, a)
        t = clamp_magnitude(a, BITS_OF_4)
        q = tl.fma(t, 2.116211544489488e-05, -0.0004352211835794151)
        q = tl.fma(q, t, 0.0041746534407138824)
        q = tl.fma(q, t, -0.025128651410341263)
        q = tl.fma(q, t, 0.10829398781061172)
        q = tl.fma(q, t, 0.6333346366882324)
        q = tl.fma(q, t, 1.1295208930969238)
        q = tl.fma(q, t, -0.000175877648871392)
        return copysign(tl.where(a >= 0.93, 1.0 - exp(neg(q)), small), x)


@triton.jit
def sine_cosine(x):
    """sin and cos. float32, |x| <= 2**17: the remainder has an absolute error of 2**-30; no float64 as in angle.h."""
    if x.dtype == tl.float64:
        return tl.sin(x), tl.cos(x)
    else:
        # the nearest multiple of pi / 2, subtracted in three parts
        shifted = tl.fma(x, 0.636619747, ROUND)
        quarter, k = bits(shifted), shifted - ROUND
        r = tl.fma(k, -1.57079601, x)
        r = tl.fma(k, -3.13916473e-7, r)
        r = tl.fma(k, -5.39030253e-15, r)
        s = r * r
        p = tl.fma(s, -0.00019515296, 0.0083321608736)
        p = tl.fma(p, s, -0.16666654611)
        sine = tl.fma(r * s, p, r)
        q = tl.fma(s, 2.443315711809948e-5, -0.001388731625493765)
        q = tl.fma(q, s, 0.04166664568298827)
        q = tl.fma(q, s, -0.5)
        cosine = tl.fma(q, s, 1.0)
        swapped = (quarter & 1) != 0
        a, b = tl.where(swapped, cosine, sine), tl.where(swapped, sine, cosine)
        return from_bits(bits(a) ^ ((quarter & 2) << 30)), from_bits(bits(b) ^ (((quarter + 1) & 2) << 30))
