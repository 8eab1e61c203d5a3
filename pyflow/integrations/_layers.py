"""Fast methods of single layers, for networks and inputs that have no program: their transforms are ops of pyflow.

Activation norms, constant scales, 1x1 convolutions, LU layers, permutations, and masked affine layers of both packages
run as in their package: on a CPU no op was faster than its few operations, or they take little beside the network.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .. import _checks as check
from .._classes import own_method
from .._torch import under_transform
from ..flows._structure import explain
from ..flows.lower.couplings import scale_map_of
from ..flows.lower.normflows import SCALE_MAPS
from ..ops import additive_coupling, affine_coupling_packed, rq_spline
from ..ops.spline import MOST_BINS
from ._fast import FAST, GAINS, LEFT, SAYS, Falls, fast, fell, ran
from ._flows import layer_methods


def _register(kinds: tuple[str, ...], op: str, gain: str = "", counts: Callable[[Any], bool] = lambda x: False) -> None:
    """Let layers run as programs where they can, else with an op.

    Args:
        counts: of x: whether what is no program is counted as a call that runs as in the package.
    """
    for kind in kinds:
        if "forward" in FAST.get(kind, ()):
            FAST[kind].update(layer_methods(counts))
            SAYS[kind] = lambda module: f"{explain(module)}\nwhere no program runs: {op}"
        else:
            SAYS[kind] = lambda module: op
        if gain:
            GAINS[kind] = gain


def _why_not(x: Any) -> str:
    """Return why no op runs in place of what a layer does with x, empty if one may."""
    if not isinstance(x, Tensor):
        return "x is no tensor"
    if x.dtype not in (torch.float32, torch.float64):
        return f"x is {check.short(x.dtype)}"
    try:
        slow = not under_transform() and _backend.runs_reference("affine_coupling", x)
    except _backend.BackendUnavailable:
        slow = True
    return f"{x.device.type} has no kernel with pyflow.backend {_backend.current()!r}" if slow else ""


def _run(op: Callable[..., Any], x: Tensor, params: Any, **options: Any) -> Any:
    """Return what an op returns, or why it does not take these arguments."""
    if not isinstance(params, Tensor) or params.dtype is not x.dtype:
        return Falls("its network does not return x's dtype")
    try:
        return op(x, params, **options)
    except (TypeError, ValueError) as error:
        return Falls(str(error))


# affine transforms


def _pays(x: Any) -> bool:
    # on a CPU torch's operations on x take as long, and little beside the network
    return isinstance(x, Tensor) and not x.is_cpu


def _affine(x: Any, params: Any, scale_map: str, constant: float, packing: str, inverse: bool) -> Any:
    if reason := _why_not(x):
        return Falls(reason)
    clamp, eps = (constant, 0.0) if scale_map == "tanh" else (1.0, constant)
    return _run(
        affine_coupling_packed, x, params, packing=packing, scale_map=scale_map, clamp=clamp, eps=eps, inverse=inverse
    )  # fmt: skip


_AFFINE_COUPLINGS = (
    "nflows.transforms.coupling.AffineCouplingTransform", "glasflow.transforms.coupling.AffineCouplingTransform"
)  # fmt: skip


def _affine_coupling(inverse: bool) -> Callable[..., Any]:
    def method(self: Any, inputs: Any, transform_params: Any) -> Any:
        if not _pays(inputs):
            return LEFT
        scale_map = scale_map_of(type(self), getattr(self, "scale_activation", None))
        if scale_map is None:
            return Falls("its scale_activation is no scale map of affine_coupling")
        return _affine(inputs, transform_params, *scale_map, "shift_scale", inverse)

    return method


_ADDITIVE = "nflows.transforms.coupling.AdditiveCouplingTransform"


def _additive_coupling(inverse: bool) -> Callable[..., Any]:
    def method(self: Any, inputs: Any, transform_params: Any) -> Any:
        if reason := _why_not(inputs):
            return Falls(reason)
        outputs = _run(additive_coupling, inputs, transform_params, inverse=inverse)
        return outputs if type(outputs) is Falls else (outputs, outputs.new_zeros(outputs.shape[:1]))

    return method


for _direction in ("forward", "inverse"):
    _inverse = _direction == "inverse"
    fast(*_AFFINE_COUPLINGS, name=f"_coupling_transform_{_direction}")(_affine_coupling(_inverse))
    fast(_ADDITIVE, name=f"_coupling_transform_{_direction}")(_additive_coupling(_inverse))
_register(_AFFINE_COUPLINGS, "on a GPU its transform as affine_coupling", counts=lambda x: not _pays(x))
_register((_ADDITIVE,), "its transform as additive_coupling")


_NORMFLOWS_COUPLING = "normflows.flows.affine.coupling.AffineCoupling"


def _of_two(name: str) -> Callable[..., Any]:
    """Return a method of normflows' coupling, which is given both parts."""

    def method(self: Any, z: Any) -> Any:
        z1, z2 = z
        if not _pays(z2):
            return LEFT
        reason = _why_not(z2)
        if not reason and not (self.scale and self.scale_map in SCALE_MAPS):
            reason = "it does not scale" if not self.scale else f"its scale_map is {self.scale_map!r}"
        if reason:
            return Falls(reason)
        params = self.param_map(z1)
        result = _affine(z2, params, SCALE_MAPS[self.scale_map], 0.0, "interleaved", name == "inverse")
        if type(result) is Falls:
            # the network must not run twice
            fell(self, result.reason)
            with_params = SimpleNamespace(param_map=lambda _: params, scale=self.scale, scale_map=self.scale_map)
            return own_method(type(self), name)(with_params, z)
        ran(self)
        return [z1, result[0]], result[1]

    return method


FAST[_NORMFLOWS_COUPLING] = {name: _of_two(name) for name in ("forward", "inverse")}
SAYS[_NORMFLOWS_COUPLING] = lambda _: "on a GPU affine_coupling"


# rational-quadratic splines


def _spline(self: Any, x: Any, params: Any, bins: int, divisor: float, inverse: bool) -> Any:
    """Return the splines of a layer; in its package, widths and heights are divided by the root of `divisor`."""
    if reason := _why_not(x):
        return Falls(reason)
    tails, per_feature = self.tails, isinstance(self.tails, (list, tuple))
    if self.min_bin_width != self.min_bin_height:
        return Falls("its min_bin_width and min_bin_height differ")
    if bins > MOST_BINS:
        return Falls(f"it has more than {MOST_BINS} bins")
    if tails is None and not check.values_are_checked(x):
        return Falls("whether x is in its domain cannot be seen here")
    if type(self).__module__.startswith(("nflows.", "glasflow.")) and tails not in (None, "linear"):
        return Falls(f"its tails are {tails!r}")
    result = _run(
        rq_spline, x, params, bins=bins, bound=self.tail_bound, tails=tails, param_scale=1 / math.sqrt(divisor),
        min_bin=self.min_bin_width, min_slope=self.min_derivative, inverse=inverse,
    )  # fmt: skip
    if type(result) is Falls or not per_feature:
        return result
    # normflows returns 0 outside where each feature has tails of its own
    inside = (x >= -self.tail_bound) & (x <= self.tail_bound)
    return torch.where(inside, result[0], 0), result[1]


_SPLINE_COUPLINGS = (
    "nflows.transforms.coupling.PiecewiseRationalQuadraticCouplingTransform",
    "normflows.flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling",
)


@fast(*_SPLINE_COUPLINGS)
def _coupling_transform(self: Any, inputs: Any, transform_params: Any, inverse: bool = False) -> Any:
    count = self._transform_dim_multiplier()
    sizes = tuple(inputs.shape)
    if len(sizes) not in (2, 4) or tuple(transform_params.shape) != (sizes[0], count * sizes[1], *sizes[2:]):
        return Falls("its network's output has another shape")
    params = transform_params.reshape(*sizes[:2], count, *sizes[2:]).movedim(2, -1)
    net = self.transform_net
    divisor = getattr(net, "hidden_features", getattr(net, "hidden_channels", None))
    result = _spline(self, inputs, params, self.num_bins, 1.0 if divisor is None else divisor, inverse)
    if divisor is None and type(result) is not Falls:
        warnings.warn("Inputs to the softmax are not scaled down: initialization might be bad.", stacklevel=2)
    return result


_SPLINE_AUTOREGRESSIVE = (
    "nflows.transforms.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
    "normflows.flows.neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive",
)


@fast(*_SPLINE_AUTOREGRESSIVE)
def _elementwise(self: Any, inputs: Any, autoregressive_params: Any, inverse: bool = False) -> Any:
    count = self._output_dim_multiplier()
    sizes = tuple(inputs.shape)
    if len(sizes) != 2 or tuple(autoregressive_params.shape) != (sizes[0], count * sizes[1]):
        return Falls("its network's output has another shape")
    params = autoregressive_params.reshape(*sizes, count)
    divisor = getattr(self.autoregressive_net, "hidden_features", 1.0)
    return _spline(self, inputs, params, self.num_bins, divisor, inverse)


_SPLINES = (
    "nflows.transforms.nonlinearities.PiecewiseRationalQuadraticCDF",
    "normflows.flows.neural_spline.coupling.PiecewiseRationalQuadraticCDF",
)


@fast(*_SPLINES, name="_spline")
def _own_splines(self: Any, inputs: Any, inverse: bool = False) -> Any:
    parts = self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives
    if tuple(inputs.shape[1:]) != tuple(parts[0].shape[:-1]):
        return Falls("its parameters have another shape")
    params = torch.cat(parts, -1).expand(len(inputs), *inputs.shape[1:], -1)
    return _spline(self, inputs, params, parts[0].shape[-1], 1.0, inverse)


_RQ_SPLINE = "its transform as rq_spline"
_register(
    _SPLINE_COUPLINGS, _RQ_SPLINE,
    "with a network of your own, in training 3 times the speed for vectors (4096, 8) and 6 times for images "
    "(64, 12, 16, 16), without gradients 4 and 9 times (8 bins, one core)",
)  # fmt: skip
_register(
    _SPLINE_AUTOREGRESSIVE, _RQ_SPLINE, "with dropout, in training 2.3 times the speed for (256, 8) (8 bins, one core)"
)
_register(_SPLINES, "rq_spline", "in training 14 times the speed for (4096, 8) (10 bins, one core)")


# checkerboards of normflows, which makes indices of them element by element at every call

_STRIDES = dict(
    says="a checkerboard by strides",
    gain="for a checkerboard 2 to 4 times the speed for (16, 12, 16, 16), 1.2 to 1.5 of a coupling with it (one core)",
)


def _odd(sizes: tuple[int, ...], mode: str, device: torch.device) -> Tensor:
    """Return for each row of an image whether its first element is in the first part, (..., 1)."""
    odd = torch.zeros([1] * len(sizes), dtype=torch.int64, device=device)
    for dim, size in enumerate(sizes):
        odd = odd + torch.arange(size, device=device).view(-1, *[1] * (len(sizes) - dim - 1))
    return (odd % 2 == ("inv" not in mode)).unsqueeze(-1)


@fast("normflows.flows.reshape.Split", name="forward", **_STRIDES)
@fast("normflows.flows.reshape.Merge", name="inverse", **_STRIDES)
def _split(self: Any, z: Any) -> Any:
    if self.mode in ("channel", "channel_inv"):
        return LEFT
    if "checkerboard" not in self.mode or z.dim() < 2 or z.shape[-1] % 2 or not z.numel():
        return Falls("it is no checkerboard")
    z = z.contiguous()
    even, odd = z[..., ::2], z[..., 1::2]
    first = _odd(z.shape[1:-1], self.mode, z.device)
    return [torch.where(first, even, odd), torch.where(first, odd, even)], 0


@fast("normflows.flows.reshape.Split", name="inverse")
@fast("normflows.flows.reshape.Merge", name="forward")
def _merge(self: Any, z: Any) -> Any:
    z1, z2 = z
    if self.mode in ("channel", "channel_inv"):
        return LEFT
    if "checkerboard" not in self.mode or z1.dim() < 2 or z1.shape != z2.shape or z1.dtype is not z2.dtype:
        return Falls("it is no checkerboard")
    first = _odd(z1.shape[1:-1], self.mode, z1.device)
    return torch.stack([torch.where(first, z1, z2), torch.where(first, z2, z1)], -1).flatten(-2), 0
