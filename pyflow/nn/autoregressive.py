"""Autoregressive layers: a masked network computes from the features before each how it is transformed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..ops import affine_coupling, affine_coupling_packed, rq_spline
from ._made import ACTIVATIONS, MADE

TRANSFORMS = ("affine", "rq_spline")
# least slope of a spline
_SLOPE = 1e-3


class MaskedAutoregressive(nn.Module):
    """Autoregressive layer with a masked network.

    y_i = f(x_i; params_i), where params_i depend on the features before i in the order and on the context;
    logdet = sum log dy_i / dx_i. "affine": y = x exp(s / (1 + |s| / c)) + t with c = log 1000; "rq_spline": the
    spline of `pyflow.ops.rq_spline`.

    Args:
        features: number of features D.
        hidden: widths of the hidden layers.
        transform: "affine" or "rq_spline".
        order: place of every feature, D integers; features with equal places do not see each other, so that
            [0, 0, 1, 1] is a coupling. Default 0, 1, ..., D - 1.
        residual: a residual block of two layers for each entry of `hidden`.
        context_features: size of the context, 0 for none.
        activation: "relu", "leaky_relu", "elu", "gelu", "silu", "tanh" or "sigmoid".
        bins, bound: number of bins, and the interval [-bound, bound] of the spline; outside it y = x.

    Returns:
        `forward(x, context=None)` and `inverse(y, context=None)`: (y, logdet) for x (..., D) and context
        (..., context_features), whose leading dims broadcast; y with x's dtype, logdet (...) in float32 (float64 for
        float64 x). The layer starts as the identity.

    Raises:
        TypeError, ValueError: an unknown transform or activation, a number out of range, an order of another length;
            x of another width; a context that is missing, of another width, or given without context_features.

    Notes:
        The inverse evaluates every unit once, as soon as all features that it can see are known: about half of the
        multiply-adds of one forward pass, where D passes are usual. It sums in another order than the forward, so the
        result is exact up to rounding. Both are differentiable any number of times; without gradients the inverse
        works in place. torch.compile unrolls its D steps. In `pyflow.flows` all layers run in one call on a CPU.
        Masks are those of MADE as nflows builds them (degrees 1, ..., D - 1 in turn; units and residual blocks too),
        and for feed-forward nets also zuko's, for any order. With a context degrees begin at 0, as in zuko: units of
        degree 0 see the context alone, so the first feature depends on it (in nflows it does not). The order is part
        of the state_dict: a loaded one replaces the order of the layer.

    Source:
        Germain et al. 2015, MADE, arXiv:1502.03509; Papamakarios et al. 2017, arXiv:1705.07057; Durkan et al. 2019,
        Neural spline flows, arXiv:1906.04032.

    Example:
        >>> layer = MaskedAutoregressive(3, (16, 16), transform="rq_spline", context_features=2)
        >>> x, context = torch.randn(5, 3), torch.randn(5, 2)
        >>> y, logdet = layer(x, context)
        >>> back, minus = layer.inverse(y, context)
        >>> bool(torch.allclose(back, x, atol=1e-5)), bool(torch.allclose(logdet, -minus, atol=1e-5))
        (True, True)
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int],
        *,
        transform: str = "affine",
        order: Sequence[int] | Tensor | None = None,
        residual: bool = False,
        context_features: int = 0,
        activation: str = "relu",
        bins: int = 8,
        bound: float = 3.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.features = check.at_least(name, "features", features, 1)
        check.choice(name, "transform", transform, TRANSFORMS)
        check.choice(name, "activation", activation, tuple(ACTIVATIONS))
        self.context_features = check.at_least(name, "context_features", context_features, 0)
        self.bins, self.bound = check.at_least(name, "bins", bins, 2), check.positive(name, "bound", bound)
        if isinstance(hidden, (str, numbers.Number)) or not isinstance(hidden, Sequence):
            raise TypeError(f"{name}: hidden must be a tuple of widths, got {type(hidden).__name__}")
        widths = tuple(check.at_least(name, "hidden", width, 1) for width in hidden)
        if not widths:
            raise ValueError(f"{name}: hidden must have at least one width, got none")
        self.transform = transform
        self.net = MADE(
            _places(name, order, self.features), widths, 2 if transform == "affine" else 3 * self.bins - 1,
            residual=check.flag(name, "residual", residual), context=self.context_features, activation=activation,
        )  # fmt: skip
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset to the identity."""
        self.net.reset_parameters()
        if self.transform == "rq_spline":
            identity_slopes(self.net.layers[-1].bias, self.bins)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, context = self._given("x", x, context)
        params = self.net(x, context)
        if self.transform == "affine":
            return affine_coupling_packed(
                x, params, packing="interleaved", dim=-1, scale_map="softsign", event_dims=1
            )  # fmt: skip
        return self._spline(x, params.unflatten(-1, (self.features, -1)), False, 1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, context = self._given("y", y, context)
        lead = y.shape[:-1]
        if context is not None:
            context = context.expand(*lead, -1).reshape(-1, self.context_features)
        x, logdet = self.net.invert(y.reshape(-1, self.features), context, self._invert_rows)
        return x.view(y.shape), logdet.view(lead)

    def _invert_rows(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x, logdet of every element) for features y (k, N) with params (k * P, N)."""
        params = params.unflatten(0, (y.shape[0], -1)).transpose(1, 2)  # (k, N, P)
        if self.transform == "affine":
            shift, scale = params.unbind(-1)
            return affine_coupling(y, shift, scale, scale_map="softsign", inverse=True, event_dims=0)
        return self._spline(y, params, True, 0)

    def _spline(self, x: Tensor, params: Tensor, inverse: bool, event_dims: int) -> tuple[Tensor, Tensor]:
        return rq_spline(
            x, params, bins=self.bins, bound=self.bound, min_slope=_SLOPE, inverse=inverse, event_dims=event_dims
        )  # fmt: skip

    def _given(self, label: str, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return x and the context, checked, x with the leading dims of both."""
        name = type(self).__name__
        check.float_tensor(name, label, x)
        if x.dim() == 0 or x.shape[-1] != self.features:
            raise ValueError(f"{name}: {label} must have the shape (..., {self.features}), got {tuple(x.shape)}")
        check.parameter_dtype(name, label, x, self.net.layers[-1].bias)
        context = check.context(name, context, self.context_features, x.shape[:-1], x.device)
        if context is None:
            return x, None
        context = context.to(x.dtype)
        if context.shape[:-1] == x.shape[:-1]:
            return x, context
        return x.expand(*torch.broadcast_shapes(x.shape[:-1], context.shape[:-1]), -1), context

    def extra_repr(self) -> str:
        spline = f", bins={self.bins}, bound={self.bound}" if self.transform == "rq_spline" else ""
        return f"features={self.features}, transform={self.transform!r}{spline}"


@torch.no_grad()
def identity_slopes(bias: Tensor, bins: int) -> None:
    """Set the slopes to 1 in the bias of a layer whose other numbers are 0, so that its splines are the identity."""
    # min_slope + softplus of this is 1
    bias.view(-1, 3 * bins - 1)[:, 2 * bins :] = math.log(math.expm1(1 - _SLOPE))


def _places(name: str, order: object, features: int) -> list[int]:
    if order is None:
        return list(range(features))
    if isinstance(order, Tensor):
        order = order.tolist()
    if isinstance(order, str) or not isinstance(order, Sequence):
        raise TypeError(f"{name}: order must be a sequence of integers, got {type(order).__name__}")
    places = [check.at_least(name, "order", place, -(2**63)) for place in order]
    if len(places) != features:
        raise ValueError(f"{name}: order must have one place per feature, {features}, got {len(places)}")
    return places
