"""Conversion of the arrays, lists and tensors that users pass; progress bars."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from .. import _progress
from ..hsic.inputs import comparable
from ..hsic.kernels import KernelSpec

# seconds before a bar appears
PATIENCE = 1.0
# type names of pandas' missing values
MISSING = ("NAType", "NaTType")


def check_kernels(op: str, specs: tuple[KernelSpec, KernelSpec]) -> None:
    """Check the kernels before samples are converted, which depends on them."""
    for name, spec in zip("xy", specs, strict=True):
        spec.check(op, name)


def samples(op: str, name: str, value: object, kernel: str) -> Tensor:
    """Return samples as rows of a tensor (n, d), from an array, a list or a tensor; (n,) is one column.

    Integers become float64, large ones less a constant. The kernel "delta" keeps integers, and replaces labels of other
    types by integers.
    """
    if not isinstance(value, Tensor):
        array = array_of(op, name, value)
        if array.dtype.kind == "O" and kernel != "delta":
            array = _numbers(op, name, array)
        if kernel == "delta" and array.dtype.kind in "OSTUMm":
            array = _codes(op, name, array)
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise TypeError(f"{op}: {name} must hold numbers, got {array.dtype}")
        # torch reads native byte order only
        value = torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
    check.tensor(op, name, value)
    if value.is_meta:
        raise ValueError(f"{op}: {name} must have values, got a meta tensor")
    if value.is_complex():
        raise TypeError(f"{op}: {name} must hold real numbers, got {value.dtype}")
    if value.dim() == 1:
        value = value.unsqueeze(1)
    if value.dim() != 2:
        raise ValueError(f"{op}: {name} must be (n,) or (n, d), got shape {tuple(value.shape)}")
    if kernel != "delta" and not value.is_floating_point():
        value = _in_float64(value, kernel)
    return comparable(value.detach())


def _in_float64(value: Tensor, kernel: str) -> Tensor:
    """Convert integers (n, d); large ones are translated first, where the kernel allows it, to keep their differences.

    float64 holds integers up to 2**53 only; times in nanoseconds and identifiers are larger.
    """
    if kernel in ("rbf", "laplacian", "linear") and value.dtype in (torch.int64, torch.uint64) and value.numel():
        whole = value.view(torch.int64)
        if value.dtype == torch.uint64 and bool((whole < 0).any()):
            # flips the sign bit: subtracts 2**63
            value = whole = whole ^ torch.iinfo(torch.int64).min
        low, high = whole.amin(0), whole.amax(0)
        # a difference beyond int64 is negative; rounding does not matter then
        if bool(((low < -(2**53)) | (high > 2**53)).any()) and bool((high - low >= 0).all()):
            value = whole - low
    return value.double()


def array_of(op: str, name: str, value: object) -> np.ndarray:
    if _masked(value):
        raise ValueError(f"{op}: {name} must have no missing values, got a masked array with some")
    try:
        return np.asarray(value)
    except ValueError:
        raise ValueError(f"{op}: {name} must have rows of one length, got others") from None


def _masked(value: object) -> bool:
    """Whether an array, or an array in a list, has masked elements; np.asarray would drop their mask."""
    if isinstance(value, np.ma.MaskedArray):
        return bool(np.ma.getmaskarray(value).any())
    return isinstance(value, (list, tuple)) and any(map(_masked, value))


def _refuse(op: str, name: str, values: list, kinds: tuple[str, ...]) -> None:
    """Raise if a value has a type with one of these names, which stand for missing values."""
    missing = next((v for v in values if type(v).__name__ in kinds), values)
    if missing is not values:
        raise ValueError(f"{op}: {name} must have no missing values, got {missing}")


def _numbers(op: str, name: str, array: np.ndarray) -> np.ndarray:
    """Convert an object array of numbers (such as a table of mixed columns) to float64; return others unchanged."""
    values = array.ravel().tolist()
    _refuse(op, name, values, ("NoneType", *MISSING))
    if not all(isinstance(v, (numbers.Real, np.bool_)) for v in values):
        return array
    try:
        return array.astype(np.float64)
    except OverflowError:
        raise ValueError(f"{op}: {name} must fit into float64, got a larger number") from None


def _codes(op: str, name: str, labels: np.ndarray) -> np.ndarray:
    """Return int64 codes, equal for equal labels."""
    codes: dict[object, int] = {}
    values = labels.ravel().tolist()
    _refuse(op, name, values, MISSING)
    try:
        equal = all(bool(v == v) for v in values)
        found = [codes.setdefault(v, len(codes)) for v in values]
    except TypeError:
        raise TypeError(f"{op}: {name} must hold numbers or labels with a hash, got {labels.dtype}") from None
    if not equal:
        raise ValueError(f"{op}: {name} must be labels that equal themselves, got NaN")
    return np.array(found, np.int64).reshape(labels.shape)


def same(a: object, b: object) -> bool:
    """Whether two fields of a result are equal; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and same(a.detach().cpu().numpy(), b.detach().cpu().numpy())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b, equal_nan=True)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


@contextlib.contextmanager
def bar(total: int | None, unit: str, progress: bool) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances a bar by its argument; it does nothing without tqdm or `progress`."""
    with _progress.bar(total, unit, progress, delay=PATIENCE) as shown:
        yield (lambda done: None) if shown is None else shown.update
