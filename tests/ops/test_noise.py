"""Counter-based noise: known answers, the same bits everywhere, and what a statistician would ask of it."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from scipy import stats
from torch._dynamo.testing import CompileCounter

import pyflow
from pyflow import ops, testing
from pyflow._schemas import PURPOSES
from pyflow.reference import noise as ref

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DRAWS = [ops.normal, ops.uniform]
SHAPES = [(), (0,), (1,), (7,), (63,), (1000,), (33, 65), (3, 0), (5, 3, 7), (2, 20011), (700, 3), (4, 4, 4)]
SEED, STEP = 0x9ABCDEF012345678, 2**40 + 5

# Random123's known answers
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]  # fmt: skip


def philox_by_hand(counter, key):
    """The generator in Python integers, as its paper has it."""
    c, k, mask = list(counter), list(key), 2**32 - 1
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def word_by_hand(k, seed, step, purpose):
    block, mask = k // 4, 2**32 - 1
    counter = (block & mask, block >> 32, step & mask, step >> 32 | purpose << 24)
    return philox_by_hand(counter, (seed & mask, seed >> 32 & mask))[k % 4]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_known_answers(backend):
    with pyflow.backend(backend):
        for counter, key, answer in KNOWN:
            got = ops.philox(torch.tensor(counter), torch.tensor(key))
            assert [f"{word:08x}" for word in got.tolist()] == answer.split()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_philox_of_any_shape(backend):
    counter, key = torch.randint(2**32, (3, 50, 4)), torch.randint(2**32, (50, 2))
    with pyflow.backend(backend):
        got = ops.philox(counter.transpose(0, 1).contiguous().transpose(0, 1), key)
        assert ops.philox(counter[:0], key).shape == (0, 50, 4)
    for i, j in ((0, 0), (2, 49), (1, 7)):
        assert got[i, j].tolist() == philox_by_hand(counter[i, j].tolist(), key[j].tolist())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_layout_of_the_counter(backend):
    with pyflow.backend(backend):
        for purpose in PURPOSES:
            flat = ops.uniform((3, 7), seed=SEED, step=STEP, purpose=purpose).flatten()
            own = ops.uniform((2, 3, 3), seed=torch.tensor([5, -6]), step=STEP, purpose=purpose).flatten(1)
            number = PURPOSES.index(purpose)
            for k in (0, 1, 6, 13, 20):
                assert flat[k].item() == (word_by_hand(k, SEED, STEP, number) >> 8) / 2**24
            for k in (0, 5, 8):
                assert own[0, k].item() == (word_by_hand(k, 5, STEP, number) >> 8) / 2**24
                assert own[1, k].item() == (word_by_hand(k, 2**64 - 6, STEP, number) >> 8) / 2**24


def test_the_block_counter_carries_into_its_high_word():
    # element 2**34 is the first whose block needs 33 bits
    block = torch.tensor([2**32 - 1, 2**32, 2**32 + 1])
    words = ref.philox((block & ref.MASK, block >> 32, torch.tensor(1), torch.tensor(0)), (torch.tensor(7),) * 2)
    for i, k in enumerate((2**34 - 4, 2**34, 2**34 + 4)):
        assert words[0][i] == word_by_hand(k, 7 | 7 << 32, 1, 0)


def test_box_muller_is_what_it_says():
    words = torch.randint(2**32, (20000,), generator=torch.Generator().manual_seed(0))
    words[:4] = torch.tensor([0, 0, 2**32 - 1, 2**32 - 1])
    even, odd = words[::2].double(), (words[1::2] >> 8).double()
    r, phi = (-2 * torch.log(((even + 1) / 2**32).clamp(max=1))).sqrt(), 2 * math.pi * odd / 2**24
    got = ref.normal(words).double()
    # u is rounded to float32, which near 1 moves the radius: r dr = du / u
    error = 8 * 2.0**-24 * r + 2.0**-24 / r.clamp(min=2.0**-12)
    assert ((got[::2] - r * phi.cos()).abs() <= error).all()
    assert ((got[1::2] - r * phi.sin()).abs() <= error).all()
    assert abs(got[0] - math.sqrt(64 * math.log(2))) < 1e-6  # the largest there is


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_reference(draw, dtype):
    for shape in SHAPES:
        seeds = [SEED, -1, torch.tensor(3), *(torch.arange(n) * 2**33 - 2 for n in shape[:1])]
        for seed in seeds:
            got = draw(shape, seed=seed, step=STEP, dtype=dtype)
            with pyflow.backend("reference"):
                want = draw(shape, seed=seed, step=STEP, dtype=dtype)
            assert got.is_contiguous() and got.dtype == dtype
            testing.assert_same_bits(got, want, f"{shape}")
            wide = draw(shape, seed=seed, step=STEP)
            testing.assert_same_bits(got, wide.to(dtype), f"{shape}: rounded from float32")


@pytest.mark.parametrize("draw", DRAWS)
def test_numbers_and_tensors_are_the_same_seeds_and_steps(draw):
    want = draw((50,), seed=11, step=12)
    testing.assert_same_bits(draw((50,), seed=torch.tensor(11), step=torch.tensor(12)), want)
    testing.assert_same_bits(draw((50,), seed=2**64 - 1), draw((50,), seed=-1))
    different = [
        draw((50,), seed=s, step=t, purpose=p) for s, t, p in ((10, 12, "noise"), (11, 13, "noise"), (11, 12, "prior"))
    ]
    for other in different:
        assert not torch.equal(other, want)
    strided = torch.tensor([[1, 9], [2, 9], [3, 9]])[:, 0]
    testing.assert_same_bits(draw((3, 9), seed=strided), draw((3, 9), seed=strided.clone()))


def test_seeds_from_torch():
    torch.manual_seed(0)
    first = ops.normal((5,), seed=None)
    second = ops.normal((5,), seed=None)
    torch.manual_seed(0)
    testing.assert_same_bits(ops.normal((5,), seed=None), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("draw", DRAWS)
def test_a_sample_does_not_depend_on_the_batch(draw):
    for shape in ((9, 3), (9, 2, 37), (9, 9001)):
        seeds = ops.sample_seeds(5, 9)
        whole = draw(shape, seed=seeds, step=3)
        for rows in (slice(0, 1), slice(3, 7), slice(8, 9)):
            testing.assert_same_bits(draw((rows.stop - rows.start, *shape[1:]), seed=seeds[rows], step=3), whole[rows])
        testing.assert_same_bits(draw(shape[1:], seed=seeds[4], step=3), whole[4])
    # a flat stream begins alike whatever its length
    testing.assert_same_bits(draw((10,), seed=1), draw((100, 100), seed=1).flatten()[:10])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sample_seeds(backend):
    with pyflow.backend(backend):
        seeds = ops.sample_seeds(7, 1000)
        assert seeds.unique().numel() == 1000
        testing.assert_same_bits(ops.sample_seeds(7, 400, start=300), seeds[300:700])
        testing.assert_same_bits(ops.sample_seeds(torch.tensor(7), 5), seeds[:5])
        assert ops.sample_seeds(7, 0).shape == (0,)
        assert not torch.isin(ops.sample_seeds(8, 1000), seeds).any()
        words = philox_by_hand((3, 0, 0, 0xFF000000), (7, 0))
        assert seeds[3].item() & (2**64 - 1) == words[0] | words[1] << 32


# bits


def digest() -> str:
    """One hash over kinds and shapes; run in a process per instruction set."""
    h = hashlib.sha256()
    for draw in DRAWS:
        for shape in SHAPES:
            h.update(draw(shape, seed=SEED, step=STEP).numpy().tobytes())
            if shape:
                h.update(draw(shape, seed=torch.arange(shape[0]), dtype=torch.float64).numpy().tobytes())
    h.update(ops.philox(torch.arange(4000).reshape(-1, 4), torch.tensor([1, 2])).numpy().tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_bits(every_instruction_set):
    assert len(every_instruction_set) == 1


@pytest.mark.parametrize("draw", DRAWS)
def test_bits_do_not_depend_on_threads(draw):
    for shape, seed in (((300007,), 1), ((20000, 3), torch.arange(20000))):
        with testing.threads(1):
            single = draw(shape, seed=seed)
        with testing.threads(4):
            several = draw(shape, seed=seed)
        testing.assert_same_bits(single, several)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_poisoned_memory_leaves_the_mode_of_determinism(mode):
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(mode)
    try:
        with testing.poisoned():
            assert torch.get_deterministic_debug_mode() == 2
        assert torch.get_deterministic_debug_mode() == mode
    finally:
        torch.set_deterministic_debug_mode(before)


def test_every_element_is_written():
    with testing.poisoned():
        for shape in SHAPES:
            for dtype in DTYPES:
                assert not ops.normal(shape, seed=1, dtype=dtype).isnan().any()
                if shape:
                    assert not ops.uniform(shape, seed=torch.arange(shape[0]), dtype=dtype).isnan().any()


# statistics: fixed seeds, so a bound that holds once holds always; five standard errors, or a p of 1e-4

N = 2_000_000


@pytest.fixture(scope="module")
def sample():
    return ops.normal((N,), seed=12345).double()


def test_moments(sample):
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((sample**power).mean() - moment) < 5 * math.sqrt(variance / N), power


def test_distributions(sample):
    assert stats.kstest(sample.numpy(), "norm").pvalue > 1e-4
    u = ops.uniform((N,), seed=54321).double()
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4
    assert u.min() >= 0 and u.max() < 1
    for part in (sample[::4], sample[1::4], sample[2::4], sample[3::4]):
        assert stats.kstest(part.numpy(), "norm").pvalue > 1e-4
    counts = torch.histc(u, 1000, 0, 1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_tails():
    counts, total = torch.zeros(4), 0
    levels = (3.0, 4.0, 5.0, 5.5)
    for step in range(12):
        z = ops.normal((8_000_000,), seed=3, step=step).abs_()
        counts += torch.tensor([float((z > level).sum()) for level in levels])
        total += z.numel()
    for level, count in zip(levels, counts.tolist(), strict=True):
        due = total * 2 * stats.norm.sf(level)
        assert abs(count - due) < 5 * math.sqrt(due), f"{level}: {count}, expected {due:.1f}"


def test_the_farthest_tail_has_its_probability():
    # above six the radius decides: u below exp(-18), which 2**32 exp(-18) = 65 of the words give
    words = torch.arange(200).repeat_interleave(2)
    r = ref.normal(words).reshape(-1, 2).double().square().sum(1).sqrt()
    assert (r > 6).sum().item() == math.floor(2**32 * math.exp(-18))


@pytest.mark.parametrize("other", [
    lambda n: ops.normal((n,), seed=12346), lambda n: ops.normal((n,), seed=12345 + 2**32),
    lambda n: ops.normal((n,), seed=12345, step=1), lambda n: ops.normal((n,), seed=12345, step=2**32),
    lambda n: ops.normal((n,), seed=12345, purpose="corrector"),
    lambda n: ops.normal((n + 4,), seed=12345)[4:], lambda n: ops.normal((n + 1,), seed=12345)[1:],
    lambda n: ops.normal((n + 2,), seed=12345)[2:], lambda n: ops.normal((1, n), seed=ops.sample_seeds(12345, 1))[0],
])  # fmt: skip
def test_streams_steps_and_neighbours_are_uncorrelated(sample, other):
    z = other(N).double()
    for f in (lambda v: v, lambda v: v**2 - 1, lambda v: v.abs() - math.sqrt(2 / math.pi)):
        product = f(sample) * f(z)
        assert abs(product.mean()) < 5 * product.std() / math.sqrt(N)


def test_streams_of_samples_are_uncorrelated():
    z = ops.normal((512, 4096), seed=ops.sample_seeds(1, 512)).double()
    correlation = z @ z.T / 4096
    off = correlation[~torch.eye(512, dtype=torch.bool)]
    assert off.abs().max() < 6 / math.sqrt(4096) and abs(off.std() * math.sqrt(4096) - 1) < 0.01


# operators and transforms


def operator_calls():
    yield "noise", ((3, 5), torch.tensor(1), torch.tensor(2), 1, 0, torch.float32)
    yield "noise", ((3, 5), torch.arange(3), torch.tensor(2), 0, 3, torch.bfloat16)
    yield "philox", (torch.randint(2**32, (5, 4)), torch.randint(2**32, (5, 2)))


@pytest.mark.parametrize("name, args", list(operator_calls()))
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.pyflow, name).default, args)


@pytest.mark.parametrize("draw", DRAWS)
def test_compiles_once_to_the_same_bits(draw):
    f = lambda seed, step: draw((3, 40), seed=seed, step=step) * 1
    torch._dynamo.reset()
    count = CompileCounter()
    compiled = torch.compile(f, fullgraph=True)
    counted = torch.compile(f, fullgraph=True, backend=count)
    for seed, step in ((5, 7), (6, 8), (7, 9)):
        for number in (int, torch.tensor):
            testing.assert_same_bits(compiled(number(seed), number(step)), f(seed, step))
    torch._dynamo.reset()
    for seed, step in ((5, 0), (6, 1), (7, 2), (8, 3)):
        counted(torch.tensor(seed), torch.tensor(step))
    assert count.frame_count == 1
    torch._dynamo.reset()
    for i in range(2, 9):
        counted(10 * i, i)
    assert count.frame_count <= 3  # dynamo's own way to learn that an integer varies


def test_vmap():
    seeds = torch.tensor([3, 4, 5])
    got = torch.vmap(lambda s: ops.normal((7,), seed=s))(seeds)
    testing.assert_same_bits(got, torch.stack([ops.normal((7,), seed=s) for s in seeds]))
    got = torch.vmap(lambda x: x + ops.normal((7,), seed=1))(torch.zeros(2, 7))
    testing.assert_same_bits(got[0], got[1])
    counters = torch.randint(2**32, (3, 5, 4))
    got = torch.vmap(lambda c: ops.philox(c, torch.tensor([1, 2])))(counters)
    testing.assert_same_bits(got, ops.philox(counters, torch.tensor([1, 2])))


# bad input


Z = torch.zeros
BAD = [
    (lambda f: f((2,), seed=1.5), TypeError, "seed must be an integer or an int64 tensor, got float"),
    (lambda f: f((2,), seed=True), TypeError, "seed must be an integer or an int64 tensor, got bool"),
    (lambda f: f((2,), seed=2**64), ValueError, "seed must fit 64 bits, got 18446744073709551616"),
    (lambda f: f((2,), seed=torch.tensor(1.0)), TypeError, "seed must be int64, got float32"),
    (lambda f: f((2,), seed=Z(3).long()), ValueError, r"seed must have the shape \(\) or \(2,\), got \(3,\)"),
    (lambda f: f((), seed=Z(1).long()), ValueError, r"seed must have the shape \(\), got \(1,\)"),
    (lambda f: f((2,), seed=Z(2, 1).long()), ValueError, r"seed must have the shape \(\) or \(2,\), got \(2, 1\)"),
    (
        lambda f: f((2,), seed=Z(()).long().to("meta"), device="cpu"),
        ValueError, "seed must be on the device of the result, cpu, got meta",
    ),
    (lambda f: f((2,), seed=1, step=0.5), TypeError, "step must be an integer or an int64 tensor, got float"),
    (lambda f: f((2,), seed=1, step=-1), ValueError, r"step must be in \[0, 2\*\*56\), got -1"),
    (lambda f: f((2,), seed=1, step=torch.tensor(2**56)), ValueError, r"step must be in \[0, 2\*\*56\), got 72057594037927936"),
    (lambda f: f((2,), seed=1, step=torch.tensor(1.0)), TypeError, "step must be int64, got float32"),
    (lambda f: f((2,), seed=1, step=Z(2).long()), ValueError, r"step must be an integer or a 0-d tensor, got \(2,\)"),
    (lambda f: f((2,), seed=1, purpose="fun"), ValueError, "purpose must be one of noise, corrector, .*, got 'fun'"),
    (lambda f: f((2,), seed=1, dtype=torch.int32), TypeError, "dtype must be float32, .* or float16, got int32"),
    (lambda f: f((2, -1), seed=1), ValueError, r"shape must not be negative, got \(2, -1\)"),
    (lambda f: f((2,), seed=1, device="disc"), ValueError, "device must be a torch.device or its name, got 'disc'"),
    (lambda f: f((2,), seed=1, device=1.5), TypeError, "device must be a torch.device or its name, got 1.5"),
    (lambda f: f((2,), seed=1, device="cuda:77"), ValueError, "device must be available here, got cuda:77"),
    (lambda f: f(5, seed=1), TypeError, "shape must be a sequence of integers, got int"),
    (lambda f: f("12", seed=1), TypeError, "shape must be a sequence of integers, got str"),
    (lambda f: f((2.0,), seed=1), TypeError, r"shape must hold integers, got \(2.0,\)"),
    (lambda f: f((2, True), seed=1), TypeError, r"shape must hold integers, got \(2, True\)"),
    (lambda f: f((2**70,), seed=1), ValueError, r"shape must have fewer than 2\*\*60 elements, got \(1180591620717411303424,\)"),
    (lambda f: f((2**40, 2**40), seed=1), ValueError, r"shape must have fewer than 2\*\*60 elements, got .*"),
    (lambda f: f((2,), seed=1, purpose=Z(2, 3)), ValueError, "purpose must be one of noise, .*, got Tensor"),
    (lambda f: f((2,), seed=1, device=2**70), TypeError, "device must be a torch.device or its name, got 1180591620717411303424"),
    (lambda f: f((2,), seed=torch.tensor(1).to_sparse()), TypeError, "seed must be a dense tensor, got sparse_coo"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("call, error, text", BAD)
@pytest.mark.parametrize("draw", DRAWS)
def test_bad_input_gets_one_sentence(draw, call, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^{draw.__name__}: {text}$"):
        call(draw)


@pytest.mark.parametrize("draw", DRAWS)
def test_a_refused_call_draws_no_seed(draw):
    before = torch.get_rng_state()
    for step in (-1, torch.tensor(2**56), Z(()).long().to("meta")):
        with pytest.raises(ValueError, match=f"^{draw.__name__}: step"):
            draw((2,), seed=None, step=step)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("draw", DRAWS)
def test_the_first_cpu_is_the_cpu(draw):
    testing.assert_same_bits(draw((2,), seed=torch.tensor(1), device="cpu:0"), draw((2,), seed=1))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: ops.philox(Z(4).long().to_sparse(), Z(2).long()), TypeError, "philox: counter must be a dense tensor, got sparse_coo"),
        (lambda: ops.philox(Z(4), Z(2).long()), TypeError, "philox: counter must be int64, got float32"),
        (lambda: ops.philox(Z(3).long(), Z(2).long()), ValueError, r"philox: counter must have 4 words in its last dim, got \(3,\)"),
        (lambda: ops.philox(Z(5, 4).long(), Z(3, 2).long()), ValueError, r"philox: key must broadcast to counter, \(5,\), got \(3,\)"),
        (lambda: ops.philox(Z(4).long() - 1, Z(2).long()), ValueError, r"philox: counter must hold words in \[0, 2\*\*32\), got other values"),
        (lambda: ops.sample_seeds(1, 2.0), TypeError, "sample_seeds: n must be an integer, got float"),
        (lambda: ops.sample_seeds(1, 2, start=2**63 - 2), ValueError, r"sample_seeds: start \+ n must be below 2\*\*63, got 9223372036854775808"),
        (lambda: ops.sample_seeds(1, 2, start=-1), ValueError, "sample_seeds: start must be at least 0, got -1"),
        (lambda: ops.sample_seeds(Z(2).long(), 2), ValueError, r"sample_seeds: seed must be an integer or a 0-d tensor, got \(2,\)"),
    ],
)  # fmt: skip
def test_bad_words_get_one_sentence(call, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^{text}$"):
        call()
