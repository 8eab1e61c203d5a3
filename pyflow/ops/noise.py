"""Counter-based noise: a seed gives the same floats on every backend and in any batch."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._operators import register
from .._schemas import NOISES, PURPOSES
from .._vmap import leading
from ..reference import noise as ref

CPU = torch.device("cpu")  # an object: torch takes 1 us to parse a name
STEPS = 2**56  # the step fills 56 bits of the counter, the purpose the top byte


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10: four random words for each counter and key.

    Args:
        counter: (..., 4) int64 with values in [0, 2**32), low word first.
        key: (..., 2) likewise; its leading dims broadcast to the leading dims of counter.

    Returns:
        (..., 4) int64, values in [0, 2**32).

    Raises:
        TypeError: not int64 tensors.
        ValueError: wrong shapes or devices; on a CPU values outside the range.

    Source:
        Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, section 3.3.

    Example:
        >>> [hex(word) for word in philox(torch.zeros(4).long(), torch.zeros(2).long())]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    op = "philox"
    for name, value, count in (("counter", counter, 4), ("key", key, 2)):
        check.int64_tensor(op, name, value)
        if value.dim() == 0 or value.shape[-1] != count:
            raise ValueError(f"{op}: {name} must have {count} words in its last dim, got {tuple(value.shape)}")
    if key.device != counter.device:
        raise ValueError(f"{op}: key must be on the device of counter, {counter.device}, got {key.device}")
    if not _broadcasts(key.shape[:-1], counter.shape[:-1]):
        raise ValueError(
            f"{op}: key must broadcast to counter, {tuple(counter.shape[:-1])}, got {tuple(key.shape[:-1])}"
        )
    for name, value in (("counter", counter), ("key", key)):
        if check.values_are_checked(value) and bool(((value < 0) | (value > ref.MASK)).any()):
            raise ValueError(f"{op}: {name} must hold words in [0, 2**32), got other values")
    key = key.expand(*counter.shape[:-1], 2)
    return words(op, counter, key)


def normal(
    shape: Sequence[int],
    *,
    seed: int | Tensor | None,
    step: int | Tensor = 0,
    purpose: str = "noise",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise that is a function of seed, step and position alone.

    Box-Muller on pairs of Philox words: sqrt(-2 ln u) cos(phi), sqrt(-2 ln u) sin(phi).

    Args:
        shape: shape of the result.
        seed: an integer, a 0-d int64 tensor on the device, or (B,) int64: a separate stream for each sample of the
            first dim (see `sample_seeds`), so that a sample does not depend on the rest of the batch. None draws a
            seed from torch's default generator.
        step: integer in [0, 2**56) or 0-d int64 tensor; different steps of a seed give independent noise.
        purpose: "noise", "corrector", "prior", "accept", "data", "permutation" or "monte_carlo"; draws with different
            purposes are independent.
        dtype: dtype of the result.
        device: device of the result; defaults to the device of a tensor seed, else torch's default.

    Returns:
        Contiguous tensor; magnitudes reach 6.66.

    Raises:
        TypeError: a seed or step that is neither an integer nor an int64 tensor; a dtype that is not floating-point.
        ValueError: seeds of a wrong length or device, a step out of range, an unknown purpose.

    Notes:
        The bits are the same on every backend and thread count, eager and compiled. Noise is drawn in float32, then
        rounded to bfloat16 or float16 or widened to float64. The host reads nothing, so a seed and a step in device
        tensors may change between replays of a CUDA graph.

    Source:
        Salmon et al. 2011 (Philox4x32-10); Box and Muller 1958.

    Example:
        >>> normal((2, 2), seed=0)
        tensor([[ 0.9911, -0.9247],
                [-0.6176, -0.4821]])
    """
    return _noise("normal", shape, seed, step, purpose, dtype, device)


def uniform(
    shape: Sequence[int],
    *,
    seed: int | Tensor | None,
    step: int | Tensor = 0,
    purpose: str = "noise",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform noise in [0, 1), multiples of 2**-24, that is a function of seed, step and position alone.

    Args:
        shape, seed, step, purpose, dtype, device: as for `normal`. Rounding to bfloat16 or float16 can give 1.

    Returns:
        Contiguous tensor.

    Raises:
        TypeError, ValueError: as for `normal`.

    Example:
        >>> uniform((3,), seed=0)
        tensor([0.3990, 0.8805, 0.7357])
    """
    return _noise("uniform", shape, seed, step, purpose, dtype, device)


def sample_seeds(seed: int | Tensor | None, n: int, start: int = 0) -> Tensor:
    """Seeds of samples start to start + n - 1, one stream each: the same in any batch and on any rank.

    Args:
        seed: integer or 0-d int64 tensor; None draws one from torch's default generator.
        n: number of samples, at least 0.
        start: number of the first sample, at least 0; a rank of a sharded batch passes its first sample.

    Returns:
        (n,) int64 on the device of seed: the first two words of a Philox block that noise never uses.

    Raises:
        TypeError, ValueError: not integers, or out of range.

    Example:
        >>> bool((sample_seeds(5, 4)[2:] == sample_seeds(5, 2, start=2)).all())
        True
    """
    op = "sample_seeds"
    for name, value in (("n", n), ("start", start)):
        if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
        if value < 0:
            raise ValueError(f"{op}: {name} must be at least 0, got {value}")
    if not isinstance(n, torch.SymInt) and not isinstance(start, torch.SymInt) and start + n >= 2**63:
        raise ValueError(f"{op}: start + n must be below 2**63, got {start + n}")
    seed = seed_tensor(op, seed, None, None)
    if seed.dim():
        raise ValueError(f"{op}: seed must be an integer or a 0-d tensor, got {tuple(seed.shape)}")
    sample = torch.arange(start, start + n, device=seed.device)
    zero = torch.zeros_like(sample)
    # the purpose byte 0xFF is outside PURPOSES: no draw of noise has this counter
    counter = torch.stack((sample & ref.MASK, sample >> 32, zero, zero + (0xFF << 24)), 1)
    key = torch.stack((seed & ref.MASK, seed >> 32 & ref.MASK)).expand(n, 2)
    drawn = words(op, counter, key)
    return drawn[:, 0] | drawn[:, 1] << 32


def _noise(op, shape, seed, step, purpose, dtype, device):
    size, dtype = list(check.shape(op, shape)), check.float_dtype(op, dtype)
    number = check.choice(op, "purpose", purpose, PURPOSES)
    device = None if device is None else _as_tensors_have_it(check.device(op, device))
    at = seed.device if isinstance(seed, Tensor) else device
    # the seed last: a call that raises must not draw one
    step = step_tensor(op, step, torch.get_default_device() if at is None and isinstance(step, Tensor) else at)
    seed = seed_tensor(op, seed, size, device)
    return _draw.pick(op, seed)(size, seed, step, NOISES.index(op), number, dtype)


# shared by the operators that draw noise


def words(op: str, counter: Tensor, key: Tensor) -> Tensor:
    """Return `philox` for the public function `op`, which has checked the arguments; one key per counter."""
    return _philox.pick(op, counter)(counter, key)


def seed_tensor(
    op: str,
    seed: int | Tensor | None,
    shape: Sequence[int] | None,
    device: torch.device | None,
    number_device: torch.device | str | None = None,
) -> Tensor:
    """Return the seed as an int64 tensor, 0-d or (B,); a number goes to `number_device`, by default `device`."""
    if seed is None:
        # a tensor on the device is safe in a CUDA graph, a number read on the host is not
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        check.int64_tensor(op, "seed", seed)
        if device is not None and seed.device != device:
            raise ValueError(f"{op}: seed must be on the device of the result, {device}, got {seed.device}")
        if seed.dim() > 1 or (seed.dim() and shape is not None and tuple(shape[:1]) != tuple(seed.shape)):
            samples = "()" if not shape else f"() or ({shape[0]},)"
            raise ValueError(f"{op}: seed must have the shape {samples}, got {tuple(seed.shape)}")
        return seed
    number = seed if isinstance(seed, torch.SymInt) else seed_number(op, seed)
    return torch.full((), number, dtype=torch.int64, device=number_device or device)


def seed_number(op: str, seed: Any, name: str = "seed") -> int:
    """Return a seed that is a number as an int64."""
    if type(seed) is not int and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral)):
        raise TypeError(f"{op}: {name} must be an integer or an int64 tensor, got {type(seed).__name__}")
    number = int(seed)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"{op}: {name} must fit 64 bits, got {seed}")
    return number if number < 2**63 else number - 2**64


def step_tensor(op: str, step: int | Tensor, device: torch.device | None) -> Tensor:
    """Return the step as a 0-d int64 tensor; a number goes to the CPU."""
    if isinstance(step, Tensor):
        check.int64_tensor(op, "step", step)
        if step.dim():
            raise ValueError(f"{op}: step must be an integer or a 0-d tensor, got {tuple(step.shape)}")
        if step.device != device:
            raise ValueError(f"{op}: step must be on the device of the result, {device}, got {step.device}")
        if check.values_are_checked(step):
            _check_step(op, step.item())
        return step
    if type(step) is not int and (isinstance(step, bool) or not isinstance(step, (numbers.Integral, torch.SymInt))):
        raise TypeError(f"{op}: step must be an integer or an int64 tensor, got {type(step).__name__}")
    if not isinstance(step, torch.SymInt):
        _check_step(op, step)
    return torch.full((), step, dtype=torch.int64, device=CPU)


def _check_step(op: str, step: float) -> None:
    if not 0 <= step < STEPS:
        raise ValueError(f"{op}: step must be in [0, 2**56), got {step}")


def _as_tensors_have_it(device: torch.device) -> torch.device:
    """Return the device as tensors report it: with an index on a GPU, without one on a CPU."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(m in (1, n) for m, n in zip(reversed(shape), reversed(to), strict=False))


# registration with torch


def _philox_reference(counter, key):
    return torch.stack(ref.philox(counter.unbind(-1), key.unbind(-1)), -1)


_philox = register(
    "philox", "noise", reference=_philox_reference, vmap=leading,
    fake=lambda counter, key: counter.new_empty(counter.shape),
)  # fmt: skip
_draw = register(
    "noise", "noise", reference=ref.noise,
    fake=lambda size, seed, step, kind, purpose, dtype: seed.new_empty(size, dtype=dtype),
)  # fmt: skip


def warmup(x: Tensor, **other: Any) -> list[Tensor]:
    for seed in (0, sample_seeds(torch.tensor(0, device=x.device), len(x))):
        for draw in (normal, uniform):
            draw(x.shape, seed=seed, dtype=x.dtype, device=x.device)
    return []
