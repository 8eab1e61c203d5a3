"""Triton kernels and their launchers, one module per op family; launchers have the names and arguments of
the operator schemas.
"""
