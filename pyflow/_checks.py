"""Argument checks shared by the public functions. Each raises one sentence, `op: argument rule, got value`.

Values are `Any`: they come from the user, and a check cannot narrow the type of its caller's variable at no cost.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._torch import FakeTensor, backward_id, dispatch_modes, makes_graph, tracing, transform

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIGNED = (torch.int64, torch.int32)
# costs less than an attribute of torch in each check
STRIDED = torch.strided


def shape(op: str, value: object) -> tuple[int, ...]:
    """Return a shape as a tuple of integers; symbolic integers stay symbolic."""
    # fast path for most calls
    if isinstance(value, tuple) and len(value) <= 4 and all([type(n) is int and 0 <= n < 2**15 for n in value]):
        return tuple(value)
    if isinstance(value, (str, Tensor)) or not isinstance(value, Iterable):
        raise TypeError(f"{op}: shape must be a sequence of integers, got {type(value).__name__}")
    sizes: tuple[Any, ...] = tuple(value)
    for n in sizes:
        if isinstance(n, bool) or not isinstance(n, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{op}: shape must hold integers, got {sizes}")
    if any(n < 0 for n in sizes):
        raise ValueError(f"{op}: shape must not be negative, got {sizes}")
    if not torch.compiler.is_compiling() and math.prod([n for n in sizes if not isinstance(n, torch.SymInt)]) >= 2**60:
        raise ValueError(f"{op}: shape must have fewer than 2**60 elements, got {shown(sizes)}")
    checked: Any = tuple(n if isinstance(n, torch.SymInt) else int(n) for n in sizes)
    return checked


def batch_shape(op: str, value: object) -> tuple[int, ...]:
    """Return a shape (B, ...) as a tuple of integers."""
    rule = f"{op}: shape must be (B, ...) of integers that are not negative"
    if isinstance(value, (str, Tensor)) or not isinstance(value, Iterable):
        raise TypeError(f"{rule}, got {type(value).__name__}")
    sizes = tuple(value)
    if not sizes or any(isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 0 for n in sizes):
        raise ValueError(f"{rule}, got {sizes}")
    return tuple(map(int, sizes))


def float_dtype(op: str, dtype: object) -> torch.dtype:
    if dtype not in FLOATS:
        raise TypeError(f"{op}: dtype must be float32, float64, bfloat16 or float16, got {short(dtype)}")
    return dtype


def device(op: str, value: Any) -> torch.device:
    try:
        result = torch.device(value)
    # torch raises ValueError for an integer beyond 64 bits
    except (RuntimeError, TypeError, ValueError):
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{op}: device must be a torch.device or its name, got {shown(value)}") from None
    if result.type == "cuda" and not _may_be_fake() and (result.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{op}: device must be available here, got {result}")
    return result


def _may_be_fake() -> bool:
    """Whether tensors may be created on devices that this machine lacks: while traced, or under a dispatch mode."""
    return torch.compiler.is_compiling() or dispatch_modes() > 0


def values_are_checked(tensor: Tensor) -> bool:
    """Whether a check may read the values: on a CPU, on an accelerator with PYFLOW_CHECK=1, never in any trace."""
    if torch.compiler.is_compiling() or transform() is not None:
        return False
    # most tensors are plain, and type() costs less than isinstance
    fake = type(tensor) is not Tensor and isinstance(tensor, FakeTensor)
    if fake or tracing() or makes_graph():
        return False
    return tensor.is_cpu or (tensor.device.type != "meta" and os.environ.get("PYFLOW_CHECK") == "1")


def in_backward() -> bool:
    """Whether this thread runs a backward: a forward is then a recomputation."""
    return not torch.compiler.is_compiling() and backward_id() != -1


def uncast(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context manager that disables autocast on x's device; the meta device has no autocast."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout is not STRIDED or value.is_nested:
        raise TypeError(
            f"{op}: {name} must be a dense tensor, got {'nested' if value.is_nested else short(value.layout)}"
        )


def float_tensor(op: str, name: str, value: Any) -> torch.dtype:
    """Require a dense tensor of a float dtype; return the dtype."""
    if (
        isinstance(value, Tensor)
        and (dtype := value.dtype) in FLOATS
        and value.layout is STRIDED
        and not value.is_nested
    ):
        return dtype
    tensor(op, name, value)
    raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {short(value.dtype)}")


def parameter_dtype(op: str, name: str, value: Tensor, parameter: Tensor) -> None:
    """Require the dtype of a module's parameters, which torch's layers need outside of autocast."""
    if value.dtype != parameter.dtype and (value.is_meta or not torch.is_autocast_enabled(value.device.type)):
        raise TypeError(
            f"{op}: {name} must have the dtype of the parameters, {short(parameter.dtype)}, got {short(value.dtype)}"
        )


def like(
    op: str, name: str, value: Any, other_name: str, shape: torch.Size | tuple[int, ...], device: torch.device
) -> torch.dtype:
    """Require a float tensor with the given shape on the given device; return its dtype."""
    # the test of float_tensor again, without a call
    if not isinstance(value, Tensor) or (dtype := value.dtype) not in FLOATS or value.layout is not STRIDED:
        return float_tensor(op, name, value)
    try:
        fits = value.shape == shape
    except RuntimeError:
        # nested tensors have no shape
        float_tensor(op, name, value)
        raise
    if not fits:
        raise ValueError(f"{op}: {name} must have the shape of {other_name}, {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name}, {device}, got {value.device}")
    return dtype


def choice(op: str, name: str, value: object, allowed: tuple[str, ...]) -> int:
    """Return the index of `value` in `allowed`."""
    if isinstance(value, str) and value in allowed:
        return allowed.index(value)
    raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {shown(value)}")


def number(op: str, name: str, value: object) -> float:
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} must fit into float64, got a larger number") from None


def flag(op: str, name: str, value: object) -> bool:
    if value is True or value is False:
        return value
    if not isinstance(value, (int, np.bool_)):
        raise TypeError(f"{op}: {name} must be true or false, got {type(value).__name__}")
    return bool(value)


def function(op: str, name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{op}: {name} must be callable, got {type(value).__name__}")


def not_negative(op: str, name: str, value: object) -> float:
    result = number(op, name, value)
    if not 0 <= result < float("inf"):
        raise ValueError(f"{op}: {name} must be at least 0 and finite, got {value}")
    return result


def positive(op: str, name: str, value: object) -> float:
    result = number(op, name, value)
    if not 0 < result < float("inf"):
        raise ValueError(f"{op}: {name} must be positive and finite, got {value}")
    return result


def moderate(
    op: str, name: str, value: float, dtype: torch.dtype | None, least: float = 2.0**-100, most: float = 2.0**100
) -> None:
    """Require a constant whose products with data are in the range of float32, unless the data are float64."""
    if dtype not in (None, torch.float64) and not least <= value <= most:
        rule = f"from {least:.3g} to {most:.3g}" if least else f"at most {most:.3g}"
        raise ValueError(f"{op}: {name} must be {rule} in float32, got {value}")


def integer_tensor(op: str, name: str, value: Any) -> None:
    tensor(op, name, value)
    # fast path for most calls
    if value.dtype in SIGNED:
        return
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be integers, got {short(value.dtype)}")


def int64_tensor(op: str, name: str, value: Any) -> None:
    tensor(op, name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {short(value.dtype)}")


def event_shape(op: str, value: object) -> tuple[int, ...]:
    """Return the shape of one sample, given as an integer or as a tuple of integers."""
    if not isinstance(value, (numbers.Integral, tuple, list)):
        raise TypeError(f"{op}: shape must be an integer or a tuple of integers, got {type(value).__name__}")
    sizes = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(int(at_least(op, "shape", n, 0)) for n in sizes)


def batch(op: str, name: str, value: Tensor) -> None:
    if value.dim() == 0:
        raise ValueError(f"{op}: {name} must have at least one dim, the batch, got a scalar")


def event_dims(op: str, x: Tensor, event_dims: int | None) -> int:
    """Return how many trailing dims are one event: all but the first where `event_dims` is None."""
    dims = x.dim()
    if event_dims is None:
        batch(op, "x", x)
        return dims - 1
    return _between(op, "event_dims", event_dims, 0, dims)


def dim(op: str, value: Any, dims: int) -> int:
    """Return a dim of a tensor with so many dims, counted from the first."""
    return _between(op, "dim", value, -dims, dims - 1) % dims


def _between(op: str, name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    number = int(value)
    if not least <= number <= most:
        raise ValueError(f"{op}: {name} must be in [{least}, {most}], got {value}")
    return number


def at_least(op: str, name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    if type(value) is int and least <= value <= most:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    if int(value) > most:
        raise ValueError(f"{op}: {name} must be at most {most}, got {value}")
    return int(value)


def mask_for(op: str, mask: Any, x: Tensor) -> Tensor:
    """Return the mask as a bool tensor expanded to the shape of x."""
    tensor(op, "mask", mask)
    if mask.device != x.device:
        raise ValueError(f"{op}: mask must be on the device of x, {x.device}, got {mask.device}")
    fits = mask.dim() <= x.dim() and all(
        m == 1 or m == n for m, n in zip(reversed(mask.shape), reversed(x.shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{op}: mask must broadcast to the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        if values_are_checked(mask) and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"{op}: mask must be bool or hold only 0 and 1, got other values")
        mask = mask != 0
    return mask.expand(x.shape)


def context(
    op: str,
    value: Any,
    features: int,
    lead: tuple[int, ...] | torch.Size = (),
    device: torch.device | None = None,
) -> Tensor | None:
    """Return the context of a conditional layer or flow, checked, or None where it takes none.

    The leading dims must broadcast with `lead`, those of the input, which is on `device`.
    """
    if value is None and not features:
        return None
    if not features:
        raise ValueError(f"{op}: context must be None with context_features=0, got {type(value).__name__}")
    if value is None:
        raise ValueError(f"{op}: context must be a tensor (..., {features}), got None")
    float_tensor(op, "context", value)
    if value.dim() == 0 or value.shape[-1] != features:
        raise ValueError(f"{op}: context must have the shape (..., {features}), got {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: context must be on the device of the input, {device}, got {value.device}")
    if any(m != n and m != 1 and n != 1 for m, n in zip(reversed(value.shape[:-1]), reversed(lead), strict=False)):
        raise ValueError(
            f"{op}: context must have leading dims that broadcast with those of the input, {tuple(lead)}, got "
            f"{tuple(value.shape[:-1])}"
        )
    return value


def shown(value: object) -> str:
    """Return the repr of a value for an error text, or its type's name if the repr is long."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else type(value).__name__


def short(value: object) -> str:
    """Return the name of a dtype or layout without "torch.", or the type's name of any other value."""
    known = isinstance(value, (torch.dtype, torch.layout))
    return str(value).removeprefix("torch.") if known else type(value).__name__
