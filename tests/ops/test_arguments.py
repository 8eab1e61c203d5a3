"""Arguments that every operation refuses alike: tensors that have no single shape, and flags that are no truth values."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

import pyflow
from pyflow import ops

X, ROWS = torch.ones(4, 4), torch.ones(4)


def ragged(dtype=torch.float32):
    with warnings.catch_warnings():
        # that nested tensors are a prototype
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], dtype=dtype)


def energy(z):
    return z.square().sum(1) / 2


CALLS = {
    "additive_coupling": lambda t: ops.additive_coupling(t, t),
    "affine_coupling": lambda t: ops.affine_coupling(t, t, t),
    "affine_coupling_packed": lambda t: ops.affine_coupling_packed(t, t),
    "center_gram": lambda t: ops.center_gram(t),
    "cka": lambda t: ops.cka(t, t),
    "codebook_usage": lambda t: ops.codebook_usage(t.long(), 8),
    "denoising_loss": lambda t: ops.denoising_loss(t, 1.0, seed=0),
    "energy_and_grad": lambda t: ops.energy_and_grad(energy, t),
    "energy_loss": lambda t: ops.energy_loss(t, t),
    "flow_log_prob": lambda t: ops.flow_log_prob(t),
    "fsq": lambda t: ops.fsq(t, (3, 3, 3, 3)),
    "fsq_decode": lambda t: ops.fsq_decode(t.long(), (3, 3)),
    "gan_qp_generator_loss": lambda t: ops.gan_qp_generator_loss(t, t, t, t, t, t, (1.0, 1.0)),
    "gan_qp_loss": lambda t: ops.gan_qp_loss(t, t, t, t),
    "grad_norm_penalty": lambda t: ops.grad_norm_penalty(t),
    "hsic": lambda t: ops.hsic(t, t),
    "hsic_matrix": lambda t: ops.hsic_matrix([t], [t]),
    "langevin_step": lambda t: ops.langevin_step(t, t, step_size=0.1, seed=0),
    "mala_accept": lambda t: ops.mala_accept(t, t, ROWS, ROWS, t, t, 0.1, seed=0),
    "mala_propose": lambda t: ops.mala_propose(t, t, 0.1, seed=0),
    "mala_step": lambda t: ops.mala_step(t, ROWS, t, energy, 0.1, seed=0),
    "nhsic": lambda t: ops.nhsic(t, t),
    "normal": lambda t: ops.normal((2,), seed=t.long()),
    "perturb": lambda t: ops.perturb(t, 1.0, 1.0, seed=0),
    "philox": lambda t: ops.philox(t.long(), t.long()),
    "residual_fsq": lambda t: ops.residual_fsq(t, (3, 3, 3, 3), 2),
    "rq_spline": lambda t: ops.rq_spline(t, t, bins=2),
    "sample_seeds": lambda t: ops.sample_seeds(t.long(), 4),
    "sde_step": lambda t: ops.sde_step(t, t, 1.0, 1.0, 1.0, seed=0),
    "sector_counts": lambda t: ops.sector_counts(t, 8, 8, seed=0),
    "spectral_normalize": lambda t: ops.spectral_normalize([t], [ROWS], [ROWS]),
    "uniform": lambda t: ops.uniform((2,), seed=t.long()),
}


def call_of(op):
    """The call of CALLS, else one with a tensor for every argument that must be given."""
    parameters = inspect.signature(getattr(ops, op)).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return CALLS.get(op, lambda t: getattr(ops, op)(*[t] * len(needed)))


@pytest.mark.parametrize("op", pyflow.ops.__all__)
def test_nested_tensors_are_refused_in_one_sentence(op):
    with pytest.raises(TypeError, match=rf"^{op}: \S+ must be a dense tensor, got nested$"):
        call_of(op)(ragged())


def test_a_nested_tensor_beside_a_dense_one_is_refused_too():
    with pytest.raises(TypeError, match=r"^additive_coupling: shift must be a dense tensor, got nested$"):
        ops.additive_coupling(X, ragged())


FLAGS = {
    "additive_coupling": (lambda flag: ops.additive_coupling(X, X, inverse=flag), "inverse"),
    "affine_coupling": (lambda flag: ops.affine_coupling(X, X, X, inverse=flag), "inverse"),
    "affine_coupling shift_first": (lambda flag: ops.affine_coupling(X, X, X, shift_first=flag), "shift_first"),
    "affine_coupling_packed": (lambda flag: ops.affine_coupling_packed(X[:, :2], X, inverse=flag), "inverse"),
    "affine_coupling_packed shift_first": (
        lambda flag: ops.affine_coupling_packed(X[:, :2], X, shift_first=flag), "shift_first",
    ),
    "masked additive_coupling": (lambda flag: ops.additive_coupling(X, X, inverse=flag, mask=ROWS > 0), "inverse"),
    "fsq": (lambda flag: ops.fsq(X, (3, 3, 3, 3), return_indices=flag), "return_indices"),
}  # fmt: skip


@pytest.mark.parametrize("case", FLAGS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_flags_are_truth_values(case, backend):
    call, name = FLAGS[case]
    with pyflow.backend(backend):
        for flag in (None, "no", X, 0.0, torch.tensor(True)):
            with pytest.raises(TypeError, match=rf"{name} must be true or false, got {type(flag).__name__}$"):
                call(flag)
        for value in (True, False):
            for a, b in zip(call(value), call(int(value)), strict=True):
                assert (a is b) if a is None else torch.equal(a, b)
