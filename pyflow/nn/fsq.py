"""Finite scalar quantisation as a module, a drop-in replacement for vector-quantize-pytorch's FSQ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from .._torch import any_global_module_hook, forward_mode, has_hooks, tracing, transform, unsafe_view
from ..ops import fsq, fsq_decode
from ..ops.fsq import CodebookUsage, check_indices, checked_levels, signed
from ..reference import compute_dtype, matmul
from ..reference import fsq as ref
from ._tokens import Constant, CountsUsage, valid_positions

EPS = 1e-3  # the operator's margin of the bound
# rows from which a product saves more than a function of autograd costs
_ROWS = 512


class FSQ(CountsUsage):
    """Quantise every channel to a few levels; the combination of the levels is the token.

    out = project_out(codes of project_in(z)), with the straight-through gradient of the bound.

    Args:
        levels: number of levels of each channel, at least 3 (2 with preserve_symmetry).
        dim: number of channels of z; if it differs from num_codebooks * len(levels), linear layers project.
        num_codebooks: number of groups of channels; each group has its own token.
        keep_num_codebooks_dim: whether indices have a last dim for the codebooks; default: if num_codebooks > 1.
        channel_first: whether sequences are (B, dim, n) instead of (B, n, dim).
        projection_has_bias: whether the linear layers have a bias.
        return_indices: whether forward returns indices; otherwise None.
        preserve_symmetry: digits floor((L - 1) (tanh(z) + 1) / 2 + 1/2), `variant` "symmetric", instead of "vqp".
        noise_dropout: with preserve_symmetry, the share of the codes that gets uniform noise in [-1/2, 1/2) in
            training; the sums are clamped to [-1, 1].
        bound_hard_clamp: clamp to [-1, 1] instead of tanh.
        orthogonal_rotation: quantise in a random rotation of the channels, stored in a buffer, and rotate back.
        scale, allowed_dtypes, force_quantization_f32: stored as attributes only. The bound is always computed in
            float32 (float64 for float64 z), and out has the dtype of z (of the projections, if there are any).

    Returns:
        `forward(z, mask=None, lengths=None)`: (out, indices). z is (..., dim); with four or more dims, such as images
        and videos, z is (B, dim, ...), with channel_first also for three dims. out has the shape of z; indices have
        the shape of z without the channels, plus a last dim num_codebooks if kept: int32 for codebooks of at most
        2**31 entries, int64 up to 2**63. mask is bool, shaped like z without the channels, true at valid positions;
        alternatively lengths, integers (B,), for sequences. At padding out is 0 and the index is -1, and the values
        of z there, NaN included, reach neither another output nor a gradient.

    Raises:
        TypeError, ValueError: levels out of range, wrong number of channels, options that exclude each other.

    Notes:
        Parameters, state, methods and return values are those of vector-quantize-pytorch 1.32; a state_dict
        loads in both directions. Differences: indices are exact for codebooks above 2**24 entries, noise_dropout
        is used as the share (there the share is always one half), a NaN gives the index -1, and no codebook is stored.
        Casts of the module change neither the constants nor the rotation; indices_to_codes returns the module's dtype
        unless `dtype` is given.
        Without projections one pass reads z and writes out and indices; nothing else is allocated.

    Source:
        Mentzer et al. 2023, Finite Scalar Quantization, arXiv:2309.15505; preserve_symmetry and noise_dropout:
        Parker et al. 2024, arXiv:2411.19842, section 3.2.

    Example:
        >>> quantizer = FSQ([8, 5, 5])
        >>> out, indices = quantizer(torch.tensor([[[0.0, 2.0, -9.0], [9.0, 0.3, 0.0]]]))
        >>> out, indices
        (tensor([[[ 0.0000,  1.0000, -1.0000],
                 [ 0.7500,  0.5000,  0.0000]]]), tensor([[ 36, 111]], dtype=torch.int32))
        >>> bool(quantizer.indices_to_codes(indices).equal(out))
        True
    """

    project_in: nn.Module
    project_out: nn.Module
    orthogonal_rot: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        self.channel_first = check.flag("FSQ", "channel_first", channel_first)
        self.return_indices = check.flag("FSQ", "return_indices", return_indices)
        self.force_quantization_f32 = check.flag("FSQ", "force_quantization_f32", force_quantization_f32)
        self.preserve_symmetry = check.flag("FSQ", "preserve_symmetry", preserve_symmetry)
        self.bound_hard_clamp = check.flag("FSQ", "bound_hard_clamp", bound_hard_clamp)
        self.orthogonal_rotation = check.flag("FSQ", "orthogonal_rotation", orthogonal_rotation)
        self.levels = checked_levels("FSQ", levels, "symmetric", self.return_indices)
        if min(self.levels) == 2 and not self.preserve_symmetry:
            raise ValueError(f"FSQ: levels must be at least 3 without preserve_symmetry, got {tuple(self.levels)}")
        self.noise_dropout = _share("noise_dropout", noise_dropout)
        if noise_dropout > 0 and not preserve_symmetry:
            raise ValueError(f"FSQ: noise_dropout must be 0 without preserve_symmetry, got {noise_dropout}")
        self.num_codebooks = check.at_least("FSQ", "num_codebooks", num_codebooks, 1)
        several = num_codebooks > 1
        self.keep_num_codebooks_dim = several if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        if several and not self.keep_num_codebooks_dim:
            raise ValueError(f"FSQ: keep_num_codebooks_dim must be true for {num_codebooks} codebooks, got False")

        self.codebook_dim = len(self.levels)
        self.codebook_size = math.prod(self.levels)
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.dim = self.effective_codebook_dim if dim is None else check.at_least("FSQ", "dim", dim, 1)
        self.scale, self.allowed_dtypes = scale, allowed_dtypes

        constants: dict[str, Constant] = {"levels": (self.levels, torch.int32), "sizes": (self.levels, torch.float32)}
        if self.codebook_size <= 2**63:
            constants["basis"] = ref.basis(self.levels), ref.index_dtype(self.levels)
        self._fix(**constants)
        self.has_projections = self.dim != self.effective_codebook_dim
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, self.effective_codebook_dim, bias=projection_has_bias)
            self.project_out = nn.Linear(self.effective_codebook_dim, self.dim, bias=projection_has_bias)
        if self.orthogonal_rotation:
            if len(set(self.levels)) > 1:
                warnings.warn(
                    f"FSQ: orthogonal_rotation suits levels that are all the same, got {tuple(self.levels)}",
                    stacklevel=2,
                )
            with torch.inference_mode(False):
                rotation = torch.empty(self.codebook_dim, self.codebook_dim, dtype=torch.float32)
                self.register_buffer("orthogonal_rot", nn.init.orthogonal_(rotation))
            # in lower precision it would not be orthogonal
            self.held = ("orthogonal_rot",)

    @property
    def _levels(self) -> Tensor:
        return self._fixed["levels"]

    @property
    def _basis(self) -> Tensor | None:
        """Weight of each channel's digit in the index, in the dtype of the index; None beyond int64."""
        return self._fixed.get("basis")

    @property
    def variant(self) -> str:
        """The variant of `pyflow.ops.fsq`."""
        if self.preserve_symmetry:
            return "symmetric_hard" if self.bound_hard_clamp else "symmetric"
        return "hard" if self.bound_hard_clamp else "vqp"

    @property
    def implicit_codebook(self) -> Tensor:
        """The codes of all indices, (codebook_size, len(levels)), computed at every access."""
        return self._indices_to_codes(torch.arange(self.codebook_size, device=self._like.device))

    def forward(
        self, z: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        check.float_tensor("FSQ", "z", z)
        channel = 1 if self._channels_in_front(z.dim()) else -1
        if z.dim() == 0 or z.shape[channel] != self.dim:
            raise ValueError(f"FSQ: z must have {self.dim} channels in dim {channel}, got shape {tuple(z.shape)}")
        z = z.movedim(channel, -1)
        valid = valid_positions("FSQ", z.shape[:-1], z, mask, lengths)
        if valid is not None:
            z = torch.where(valid[..., None], z, 0)
        check_projected("FSQ", "z", z, self.project_in)
        z = self.project_in(z).unflatten(-1, (self.num_codebooks, self.codebook_dim))
        codes, indices = self._encode(z, self.return_indices or self._counts is not None)
        out = _projected_out(self.project_out, codes.flatten(-2))
        if valid is not None:
            out = torch.where(valid[..., None], out, 0)
            indices = None if indices is None else torch.where(valid[..., None], indices, -1)
        if indices is not None:
            self._count(indices)
        out = out.movedim(-1, channel)
        if indices is None or not self.return_indices:
            return out, None
        return out, indices if self.keep_num_codebooks_dim else indices.squeeze(-1)

    def _channels_in_front(self, dims: int) -> bool:
        return dims >= 4 or (self.channel_first and dims == 3)

    def _encode(self, z: Tensor, return_indices: bool) -> tuple[Tensor, Tensor | None]:
        """Return codes and indices of z, (..., codebooks, channels)."""
        dtype, noisy = z.dtype, self.training and self.noise_dropout > 0
        if noisy or self.orthogonal_rotation:
            z = z.to(compute_dtype(dtype))
        if self.orthogonal_rotation:
            z = _rotate(z, self.orthogonal_rot)
        codes, indices = fsq(z, self.levels, variant=self.variant, return_indices=return_indices)
        if noisy:
            codes = self.maybe_apply_noise(codes)
        if self.orthogonal_rotation:
            codes = _rotate(codes, self.orthogonal_rot.t())
        return codes.to(dtype), indices

    def bound(self, z: Tensor, eps: float = EPS, hard_clamp: bool = False) -> Tensor:
        """Return codes of z (..., len(levels)) without preserve_symmetry."""
        if eps == EPS:
            return fsq(z, self.levels, variant="hard" if hard_clamp else "vqp", return_indices=False)[0]
        self._check_channels("z", z)
        dtype = z.dtype
        z = z.to(compute_dtype(dtype))
        levels = self._constant("sizes", z.device).to(z.dtype)
        half = (levels - 1) * (1 + eps) / 2
        offset = 0.5 - levels % 2 / 2
        u = (z + offset / half).clamp(-1, 1) if hard_clamp else torch.tanh(z + torch.atanh(offset / half))
        bounded = u * half - offset
        return ((bounded + (bounded.round() - bounded).detach()) / (levels // 2)).to(dtype)

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """Return codes of z (..., len(levels)) with preserve_symmetry."""
        return fsq(z, self.levels, variant="symmetric_hard" if hard_clamp else "symmetric", return_indices=False)[0]

    def quantize(self, z: Tensor) -> Tensor:
        """Return codes of z (..., len(levels))."""
        return fsq(z, self.levels, variant=self.variant, return_indices=False)[0]

    def maybe_apply_noise(self, bounded_z: Tensor) -> Tensor:
        """In training, add uniform noise in [-1/2, 1/2) to a share `noise_dropout` of the codes."""
        if not self.training or self.noise_dropout == 0:
            return bounded_z
        # contiguous, so that the random numbers do not depend on the strides of z
        moved = torch.empty_like(bounded_z, memory_format=torch.contiguous_format).bernoulli_(self.noise_dropout).bool()
        offset = torch.rand_like(bounded_z, memory_format=torch.contiguous_format) - 0.5
        return torch.where(moved, bounded_z + offset, bounded_z).clamp(-1.0, 1.0)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Return indices of codes (..., len(levels)); -1 for NaN."""
        self._check_channels("zhat", zhat)
        basis = self._numbered(zhat.device)
        digits = self._scale_and_shift(zhat.to(compute_dtype(zhat.dtype))).round().clamp(min=0)
        digits = torch.minimum(digits, self._constant("sizes", zhat.device) - 1)
        indices = (digits.nan_to_num(0).long() * basis).sum(-1)
        return torch.where(digits.isnan().any(-1), -1, indices).to(basis.dtype)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """Return the digit of every channel, (..., len(levels)); -1 where the index is -1."""
        check.integer_tensor("FSQ", "indices", indices)
        indices = signed(indices)[..., None]
        check_indices("FSQ", indices, self.codebook_size)
        basis, levels = self._numbered(indices.device), self._constant("levels", indices.device)
        return torch.where(indices < 0, -1, indices // basis % levels)

    def indices_to_codes(
        self,
        indices: Tensor,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return project_out of the codes of indices, in the layout of forward's out.

        An index of -1 gives NaN, or 0 at padding given by mask or lengths. `dtype` is the dtype of the codes, by
        default the module's. Without projections forward uses the dtype of z: pass it to get the same values.
        """
        dtype = self._like.dtype if dtype is None else dtype
        check.integer_tensor("FSQ", "indices", indices)
        indices = signed(indices)
        if not self.keep_num_codebooks_dim:
            indices = indices[..., None]
        elif indices.dim() == 0 or indices.shape[-1] != self.num_codebooks:
            raise ValueError(
                f"FSQ: indices must end in a dim of {self.num_codebooks} codebooks, got shape {tuple(indices.shape)}"
            )
        valid = valid_positions("FSQ", indices.shape[:-1], indices, mask, lengths)
        if valid is not None:
            indices = torch.where(valid[..., None], indices, 0)
        codes = self._indices_to_codes(indices, dtype)
        if self.orthogonal_rotation:
            codes = _rotate(codes, self.orthogonal_rot.t())
        out = _projected_out(self.project_out, codes.to(dtype).flatten(-2))
        if valid is not None:
            out = torch.where(valid[..., None], out, 0)
        return out.movedim(-1, 1) if self._channels_in_front(out.dim()) else out

    def _indices_to_codes(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = self._like.dtype if dtype is None else dtype
        if self.orthogonal_rotation:
            dtype = compute_dtype(dtype)
        return fsq_decode(indices, self.levels, variant=self.variant, dtype=dtype)

    def _scale_and_shift(self, zhat_normalized: Tensor) -> Tensor:
        levels = self._constant("sizes", zhat_normalized.device)
        if self.preserve_symmetry:
            return (zhat_normalized + 1.0) / (2.0 / (levels - 1))
        width = levels // 2
        return zhat_normalized * width + width

    def _scale_and_shift_inverse(self, zhat: Tensor) -> Tensor:
        levels = self._constant("sizes", zhat.device)
        if self.preserve_symmetry:
            return zhat * (2.0 / (levels - 1)) - 1.0
        width = levels // 2
        return (zhat - width) / width

    def _check_channels(self, name: str, value: Tensor) -> None:
        check.float_tensor("FSQ", name, value)
        if value.dim() == 0 or value.shape[-1] != self.codebook_dim:
            raise ValueError(f"FSQ: {name} must have {self.codebook_dim} channels last, got shape {tuple(value.shape)}")

    def _numbered(self, device: torch.device) -> Tensor:
        if "basis" not in self._fixed:
            raise ValueError(
                f"FSQ: levels must have a product of at most 2**63 to be numbered, got {tuple(self.levels)}"
            )
        return self._constant("basis", device)

    def usage(self) -> CodebookUsage:
        """Return counts, fraction and perplexity of the tokens since `track_usage()`, over all codebooks together."""
        return self._usages()[0]

    def extra_repr(self) -> str:
        return (
            f"levels={tuple(self.levels)}, dim={self.dim}, num_codebooks={self.num_codebooks}, variant={self.variant}"
        )


def check_projected(op: str, name: str, value: Tensor, projection: nn.Module) -> None:
    """Require the dtype of a projection, if it is torch's own layer with a weight of its own."""
    if type(projection) is nn.Linear and (weight := projection._parameters.get("weight")) is not None:
        check.parameter_dtype(op, name, value, weight)


def _projected_out(projection: nn.Module, codes: Tensor) -> Tensor:
    """Return projection(codes)."""
    if (
        type(projection) is nn.Linear
        and projection.in_features < projection.out_features
        and codes.numel() >= _ROWS * projection.in_features
        and _trains_plainly(codes, projection.weight)
        and not (has_hooks(projection) or any_global_module_hook())
        and "forward" not in projection.__dict__
    ):
        return _Widened.apply(codes, projection.weight, projection.bias)
    out: Tensor = projection(codes)
    return out


def _trains_plainly(codes: Tensor, weight: Tensor) -> bool:
    """Whether autograd alone sees a product of two tensors on a CPU: no compiler, transform, autocast or subclass."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and type(codes) is Tensor
        and type(weight) is nn.Parameter
        and codes.device.type == weight.device.type == "cpu"
        and codes.dtype == weight.dtype
        and codes.dim() > 1
        and transform() is None
        and not (forward_mode() or torch.is_autocast_enabled("cpu") or tracing())
    )


class _Widened(torch.autograd.Function):
    """F.linear from few columns to many, with the layouts in which a CPU takes a half to a third of the time."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, weight)
        out = F.linear(codes, weight, bias)
        # a view of what was made here and is gone
        return unsafe_view(out, out.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        codes, weight = ctx.saved_tensors
        of_codes, of_weight, of_bias = ctx.needs_input_grad
        # of batched gradients there is no flatten
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            F.linear(grad, weight.t().contiguous()) if of_codes else None,
            (codes.reshape(-1, codes.shape[-1]).t() @ rows).t() if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _rotate(z: Tensor, matrix: Tensor) -> Tensor:
    return matmul(z, matrix.to(z.dtype))


def _share(name: str, value: float) -> float:
    if not 0 <= check.number("FSQ", name, value) <= 1:
        raise ValueError(f"FSQ: {name} must lie in [0, 1], got {value}")
    return value
