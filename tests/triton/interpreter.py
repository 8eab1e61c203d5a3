"""Makes Triton's interpreter round as a GPU does, and twice as fast.

The interpreter's fma rounds twice and its cast to bfloat16 truncates. Both are replaced by correctly rounded ones, so
that elementwise results can be compared bit for bit with the C++ kernels, as on a GPU.

At every call of a jit'd function inside a kernel the interpreter looks through all of triton.language for functions to
replace, also when they are replaced already; that was half of its time.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def exact_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 fma: the product is exact in float64; rounding the sum to odd makes the second rounding correct."""
    if a.dtype != np.float32:
        return a * b + c
    with np.errstate(all="ignore"):
        p, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        s = p + c
        rest = s - p
        error = (p - (s - rest)) + (c - rest)
        i = s.view(np.int64)
        step = np.where((error > 0) == (s > 0), 1, -1)
        odd = np.isfinite(s) & (error != 0) & (i & 1 == 0)
        return np.where(odd, i + step, i).view(np.float64).astype(np.float32)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Return the bits of the nearest bfloat16, ties to even."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.uint16).numpy()


def replaced(function) -> bool:
    """Whether the parts of triton.language that a jit'd function sees are the interpreter's already."""
    seen = [value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
    return not any([tl.core.is_builtin(each.load) for each in seen])


def round_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the exact fma and bfloat16 cast until the test ends, and replace triton.language once a kernel."""
    plain_patch = interpreter._patch_lang
    monkeypatch.setattr(
        interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope() if replaced(fn) else plain_patch(fn)
    )
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def fma(self, x, y, z):
        return handle(exact_fma(*np.broadcast_arrays(x.data, y.data, z.data)), z.dtype.scalar)

    def cast(self, src, dst_type, plain=builder.cast_impl):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return handle(round_to_bfloat16(src.data), dst_type.scalar)
        return plain(self, src, dst_type)

    monkeypatch.setattr(builder, "create_fma", fma)
    monkeypatch.setattr(builder, "cast_impl", cast)
