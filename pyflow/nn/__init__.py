"""Invertible layers, every one `forward(x) -> (y, logdet)` and `inverse(y) -> (x, logdet)`, quantisers, and HSIC."""

from .coupling import AdditiveCoupling, AffineCoupling
from .fsq import FSQ
from .hsic import HSICBottleneck, HSICLoss
from .linear import ActNorm, Invertible1x1Conv, Scale
from .residual_fsq import GroupedResidualFSQ, ResidualFSQ
from .reversible import ReversibleSequential

__all__ = [
    "FSQ",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "GroupedResidualFSQ",
    "HSICBottleneck",
    "HSICLoss",
    "Invertible1x1Conv",
    "ResidualFSQ",
    "ReversibleSequential",
    "Scale",
]
