"""Modules: invertible layers with `forward(x) -> (y, logdet)` and `inverse(y) -> (x, logdet)`, quantisers, HSIC losses,
and spectral and weight normalisation of any model."""

from .autoregressive import MaskedAutoregressive
from .coupling import AdditiveCoupling, AffineCoupling, SplineCoupling
from .fsq import FSQ
from .grouped_residual_fsq import GroupedResidualFSQ
from .hsic import HSICBottleneck, HSICLoss
from .linear import ActNorm, Invertible1x1Conv, Scale
from .residual_fsq import ResidualFSQ
from .reversible import ReversibleSequential
from .spectral import apply_spectral_norm, apply_weight_norm, remove_spectral_norm, remove_weight_norm

__all__ = [
    "FSQ",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "GroupedResidualFSQ",
    "HSICBottleneck",
    "HSICLoss",
    "Invertible1x1Conv",
    "MaskedAutoregressive",
    "ResidualFSQ",
    "ReversibleSequential",
    "Scale",
    "SplineCoupling",
    "apply_spectral_norm",
    "apply_weight_norm",
    "remove_spectral_norm",
    "remove_weight_norm",
]
