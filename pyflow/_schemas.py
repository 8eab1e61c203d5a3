"""Every operator's schema and tags, in one place.

An operator is opaque to Inductor: its bits are the same eager and compiled. The integers `scale_map`,
`packing`, `prior` and `variant` index the tuples below; `map_arg` is the one constant a scale map uses
(clamp, eps or c). A `*_backward` operator returns an empty tensor for a gradient it was not asked for
(shift_dtype: the dtype of shift, or None where its gradient is that of y or of x). `fsq` and `residual_fsq`
take and return their channels in front; `dim` of `fsq_decode` is where they go. `kind` and `purpose` of noise
index theirs. Seeds are int64, 0-d or one per sample; `step` and what else changes from call to call are tensors,
0-d on the CPU where the caller gave a number, so that nothing is compiled anew for another value. `sde_step_backward` sums the gradients of a, b and c, (3, rows),
where it is given x; `denoising_loss` without std takes pred for the noise. `hsic_sums` takes several variables side by
side in z, (B, n, sum of dims), and what they are scaled by, (B, variables), one over their bandwidths; `pairs` lists
which of them are multiplied, `part` of `parts` says which tiles are visited. It returns, of their matrices less a
shift, row sums and sums of products, and (B, variables) that shift. `hsic_permuted` takes symmetric matrices.
"""

from __future__ import annotations

import torch

SCALE_MAPS = ("exp", "sigmoid", "sigmoid_inv", "softplus", "tanh", "atan", "softsign")
PACKINGS = ("shift_scale", "scale_shift", "interleaved")
PRIORS = ("gaussian", "logistic")
NOISES = ("uniform", "normal")
# what a draw is for: the top byte of a stream's last counter word, so that no two of them share a word
PURPOSES = ("noise", "corrector", "prior", "accept", "data", "permutation", "monte_carlo")
FSQ_VARIANTS = ("vqp", "paper", "symmetric", "sigmoid", "hard", "symmetric_hard")

# kernels of HSIC; a linear one is polynomial of degree 1
HSIC_KERNELS = ("rbf", "laplacian", "polynomial", "delta", "precomputed")

_MAP = "int scale_map, float map_arg, bool shift_first, bool inverse, int event_dims"
_GRAMS = "int[] dims, int[] kernels, int[] degrees, int[] pairs, bool allow_tf32"

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
    "fsq": "(Tensor z, int[] levels, int variant, bool return_indices) -> (Tensor, Tensor)",
    "fsq_backward": "(Tensor grad, Tensor z, int[] levels, int variant) -> Tensor",
    "fsq_decode": "(Tensor indices, int[] levels, int variant, int dim, ScalarType dtype) -> Tensor",
    "residual_fsq": "(Tensor x, int[] levels, int variant, int stages, Tensor? active) -> (Tensor, Tensor)",
    "residual_fsq_backward": (
        "(Tensor grad, Tensor x, int[] levels, int variant, int stages, Tensor? active) -> Tensor"
    ),
    "hsic_sums": f"(Tensor z, Tensor scale, {_GRAMS}, int part, int parts) -> (Tensor, Tensor, Tensor)",
    "hsic_sums_backward": f"(Tensor grad_rows, Tensor grad_cross, Tensor z, Tensor scale, {_GRAMS}) -> Tensor",
    "hsic_permuted": "(Tensor gram_x, Tensor gram_y, Tensor permutations) -> Tensor",
    "center_gram": "(Tensor gram) -> Tensor",
    "center_gram_": "(Tensor(a!) gram) -> ()",
}

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define(namespace: str) -> torch.library.Library:
    """A library of this name with every schema."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=TAGS)
    return library


library = define("pyflow")
