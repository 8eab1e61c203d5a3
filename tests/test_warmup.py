"""`pyflow.warmup` runs every operator, those of a new family included."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyflow
from pyflow import _backend
from pyflow._operators import OPERATORS

# without a mask the public function is torch's own addition; the others are variants that few callers need
LEFT_OUT = {"additive_coupling", "center_gram_", "hsic_permuted"}


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "pyflow":
            self.names.add(operator._schema.name.partition("::")[2])
        return operator(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_here_is_one_sentence():
    with pytest.raises(ValueError, match=r"^warmup: device must be available here, got cuda$"):
        pyflow.warmup()


@pytest.mark.skipif(bool(_backend.cpu_missing), reason=str(_backend.cpu_missing))
def test_every_operator_runs():
    with Recorded() as recorded:
        pyflow.warmup("cpu", dtypes=[torch.float32], scale_maps=["tanh"], levels=[(5, 3)])
    assert set(OPERATORS) - recorded.names == LEFT_OUT
