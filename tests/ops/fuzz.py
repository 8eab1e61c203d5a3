"""Calls of the public operations with drawn shapes, strides, dtypes, options and wrong arguments.

`calls(op)` is a hypothesis strategy; `check(call)` holds what a call may do: give the reference's answer, or one of our
sentences on every backend, and change none of its inputs.
"""

from __future__ import annotations

import faulthandler
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

import pyflow
from pyflow._schemas import DISTANCES, FSQ_VARIANTS, PACKINGS, PRIORS, SCALE_MAPS
from pyflow.testing import UNIT, assert_same_bits, compute_dtype

Draw = Callable[[st.SearchStrategy], object]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS = (1, 2, 3, 5, 8, 17, 33, 64, 130)
SPREADS = (1.0, 0.0, 0.05, 8.0, 1e3, 1e-6)
MARGIN = 64  # elements around every tensor that must stay as they are
PATIENCE = 120  # seconds after which a call hangs

# what is put in the place of an argument to see it refused
WRONG = (
    None, True, "text", "", (), -1, 0, 1, 2**70, -0.5, math.nan, math.inf, 1e40, 1e-46, 1j, object(), torch.float16,
    torch.zeros(3, dtype=torch.complex64), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, dtype=torch.bool),
    torch.zeros(()), torch.tensor(7), torch.zeros(0), torch.zeros(2, 2, device="meta"), torch.zeros(2, 3).to_sparse(),
)  # fmt: skip


@dataclass
class Call:
    """One call: what it is given, and how its answer is held to the reference's."""

    op: str
    args: list[object]
    options: dict[str, object] = field(default_factory=dict)
    exact: bool = False  # bit for bit
    rounds: Callable[[], Iterator[Call]] | None = None  # calls whose digits count as well, within rounding
    scale: Callable[[], float] | None = None  # what errors are relative to beside the answer; else the largest input
    unitless: bool = False  # the unit of its inputs cancels, so that gradients are relative to scale / input

    def tensors(self) -> list[Tensor]:
        return list(_tensors([self.args, self.options]))

    def __repr__(self) -> str:
        shown = [*map(_shown, self.args), *(f"{name}={_shown(value)}" for name, value in self.options.items())]
        return f"{self.op}({', '.join(shown)})"


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return repr(value)
    grad = ", grad" * value.requires_grad
    return f"<{str(value.dtype)[6:]} {tuple(value.shape)} strides {value.stride()} on {value.device}{grad}>"


class Hand:
    """Draws tensors and numbers; the first of every choice is the plainest, which is what hypothesis shrinks to."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def one(self, *choices: object) -> object:
        return self.draw(st.sampled_from(choices))

    def maybe(self) -> bool:
        return self.draw(st.booleans())

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def batch(self) -> int:
        return self.one(*LENGTHS, 0)

    def shape(self, least: int = 1, most: int = 4) -> tuple[int, ...]:
        """Few enough elements to be quick, some of these shapes without any."""
        shape: tuple[int, ...] = ()
        for _ in range(self.number(least, most)):
            room = 4096 // max(1, math.prod(shape))
            shape += (self.one(*(n for n in LENGTHS if n <= room or n == 1), 0),)
        return shape

    def dtype(self) -> torch.dtype:
        return self.one(*FLOATS)

    def values(self, shape: tuple[int, ...]) -> Tensor:
        """Normal, in one of the spreads, sometimes with a NaN, an infinity or a zero in it; float64."""
        source = torch.Generator().manual_seed(self.number(0, 2**31))
        values = self.one(*SPREADS) * torch.randn(shape, generator=source, dtype=torch.float64)
        if values.numel() and self.one(False, False, False, False, True):
            values.view(-1)[self.number(0, values.numel() - 1)] = self.one(0.0, math.nan, math.inf, -math.inf)
        return values

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype | None = None, grad: bool | None = None) -> Tensor:
        """In any layout that a view can have."""
        dtype = dtype or self.dtype()
        values = self.values(shape).to(dtype)
        tensor = self.laid_out(values)
        return tensor.requires_grad_() if (self.maybe() if grad is None else grad) else tensor

    def laid_out(self, values: Tensor) -> Tensor:
        """The values as a view into larger memory, of which `base` finds all."""
        order = self.draw(st.permutations(range(values.dim()))) if self.maybe() else list(range(values.dim()))
        steps = [self.one(1, 1, 1, 2, 3) for _ in order]
        if values.dim() and self.one(False, False, False, True):
            # stride 0, as expand gives it
            dim = self.number(0, values.dim() - 1)
            values = values.narrow(dim, 0, min(1, values.shape[dim])).expand(values.shape)
            stretched = dim
        else:
            stretched = None
        strides, room = [0] * values.dim(), 1
        for dim in order:
            if dim != stretched:
                strides[dim], room = room * steps[dim], room * steps[dim] * max(1, values.shape[dim])
        memory = torch.full((room + 2 * MARGIN,), 77, dtype=values.dtype)
        view = memory.as_strided(values.shape, strides, MARGIN)
        if stretched is not None:
            view.narrow(stretched, 0, min(1, values.shape[stretched])).copy_(
                values.narrow(stretched, 0, min(1, values.shape[stretched]))
            )
        else:
            view.copy_(values)
        return view

    def mask(self, shape: tuple[int, ...]) -> Tensor | None:
        if self.maybe():
            return None
        kept = [n if self.maybe() else 1 for n in shape][self.number(0, len(shape)) :]
        source = torch.Generator().manual_seed(self.number(0, 2**31))
        mask = torch.rand(kept, generator=source) < self.one(0.5, 0.0, 1.0)
        return mask.to(self.one(torch.bool, torch.bool, torch.float32, torch.int32))

    def seed(self, batch: int | None = None) -> int | Tensor:
        """A number, a tensor, or one stream per sample."""
        number = self.number(0, 2**63 - 1)
        kinds = ("number", "tensor") if batch is None else ("number", "tensor", "streams")
        kind = self.one(*kinds)
        if kind == "streams":
            return pyflow.ops.sample_seeds(number, batch, self.one(0, 7, 2**40))
        return torch.tensor(number) if kind == "tensor" else number

    def step(self) -> int | Tensor:
        step = self.one(0, 1, 2**32 - 1, 2**32, 2**56 - 1)
        return torch.tensor(step) if self.maybe() else step

    def scalar(self, batch: int, *numbers: float) -> float | Tensor:
        """A number, the same as a tensor, or one per sample."""
        kind, number = self.one("number", "tensor", "per sample"), self.one(*numbers)
        if kind == "number":
            return number
        dtype = self.one(torch.float32, torch.float64)
        if kind == "tensor":
            return torch.tensor(number, dtype=dtype, requires_grad=self.maybe())
        return torch.linspace(0.5, 1.0, batch, dtype=dtype).mul_(number).requires_grad_(self.maybe())


DRAWERS: dict[str, Callable[[Hand], Call]] = {}


def drawer(function: Callable[[Hand], Call]) -> Callable[[Hand], Call]:
    """Of the operation with the function's name."""
    DRAWERS[function.__name__] = function
    return function


@st.composite
def calls(draw: Draw, op: str) -> Call:
    """A call of this operation, one in five with something wrong in it."""
    hand = Hand(draw)
    call = DRAWERS[op](hand)
    if hand.one(False, False, False, False, True):
        # a flag may be anything that is true or false
        flags = {name for name, value in call.options.items() if isinstance(value, bool)}
        place = hand.one(*range(len(call.args)), *sorted(call.options.keys() - flags))
        (call.args if isinstance(place, int) else call.options)[place] = hand.one(*WRONG)
        call.rounds = call.scale = None
    return call


@drawer
def additive_coupling(hand: Hand) -> Call:
    shape = hand.shape()
    args = [hand.tensor(shape), hand.tensor(shape)]
    return Call("additive_coupling", args, {"inverse": hand.maybe(), "mask": hand.mask(shape)})


def map_options(hand: Hand) -> dict[str, object]:
    return {
        "scale_map": hand.one(*SCALE_MAPS), "clamp": hand.one(2.0, 0.5, 30), "eps": hand.one(0.0, 1e-3, 0.1),
        "slope": hand.one(1e-3, 0.5), "shift_first": hand.maybe(), "inverse": hand.maybe(),
    }  # fmt: skip


@drawer
def affine_coupling(hand: Hand) -> Call:
    shape = hand.shape()
    args = [hand.tensor(shape) for _ in range(3)]
    options = {"mask": hand.mask(shape), "event_dims": hand.one(None, *range(len(shape) + 1))}
    return Call("affine_coupling", args, {**map_options(hand), **options})


@drawer
def affine_coupling_packed(hand: Hand) -> Call:
    shape = hand.shape()
    dim = hand.number(-len(shape), len(shape) - 1)
    packed = list(shape)
    packed[dim] *= 2
    args = [hand.tensor(shape), hand.tensor(tuple(packed))]
    options = {"mask": hand.mask(shape), "event_dims": hand.one(None, *range(len(shape) + 1))}
    return Call(
        "affine_coupling_packed", args, {"packing": hand.one(*PACKINGS), "dim": dim, **map_options(hand), **options}
    )


@drawer
def flow_log_prob(hand: Hand) -> Call:
    shape = hand.shape(2, 4)
    log_scale = hand.one(None, shape[1:], shape)
    log_scale = None if log_scale is None else hand.tensor(log_scale)
    return Call("flow_log_prob", [hand.tensor(shape), log_scale], {"prior": hand.one(*PRIORS)})


def levels(hand: Hand) -> tuple[int, ...]:
    # 1001 levels of "paper" are bounded by 499.5, a tie that every large z comes within an ulp of
    return tuple(hand.one(3, 8, 5, 2, 7, 1000) for _ in range(hand.number(1, 6)))


def within_rounding(call: Call) -> Iterator[Call]:
    """The same call, and with the first tensor a little to either side, in the dtypes that bounds are computed in."""
    z = call.args[0].detach()
    for dtype in {compute_dtype(z.dtype), torch.float64}:
        for move in (0.0, -1e-5, 1e-5):
            moved = (z.double() * (1 + move) + move).to(dtype)
            yield Call(call.op, [moved, *call.args[1:]], call.options)


@drawer
def fsq(hand: Hand) -> Call:
    numbers = levels(hand)
    variant = hand.one(*FSQ_VARIANTS)
    shape = hand.shape(0, 3)
    dim = hand.number(-len(shape) - 1, len(shape))
    shape = list(shape)
    shape.insert(dim % (len(shape) + 1), len(numbers))
    call = Call(
        "fsq", [hand.tensor(tuple(shape)), numbers], {"variant": variant, "dim": dim, "return_indices": hand.maybe()}
    )
    call.rounds = lambda: within_rounding(call)
    return call


@drawer
def residual_fsq(hand: Hand) -> Call:
    # three stages of more levels have digits below float32's last
    numbers = tuple(min(n, 8) for n in levels(hand))
    shape = (*hand.shape(1, 2), len(numbers))
    active = None if hand.maybe() else torch.tensor(hand.one(1, 0, 2, 9))
    args = [hand.tensor(shape), numbers, hand.one(1, 2, 3)]
    call = Call("residual_fsq", args, {"variant": hand.one("symmetric_hard", "symmetric"), "active": active})
    call.rounds = lambda: within_rounding(call)
    return call


@drawer
def fsq_decode(hand: Hand) -> Call:
    numbers = levels(hand)
    size = math.prod(numbers)
    shape = hand.shape(0, 3)
    source = torch.Generator().manual_seed(hand.number(0, 2**31))
    low, high = hand.one((0, size), (-1, size), (-3, size + 2))
    dtype = torch.int64 if size > 2**31 else hand.one(torch.int64, torch.int32)
    indices = torch.randint(low, high, shape, generator=source).to(dtype)
    options = {
        "variant": hand.one(*FSQ_VARIANTS), "dim": hand.number(-len(shape) - 1, len(shape)), "dtype": hand.dtype(),
    }  # fmt: skip
    return Call("fsq_decode", [hand.laid_out(indices), numbers], options, exact=True)


@drawer
def codebook_usage(hand: Hand) -> Call:
    size = hand.one(3, 1, 64, 1000)
    source = torch.Generator().manual_seed(hand.number(0, 2**31))
    indices = torch.randint(hand.one(0, -1, -2), size + hand.one(0, 0, 1), hand.shape(), generator=source)
    return Call("codebook_usage", [hand.laid_out(indices.to(hand.one(torch.int64, torch.int32))), size])


def samples(hand: Hand, n: int, kernel: str) -> Tensor:
    """n rows of the few dims this kernel takes; a few times without the rows' dim."""
    if hand.one(False, False, False, False, False, False, False, True):
        return hand.tensor((n,))
    if kernel == "precomputed":
        values = hand.values((n, n))
        return hand.laid_out((values + values.T).to(hand.dtype())).requires_grad_(hand.maybe())
    if kernel == "delta":
        return hand.laid_out(torch.arange(n * (d := hand.one(1, 2))).view(n, d) % 3)
    return hand.tensor((n, hand.one(1, 2, 5, 33)))


def hsic_options(hand: Hand) -> dict[str, object]:
    return {
        "kernel": hand.one("rbf", "laplacian", "linear", "polynomial", "delta", "precomputed", "rbf", "linear"),
        "bandwidth": hand.one("median", 1.0, 0.01, 30.0), "kernel_y": hand.one(None, "rbf", "linear", "laplacian"),
        "bandwidth_y": hand.one(None, 2.0), "degree": hand.one(3, 1, 2), "gamma": hand.one(None, 0.5),
        "coef0": hand.one(1.0, 0.0),
    }  # fmt: skip


def of_samples(hand: Hand, op: str) -> Call:
    n = hand.one(8, 5, 4, 17, 33, 64, 8, 5, 4, 17, 3, 2, 1, 0)
    options = hsic_options(hand)
    kernels = options["kernel"], options["kernel_y"] or options["kernel"]
    return Call(op, [samples(hand, n, kernel) for kernel in kernels], options)


def hsic_scale(x: Tensor, y: Tensor, options: dict[str, object]) -> float:
    """The geometric mean of both variables' own HSIC."""
    plain = {
        name: value for name, value in options.items() if name not in ("normalize", "approximate", "n_features", "seed")
    }
    with pyflow.backend("reference"):
        own = dict(plain, kernel_y=None, bandwidth_y=None)
        other = dict(
            own,
            kernel=options["kernel_y"] or options["kernel"],
            bandwidth=options["bandwidth_y"] or options["bandwidth"],
        )
        return math.sqrt(
            abs(pyflow.ops.hsic(x.double(), x.double(), **own) * pyflow.ops.hsic(y.double(), y.double(), **other))
        )


@drawer
def hsic(hand: Hand) -> Call:
    call = of_samples(hand, "hsic")
    call.options |= {
        "estimator": hand.one("biased", "unbiased", "biased_n2"), "normalize": hand.one(False, False, True),
        "approximate": hand.one(None, None, None, "rff", "nystrom"), "n_features": hand.one(4, 16), "seed": 0,
    }  # fmt: skip
    call.scale = lambda: 1.0 if call.options["normalize"] else hsic_scale(*call.args, call.options)
    call.unitless = call.options["normalize"]
    return call


@drawer
def cka(hand: Hand) -> Call:
    call = of_samples(hand, "cka")
    call.options["estimator"] = hand.one("biased", "unbiased")
    call.scale = lambda: 1.0
    call.unitless = True
    return call


@drawer
def nhsic(hand: Hand) -> Call:
    call = of_samples(hand, "nhsic")
    call.options["epsilon"] = hand.one(1e-2, 1e-5)
    call.scale = lambda: float(len(call.args[0]))
    call.unitless = True
    return call


@drawer
def hsic_matrix(hand: Hand) -> Call:
    n = hand.one(8, 4, 17, 33, 3, 0)
    options = hsic_options(hand) | {"estimator": hand.one("biased", "unbiased"), "normalize": hand.maybe()}
    kernels = options["kernel"], options["kernel_y"] or options["kernel"]
    lists = [[samples(hand, n, kernel) for _ in range(hand.number(1, 3))] for kernel in kernels]
    call = Call("hsic_matrix", lists, options)
    call.scale = lambda: 1.0 if options["normalize"] else max(
        (hsic_scale(x, y, {**options}) for x in lists[0] for y in lists[1]), default=1.0
    )  # fmt: skip
    call.unitless = options["normalize"]
    return call


@drawer
def center_gram(hand: Hand) -> Call:
    n = hand.one(3, 0, 1, 2, 17, 40)
    inplace = hand.one(False, False, True)
    gram = hand.tensor((*hand.shape(0, 2)[:2], n, n)[-3:], grad=False if inplace else None)
    return Call("center_gram", [gram], {"inplace": inplace})


def noise(hand: Hand, op: str) -> Call:
    shape = hand.shape(0, 3)
    batch = shape[0] if shape else None
    options = {
        "seed": hand.seed(batch), "step": hand.step(), "dtype": hand.dtype(),
        "purpose": hand.one("noise", "corrector", "prior"),
    }  # fmt: skip
    return Call(op, [shape], options, exact=True)


@drawer
def normal(hand: Hand) -> Call:
    return noise(hand, "normal")


@drawer
def uniform(hand: Hand) -> Call:
    return noise(hand, "uniform")


@drawer
def philox(hand: Hand) -> Call:
    shape = hand.shape(0, 2)
    source = torch.Generator().manual_seed(hand.number(0, 2**31))
    words = [torch.randint(0, 2**32, (*shape, n), generator=source) for n in (4, 2)]
    return Call("philox", [hand.laid_out(each) for each in words], exact=True)


@drawer
def sample_seeds(hand: Hand) -> Call:
    return Call("sample_seeds", [hand.seed(), hand.one(5, 0, 1, 130), hand.one(0, 7, 2**40)], exact=True)


@drawer
def sector_counts(hand: Hand) -> Call:
    thresholds = torch.linspace(0, 1, hand.one(1, 0, 3), dtype=torch.float64)
    args = [thresholds, hand.one(4, 1, 33), hand.one(10, 1, 300)]
    return Call("sector_counts", args, {"seed": hand.seed(), "step": hand.step()}, exact=True)


def streams(hand: Hand, shape: tuple[int, ...]) -> dict[str, object]:
    return {"seed": hand.seed(shape[0]), "step": hand.step()}


@drawer
def sde_step(hand: Hand) -> Call:
    shape = hand.shape()
    args = [hand.tensor(shape), hand.tensor(shape), *(hand.scalar(shape[0], 1.0, 0.0, -0.5) for _ in range(3))]
    options = streams(hand, shape)
    if hand.maybe():
        options = {"noise": hand.tensor(shape)}
    return Call("sde_step", args, {**options, "return_mean": hand.maybe()})


@drawer
def perturb(hand: Hand) -> Call:
    shape = hand.shape()
    args = [hand.tensor(shape), *(hand.scalar(shape[0], 1.0, 0.0, 0.3) for _ in range(2))]
    return Call("perturb", args, streams(hand, shape))


@drawer
def denoising_loss(hand: Hand) -> Call:
    shape = hand.shape()
    score = hand.maybe()
    options = streams(hand, shape) | {
        "weight": hand.one(None, 1) and hand.scalar(shape[0], 1.0, 2.0), "reduction": hand.one("sum", "mean"),
        "parameterization": "score" if score else "epsilon",
    }  # fmt: skip
    return Call("denoising_loss", [hand.tensor(shape), hand.scalar(shape[0], 1.0, 0.3) if score else None], options)


@drawer
def langevin_step(hand: Hand) -> Call:
    shape = hand.shape()
    options = streams(hand, shape)
    if hand.maybe():
        options["step_size"] = hand.scalar(shape[0], 0.1, 0.0)
    else:
        options |= {"snr": hand.one(0.16, 0.01), "norm": hand.one("marginal", "sample", "batch")}
        if options["norm"] == "marginal":
            options["std"] = hand.scalar(shape[0], 1.0, 0.0, 0.3)
    return Call("langevin_step", [hand.tensor(shape), hand.tensor(shape)], {**options, "return_mean": hand.maybe()})


def quadratic(z: Tensor) -> Tensor:
    # without a dim beside the batch too: what an energy raises is its own matter
    return (z.flatten(1).square().sum(1) if z.dim() > 1 else z.square()) / 2


@drawer
def energy_and_grad(hand: Hand) -> Call:
    return Call("energy_and_grad", [quadratic, hand.tensor(hand.shape(2, 3))])


def chain(hand: Hand) -> tuple[tuple[int, ...], torch.dtype, float | Tensor]:
    shape = hand.shape(2, 3)
    return shape, hand.dtype(), hand.scalar(shape[0], 0.1, 1.0)


@drawer
def mala_propose(hand: Hand) -> Call:
    shape, dtype, alpha = chain(hand)
    return Call("mala_propose", [hand.tensor(shape, dtype) for _ in range(2)] + [alpha], streams(hand, shape))


@drawer
def mala_accept(hand: Hand) -> Call:
    shape, dtype, alpha = chain(hand)
    energies = [hand.tensor(shape[:1], compute_dtype(dtype)) for _ in range(2)]
    states, grads = ([hand.tensor(shape, dtype) for _ in range(2)] for _ in range(2))
    return Call("mala_accept", [*states, *energies, *grads, alpha], streams(hand, shape))


@drawer
def mala_step(hand: Hand) -> Call:
    shape, dtype, alpha = chain(hand)
    z = hand.tensor(shape, dtype, grad=False)
    u = quadratic(z.to(compute_dtype(dtype)))
    return Call("mala_step", [z, u, z.clone(), quadratic, alpha], streams(hand, shape))


@drawer
def energy_loss(hand: Hand) -> Call:
    shape = hand.shape(1, 2)
    args = [hand.tensor(shape), hand.tensor(shape), hand.one("linear", "hinge", "ebgan"), hand.one(1.0, 0.0)]
    return Call("energy_loss", args)


@drawer
def grad_norm_penalty(hand: Hand) -> Call:
    return Call("grad_norm_penalty", [hand.tensor(hand.shape(2, 4))])


def critic(hand: Hand) -> tuple[list[Tensor], tuple[int, ...], tuple[int, ...]]:
    b = hand.batch()
    return [hand.tensor((b,)) for _ in range(2)], (b, *hand.shape(1, 2)), (b, hand.one(2, 8))


@drawer
def gan_qp_loss(hand: Hand) -> Call:
    scores, x, z = critic(hand)
    args = [
        *scores,
        hand.tensor(x),
        hand.tensor(x),
        *([hand.tensor(z), hand.tensor(z)] if hand.maybe() else [None, None]),
    ]
    options = {
        "lam": hand.one(10.0, 0.5), "distance": hand.one(*DISTANCES), "eps": hand.one(0.0, 1e-3),
        "reduction": hand.one("mean", "sum", "none"),
    }  # fmt: skip
    return Call("gan_qp_loss", args, options)


@drawer
def gan_qp_generator_loss(hand: Hand) -> Call:
    scores, x, z = critic(hand)
    args = [*scores, *(hand.tensor(shape) for shape in (x, x, z, z)), hand.one((2.0, 3.0), (0.0, 6))]
    return Call("gan_qp_generator_loss", args, {"reduction": hand.one("mean", "sum", "none")})


@drawer
def spectral_normalize(hand: Hand) -> Call:
    weights, us, vs = [], [], []
    for _ in range(hand.number(1, 4)):
        shape = hand.shape(1, 4)
        weights.append(hand.tensor(shape, hand.one(torch.float32, torch.float64)))
        rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (None, None)
        us.append(None if rows is None else hand.tensor((rows,), weights[-1].dtype, grad=False))
        vs.append(None if rows is None else hand.tensor((columns,), weights[-1].dtype, grad=False))
    return Call(
        "spectral_normalize", [weights, us, vs], {"n_iter": hand.one(1, 0, 3), "through_iteration": hand.maybe()}
    )


@dataclass
class Answer:
    """What a call did: its tensors and, beside them, the gradients of those that have one; or why not."""

    tensors: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    refusal: Exception | None = None


def answer(call: Call, backend: str) -> Answer:
    """The answer of a backend."""
    with pyflow.backend(backend):
        # what seed=None draws
        torch.manual_seed(3)
        try:
            result = getattr(pyflow.ops, call.op)(*call.args, **call.options)
        except Exception as error:
            return Answer(refusal=error)
        outputs = list(_tensors(result if isinstance(result, (list, tuple)) else [result]))
        leaves = [t for t in call.tensors() if t.requires_grad]
        gradients: list[Tensor | None] = []
        if leaves and any(o.requires_grad for o in outputs):
            source = torch.Generator().manual_seed(5)
            pairs = []
            for i, o in enumerate(outputs):
                # the layouts that sum and slicing leave behind
                drawn = torch.randn((*o.shape, 2), generator=source, dtype=torch.float64).to(o.dtype)
                weight = drawn.flatten()[0].expand_as(o) if i % 2 and o.numel() else drawn[..., 0]
                if o.requires_grad:
                    pairs.append((o, weight))
            ends, weights = zip(*pairs, strict=True)
            gradients = list(torch.autograd.grad(ends, leaves, weights, allow_unused=True))
        return Answer([o.detach() for o in outputs], gradients)


def doubled(call: Call) -> Call:
    """The call with its floating-point tensors in float64."""

    def double(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return [double(each) for each in value] if isinstance(value, list) else value

    return Call(call.op, double(call.args), {name: double(value) for name, value in call.options.items()})


def memory(tensor: Tensor) -> Tensor:
    """All bytes of its storage, a copy."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.detach().untyped_storage()).clone()


def plain(call: Call) -> list[Tensor]:
    """Its tensors that have memory."""
    return [t for t in call.tensors() if t.layout == torch.strided and t.device.type == "cpu"]


def check(call: Call) -> bool:
    """Hold a call to what calls may do; whether it was answered."""
    inputs = plain(call)
    before = [memory(t) for t in inputs]
    undrawn = torch.Generator().manual_seed(3).get_state()
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    try:
        if call.options.get("inplace") is True:
            return _check_in_place(call, inputs, before)
        got, reference = answer(call, "auto"), answer(call, "reference")
    finally:
        faulthandler.cancel_dump_traceback_later()
    for tensor, bytes_before in zip(inputs, before, strict=True):
        assert torch.equal(memory(tensor), bytes_before), f"{call}: an input has changed"
    if got.refusal or reference.refusal:
        _check_sentence(call, got.refusal, reference.refusal)
        assert torch.equal(torch.get_rng_state(), undrawn), f"{call}: refused, and has drawn from the generator"
        return False
    _compare(call, got, reference)
    return True


def _check_sentence(call: Call, *refusals: Exception | None) -> None:
    for refusal in refusals:
        assert isinstance(refusal, (TypeError, ValueError)), f"{call}: {type(refusal).__name__}: {refusal}"
        text = str(refusal)
        assert text.startswith(f"{call.op}: ") and "\n" not in text, f"{call}: {type(refusal).__name__}: {text}"
    (kind, text), (other_kind, other_text) = ((type(r), str(r)) for r in refusals)
    assert kind is other_kind and text == other_text, f"{call}: {text!r} here, {other_text!r} from the reference"


def _check_in_place(call: Call, inputs: list[Tensor], before: list[Tensor]) -> bool:
    options = {**call.options, "inplace": False}
    apart = answer(Call(call.op, [t.clone() if isinstance(t, Tensor) else t for t in call.args], options), "auto")
    got = answer(call, "auto")
    if got.refusal:
        text = str(got.refusal)
        assert isinstance(got.refusal, (TypeError, ValueError)) and text.startswith(f"{call.op}: "), f"{call}: {text}"
        assert all(torch.equal(memory(t), b) for t, b in zip(inputs, before, strict=True)), (
            f"{call}: refused, and changed"
        )
        return False
    view = call.args[0]
    if view.is_meta:
        assert got.tensors[0] is view or got.tensors[0].shape == view.shape, f"{call}: not in place"
        return True
    assert_same_bits(got.tensors[0], apart.tensors[0], f"{call}")
    assert got.tensors[0].data_ptr() == view.data_ptr(), f"{call}: not in place"
    left = before[0].view(view.dtype).as_strided(view.shape, view.stride(), view.storage_offset())
    left.copy_(view)
    assert torch.equal(memory(view), before[0]), f"{call}: wrote beside the view"
    return True


def _compare(call: Call, got: Answer, reference: Answer) -> None:
    assert len(got.tensors) == len(reference.tensors), f"{call}: {len(got.tensors)} outputs"
    for i, (a, b) in enumerate(zip(got.tensors, reference.tensors, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{call}: output {i} is {_shown(a)}, the reference {_shown(b)}"
        if call.exact and not a.is_meta:
            assert_same_bits(a, b, f"{call}: output {i}")
    # shapes and dtypes are all that a meta tensor has
    if call.exact or any(a.is_meta for a in got.tensors):
        return
    if call.rounds:
        _compare_digits(call, got)
        return
    if any(t.is_meta for t in got.tensors):
        # nothing to compare
        return
    exact = answer(doubled(call), "reference")
    scale = call.scale() if call.scale and not exact.refusal else _largest(plain(call))
    dtypes = {t.dtype for t in plain(call) if t.is_floating_point()}
    unit = UNIT[torch.float64 if dtypes == {torch.float64} else torch.float32]
    leaves = [t for t in call.tensors() if t.requires_grad]
    # gradients are of weights of size 1
    slopes = [max(scale, 1.0, scale / (_largest([t]) or 1.0) if call.unitless else 0.0) for t in leaves]
    for kind, scales in (("tensors", [scale] * len(got.tensors)), ("gradients", slopes)):
        for i, (a, b, e, size) in enumerate(
            zip(getattr(got, kind), getattr(reference, kind), getattr(exact, kind), scales, strict=False)
        ):
            name = f"{call}: {kind[:-1]} {i}"
            assert (a is None) == (b is None), f"{name}: {'missing' if a is None else 'not in the reference'}"
            if a is not None:
                _close(name, unit, a, b, e, size)


def _largest(tensors: list[Tensor]) -> float:
    """Of their finite numbers."""
    given = [t.detach()[t.detach().isfinite()] for t in tensors if t.is_floating_point()]
    return max((float(t.abs().max()) for t in given if t.numel()), default=0.0)


def _close(name: str, unit: float, got: Tensor, reference: Tensor, exact: Tensor, scale: float) -> None:
    """Within rounding of the exact answer, or no further from it than a few times the reference is."""
    if not got.is_floating_point():
        assert torch.equal(got, reference), f"{name}: {got} here, {reference} from the reference"
        return
    a, b, e = got.double(), reference.double(), exact.double()
    finite = a.isfinite() & b.isfinite() & e.isfinite()
    # where the answer leaves the range of the dtype, or one of its factors does, infinities and NaN need not agree
    limit = min(torch.finfo(got.dtype).max / 16, torch.finfo(torch.float32).max / 2**40)
    huge = ~e.isfinite() | (e.abs() > limit) | ~b.isfinite()
    assert bool((finite | huge).all()), f"{name}: {got} here, {reference} from the reference"
    if not finite.any():
        return
    a, b, e = a[finite], b[finite], e[finite]
    worst = float((b - e).abs().max())
    size = e.abs() + max(scale, 1e-2 * float(e.abs().max()))
    bound = 2 * UNIT[got.dtype] * e.abs() + 512 * unit * size + 16 * worst + 1e-30
    excess = (a - e).abs() - bound
    i = excess.argmax()
    assert excess[i] <= 0, (
        f"{name}: got {a[i].item()!r}, exact {e[i].item()!r}, {excess[i].item():.2e} more than allowed "
        f"(the reference's largest error is {worst:.2e})"
    )


def _compare_digits(call: Call, got: Answer) -> None:
    """Codes and indices are those of the reference, or of a point within rounding."""
    near = [answer(other, "reference") for other in call.rounds()]
    for i, a in enumerate(got.tensors):
        candidates = torch.stack([n.tensors[i].to(a.dtype) for n in near])
        same = (candidates == a) | (candidates.isnan() & a.isnan())
        if a.is_floating_point():
            same |= (candidates.double() - a.double()).abs() <= 4 * UNIT[a.dtype] * (1 + a.double().abs())
        assert bool(same.any(0).all()), f"{call}: output {i} has digits of no point near"
