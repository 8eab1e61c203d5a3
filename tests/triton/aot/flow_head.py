"""Launches of the flow head."""

from __future__ import annotations

import torch

from pyflow._schemas import PRIORS
from pyflow.triton_kernels import flow_head

from . import BF16, F32, TARGETS, dense, dtypes_of, recorded

BOUNDED = {"flow_head.sum_blocks": "blocks: at most 512"}


def head(h, log_scale, prior):
    with recorded() as launches:
        flow_head.flow_log_prob(h, log_scale, prior)
        flow_head.flow_log_prob_backward(torch.empty(h.shape[0]), h, log_scale, prior)
    return launches


def cases():
    table = {}
    for target in TARGETS:
        for prior in range(len(PRIORS)):
            for dtype in dtypes_of(target, 2):
                name = f"{target}-{str(dtype)[6:]}-head{prior}"
                table[name] = head(*dense(dtype, 1), torch.empty(392, dtype=dtype), prior)
    table["sm_90-float32-no-log-scale"] = head(*dense(F32, 1), None, 0)
    table["sm_90-mixed-head"] = head(*dense(F32, 1), torch.empty(392, dtype=BF16), 1)
    return table


def large(shape):
    return head(*dense(F32, 1, shape), torch.empty(shape[1]), 0)
