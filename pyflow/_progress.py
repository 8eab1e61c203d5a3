"""Progress bars of tqdm, which is optional: without it loops run and print nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from typing import NoReturn

    from tqdm import tqdm

T = TypeVar("T")


def tracked(values: Iterable[T], unit: str, progress: bool, *, mininterval: float = 0.1) -> Iterable[T]:
    """Return `values`, with a bar that advances by one per value if `progress` is true and tqdm is installed."""
    tqdm = _tqdm() if progress else None
    return values if tqdm is None else tqdm(values, unit=unit, dynamic_ncols=True, mininterval=mininterval)


@contextlib.contextmanager
def bar(
    total: int | None, unit: str, progress: bool, *, desc: str | None = None, mininterval: float = 0.1, delay: float = 0
) -> Iterator[tqdm[NoReturn] | None]:
    """Yield a bar that the caller updates, or None if `progress` is false or tqdm is not installed.

    Args:
        mininterval: least time between two updates on the screen, in seconds.
        delay: time before the bar appears, in seconds.
    """
    tqdm = _tqdm() if progress else None
    if tqdm is None:
        yield None
        return
    with tqdm(total=total, unit=unit, desc=desc, dynamic_ncols=True, mininterval=mininterval, delay=delay) as shown:
        yield shown


def _tqdm() -> type[tqdm] | None:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
