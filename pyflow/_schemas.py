"""Schemas and tags of every operator.

An operator is opaque to Inductor, so that its result has the same bits in eager and compiled code.

Common arguments and results:

- Integer arguments in `NAMED` and the entries of `kernels` are indices into the tuples below.
- `seed` is int64, 0-d or (B,) with one stream per sample. `step` is 0-d int64. Values that change from call to call
  (seed, step, coefficients) are tensors, on the CPU if the caller passed a number: a new value does not recompile.
- The compute dtype is float64 for float64 inputs, else float32. "like x" means the shape, dtype and strides of x.
- A `*_backward` operator takes the output gradients first (None: zero), `grad` of the first output or `grad_<output>`,
  then arguments and outputs of its forward by their names. It returns one `grad_<argument>` per differentiable input,
  or an empty tensor in place of a gradient that was not requested. `_autograd.py` reads these names.

Couplings (formulas: `pyflow.ops.affine_coupling`):

- additive_coupling: x, shift and an optional bool mask (true: the element passes through), all of one shape
  -> y like x.
- affine_coupling: likewise with scale -> y like x, and logdet of shape x.shape[:-event_dims] in the compute dtype.
  `map_arg` is the constant of the scale map (clamp, eps or c); `shift_first` adds the shift before scaling.
- affine_coupling_backward -> grad_x, grad_shift, grad_scale. `shift` may be None if the formula does not contain it.
  `shift_dtype` is the dtype of grad_shift, or None if the caller reuses grad_y or grad_x as grad_shift.
- affine_coupling_packed: params holds shift and scale in its dim `dim` -> y, logdet; backward -> grad_x, grad_params.
- flow_log_prob: h (B, ...) and log_scale of shape h.shape[1:] -> (B,) prior log-density plus log-determinant.

Splines (formulas: `pyflow.ops.rq_spline`):

- rq_spline: x and params of shape x.shape + (P,), widths, heights and slopes of `bins` bins -> y like x, and logdet as
  affine_coupling. `tails` holds indices into TAILS: none (the domain is [0, 1], P = 3 bins + 1), one for all features
  (P = 3 bins - 1 or 3 bins), or one per feature of the last dim of x (P = 3 bins + 1). `bounds` (D,), in the compute
  dtype, replaces `bound`. `form` is the variant. backward -> grad_x, grad_params.

Whole flows:

- flow_program: x (B, D), an optional context (R, C), of which row r of x has row r // repeats % R, and the weights that
  `code`, the text of a `pyflow.program.Program`, names; float32 or float64, all of one dtype -> y (B, outputs) and
  logdet (B,).
  backward -> gradients of x, the context and each of the weights in one list, empty where not needed.

Noise and steps of SDEs:

- philox: counter (..., 4) and key (..., 2), int64 words -> (..., 4) random words.
- noise -> contiguous tensor of the given size and dtype, on the device of seed.
- sde_step: x, score (B, ...), coefficients a, b, c 0-d or (B,), and either seed and step or noise
  -> a x + b score + c z like x, and the mean a x + b score (empty unless `return_mean`).
- sde_step_backward -> gradients of x, score and noise in the given dtypes (None: not requested), and (3, B) gradients
  of a, b and c per sample (empty if x is None). `f64`: x is float64.
- denoising_loss: pred (B, ...) is the score, or the predicted noise if std is None -> (B,) losses;
  backward -> grad_pred and (B,) gradients of std.
- langevin_squares -> (2, B) squared norms of score and noise.
- mala_accept: z, proposals, energies (B,), gradients, alpha -> z, u and grad after acceptance, and accepted (B,) bool.
- grad_norm_penalty: (B, ...) -> (B,) squared norms.
- sector_counts: float64 thresholds -> int64 counts of the same shape: trials with a largest gap >= the threshold.

FSQ:

- fsq: z (d, ...) with the channels first -> codes like z, indices (...) int32 or int64 (empty unless
  `return_indices`).
- fsq_decode: indices (...) -> codes with the d channels inserted at `dim`.
- residual_fsq: x (d, ...) -> the sum of all stages like x, and indices (..., stages). `active` is a 0-d count of stages
  that are used.

HSIC:

- hsic_sums: M variables z, each (B, n, d_m), and scale (B, M), one over the bandwidths, or the shifts of
  polynomial kernels, whose degrees are in `degrees`; `pairs` is a flat list of variable indices, two per product. K is
  a kernel matrix minus its shift (0 or 1 for kernels of distances), with a zero diagonal. -> row sums of every K
  (B, M, n), sums of elementwise products of the pairs (B, P), and the shifts (B, M), all float64. `part` of `parts`
  restricts the tiles; the sums of all parts add up.
- hsic_sums_backward -> one gradient per variable, computed for all tiles.
- hsic_terms: results of hsic_sums and the diagonals (B, M, n) of the kernel matrices -> more and less (B, P) with
  HSIC = (more - less) / divisor for each pair, both positive for a variable with itself, and the totals of the row sums
  (B, M), diagonals included unless `unbiased`. At most 8 pairs of 16 variables on a GPU.
- hsic_permuted: two symmetric (n, n) matrices and permutations (R, n) -> (R,) float64 sums over i != j of
  K[i, j] L[p[i], p[j]].
- center_gram: (..., n, n) -> H K H; center_gram_ works in place.

GAN-QP and spectral normalisation:

- gan_qp_loss: t (B,), x and optional latents z (B, ...) of real and generated samples -> (B,) losses and (B,)
  distances; backward (reads the distances, not the samples) -> gradients of t_real and t_fake.
- spectral_normalize: N weights, u and v (empty for a weight of one dim) -> one flat list of 4 N tensors: normalised
  weights, then new u, new v and sigmas; backward -> one gradient per weight.
"""

from __future__ import annotations

import torch

SCALE_MAPS = ("exp", "sigmoid", "sigmoid_inv", "softplus", "tanh", "atan", "softsign", "softplus_clamp")
PACKINGS = ("shift_scale", "scale_shift", "interleaved")
SPLINE_VARIANTS = ("nflows", "normflows", "zuko")
TAILS = ("linear", "circular")
ACTIVATIONS = ("identity", "relu", "leaky_relu", "tanh", "silu", "gelu", "elu", "sigmoid", "clamp_exp")
PRIORS = ("gaussian", "logistic")
NOISES = ("uniform", "normal")
# the purpose of a draw is the top byte of the last counter word, so that draws of two purposes share no words
PURPOSES = ("noise", "corrector", "prior", "accept", "data", "permutation", "monte_carlo")
DISTANCES = ("l1", "l2")
FSQ_VARIANTS = ("vqp", "paper", "symmetric", "sigmoid", "hard", "symmetric_hard", "bounded")

# kernels of HSIC; a linear kernel is a polynomial kernel of degree 1
HSIC_KERNELS = ("rbf", "laplacian", "polynomial", "delta", "precomputed")

# integer arguments of operators -> what their values stand for
NAMED = {
    "scale_map": SCALE_MAPS, "packing": PACKINGS, "prior": PRIORS, "kind": NOISES, "purpose": PURPOSES,
    "distance": DISTANCES, "variant": FSQ_VARIANTS, "form": SPLINE_VARIANTS,
}  # fmt: skip

_MAP = "int scale_map, float map_arg, bool shift_first, bool inverse, int event_dims"
_SPLINE = (
    "Tensor x, Tensor params, Tensor? bounds, Tensor? mask, float bound, int bins, int[] tails, int form, "
    "float param_scale, float min_bin, float min_slope, bool inverse, int event_dims"
)
_PROGRAM = "Tensor x, Tensor? context, SymInt repeats, Tensor[] weights, str code"
_GRAMS = "int[] kernels, int[] degrees, int[] pairs, bool allow_tf32"

SCHEMAS = {
    "additive_coupling": "(Tensor x, Tensor shift, Tensor? mask, bool inverse) -> Tensor y",
    "affine_coupling": f"(Tensor x, Tensor shift, Tensor scale, Tensor? mask, {_MAP}) -> (Tensor y, Tensor logdet)",
    "affine_coupling_backward": (
        "(Tensor? grad_y, Tensor? grad_logdet, Tensor x, Tensor? shift, Tensor scale, Tensor? mask, "
        f"{_MAP}, ScalarType? shift_dtype) -> (Tensor grad_x, Tensor grad_shift, Tensor grad_scale)"
    ),
    "affine_coupling_packed": (
        f"(Tensor x, Tensor params, Tensor? mask, int packing, int dim, {_MAP}) -> (Tensor y, Tensor logdet)"
    ),
    "affine_coupling_packed_backward": (
        "(Tensor? grad_y, Tensor? grad_logdet, Tensor x, Tensor params, Tensor? mask, "
        f"int packing, int dim, {_MAP}) -> (Tensor grad_x, Tensor grad_params)"
    ),
    "rq_spline": f"({_SPLINE}) -> (Tensor y, Tensor logdet)",
    "rq_spline_backward": (f"(Tensor? grad_y, Tensor? grad_logdet, {_SPLINE}) -> (Tensor grad_x, Tensor grad_params)"),
    "flow_log_prob": "(Tensor h, Tensor? log_scale, int prior) -> Tensor log_prob",
    "flow_log_prob_backward": (
        "(Tensor grad, Tensor h, Tensor? log_scale, int prior) -> (Tensor grad_h, Tensor grad_log_scale)"
    ),
    "flow_program": f"({_PROGRAM}, int keep) -> (Tensor y, Tensor logdet, Tensor kept)",
    "flow_program_backward": (
        f"(Tensor? grad_y, Tensor? grad_logdet, {_PROGRAM}, Tensor? kept, bool need_x, bool need_context, "
        "bool need_weights) -> Tensor[] grads"
    ),
    "philox": "(Tensor counter, Tensor key) -> Tensor",
    "noise": "(SymInt[] size, Tensor seed, Tensor step, int kind, int purpose, ScalarType dtype) -> Tensor",
    "sde_step": (
        "(Tensor x, Tensor? score, Tensor a, Tensor? b, Tensor c, Tensor? seed, Tensor? step, Tensor? noise, "
        "int purpose, bool return_mean) -> (Tensor y, Tensor mean)"
    ),
    "sde_step_backward": (
        "(Tensor? grad, Tensor? grad_mean, Tensor? x, Tensor? score, Tensor a, Tensor? b, Tensor c, Tensor? seed, "
        "Tensor? step, Tensor? noise, int purpose, ScalarType? x_dtype, ScalarType? score_dtype, "
        "ScalarType? noise_dtype, bool f64) -> (Tensor grad_x, Tensor grad_score, Tensor grad_noise, Tensor sums)"
    ),
    "denoising_loss": "(Tensor pred, Tensor? std, Tensor seed, Tensor step) -> Tensor loss",
    "denoising_loss_backward": (
        "(Tensor grad, Tensor pred, Tensor? std, Tensor seed, Tensor step) -> (Tensor grad_pred, Tensor grad_std)"
    ),
    "langevin_squares": "(Tensor score, Tensor? seed, Tensor? step, Tensor? noise, int purpose) -> Tensor squares",
    "sector_counts": (
        "(Tensor thresholds, SymInt points, SymInt trials, Tensor seed, Tensor step, int purpose) -> Tensor"
    ),
    "mala_accept": (
        "(Tensor z, Tensor z_new, Tensor u, Tensor u_new, Tensor grad, Tensor grad_new, Tensor alpha, Tensor seed, "
        "Tensor step) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "grad_norm_penalty": "(Tensor grad) -> Tensor squares",
    "fsq": "(Tensor z, int[] levels, int variant, bool return_indices) -> (Tensor codes, Tensor indices)",
    "fsq_backward": "(Tensor grad, Tensor z, int[] levels, int variant) -> Tensor grad_z",
    "fsq_decode": "(Tensor indices, int[] levels, int variant, int dim, ScalarType dtype) -> Tensor",
    "residual_fsq": "(Tensor x, int[] levels, int variant, int stages, Tensor? active) -> (Tensor out, Tensor indices)",
    "residual_fsq_backward": (
        "(Tensor grad, Tensor x, int[] levels, int variant, int stages, Tensor? active) -> Tensor grad_x"
    ),
    "hsic_sums": (
        f"(Tensor[] z, Tensor scale, {_GRAMS}, int part, int parts) -> (Tensor rows, Tensor cross, Tensor shift)"
    ),
    "hsic_sums_backward": (
        f"(Tensor grad_rows, Tensor grad_cross, Tensor[] z, Tensor scale, {_GRAMS}) -> Tensor[] grad_z"
    ),
    "hsic_terms": (
        "(Tensor rows, Tensor cross, Tensor shift, Tensor diagonals, int[] pairs, bool unbiased) "
        "-> (Tensor more, Tensor less, Tensor totals)"
    ),
    "hsic_terms_backward": (
        "(Tensor? grad_more, Tensor? grad_less, Tensor rows, Tensor shift, Tensor diagonals, Tensor totals, "
        "int[] pairs, bool unbiased) -> (Tensor grad_rows, Tensor grad_cross, Tensor grad_diagonals)"
    ),
    "hsic_permuted": "(Tensor gram_x, Tensor gram_y, Tensor permutations) -> Tensor",
    "center_gram": "(Tensor gram) -> Tensor centred",
    "center_gram_": "(Tensor(a!) gram) -> ()",
    "gan_qp_loss": (
        "(Tensor t_real, Tensor t_fake, Tensor x_real, Tensor x_fake, Tensor? z_real, Tensor? z_fake, float lam, "
        "float eps, int distance) -> (Tensor loss, Tensor d)"
    ),
    "gan_qp_loss_backward": (
        "(Tensor grad, Tensor t_real, Tensor t_fake, Tensor d, float lam, float eps) "
        "-> (Tensor grad_t_real, Tensor grad_t_fake)"
    ),
    "spectral_normalize": "(Tensor[] weights, Tensor[] u, Tensor[] v, int n_iter) -> Tensor[] lists",
    "spectral_normalize_backward": (
        "(Tensor[] grads, Tensor[] grad_sigmas, Tensor[] weights, Tensor[] u, Tensor[] v, Tensor[] sigmas) "
        "-> Tensor[] grad_weights"
    ),
}

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define(namespace: str) -> torch.library.Library:
    """Return a new torch library `namespace` that defines every schema."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=TAGS)
    return library


library = define("pyflow")
