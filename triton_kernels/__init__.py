"""Triton kernels and their launchers, a module per op family; names and arguments match the operator schemas."""
