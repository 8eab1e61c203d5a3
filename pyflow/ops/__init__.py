"""The operations, one public function each."""

from .coupling import additive_coupling, affine_coupling, affine_coupling_packed

__all__ = ["additive_coupling", "affine_coupling", "affine_coupling_packed"]
