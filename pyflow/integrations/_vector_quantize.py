"""Fast methods of vector-quantize-pytorch's finite scalar quantisers: codes and tokens in one pass.

Tokens are exactly the package's, except that NaN gives -1: torch computes its tanh, whose last bits decide at a
boundary, and kernels the rest.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks as check
from .._classes import named, own_class
from .._schemas import FSQ_VARIANTS
from .._torch import any_global_module_hook, has_hooks, transform
from ..nn.fsq import _projected_out
from ..ops import fsq, residual_fsq
from ..ops.fsq import _decode
from ..reference import fsq as ref
from ._fast import LEFT, RECORDS, SAYS, Falls, fast, has_its_own, record

FSQ = "vector_quantize_pytorch.finite_scalar_quantization.FSQ"
RESIDUAL = "vector_quantize_pytorch.residual_fsq.ResidualFSQ"
GROUPED = "vector_quantize_pytorch.residual_fsq.GroupedResidualFSQ"
WIDE = (torch.float32, torch.float64)
EPS = 1e-3  # the default margin of FSQ.bound, which FSQ.quantize uses
# the margin pushes digits of more levels out of range
_MOST_LEVELS = 1000


@fast(
    FSQ,
    gain="1.7 times as fast with its gradient, 1.8 to 3.3 without, 3 with a hard clamp, decoding 5 to 13 "
    "(16,384 to 262,144 tokens of 4 channels, one core)",
)
def forward(self: Any, z: Tensor) -> Any:
    if reason := _why_not(self, z, self.return_indices):
        return Falls(reason)
    force = self.force_quantization_f32
    if force and not {*self.allowed_dtypes} <= {*WIDE}:
        return Falls("it quantises in lower precision")
    if not force and (z.dtype not in WIDE or torch.is_autocast_enabled(z.device.type)):
        return Falls("it quantises in the dtype of its input")
    channels_first = z.dim() >= 4 or self.channel_first
    if z.dim() < (2 if channels_first else 3) or z.shape[1 if channels_first else -1] != self.dim:
        return Falls("the package refuses this shape")
    lead, z = _packed(z) if channels_first else (z.shape[:-1], z)
    h = self.project_in(z)
    h = h.unflatten(-1, (self.num_codebooks, self.codebook_dim))
    if self.orthogonal_rotation:
        h = h @ self.orthogonal_rot
    dtype = h.dtype
    if force and dtype not in self.allowed_dtypes:
        h = h.float()
    codes, indices = _quantised(self, h, self.return_indices)
    codes = self.maybe_apply_noise(codes)
    if self.orthogonal_rotation:
        with torch.autocast("cuda", enabled=False) if force else contextlib.nullcontext():
            codes = codes @ self.orthogonal_rot.t()
    out = _projected_out(self.project_out, codes.flatten(-2).to(dtype)).reshape(*lead, self.dim)
    if channels_first:
        out = out.movedim(-1, 1)
    if indices is not None:
        kept = (self.num_codebooks,) if self.keep_num_codebooks_dim else ()
        indices = indices.reshape(*lead, *kept)
    return out, indices


@fast(FSQ)
def quantize(self: Any, z: Tensor) -> Any:
    if reason := _why_not(self, z, False):
        return Falls(reason)
    if z.dtype not in WIDE or z.dim() == 0 or z.shape[-1] != self.codebook_dim:
        return Falls("it quantises in lower precision, or the package refuses this shape")
    return _quantised(self, z, False)[0]


@fast(FSQ)
def _indices_to_codes(self: Any, indices: Tensor) -> Any:
    if reason := _why_not_decoded(self, indices):
        return Falls(reason)
    if _least(indices, _levels(self)) < 0:
        return Falls("some tokens are outside of its codebook")
    return _decoded(indices, _levels(self), "symmetric" if self.preserve_symmetry else "vqp")


@fast(
    RESIDUAL,
    name="forward",
    gain="8 stages without projections 5 to 7 times as fast with their gradient (128 to 65,536 tokens of 4 channels, "
    "one core), 2 to 3 with the projections of a tokenizer",
)
def _residual(
    self: Any, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None
) -> Any:
    if reason := _why_not_together(self, x):
        return Falls(reason)
    first = self.is_channel_first
    lead, x = _packed(x) if first else (x.shape[:-1], x)
    h = self.project_in(x)
    h = (h / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
    stages = all_stages = self.num_quantizers
    drops = self.training and self.quantize_dropout and torch.is_grad_enabled()
    if drops:
        stages = min(_drawn_stages(self, rand_quantize_dropout_fixed_seed, x.device), all_stages)
    out, indices = residual_fsq(h, _levels(self), stages, variant="symmetric_hard")
    if stages < all_stages:
        indices = F.pad(indices.long(), (0, all_stages - stages), value=-1)
    out = _projected_out(self.project_out, out)
    if first:
        out = out.reshape(*lead, out.shape[-1]).movedim(-1, 1)
        indices = indices.reshape(*lead, all_stages).movedim(-1, 1)
    return (out, indices, self.get_codes_from_indices(indices)) if return_all_codes else (out, indices)


@fast(RESIDUAL)
def get_codes_from_indices(self: Any, indices: Tensor) -> Any:
    if reason := _why_not_stages(self) or _why_not_decoded(self, indices):
        return Falls(reason)
    if not all([each.preserve_symmetry and each.implicit_codebook.dtype == torch.float32 for each in self.layers]):
        return Falls("its codebooks are not float32")
    given = indices.shape[-1] if indices.dim() > 1 else 0
    if given != self.num_quantizers and not (self.quantize_dropout and 0 < given < self.num_quantizers):
        return Falls("the package refuses this shape")
    if (least := _least(indices, _levels(self))) < -1:
        return Falls("some tokens are outside of its codebook")
    indices = F.pad(indices, (0, self.num_quantizers - given), value=-1).movedim(-1, 0)
    codes = _decoded(indices, _levels(self), "symmetric")
    if least < 0 or given < self.num_quantizers or not check.values_are_checked(indices):
        codes = codes.masked_fill((indices == -1)[..., None], 0.0)
    return codes * self.scales.reshape(len(codes), *[1] * (codes.dim() - 2), -1)


@fast(GROUPED, name="forward", says="its groups, one by one")
def _grouped(self: Any, x: Tensor, return_all_codes: bool = False) -> Any:
    return LEFT


def _packed(z: Tensor) -> tuple[torch.Size, Tensor]:
    """Return the shape of the positions, and z (B, positions, channels), contiguous as in the package."""
    z = z.movedim(1, -1).contiguous()
    lead = z.shape[:-1]
    return lead, z.view(lead[0], math.prod(lead[1:]), z.shape[-1])


def _quantised(self: Any, z: Tensor, return_indices: bool) -> tuple[Tensor, Tensor | None]:
    """Return codes and tokens of z (..., channels)."""
    variant = "symmetric_hard" if self.preserve_symmetry else "hard"
    if not self.bound_hard_clamp:
        if not self.preserve_symmetry:
            shift = _kept(self, f"shift on {self._levels.device}", lambda: _shift(self._levels))
            return fsq((z + shift).tanh_(), _levels(self), variant="bounded", return_indices=return_indices)
        z = z.tanh()
    return fsq(z, _levels(self), variant=variant, return_indices=return_indices)


def _shift(levels: Tensor) -> Tensor:
    """What FSQ.bound adds before the tanh, by the same operations."""
    half = (levels - 1) * (1 + EPS) / 2
    return torch.atanh(torch.where(levels % 2 == 0, 0.5, 0.0) / half)


def _kept(self: Any, name: str, make: Callable[[], Any]) -> Any:
    # dynamo finds what was made before it traces
    if _is_kept(self, name):
        return RECORDS[id(self)].made[name]
    made = make()
    # not the wrapper of a trace or a transform, which ends
    if not torch.compiler.is_compiling() and transform() is None and type(made) in (Tensor, tuple, bool):
        record(self).made[name] = made
    return made


def _is_kept(self: Any, name: str) -> bool:
    return id(self) in RECORDS and name in RECORDS[id(self)].made


def _levels(self: Any) -> tuple[int, ...]:
    """Return the number of levels of every channel; empty where they have no values yet, or cannot be read."""
    if named(type(self)) == RESIDUAL:
        return tuple(self.levels)
    if self._levels.is_meta or (torch.compiler.is_compiling() and not _is_kept(self, "levels")):
        return ()
    levels: tuple[int, ...] = _kept(self, "levels", lambda: tuple(self._levels.tolist()))
    return levels


def _why_not(self: Any, z: Any, return_indices: bool) -> str:
    """Return why kernels would not give the package's codes and tokens."""
    if not isinstance(z, Tensor) or z.dtype not in check.FLOATS or z.layout is not torch.strided or z.is_nested:
        return "its input is not a dense float tensor"
    if not (levels := _levels(self)):
        return "its levels are unknown before its first call"
    if has_its_own(self, _METHODS):
        return "it has methods of its own"
    return _why_not_levels(levels, self.preserve_symmetry, return_indices)


def _why_not_levels(levels: tuple[int, ...], symmetric: bool, return_indices: bool) -> str:
    # its constants would be float64
    if torch.get_default_dtype() != torch.float32:
        return "the default dtype is not float32"
    if not symmetric and max(levels) > _MOST_LEVELS:
        return "its digits leave their range"
    # float32 sums of len(levels) products, each off by up to five roundings
    if return_indices and math.prod(levels) * (len(levels) + 5) > 2**23:
        return "its tokens are rounded sums"
    return ""


# what stages have that run as one
_STAGE = {
    "preserve_symmetry": True, "bound_hard_clamp": True, "orthogonal_rotation": False, "has_projections": False,
    "num_codebooks": 1, "keep_num_codebooks_dim": False, "channel_first": False, "return_indices": True,
}  # fmt: skip
# what runs in one pass
_METHODS = ("quantize", "bound", "symmetry_preserving_bound", "codes_to_indices", "_scale_and_shift")
_STAGE_METHODS = ("forward", "maybe_apply_noise", *_METHODS)
_DECODING = ("indices_to_level_indices", "_scale_and_shift_inverse")


def _why_not_stages(self: Any) -> str:
    if self.scales.dtype != torch.float32 or torch.get_default_dtype() != torch.float32:
        return "its scales are not float32"
    if not _knows_scales(self):
        return "its scales are no powers of its levels, or unknown before its first call"
    return "" if all([named(type(layer)) == FSQ for layer in self.layers]) else "its stages are of another class"


def _knows_scales(self: Any) -> bool:
    if self.scales.is_meta or (torch.compiler.is_compiling() and not _is_kept(self, "known scales")):
        return False
    known: bool = _kept(
        self, "known scales", lambda: self.scales.tolist() == ref.scales(self.levels, self.num_quantizers)
    )
    return known


def _why_not_together(self: Any, x: Any) -> str:
    """Return why all stages cannot run as one."""
    if not isinstance(x, Tensor) or x.dtype not in check.FLOATS or x.layout is not torch.strided or x.is_nested:
        return "its input is not a dense float tensor"
    if reason := _why_not_stages(self) or _why_not_levels(tuple(self.levels), True, True):
        return reason
    if x.dim() < 2 if self.is_channel_first else x.dim() != 3:
        return "its stages take other channels in this shape"
    if self.soft_clamp_input_value is None or self.soft_clamp_input_value.dtype != torch.float32:
        return "its input is not clamped in float32"
    if any_global_module_hook():
        return "there are hooks of all modules"
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for layer in self.layers:
        space = layer.__dict__
        for name, value in _STAGE.items():
            if space[name] != value:
                return f"its stages have {name}={space[name]}"
        if space["noise_dropout"] and space["training"]:
            return "its stages draw noise"
        if space["force_quantization_f32"] and wide not in space["allowed_dtypes"]:
            return "its stages quantise in lower precision"
        if has_hooks(layer) or any([has_hooks(each) for each in layer.children()]):
            return "its stages have hooks"
        if has_its_own(layer, _STAGE_METHODS):
            return "its stages have methods of their own"
    return ""


def _drawn_stages(self: Any, seed: int | None, device: torch.device) -> int:
    """Draw the number of stages as the package does."""
    package = sys.modules[own_class(type(self)).__module__]
    seed = package.get_maybe_sync_seed(device) if seed is None else seed
    stages = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers) + 1
    multiple = self.quantize_dropout_multiple_of
    return stages if multiple == 1 else package.round_up_multiple(stages, multiple)


def _why_not_decoded(self: Any, indices: Any) -> str:
    if not isinstance(indices, Tensor) or indices.dtype not in check.SIGNED or not indices.numel():
        return "its tokens are not int32 or int64, or there are none"
    if not (levels := _levels(self)) or torch.get_default_dtype() != torch.float32:
        return "its levels are unknown before its first call, or the default dtype is not float32"
    if has_its_own(self, _DECODING):
        return "it has methods of its own"
    return "it has too many codes" if math.prod(levels) > 2**31 else ""


def _least(indices: Tensor, levels: tuple[int, ...]) -> int:
    """Return the smallest token, 0 where it may not be read; below -1 if one is too large."""
    if not check.values_are_checked(indices):
        return 0
    low, high = (int(each) for each in indices.aminmax())
    return low if high < math.prod(levels) else -2


def _decoded(indices: Tensor, levels: tuple[int, ...], variant: str) -> Tensor:
    """Return codes of tokens that have been checked."""
    codes: Tensor = _decode.pick("fsq_decode", indices)(
        indices, list(levels), FSQ_VARIANTS.index(variant), indices.dim(), torch.float32
    )
    return codes


def _says(self: Any) -> str:
    # which compiled code cannot read
    levels, stages = _levels(self), ""
    if named(type(self)) == RESIDUAL:
        _knows_scales(self)
        stages = f", {self.num_quantizers} stages"
    return f"codes, tokens and gradient of levels {levels}{stages} in one pass, with torch's tanh"


SAYS[FSQ] = SAYS[RESIDUAL] = _says
