"""Counter-based noise in plain torch: Philox4x32-10, uniforms and normals, with the same bits as the kernels.

Words are int64 tensors with values in [0, 2**32). Every float32 operation is rounded separately, without fma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._schemas import PURPOSES

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOG = (
    -0.07857371121644974, 0.1288098394870758, -0.13129225373268127, 0.14181305468082428, -0.1662452220916748,
    0.20002280175685883, -0.25000810623168945, 0.33333316445350647,
)  # fmt: skip
LN2_HI, LN2_LO = 0.693145751953125, 1.42860677e-6
SINE = (-75.87133026123047, 81.6053695678711, -41.34176254272461, 6.2831854820251465)
COSINE = (58.07190704345703, -85.41180419921875, 64.93907928466797, -19.739208221435547, 1.0)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Return four random words from four counter words and two key words."""
    c, k = list(counter), list(key)
    for _ in range(10):
        # int64 overflow does no harm: the low 64 bits of the product are exact
        p0, p1 = c[0] * MULTIPLIERS[0], c[2] * MULTIPLIERS[1]
        c = [(p1 >> 32 & MASK) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32 & MASK) ^ c[3] ^ k[1], p0 & MASK]
        k = [(word + weyl) & MASK for word, weyl in zip(k, WEYL, strict=True)]
    return c


def words(seed: Tensor, step: Tensor, purpose: int, count: int) -> Tensor:
    """Return the first `count` words of the stream, (count,); with seed (B,) of every stream, (B, count)."""
    step = step.to(seed.device)
    block = torch.arange(-(-count // 4), device=seed.device)
    key = (seed[..., None] & MASK, seed[..., None] >> 32 & MASK)
    high = (step >> 32 & 0xFFFFFF) | (purpose << 24)
    parts = philox((block & MASK, block >> 32, step & MASK, high), key)
    return torch.stack(torch.broadcast_tensors(*parts), -1).flatten(-2)[..., :count]


def uniform(word: Tensor) -> Tensor:
    """Convert words to uniforms in [0, 1), multiples of 2**-24."""
    return (word >> 8).float() * 2.0**-24


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        value = x * value + c
    return value


def log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32 values."""
    i = x.view(torch.int32) - 0x3F3504F3
    k = (i >> 23).float()
    f = ((i & 0x007FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    f2 = f * f
    tail = f2 * f * _polynomial(LOG, f) + -0.5 * f2
    return k * LN2_HI + (f + (k * LN2_LO + tail))


def radius(word: Tensor) -> Tensor:
    """sqrt(-2 ln u), u = (word + 1) / 2**32."""
    square = -2.0 * log((word.float() + 1.0) * 2.0**-32)
    # torch's float32 sqrt can be off by one ulp; float64 rounded to float32 is correctly rounded
    return square.double().sqrt().float()


def sincos(turn: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of 2 pi turn / 2**24."""
    quarter = (turn + 0x200000) >> 22
    r = (turn - (quarter << 22)).float() * 2.0**-24
    s = r * r
    sine, cosine = r * _polynomial(SINE, s), _polynomial(COSINE, s)
    swapped = (quarter & 1) != 0
    a, b = torch.where(swapped, cosine, sine), torch.where(swapped, sine, cosine)
    return torch.where((quarter & 2) != 0, -a, a), torch.where(((quarter + 1) & 2) != 0, -b, b)


def normal(word: Tensor) -> Tensor:
    """Box-Muller on pairs of words along the last dim, whose size is even."""
    r, (sine, cosine) = radius(word[..., ::2]), sincos(word[..., 1::2] >> 8)
    return torch.stack((r * cosine, r * sine), -1).flatten(-2)


def noise(size: Sequence[int], seed: Tensor, step: Tensor, *, kind: str, purpose: str, dtype: torch.dtype) -> Tensor:
    """Draw one stream over all elements in C order, or with seed (B,) one stream per sample."""
    count = math.prod(size[1:] if seed.dim() else size)
    word = words(seed, step, PURPOSES.index(purpose), count + count % 2)
    values = (normal(word) if kind == "normal" else uniform(word))[..., :count]
    return values.reshape(size).to(dtype).contiguous()
