"""Fast methods of torch's spectral norm, layer by layer: iteration, division and gradient by one operator each.

All layers in one call would be one node of the graph, which a backward through some of them would free for the others;
`pyflow.nn.apply_spectral_norm` does so for a model that is called as a whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks as check
from .._operators import TENSORS
from ..ops.spectral import _normalize
from ..reference.spectral import FLOOR
from ._fast import Falls, fast

_SAYS = "power iteration and division by sigma in one pass, their gradient in another"


@fast(
    "torch.nn.utils.parametrizations._SpectralNorm",
    name="forward",
    says=_SAYS,
    gain="the time in spectral norm to be about half",
)
def _parametrized(self: Any, weight: Tensor) -> Any:
    if weight.dim() < 2:
        return Falls("a vector has no power iteration")
    if reason := _why_not(weight, self._u, self._v, self.eps):
        return Falls(reason)
    rounds = self.n_power_iterations if self.training else 0
    normalised, u, v = _normalised(weight, self.dim, self._u, self._v, rounds)
    if rounds:
        # in place, as in torch: DataParallel and DDP rely on it
        torch._foreach_copy_([self._u, self._v], [u, v])
    return normalised


@fast(
    "torch.nn.utils.spectral_norm.SpectralNorm",
    name="compute_weight",
    says="division by sigma in one pass, its gradient in another",
    gain="the time in spectral norm to be somewhat less",
)
def _hooked(self: Any, module: Any, do_power_iteration: bool) -> Any:
    weight, u, v = (getattr(module, self.name + end) for end in ("_orig", "_u", "_v"))
    if reason := _why_not(weight, u, v, self.eps):
        return Falls(reason)
    if do_power_iteration:
        # v comes before u, the other way round than in the operator
        matrix = self.reshape_weight_to_matrix(weight.detach())
        for _ in range(self.n_power_iterations):
            F.normalize(torch.mv(matrix.t(), u), dim=0, eps=self.eps, out=v)
            F.normalize(torch.mv(matrix, v), dim=0, eps=self.eps, out=u)
    return _normalised(weight, self.dim, u, v, 0)[0]


def _why_not(weight: Tensor, u: Tensor, v: Tensor, eps: float) -> str:
    if not all(each.dtype in check.FLOATS and each.layout is torch.strided for each in (weight, u, v)):
        return "its dtype or layout is not that of a kernel"
    if not all(type(each) in TENSORS for each in (weight, u, v)):
        return "its weight is a subclass of a tensor"
    if not weight.numel() or len({weight.device, u.device, v.device}) > 1:
        return "its weight is empty or elsewhere than u and v"
    # a norm between the two limits would make a difference
    return "its eps is larger than that of a kernel" if eps > FLOOR else ""


def _normalised(weight: Tensor, dim: int, u: Tensor, v: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    matrix = weight.movedim(dim, 0) if dim else weight
    scaled, u, v, _ = _normalize.pick("spectral_normalize", weight)([matrix], [u], [v], rounds)
    return scaled.movedim(0, dim) if dim else scaled, u, v
