"""Statistics on samples: arrays or tensors in, plain results out."""

from .hsic_test import HSICTest, hsic_test

__all__ = ["HSICTest", "hsic_test"]
