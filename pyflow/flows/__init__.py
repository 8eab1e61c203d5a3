"""Normalising flows: exact log-likelihood, exact inverse, sampling in one pass."""

from .glow import Glow
from .images import bits_per_dim, dequantize
from .nice import NICE
from .realnvp import RealNVP

__all__ = ["NICE", "Glow", "RealNVP", "bits_per_dim", "dequantize"]
