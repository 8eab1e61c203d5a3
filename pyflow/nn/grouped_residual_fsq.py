"""Residual finite scalar quantisation of groups of channels, a drop-in replacement for vector-quantize-pytorch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..ops.fsq import CodebookUsage
from .residual_fsq import ResidualFSQ, _StageOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._typed import ModuleListOf


class _GroupOptions(_StageOptions, total=False):
    is_channel_first: bool
    quantize_dropout: bool
    quantize_dropout_cutoff_index: int
    quantize_dropout_multiple_of: int
    soft_clamp_input_value: float | Sequence[float] | Tensor | None
    bound_hard_clamp: bool


class _Options(_GroupOptions):
    levels: Sequence[int]
    num_quantizers: int


class _ForwardOptions(TypedDict):
    return_all_codes: bool
    mask: Tensor | None
    lengths: Tensor | None
    active: Tensor | None


class GroupedResidualFSQ(nn.Module):
    """One `ResidualFSQ` per group of channels.

    Args:
        dim: number of channels of x.
        groups: number of groups, a divisor of dim.
        accept_image_fmap: whether x is (B, dim, ...) instead of (..., dim).
        kwargs: options of `ResidualFSQ`.

    Returns:
        `forward(x, return_all_codes=False, mask=None, lengths=None, active=None)`: (out, indices), and with
        return_all_codes the codes. out has the shape of x; indices are stacked over the groups in dim 0, codes are a
        tuple with those of each group.
        Arguments are as for `ResidualFSQ`; training drops the same stages in all groups.

    Raises:
        TypeError, ValueError: as for `ResidualFSQ`; groups does not divide dim.

    Notes:
        As for `ResidualFSQ`. is_channel_first always equals accept_image_fmap.

    Source:
        Yang et al. 2023, HiFi-Codec, arXiv:2305.02765, with `ResidualFSQ` in the groups.

    Example:
        >>> quantizer = GroupedResidualFSQ(dim=4, groups=2, levels=[5, 5], num_quantizers=3)
        >>> out, indices = quantizer(torch.zeros(1, 7, 4))
        >>> out.shape, indices.shape
        (torch.Size([1, 7, 4]), torch.Size([2, 1, 7, 3]))
    """

    rvqs: ModuleListOf[ResidualFSQ]

    def __init__(
        self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Unpack[_Options]
    ) -> None:
        super().__init__()
        op = "GroupedResidualFSQ"
        self.dim, self.groups = check.at_least(op, "dim", dim, 1), check.at_least(op, "groups", groups, 1)
        if dim % groups:
            raise ValueError(f"{op}: groups must divide dim, {dim}, got {groups}")
        self.accept_image_fmap = check.flag(op, "accept_image_fmap", accept_image_fmap)
        if bool(kwargs.setdefault("is_channel_first", self.accept_image_fmap)) != self.accept_image_fmap:
            raise ValueError(
                f"{op}: is_channel_first must equal accept_image_fmap, {self.accept_image_fmap}, "
                f"got {kwargs['is_channel_first']}"
            )
        rvqs = nn.ModuleList(ResidualFSQ(dim=dim // groups, **kwargs) for _ in range(groups))
        self.rvqs = cast("ModuleListOf[ResidualFSQ]", rvqs)
        self.codebook_size = self.rvqs[0].codebook_size

    @property
    def codebooks(self) -> Tensor:
        """The codes of all indices, (groups, Q, codebook_size, len(levels)), computed at every access."""
        return self.rvqs[0].codebooks.expand(self.groups, -1, -1, -1)

    @property
    def split_dim(self) -> int:
        """The dim of the channels."""
        return 1 if self.accept_image_fmap else -1

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        active: Tensor | None = None,
    ) -> tuple[Any, ...]:
        op, split = "GroupedResidualFSQ", self.split_dim
        check.float_tensor(op, "x", x)
        if x.dim() < max(split + 1, 1) or x.shape[split] != self.dim:
            raise ValueError(f"{op}: x must have {self.dim} channels in dim {split}, got shape {tuple(x.shape)}")
        if active is None:
            active = self.rvqs[0]._draw_active(x.device, None)
        options: _ForwardOptions = {
            "return_all_codes": return_all_codes,
            "mask": mask,
            "lengths": lengths,
            "active": active,
        }
        groups = [rvq(part, **options) for rvq, part in zip(self.rvqs, x.chunk(self.groups, split), strict=True)]
        out, indices, *codes = zip(*groups, strict=True)
        return torch.cat(out, split), torch.stack(indices), *codes

    def get_codes_from_indices(self, indices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return the scaled codes of every stage, (groups, Q, B, ..., len(levels)), of indices (groups, B, ..., Q)."""
        return torch.stack([rvq.get_codes_from_indices(part, dtype=dtype) for rvq, part in self._by_group(indices)])

    def get_output_from_indices(self, indices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return forward's out for indices (groups, B, ..., Q); the stages are the last dim in every layout."""
        parts = [rvq.get_output_from_indices(part, dtype=dtype) for rvq, part in self._by_group(indices)]
        out = torch.cat(parts, -1)
        return out.movedim(-1, self.split_dim)

    def _by_group(self, indices: Tensor) -> list[tuple[ResidualFSQ, Tensor]]:
        check.integer_tensor("GroupedResidualFSQ", "indices", indices)
        if indices.dim() == 0 or indices.shape[0] != self.groups:
            raise ValueError(
                f"GroupedResidualFSQ: indices must start with a dim of {self.groups} groups, "
                f"got shape {tuple(indices.shape)}"
            )
        return list(zip(self.rvqs, indices, strict=True))

    def track_usage(self) -> None:
        """Start counting which codebook entries occur; a second call resets the counts to zero."""
        for rvq in self.rvqs:
            rvq.track_usage()

    def usage(self) -> tuple[tuple[CodebookUsage, ...], ...]:
        """Return counts, fraction and perplexity of the tokens since `track_usage()`, for every group and stage."""
        return tuple(rvq.usage() for rvq in self.rvqs)
