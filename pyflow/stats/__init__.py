"""Statistics on samples: arrays or tensors in, plain results out."""

from .hsic import HSIC, hsic
from .hsic_test import HSICTest, hsic_test

__all__ = ["HSIC", "HSICTest", "hsic", "hsic_test"]
