"""The operations, one public function each."""

from .coupling import additive_coupling, affine_coupling, affine_coupling_packed
from .flow_head import flow_log_prob

__all__ = ["additive_coupling", "affine_coupling", "affine_coupling_packed", "flow_log_prob"]
