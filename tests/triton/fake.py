"""A GPU driver without a GPU: kernels compile for sm_90, loading and launching are recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class FakeUtils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return object(), id(kernel), 32, 0, 1024


class FakeDriver:
    """Takes the place of Triton's CUDA driver; `launches` holds what each launch was given."""

    def __init__(self) -> None:
        self.utils = FakeUtils()
        self.launches: list[tuple] = []
        self.stream = 0
        self.recording = True

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*given: Any) -> None:
            # kernels outlive the driver that they were compiled for
            active = driver.active
            if active.recording:
                active.launches.append((source, *given))

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def fake_driver() -> Iterator[FakeDriver]:
    real, fake = driver._active, FakeDriver()
    driver.set_active(fake)
    try:
        yield fake
    finally:
        driver.set_active(real)
