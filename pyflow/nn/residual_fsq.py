"""Residual finite scalar quantisation, a drop-in replacement for vector-quantize-pytorch's module."""

from __future__ import annotations

import numbers
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from .. import _checks as check
from ..ops import fsq_decode
from ..ops.fsq import CodebookUsage, check_active, checked_levels, in_one_pass, signed
from ..reference import compute_dtype
from ..reference import fsq as ref
from ._tokens import Constant, CountsUsage, valid_positions
from .fsq import FSQ, _projected_out, _rotate, check_projected

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._typed import ModuleListOf

# options of FSQ with a fixed value in the stages
STAGE = {"num_codebooks": 1, "keep_num_codebooks_dim": False, "channel_first": False, "return_indices": True}


class _StageOptions(TypedDict, total=False):
    num_codebooks: int
    keep_num_codebooks_dim: bool | None
    scale: float | None
    allowed_dtypes: tuple[torch.dtype, ...]
    channel_first: bool
    projection_has_bias: bool
    return_indices: bool
    force_quantization_f32: bool
    noise_dropout: float
    orthogonal_rotation: bool


class ResidualFSQ(CountsUsage):
    """Residual quantisation: every stage quantises the residual of the stages before it with finer digits.

    out = project_out(sum over stages q of L**-q codes_q), with codes_q the codes of
    L**q (h - sum of the earlier stages) and h = project_in(x), softly clamped.

    Args:
        levels: number of levels of each channel, at least 2.
        num_quantizers: number of stages Q.
        dim: number of channels of x; if it differs from len(levels), linear layers project.
        is_channel_first: whether x is (B, dim, ...) instead of (..., dim).
        quantize_dropout: drop a random number of the last stages in every training batch.
        quantize_dropout_cutoff_index: index of the last stage that is never dropped.
        quantize_dropout_multiple_of: round the number of remaining stages up to a multiple of this.
        soft_clamp_input_value: c in h = c tanh(h / c): a number, a list with one number per channel, or a tensor.
        bound_hard_clamp: the stages clamp to [-1, 1] instead of tanh; sets c = 1 + 1 / (L - 1).
        kwargs: further options of `FSQ` for the stages, which have preserve_symmetry.

    Returns:
        `forward(x, return_all_codes=False, rand_quantize_dropout_fixed_seed=None, mask=None, lengths=None,
        active=None)`: (out, indices), and with return_all_codes the codes of every stage, (Q, B, ..., len(levels)).
        out has the shape and dtype of x; indices have the shape of x without the channels, plus Q as the last dim
        (as dim 1 with is_channel_first), -1 for a dropped stage and for NaN: int32 or int64 as for `FSQ`, int64 if
        stages may be dropped. mask and lengths are as for `FSQ`. active, a 0-d int64 tensor on the device of x, sets
        the number of stages instead of a random draw, also in eval mode; it is at least 0, which only a CPU checks.

    Raises:
        TypeError, ValueError: levels out of range, wrong number of channels, options that exclude each other.

    Notes:
        Parameters, state, methods and return values are those of vector-quantize-pytorch 1.32; a state_dict
        loads in both directions. All stages run in one pass (stage by stage with noise_dropout in training and
        with orthogonal_rotation). The number of stages is drawn and used on the device without a sync; all ranks of
        torch.distributed use the same number; rand_quantize_dropout_fixed_seed draws the same number as
        vector-quantize-pytorch.
        Computes in float32 between the projections (float64 for float64 x), also if the module is cast; decoding
        returns the module's dtype. Unlike vector-quantize-pytorch, decoding undoes orthogonal_rotation.

    Source:
        Zeghidour et al. 2021, SoundStream, arXiv:2107.03312, algorithm 1 and section III-C.

    Example:
        >>> quantizer = ResidualFSQ(levels=[5, 5], num_quantizers=3)
        >>> out, indices = quantizer(torch.tensor([[[0.3, -0.6]]]))
        >>> indices
        tensor([[[ 8,  5, 22]]], dtype=torch.int32)
        >>> bool(quantizer.get_output_from_indices(indices).allclose(out))
        True
    """

    project_in: nn.Module
    project_out: nn.Module
    layers: ModuleListOf[FSQ]

    def __init__(
        self,
        *,
        levels: Sequence[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | Sequence[float] | Tensor | None = None,
        bound_hard_clamp: bool = True,
        **kwargs: Unpack[_StageOptions],
    ) -> None:
        super().__init__()
        op = "ResidualFSQ"
        self.levels = checked_levels(op, levels, "symmetric", True)
        self.num_quantizers = self.columns = check.at_least(op, "num_quantizers", num_quantizers, 1)
        given: Mapping[str, object] = kwargs
        for name, value in STAGE.items():
            if given.get(name) not in (None, value):
                raise ValueError(f"{op}: {name} must be {value} in the stages, got {given[name]}")
        self.quantize_dropout = check.flag(op, "quantize_dropout", quantize_dropout) and num_quantizers > 1
        self.quantize_dropout_cutoff_index = check.at_least(
            op, "quantize_dropout_cutoff_index", quantize_dropout_cutoff_index, 0
        )
        self.quantize_dropout_multiple_of = check.at_least(
            op, "quantize_dropout_multiple_of", quantize_dropout_multiple_of, 1
        )
        if self.quantize_dropout and quantize_dropout_cutoff_index >= num_quantizers:
            raise ValueError(
                f"{op}: quantize_dropout_cutoff_index must lie below num_quantizers, {num_quantizers}, "
                f"got {quantize_dropout_cutoff_index}"
            )

        channels = len(self.levels)
        self.dim = channels if dim is None else check.at_least(op, "dim", dim, 1)
        self.is_channel_first = check.flag(op, "is_channel_first", is_channel_first)
        self.has_projections = self.dim != channels
        self.project_in = nn.Linear(self.dim, channels) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(channels, self.dim) if self.has_projections else nn.Identity()

        layers = nn.ModuleList(
            FSQ(self.levels, dim=channels, preserve_symmetry=True, bound_hard_clamp=bound_hard_clamp, **kwargs)
            for _ in range(num_quantizers)
        )
        self.layers = cast("ModuleListOf[FSQ]", layers)
        self.codebook_size = self.layers[0].codebook_size
        constants: dict[str, Constant] = {"scales": (ref.scales(self.levels, num_quantizers), torch.float32)}
        if bound_hard_clamp:
            if soft_clamp_input_value is not None:
                raise ValueError(f"{op}: soft_clamp_input_value must be None with bound_hard_clamp, got a value")
            single = np.float32
            soft_clamp_input_value = [float(single(1) + single(1) / single(n - 1)) for n in self.levels]
        clamp = _clamp(soft_clamp_input_value, channels)
        if clamp is not None:
            constants["clamp"] = clamp, torch.float32
        self._fix(**constants)

    @property
    def scales(self) -> Tensor:
        """The size of one digit by stage and channel, (Q, len(levels)), float32."""
        return self._fixed["scales"]

    @property
    def soft_clamp_input_value(self) -> Tensor | None:
        """c of the soft clamp, one per channel or one for all channels, float32."""
        return self._fixed.get("clamp")

    @property
    def codebooks(self) -> Tensor:
        """The codes of all indices, (Q, codebook_size, len(levels)), computed at every access."""
        return self.layers[0].implicit_codebook.expand(self.num_quantizers, -1, -1)

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        active: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        op = "ResidualFSQ"
        check.float_tensor(op, "x", x)
        channel = 1 if self.is_channel_first else -1
        if x.dim() < max(channel + 1, 1) or x.shape[channel] != self.dim:
            raise ValueError(f"{op}: x must have {self.dim} channels in dim {channel}, got shape {tuple(x.shape)}")
        x = x.movedim(channel, -1)
        valid = valid_positions(op, x.shape[:-1], x, mask, lengths)
        if valid is not None:
            x = torch.where(valid[..., None], x, 0)
        if active is None:
            active = self._draw_active(x.device, rand_quantize_dropout_fixed_seed)
        else:
            check_active(op, active, x)
        check_projected(op, "x", x, self.project_in)
        h = self.project_in(x)
        out, indices = self._quantize(h, active)
        out = _projected_out(self.project_out, out.to(h.dtype))
        if valid is not None:
            out = torch.where(valid[..., None], out, 0)
            indices = torch.where(valid[..., None], indices, -1)
        self._count(indices)
        ret = out.movedim(-1, channel), indices.movedim(-1, channel)
        return (*ret, self.get_codes_from_indices(indices)) if return_all_codes else ret

    def _draw_active(self, device: torch.device, seed: int | None) -> Tensor | None:
        """Draw the number of stages, 0-d on the device; None for all stages."""
        if not (self.training and self.quantize_dropout and torch.is_grad_enabled()):
            return None
        few, many = self.quantize_dropout_cutoff_index + 1, self.num_quantizers + 1
        multiple = self.quantize_dropout_multiple_of
        if seed is None:
            active = _same_on_all_ranks(torch.randint(few, many, (), device=device))
        else:
            seed = check.at_least("ResidualFSQ", "rand_quantize_dropout_fixed_seed", seed, -(2**63))
            active = _drawn_from(seed, few, many, device)
        return active if multiple == 1 else (active + multiple - 1) // multiple * multiple

    def _quantize(self, h: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
        layer = self.layers[0]
        if "clamp" in self._fixed:
            h, clamp = h.to(compute_dtype(h.dtype)), self._constant("clamp", h.device)
            h = (h / clamp).tanh() * clamp
        if layer.orthogonal_rotation or (self.training and layer.noise_dropout > 0):
            return self._stage_by_stage(h, active)
        # a number that was drawn is never read
        return in_one_pass(h, self.levels, self.num_quantizers, layer.variant, -1, active)

    def _stage_by_stage(self, h: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the stages one by one, for rotation and noise, which no operator supports."""
        residual, indices = h.to(compute_dtype(h.dtype)), []
        out: Any = 0.0
        index: Any
        for stage, (layer, scale) in enumerate(zip(self.layers, self._constant("scales", h.device), strict=True)):
            codes, index = layer._encode((residual / scale).unsqueeze(-2), True)
            quantized = codes.squeeze(-2) * scale
            if active is not None:
                quantized, index = torch.where(stage < active, quantized, 0), torch.where(stage < active, index, -1)
            residual, out = residual - quantized.detach(), out + quantized
            indices.append(index.squeeze(-1))
        stacked = torch.stack(indices, -1)
        return out, stacked if active is None else stacked.long()

    def get_codes_from_indices(self, indices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return the scaled codes of every stage, (Q, B, ..., len(levels)), of indices (B, ..., Q).

        The stages are the last dim of indices, also with is_channel_first. An index of -1 gives 0. With
        quantize_dropout there may be fewer stages. `dtype` defaults to the module's dtype.
        """
        dtype = self._like.dtype if dtype is None else dtype
        return torch.stack(list(self._stages(indices, dtype))).to(dtype)

    def get_output_from_indices(self, indices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return forward's out for indices (B, ..., Q), bit for bit; channels are last, also with is_channel_first.

        `dtype` defaults to the module's dtype. Without projections forward uses the dtype of x: pass it to get the
        same values.
        """
        dtype = self._like.dtype if dtype is None else dtype
        # adds the stages in the order of forward; Tensor.sum(0) may use another order
        out: Any = sum(self._stages(indices, dtype))
        return _projected_out(self.project_out, out.to(dtype))

    def _stages(self, indices: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        op = "ResidualFSQ"
        check.integer_tensor(op, "indices", indices)
        given = indices.shape[-1] if indices.dim() else 0
        if given != self.num_quantizers and not (self.quantize_dropout and 0 < given < self.num_quantizers):
            raise ValueError(
                f"{op}: indices must end in a dim of {self.num_quantizers} stages (fewer only with quantize_dropout), "
                f"got shape {tuple(indices.shape)}"
            )
        indices = F.pad(signed(indices), (0, self.num_quantizers - given), value=-1)
        dtype = compute_dtype(dtype)
        scales = self._constant("scales", indices.device)
        for layer, scale, index in zip(self.layers, scales, indices.unbind(-1), strict=True):
            codes = fsq_decode(index, self.levels, variant=layer.variant, dtype=dtype)
            codes = codes.masked_fill(index[..., None] == -1, 0)
            if layer.orthogonal_rotation:
                codes = _rotate(codes, layer.orthogonal_rot.t())
            yield codes * scale

    def usage(self) -> tuple[CodebookUsage, ...]:
        """Return counts, fraction and perplexity of the tokens since `track_usage()`, for every stage."""
        return self._usages()

    def extra_repr(self) -> str:
        return f"levels={tuple(self.levels)}, num_quantizers={self.num_quantizers}, dim={self.dim}"


# a registered operator: torch.compile cannot trace random.Random, and compiles once for all seeds
@torch.library.custom_op("pyflow::drawn_from", mutates_args=())
def _drawn_from(seed: int, low: int, high: int, device: torch.device) -> Tensor:
    return torch.full((), random.Random(seed).randrange(low, high), dtype=torch.int64, device=device)


@_drawn_from.register_fake
def _(seed: int, low: int, high: int, device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


def _same_on_all_ranks(number: Tensor) -> Tensor:
    """Return the number of rank 0 on all ranks; all_reduce, since torch.compile cannot trace a broadcast."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        number = number if distributed.get_rank() == 0 else torch.zeros_like(number)
        distributed.all_reduce(number)
    return number


def _clamp(value: object, channels: int) -> float | list[float] | None:
    """Return the soft clamp's checked constants as Python floats."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, list, tuple, Tensor)):
        raise TypeError(
            f"ResidualFSQ: soft_clamp_input_value must be a number, a list or a tensor, got {type(value).__name__}"
        )
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError("ResidualFSQ: soft_clamp_input_value must not require grad, it is a constant")
    if isinstance(value, (list, tuple)):
        numbers_in = (each.item() if isinstance(each, Tensor) else each for each in value)
        value = [check.number("ResidualFSQ", "soft_clamp_input_value", each) for each in numbers_in]
    value = np.asarray(value.tolist() if isinstance(value, Tensor) else value, dtype=np.float32)
    if value.ndim > 1 or value.size not in (1, channels):
        raise ValueError(
            f"ResidualFSQ: soft_clamp_input_value must be one number or one for each of {channels} channels, "
            f"got shape {tuple(value.shape)}"
        )
    if not ((value > 0) & (value < np.inf)).all():
        raise ValueError(f"ResidualFSQ: soft_clamp_input_value must be positive and finite, got {value.tolist()}")
    return value.tolist()
