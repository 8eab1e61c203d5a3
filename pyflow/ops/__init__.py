"""The operations, one public function each."""

from .coupling import additive_coupling, affine_coupling, affine_coupling_packed
from .flow_head import flow_log_prob
from .fsq import codebook_usage, fsq, fsq_decode, residual_fsq

__all__ = [
    "additive_coupling",
    "affine_coupling",
    "affine_coupling_packed",
    "codebook_usage",
    "flow_log_prob",
    "fsq",
    "fsq_decode",
    "residual_fsq",
]
