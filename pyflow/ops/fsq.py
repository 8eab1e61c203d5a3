"""Finite scalar quantisation: codes and indices in one pass, decoding, residual stages."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import register
from .._schemas import FSQ_VARIANTS
from .._vmap import after_channels, leading
from ..reference import fsq as ref

RESIDUAL_VARIANTS = ("symmetric", "symmetric_hard")
MOST_LEVELS = 2**22  # float32 represents every level up to here


@overload
def fsq(
    z: Tensor, levels: Sequence[int], *, variant: str = ..., dim: int = ..., return_indices: Literal[True] = ...
) -> tuple[Tensor, Tensor]: ...
@overload
def fsq(
    z: Tensor, levels: Sequence[int], *, variant: str = ..., dim: int = ..., return_indices: bool
) -> tuple[Tensor, Tensor | None]: ...
def fsq(
    z: Tensor, levels: Sequence[int], *, variant: str = "vqp", dim: int = -1, return_indices: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Quantise every channel of z to its number of levels, and return codes and codebook indices.

    "vqp" (vector-quantize-pytorch, Cosmos) and "paper" (google-research, NeMo): round(tanh(z + shift) half - offset);
    "symmetric": floor((L - 1) (tanh(z) + 1) / 2 + 1/2); "sigmoid": round((L - 1) sigmoid(z)); "hard" and
    "symmetric_hard": as "vqp" and "symmetric" with a clamp for tanh; "bounded": round(clamp(z) half - offset), for a z
    that is tanh(z + shift) already. Use the variant a model was trained with.

    Args:
        z: float32, float64, bfloat16 or float16 of any rank and strides, with len(levels) channels in `dim`.
        levels: number of levels of each channel, 2 to 2**22 (from 3 for "vqp" and "hard").
        variant: one of the names above.
        dim: the channel dim; no layout is copied.
        return_indices: whether to return indices.

    Returns:
        codes: like z, in [-1, 1] ("sigmoid": [0, 1]). Rounding passes gradients straight through; the bound (tanh,
            sigmoid or clamp) is differentiated.
        indices: the shape of z without `dim`; sum of digit * (product of the levels before it), so the first
            channel varies fastest. int32 for a codebook of up to 2**31 entries, int64 up to 2**63. None without
            return_indices.

    Raises:
        TypeError: not a tensor, an unsupported dtype, levels that are not a list of integers.
        ValueError: unknown variant, levels out of range, a wrong number of channels, a codebook too large for int64.

    Notes:
        The bound is computed in float32 (float64 for float64 z), rounding is half to even, and indices are integer
        sums. Codes and indices have the same bits on every compiled backend, and `fsq_decode(indices)` returns
        the same bits as codes. A NaN gives a NaN code and the index -1; infinities saturate. Backward saves only z.
        Double backward works.

    Source:
        Mentzer et al. 2023, Finite Scalar Quantization, arXiv:2309.15505; "symmetric": arXiv:2411.19842, section 3.2.

    Example:
        >>> codes, indices = fsq(torch.tensor([[0.0, 2.0, -9.0]]), (8, 5, 3))
        >>> codes, indices
        (tensor([[ 0.,  1., -1.]]), tensor([36], dtype=torch.int32))
    """
    op = "fsq"
    check.float_tensor(op, "z", z)
    index = check.choice(op, "variant", variant, FSQ_VARIANTS)
    return_indices = check.flag(op, "return_indices", return_indices)
    levels = checked_levels(op, levels, variant, return_indices)
    z = _channels_first(op, "z", z, levels, dim)
    codes, indices = _fsq.pick(op, z)(z, levels, index, return_indices)
    return codes.movedim(0, dim), indices if return_indices else None


def fsq_decode(
    indices: Tensor,
    levels: Sequence[int],
    *,
    variant: str = "vqp",
    dim: int = -1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the codes of indices, with the same bits as the codes that `fsq` returned.

    Args:
        indices: integers in [0, product of levels), any shape; -1 gives NaN.
        levels, variant: as for `fsq`.
        dim: the channel dim of the result.
        dtype: dtype of the result; pass z's dtype to get the codes of z.

    Returns:
        The shape of indices with len(levels) channels in `dim`.

    Raises:
        TypeError: indices that are not integers, a dtype that is not floating-point.
        ValueError: as for `fsq`; on a CPU an index outside the codebook (on an accelerator it gives NaN).

    Example:
        >>> fsq_decode(torch.tensor([36]), (8, 5, 3))
        tensor([[ 0.,  1., -1.]])
    """
    op = "fsq_decode"
    check.integer_tensor(op, "indices", indices)
    check.float_dtype(op, dtype)
    index = check.choice(op, "variant", variant, FSQ_VARIANTS)
    levels = checked_levels(op, levels, variant, True)
    dims = indices.dim() + 1
    dim = check.dim(op, dim, dims)
    indices = signed(indices)
    check_indices(op, indices, math.prod(levels))
    return _decode.pick(op, indices)(indices, levels, index, dim, dtype)


def residual_fsq(
    x: Tensor,
    levels: Sequence[int],
    num_quantizers: int,
    *,
    variant: str = "symmetric_hard",
    dim: int = -1,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise x, then the remainder with L times finer digits, and so on: all stages in one pass.

    Stage q adds s fsq(r / s), s = L**-q, where r is x minus the earlier stages.

    Args:
        x: like z of `fsq`, already clamped to the range of the codes.
        levels: as for `fsq`.
        num_quantizers: number of stages Q, at least 1.
        variant: "symmetric" or "symmetric_hard".
        dim: the channel dim.
        active: 0-d int64 tensor on the device of x: only the first `active` stages quantise (quantiser dropout).
            At least 0, which only a CPU checks: the host never reads it from a GPU.

    Returns:
        out: like x, the sum of the stages, with the sum of their straight-through gradients.
        indices: the shape of x without `dim`, with Q appended; -1 from stage `active` on and for NaN. int32 or
            int64 as for `fsq`, int64 with `active`.

    Raises:
        TypeError, ValueError: as for `fsq`.

    Source:
        Zeghidour et al. 2021, SoundStream, arXiv:2107.03312, algorithm 1, with `fsq` as the quantiser.

    Example:
        >>> residual_fsq(torch.tensor([[0.3, -0.6]]), (5, 5), 2)
        (tensor([[ 0.3000, -0.6000]]), tensor([[8, 5]], dtype=torch.int32))
    """
    if active is not None:
        check.float_tensor("residual_fsq", "x", x)
        check_active("residual_fsq", active, x)
    return in_one_pass(x, levels, num_quantizers, variant, dim, active)


def in_one_pass(
    x: Tensor, levels: Sequence[int], num_quantizers: int, variant: str, dim: int, active: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `residual_fsq` without a look at `active`."""
    op = "residual_fsq"
    check.float_tensor(op, "x", x)
    check.choice(op, "variant", variant, RESIDUAL_VARIANTS)
    index = FSQ_VARIANTS.index(variant)
    levels = checked_levels(op, levels, variant, True)
    stages = check.at_least(op, "num_quantizers", num_quantizers, 1)
    x = _channels_first(op, "x", x, levels, dim)
    out, indices = _residual.pick(op, x)(x, levels, index, stages, active)
    return out.movedim(0, dim), indices


class CodebookUsage(NamedTuple):
    """Codebook usage: `counts` of the entries that occur, 0-d `fraction` of the entries that occur, 0-d `perplexity`,
    exp of the entropy of the distribution over entries."""

    counts: Tensor
    fraction: Tensor
    perplexity: Tensor


def codebook_usage(indices: Tensor, size: int) -> CodebookUsage:
    """Return how often the entries of a codebook occur, the fraction that occur, and their perplexity.

    Args:
        indices: integers of any shape; negative ones (padding, dropped stages) do not count.
        size: number of entries of the codebook; no table of this size is allocated.

    Returns:
        counts (entries that occur,) int64; fraction and perplexity 0-d float32, both 0 when no index counts.

    Raises:
        TypeError: indices that are not an integer tensor, a size that is not an integer.
        ValueError: size below 1, or on a CPU an index of size or above.

    Notes:
        Not for `torch.compile(fullgraph=True)` and vmap: the shape of counts depends on the indices.

    Example:
        >>> codebook_usage(torch.tensor([0, 0, 3, -1]), 4).fraction
        tensor(0.5000)
    """
    op = "codebook_usage"
    check.integer_tensor(op, "indices", indices)
    size = check.at_least(op, "size", size, 1, 2**63)
    if indices.is_meta:
        raise ValueError(f"{op}: indices must have values, got a meta tensor")
    indices = signed(indices)
    used = indices[indices >= 0]
    if used.numel() and check.values_are_checked(used) and int(used.max()) >= size:
        raise ValueError(f"{op}: indices must lie below the codebook's size, {size}, got {int(used.max())}")
    return usage_of(used.unique(return_counts=True)[1], size)


def usage_of(counts: Tensor, size: int) -> CodebookUsage:
    """Return the usage from the counts of the entries that occur."""
    p = counts.double() / counts.sum()
    fraction = torch.tensor(counts.numel() / size, dtype=torch.float32, device=counts.device)
    # without counts the sum is 0, and exp would return 1
    perplexity = torch.exp(-(p * p.log()).sum()) if counts.numel() else p.sum()
    return CodebookUsage(counts, fraction, perplexity.float())


def checked_levels(op: str, levels: Sequence[int], variant: str, numbered: bool) -> list[int]:
    """Return the levels as a list of integers; `numbered` also checks that their indices fit int64."""
    if not isinstance(levels, (tuple, list)) and (
        isinstance(levels, (str, Tensor)) or not isinstance(levels, Sequence)
    ):
        raise TypeError(f"{op}: levels must be a list of integers, got {type(levels).__name__}")
    whole = all([type(n) is int or (isinstance(n, numbers.Integral) and not isinstance(n, bool)) for n in levels])
    if not whole or not levels or min(levels) < 2:
        raise ValueError(f"{op}: levels must be integers >= 2, got {check.shown(tuple(levels))}")
    if max(levels) > MOST_LEVELS:
        raise ValueError(
            f"{op}: levels must be at most 2**22, which float32 can tell apart, got {check.shown(tuple(levels))}"
        )
    if variant in ("vqp", "hard") and min(levels) == 2:
        raise ValueError(f"{op}: levels must be at least 3 for variant {variant}, got {check.shown(tuple(levels))}")
    if numbered and math.prod(levels) > 2**63:
        raise ValueError(
            f"{op}: levels must have a product of at most 2**63 to be numbered, got {check.shown(tuple(levels))}"
        )
    return [int(n) for n in levels]


def signed(whole: Tensor) -> Tensor:
    """Convert integers to int32 or int64, which hold -1 and which torch supports everywhere."""
    if whole.dtype in check.SIGNED:
        return whole
    return whole.to(torch.int32 if whole.element_size() < 4 else torch.int64)


def check_indices(op: str, indices: Tensor, size: int) -> None:
    """Require indices of a codebook, -1 for none."""
    if indices.numel() and check.values_are_checked(indices):
        low, high = (int(v) for v in indices.aminmax())
        if low < -1 or high >= size:
            raise ValueError(f"{op}: indices must lie in [-1, {size}), got {low if low < -1 else high}")


def _channels_first(op: str, name: str, x: Tensor, levels: list[int], dim: int) -> Tensor:
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} must have at least one dim, the channels, got a scalar")
    channel = check.dim(op, dim, x.dim())
    if x.shape[channel] != len(levels):
        raise ValueError(
            f"{op}: {name} must have {len(levels)} channels in dim {dim}, one for each level, got {x.shape[dim]}"
        )
    return x.movedim(dim, 0)


def check_active(op: str, active: Tensor, x: Tensor) -> None:
    check.int64_tensor(op, "active", active)
    if active.dim() != 0:
        raise ValueError(f"{op}: active must be 0-d, got {tuple(active.shape)}")
    if active.device != x.device:
        raise ValueError(f"{op}: active must be on the device of x, {x.device}, got {active.device}")
    # more than all stages are all: dropout rounds up to a multiple
    if check.values_are_checked(active) and (value := int(active)) < 0:
        raise ValueError(f"{op}: active must be at least 0, got {value}")


# registration with torch


def _fake(z, levels, variant, return_indices):
    if not return_indices:
        return torch.empty_like(z), z.new_empty(0, dtype=torch.int32)
    return torch.empty_like(z), z.new_empty(z.shape[1:], dtype=ref.index_dtype(levels))


_fsq_backward = register(
    "fsq_backward", "fsq", reference=ref.fsq_backward, vmap=after_channels,
    fake=lambda grad, z, levels, variant: torch.empty_like(z),
)  # fmt: skip
_fsq = register("fsq", "fsq", reference=ref.fsq, fake=_fake, vmap=after_channels, backward=_fsq_backward)


def _decode_reference(indices, dim, **options):
    return ref.fsq_decode(indices, **options).movedim(0, dim)


def _decode_fake(indices, levels, variant, dim, dtype):
    shape = list(indices.shape)
    shape.insert(dim, len(levels))
    return indices.new_empty(shape, dtype=dtype)


_decode = register("fsq_decode", "fsq", reference=_decode_reference, fake=_decode_fake, vmap=leading)


def _residual_fake(x, levels, variant, stages, active):
    dtype = torch.int64 if active is not None else ref.index_dtype(levels)
    return torch.empty_like(x), x.new_empty((*x.shape[1:], stages), dtype=dtype)


_residual_backward = register(
    "residual_fsq_backward", "fsq", reference=ref.residual_fsq_backward, vmap=after_channels,
    fake=lambda grad, x, levels, variant, stages, active: torch.empty_like(x),
)  # fmt: skip
_residual = register(
    "residual_fsq", "fsq", reference=ref.residual_fsq, fake=_residual_fake, vmap=after_channels,
    backward=_residual_backward,
)  # fmt: skip


def warmup(x: Tensor, *, levels: Sequence[tuple[int, ...]], **other: Any) -> list[Tensor]:
    outputs = []
    for each in levels:
        z = x.new_zeros(len(x), len(each)).requires_grad_()
        for variant in FSQ_VARIANTS:
            if min(each) == 2 and variant in ("vqp", "hard"):
                continue
            codes, indices = fsq(z, each, variant=variant)
            outputs.append(codes)
            fsq_decode(indices, each, variant=variant, dtype=x.dtype)
        outputs += [residual_fsq(z, each, 2, variant=variant)[0] for variant in ("symmetric", "symmetric_hard")]
    return outputs
