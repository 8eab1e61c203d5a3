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
# kernels that do not change, up to centring, if a constant is added to all rows
TRANSLATED = ("rbf", "laplacian", "linear")


def check_kernels(op: str, specs: tuple[KernelSpec, KernelSpec]) -> None:
    """Check the kernels before samples are converted, which depends on them."""
    for name, spec in zip("xy", specs, strict=True):
        spec.check(op, name)


def samples(op: str, name: str, value: object, kernel: str) -> Tensor:
    """Return samples as rows of a tensor (n, d), from an array, a list, a table or a tensor; (n,) is one column.

    Integers become float64, large ones less a constant. The kernel "delta" keeps integers, and replaces labels of other
    types by integers.
    """
    if not isinstance(value, Tensor):
        if kernel == "delta":
            array = array_of(op, name, value)
        else:
            array = numbers_of(op, name, value, translate=kernel in TRANSLATED)
        if kernel == "delta" and array.dtype.kind in "OSTUMm":
            array = _codes(op, name, array)
        value = tensor_of(op, name, array)
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
    if kernel in TRANSLATED and value.dtype in (torch.int64, torch.uint64) and value.numel():
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
    # pandas' tables and columns
    isna = getattr(value, "isna", None)
    if callable(isna) and (missing := np.argwhere(np.asarray(isna()))).size:
        row, *column = missing[0].tolist()
        raise ValueError(f"{op}: {name} must have no missing values, got one in row {row}{_column(value, *column)}")
    try:
        return np.asarray(value)
    except ValueError:
        raise ValueError(f"{op}: {name} must have rows of one length, got others") from None


def numbers_of(
    op: str, name: str, value: object, kind: type = numbers.Real, dtype: type = np.float64, rule: str = "hold numbers",
    translate: bool = False,
) -> np.ndarray:  # fmt: skip
    """Return an array; one of objects (such as a table of mixed columns) must hold numbers, and is converted.

    With `translate`, large integers keep their differences: a constant is subtracted from each column of them.
    """
    array = array_of(op, name, value)
    if array.dtype.kind != "O" or not (array.ndim or isinstance(array.item(), kind)):
        return array
    values = array.ravel().tolist()
    _refuse(op, name, values, ("NoneType", *MISSING))
    wrong = next((i for i, v in enumerate(values) if not isinstance(v, (kind, np.bool_))), None)
    if wrong is not None:
        column = _column(value, wrong % array.shape[1]) if array.ndim == 2 else ""
        raise TypeError(f"{op}: {name} must {rule}, got {type(values[wrong]).__name__}{column}")
    try:
        return (_translated(array) if translate else array).astype(dtype)
    except OverflowError:
        raise ValueError(f"{op}: {name} must fit into {np.dtype(dtype)}, got a larger number") from None


def _translated(array: np.ndarray) -> np.ndarray:
    """Return an array of objects, with the least integer subtracted from columns of integers that float64 rounds."""
    if not array.size:
        return array
    columns = array.reshape(len(array), -1).T
    return np.array([_less_constant(column) for column in columns], object).T.reshape(array.shape)


def _less_constant(column: np.ndarray) -> list:
    values = column.tolist()
    if not all(isinstance(v, numbers.Integral) for v in values) or all(abs(int(v)) <= 2**53 for v in values):
        return values
    low = min(map(int, values))
    return [int(v) - low for v in values]


def tensor_of(op: str, name: str, array: np.ndarray) -> Tensor:
    """Return a tensor with a copy of the numbers of an array."""
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(f"{op}: {name} must hold numbers, got {array.dtype}")
    # torch reads native byte order only
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))


def _column(table: object, *number: int) -> str:
    """Return the name of a column of a table, for an error text; nothing without a number or names."""
    columns = getattr(table, "columns", None)
    return f" of column {list(columns)[number[0]]!r}" if number and columns is not None else ""


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


def _codes(op: str, name: str, labels: np.ndarray) -> np.ndarray:
    """Return int64 codes, equal for equal labels."""
    if labels.dtype.kind in "Mm" and np.isnat(labels).any():
        raise ValueError(f"{op}: {name} must have no missing values, got NaT")
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
