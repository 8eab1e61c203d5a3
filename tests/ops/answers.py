"""What a call of a public operation may do: give the reference's answer, or one of our sentences on every backend, and
change none of its inputs.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

import pyflow
from pyflow.testing import UNIT, assert_same_bits

from .calls import Call, shown, tensors_in

PATIENCE = 120  # seconds after which a call hangs


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
        outputs = list(tensors_in(result if isinstance(result, (list, tuple)) else [result]))
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


def doubled(call: Call, change: Callable[[Tensor], Tensor] = lambda values: values) -> Call:
    """The call with its floating-point tensors in float64, changed."""

    def double(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            values = value.detach().double()
            return (values if value.is_meta else change(values)).requires_grad_(value.requires_grad)
        return [double(each) for each in value] if isinstance(value, list) else value

    return Call(call.op, double(call.args), {name: double(value) for name, value in call.options.items()})


def moved(call: Call, unit: float, half: int) -> Call:
    """The call with its floating-point tensors in float64, half of their numbers a rounding nearer to 0: no bound of a
    domain is left.
    """
    source = torch.Generator().manual_seed(3)
    return doubled(
        call, lambda t: torch.where(torch.randint(2, t.shape, generator=source) == half, t - 2 * unit * t, t)
    )


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
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{call}: output {i} is {shown(a)}, the reference {shown(b)}"
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
    # what a rounding of the inputs changes is no fault; the reference may have met with none
    near = cache(lambda: [answer(moved(call, unit, half), "reference") for half in (0, 1)])
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
                _close(name, unit, a, b, e, size, lambda: [getattr(n, kind)[i] for n in near() if not n.refusal])


def _largest(tensors: list[Tensor]) -> float:
    """Of their finite numbers."""
    given = [t.detach()[t.detach().isfinite()] for t in tensors if t.is_floating_point()]
    return max((float(t.abs().max()) for t in given if t.numel()), default=0.0)


def _close(
    name: str,
    unit: float,
    got: Tensor,
    reference: Tensor,
    exact: Tensor,
    scale: float,
    near: Callable[[], list[Tensor]],
) -> None:
    """Within rounding of the exact answer, or no further from it than a few times the reference or those near are."""
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
    excess = (a - e).abs() - 2 * UNIT[got.dtype] * e.abs() - 512 * unit * size - 1e-30
    i = excess.argmax()
    if excess[i] > 16 * worst:
        moves = [(n.double()[finite] - e).abs() for n in near()]
        worst = max([worst, *(float(m[m.isfinite()].max()) for m in moves if m.isfinite().any())])
    assert excess[i] <= 16 * worst, (
        f"{name}: got {a[i].item()!r}, exact {e[i].item()!r}, {excess[i].item():.2e} more than rounding "
        f"(the reference, also of inputs a rounding away, is off by {worst:.2e})"
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
