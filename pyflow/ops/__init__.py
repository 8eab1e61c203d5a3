"""The operations: one public function each."""

from .center import center_gram
from .coupling import additive_coupling, affine_coupling, affine_coupling_packed
from .energy import energy_and_grad, energy_loss, grad_norm_penalty, mala_accept, mala_propose, mala_step
from .flow_head import flow_log_prob
from .flow_program import flow_program
from .fsq import codebook_usage, fsq, fsq_decode, residual_fsq
from .gan_qp import gan_qp_generator_loss, gan_qp_loss
from .hsic import cka, hsic, hsic_matrix
from .nhsic import nhsic
from .noise import normal, philox, sample_seeds, uniform
from .sde import denoising_loss, langevin_step, perturb, sde_step
from .sector import sector_counts
from .spectral import spectral_normalize
from .spline import rq_spline

__all__ = [
    "additive_coupling",
    "affine_coupling",
    "affine_coupling_packed",
    "center_gram",
    "cka",
    "codebook_usage",
    "denoising_loss",
    "energy_and_grad",
    "energy_loss",
    "flow_log_prob",
    "flow_program",
    "fsq",
    "fsq_decode",
    "gan_qp_generator_loss",
    "gan_qp_loss",
    "grad_norm_penalty",
    "hsic",
    "hsic_matrix",
    "langevin_step",
    "mala_accept",
    "mala_propose",
    "mala_step",
    "nhsic",
    "normal",
    "perturb",
    "philox",
    "residual_fsq",
    "rq_spline",
    "sample_seeds",
    "sde_step",
    "sector_counts",
    "spectral_normalize",
    "uniform",
]
