"""Invertible layers. Every one maps `forward(x) -> (y, logdet)` and `inverse(y) -> (x, logdet)`."""

from .coupling import AdditiveCoupling, AffineCoupling
from .linear import ActNorm, Invertible1x1Conv, Scale
from .reversible import ReversibleSequential

__all__ = ["ActNorm", "AdditiveCoupling", "AffineCoupling", "Invertible1x1Conv", "ReversibleSequential", "Scale"]
