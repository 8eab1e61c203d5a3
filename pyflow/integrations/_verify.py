"""Whether a model computes the same after `accelerate` as before."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._classes import named
from ..flows._peers import stand_of
from ..flows.lower.zuko import FLOWS

# how often the inputs are rounded to see how far a result moves by that, and how far it may move in units of it
_ROUNDINGS, _FACTOR = 3, 16
_SHOWN = 3  # how many differences an error names


@torch.inference_mode(False)
def verified(model: Any, batch: Any, accelerate: Callable[[Any], Any]) -> dict[str, str]:
    """Return what of an accelerated copy of the model ran as in its package alone: paths, with the reasons.

    Raise ValueError if the copy computes something else. Results may differ by 16 times what they move when inputs and
    parameters move by an ulp, and 64 ulp of the largest.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: verify needs a torch.nn.Module, got {type(model).__name__}")
    args, named_args = ((), dict(batch)) if isinstance(batch, Mapping) else (_tuple(batch), {})
    given = dict(_tensors("verify", [args, named_args]))
    if not given:
        raise TypeError(f"accelerate: verify must be a batch, or a tuple of arguments, got {type(batch).__name__}")
    if not any(each.numel() for each in given.values()):
        sizes = ", ".join(str(tuple(each.shape)) for each in given.values())
        raise ValueError(f"accelerate: verify must have at least one row, got the shape {sizes}")
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    report = accelerate(after)
    want, got = _results(before, args, named_args), _results(after, args, named_args)
    moved = [_results(*_rounded(model, args, named_args, seed)) for seed in range(_ROUNDINGS)]
    wrong = []
    for name, expected in want.items():
        found = got.get(name)
        if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
            wrong.append(f"{name} is {_described(found)} instead of {_described(expected)}")
        elif not expected.is_floating_point():
            if count := int((found != expected).sum()):
                wrong.append(f"{name} differs in {count} of {expected.numel()} places")
        elif expected.numel():
            eps = torch.finfo(expected.dtype).eps
            most = _FACTOR * max(_distance(expected, each[name]) for each in moved) + 64 * eps * _largest(expected)
            if not (distance := _distance(expected, found)) <= most:
                wrong.append(f"{name} differs by {distance:.3g}, more than the {most:.3g} that rounding explains")
    if wrong:
        shown = "; ".join(wrong[:_SHOWN]) + (f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else "")
        raise ValueError(f"accelerate: verify found a difference, the model is as it was: {shown}")
    return {
        each.path: max(each.reasons, key=each.reasons.__getitem__)
        for each in report.calls()
        if each.reasons and not each.fast
    }


def _results(model: nn.Module, args: tuple[Any, ...], named_args: dict[str, Any]) -> dict[str, Tensor]:
    """Return outputs and gradients by name."""
    args, named_args = _leaves(args), _leaves(named_args)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        found = dict(_tensors("the output", _called(model, args, named_args)))
        if not found:
            raise ValueError(f"accelerate: verify: {type(model).__name__} returns no tensors")
        inputs: dict[str, Tensor] = {name: each for name, each in model.named_parameters() if each.requires_grad}
        inputs |= {name: x for name, x in _tensors("the input", [args, named_args]) if x.requires_grad}
        total = sum([_weighted(each) for each in found.values() if each.requires_grad])
        if inputs and isinstance(total, Tensor):
            grads = torch.autograd.grad(total, [*inputs.values()], allow_unused=True)
            found |= {
                f"the gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True) if grad is not None
            }
    return {name: each.detach() for name, each in found.items()}


def _weighted(x: Tensor) -> Tensor:
    """Return a sum in which every number counts differently."""
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).to(x.device, x.dtype)
    return (x * weights.view(x.shape)).sum()


def _called(model: nn.Module, args: tuple[Any, ...], named_args: dict[str, Any]) -> Any:
    if stand_of(model) is None:
        return model(*args, **named_args)
    if named(type(model)) in FLOWS:
        x, *context = args
        return model(*context, **named_args).log_prob(x)
    return model.log_prob(*args, **named_args)  # type: ignore[operator]


def _rounded(
    model: nn.Module, args: tuple[Any, ...], named_args: dict[str, Any], seed: int
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return the model and its inputs with every number moved by up to an ulp."""
    generator = torch.Generator().manual_seed(seed)

    def move(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        by = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device) * 2 - 1
        return (x.double() * (1 + torch.finfo(x.dtype).eps * by)).to(x.dtype)

    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(move(parameter))
        return model, _mapped(move, args), _mapped(move, named_args)


def _leaves(value: Any) -> Any:
    return _mapped(lambda x: x.detach().clone().requires_grad_(x.is_floating_point()), value)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(change, each) for key, each in value.items()}
    return type(value)(_mapped(change, each) for each in value) if type(value) in (list, tuple) else value


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a result, with names."""
    if isinstance(value, Tensor):
        yield name, torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(f"{name}[{key!r}]", each)
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            yield from _tensors(f"{name}[{i}]", each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(f"{name}.{field.name}", getattr(value, field.name))


def _tuple(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def _distance(a: Tensor, b: Tensor) -> float:
    both = torch.isfinite(a) & torch.isfinite(b)
    # nan or inf must be where they were
    same = torch.equal(torch.where(both, 0, a).nan_to_num(nan=7), torch.where(both, 0, b).nan_to_num(nan=7))
    return float((a - b)[both].double().abs().max()) if same and both.any() else 0.0 if same else float("inf")


def _largest(x: Tensor) -> float:
    finite = x[torch.isfinite(x)]
    return float(finite.double().abs().max()) if finite.numel() else 0.0


def _described(x: Tensor | None) -> str:
    return "missing" if x is None else f"{x.dtype} {tuple(x.shape)}".removeprefix("torch.")
