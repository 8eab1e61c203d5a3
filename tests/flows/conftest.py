import pytest
import torch

from pyflow.flows import RealNVP

from .ours import data, perturbed


@pytest.fixture
def realnvp():
    torch.manual_seed(0)
    x = data(16, 4)
    return perturbed(RealNVP(4, couplings=3, hidden=(8, 7)), x), x
