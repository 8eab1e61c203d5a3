"""Coupling layers: part of the input stays the same, and a network computes from it how the rest changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._schemas import PACKINGS, SPLINE_VARIANTS, TAILS
from ..ops import additive_coupling, affine_coupling_packed, rq_spline
from ..ops.coupling import scale_map_constant
from ..ops.spline import slopes_of
from ._split import SPLITS, divide, join


class _Options(TypedDict):
    packing: str
    scale_map: str
    clamp: float
    eps: float
    slope: float
    shift_first: bool


class _Coupling(nn.Module):
    net: nn.Module

    def __init__(self, net: nn.Module, split: str, swap: bool) -> None:
        super().__init__()
        name = type(self).__name__
        check.choice(name, "split", split, SPLITS)
        if not callable(net):
            raise TypeError(f"{name}: net must be a module, got {type(net).__name__}")
        self.net, self.split, self.swap = net, split, check.flag(name, "swap", swap)

    def forward(
        self, x: Tensor, *context: object, mask: Tensor | None = None, **named: object
    ) -> tuple[Tensor, Tensor]:
        kept, seen, changed, mask = self._divide(x, mask)
        return self._finish(kept, changed, self._params(x, seen, context, named), mask, False)

    def inverse(
        self, y: Tensor, *context: object, mask: Tensor | None = None, **named: object
    ) -> tuple[Tensor, Tensor]:
        kept, seen, changed, mask = self._divide(y, mask)
        return self._finish(kept, changed, self._params(y, seen, context, named), mask, True)

    def rebuild(
        self, y: Tensor, *context: object, mask: Tensor | None = None, **named: object
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        """Rebuild the input from an output and the graph between them, with one evaluation of the net.

        Returns:
            (x, forward(x), leaves): the gradients of the leaves add up to that of x.
        """
        with torch.enable_grad():
            # x and y have the same kept part, so the net can run before x is known
            first = y.detach().requires_grad_()
            kept, seen, changed, part_mask = self._divide(first, mask)
            params = self.net(seen, *context, **named)
        with torch.no_grad():
            x, _ = self._finish(kept, changed, params, part_mask, True)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            kept, _, changed, part_mask = self._divide(leaf, mask)
            return x, self._finish(kept, changed, params, part_mask, False), (first, leaf)

    def _params(self, x: Tensor, seen: Tensor, context: tuple, named: dict) -> Tensor:
        """Return net(seen); raise if the net changes x, of which `seen` may be a view."""
        if torch.compiler.is_compiling() or x.is_inference():
            return self.net(seen, *context, **named)
        before = x._version
        params = self.net(seen, *context, **named)
        if x._version != before:
            raise RuntimeError(
                f"{type(self).__name__}: net must not change its input in place, it is a view of x; start it with "
                "a layer that is not in-place"
            )
        return params

    def _divide(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(kept, kept as the net sees it, changed, mask of changed)."""
        name = type(self).__name__
        kept, changed, part_mask = divide(name, x, self.split, self.swap, mask)
        if mask is None:
            return kept, kept, changed, part_mask
        # a NaN in the padding would reach the gradients of the net's weights
        padded = torch.where(check.mask_for(name, mask, x) & ~x.isfinite(), 0, x)
        return kept, divide(name, padded, self.split, self.swap, None)[0], changed, part_mask

    def _finish(
        self, kept: Tensor, changed: Tensor, params: Tensor, mask: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        y, logdet = self._step(changed, params, mask, inverse)
        return join(kept, y, self.split, self.swap), logdet

    def _step(self, x: Tensor, params: Tensor, mask: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"split={self.split!r}, swap={self.swap}"


class AdditiveCoupling(_Coupling):
    """Additive, volume-preserving coupling layer of NICE.

    y_kept = x_kept, y_changed = x_changed + net(x_kept), logdet = 0.

    Args:
        net: maps the kept part to the shift, which has the shape of the changed part; further arguments of `forward`
            and `inverse` are passed to it unchanged (conditioning).
        split: "half" and "channel" halve dim 1 (the first half is longer by one for an odd length; "channel" requires
            an image or sequence), "interleave" takes every other element of dim 1, "checkerboard" takes every other
            pixel of images (B, C, H, W): the net gets the whole image with zeros in the changed pixels and returns a
            whole image.
        swap: change the first part (even elements, pixels with an even row + column) instead of the second.

    Returns:
        `forward(x, *context, mask=None, **context)` and `inverse(y, ...)`: (y, logdet), y with x's shape and dtype,
        logdet (B,) of zeros in float32 (float64 for float64 x). `mask` broadcasts to x, for example to mark padding;
        elements where it is true pass through. The net still gets them, with non-finite values replaced by 0.

    Raises:
        ValueError: unknown split, or x cannot be split this way.
        RuntimeError: the net changes its input in place.

    Notes:
        The parts are views of x. Joining them costs one pass over the output; a flow that keeps its two halves
        apart, such as `pyflow.flows.NICE`, avoids it.

    Source:
        Dinh et al. 2014, NICE, arXiv:1410.8516, section 3.2.

    Example:
        >>> layer = AdditiveCoupling(nn.Linear(2, 2))
        >>> x = torch.randn(5, 4)
        >>> y, logdet = layer(x)
        >>> bool(torch.allclose(layer.inverse(y)[0], x, atol=1e-6)), logdet.tolist()
        (True, [0.0, 0.0, 0.0, 0.0, 0.0])
    """

    def __init__(self, net: nn.Module, *, split: str = "half", swap: bool = False) -> None:
        super().__init__(net, split, swap)

    def _step(self, x: Tensor, shift: Tensor, mask: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return additive_coupling(x, shift, inverse=inverse, mask=mask), x.new_zeros(x.shape[0], dtype=dtype)


class AffineCoupling(_Coupling):
    """Affine coupling layer of RealNVP and Glow.

    y_kept = x_kept, y_changed = x_changed * exp(g(scale)) + shift with (shift, scale) = net(x_kept),
    logdet = sum g(scale).

    Args:
        net: maps the kept part to the shift and scale of the changed part in one tensor, twice as long along dim 1;
            further arguments of `forward` and `inverse` are passed to it unchanged (conditioning).
        split, swap: as in `AdditiveCoupling`.
        packing: layout of the net's output: "shift_scale", "scale_shift" or "interleaved".
        scale_map, clamp, eps, slope, shift_first: as in `pyflow.ops.affine_coupling`.

    Returns:
        `forward(x, *context, mask=None, **context)` and `inverse(y, ...)`: (y, logdet), y with x's shape and dtype,
        logdet (B,) in float32 (float64 for float64 x). `mask` broadcasts to x; where it is true elements pass
        through and add nothing to logdet.

    Raises:
        TypeError, ValueError: unknown split, packing or scale map; a constant out of range; x cannot be split this
            way; the net's output has the wrong shape.
        RuntimeError: the net changes its input in place.

    Notes:
        As for `AdditiveCoupling`.

    Source:
        Dinh et al. 2016, RealNVP, arXiv:1605.08803, section 3; Kingma and Dhariwal 2018, Glow, arXiv:1807.03039.

    Example:
        >>> layer = AffineCoupling(nn.Linear(2, 4), scale_map="tanh", swap=True)
        >>> x = torch.randn(5, 4)
        >>> y, logdet = layer(x)
        >>> back, minus = layer.inverse(y)
        >>> bool(torch.allclose(back, x, atol=1e-5)), bool(torch.allclose(logdet, -minus))
        (True, True)
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        split: str = "half",
        swap: bool = False,
        packing: str = "shift_scale",
        scale_map: str = "exp",
        clamp: float = 2.0,
        eps: float = 0.0,
        slope: float = 1e-3,
        shift_first: bool = False,
    ) -> None:
        super().__init__(net, split, swap)
        name = type(self).__name__
        check.choice(name, "packing", packing, PACKINGS)
        scale_map_constant(name, scale_map, clamp, eps, slope)
        self.options: _Options = {
            "packing": packing, "scale_map": scale_map, "clamp": clamp, "eps": eps, "slope": slope,
            "shift_first": check.flag(name, "shift_first", shift_first),
        }  # fmt: skip

    def _step(self, x: Tensor, params: Tensor, mask: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return affine_coupling_packed(x, params, inverse=inverse, mask=mask, **self.options)

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{key}={value!r}" for key, value in self.options.items())])


class SplineCoupling(_Coupling):
    """Rational-quadratic spline coupling layer of neural spline flows.

    y_kept = x_kept, y_changed = spline(x_changed; net(x_kept)), logdet = sum log dy/dx.

    Args:
        net: maps the kept part to P numbers per changed element in one tensor, P times as long along dim 1, those of
            one feature next to each other; further arguments of `forward` and `inverse` are passed to it unchanged
            (conditioning). P is 3 * bins - 1 for linear tails, 3 * bins for circular ones, else 3 * bins + 1.
        bins: number of bins, at least 2.
        bound: > 0; bins cover [-bound, bound].
        tails: "linear", "circular", a list with one of them per changed feature (vectors only), or None: x must lie in
            [0, 1].
        variant: "nflows", "normflows" or "zuko", how numbers become bins; see `pyflow.ops.rq_spline`.
        split, swap: as in `AdditiveCoupling`.

    Returns:
        `forward(x, *context, mask=None, **context)` and `inverse(y, ...)`: (y, logdet), y with x's shape and dtype,
        logdet (B,) in float32 (float64 for float64 x). `mask` broadcasts to x; where it is true elements pass
        through and add nothing to logdet.

    Raises:
        TypeError, ValueError: unknown split, tails or variant; a number out of range; x cannot be split this way; the
            net's output has the wrong shape.
        RuntimeError: the net changes its input in place.

    Notes:
        As for `AdditiveCoupling`. Elements outside the bounds pass through: standardise the data, or put an `ActNorm`
        before the layer. nflows divides widths and heights by sqrt(hidden_features) if its net has that attribute;
        this layer does not.

    Source:
        Durkan et al. 2019, Neural spline flows, arXiv:1906.04032, section 3.

    Example:
        >>> layer = SplineCoupling(nn.Linear(2, 2 * 11), bins=4)
        >>> x = torch.randn(5, 4)
        >>> y, logdet = layer(x)
        >>> back, minus = layer.inverse(y)
        >>> bool(torch.allclose(back, x, atol=1e-5)), bool(torch.allclose(logdet, -minus, atol=1e-5))
        (True, True)
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        bins: int = 8,
        bound: float = 3.0,
        tails: str | Sequence[str] | None = "linear",
        variant: str = "nflows",
        split: str = "half",
        swap: bool = False,
    ) -> None:
        super().__init__(net, split, swap)
        name = type(self).__name__
        self.bins, self.bound = check.at_least(name, "bins", bins, 2), check.positive(name, "bound", bound)
        check.choice(name, "variant", variant, SPLINE_VARIANTS)
        self.variant, self.tails = variant, tails
        if tails is not None and not isinstance(tails, (list, tuple)):
            check.choice(name, "tails", tails, TAILS)
        # a list is held to the features of x by the operation
        self.count = 2 * self.bins + slopes_of(self.bins, tails)

    def _step(self, x: Tensor, params: Tensor, mask: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        name, size = type(self).__name__, x.shape[1]
        check.float_tensor(name, "the result of net", params)
        wanted = (x.shape[0], size * self.count, *x.shape[2:])
        if params.shape != wanted:
            raise ValueError(
                f"{name}: net must return {self.count} numbers for each element that changes, the shape {wanted}, got "
                f"{tuple(params.shape)}"
            )
        params = params.unflatten(1, (size, self.count)).movedim(2, -1)
        return rq_spline(
            x, params, bins=self.bins, bound=self.bound, tails=self.tails, variant=self.variant, inverse=inverse,
            mask=mask,
        )  # fmt: skip

    def extra_repr(self) -> str:
        own = f"bins={self.bins}, bound={self.bound}, tails={self.tails!r}, variant={self.variant!r}"
        return f"{super().extra_repr()}, {own}"
