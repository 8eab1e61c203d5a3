"""Steps of SDEs, perturbation, the denoising loss and Langevin steps against the reference, bit by bit."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyflow
from pyflow import _backend, ops, testing
from pyflow.reference import sde as ref

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (9,), (0, 4), (4, 0), (3, 1), (33, 63), (5, 2, 7, 3), (700, 3), (2, 20011), (65, 513)]
SEED, STEP = 11, 2**33 + 7


def draw(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def coefficients(kind, shape, dtype=torch.float32):
    """a, b, c as numbers, 0-d tensors or one per sample."""
    if kind == "numbers":
        return 1.1, 0.3, 0.7
    values = draw((3, *shape[:1]), dtype, seed=5) if kind == "per sample" else draw((3,), dtype, seed=5)
    a, b, c = values.unbind(0)
    return a, b, c.abs()


def kinds(shape):
    return ("numbers", "0-d", "per sample") if shape else ("numbers", "0-d")


def seeds(shape):
    return (SEED, *(ops.sample_seeds(SEED, n) for n in shape[:1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_dtype", DTYPES)
def test_bits_of_the_reference(dtype, score_dtype):
    for shape in SHAPES:
        x, score = draw(shape, dtype), draw(shape, score_dtype, 1)
        for kind in kinds(shape):
            for seed in seeds(shape):
                options = dict(seed=seed, step=STEP, return_mean=True)
                call = lambda: ops.sde_step(x, score, *coefficients(kind, shape), **options)
                got = call()
                with pyflow.backend("reference"):
                    want = call()
                for name, a, b in zip(("x'", "mean"), got, want, strict=True):
                    assert a.dtype == dtype
                    testing.assert_same_bits(a, b, f"{name}, {shape}, {kind}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_formula(dtype):
    x, score = draw((4, 3, 50), dtype), draw((4, 3, 50), dtype, 1)
    a, b, c = coefficients("per sample", (4,))
    got, mean = ops.sde_step(x, score, a, b, c, seed=3, step=5, return_mean=True)
    z = ops.normal(x.shape, seed=3, step=5).double()
    wide = lambda v: v.double().reshape(4, 1, 1)
    parts = wide(a) * x.double(), wide(b) * score.double(), wide(c) * z
    error = 4 * testing.UNIT[testing.compute_dtype(dtype)] * sum(p.abs() for p in parts)
    testing.assert_within(got, sum(parts), error, "x'")
    testing.assert_within(mean, parts[0] + parts[1], error, "mean")
    injected = ops.sde_step(x, score, a, b, c, noise=ops.normal(x.shape, seed=3, step=5))
    testing.assert_same_bits(injected, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_give_the_same_bits(layout, dtype):
    x, score, noise = (draw((6, 5, 4, 10), dtype, i) for i in range(3))
    viewed = [testing.laid_out(v, layout) for v in (x, score, noise)]
    for seed in seeds(x.shape):
        got = ops.sde_step(*viewed[:2], *coefficients("per sample", (6,)), seed=seed)
        testing.assert_same_bits(got, ops.sde_step(x, score, *coefficients("per sample", (6,)), seed=seed))
        assert got.stride() == torch.empty_like(viewed[0]).stride()
        testing.assert_same_bits(
            ops.denoising_loss(viewed[0], 0.5, seed=seed), ops.denoising_loss(x, 0.5, seed=seed), layout
        )
        testing.assert_same_bits(ops.perturb(viewed[0], 0.5, 2.0, seed=seed), ops.perturb(x, 0.5, 2.0, seed=seed))
        testing.assert_same_bits(
            ops.langevin_step(viewed[0], score, snr=0.2, norm="sample", seed=seed),
            ops.langevin_step(x, score, snr=0.2, norm="sample", seed=seed),
        )
    got = ops.sde_step(viewed[0], score, 1.1, 0.3, 0.7, noise=viewed[2])
    testing.assert_same_bits(got, ops.sde_step(x, score, 1.1, 0.3, 0.7, noise=noise))
    expanded = score[:1].expand(6, 5, 4, 10)
    testing.assert_same_bits(
        ops.sde_step(viewed[0], expanded, 1.1, 0.3, 0.7, seed=1),
        ops.sde_step(x, expanded.contiguous(), 1.1, 0.3, 0.7, seed=1),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_coefficients_of_any_dtype_and_stride(dtype):
    x, score = draw((4, 6)), draw((4, 6), seed=1)
    strided = draw((4, 3), dtype, seed=2).abs()
    a, b, c = strided.unbind(1)
    got = ops.sde_step(x, score, a, b, c, seed=1)
    testing.assert_same_bits(got, ops.sde_step(x, score, *(v.float().contiguous() for v in (a, b, c)), seed=1))
    testing.assert_same_bits(
        ops.sde_step(x, score, 1, 0.5, 2, seed=1),
        ops.sde_step(x, score, torch.tensor(1.0), torch.tensor(0.5), torch.tensor(2.0), seed=1),
    )


def test_no_noise_where_c_is_zero():
    x = torch.tensor([-0.0, 0.0, 1.0, -1.0])
    for c in (0.0, -0.0, torch.tensor(0.0), torch.zeros(4)):
        for seed in range(4):
            with pyflow.backend("reference"):
                want = ops.sde_step(x, x, 1.0, 1.0, c, seed=seed)
            got = ops.sde_step(x, x, 1.0, 1.0, c, seed=seed)
            testing.assert_same_bits(got, want)
            testing.assert_same_bits(got, torch.tensor([0.0, 0.0, 2.0, -2.0]))
    mixed = torch.tensor([0.0, 1.0, 0.0, 1.0])
    testing.assert_same_bits(
        ops.sde_step(x, x, 1.0, 1.0, mixed, seed=0)[1::2], ops.sde_step(x, x, 1.0, 1.0, 1.0, seed=0)[1::2]
    )


def test_numbers_and_tensors_are_the_same():
    x, score = draw((4, 30)), draw((4, 30), seed=1)
    want = ops.sde_step(x, score, 1.1, 0.3, 0.7, seed=5, step=6)
    as_tensor = [torch.tensor(v, dtype=torch.float64) for v in (1.1, 0.3, 0.7)]
    testing.assert_same_bits(ops.sde_step(x, score, *as_tensor, seed=torch.tensor(5), step=torch.tensor(6)), want)
    torch.manual_seed(0)
    first = ops.sde_step(x, score, 1.1, 0.3, 0.7)
    assert not torch.equal(first, ops.sde_step(x, score, 1.1, 0.3, 0.7))
    torch.manual_seed(0)
    testing.assert_same_bits(ops.sde_step(x, score, 1.1, 0.3, 0.7), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_adds_the_noise_that_the_loss_knows(dtype):
    for shape in SHAPES:
        x0 = draw(shape, dtype)
        for kind in kinds(shape):
            alpha, std, _ = coefficients(kind, shape)
            std = abs(std)
            for seed in seeds(shape):
                got = ops.perturb(x0, alpha, std, seed=seed, step=STEP)
                with pyflow.backend("reference"):
                    testing.assert_same_bits(got, ops.perturb(x0, alpha, std, seed=seed, step=STEP), f"{shape}")
                zero = torch.zeros(shape)
                testing.assert_same_bits(ops.perturb(zero, 1.0, 1.0, seed=seed) + 0, ops.normal(shape, seed=seed) + 0)
    z = ops.normal((5, 70), seed=1, step=2)
    assert (ops.denoising_loss(-z / 0.5, 0.5, seed=1, step=2) == 0).all()
    assert (ops.denoising_loss(z, seed=1, step=2, parameterization="epsilon") == 0).all()
    assert (ops.denoising_loss(z, seed=1, step=3, parameterization="epsilon") > 10).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameterization", ["score", "epsilon"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_denoising_loss(dtype, parameterization, reduction):
    for shape in SHAPES[1:]:
        pred, weight = draw(shape, dtype).requires_grad_(), draw(shape[:1], seed=3).abs()
        heaviest = 1 + max(weight.tolist(), default=0)
        for kind in kinds(shape):
            std = torch.as_tensor(coefficients(kind, shape)[2]).requires_grad_()
            seed = seeds(shape)[-1]
            options = dict(seed=seed, step=STEP, weight=weight, parameterization=parameterization, reduction=reduction)
            got = ops.denoising_loss(pred, std, **options)
            assert got.shape == shape[:1] and got.dtype == testing.compute_dtype(dtype)
            leaves = (pred, std) if parameterization == "score" else (pred,)
            grads = torch.autograd.grad(got.sum(), leaves)
            exact = [v.detach().double().requires_grad_() for v in (pred, std)]
            z = ops.normal(shape, seed=seed, step=STEP).double()
            column = exact[1].reshape(-1, *(1,) * (len(shape) - 1)) if exact[1].dim() else exact[1]
            r = column * exact[0] + z if parameterization == "score" else exact[0] - z
            count = max(1, math.prod(shape[1:])) if reduction == "mean" else 1
            terms = weight.double().reshape(-1, *(1,) * (len(shape) - 1)) * r.square() / 2 / count
            want = ref.rows(terms)
            size = ref.rows(terms.detach().abs() + (exact[0].detach().square() + z.square()) * heaviest / count)
            u = testing.UNIT[testing.compute_dtype(dtype)]
            bound = 8 * u * size + testing.sum_error(math.prod(shape[1:]), size, testing.compute_dtype(dtype))
            testing.assert_within(got, want, bound, "loss")
            for a, b in zip(grads, torch.autograd.grad(want.sum(), exact[: len(leaves)]), strict=True):
                scale = 1 + b.abs() + (size.sum() if a.dim() == 0 else size if a.shape == size.shape else 0)
                testing.assert_within(a, b, 400 * u * scale * heaviest, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_langevin_step(dtype, norm):
    for shape in [(3, 5), (33, 63), (2, 20011), (4, 3, 8, 8), (700, 3)]:
        x, score = draw(shape, dtype), draw(shape, dtype, 1)
        alpha = draw(shape[:1], seed=3).abs()
        for seed in seeds(shape):
            got, mean = ops.langevin_step(
                x, score, snr=0.16, alpha=alpha, norm=norm, seed=seed, step=STEP, return_mean=True
            )
            z = ops.normal(shape, seed=seed, step=STEP, purpose="corrector").double()
            norms = [v.double().flatten(1).norm(dim=1) for v in (z, score)]
            if norm == "batch":
                norms = [n.mean() for n in norms]
            e = (2 * alpha.double() * (0.16 * norms[0] / norms[1]) ** 2).reshape(-1, *(1,) * (len(shape) - 1))
            want_mean = x.double() + e * score.double()
            want = want_mean + (2 * e).sqrt() * z
            u = testing.UNIT[testing.compute_dtype(dtype)]
            terms = math.prod(shape[1:])
            relative = 2 * testing.sum_error(terms, torch.tensor(1.0), testing.compute_dtype(dtype)) + 8 * u
            size = x.double().abs() + e * score.double().abs() + (2 * e).sqrt() * z.abs()
            testing.assert_within(got, want, relative * size, "x'")
            testing.assert_within(mean, want_mean, relative * size, "mean")
            assert got.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_marginal_rule_takes_the_std(dtype):
    x, score, seed = draw((63, 7), dtype), draw((63, 7), dtype, 1), ops.sample_seeds(3, 63)
    z = ops.normal(x.shape, seed=seed, step=2, purpose="corrector")
    for alpha, std in ((1.0, 0.7), (0.9, torch.linspace(0, 2, 63))):
        got = ops.langevin_step(x, score, snr=0.2, alpha=alpha, std=std, seed=seed, step=2, return_mean=True)
        size = 2 * alpha * (0.2 * torch.as_tensor(std, dtype=torch.float64)) ** 2
        for ours, want in zip(
            got, ops.sde_step(x, score, 1.0, size, (2 * size).sqrt(), noise=z, return_mean=True), strict=True
        ):
            testing.assert_same_bits(ours, want)


def test_langevin_step_of_a_given_size():
    x, score = draw((4, 30)), draw((4, 30), seed=1)
    z = ops.normal(x.shape, seed=3, step=2, purpose="corrector")
    for size in (0.02, torch.tensor(0.02, dtype=torch.float64), torch.full((4,), 0.02, dtype=torch.float64)):
        got = ops.langevin_step(x, score, step_size=size, seed=3, step=2)
        testing.assert_same_bits(got, ops.sde_step(x, score, 1.0, 0.02, math.sqrt(0.04), noise=z))
        testing.assert_same_bits(got, ops.langevin_step(x, score, step_size=size, noise=z))
    with_rule = ops.langevin_step(x, score, snr=0.1, norm="sample", noise=z)
    testing.assert_same_bits(
        with_rule,
        ops.langevin_step(x, score, snr=torch.tensor(0.1, dtype=torch.float64), norm="sample", seed=3, step=2),
    )


class Launches(TorchDispatchMode):
    """Names the operators that would launch a kernel on a GPU: no views, no reads, and not those of numbers alone."""

    def __init__(self):
        super().__init__()
        self.names, self.numbers = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        taken, made = ([t for t in tree_leaves(v) if isinstance(t, torch.Tensor)] for v in ((args, kwargs), out))
        if all(any(t is number for number in self.numbers) for t in taken):
            self.numbers += made
        elif made and not function.is_view:
            self.names.append(str(function))
        return out


@pytest.mark.parametrize(("norm", "launches"), [("sample", 9), ("batch", 12), ("marginal", 4)])
def test_launches_of_a_corrector_step(norm, launches, monkeypatch):
    # without compiled kernels an operator counts as one launch too
    monkeypatch.setattr(_backend, "runs_reference", lambda *_: False)
    seed, step, size = ops.sample_seeds(SEED, 4), torch.tensor(STEP), torch.tensor(0.9)
    for dtype in DTYPES:
        x, score = draw((4, 3), dtype), draw((4, 3), dtype, 1)
        rule = {"step_size": size} if norm == "marginal" else {"alpha": size, "snr": 0.16, "norm": norm}
        with torch.no_grad(), Launches() as seen:
            got = ops.langevin_step(x, score, seed=seed, step=step, **rule)
        # the squared norms of float64 need no cast
        assert len(seen.names) == launches - (dtype == torch.float64 and norm != "marginal"), seen.names
        testing.assert_same_bits(got, ops.langevin_step(x, score.requires_grad_(), seed=seed, step=step, **rule))


def test_second_derivatives_at_a_zero_score_are_finite():
    for norm in ("sample", "batch"):
        x, score, z = (draw((3, 4), torch.float64, i) for i in range(3))
        score[0] = 0
        leaves = x.requires_grad_(), score.requires_grad_(), z.requires_grad_()
        y = ops.langevin_step(x, score, snr=0.1, norm=norm, noise=z)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        assert all(bool(g.isfinite().all()) for g in (*grads, *twice))


def test_a_zero_score_moves_nothing_and_nan_travels():
    x, score = draw((3, 50)).requires_grad_(), draw((3, 50), seed=1)
    score[0], score[2, 7] = 0, torch.nan
    score.requires_grad_()
    got = ops.langevin_step(x, score, snr=0.16, norm="sample", seed=0)
    testing.assert_same_bits(got[0] + 0, x[0] + 0)
    assert not got[1].isnan().any() and got[2].isnan().all()
    grads = torch.autograd.grad(got[:2].sum(), (x, score))
    assert not any(g[:2].isnan().any() for g in grads)
    assert torch.equal(ops.langevin_step(x[:1], score[:1], snr=0.16, norm="batch", seed=0), x[:1] + 0)
    x = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf]])
    for f in (
        lambda: ops.sde_step(x, x, 1.0, 0.5, 0.1, seed=0), lambda: ops.perturb(x, 1.0, 0.5, seed=0),
        lambda: ops.sde_step(torch.ones(1, 4), x, 1.0, 0.5, 0.1, seed=0),
        lambda: ops.sde_step(torch.ones(1, 4), torch.ones(1, 4), 1.0, 0.5, 0.1, noise=x),
        lambda: ops.denoising_loss(x, 0.5, seed=0),
        lambda: ops.sde_step(torch.ones(1, 4), torch.ones(1, 4), math.nan, 0.5, 0.1, seed=0),
    ):  # fmt: skip
        got = f()
        with pyflow.backend("reference"):
            testing.assert_same_bits(got, f())


# bits


def results(shape):
    """Every operation with its gradients, for sums too."""
    x, score = (draw(shape, seed=i).requires_grad_() for i in range(2))
    a, b, c = (v.detach().requires_grad_() for v in coefficients("per sample", shape))
    own = ops.sample_seeds(SEED, shape[0])
    outputs = [
        *ops.sde_step(x, score, a, b, c, seed=own, step=STEP, return_mean=True),
        ops.sde_step(x, score, 1.1, 0.3, 0.7, seed=SEED), ops.perturb(x, a, c, seed=own),
        ops.denoising_loss(score, c, seed=own), ops.langevin_step(x, score, snr=0.2, norm="sample", seed=own),
    ]  # fmt: skip
    return [*outputs, *torch.autograd.grad([o.sum() for o in outputs], (x, score, a, b, c))]


def digest() -> str:
    """One hash; run in a process per instruction set."""
    h = hashlib.sha256()
    for shape in [(33, 70), (2, 9001), (300, 3), (3, 4, 5)]:
        for v in results(shape):
            h.update(v.detach().numpy().tobytes())
    return h.hexdigest()


def test_instruction_sets_give_the_same_bits(every_instruction_set):
    assert len(every_instruction_set) == 1


@pytest.mark.parametrize("shape", [(64, 392), (3, 30000), (1000, 7)])
def test_bits_do_not_depend_on_threads(shape):
    with testing.threads(1):
        single = results(shape)
    with testing.threads(4):
        several, again = results(shape), results(shape)
    for a, b, c in zip(single, several, again, strict=True):
        testing.assert_same_bits(a, b)
        testing.assert_same_bits(b, c)


@pytest.mark.parametrize("cols", [3, 37, 392, 9001])
def test_a_sample_does_not_depend_on_the_batch(cols):
    x, score = draw((7, cols)), draw((7, cols), seed=1)
    a, b, c = coefficients("per sample", (7,))
    own = ops.sample_seeds(SEED, 7)
    for function in (
        lambda r: ops.sde_step(x[r], score[r], a[r], b[r], c[r], seed=own[r], step=3),
        lambda r: ops.denoising_loss(x[r], c[r], seed=own[r]), lambda r: ops.perturb(x[r], a[r], c[r], seed=own[r]),
        lambda r: ops.langevin_step(x[r], score[r], snr=0.16, alpha=c[r], norm="sample", seed=own[r]),
        lambda r: ops.langevin_step(x[r], score[r], snr=0.16, alpha=c[r], std=c[r], seed=own[r]),
    ):  # fmt: skip
        whole = function(slice(None))
        for rows in (slice(0, 1), slice(2, 5), slice(6, 7)):
            testing.assert_same_bits(function(rows), whole[rows])


def test_every_element_is_written():
    with testing.poisoned():
        for shape in [(5, 70), (2, 9000), (40, 3), (3, 4, 5)]:
            assert not any(v.isnan().any() for v in results(shape))
            x = testing.laid_out(draw(shape), "stepped")
            assert not ops.sde_step(x, x, 1.0, 1.0, 1.0, seed=1).isnan().any()


# gradients and transforms


@pytest.mark.parametrize("kind", ["0-d", "per sample"])
@pytest.mark.parametrize("injected", [False, True])
def test_gradcheck_twice(kind, injected):
    x, score, noise = (draw((3, 2, 2), torch.float64, i).requires_grad_() for i in range(3))
    a, b, c = (v.detach().requires_grad_() for v in coefficients(kind, (3,), torch.float64))
    if injected:
        f = lambda x, s, a, b, c, z: ops.sde_step(x, s, a, b, c, noise=z, return_mean=True)
        leaves = (x, score, a, b, c, noise)
    else:
        f = lambda *v: ops.sde_step(*v, seed=SEED, return_mean=True)
        leaves = (x, score, a, b, c)
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_gradcheck_twice_of_the_others():
    x, score, noise = (draw((3, 2, 2), torch.float64, i).requires_grad_() for i in range(3))
    a, b, c = (v.detach().requires_grad_() for v in coefficients("per sample", (3,), torch.float64))
    own = ops.sample_seeds(SEED, 3)
    cases = [
        (lambda x, a, c: ops.perturb(x, a, c, seed=own), (x, a, c)),
        (lambda x, c, w: ops.denoising_loss(x, c, seed=own, weight=w, reduction="mean"), (x, c, a)),
        (lambda x, c: ops.denoising_loss(x, c, seed=own), (x, c.mean().detach().requires_grad_())),
        (lambda x: ops.denoising_loss(x, seed=own, parameterization="epsilon"), (x,)),
        (lambda x, s, e: ops.langevin_step(x, s, step_size=e, seed=own), (x, score, c)),
        (lambda x, s, n, w: ops.langevin_step(x, s, snr=n, alpha=w, norm="sample", seed=own), (x, score, c, b.abs().detach().requires_grad_())),
        (lambda x, s, n, w: ops.langevin_step(x, s, snr=n, std=w, seed=own), (x, score, c, b.abs().detach().requires_grad_())),
        (lambda x, s, z: ops.langevin_step(x, s, snr=0.3, norm="batch", noise=z), (x, score, noise)),
        (lambda x, s: ops.sde_step(x, s, 1.1, 0.3, 0.0, seed=SEED), (x, score)),
        (lambda c: ops.sde_step(x.detach(), score.detach(), 1.1, 0.3, c, seed=SEED), (c,)),
        (lambda z: ops.sde_step(x.detach(), score.detach(), 1.1, 0.3, 0.5, noise=z), (noise,)),
    ]  # fmt: skip
    for f, leaves in cases:
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 63), (5, 2, 7, 3), (700, 3), (2, 9001), (9,)])
def test_gradients_match_the_reference(dtype, shape):
    x, score, noise = (draw(shape, dtype, i) for i in range(3))
    for kind in ("0-d", "per sample"):
        for injected in (False, True):
            leaves = [v.detach().requires_grad_() for v in (x, score, *coefficients(kind, shape), noise)]
            options = dict(noise=leaves[5]) if injected else dict(seed=SEED)
            out = ops.sde_step(*leaves[:5], return_mean=True, **options)
            weights = [draw(shape, o.dtype, 7 + i) for i, o in enumerate(out)]
            leaves = leaves[: 5 + injected]
            grads = torch.autograd.grad(out, leaves, weights)
            exact = [v.detach().double().requires_grad_() for v in leaves]
            z = exact[5] if injected else ops.normal(shape, seed=SEED).double()
            wide = ref.sde_step(*exact[:5], z)
            want = torch.autograd.grad(wide, exact, [w.double() for w in weights])
            u = testing.UNIT[testing.compute_dtype(dtype)]
            for i, (g, w, leaf) in enumerate(zip(grads, want, leaves, strict=True)):
                assert g.dtype == leaf.dtype and g.shape == leaf.shape
                if leaf.shape == torch.Size(shape):
                    testing.assert_within(g, w, 4 * u * 10, f"gradient {i}")
                else:
                    count = math.prod(shape) if leaf.dim() == 0 else math.prod(shape[1:])
                    testing.assert_within(g, w, (40 + 6) * u * 4 * count, f"gradient {i}")


@pytest.mark.parametrize("layout", testing.gradient_layouts(torch.zeros(2, 3)))
def test_backward_takes_any_gradient_layout(layout):
    x, score = (draw((6, 20), seed=i).requires_grad_() for i in range(2))
    leaves = [x, score, *(v.detach().requires_grad_() for v in coefficients("per sample", (6,)))]
    out = ops.sde_step(*leaves, seed=SEED, return_mean=True)
    grad = testing.gradient_layouts(draw((6, 20), seed=3))[layout]
    for pick in ((grad, grad), (grad, None), (None, grad)):
        chosen = [(o, g) for o, g in zip(out, pick, strict=True) if g is not None]
        outputs = [o for o, _ in chosen]
        got = torch.autograd.grad(outputs, leaves, [g for _, g in chosen], retain_graph=True, materialize_grads=True)
        dense = [g.contiguous() for _, g in chosen]
        plain = torch.autograd.grad(outputs, leaves, dense, retain_graph=True, materialize_grads=True)
        for a, b in zip(got, plain, strict=True):
            testing.assert_same_bits(a, b)
    loss = ops.denoising_loss(x, leaves[4], seed=SEED)
    row = testing.gradient_layouts(draw((6, 3), seed=4))[layout][:, 0]
    for a, b in zip(
        torch.autograd.grad(loss, (x, leaves[4]), row, retain_graph=True),
        torch.autograd.grad(loss, (x, leaves[4]), row.contiguous()),
        strict=True,
    ):
        testing.assert_same_bits(a, b)


def test_noise_and_inputs_are_not_kept_where_no_coefficient_asks():
    x, score = (draw((64, 64), seed=i).requires_grad_() for i in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ops.sde_step(x, score, torch.tensor(1.1), torch.tensor(0.3), 0.7, seed=SEED).sum()
    assert sum(kept) < 64


def operator_calls():
    x, score, noise = (draw((3, 4, 5), seed=i).requires_grad_() for i in range(3))
    stepped = testing.laid_out(x.detach(), "stepped").requires_grad_()
    a, b, c = (v.detach().requires_grad_() for v in coefficients("per sample", (3,)))
    one = torch.tensor(0.5, requires_grad=True)
    seed, own, step = torch.tensor(1), torch.arange(3), torch.tensor(2)
    half = draw((3, 4, 5), torch.bfloat16)
    f32, bf16 = torch.float32, torch.bfloat16
    yield "sde_step", (x, score, a, b, c, own, step, None, 0, True)
    yield "sde_step", (stepped, None, one, None, c, seed, step, None, 1, False)
    yield "sde_step", (x, score, one, one, one, None, None, noise, 0, False)
    yield "sde_step", (half, score, a, b, c, own, step, None, 0, True)
    grads = [v.detach().requires_grad_() for v in (score, noise)]
    yield "sde_step_backward", (*grads, x, score, a, b, c, own, step, None, 0, f32, f32, None, False)
    yield "sde_step_backward", (grads[0], None, None, None, a, b, c, None, None, None, 0, f32, bf16, None, False)
    yield "sde_step_backward", (None, grads[1], x, score, one, one, one, None, None, noise, 0, None, None, f32, False)
    yield "denoising_loss", (x, c, own, step)
    yield "denoising_loss", (stepped, None, seed, step)
    yield "denoising_loss_backward", (a, x, c, own, step)
    yield "denoising_loss_backward", (a, stepped, None, seed, step)
    yield "langevin_squares", (score, own, step, None, 1)
    yield "langevin_squares", (stepped, None, None, noise, 1)


@pytest.mark.parametrize("name, args", list(operator_calls()))
def test_opcheck(name, args):
    torch.library.opcheck(getattr(torch.ops.pyflow, name).default, args)


def everything(x, score, a, b, c, seed, step):
    y, mean = ops.sde_step(x, score, a, b, c, seed=seed, step=step, return_mean=True)
    moved = ops.langevin_step(y, score, snr=c, norm="sample", seed=seed, step=step)
    moved = ops.langevin_step(moved, score, snr=c, std=c, seed=seed, step=step)
    moved = ops.langevin_step(moved, score, step_size=c, seed=seed, step=step)
    return moved, mean, ops.denoising_loss(score, c, seed=seed, step=step), ops.perturb(x, a, c, seed=seed, step=step)


def test_compiles_without_a_graph_break_to_the_same_bits():
    x, score = (draw((6, 40), seed=i).requires_grad_() for i in range(2))
    compiled = torch.compile(everything, fullgraph=True)
    own = ops.sample_seeds(1, 6)
    for coefs, seed, step in (
        ((1.1, 0.3, 0.7), 5, 7), ((1.2, 0.4, 0.8), 6, 8), ((1.3, 0.5, 0.9), 7, 9),
        (coefficients("per sample", (6,)), own, torch.tensor(3)), (coefficients("0-d", (6,)), torch.tensor(3), 4),
    ):  # fmt: skip
        got, want = compiled(x, score, *coefs, seed, step), everything(x, score, *coefs, seed, step)
        for a, b in zip(got, want, strict=True):
            testing.assert_same_bits(a, b)
        for a, b in zip(
            torch.autograd.grad([v.sum() for v in got], (x, score)),
            torch.autograd.grad([v.sum() for v in want], (x, score)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)  # sums of gradients are Inductor's


def test_scalars_that_change_compile_nothing_anew():
    x, score = draw((6, 40)), draw((6, 40), seed=1)
    count = CompileCounter()
    compiled = torch.compile(everything, fullgraph=True, backend=count)
    for i in range(6):
        compiled(x, score, *(torch.rand(()) for _ in range(3)), torch.tensor(i), torch.tensor(i))
    assert count.frame_count == 1
    torch._dynamo.reset()
    count.clear()
    for i in range(2, 9):
        compiled(x, score, 1.0 + 0.1 * i, 0.3 + 0.1 * i, 0.7 * i, 100 * i, i)
    # dynamo takes a number for a constant until it sees another
    assert count.frame_count <= 2


def test_function_transforms_agree_with_the_reference():
    x, score = draw((3, 4), torch.float64), draw((3, 4), torch.float64, 1)
    a, b, c = coefficients("per sample", (3,), torch.float64)
    own = ops.sample_seeds(1, 3)

    def loss(x, score, a, b, c):
        y, mean = ops.sde_step(x, score, a, b, c, seed=own, return_mean=True)
        return (y**2).sum() + mean.sum() + ops.denoising_loss(score, c, seed=own).sum()

    inputs = (x, score, a, b, c)
    transforms = {
        "grad": lambda: torch.func.grad(loss, (0, 1, 2, 3, 4))(*inputs),
        "jacrev": lambda: torch.func.jacrev(loss, (0, 1, 2, 3, 4))(*inputs),
        "jacfwd": lambda: torch.func.jacfwd(loss, (0, 1, 2, 3, 4))(*inputs),
        "jvp": lambda: torch.func.jvp(loss, inputs, inputs),
    }
    for name, transform in transforms.items():
        got = transform()
        with pyflow.backend("reference"):
            want = transform()
        for p, q in zip(got, want, strict=True):
            torch.testing.assert_close(p, q, msg=name)


def test_vmap_gives_every_slice_the_same_noise():
    x, score = draw((5, 3, 4)), draw((5, 3, 4), seed=1)
    step = lambda x, s, c: ops.sde_step(x, s, 1.1, 0.3, c, seed=1)
    c = torch.rand(5)
    got = torch.vmap(step)(x, score, c)
    testing.assert_same_bits(got, torch.stack([step(x[i], score[i], c[i]) for i in range(5)]))
    got = torch.vmap(lambda x: ops.denoising_loss(x, 0.5, seed=1), in_dims=1)(x)
    testing.assert_same_bits(got, torch.stack([ops.denoising_loss(x[:, i], 0.5, seed=1) for i in range(3)]))
    got = torch.vmap(lambda x, s: ops.langevin_step(x, s, snr=0.2, norm="sample", seed=1))(x, score)
    testing.assert_same_bits(
        got, torch.stack([ops.langevin_step(x[i], score[i], snr=0.2, norm="sample", seed=1) for i in range(5)])
    )


def test_autocast_changes_nothing():
    x, score = draw((4, 40)), draw((4, 40), seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        got = everything(x, score, 1.1, 0.3, 0.7, 1, 2)
    for a, b in zip(got, everything(x, score, 1.1, 0.3, 0.7, 1, 2), strict=True):
        testing.assert_same_bits(a, b)


# bad input


X, ONES = torch.zeros(2, 4), torch.ones(2)
STEP_ERRORS = [
    (lambda f: f("x", X, 1, 1, 1), TypeError, "x must be a tensor, got str"),
    (lambda f: f(X.int(), X, 1, 1, 1), TypeError, "x must be float32, float64, bfloat16 or float16, got int32"),
    (lambda f: f(X, X[:1], 1, 1, 1), ValueError, r"score must have the shape of x, \(2, 4\), got \(1, 4\)"),
    (lambda f: f(X, X.to("meta"), 1, 1, 1), ValueError, "score must be on the device of x, cpu, got meta"),
    (lambda f: f(X, X, torch.ones(3), 1, 1), ValueError, r"a must have the shape \(\) or \(2,\), got \(3,\)"),
    (lambda f: f(X, X, 1, ONES[:, None], 1), ValueError, r"b must have the shape \(\) or \(2,\), got \(2, 1\)"),
    (lambda f: f(X, X, 1, ONES.long(), 1), TypeError, "b must be float32, float64, bfloat16 or float16, got int64"),
    (lambda f: f(X, X, 1, ONES.to("meta"), 1), ValueError, "b must be on the device of x, cpu, got meta"),
    (lambda f: f(X, X, "1", 1, 1), TypeError, "a must be a number or a tensor, got str"),
    (lambda f: f(X, X, True, 1, 1), TypeError, "a must be a number or a tensor, got bool"),
    (lambda f: f(X, X, 1, 1, -0.5), ValueError, "c must be at least 0, got -0.5"),
    (lambda f: f(X, X, 1, 1, torch.tensor([1.0, -2.0])), ValueError, "c must be at least 0, got -2.0"),
    (lambda f: f(X[0, 0], X[0, 0], ONES, 1, 1), ValueError, r"a must have the shape \(\), got \(2,\)"),
    (lambda f: f(X, X, 1, 1, 1, seed=0.5), TypeError, "seed must be an integer or an int64 tensor, got float"),
    (lambda f: f(X, X, 1, 1, 1, seed=ONES), TypeError, "seed must be int64, got float32"),
    (lambda f: f(X, X, 1, 1, 1, seed=ONES.int()), TypeError, "seed must be int64, got int32"),
    (
        lambda f: f(X, X, 1, 1, 1, seed=torch.ones(3).long()),
        ValueError, r"seed must have the shape \(\) or \(2,\), got \(3,\)",
    ),
    (
        lambda f: f(X, X, 1, 1, 1, seed=ONES.long().to("meta")),
        ValueError, "seed must be on the device of the result, cpu, got meta",
    ),
    (lambda f: f(X, X, 1, 1, 1, seed=1, step=-1), ValueError, r"step must be in \[0, 2\*\*56\), got -1"),
    (lambda f: f(X, X, 1, 1, 1, noise=X[:1]), ValueError, r"noise must have the shape of x, \(2, 4\), got \(1, 4\)"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("call, error, text", STEP_ERRORS)
def test_bad_input_gets_one_sentence(call, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^sde_step: {text}$"):
        call(ops.sde_step)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: ops.perturb(X, 1, -1.0, seed=0), ValueError, "perturb: std must be at least 0, got -1.0"),
        (lambda: ops.perturb(X, 10**400, 1.0, seed=0), ValueError, "perturb: alpha must fit into float64, got a larger number"),
        (lambda: ops.perturb(X.to_sparse(), 1, 1.0, seed=0), TypeError, "perturb: x0 must be a dense tensor, got sparse_coo"),
        (lambda: ops.sde_step(X, X, 1, 1, 1, seed=0, return_mean="no"), TypeError, "sde_step: return_mean must be true or false, got str"),
        (lambda: ops.langevin_step(X, X, step_size=1, seed=0, return_mean=X), TypeError, "langevin_step: return_mean must be true or false, got Tensor"),
        (lambda: ops.perturb(X.int(), 1, 1, seed=0), TypeError, "perturb: x0 must be float32, .*, got int32"),
        (lambda: ops.denoising_loss(X, seed=0), ValueError, "denoising_loss: std must be given for the parameterization score, got None"),
        (lambda: ops.denoising_loss(X[0, 0], 1, seed=0), ValueError, "denoising_loss: pred must have at least one dim, the batch, got a scalar"),
        (lambda: ops.denoising_loss(X, 1, seed=0, reduction="max"), ValueError, "denoising_loss: reduction must be one of sum, mean, got 'max'"),
        (lambda: ops.denoising_loss(X, 1, seed=0, parameterization="v"), ValueError, "denoising_loss: parameterization must be one of score, epsilon, got 'v'"),
        (lambda: ops.denoising_loss(X, 1, seed=0, weight=torch.ones(3)), ValueError, r"denoising_loss: weight must have the shape \(\) or \(2,\), got \(3,\)"),
        (lambda: ops.langevin_step(X, X, seed=0), ValueError, "langevin_step: exactly one of step_size and snr must be given, got none"),
        (lambda: ops.langevin_step(X, X, snr=0.1, step_size=0.1), ValueError, "langevin_step: exactly one of step_size and snr must be given, got both"),
        (lambda: ops.langevin_step(X, X, snr=0.1), ValueError, "langevin_step: std must be given for the norm marginal, got None"),
        (lambda: ops.langevin_step(X, X, snr=0.1, std=-1.0), ValueError, "langevin_step: std must be at least 0, got -1.0"),
        (lambda: ops.denoising_loss(X, 1.0, seed=None), ValueError, "denoising_loss: seed must be given, the seed of perturb, got None"),
        (lambda: ops.langevin_step(X, X, snr=-0.1), ValueError, "langevin_step: snr must be at least 0, got -0.1"),
        (lambda: ops.langevin_step(X, X, step_size=torch.tensor(-1.0)), ValueError, "langevin_step: step_size must be at least 0, got -1.0"),
        (lambda: ops.langevin_step(X, X, snr=0.1, norm="max"), ValueError, "langevin_step: norm must be one of marginal, sample, batch, got 'max'"),
    ],
)  # fmt: skip
def test_other_bad_input_gets_one_sentence(call, error, text, backend):
    with pyflow.backend(backend), pytest.raises(error, match=f"^{text}$"):
        call()


def test_a_refused_call_draws_no_seed():
    before = torch.get_rng_state()
    for call in (
        lambda: ops.sde_step(X, X, 1, 1, 1, step=-1),
        lambda: ops.sde_step(X, X, 1, 1, -1),
        lambda: ops.perturb(X, 1, 1, seed=None, step=-1),
        lambda: ops.langevin_step(X, X, snr=-1, std=1),
        lambda: ops.langevin_step(X, X, snr=1, std=-1),
        lambda: ops.langevin_step(X, X, snr=1),
        lambda: ops.langevin_step(X, X, step_size=-1),
    ):
        with pytest.raises(ValueError):
            call()
    assert torch.equal(torch.get_rng_state(), before)


def test_large_integers_and_fractions_are_numbers():
    from fractions import Fraction

    testing.assert_same_bits(ops.perturb(X, 2**70, 0, seed=0), ops.perturb(X, 2.0**70, 0, seed=0))
    testing.assert_same_bits(ops.perturb(X, Fraction(1, 4), 1, seed=0), ops.perturb(X, 0.25, 1, seed=0))
