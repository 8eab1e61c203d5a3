"""Fast methods of flows and of their layers: what `pyflow.flows.fuse` does, by their own classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._classes import own_method
from ..flows._peers import Transform, stand_of
from ..flows._structure import explain
from ..flows.lower.zuko import FLOWS
from ._fast import FAST, GAINS, LEFT, RECORDS, SAYS, fell, ran, record


def program(
    module: Any, x: Any, given: tuple[Any, ...], inverse: bool, prior: str | None = None, repeats: int | None = None,
    counts: bool = True,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Return what the layers of a module do with x by programs, None if they have to run; count which it was.

    Args:
        repeats: see `Fuser.run`.
        counts: whether to count that the layers have to run.
    """
    traced = torch.compiler.is_compiling()
    # dynamo finds what was made before it traces
    if traced and id(module) not in RECORDS:
        return None
    fuser, result = (RECORDS[id(module)] if traced else record(module)).fuser, None
    if isinstance(x, Tensor) and not x.is_nested and x.dim() == 2:
        result = fuser.run(module, x, given, int(x.shape[1]), inverse, prior, repeats)
    if result is not None:
        ran(module)
    # without a density the layers are asked next
    elif counts and not traced and prior is None:
        fell(module, fuser.why_not(module, x, given, repeats is not None))
    return result


class _View:
    """What a stand has in place of the module that `fuse` returns."""

    def __init__(self, flow: nn.Module) -> None:
        self.flow = flow

    def _program(
        self, x: Any, given: tuple[Any, ...], inverse: bool, prior: str | None = None, repeats: int | None = None
    ) -> tuple[Tensor, Tensor] | None:
        return program(self.flow, x, given, inverse, prior, repeats)


def _of_flow(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **named: Any) -> Any:
        stand = stand_of(self)
        assert stand is not None
        return getattr(stand(_View(self)), name)(*args, **named)

    return method


# the methods that call the layers
_FLOWS = {
    ("nflows.flows.base.Flow", "nflows.flows.realnvp.SimpleRealNVP",
     "nflows.flows.autoregressive.MaskedAutoregressiveFlow"):
        ("_log_prob", "_sample", "sample_and_log_prob", "transform_to_noise"),
    ("glasflow.flows.realnvp.RealNVP", "glasflow.flows.nsf.CouplingNSF"):
        ("forward", "inverse", "sample", "log_prob", "forward_and_log_prob", "sample_and_log_prob"),
    ("normflows.core.NormalizingFlow", "normflows.core.ConditionalNormalizingFlow"):
        ("forward", "forward_and_log_det", "inverse", "inverse_and_log_det", "forward_kld", "reverse_kld",
         "reverse_alpha_div", "sample", "log_prob"),
    FLOWS: ("forward",),
}  # fmt: skip
for _kinds, _names in _FLOWS.items():
    for _kind in _kinds:
        FAST[_kind], SAYS[_kind] = {name: _of_flow(name) for name in _names}, explain

# of 8 to 32 columns, networks of 64 to 128, batches of 256 to 4096, on two cores
_OF_NFLOWS = (
    "log_prob 3 to 5.5 times as fast with affine couplings, 9 to 15 with splines; training 2.3 to 3 and 5.5 to 6.5; "
    "samples of masked layers 20 to 95"
)
_OF_NORMFLOWS = (
    "log_prob 3 to 5.5 times as fast with affine couplings, 11 to 14 with splines; training 2.5 to 3 and 7 to 8"
)
_OF_ZUKO = (
    "log_prob 2.4 to 3.1 times as fast with affine layers, 9 to 14 with splines; training 2.1 to 2.6 and 4.5 to 6.5; "
    "samples 12 to 400"
)
for _kind in (kind for kinds in _FLOWS for kind in kinds):
    GAINS[_kind] = {"normflows": _OF_NORMFLOWS, "zuko": _OF_ZUKO}.get(_kind.partition(".")[0], _OF_NFLOWS)


def layer_methods(counts: Callable[[Any], bool] = lambda x: True) -> dict[str, Callable[..., Any]]:
    """Return fast methods of a layer that run it as a program; `counts` of x: whether they count where they do not."""
    return {"forward": _layer(False, counts), "inverse": _layer(True, counts)}


def _layer(inverse: bool, counts: Callable[[Any], bool]) -> Callable[..., Any]:
    name = "inverse" if inverse else "forward"

    def method(self: Any, *args: Any, context: Any = None, **named: Any) -> Any:
        if len(args) == 2 and context is None:
            *args, context = args  # type: ignore[assignment]
        # the layer has a name of its own for x
        if not args and [*named] == [own_method(type(self), name).__code__.co_varnames[1]]:
            args, named = tuple(named.values()), {}
        # the layer says so itself
        if named or len(args) != 1:
            return LEFT
        (x,) = args
        result = program(self, x, () if context is None else (context,), inverse, counts=counts(x))
        return LEFT if result is None else result

    return method


_LAYERS = (
    "nflows.transforms.base.CompositeTransform",
    "nflows.transforms.base.InverseTransform",
    "nflows.transforms.coupling.AffineCouplingTransform",
    "nflows.transforms.coupling.AdditiveCouplingTransform",
    "nflows.transforms.coupling.PiecewiseRationalQuadraticCouplingTransform",
    "nflows.transforms.autoregressive.MaskedAffineAutoregressiveTransform",
    "nflows.transforms.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
    "normflows.flows.affine.coupling.AffineCouplingBlock",
    "normflows.flows.affine.coupling.MaskedAffineFlow",
    "normflows.flows.affine.autoregressive.MaskedAffineAutoregressive",
    "normflows.flows.neural_spline.wrapper.CoupledRationalQuadraticSpline",
    "normflows.flows.neural_spline.wrapper.CircularCoupledRationalQuadraticSpline",
    "normflows.flows.neural_spline.wrapper.AutoregressiveRationalQuadraticSpline",
    "normflows.flows.neural_spline.wrapper.CircularAutoregressiveRationalQuadraticSpline",
)
for _kind in _LAYERS:
    FAST[_kind], SAYS[_kind] = layer_methods(), explain


def _of_zuko(self: Any, c: Any = None) -> Any:
    return Transform(_View(self), own_method(type(self), "forward")(self, c), c)


for _kind in (
    "zuko.flows.autoregressive.MaskedAutoregressiveTransform",
    "zuko.flows.coupling.GeneralCouplingTransform",
):
    FAST[_kind], SAYS[_kind] = {"forward": _of_zuko}, explain
