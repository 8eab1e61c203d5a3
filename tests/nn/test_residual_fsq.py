"""ResidualFSQ and GroupedResidualFSQ against vector-quantize-pytorch, and their additional features."""

from __future__ import annotations

import copy
import inspect
import math
import random
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyflow
from pyflow import _backend
from pyflow.nn import GroupedResidualFSQ, ResidualFSQ
from pyflow.reference import fsq as reference
from pyflow.testing import assert_same_bits

SOFT = {"bound_hard_clamp": False}
# options, shape of x
CASES = [
    ({"levels": [8, 5, 5], "num_quantizers": 4}, (3, 40, 3)),
    ({"levels": [8, 5, 5], "num_quantizers": 1, **SOFT}, (3, 40, 3)),
    ({"levels": [8, 5, 5], "num_quantizers": 4, "dim": 8}, (3, 40, 8)),
    ({"levels": [8, 5, 2], "num_quantizers": 4, "dim": 8, "is_channel_first": True}, (3, 8, 7, 9)),
    ({"levels": [8, 5, 2], "num_quantizers": 4, "is_channel_first": True, **SOFT}, (3, 3, 7, 9)),
    ({"levels": [8, 5, 2], "num_quantizers": 3, "is_channel_first": True, **SOFT}, (3, 3)),
    ({"levels": [9, 9], "num_quantizers": 7, "soft_clamp_input_value": 2.5, **SOFT}, (3, 40, 2)),
    ({"levels": [8, 5], "num_quantizers": 3, "soft_clamp_input_value": [2.0, 1.5], **SOFT}, (3, 40, 2)),
    ({"levels": [8, 5], "num_quantizers": 3, "soft_clamp_input_value": torch.tensor(1.5), **SOFT}, (3, 40, 2)),
    ({"levels": [8, 5], "num_quantizers": 3, "noise_dropout": 0.5}, (3, 17, 2)),
    ({"levels": [5, 5, 5], "num_quantizers": 3, "orthogonal_rotation": True, "dim": 6}, (3, 17, 6)),
    ({"levels": [5, 5], "num_quantizers": 5, "quantize_dropout": True}, (3, 17, 2)),
]  # fmt: skip
GROUPED = [
    ({"levels": [5, 5, 5], "num_quantizers": 4, "groups": 2, "dim": 12}, (3, 17, 12)),
    ({"levels": [5, 5, 5], "num_quantizers": 2, "groups": 2, "dim": 6}, (3, 17, 6)),
    ({"levels": [5, 5], "num_quantizers": 2, "groups": 3, "dim": 6, "accept_image_fmap": True,
      "is_channel_first": True}, (3, 6, 4, 5)),
]  # fmt: skip


compiled_kernels = pytest.mark.skipif(
    _backend.runs_reference("fsq", torch.zeros(1)), reason="the reference is many operators"
)


def twins(theirs, ours, **options):
    """Build both modules with the same weights."""
    torch.manual_seed(1)
    first = theirs(**options)
    torch.manual_seed(1)
    second = ours(**options)
    assert first.state_dict().keys() == second.state_dict().keys()
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert_same_bits(b, a)
    return first, second


def near_boundary(z, levels):
    """True where a channel of z (..., d), bounded by "symmetric", is within 4 ulp (of L - 1) of a rounding boundary."""
    top = torch.tensor(reference.constants(levels, "symmetric").top, dtype=torch.float32)
    ulp = torch.nextafter(top, torch.tensor(math.inf)) - top
    bound = (z.double().tanh() + 1) * top.double() / 2
    return ((bound - bound.floor() - 0.5).abs() <= 4 * ulp.double()).any(-1)


def assert_stages(module, x, ours, theirs, backend):
    """Tokens (..., Q) of x (..., dim) may first differ in a stage near a boundary only; on the reference never.

    Returns a bool tensor: true where all stages are equal.
    """
    assert ours.shape == theirs.shape
    residual = module.project_in(x)
    if module.soft_clamp_input_value is not None:
        residual = (residual / module.soft_clamp_input_value).tanh() * module.soft_clamp_input_value
    same = torch.ones(residual.shape[:-1], dtype=torch.bool)
    for stage, scale in zip(range(module.num_quantizers), module.scales, strict=True):
        differs = same & (ours[..., stage] != theirs[..., stage])
        assert not differs.any() or (backend == "auto" and module.layers[0].variant == "symmetric")
        assert near_boundary((residual / scale)[differs], module.levels).all()
        same = same & ~differs
        residual = residual - module.get_codes_from_indices(theirs)[stage]
    return same


def last(tensor, module):
    """Move the dim of channels or stages to the end."""
    return tensor.movedim(1, -1) if module.is_channel_first else tensor


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options, shape", CASES)
def test_equals_the_peer(peer, backend, options, shape, training):
    theirs, ours = (m.train(training) for m in twins(peer.ResidualFSQ, ResidualFSQ, **options))
    torch.manual_seed(2)
    x = torch.randn(shape)
    results, grads = [], []
    for module in (theirs, ours):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        results.append(module(leaf, rand_quantize_dropout_fixed_seed=5))
        results[-1][0].square().sum().backward()
        grads.append(leaf.grad)
    (their_out, their_indices), (out, indices) = results
    if options.get("noise_dropout") or options.get("orthogonal_rotation"):
        same = torch.ones(last(x, ours).shape[:-1], dtype=torch.bool)
        if backend == "reference":
            assert indices.equal(their_indices)
    else:
        same = assert_stages(ours, last(x, ours), last(indices, ours), last(their_indices, ours), backend)
    assert out.shape == x.shape and indices.stride() == their_indices.stride()
    # the peer returns int32 when the draw drops no stage
    assert indices.dtype == (torch.int64 if training and ours.quantize_dropout else their_indices.dtype)
    rows = [last(t, ours)[same] for t in (out, their_out, *grads)]
    assert_same_bits(rows[0], rows[1])
    torch.testing.assert_close(rows[3], rows[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options, shape", CASES)
def test_decodes_to_what_forward_returned(peer, options, shape):
    theirs, ours = (m.eval() for m in twins(peer.ResidualFSQ, ResidualFSQ, **options))
    torch.manual_seed(2)
    out, indices = ours(torch.randn(shape))
    indices = last(indices, ours)
    decoded, stages = ours.get_output_from_indices(indices), ours.get_codes_from_indices(indices)
    if options.get("orthogonal_rotation"):
        torch.testing.assert_close(decoded, out)
        assert (theirs.get_output_from_indices(indices) - out).abs().max() > 0.1, "the peer now rotates back"
    else:
        assert_same_bits(decoded, last(out, ours))
        assert_same_bits(stages, theirs.get_codes_from_indices(indices))
        # the peer adds the stages in another order
        torch.testing.assert_close(decoded, theirs.get_output_from_indices(indices), atol=1e-6, rtol=0)
    for name in ("codebooks", "scales"):
        assert_same_bits(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3), (9, 9, 9), (33, 16)])
@pytest.mark.parametrize("options", [{}, SOFT])
def test_tokens_differ_only_near_a_boundary(peer, backend, levels, options):
    theirs, ours = twins(peer.ResidualFSQ, ResidualFSQ, levels=list(levels), num_quantizers=6, **options)
    torch.manual_seed(0)
    x = torch.randn(1, 4_000, len(levels)) * torch.linspace(0.1, 3, 4_000)[:, None]
    (out, indices), (their_out, their_indices) = ours(x), theirs(x)
    same = assert_stages(ours, x, indices, their_indices, backend)
    assert_same_bits(out[same], their_out[same])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options, shape", GROUPED)
def test_groups_equal_the_peer(peer, options, shape, training):
    with pyflow.backend("reference"):
        theirs, ours = (m.train(training) for m in twins(peer.GroupedResidualFSQ, GroupedResidualFSQ, **options))
        x = torch.randn(shape)
        (out, indices), (their_out, their_indices) = ours(x), theirs(x)
    assert_same_bits(out, their_out)
    assert_same_bits(indices, their_indices)
    assert_same_bits(ours.codebooks, theirs.codebooks)
    assert ours.codebook_size == theirs.codebook_size and ours.split_dim == theirs.split_dim
    if ours.accept_image_fmap:
        indices = indices.movedim(2, -1)
        # the peer concatenates channels-last groups in dim 1
        assert theirs.get_output_from_indices(indices).shape != out.shape
    else:
        assert_same_bits(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices))
    assert_same_bits(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    torch.testing.assert_close(ours.get_output_from_indices(indices), out)
    with pyflow.backend("reference"):
        all_codes = ours(x, return_all_codes=True)[2]
        # a tensor for each group, as in the package
        assert type(all_codes) is tuple
        assert_same_bits(torch.stack(all_codes), ours.get_codes_from_indices(indices))


def test_groups_drop_the_same_stages():
    torch.manual_seed(0)
    module, seen = GroupedResidualFSQ(dim=4, groups=2, levels=[5, 5], num_quantizers=6, quantize_dropout=True), set()
    for _ in range(30):
        kept = (module(torch.randn(2, 3, 4))[1] >= 0).sum(-1)
        assert kept.unique().numel() == 1
        seen.add(kept.unique().item())
    assert seen == {1, 2, 3, 4, 5, 6}


def test_all_codes_of_images(peer):
    theirs, ours = twins(peer.ResidualFSQ, ResidualFSQ, levels=[5, 5], num_quantizers=3, is_channel_first=True)
    x = torch.randn(2, 2, 4, 5)
    out, _indices, codes = ours(x, return_all_codes=True)
    assert codes.shape == (3, 2, 4, 5, 2)
    torch.testing.assert_close(codes.sum(0).movedim(-1, 1), out)
    with pytest.raises(Exception, match="Failed to determine the size"):
        theirs(x, return_all_codes=True)


def test_signatures_and_attributes(peer):
    for theirs, ours in ((peer.ResidualFSQ, ResidualFSQ), (peer.GroupedResidualFSQ, GroupedResidualFSQ)):
        for name in ("__init__", "forward"):
            expected = list(inspect.signature(getattr(theirs, name)).parameters.values())
            got = list(inspect.signature(getattr(ours, name)).parameters.values())
            got = got[: len(expected)]
            assert [(p.name, p.default, p.kind) for p in got] == [(p.name, p.default, p.kind) for p in expected]
    options = {"levels": [5, 5], "num_quantizers": 3, "quantize_dropout": True, "quantize_dropout_cutoff_index": 1}
    theirs, ours = twins(peer.ResidualFSQ, ResidualFSQ, dim=4, **options)
    for name, value in vars(theirs).items():
        if not name.startswith("_"):
            assert getattr(ours, name) == value, name
    assert_same_bits(ours.soft_clamp_input_value, theirs.soft_clamp_input_value)
    assert len(ours.layers) == 3 and ours.layers[0].codebook_dim == 2


@pytest.mark.parametrize("kind, options", [("ResidualFSQ", {}), ("GroupedResidualFSQ", {"groups": 2})])
def test_checkpoints_load_in_both_directions(peer, kind, options):
    options = {"levels": [5, 5], "num_quantizers": 2, "dim": 8, "orthogonal_rotation": True, **options}
    theirs, ours = getattr(peer, kind)(**options), getattr(pyflow.nn, kind)(**options)
    x = torch.randn(2, 3, 8)
    with pyflow.backend("reference"):
        for a, b in ((theirs, ours), (ours, theirs)):
            with torch.no_grad():
                for parameter in a.parameters():
                    parameter.add_(0.1)
            b.load_state_dict(a.state_dict())
            assert_same_bits(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("cutoff, multiple", [(0, 1), (2, 1), (0, 4), (1, 3)])
def test_dropped_stages(peer, cutoff, multiple):
    options = {"quantize_dropout_cutoff_index": cutoff, "quantize_dropout_multiple_of": multiple}
    options |= {"levels": [5, 5], "num_quantizers": 7, "quantize_dropout": True}
    theirs, ours = twins(peer.ResidualFSQ, ResidualFSQ, **options)
    x = torch.randn(2, 3, 2)
    with pyflow.backend("reference"):
        for seed in range(20):
            expected = theirs(x, rand_quantize_dropout_fixed_seed=seed)
            got = ours(x, rand_quantize_dropout_fixed_seed=seed)
            assert_same_bits(got[0], expected[0])
            assert got[1].equal(expected[1]) and got[1].dtype == torch.int64
    allowed = {min(7, -(-(n + 1) // multiple) * multiple) for n in range(cutoff, 7)}
    drawn = [int((ours(x)[1][0, 0] >= 0).sum()) for _ in range(60)]
    assert set(drawn) == allowed
    out, indices = ours(x)
    assert_same_bits(ours.get_output_from_indices(indices), out)
    kept = int((indices[0, 0] >= 0).sum())
    assert_same_bits(ours.get_output_from_indices(indices[..., :kept]), out)
    for module in (ours.eval(), ours.train()):
        with torch.no_grad():
            assert module(x)[1].dtype == torch.int32 and (module(x)[1] >= 0).all()


def test_draws_are_uniform_and_follow_the_seed():
    module = ResidualFSQ(levels=[5], num_quantizers=4, quantize_dropout=True)
    torch.manual_seed(0)
    first = [int(module._draw_active(torch.device("cpu"), None)) for _ in range(2_000)]
    torch.manual_seed(0)
    assert first == [int(module._draw_active(torch.device("cpu"), None)) for _ in range(2_000)]
    assert all(abs(first.count(n) - 500) < 100 for n in (1, 2, 3, 4))


def test_active_sets_the_number_of_stages():
    torch.manual_seed(0)
    module, x = ResidualFSQ(levels=[5, 5], num_quantizers=4).eval(), torch.randn(2, 3, 2)
    for kept in range(5):
        out, indices = module(x, active=torch.tensor(kept))
        assert ((indices >= 0).sum(-1) == kept).all() and indices[..., :kept].equal(module(x)[1][..., :kept])
        assert_same_bits(module.get_output_from_indices(indices), out)
    assert_same_bits(module(x, active=torch.tensor(9))[0], module(x)[0])
    with pytest.raises(ValueError, match=r"^ResidualFSQ: active must be 0-d, got \(1,\)$"):
        module(x, active=torch.tensor([2]))


class Operators(TorchDispatchMode):
    """Records the operators that run, without those that only make views."""

    VIEWS = frozenset({"transpose", "permute", "view", "unflatten", "squeeze", "unsqueeze", "detach", "alias", "t"})

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@compiled_kernels
@pytest.mark.parametrize("shape, channel_first", [((2, 9, 3), False), ((2, 3, 4, 5), True), ((9, 3), False)])
def test_one_operator_for_all_stages(shape, channel_first):
    module = ResidualFSQ(levels=[8, 5, 5], num_quantizers=5, is_channel_first=channel_first, bound_hard_clamp=False)
    for x in (torch.randn(shape), torch.randn(shape, requires_grad=True)):
        with Operators() as ran:
            out, _indices = module(x)
        assert ran.names == ["residual_fsq"]
        assert out.is_contiguous() and out.untyped_storage().nbytes() == x.nbytes
    clamped = ResidualFSQ(levels=[8, 5, 5], num_quantizers=5, is_channel_first=channel_first)
    with Operators() as ran:
        clamped(x)
    assert ran.names == ["div", "tanh", "mul", "residual_fsq"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_output_and_codes_in_the_dtype_of_x(dtype):
    torch.manual_seed(0)
    x = torch.randn(1, 500, 6).to(dtype)
    for module in (
        ResidualFSQ(levels=[8, 8, 8, 5, 5, 5], num_quantizers=3),
        GroupedResidualFSQ(dim=6, groups=2, levels=[8, 8, 8], num_quantizers=3),
    ):
        out, indices = module(x)
        back = module.get_output_from_indices(indices, dtype=dtype)
        assert back.dtype == out.dtype == dtype and back.equal(out)
        assert module.get_codes_from_indices(indices, dtype=dtype).dtype == dtype
        assert module.get_output_from_indices(indices).dtype == torch.float32


@compiled_kernels
@pytest.mark.parametrize("options", [{}, {"dim": 8}, {"noise_dropout": 0.5}, {"quantize_dropout_multiple_of": 2}])
def test_training_never_waits_for_the_device(options):
    module = ResidualFSQ(levels=[5, 5], num_quantizers=4, quantize_dropout=True, **options)
    module.track_usage()
    x = torch.randn(2, 3, module.dim, requires_grad=True)
    with Operators() as ran:
        module(x)[0].sum().backward()
    assert {"randint", "scatter_add_"} <= set(ran.names)
    # operators that sync: a value read, a size that depends on values, a copy from the host
    assert not {"_local_scalar_dense", "nonzero", "lift_fresh"} & set(ran.names)


@pytest.mark.parametrize("options", [{}, {"orthogonal_rotation": True}, {"dim": 5}])
def test_any_rank(options):
    torch.manual_seed(0)
    module = ResidualFSQ(levels=[5, 5, 5], num_quantizers=3, **options)
    x = torch.randn(2, 3, 4, module.dim)
    out, indices = module(x)
    for shape in ((24, module.dim), (6, 4, module.dim), (2, 3, 2, 2, module.dim)):
        some = module(x.view(shape))
        torch.testing.assert_close(some[0], out.view(shape))
        assert some[1].equal(indices.view(*shape[:-1], 3))
    one = module(x[0, 0, 0])
    assert one[0].shape == (module.dim,) and one[1].equal(indices[0, 0, 0])
    assert module(x[:0])[1].shape == (0, 3, 4, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, SOFT, {"noise_dropout": 0.5}])
def test_storage_dtypes(dtype, options):
    torch.manual_seed(0)
    module = ResidualFSQ(levels=[8, 8], num_quantizers=3, **options)
    x = torch.randn(2, 50, 2).to(dtype)
    torch.manual_seed(1)
    out, indices = module(x)
    torch.manual_seed(1)
    wide = module(x if dtype == torch.float64 else x.float())
    assert out.dtype == dtype and indices.equal(wide[1])
    assert_same_bits(out, wide[0].to(dtype))
    projected = ResidualFSQ(levels=[8, 8], num_quantizers=3, dim=5, **options).to(dtype)
    out, indices = projected.eval()(torch.randn(2, 50, 5, dtype=dtype))
    decoded = projected.get_output_from_indices(indices)
    assert out.dtype == decoded.dtype == dtype
    torch.testing.assert_close(decoded, out)


@pytest.mark.parametrize("options", [{}, {"dim": 5}, {"is_channel_first": True}, {"orthogonal_rotation": True}])
def test_padding_reaches_neither_outputs_nor_gradients(options):
    torch.manual_seed(0)
    module = ResidualFSQ(levels=[5, 5, 5], num_quantizers=3, **options)
    lengths = torch.tensor([6, 2, 0])
    valid = torch.arange(6) < lengths[:, None]
    channel = 1 if module.is_channel_first else -1
    x = torch.randn(3, 6, module.dim).movedim(-1, channel)
    poisoned = torch.where(valid.unsqueeze(channel), x, torch.nan).requires_grad_()
    out, indices, codes = module(poisoned, return_all_codes=True, lengths=lengths)
    assert_same_bits(module(poisoned, mask=valid)[0], out)
    expected = module(x)
    for got, wanted, empty in ((out, expected[0], 0), (indices, expected[1], -1)):
        got, wanted = got.movedim(channel, -1), wanted.movedim(channel, -1)
        assert got[valid].equal(wanted[valid]) and (got[~valid] == empty).all()
    assert (codes[:, ~valid] == 0).all()
    out.square().sum().backward()
    assert (poisoned.grad.movedim(channel, -1)[~valid] == 0).all() and not poisoned.grad.isnan().any()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_padding_of_groups():
    module, x = GroupedResidualFSQ(dim=4, groups=2, levels=[5, 5], num_quantizers=2), torch.randn(2, 3, 4)
    out, indices = module(x, lengths=torch.tensor([3, 1]))
    assert (out[1, 1:] == 0).all() and (indices[:, 1, 1:] == -1).all() and out[0].equal(module(x)[0][0])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert_same_bits(module(x, mask=mask)[0], out)


def test_nan_decodes_as_a_dropped_stage():
    module = ResidualFSQ(levels=[5, 5], num_quantizers=2)
    out, indices = module(torch.tensor([[math.nan, 0.0], [math.inf, -math.inf]]))
    assert indices[0].tolist() == [-1, -1] and out[0, 0].isnan() and indices[1, 0] == 4
    assert (module.get_output_from_indices(indices)[0] == 0).all()


def test_large_codebooks_are_exact():
    levels = (1000,) * 6
    module = ResidualFSQ(levels=levels, num_quantizers=2, bound_hard_clamp=False)
    assert module.codebook_size == 10**18
    out, indices = module(torch.randn(1, 100, 6))
    assert indices.dtype == torch.int64
    codes = module.get_codes_from_indices(indices)[0, 0]
    digits = ((codes.double() + 1) * 999 / 2).round().long().tolist()
    exact = [sum(digit * 1000**i for i, digit in enumerate(row)) for row in digits]
    assert indices[0, :, 0].tolist() == exact
    assert_same_bits(module.get_output_from_indices(indices), out)


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("options", [{}, {"dim": 8, "is_channel_first": True}, {"orthogonal_rotation": True}])
def test_compiles_without_graph_breaks(options, dropout):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = ResidualFSQ(levels=[5, 5, 5], num_quantizers=4, quantize_dropout=dropout, **options)
    plain = copy.deepcopy(module)
    x = torch.randn((2, 8, 4, 5) if "dim" in options else (2, 9, 3), requires_grad=True)
    for training in (True, False):
        compiled = torch.compile(module.train(training), fullgraph=True, backend="aot_eager")
        plain.train(training)
        for seed in (None, 3):
            results = []
            for one in (compiled, plain):
                torch.manual_seed(1)
                out, indices = one(x, rand_quantize_dropout_fixed_seed=seed)
                results.append((out, indices, *torch.autograd.grad(out.square().sum(), x)))
            torch.testing.assert_close(*results)


def test_compiled_seeds_and_padding():
    torch._dynamo.reset()
    module = ResidualFSQ(levels=[5, 5], num_quantizers=8, quantize_dropout=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 2)
    for seed in range(20):
        kept = random.Random(seed).randrange(0, 8) + 1
        assert (compiled(x, rand_quantize_dropout_fixed_seed=seed)[1][0, 0] >= 0).sum() == kept
    module.eval()
    torch.testing.assert_close(compiled(x, lengths=torch.tensor([1, 3])), module(x, lengths=torch.tensor([1, 3])))
    indices = module(x)[1]
    decode = torch.compile(module.get_output_from_indices, fullgraph=True, backend="aot_eager")
    assert_same_bits(decode(indices), module.get_output_from_indices(indices))


def test_compiles_groups():
    torch._dynamo.reset()
    module = GroupedResidualFSQ(dim=6, groups=2, levels=[5, 5], num_quantizers=4, quantize_dropout=True)
    module.track_usage()
    x = torch.randn(2, 9, 6, requires_grad=True)
    for training in (True, False):
        compiled = torch.compile(module.train(training), fullgraph=True, backend="aot_eager")
        results = []
        for one in (compiled, module):
            torch.manual_seed(1)
            results.append(one(x))
        torch.testing.assert_close(*results)


RANK = """
import sys, torch
from torch import distributed
from pyflow.nn import ResidualFSQ
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(rank)
module = ResidualFSQ(levels=[5, 5], num_quantizers=9, quantize_dropout=True)
compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
for run in (module, compiled):
    print(*[int((run(torch.randn(1, 1, 2))[1] >= 0).sum()) for _ in range(12)])
"""


def test_ranks_drop_the_same_stages(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert outputs[0][0] == outputs[1][0] and len(set(outputs[0][0].split())) > 4


def test_usage_of_every_stage_and_group():
    torch.manual_seed(0)
    module = GroupedResidualFSQ(dim=4, groups=2, levels=[5, 5], num_quantizers=3, quantize_dropout=True)
    module.track_usage()
    seen = [module(torch.randn(2, 50, 4), lengths=torch.tensor([50, 20]))[1] for _ in range(3)]
    usages = module.usage()
    for group in range(2):
        for stage in range(3):
            collected = torch.cat([indices[group, ..., stage].flatten() for indices in seen])
            for got, expected in zip(usages[group][stage], pyflow.ops.codebook_usage(collected, 25), strict=True):
                assert_same_bits(got, expected)
    with pytest.raises(RuntimeError, match=r"^ResidualFSQ: usage needs track_usage\(\) to be called first$"):
        ResidualFSQ(levels=[5], num_quantizers=2).usage()
    with pytest.raises(ValueError, match=r"^ResidualFSQ: track_usage needs a codebook of at most 2\*\*24 entries, got"):
        ResidualFSQ(levels=[1000] * 3, num_quantizers=2).track_usage()


@pytest.mark.parametrize(
    "error, text, options",
    [
        (ValueError, r"levels must be integers >= 2, got \(5, 1\)", {"levels": [5, 1]}),
        (
            ValueError,
            r"levels must have a product of at most 2\*\*63 to be numbered, got \(8, .*",
            {"levels": [8] * 22},
        ),
        (ValueError, "num_quantizers must be at least 1, got 0", {"num_quantizers": 0}),
        (TypeError, "num_quantizers must be an integer, got float", {"num_quantizers": 2.0}),
        (ValueError, "dim must be at least 1, got 0", {"dim": 0}),
        (ValueError, "quantize_dropout_cutoff_index must be at least 0, got -1", {"quantize_dropout_cutoff_index": -1}),
        (ValueError, "quantize_dropout_multiple_of must be at least 1, got 0", {"quantize_dropout_multiple_of": 0}),
        (
            ValueError,
            "quantize_dropout_cutoff_index must lie below num_quantizers, 3, got 3",
            {"quantize_dropout": True, "quantize_dropout_cutoff_index": 3},
        ),
        (
            ValueError,
            "soft_clamp_input_value must be None with bound_hard_clamp, got a value",
            {"soft_clamp_input_value": 2.0},
        ),
        (
            ValueError,
            r"soft_clamp_input_value must be one number or one for each of 2 channels, got shape \(3,\)",
            {"soft_clamp_input_value": [2.0, 2.0, 2.0], **SOFT},
        ),
        (
            ValueError,
            r"soft_clamp_input_value must be positive and finite, got \[2.0, 0.0\]",
            {"soft_clamp_input_value": [2.0, 0.0], **SOFT},
        ),
        (
            ValueError,
            "soft_clamp_input_value must be positive and finite, got nan",
            {"soft_clamp_input_value": torch.tensor(float("nan")), **SOFT},
        ),
        (
            TypeError,
            "soft_clamp_input_value must be a number, got str",
            {"soft_clamp_input_value": ["2", "2"], **SOFT},
        ),
        (
            TypeError,
            "soft_clamp_input_value must be a number, a list or a tensor, got str",
            {"soft_clamp_input_value": "2", **SOFT},
        ),
        (ValueError, "num_codebooks must be 1 in the stages, got 2", {"num_codebooks": 2}),
        (ValueError, "keep_num_codebooks_dim must be False in the stages, got True", {"keep_num_codebooks_dim": True}),
        (ValueError, "channel_first must be False in the stages, got True", {"channel_first": True}),
        (ValueError, "return_indices must be True in the stages, got False", {"return_indices": False}),
    ],
)
def test_wrong_options(error, text, options):
    with pytest.raises(error, match=f"^ResidualFSQ: {text}$"):
        ResidualFSQ(**{"levels": [5, 5], "num_quantizers": 3, **options})


@pytest.mark.parametrize(
    "error, text, options",
    [
        (ValueError, "groups must divide dim, 5, got 2", {"dim": 5}),
        (ValueError, "groups must be at least 1, got 0", {"groups": 0}),
        (TypeError, "dim must be an integer, got str", {"dim": "4"}),
        (
            ValueError,
            "is_channel_first must equal accept_image_fmap, True, got False",
            {"accept_image_fmap": True, "is_channel_first": False},
        ),
    ],
)
def test_wrong_options_of_groups(error, text, options):
    with pytest.raises(error, match=f"^GroupedResidualFSQ: {text}$"):
        GroupedResidualFSQ(**{"levels": [5, 5], "num_quantizers": 3, "dim": 4, "groups": 2, **options})


@pytest.mark.parametrize(
    "error, text, call",
    [
        (ValueError, r"x must have 2 channels in dim -1, got shape \(2, 4, 3\)", lambda m, x: m(x)),
        (ValueError, r"x must have 2 channels in dim -1, got shape \(\)", lambda m, x: m(x[0, 0, 0])),
        (TypeError, "x must be a tensor, got list", lambda m, x: m([0.0])),
        (
            TypeError,
            "x must be float32, float64, bfloat16 or float16, got int64",
            lambda m, x: m(x.long()),
        ),
        (
            ValueError,
            r"mask must have the shape \(2, 4\), got \(2, 4, 1\)",
            lambda m, x: m(x[..., :2], mask=x[..., :1] > 0),
        ),
        (
            ValueError,
            r"indices must end in a dim of 3 stages \(fewer only with quantize_dropout\), got shape \(2, 2\)",
            lambda m, x: m.get_codes_from_indices(torch.zeros(2, 2, dtype=torch.int64)),
        ),
        (TypeError, "indices must be integers, got float32", lambda m, x: m.get_output_from_indices(x)),
        (
            TypeError,
            "rand_quantize_dropout_fixed_seed must be an integer, got float",
            lambda m, x: dropping(m)(x[..., :2], rand_quantize_dropout_fixed_seed=1.5),
        ),
        (
            TypeError,
            "x must have the dtype of the parameters, float32, got float64",
            lambda m, x: ResidualFSQ(levels=[5, 5], num_quantizers=3, dim=3)(x.double()),
        ),
        (
            ValueError,
            "rand_quantize_dropout_fixed_seed must be at most .*",
            lambda m, x: dropping(m)(x[..., :2], rand_quantize_dropout_fixed_seed=2**70),
        ),
    ],
)
def test_wrong_inputs(error, text, call):
    with pytest.raises(error, match=f"^ResidualFSQ: {text}$"):
        call(ResidualFSQ(levels=[5, 5], num_quantizers=3), torch.zeros(2, 4, 3))


def dropping(module):
    module.quantize_dropout = True
    return module


@pytest.mark.parametrize("options", [{}, {"orthogonal_rotation": True}, {"noise_dropout": 0.5}])
@pytest.mark.parametrize(
    ("active", "error", "text"),
    [
        (2, TypeError, "active must be a tensor, got int"),
        (torch.tensor(1.5), TypeError, "active must be int64, got float32"),
        (torch.tensor([2]), ValueError, r"active must be 0-d, got \(1,\)"),
        (torch.tensor(-1), ValueError, "active must be at least 0, got -1"),
    ],
)
def test_wrong_active(options, active, error, text):
    with pytest.raises(error, match=f"^ResidualFSQ: {text}$"):
        ResidualFSQ(levels=[5, 5], num_quantizers=3, **options)(torch.zeros(2, 4, 2), active=active)


def test_wrong_inputs_of_groups():
    module = GroupedResidualFSQ(levels=[5, 5], num_quantizers=3, dim=4, groups=2)
    with pytest.raises(
        ValueError, match=r"^GroupedResidualFSQ: x must have 4 channels in dim -1, got shape \(2, 4, 3\)$"
    ):
        module(torch.zeros(2, 4, 3))
    with pytest.raises(
        ValueError, match=r"^GroupedResidualFSQ: indices must start with a dim of 2 groups, got shape \(3, 2, 3\)$"
    ):
        module.get_codes_from_indices(torch.zeros(3, 2, 3, dtype=torch.int64))
