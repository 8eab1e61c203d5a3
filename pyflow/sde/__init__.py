"""Diffusion models as SDEs: schedules, reverse-time samplers with one fused pass per step, log-likelihood."""

from ..flows.images import bits_per_dim
from .equations import SDE, VESDE, VPSDE, SubVPSDE
from .likelihood import log_likelihood
from .marginals import from_marginals
from .sampling import Step, make_step, sample

__all__ = [
    "SDE",
    "VESDE",
    "VPSDE",
    "Step",
    "SubVPSDE",
    "bits_per_dim",
    "from_marginals",
    "log_likelihood",
    "make_step",
    "sample",
]
