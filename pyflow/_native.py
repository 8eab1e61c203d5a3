"""The functions of _C.so that are no operators."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

_library: ctypes.CDLL | None = None

_TYPES = {
    "pyflow_sector_probability": (
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool, ctypes.c_bool, ctypes.c_void_p],
        ctypes.c_bool,
    ),
    "pyflow_multiply_adds": ([ctypes.c_int64], ctypes.c_int64),
    **{f"pyflow_{fact}": ([], ctypes.c_char_p)
       for fact in ("isa", "compiled_isas", "supported_isas", "cpu_features", "compiler")},
}  # fmt: skip


def load(path: Path) -> None:
    """Load _C.so; it registers its operators if this CPU runs one of its instruction sets. Raises OSError."""
    global _library
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    for name, (arguments, result) in _TYPES.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise OSError(f"{path} is of another version of pyflow: build it again") from error
        function.argtypes, function.restype = arguments, result
    _library = library


def isa() -> str | None:
    """Return the instruction set in use; None where none of the compiled ones runs on this CPU."""
    return _fact("isa") or None


def compiled_isas() -> list[str]:
    """Return the instruction sets of this build."""
    return _listed("compiled_isas")


def supported_isas() -> list[str]:
    """Return those of `compiled_isas` that run on this CPU."""
    return _listed("supported_isas")


def cpu_features() -> list[str]:
    """Return the features of this CPU that matter here."""
    return _listed("cpu_features")


def compiler() -> str:
    """Return the version of the C++ compiler; empty without compiled kernels."""
    return _fact("compiler")


def sector_probability(
    n: npt.NDArray[np.int64], theta: npt.NDArray[np.float64], complement: bool, log: bool
) -> npt.NDArray[np.float64]:
    """Probability that n points of a disc lie inside one sector of angle theta, for flat arrays of one size."""
    library = _kernels()
    n, theta = np.ascontiguousarray(n, np.int64), np.ascontiguousarray(theta, np.float64)
    out = np.empty(n.size)
    if not library.pyflow_sector_probability(
        n.ctypes.data, theta.ctypes.data, n.size, complement, log, out.ctypes.data
    ):
        raise MemoryError("sector_probability: out of memory")
    return out


def multiply_adds(rounds: int) -> int:
    """Run rounds of float32 multiply-adds in registers of the calling thread, without the GIL; return how many."""
    return _kernels().pyflow_multiply_adds(rounds)


def _kernels() -> ctypes.CDLL:
    if _library is None or isa() is None:
        raise RuntimeError("this needs the compiled kernels; `pyflow info` says why they do not run here")
    return _library


def _fact(name: str) -> str:
    return ((getattr(_library, f"pyflow_{name}")() if _library else None) or b"").decode()


def _listed(name: str) -> list[str]:
    return [part for part in _fact(name).split(",") if part]
