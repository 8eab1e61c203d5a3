"""vector-quantize-pytorch's quantisers accelerated: tokens and codes bit by bit, gradients within rounding."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook

import pyflow
from pyflow.testing import UNIT, assert_same_bits

vq = pytest.importorskip("vector_quantize_pytorch")

# options, shape of z
CASES = [
    ({"levels": [8, 5, 5, 5]}, (3, 500, 4)),
    ({"levels": [8, 6, 5]}, (3, 3, 5, 6)),
    ({"levels": [8, 5, 5, 5], "channel_first": True}, (3, 4, 7)),
    ({"levels": [8, 5, 5, 5], "channel_first": True}, (3, 4)),
    ({"levels": [5, 4], "bound_hard_clamp": True}, (2, 2, 3, 4, 5)),
    ({"levels": [8, 5, 5], "dim": 16, "num_codebooks": 2}, (3, 50, 16)),
    ({"levels": [8, 5, 5], "dim": 16, "num_codebooks": 2}, (3, 16, 5, 6)),
    ({"levels": [8, 5, 5], "dim": 5, "projection_has_bias": False, "keep_num_codebooks_dim": True}, (3, 9, 5)),
    ({"levels": [2, 5, 5], "preserve_symmetry": True, "dim": 7, "channel_first": True}, (3, 7, 11)),
    ({"levels": [5, 5, 5], "orthogonal_rotation": True, "dim": 12}, (3, 12, 5, 6)),
    ({"levels": [2, 5, 5], "preserve_symmetry": True, "noise_dropout": 0.5}, (3, 3, 5, 6)),
    ({"levels": [4, 4], "preserve_symmetry": True, "noise_dropout": 0.5, "orthogonal_rotation": True}, (3, 9, 2)),
    ({"levels": [7, 6, 5], "return_indices": False}, (3, 8, 3)),
]  # fmt: skip
RESIDUAL = [
    ({"levels": [8, 5, 5, 3], "num_quantizers": 8}, (3, 50, 4)),
    ({"levels": [5, 5], "num_quantizers": 3, "dim": 7}, (3, 50, 7)),
    ({"levels": [5, 5], "num_quantizers": 3, "dim": 7, "is_channel_first": True}, (3, 7, 5, 6)),
    ({"levels": [5, 5], "num_quantizers": 3, "is_channel_first": True}, (3, 2)),
    ({"levels": [5, 4], "num_quantizers": 6, "quantize_dropout": True}, (3, 50, 2)),
    ({"levels": [5, 4], "num_quantizers": 6, "quantize_dropout": True, "quantize_dropout_multiple_of": 4}, (3, 9, 2)),
]  # fmt: skip


def twins(kind, **options):
    torch.manual_seed(1)
    own = kind(**options)
    accelerated = copy.deepcopy(own)
    return own, accelerated, pyflow.accelerate(accelerated)


def step(module, z, seed=3, **options):
    torch.manual_seed(seed)
    leaf = z.clone().requires_grad_()
    out, *rest = module(leaf, **options)
    grads = torch.autograd.grad(out.square().sum(), (leaf, *module.parameters()))
    return out.detach(), *rest, grads, torch.rand(3)


def assert_same_step(accelerated, own, z, **options):
    got, want = (step(each, z, **options) for each in (accelerated, own))
    *results, grads, state = got
    *expected, expected_grads, expected_state = want
    for result, wanted in zip(results, expected, strict=True):
        if wanted is None:
            assert result is None
        else:
            assert result.stride() == wanted.stride()
            assert_same_bits(result, wanted)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        # as many products as positions and stages, of about ten roundings each
        close = 16 * z.numel() ** 0.5 * UNIT[wanted.dtype]
        torch.testing.assert_close(grad, wanted, rtol=close, atol=close * wanted.abs().max().item())
    assert torch.equal(state, expected_state), "the random numbers are others"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options, shape", CASES)
def test_a_step_of_fsq_is_the_package_s(options, shape, training):
    own, accelerated, report = twins(vq.FSQ, **options)
    z = 1.5 * torch.randn(shape)
    assert_same_step(accelerated.train(training), own.train(training), z)
    assert report.calls()[0].fast == 1 and not report.calls()[0].fallback
    if own.return_indices:
        indices = own(z)[1]
        assert_same_bits(accelerated.indices_to_codes(indices), own.indices_to_codes(indices))
        assert report.calls()[0].fast == 2


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [7, 6, 4, 3, 3], [4, 1000, 3], [3], [15, 16, 33]])
@pytest.mark.parametrize("options", [{}, {"preserve_symmetry": True}, {"bound_hard_clamp": True}], ids=str)
def test_tokens_at_boundaries_are_the_package_s(levels, options):
    own, accelerated, report = twins(vq.FSQ, levels=levels, **options)
    z = torch.randn(4000, len(levels)) * torch.linspace(0.1, 3, 4000)[:, None]
    # z where a token changes, by bisection, and the floats around it
    low, high = torch.full((50, len(levels)), -4.0), z[:50].clone()
    with torch.no_grad():
        for _ in range(40):
            middle = (low + high) / 2
            moved = own.quantize(middle) > own.quantize(low)
            low, high = torch.where(moved, low, middle), torch.where(moved, middle, high)
    z = torch.cat((z, low, high, low.nextafter(-z[:50].abs()), high.nextafter(z[:50].abs())))[None]
    for got, want in zip(accelerated(z), own(z), strict=True):
        assert_same_bits(got, want)
    assert_same_bits(accelerated.quantize(z), own.quantize(z))
    assert report.calls()[0].fast == 2


@pytest.mark.parametrize("options, shape", RESIDUAL)
def test_a_step_of_residual_fsq_is_the_package_s(options, shape):
    own, accelerated, report = twins(vq.ResidualFSQ, **options)
    z = torch.randn(shape)
    for seed in range(4):
        assert_same_step(accelerated, own, z, seed=seed)
    assert_same_step(accelerated, own, z, rand_quantize_dropout_fixed_seed=7)
    assert_same_step(accelerated.eval(), own.eval(), z)
    assert report.calls()[0].fast == 6 and not report.calls()[0].fallback
    indices = own(z)[1]
    indices = indices.movedim(1, -1) if own.is_channel_first else indices
    assert_same_bits(accelerated.get_output_from_indices(indices), own.get_output_from_indices(indices))
    if own.quantize_dropout:
        coarse = indices[..., :2]
        assert_same_bits(accelerated.get_codes_from_indices(coarse), own.get_codes_from_indices(coarse))
    assert not report.calls()[0].fallback
    if not own.is_channel_first:
        for got, want in zip(accelerated(z, return_all_codes=True), own(z, return_all_codes=True), strict=True):
            assert_same_bits(got, want)


def test_groups_run_one_by_one():
    options = {"dim": 8, "groups": 2, "levels": [5, 4], "num_quantizers": 4, "quantize_dropout": True}
    own, accelerated, report = twins(vq.GroupedResidualFSQ, **options)
    assert not report.left
    for seed in range(3):
        assert_same_step(accelerated, own, torch.randn(2, 9, 8), seed=seed)
    assert [of.fast for of in report.calls() if of.path in ("rvqs.0", "rvqs.1")] == [3, 3]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"bound_hard_clamp": False}, "its input is not clamped in float32"),
        ({"bound_hard_clamp": False, "soft_clamp_input_value": 2.0}, "its stages have bound_hard_clamp=False"),
        ({"orthogonal_rotation": True}, "its stages have orthogonal_rotation=True"),
        ({"noise_dropout": 0.5}, "its stages draw noise"),
        ({"keep_num_codebooks_dim": True}, "its stages have keep_num_codebooks_dim=True"),
    ],
    ids=str,
)
def test_stages_that_cannot_run_as_one_run_one_by_one(options, reason):
    own, accelerated, report = twins(vq.ResidualFSQ, levels=[5, 5], num_quantizers=3, **options)
    assert_same_step(accelerated, own, torch.randn(2, 9, 2))
    whole, *stages = report.calls()
    assert whole.reasons == {reason: 1} and [of.fast for of in stages] == [1, 1, 1]


def test_what_a_kernel_does_differently_runs_as_in_the_package():
    z = torch.randn(2, 9, 3)
    for options, of, reason in [
        ({"levels": [1501, 5, 3]}, z, "its digits leave their range"),
        ({"levels": [900, 900, 3]}, z, "its tokens are rounded sums"),
        ({"levels": [5, 5, 3], "allowed_dtypes": (torch.bfloat16,)}, z.bfloat16(), "it quantises in lower precision"),
        ({"levels": [5, 5, 3], "force_quantization_f32": False}, z.bfloat16(), "it quantises in the dtype of its input"),
    ]:  # fmt: skip
        own, accelerated, report = twins(vq.FSQ, **options)
        for got, want in zip(accelerated(of), own(of), strict=True):
            assert_same_bits(got, want)
        assert reason in report.calls()[0].reasons
    own, accelerated, report = twins(vq.FSQ, levels=[5, 5, 3])
    with pytest.raises(AssertionError, match="expected dimension of 3 but found dimension of 4"):
        accelerated(torch.randn(2, 9, 4))
    wrong = torch.tensor([[-1, 75, 3]])
    assert_same_bits(accelerated.indices_to_codes(wrong), own.indices_to_codes(wrong))
    assert report.calls()[0].fallback == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, options", [(vq.FSQ, {}), (vq.FSQ, {"preserve_symmetry": True}), (vq.ResidualFSQ, {"num_quantizers": 3})])  # fmt: skip
def test_dtypes(kind, options, dtype):
    own, accelerated, report = twins(kind, levels=[8, 5, 4], **options)
    z = torch.randn(2, 50, 3).to(dtype)
    for got, want in zip(accelerated(z), own(z), strict=True):
        assert_same_bits(got, want)
    assert report.calls()[0].fast == 1


def test_the_first_call_may_be_traced_or_transformed():
    own, _, _ = twins(vq.FSQ, levels=[8, 5])
    z = torch.randn(2, 9, 2)
    total = lambda module: lambda z: module(z)[0].square().sum()

    def fake(module):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            module(mode.from_tensor(z))

    def inference(module):
        with torch.inference_mode():
            module(z)

    for first in (fake, inference, lambda module: torch.func.grad(total(module))(z)):
        accelerated = copy.deepcopy(own)
        pyflow.accelerate(accelerated)
        first(accelerated)
        assert_same_step(accelerated, own, z)
        torch.testing.assert_close(torch.func.grad(total(accelerated))(z), torch.func.grad(total(own))(z))


def test_hooks_of_a_stage_run():
    own, accelerated, report = twins(vq.ResidualFSQ, levels=[5, 5], num_quantizers=2)
    seen = []
    accelerated.layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert_same_step(accelerated, own, torch.randn(2, 9, 2))
    assert seen and report.calls()[0].reasons == {"its stages have hooks": 1}


@pytest.mark.parametrize("kind, options", [(vq.FSQ, {}), (vq.ResidualFSQ, {"num_quantizers": 2})])
def test_hooks_of_all_modules_run(kind, options):
    own, accelerated, report = twins(kind, levels=[8, 5, 5, 5], dim=16, **options)
    hook = register_module_forward_hook(lambda module, args, out: 2 * out if isinstance(module, nn.Linear) else None)
    try:
        assert_same_step(accelerated, own, torch.randn(1, 600, 16))
    finally:
        hook.remove()
    reasons = {"there are hooks of all modules": 1} if kind is vq.ResidualFSQ else {}
    assert report.calls()[0].reasons == reasons


def zeroed(module, name):
    """Set a method on the object whose results are all 0."""
    method = getattr(module, name)
    setattr(module, name, lambda *args, **given: torch.zeros_like(method(*args, **given)))


METHODS = ["quantize", "bound", "symmetry_preserving_bound", "codes_to_indices", "_scale_and_shift"]


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("name", [*METHODS, "maybe_apply_noise"])
def test_methods_of_an_object_run(name, patched):
    options = {"levels": [8, 5, 5, 5], "preserve_symmetry": name.startswith("symmetry")}
    own, accelerated, report = twins(vq.FSQ, **options)
    z = torch.randn(2, 30, 4)
    before = own(z)
    zeroed(own, name)
    want = own(z)
    assert not all(torch.equal(a, b) for a, b in zip(before, want, strict=True))
    with pyflow.patch("vector_quantize_pytorch") if patched else contextlib.nullcontext():
        each = vq.FSQ(**options) if patched else accelerated
        zeroed(each, name)
        for got, wanted in zip(each(z), want, strict=True):
            assert_same_bits(got, wanted)
    # forward calls the noise itself
    assert patched or set(report.calls()[0].reasons) == ({"it has methods of its own"} if name in METHODS else set())


@pytest.mark.parametrize("name", ["indices_to_level_indices", "_scale_and_shift_inverse"])
def test_decoding_methods_of_an_object_run(name):
    own, accelerated, _ = twins(vq.FSQ, levels=[8, 5])
    tokens = torch.randint(40, (2, 30))
    for each in (own, accelerated):
        zeroed(each, name)
    assert_same_bits(accelerated.indices_to_codes(tokens), own.indices_to_codes(tokens))


@pytest.mark.parametrize("name", ["symmetry_preserving_bound", "_scale_and_shift", "maybe_apply_noise"])
def test_methods_of_a_stage_run(name):
    own, accelerated, report = twins(vq.ResidualFSQ, levels=[5, 5], num_quantizers=2)
    for each in (own, accelerated):
        zeroed(each.layers[0], name)
    z = torch.randn(2, 9, 2)
    for got, want in zip(accelerated(z), own(z), strict=True):
        assert_same_bits(got, want)
    assert report.calls()[0].reasons == {"its stages have methods of their own": 1}


@pytest.mark.parametrize("kind, options", [(vq.FSQ, {}), (vq.ResidualFSQ, {"num_quantizers": 2})])
def test_state_copies_and_pickles(kind, options):
    own, accelerated, report = twins(kind, levels=[8, 5], dim=6, **options)
    z = torch.randn(2, 9, 6)
    assert isinstance(accelerated, kind) and accelerated.state_dict().keys() == own.state_dict().keys()
    accelerated.load_state_dict(own.state_dict())
    loaded, copied = pickle.loads(pickle.dumps(accelerated)), copy.deepcopy(accelerated)
    assert type(loaded) is kind and type(copied) is type(accelerated)
    optimizer = torch.optim.SGD(accelerated.parameters(), 0.1)
    accelerated(z)[0].sum().backward()
    optimizer.step()
    own.load_state_dict(accelerated.state_dict())
    assert_same_step(accelerated, own, z)
    report.restore()
    assert type(accelerated) is kind


def test_a_patched_package_makes_quantisers_that_compute_the_same():
    torch.manual_seed(1)
    own = [vq.FSQ([8, 5, 5]), vq.ResidualFSQ(levels=[8, 5, 5], num_quantizers=3)]
    z = torch.randn(2, 50, 3)
    want = [each(z) for each in own]
    with pyflow.patch("vector_quantize_pytorch") as report:
        assert len(report.replaced) == 3
        made = [vq.FSQ([8, 5, 5]), vq.ResidualFSQ(levels=[8, 5, 5], num_quantizers=3)]
        for each, other, expected in zip(made, own, want, strict=True):
            for module in (each, other):
                for got, wanted in zip(module(z), expected, strict=True):
                    assert_same_bits(got, wanted)
        assert_same_bits(made[1].codebooks, own[1].codebooks)


@pytest.mark.parametrize("kind, options", [(vq.FSQ, {}), (vq.ResidualFSQ, {"num_quantizers": 3})])
def test_verify_accepts(kind, options):
    module = kind(levels=[8, 5], dim=6, **options)
    assert pyflow.accelerate(module, verify=torch.randn(4, 500, 6)).replaced


@pytest.mark.slow
@pytest.mark.parametrize("kind, options", [(vq.FSQ, {}), (vq.ResidualFSQ, {"num_quantizers": 3})])
def test_compiles_without_a_break(kind, options):
    own, accelerated, _ = twins(kind, levels=[8, 5], **options)
    z = torch.randn(2, 9, 2)
    compiled = torch.compile(accelerated, fullgraph=True)
    for got, want in zip(compiled(z), own(z), strict=True):
        torch.testing.assert_close(got, want)
