"""Fixtures of the quantisers' tests."""

from __future__ import annotations

import pytest

import pyflow


@pytest.fixture
def peer():
    return pytest.importorskip("vector_quantize_pytorch")


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    with pyflow.backend(request.param):
        yield request.param
