"""Every operator's schema and tags, in one place.

An operator is opaque to Inductor: its bits are the same eager and compiled. The integers `scale_map`, `packing`,
`prior`, `variant` and `distance` index the tuples below, as do `kind` and `purpose` of noise; `map_arg` is the one
constant a scale map uses (clamp, eps or c). A `*_backward` operator returns an empty tensor for a gradient it was not
asked for (shift_dtype: the dtype of shift, or None where its gradient is that of y or of x).

Seeds are int64, 0-d or one per sample; `step` and what else changes from call to call are tensors, 0-d on the CPU where
the caller gave a number, so that nothing is compiled anew for another value.

- fsq, residual_fsq take and return their channels in front; `dim` of fsq_decode is where they go.
- sde_step_backward sums the gradients of a, b and c, (3, rows), where it is given x; denoising_loss without std takes
  pred for the noise.
- hsic_sums takes variables, (B, n, dim) each, and what they are scaled by, (B, variables), one over their bandwidths;
  `pairs` lists which of them are multiplied, `part` of `parts` which tiles are visited. Of their matrices less a shift
  it returns row sums and sums of products, and that shift, (B, variables).
  hsic_permuted takes symmetric matrices.
- gan_qp_loss returns the distances too, all that its backward needs of the samples.
- spectral_normalize returns the normalised weights, u, v and sigmas, one list after the other; a vector's u and v are
  empty.
"""

from __future__ import annotations

import torch

SCALE_MAPS = ("exp", "sigmoid", "sigmoid_inv", "softplus", "tanh", "atan", "softsign")
PACKINGS = ("shift_scale", "scale_shift", "interleaved")
PRIORS = ("gaussian", "logistic")
NOISES = ("uniform", "normal")
# what a draw is for: the top byte of a stream's last counter word, so that no two of them share a word
PURPOSES = ("noise", "corrector", "prior", "accept", "data", "permutation", "monte_carlo")
DISTANCES = ("l1", "l2")
FSQ_VARIANTS = ("vqp", "paper", "symmetric", "sigmoid", "hard", "symmetric_hard")

# kernels of HSIC; a linear one is polynomial of degree 1
HSIC_KERNELS = ("rbf", "laplacian", "polynomial", "delta", "precomputed")

_MAP = "int scale_map, float map_arg, bool shift_first, bool inverse, int event_dims"
_GRAMS = "int[] kernels, int[] degrees, int[] pairs, bool allow_tf32"

SCHEMAS = {
    "additive_coupling": "(Tensor x, Tensor shift, Tensor? mask, bool inverse) -> Tensor",
    "affine_coupling": f"(Tensor x, Tensor shift, Tensor scale, Tensor? mask, {_MAP}) -> (Tensor, Tensor)",
    "affine_coupling_backward": (
        "(Tensor? grad_y, Tensor? grad_logdet, Tensor x, Tensor? shift, Tensor scale, Tensor? mask, "
        f"{_MAP}, ScalarType? shift_dtype) -> (Tensor, Tensor, Tensor)"
    ),
    "affine_coupling_packed": (
        f"(Tensor x, Tensor params, Tensor? mask, int packing, int dim, {_MAP}) -> (Tensor, Tensor)"
    ),
    "affine_coupling_packed_backward": (
        "(Tensor? grad_y, Tensor? grad_logdet, Tensor x, Tensor params, Tensor? mask, "
        f"int packing, int dim, {_MAP}) -> (Tensor, Tensor)"
    ),
    "flow_log_prob": "(Tensor h, Tensor? log_scale, int prior) -> Tensor",
    "flow_log_prob_backward": "(Tensor grad, Tensor h, Tensor? log_scale, int prior) -> (Tensor, Tensor)",
    "philox": "(Tensor counter, Tensor key) -> Tensor",
    "noise": "(SymInt[] size, Tensor seed, Tensor step, int kind, int purpose, ScalarType dtype) -> Tensor",
    "sde_step": (
        "(Tensor x, Tensor? score, Tensor a, Tensor? b, Tensor c, Tensor? seed, Tensor? step, Tensor? noise, "
        "int purpose, bool return_mean) -> (Tensor, Tensor)"
    ),
    "sde_step_backward": (
        "(Tensor? grad, Tensor? grad_mean, Tensor? x, Tensor? score, Tensor a, Tensor? b, Tensor c, Tensor? seed, "
        "Tensor? step, Tensor? noise, int purpose, ScalarType? x_dtype, ScalarType? score_dtype, "
        "ScalarType? noise_dtype, bool f64) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "denoising_loss": "(Tensor pred, Tensor? std, Tensor seed, Tensor step) -> Tensor",
    "denoising_loss_backward": (
        "(Tensor grad, Tensor pred, Tensor? std, Tensor seed, Tensor step) -> (Tensor, Tensor)"
    ),
    "langevin_squares": "(Tensor score, Tensor? seed, Tensor? step, Tensor? noise, int purpose) -> Tensor",
    "sector_counts": (
        "(Tensor thresholds, SymInt points, SymInt trials, Tensor seed, Tensor step, int purpose) -> Tensor"
    ),
    "mala_accept": (
        "(Tensor z, Tensor z_new, Tensor u, Tensor u_new, Tensor grad, Tensor grad_new, Tensor alpha, Tensor seed, "
        "Tensor step) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "grad_norm_penalty": "(Tensor grad) -> Tensor",
    "fsq": "(Tensor z, int[] levels, int variant, bool return_indices) -> (Tensor, Tensor)",
    "fsq_backward": "(Tensor grad, Tensor z, int[] levels, int variant) -> Tensor",
    "fsq_decode": "(Tensor indices, int[] levels, int variant, int dim, ScalarType dtype) -> Tensor",
    "residual_fsq": "(Tensor x, int[] levels, int variant, int stages, Tensor? active) -> (Tensor, Tensor)",
    "residual_fsq_backward": (
        "(Tensor grad, Tensor x, int[] levels, int variant, int stages, Tensor? active) -> Tensor"
    ),
    "hsic_sums": f"(Tensor[] z, Tensor scale, {_GRAMS}, int part, int parts) -> (Tensor, Tensor, Tensor)",
    "hsic_sums_backward": f"(Tensor grad_rows, Tensor grad_cross, Tensor[] z, Tensor scale, {_GRAMS}) -> Tensor[]",
    "hsic_permuted": "(Tensor gram_x, Tensor gram_y, Tensor permutations) -> Tensor",
    "center_gram": "(Tensor gram) -> Tensor",
    "center_gram_": "(Tensor(a!) gram) -> ()",
    "gan_qp_loss": (
        "(Tensor t_real, Tensor t_fake, Tensor x_real, Tensor x_fake, Tensor? z_real, Tensor? z_fake, float lam, "
        "float eps, int distance) -> (Tensor, Tensor)"
    ),
    "gan_qp_loss_backward": (
        "(Tensor grad, Tensor t_real, Tensor t_fake, Tensor d, float lam, float eps) -> (Tensor, Tensor)"
    ),
    "spectral_normalize": "(Tensor[] weights, Tensor[] u, Tensor[] v, int n_iter) -> Tensor[]",
    "spectral_normalize_backward": (
        "(Tensor[] grads, Tensor[] grad_sigmas, Tensor[] weights, Tensor[] u, Tensor[] v, Tensor[] sigmas) -> Tensor[]"
    ),
}

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define(namespace: str) -> torch.library.Library:
    """A library of this name with every schema."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=TAGS)
    return library


library = define("pyflow")
