"""Linear invertible layers: per-feature scale and shift with data-dependent initialisation, and 1x1 convolution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._torch import FakeTensor, transform
from ..ops import affine_coupling
from ..reference import matmul
from ._held import HoldsNumbers


class _Elementwise(HoldsNumbers):
    """y = (x + shift) * exp(log_scale), optionally initialised so that the first training batch has a given std."""

    held = ("initialized",)
    log_scale: nn.Parameter
    shift: nn.Parameter | None
    initialized: Tensor

    def __init__(self, shape: tuple[int, ...], learned_shift: bool, data_init: bool, std: float, eps: float) -> None:
        super().__init__()
        name = type(self).__name__
        self.std, self.eps = check.positive(name, "std", std), check.positive(name, "eps", eps)
        learned_shift = check.flag(name, "learned_shift", learned_shift)
        self.data_init = check.flag(name, "data_init", data_init)
        self.log_scale = nn.Parameter(torch.empty(shape))
        self.register_parameter("shift", nn.Parameter(torch.empty(shape)) if learned_shift else None)
        self.register_buffer("initialized", torch.empty((), dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset to the identity; with data-dependent initialisation the next training batch sets the parameters."""
        for parameter in self.parameters(recurse=False):
            parameter.zero_()
        self.initialized.fill_(not self.data_init)
        # the flag tensor known to be true, compared by identity: casts, moves and functional_call replace the tensor
        self._seen_set: Tensor | None = None if self.data_init else self.initialized

    @property
    def awaits_data(self) -> bool:
        """Whether the next training batch will set the parameters; reads the buffer."""
        return self.training and not bool(self.initialized)

    def initialize(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set the parameters from a batch; elements where `mask` is true are ignored."""
        self._fit(x, mask, None)

    @property
    def may_start(self) -> bool:
        """Whether `start` has to read a batch; does not read the device."""
        # a buffer by its name costs a search of torch's
        return self.training and self._seen_set is not self._buffers["initialized"]

    @property
    def is_pending(self) -> bool:
        """Whether `start` has to read a batch; reads the flag of a layer on the CPU."""
        if not self.may_start:
            return False
        if self.initialized.is_cpu and _known_set(self.initialized, False):
            self._seen_set = self.initialized
        return self.may_start

    def start(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Initialise from a batch unless already initialised; the decision is made on the device."""
        self._fit(x, mask, self.initialized != 0)

    @torch.no_grad()
    def _fit(self, x: Tensor, mask: Tensor | None, keep: Tensor | None) -> None:
        """Set the parameters, except where `keep` is true or fewer than two values are unmasked.

        If any variance is not finite, set nothing.
        """
        if x.numel() == 0 or x.numel() < 2 * self.log_scale.numel():
            return
        reduced = [d for d in range(x.dim()) if self._spread(x).shape[d] == 1]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        counted = None if mask is None else ~check.mask_for(type(self).__name__, mask, x)
        x = x if counted is None else torch.where(counted, x, 0)
        # scale large values down: their squares would overflow
        unit = x.abs().amax(reduced, keepdim=True)
        unit = torch.where(unit > 1e15, unit, 1)
        x = x / unit
        if counted is None:
            variance, mean = torch.var_mean(x, reduced, correction=0, keepdim=True)
            known = torch.ones_like(mean, dtype=torch.bool)
        else:
            count = counted.sum(reduced, keepdim=True)
            mean = x.sum(reduced, keepdim=True) / count
            variance = torch.where(counted, x - mean, 0).square().sum(reduced, keepdim=True) / count
            known = count >= 2
        starts = known.any() & (variance.isfinite() | ~known).all()
        kept = ~(known & starts)
        kept = kept if keep is None else kept | keep
        log_scale = (self.std / (variance.sqrt() * unit).clamp_min(self.eps)).log()
        for parameter, value in ((self.log_scale, log_scale), (self.shift, -mean * unit)):
            if parameter is not None:
                value = torch.where(kept, parameter.view_as(value), value)
                parameter.copy_(value.view_as(parameter))
        self.initialized.logical_or_(starts)
        if not isinstance(starts, FakeTensor) and _known_set(self.initialized, mask is None):
            self._seen_set = self.initialized

    def forward(
        self, x: Tensor, *context: object, mask: Tensor | None = None, **named: object
    ) -> tuple[Tensor, Tensor]:
        self._check(x)
        if self.may_start:
            self.start(x, mask)
        return self._apply_scale(x, mask, False)

    def inverse(
        self, y: Tensor, *context: object, mask: Tensor | None = None, **named: object
    ) -> tuple[Tensor, Tensor]:
        self._check(y)
        return self._apply_scale(y, mask, True)

    def _apply_scale(self, x: Tensor, mask: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        log_scale = self._spread(x)
        shift = x.new_zeros(()) if self.shift is None else self.shift.view_as(log_scale)
        return affine_coupling(
            x, shift.expand_as(x), log_scale.expand_as(x), shift_first=True, inverse=inverse, mask=mask
        )

    def _spread(self, x: Tensor) -> Tensor:
        """log_scale, viewed so that it broadcasts to x."""
        raise NotImplementedError

    def _check(self, x: Tensor) -> None:
        raise NotImplementedError

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._seen_set = None


def _known_set(flag: Tensor, likely: bool) -> bool:
    """Whether a flag is set; `likely` where reading it would break a compiled graph or a CUDA graph capture."""
    if torch.compiler.is_compiling():
        return likely
    if transform() is not None or flag.is_meta:
        # a functorch wrapper must not outlive its call; a meta tensor has no value
        return False
    if type(flag) is not Tensor or (flag.is_cuda and torch.cuda.is_current_stream_capturing()):
        return likely
    return bool(flag)


class ActNorm(_Elementwise):
    """Per-channel affine layer, initialised to standardise the first training batch.

    y = (x + shift) * exp(log_scale), logdet = H * W * sum log_scale.

    Args:
        features: size of dim 1 of x: (B, D), (B, C, T), (B, C, H, W), ...
        eps: lower bound of the standard deviation in the initialisation.

    Returns:
        `forward(x, *context, mask=None, **context)` and `inverse(y, ...)`: (y, logdet (B,)); context is ignored;
        elements where `mask` is true pass through, add nothing to logdet and are ignored by the initialisation.

    Raises:
        ValueError: x has another number of channels.

    Notes:
        The buffer `initialized` is part of the state_dict; a layer that never saw a training batch is the identity.
        The initialisation runs on the device. Until it has succeeded, the host reads the flag after every training
        batch; afterwards it costs nothing. Under torch.compile the host never reads: the first batch is assumed to
        succeed, and with a mask every training step repeats the check on the device. A batch of one sample or with
        non-finite values initialises nothing; a channel with fewer than two unmasked values keeps its parameters.
        With DistributedDataParallel or fully_shard, run one batch before wrapping: otherwise every rank initialises
        from its own batch, and sharded parameters cannot be set in a forward.

    Source:
        Kingma and Dhariwal 2018, Glow, arXiv:1807.03039, section 3.1.

    Example:
        >>> layer = ActNorm(2)
        >>> y, logdet = layer(torch.tensor([[0.0, 10.0], [2.0, 50.0]]))
        >>> y.round().tolist(), [round(v, 3) for v in logdet.tolist()]
        ([[-1.0, -1.0], [1.0, 1.0]], [-2.996, -2.996])
    """

    def __init__(self, features: int, *, eps: float = 1e-6) -> None:
        super().__init__((check.at_least("ActNorm", "features", features, 1),), True, True, 1.0, eps)

    def _spread(self, x: Tensor) -> Tensor:
        return self.log_scale.view(1, -1, *(1,) * (x.dim() - 2))

    def _check(self, x: Tensor) -> None:
        features = self.log_scale.shape[0]
        check.float_tensor("ActNorm", "x", x)
        if x.dim() < 2 or x.shape[1] != features:
            raise ValueError(f"ActNorm: x must have the shape (B, {features}, ...), got {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return str(self.log_scale.shape[0])


class Scale(_Elementwise):
    """Learned scale per element, the last layer of NICE.

    y = x * exp(log_scale), logdet = sum log_scale.

    Args:
        shape: shape of one sample, an int or a tuple; x is (B, *shape).
        data_init: set log_scale from the first training batch, so that every element has standard deviation `std`;
            otherwise log_scale starts at 0.
        std: standard deviation after `data_init`.
        eps: lower bound of the measured standard deviation in `data_init`.

    Returns:
        `forward(x, *context, mask=None, **context)` and `inverse(y, ...)`: (y, logdet (B,)); context is ignored;
        elements where `mask` is true pass through and add nothing to logdet.

    Raises:
        ValueError: x has another shape.

    Source:
        Dinh et al. 2014, NICE, arXiv:1410.8516, section 3.3.

    Example:
        >>> layer = Scale(3)
        >>> y, logdet = layer(torch.ones(1, 3))
        >>> y.tolist(), logdet.tolist()
        ([[1.0, 1.0, 1.0]], [0.0])
    """

    def __init__(
        self, shape: int | tuple[int, ...], *, data_init: bool = False, std: float = 1.0, eps: float = 1e-3
    ) -> None:
        super().__init__(check.event_shape("Scale", shape), False, data_init, std, eps)

    def _spread(self, x: Tensor) -> Tensor:
        return self.log_scale[None]

    def _check(self, x: Tensor) -> None:
        check.float_tensor("Scale", "x", x)
        shape = tuple(self.log_scale.shape)
        if tuple(x.shape[1:]) != shape:
            raise ValueError(f"Scale: x must have the shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return str(tuple(self.log_scale.shape))


class Invertible1x1Conv(HoldsNumbers):
    """Invertible 1x1 convolution: one invertible matrix mixes the channels at every position.

    y[b, :, p] = W x[b, :, p] with W = P L (U + diag(sign * exp(log_diagonal))), logdet = positions * sum log_diagonal.

    Args:
        channels: size of dim 1 of x: (B, C), (B, C, T), (B, C, H, W), ...

    Returns:
        `forward(x, *context, mask=None, **context)` and `inverse(y, ...)`: (y, logdet (B,)); context is ignored;
        positions where `mask` (size 1 along dim 1) is true pass through and add nothing to logdet.

    Raises:
        ValueError: x has another number of channels, or the mask differs between channels.

    Notes:
        W starts as a random rotation; P and the signs stay fixed. The inverse is two triangular solves, without a
        matrix inverse. Computed in float32 (float64 for float64 x), also under autocast.

    Source:
        Kingma and Dhariwal 2018, Glow, arXiv:1807.03039, section 3.2, equation 10.

    Example:
        >>> layer = Invertible1x1Conv(3)
        >>> x = torch.randn(2, 3, 4, 4)
        >>> y, logdet = layer(x)
        >>> bool(torch.allclose(layer.inverse(y)[0], x, atol=1e-5)), bool(logdet.abs().max() < 1e-4)
        (True, True)
    """

    held = ("permutation",)
    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        channels = check.at_least("Invertible1x1Conv", "channels", channels, 1)
        self.register_buffer("permutation", torch.empty(channels, dtype=torch.float32))
        self.register_buffer("sign", torch.empty(channels))
        self.lower = nn.Parameter(torch.empty(channels, channels))
        self.upper = nn.Parameter(torch.empty(channels, channels))
        self.log_diagonal = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set W to a new random rotation."""
        channels = self.lower.shape[0]
        rotation, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        # row i of L (U + diag) lands in permutation[i]
        self.permutation.copy_(permutation.argmax(0))
        self.sign.copy_(diagonal.sign())
        self.lower.copy_(lower.tril(-1))
        self.upper.copy_(upper.triu(1))
        self.log_diagonal.copy_(diagonal.abs().log())

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return the triangular matrices (L, U + diag)."""
        dtype = dtype or self.lower.dtype
        one = torch.eye(self.lower.shape[0], dtype=dtype, device=self.lower.device)
        diagonal = self.sign.to(dtype) * self.log_diagonal.to(dtype).exp()
        return self.lower.to(dtype).tril(-1) + one, self.upper.to(dtype).triu(1) + torch.diag(diagonal)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W, (C, C)."""
        lower, upper = self.factors(dtype)
        return matmul(lower, upper)[self.permutation.argsort()]

    def inverse_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the inverse of W, (C, C)."""
        with check.uncast(self.lower):
            lower, upper = self.factors(dtype)
            one = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
            rows = one[self.permutation.round().long()]
            x = torch.linalg.solve_triangular(lower, rows, upper=False, unitriangular=True)
            return torch.linalg.solve_triangular(upper, x, upper=True)

    def forward(
        self, x: Tensor, *context: object, mask: Tensor | None = None, **named: object
    ) -> tuple[Tensor, Tensor]:
        self._check(x)
        mask, seen = self._seen(x, mask)
        weight = self.weight(seen.dtype)
        if x.dim() == 2:
            return self._finish(x, matmul(seen, weight.mT), mask, False)
        # one small GEMM per sample beats both a 1x1 convolution and a folded matmul on a CPU
        y = matmul(weight.expand(x.shape[0], -1, -1), seen.flatten(2))
        return self._finish(x, y, mask, False)

    def inverse(
        self, y: Tensor, *context: object, mask: Tensor | None = None, **named: object
    ) -> tuple[Tensor, Tensor]:
        self._check(y)
        with check.uncast(y):
            mask, seen = self._seen(y, mask)
            lower, upper = self.factors(seen.dtype)
            # one system with B * positions right-hand sides; solving sample by sample is slower
            rows = self.permutation.round().long()
            columns = seen.unsqueeze(2).flatten(2).transpose(0, 1)[rows]
            x = torch.linalg.solve_triangular(lower, columns.flatten(1), upper=False, unitriangular=True)
            x = torch.linalg.solve_triangular(upper, x, upper=True)
            return self._finish(y, x.view(columns.shape).transpose(0, 1), mask, True)

    def _seen(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Return (mask with the shape of x, x in the compute dtype with masked elements, NaN included, set to 0)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if mask is None:
            return None, x.to(dtype)
        given, mask = mask, check.mask_for("Invertible1x1Conv", mask, x)
        if x.shape[1] > 1 and mask.stride(1) != 0:
            raise ValueError(f"Invertible1x1Conv: mask must have size 1 along dim 1, got shape {tuple(given.shape)}")
        return mask, torch.where(mask, 0, x).to(dtype)

    def _finish(self, x: Tensor, y: Tensor, mask: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        y = y.reshape(x.shape).to(x.dtype)
        log_volume = self.log_diagonal.to(torch.promote_types(x.dtype, torch.float32)).sum()
        if inverse:
            log_volume = -log_volume
        if mask is None:
            return y, (log_volume * math.prod(x.shape[2:])).expand(x.shape[0]).clone()
        return torch.where(mask, x, y), log_volume * (~mask[:, :1]).flatten(1).sum(1)

    def _check(self, x: Tensor) -> None:
        channels = self.lower.shape[0]
        check.float_tensor("Invertible1x1Conv", "x", x)
        if x.dim() < 2 or x.shape[1] != channels:
            raise ValueError(f"Invertible1x1Conv: x must have the shape (B, {channels}, ...), got {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return str(self.lower.shape[0])
