"""The sector probability against Stevens' sum in exact integers, and the trials against it."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyflow
from pyflow.reference import sector as ref
from pyflow.stats import SectorEstimate, sector_probability, sector_probability_mc

TAU = 2 * math.pi
BACKENDS = ["auto", "reference"]


@functools.cache
def pi_bits(bits):
    """pi * 2**bits, by Machin's formula."""

    def arctan(inverse):
        power = total = (1 << bits + 64) // inverse
        k = 1
        while power:
            power //= -(inverse**2)
            k += 2
            total += power // k
        return total

    return 4 * (4 * arctan(5) - arctan(239)) >> 64


def power_bits(base, n, bits):
    result = 1 << bits
    while n:
        if n & 1:
            result = result * base >> bits
        base = base * base >> bits
        n >>= 1
    return result


def stevens(n, theta):
    """(P * 2**bits, bits) for the very float theta; bits far beyond what the sum cancels."""
    bits = 1500 + 8 * n // 5
    angle = Fraction(theta)
    x = (1 << bits) - (angle.numerator << 2 * bits) // (angle.denominator * 2 * pi_bits(bits))
    total, choices, k = 0, 1, 1
    while k <= n and k * x < 1 << bits:
        choices = choices * (n - k + 1) // k
        term = choices * power_bits((1 << bits) - k * x, n - 1, bits)
        if term == 0:
            break
        total += term if k % 2 else -term
        k += 1
    return total, bits


def logarithm(numerator, bits):
    length = numerator.bit_length()
    return math.log(Fraction(numerator, 1 << length)) + (length - bits) * math.log(2)


def check(n, xs, error=1e-12):
    """P, 1 - P and both logarithms at theta = 2 pi (1 - x)."""
    for x in xs:
        theta = TAU * (1 - x)
        p, bits = stevens(n, theta)
        for complement, exact in ((False, p), (True, (1 << bits) - p)):
            where = f"n={n}, n x={n * x}, complement={complement}"
            got = sector_probability(n, theta, complement=complement)
            if exact >= (1 << bits) // 10**250:
                assert abs(Fraction(got) * (1 << bits) - exact) <= Fraction(error) * exact, where
            log = sector_probability(n, theta, complement=complement, log=True)
            if exact <= 1 << bits - 900:  # n x < 1, to the accuracy of the sum
                assert log < -600 and got < 1e-250, where
            elif got > 0.5:
                small = sector_probability(n, theta, complement=not complement)
                assert abs(log - math.log1p(-small)) <= 1e-15 * abs(log), where
            else:
                assert abs(log - logarithm(exact, bits)) <= 1e-14 * abs(log) + 1e-13, where


def places(n):
    """Shares of the circle left over: the hard ones, and all over."""
    spread = np.random.default_rng(n).random(12)
    near = [2 / n, 2.001 / n, 1.999 / n, 1.01 / n, 1.5 / n, 3 / n, math.log(n) / n, 1.2 * math.log(n) / n]
    return [x for x in (*near, 0.5, 0.9, 0.1, 0.3, *spread, *(4 * spread * math.log(n) / n)) if 0 < x < 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 16, 31, 32, 33, 64, 100, 128, 256, 512])
def test_accuracy(n, backend):
    with pyflow.backend(backend):
        check(n, places(n))


def test_accuracy_of_many_points():
    check(1024, (2 / 1024, 1.2 / 1024, 3 / 1024, 7 / 1024))
    check(4096, (3 / 4096, 8.4 / 4096, 20 / 4096))
    check(10000, (5e-4, 9.3e-4, 1.05e-3, 2e-3))


@pytest.mark.slow
@pytest.mark.parametrize("n", [777, 1024, 2048, 4096, 10000])
def test_accuracy_everywhere(n):
    check(n, places(n))


def test_closed_forms():
    theta = np.linspace(1e-6, math.pi, 100)
    for n in (1, 2, 3, 17, 200):
        np.testing.assert_allclose(sector_probability(n, theta), n * (theta / TAU) ** (n - 1), 1e-13, 1e-300)
    assert sector_probability(4, math.pi) == pytest.approx(0.5, abs=1e-15)
    # two terms
    assert sector_probability(3, 0.6 * TAU) == pytest.approx(3 * 0.6**2 - 3 * 0.2**2, abs=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ends(backend):
    with pyflow.backend(backend):
        for theta, p in ((-1, 0), (0, 0), (-0.0, 0), (TAU, 1), (7.0, 1), (1e300, 1), (-1e300, 0)):
            for n in (1, 2, 1000):
                assert sector_probability(n, theta) == p
                assert sector_probability(n, theta, complement=True) == 1 - p
                assert sector_probability(n, theta, log=True) == (0 if p else -math.inf)
                assert sector_probability(n, theta, complement=True, log=True) == (-math.inf if p else 0)
        for theta in (5e-324, 1e-300, 1e-8, 1.0, 6.28, 6.283185307179585):
            assert sector_probability(1, theta) == 1 and sector_probability(1, theta, complement=True) == 0
        # a sector of all but an n-th of the circle, and more, is never too small
        assert sector_probability(5, TAU * 0.81) == 1 and sector_probability(5, TAU * 0.81, complement=True) == 0
        assert 0 < sector_probability(5, TAU * 0.79, complement=True) < 1e-4
        assert sector_probability(2, 5e-324) == pytest.approx(0, abs=1e-300)


def test_far_below_underflow():
    log = sector_probability(10000, 0.01, log=True)
    assert log == pytest.approx(math.log(10000) + 9999 * math.log(0.01 / TAU), rel=1e-14)
    assert sector_probability(10000, 0.01) == 0
    assert sector_probability(10000, TAU * (1 - 1.0001e-4), complement=True, log=True) < -9e4


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_logarithms_of_the_smallest_angles(backend):
    angles = [5e-324, 1e-310, 2.0**-901, 2.0**-899, 1e-200]
    with pyflow.backend(backend):
        for n in (1, 2, 5, 1000):
            got = sector_probability(n, angles, log=True)
            want = [math.log(n) + (n - 1) * (math.log(angle) - math.log(2 * math.pi)) for angle in angles]
            np.testing.assert_allclose(got, want, rtol=1e-13)
        assert sector_probability(5, [0.0, -1.0], log=True).tolist() == [-math.inf] * 2
        assert sector_probability(5, 5e-324, log=True, complement=True) == 0


def test_pandas_columns_and_tables():
    pandas = pytest.importorskip("pandas")
    n, theta = [3, 4, 50], [1.0, 2.5, 6.0]
    want = sector_probability(n, theta)
    trials = sector_probability_mc(4, np.array(theta), 50, 0)
    for kinds in (("int64", "float64"), ("Int64", "Float64"), ("object", "object")):
        columns = pandas.Series(n, dtype=kinds[0]), pandas.Series(theta, dtype=kinds[1])
        assert np.array_equal(sector_probability(*columns), want)
        assert sector_probability_mc(4, columns[1], 50, 0) == trials
    table = pandas.DataFrame({"a": theta, "b": list("xyz")})
    assert np.array_equal(sector_probability(4, table[["a"]]), sector_probability(4, np.array(theta)[:, None]))
    with pytest.raises(TypeError, match=r"^sector_probability_mc: theta must be real numbers, got str of column 'b'$"):
        sector_probability_mc(4, table, 50, 0)
    with pytest.raises(TypeError, match=r"^sector_probability: n must be integers, got float$"):
        sector_probability(pandas.Series(theta, dtype="object"), 1.0)
    table.loc[1, "a"] = None
    for name, arguments in (("n", (table["a"], 1.0)), ("theta", (3, table["a"]))):
        with pytest.raises(
            ValueError, match=f"^sector_probability: {name} must have no missing values, got one in row 1$"
        ):
            sector_probability(*arguments)


def test_ragged_lists():
    for name, arguments in (("n", ([[1, 2], [3]], 1.0)), ("theta", (3, [[1.0, 2.0], [3.0]]))):
        with pytest.raises(ValueError, match=f"^sector_probability: {name} must have rows of one length, got others$"):
            sector_probability(*arguments)


def test_estimates_compare_and_have_a_hash():
    for theta in (3.0, [2.0, 3.0], torch.tensor([2.0, 3.0])):
        one, same, other = (sector_probability_mc(4, theta, 1000, seed=seed) for seed in (0, 0, 1))
        assert one == same and one == same and one != other and hash(one) == hash(same)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 600), st.floats(1e-3, TAU))
def test_laws(n, theta):
    p, q = sector_probability(n, theta), sector_probability(n, theta, complement=True)
    assert 0 <= p <= 1 and 0 <= q <= 1 and p + q == pytest.approx(1, abs=1e-15)
    assert sector_probability(n, min(theta * 1.01, TAU)) >= p * (1 - 1e-13)
    assert sector_probability(n + 1, theta) <= p * (1 + 1e-13)
    if 0 < p < 1:
        assert math.exp(sector_probability(n, theta, log=True)) == pytest.approx(p, rel=1e-12)


def test_the_reference_is_the_native_formula():
    n = np.array([1, 2, 3, 7, 50, 300, 2000])[:, None]
    theta = TAU * (1 - np.array([0.9, 0.5, 0.2, 0.05, 0.01, 0.003, 0.001]))
    for complement in (False, True):
        for log in (False, True):
            got = sector_probability(n, theta, complement=complement, log=log)
            with pyflow.backend("reference"):
                want = sector_probability(n, theta, complement=complement, log=log)
            np.testing.assert_allclose(got, want, rtol=1e-13)


def exactly(pair):
    return Fraction(pair[0]) + Fraction(pair[1])


def test_double_doubles_err_as_their_header_says():
    draws = np.random.default_rng(0).random((300, 4)) + 1e-3
    for a, b, c, d in draws.tolist():
        x, y = (a, a * c * 2.0**-54), (b, -b * d * 2.0**-54)
        for got, exact in (
            (ref.mul(x, y), exactly(x) * exactly(y)), (ref.div(x, y), exactly(x) / exactly(y)),
            (ref.add(x, y), exactly(x) + exactly(y)),
        ):  # fmt: skip
            assert abs(exactly(got) / exact - 1) <= Fraction(1, 2**102)
        for n in (1, 2, 9, 1000):
            value, exponent = ref.power(x, n)
            assert 0.5 <= value[0] < 1 or value[0] == 1
            exact = exactly(x) ** n / Fraction(2) ** exponent
            assert abs(exactly(value) / exact - 1) <= Fraction(n, 2**101)


def test_kinds_and_broadcasting():
    value = sector_probability(3, 2.0)
    assert type(value) is float
    assert type(sector_probability(np.int64(3), np.float64(2.0))) is float
    table = sector_probability(np.array([[3], [4]]), [2.0, 3.0, 4.0])
    assert isinstance(table, np.ndarray) and table.shape == (2, 3) and table[0, 0] == value
    assert sector_probability([], 1.0).shape == (0,)
    assert isinstance(sector_probability(np.array(3), 2.0), np.ndarray)
    for theta in (torch.tensor([2.0, 3.0]), torch.tensor([2.0, 3.0], dtype=torch.float64), torch.tensor([2, 3])):
        got = sector_probability(3, theta)
        assert got.dtype == torch.float64 and got.tolist() == table[0, :2].tolist()
    assert sector_probability(torch.tensor([3, 4], dtype=torch.int32), 2.0).tolist() == table[:, 0].tolist()
    assert sector_probability(torch.tensor(3), [2.0, 3.0]).shape == (2,)
    assert sector_probability(3, torch.tensor(2.0, dtype=torch.bfloat16, requires_grad=True)).item() == value
    strided = np.linspace(1, 6, 20)[::-2]
    assert sector_probability(5, strided).tolist() == [sector_probability(5, t) for t in strided]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 32])
def test_trials_agree_with_the_formula(n):
    theta = TAU * (1 - np.linspace(0.02, 0.95, 30))
    estimate = sector_probability_mc(n, theta, 400_000, seed=1)
    deviation = (estimate.probability - sector_probability(n, theta)) / estimate.standard_error
    assert np.abs(deviation).max() < 4
    assert (estimate.standard_error > 0).all() and (np.diff(estimate.count) <= 0).all()
    assert estimate.trials == 400_000


@pytest.mark.parametrize("n", [1, 2, 5])
def test_trials_at_the_ends(n):
    estimate = sector_probability_mc(n, [-1.0, 0.0, TAU, 7.0], 1000, seed=1)
    assert estimate.count.tolist() == [0, 0, 1000, 1000]
    assert sector_probability_mc(n, 1e-12, 1000, seed=1).count == (1000 if n == 1 else 0)


def test_kinds_of_estimates():
    one = sector_probability_mc(4, math.pi, 10_000, seed=0)
    assert isinstance(one, SectorEstimate) and [*map(type, one)] == [float, float, int, int]
    assert one.probability == one.count / 10_000 and one.standard_error == pytest.approx(0.005, rel=0.01)
    array = sector_probability_mc(4, [[math.pi, 1.0]], 10_000, seed=0)
    assert isinstance(array.count, np.ndarray) and array.count.shape == (1, 2) and array.count[0, 0] == one.count
    tensor = sector_probability_mc(4, torch.tensor([math.pi], dtype=torch.float64), 10_000, seed=torch.tensor(0))
    assert tensor.count.tolist() == [one.count] and tensor.probability.dtype == torch.float64
    assert sector_probability_mc(4, math.pi, 10_000, seed=0, device="cpu") == one
    assert sector_probability_mc(4, math.pi, 10_000, seed=0, step=1).count != one.count
    with pyflow.backend("reference"):
        assert sector_probability_mc(4, math.pi, 10_000, seed=0) == one


def test_thresholds_are_those_of_the_formula():
    # x of an angle near the full circle keeps its digits
    theta = torch.tensor([TAU, TAU - 1e-9, TAU - 0.1], dtype=torch.float64)
    high, low = ref.TWO_PI
    assert (((high - theta) + low) / high)[1].item() == pytest.approx(1e-9 / TAU, rel=1e-6)
    assert sector_probability_mc(9, theta, 1000, seed=0).count.tolist()[:2] == [1000, 1000]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("args, error, text", [
    ((0, 1.0), ValueError, "n must be at least 1, got 0"),
    (([3, -2], 1.0), ValueError, "n must be at least 1, got -2"),
    ((2**53, 1.0), ValueError, f"n must be below 2**53, got {2**53}"),
    ((10**20, 1.0), ValueError, "n must fit into int64, got a larger number"),
    ((2.5, 1.0), TypeError, "n must be integers, got float64"),
    ((True, 1.0), TypeError, "n must be integers, got bool"),
    (("3", 1.0), TypeError, "n must be integers, got <U1"),
    ((torch.tensor(2.0), 1.0), TypeError, "n must be integers, got float32"),
    ((3, math.nan), ValueError, "theta must be finite, got nan"),
    ((3, [1.0, -math.inf]), ValueError, "theta must be finite, got -inf"),
    ((3, torch.tensor([math.inf])), ValueError, "theta must be finite, got inf"),
    ((3, "x"), TypeError, "theta must be real numbers, got <U1"),
    ((3, None), TypeError, "theta must be real numbers, got NoneType"),
    ((3, 1j), TypeError, "theta must be real numbers, got complex128"),
    ((3, torch.tensor(1j)), TypeError, "theta must be real numbers, got complex64"),
    (([1, 2], [1.0, 2.0, 3.0]), ValueError, "n and theta must broadcast, got (2,) and (3,)"),
])  # fmt: skip
def test_wrong_arguments(backend, args, error, text):
    with pyflow.backend(backend), pytest.raises(error) as raised:
        sector_probability(*args)
    assert str(raised.value) == f"sector_probability: {text}"


def test_two_devices():
    with pytest.raises(ValueError, match=r"^sector_probability: n and theta must be on one device, got cpu and meta$"):
        sector_probability(torch.tensor(3), torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match=r"^sector_probability_mc: device must be that of theta, cpu, got meta$"):
        sector_probability_mc(3, torch.zeros(2), 10, 0, device="meta")
    for wrong in ("", (), 0.5, torch.zeros(())):
        with pytest.raises((ValueError, TypeError), match=r"^sector_probability_mc: device must be a torch\.device or"):
            sector_probability_mc(3, 1.0, 10, 0, device=wrong)
    if not torch.cuda.is_available():
        with pytest.raises((ValueError, TypeError), match=r"^sector_probability_mc: device must be"):
            sector_probability_mc(3, 1.0, 10, 0, device=0)


@pytest.mark.parametrize("wrong, text", [
    (torch.zeros(3, device="meta"), "must have values, got a meta tensor"),
    (torch.zeros(3).to_sparse(), "must be a dense tensor, got sparse_coo"),
])  # fmt: skip
def test_tensors_without_readable_values(wrong, text):
    with pytest.raises((ValueError, TypeError), match=f"^sector_probability: theta {text}$"):
        sector_probability(3, wrong)
    with pytest.raises((ValueError, TypeError), match=f"^sector_probability: n {text}$"):
        sector_probability(wrong.long(), 1.0)


def test_trials_need_a_device_with_values():
    with pytest.raises(ValueError, match=r"^sector_probability_mc: device must hold values, got meta$"):
        sector_probability_mc(3, 1.0, 10, 0, device="meta")


def test_dtypes_that_numpy_lacks():
    with pytest.raises(TypeError, match=r"^sector_probability: n must be integers, got bfloat16$"):
        sector_probability(torch.tensor([3.0]).bfloat16(), 1.0)
    negated = torch.tensor([-4j]).conj().imag
    assert negated.is_neg() and sector_probability(4, negated).item() == sector_probability(4, 4.0)
    assert sector_probability(torch.tensor([3]), torch.tensor([1.0]).bfloat16()) == sector_probability(3, 1.0)


@pytest.mark.parametrize("args, error, text", [
    ((0, 1.0, 10), ValueError, "n must be at least 1, got 0"),
    (([3], 1.0, 10), TypeError, "n must be an integer, got list"),
    ((3, math.nan, 10), ValueError, "theta must be finite, got nan"),
    ((3, torch.tensor(math.inf), 10), ValueError, "theta must be finite, got inf"),
    ((3, True, 10), TypeError, "theta must be real numbers, got bool"),
    ((3, torch.tensor(True), 10), TypeError, "theta must be real numbers, got bool"),
    ((3, 1.0, 0), ValueError, "trials must be at least 1, got 0"),
    ((3, 1.0, 1e6), TypeError, "trials must be an integer, got float"),
])  # fmt: skip
def test_wrong_arguments_of_trials(args, error, text):
    with pytest.raises(error) as raised:
        sector_probability_mc(*args, seed=0)
    assert str(raised.value) == f"sector_probability_mc: {text}"


def test_errors_of_seeds_name_the_function_that_was_called():
    with pytest.raises(TypeError, match=r"^sector_probability_mc: seed must be an integer or an int64 tensor"):
        sector_probability_mc(3, 1.0, 10, seed="a")


def test_masked_elements_are_no_numbers():
    masked = np.ma.masked_array([4, 5], mask=[0, 1])
    for arguments, name in (((masked, 3.0), "n"), ((4, masked), "theta")):
        with pytest.raises(
            ValueError, match=f"^sector_probability: {name} must have no missing values, got a masked array"
        ):
            sector_probability(*arguments)
    with pytest.raises(ValueError, match=r"^sector_probability_mc: theta must have no missing values"):
        sector_probability_mc(4, masked, 10, 0)
