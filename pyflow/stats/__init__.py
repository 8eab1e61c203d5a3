"""Statistics on samples: arrays or tensors in, plain results out."""

from .compare import RepresentationComparison, compare_representations
from .hsic import HSIC, hsic
from .hsic_test import HSICTest, hsic_test

__all__ = [
    "HSIC",
    "HSICTest",
    "RepresentationComparison",
    "compare_representations",
    "hsic",
    "hsic_test",
]
