"""The operations, one public function each."""

from .coupling import additive_coupling, affine_coupling, affine_coupling_packed
from .flow_head import flow_log_prob
from .fsq import codebook_usage, fsq, fsq_decode, residual_fsq
from .noise import normal, philox, sample_seeds, uniform

__all__ = [
    "additive_coupling",
    "affine_coupling",
    "affine_coupling_packed",
    "codebook_usage",
    "flow_log_prob",
    "fsq",
    "fsq_decode",
    "normal",
    "philox",
    "residual_fsq",
    "sample_seeds",
    "uniform",
]
