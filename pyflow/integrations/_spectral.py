"""Fast methods of torch's spectral norm, layer by layer: iteration, division and gradient by one operator each.

All layers in one call would be one node of the graph, which a backward through some of them would free for the others;
`pyflow.nn.apply_spectral_norm` does so for a model that is called as a whole. On a CPU small weights are left to torch,
whose operators cost less than a call of ours with a cold cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks as check
from .._operators import TENSORS
from .._torch import SPECTRAL_NORM, under_transform
from ..ops.spectral import _normalize
from ..reference.spectral import FLOOR
from ._fast import Falls, fast, has_its_own

# fewer elements are not faster on a CPU (2-core Zen 4, in training steps that evict the caches)
FEWEST = {"parametrization": 2**18, "hook": 2**20}
# what runs in one pass
_METHODS = ("_power_method", "_reshape_weight_to_matrix", "reshape_weight_to_matrix")


@fast(
    SPECTRAL_NORM,
    name="forward",
    says="power iteration and division by sigma in one pass, their gradient in another; on a CPU for large weights",
    gain="1.2 times as fast for a weight of 295,000 elements, 1.8 for 590,000, 3.9 for 2,400,000 (one core)",
)
def _parametrized(self: Any, weight: Tensor) -> Any:
    if weight.dim() < 2:
        return Falls("a vector has no power iteration")
    if reason := _why_not(self, "parametrization", weight, self._u, self._v):
        return Falls(reason)
    rounds = self.n_power_iterations if self.training else 0
    if rounds and under_transform():
        return Falls("a torch.func transform allows no copy into u and v")
    normalised, u, v = _normalised(weight, self.dim, self._u, self._v, rounds)
    if rounds:
        # in place, as in torch: DataParallel and DDP rely on it
        with torch.no_grad():
            self._u.copy_(u)
            self._v.copy_(v)
    return normalised


@fast(
    "torch.nn.utils.spectral_norm.SpectralNorm",
    name="compute_weight",
    says="division by sigma in one pass, its gradient in another; on a CPU for large weights",
    gain="1.9 times as fast for a weight of 1,200,000 elements, 4.2 for 2,400,000 (one core)",
)
def _hooked(self: Any, module: Any, do_power_iteration: bool) -> Any:
    weight, u, v = (getattr(module, self.name + end) for end in ("_orig", "_u", "_v"))
    if reason := _why_not(self, "hook", weight, u, v):
        return Falls(reason)
    if do_power_iteration:
        # v comes before u, the other way round than in the operator
        matrix = self.reshape_weight_to_matrix(weight.detach())
        for _ in range(self.n_power_iterations):
            F.normalize(torch.mv(matrix.t(), u), dim=0, eps=self.eps, out=v)
            F.normalize(torch.mv(matrix, v), dim=0, eps=self.eps, out=u)
    return _normalised(weight, self.dim, u, v, 0)[0]


def _why_not(self: Any, form: str, weight: Tensor, u: Tensor, v: Tensor) -> str:
    if weight.is_cpu and weight.numel() < FEWEST[form]:
        return "its weight is small"
    if has_its_own(self, _METHODS):
        return "it has methods of its own"
    for each in (weight, u, v):
        if each.dtype not in check.FLOATS or each.layout is not torch.strided or type(each) not in TENSORS:
            return "its dtype, layout or class is not that of a kernel"
    if not weight.numel() or not weight.device == u.device == v.device:
        return "its weight is empty or elsewhere than u and v"
    # a norm between the two limits would make a difference
    return "its eps is larger than that of a kernel" if self.eps > FLOOR else ""


def _normalised(weight: Tensor, dim: int, u: Tensor, v: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    matrix = weight.movedim(dim, 0) if dim else weight
    scaled, u, v, _ = _normalize.pick("spectral_normalize", weight)([matrix], [u], [v], rounds)
    return scaled.movedim(0, dim) if dim else scaled, u, v
