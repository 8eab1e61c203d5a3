"""Triton kernels and their launchers, one module per op family, named and called like the operators' schemas."""
