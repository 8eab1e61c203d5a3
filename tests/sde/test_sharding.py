"""A batch split over processes is the batch of one process, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyflow.testing import assert_same_bits


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_1_2_and_4_processes_give_the_same_samples(tmp_path):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded.py")), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one = torch.load(tmp_path / "1.pt")
    assert one.shape == (3, 8, 1, 8, 8) and one.isfinite().all()
    for world in (2, 4):
        assert_same_bits(torch.load(tmp_path / f"{world}.pt"), one, f"{world} processes")
