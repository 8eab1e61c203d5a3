"""Normalising flows: exact log-likelihood, exact inverse, sampling in one pass."""

from .autoregressive import IAF, MAF
from .fused import fuse
from .glow import Glow
from .images import bits_per_dim, dequantize
from .nice import NICE
from .nsf import NSF
from .realnvp import RealNVP

__all__ = ["IAF", "MAF", "NICE", "NSF", "Glow", "RealNVP", "bits_per_dim", "dequantize", "fuse"]
