"""Runs the files of interpreted/ in processes with TRITON_INTERPRET=1, under which nothing can be compiled.

A family without a file there is tested by its file in gpu/.
"""

from __future__ import annotations

import pytest

from . import interpreted_files


@pytest.mark.parametrize("family", interpreted_files.FILES)
def test_kernels_under_the_interpreter(family):
    pytest.importorskip("triton")
    done = interpreted_files.run(interpreted_files.FILES[family])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
