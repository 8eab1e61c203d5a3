"""The operations, one public function each."""

from .coupling import additive_coupling, affine_coupling, affine_coupling_packed
from .flow_head import flow_log_prob
from .fsq import codebook_usage, fsq, fsq_decode, residual_fsq
from .hsic import center_gram, cka, hsic, hsic_matrix
from .nhsic import nhsic
from .noise import normal, philox, sample_seeds, uniform
from .sde import denoising_loss, langevin_step, perturb, sde_step
from .sector import sector_counts

__all__ = [
    "additive_coupling",
    "affine_coupling",
    "affine_coupling_packed",
    "center_gram",
    "cka",
    "codebook_usage",
    "denoising_loss",
    "flow_log_prob",
    "fsq",
    "fsq_decode",
    "hsic",
    "hsic_matrix",
    "langevin_step",
    "nhsic",
    "normal",
    "perturb",
    "philox",
    "residual_fsq",
    "sample_seeds",
    "sde_step",
    "sector_counts",
    "uniform",
]
