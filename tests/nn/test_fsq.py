"""FSQ against vector-quantize-pytorch, and against Python integers where vector-quantize-pytorch is inexact."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pyflow
from pyflow import _backend
from pyflow.nn import FSQ, ResidualFSQ
from pyflow.nn.fsq import _projected_out, _Widened
from pyflow.reference import fsq as reference
from pyflow.testing import assert_same_bits

LEVELS = [
    (8, 6, 5),
    (8, 5, 5, 5),
    (7, 5, 5, 5, 5),
    (8, 8, 8, 6, 5),
    (8, 8, 8, 5, 5, 5),
    (3,),
    (4, 1000, 3),
    (15, 16, 33),
]
VARIANTS = {
    "vqp": {},
    "hard": {"bound_hard_clamp": True},
    "symmetric": {"preserve_symmetry": True},
    "symmetric_hard": {"preserve_symmetry": True, "bound_hard_clamp": True},
}
# options, shape of z
CASES = [
    ({"levels": [8, 5, 5, 5]}, (3, 50, 4)),
    ({"levels": (8, 5, 5, 5)}, (3, 4, 5, 6)),
    ({"levels": [8, 5, 5, 5], "channel_first": True}, (3, 4, 7)),
    ({"levels": [8, 5, 5, 5], "channel_first": True}, (3, 4)),
    ({"levels": [5, 3], "bound_hard_clamp": True}, (2, 2, 3, 4, 5)),
    ({"levels": [8, 5, 5], "dim": 16, "num_codebooks": 2}, (3, 50, 16)),
    ({"levels": [8, 5, 5], "dim": 16, "num_codebooks": 2}, (3, 16, 5, 6)),
    ({"levels": [8, 5, 5], "num_codebooks": 2}, (3, 6, 5, 6)),
    ({"levels": [8, 5, 5], "dim": 5, "projection_has_bias": False, "keep_num_codebooks_dim": True}, (3, 9, 5)),
    ({"levels": [2, 5, 5], "preserve_symmetry": True, "dim": 7, "channel_first": True}, (3, 7, 11)),
    ({"levels": [5, 5, 5], "orthogonal_rotation": True, "dim": 12}, (3, 12, 5, 6)),
    ({"levels": [2, 5, 5], "preserve_symmetry": True, "noise_dropout": 0.5}, (3, 3, 5, 6)),
    ({"levels": [4, 4], "preserve_symmetry": True, "noise_dropout": 0.5, "orthogonal_rotation": True}, (3, 9, 2)),
    ({"levels": [7, 5, 5], "return_indices": False}, (3, 8, 3)),
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


def near_boundary(z, levels, variant):
    """True where a channel of z (..., d) has its bound within 4 ulp (of the largest bound) of a rounding boundary."""
    single = lambda values: torch.tensor(values, dtype=torch.float32)
    c = reference.constants(levels, variant)
    if variant.startswith("symmetric"):
        squashed = z.double().clamp(-1, 1) if variant == "symmetric_hard" else z.double().tanh()
        bound, reach = (squashed + 1) * single(c.top).double() / 2, single(c.top)
    else:
        u = (z + single(c.shift)).double()
        squashed = u.clamp(-1, 1) if variant == "hard" else u.tanh()
        bound = squashed * single(c.half).double() - single(c.offset).double()
        reach = single(c.top) / 2
    ulp = torch.nextafter(reach, single(math.inf)) - reach
    return ((bound - bound.floor() - 0.5).abs() <= 4 * ulp.double()).any(-1)


def around_boundaries(levels, variant):
    """z (rows, d) at every rounding boundary, and float32 neighbours up to 64 steps away."""
    c, columns = reference.constants(levels, variant), []
    for channel, n in enumerate(levels):
        between = torch.arange(n - 1, dtype=torch.float64) + 0.5
        if variant.startswith("symmetric"):
            squashed = between * 2 / (n - 1) - 1
        else:
            squashed = (between - n // 2 + c.offset[channel]) / c.half[channel]
        z = (squashed if variant.endswith("hard") else squashed.atanh()) - c.shift[channel]
        z = z.float()[:, None]
        step = torch.nextafter(z.abs(), torch.tensor(math.inf)) - z.abs()
        columns.append((z + step * torch.tensor([-64, -16, -4, -1, 0, 1, 4, 16, 64])).flatten())
    rows = max(len(column) for column in columns)
    return torch.stack([column[torch.arange(rows) % len(column)] for column in columns], -1)


def assert_tokens(ours, theirs, z, module, backend):
    """Tokens of z (..., d) may differ near a boundary only, and not at all on the reference or without a tanh."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    differs = ours != theirs
    far = ~near_boundary(z[differs], module.levels, module.variant)
    assert not bool(far.any()), f"{int(far.sum())} of {ours.numel()} tokens differ away from boundaries"
    if backend == "reference" or module.bound_hard_clamp:
        assert not bool(differs.any()), f"{int(differs.sum())} tokens differ"
    return ~differs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options, shape", CASES)
def test_equals_the_peer(peer, backend, options, shape, training):
    theirs, ours = (m.train(training) for m in twins(peer.FSQ, FSQ, **options))
    torch.manual_seed(2)
    z = torch.randn(shape)
    grads, results = [], []
    for module in (theirs, ours):
        torch.manual_seed(3)
        leaf = z.clone().requires_grad_()
        results.append(module(leaf))
        results[-1][0].square().sum().backward()
        grads.append(leaf.grad)
    (their_out, their_indices), (out, indices) = results
    last = ours._channels_in_front(z.dim())
    h = ours.project_in(z.movedim(1, -1) if last else z).unflatten(-1, (ours.num_codebooks, -1))
    h = h @ ours.orthogonal_rot if ours.orthogonal_rotation else h
    if indices is None:
        assert their_indices is None
        same = ~near_boundary(h, ours.levels, ours.variant).any(-1)
    else:
        h = h if ours.keep_num_codebooks_dim else h.squeeze(-2)
        same = assert_tokens(indices, their_indices, h, ours, backend)
        same = same.all(-1) if ours.keep_num_codebooks_dim else same
        assert indices.is_contiguous()
    rows = [t.movedim(1, -1)[same] if last else t[same] for t in (out, their_out, *grads)]
    assert out.shape == their_out.shape == z.shape
    assert_same_bits(rows[0], rows[1])
    torch.testing.assert_close(rows[3], rows[2], atol=1e-6, rtol=1e-5)
    for ours_grad, theirs_grad in zip(
        (p.grad for p in ours.parameters()), (p.grad for p in theirs.parameters()), strict=True
    ):
        if bool(same.all()):
            torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("levels", LEVELS)
def test_tokens_differ_only_near_a_boundary(peer, backend, levels, variant):
    torch.manual_seed(0)
    theirs, ours = peer.FSQ(list(levels), **VARIANTS[variant]), FSQ(levels, **VARIANTS[variant])
    assert ours.variant == variant
    z = torch.randn(6_000, len(levels)) * torch.linspace(0.1, 3, 6_000)[:, None]
    z = torch.cat((z, around_boundaries(levels, variant)))[None]
    (codes, indices), (their_codes, their_indices) = ours(z), theirs(z)
    same = assert_tokens(indices, their_indices, z, ours, backend)
    assert_same_bits(codes[same], their_codes[same])
    assert_same_bits(ours.indices_to_codes(indices), codes)
    assert ours.codes_to_indices(codes).equal(indices)


@pytest.mark.parametrize("variant", VARIANTS)
def test_methods_equal_the_peer(peer, variant):
    theirs, ours = twins(peer.FSQ, FSQ, levels=[8, 5, 6], **VARIANTS[variant])
    z = torch.randn(2, 9, 3)
    with pyflow.backend("reference"):
        for name in ("bound", "symmetry_preserving_bound"):
            for hard in (False, True):
                assert_same_bits(getattr(ours, name)(z, hard_clamp=hard), getattr(theirs, name)(z, hard_clamp=hard))
        assert_same_bits(ours.bound(z, eps=0.05), theirs.bound(z, eps=0.05))
        assert_same_bits(ours.quantize(z), theirs.quantize(z))
    codes = theirs.quantize(z)
    indices = theirs.codes_to_indices(codes)
    assert_same_bits(ours.codes_to_indices(codes), indices)
    for dtype in (torch.int32, torch.int64):
        for name in ("indices_to_codes", "indices_to_level_indices", "_indices_to_codes"):
            assert_same_bits(getattr(ours, name)(indices.to(dtype)), getattr(theirs, name)(indices.to(dtype)))
    for name in ("_scale_and_shift", "_scale_and_shift_inverse"):
        assert_same_bits(getattr(ours, name)(codes), getattr(theirs, name)(codes))
    assert_same_bits(ours.implicit_codebook, theirs.implicit_codebook)


@pytest.mark.parametrize("options, shape", [case for case in CASES if case[0].get("return_indices", True)])
def test_decoding_equals_the_peer(peer, options, shape):
    theirs, ours = (m.eval() for m in twins(peer.FSQ, FSQ, **options))
    out, indices = ours(torch.randn(shape))
    assert_same_bits(ours.indices_to_codes(indices), theirs.indices_to_codes(indices))
    torch.testing.assert_close(ours.indices_to_codes(indices), out, atol=1e-6, rtol=0)


def test_signature_attributes_and_state(peer):
    expected = list(inspect.signature(peer.FSQ.__init__).parameters.items())
    got = list(inspect.signature(FSQ.__init__).parameters.items())
    assert [(name, p.default, p.kind) for name, p in got] == [(name, p.default, p.kind) for name, p in expected]
    theirs, ours = twins(peer.FSQ, FSQ, levels=[5, 5], dim=7, orthogonal_rotation=True)
    for name, value in vars(theirs).items():
        if not name.startswith("_"):
            assert type(getattr(ours, name)) is type(value) and (name == "training" or getattr(ours, name) == value)
    for name, buffer in theirs.named_buffers():
        assert_same_bits(getattr(ours, name), buffer)
    for a, b in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            for parameter in a.parameters():
                parameter.add_(1)
        b.load_state_dict(a.state_dict())
    z = torch.randn(2, 3, 7)
    with pyflow.backend("reference"):
        assert_same_bits(ours(z)[0], theirs(z)[0])


def exact_index(digits, levels):
    index, basis = 0, 1
    for digit, n in zip(digits, levels, strict=True):
        index, basis = index + int(digit) * basis, basis * n
    return index


@pytest.mark.parametrize("preserve_symmetry", [False, True])
@pytest.mark.parametrize("levels", [(8,) * 9, (1000, 1000, 1000), (8,) * 11, (1000,) * 6, (2**21, 2**21, 2**21)])
def test_indices_of_large_codebooks_are_exact_unlike_the_peer(peer, levels, preserve_symmetry):
    torch.manual_seed(0)
    ours = FSQ(levels, preserve_symmetry=preserve_symmetry)
    # with return_indices=True the peer allocates the whole codebook
    theirs = peer.FSQ(levels, preserve_symmetry=preserve_symmetry, return_indices=False)
    assert ours.codebook_size == math.prod(levels) and type(ours.codebook_size) is int
    codes, indices = ours(torch.randn(1, 200, len(levels)))
    assert indices.dtype == (torch.int32 if math.prod(levels) <= 2**31 else torch.int64)
    widths = [Fraction(n - 1, 2) if preserve_symmetry else Fraction(n // 2) for n in levels]
    # (c + 1) (L - 1) / 2 and c (L // 2) + L // 2
    exact = [
        exact_index([round((Fraction(c) + 1) * w) for c, w in zip(row, widths, strict=True)], levels)
        for row in codes[0].tolist()
    ]
    assert indices[0].tolist() == exact
    assert ours.codes_to_indices(codes)[0].tolist() == exact
    assert_same_bits(ours.indices_to_codes(indices), codes)
    digits = ours.indices_to_level_indices(indices)[0].tolist()
    assert [exact_index(row, levels) for row in digits] == exact
    wrong = sum(a != b for a, b in zip(theirs.codes_to_indices(codes)[0].tolist(), exact, strict=True))
    assert wrong > 20, "the peer's float32 sum has become exact"


def test_digits_stay_in_range_unlike_the_peer(peer):
    levels, z = [1501, 5], torch.tensor([[[20.0, 0.0], [-20.0, 0.0]]])
    theirs, ours = peer.FSQ(levels), FSQ(levels)
    codes, indices = ours(z)
    assert indices.tolist() == [[1500 + 2 * 1501, 2 * 1501]] and codes[0, :, 0].tolist() == [1, -1]
    assert theirs(z)[0][0, 0, 0] > 1 and theirs(z)[1].tolist() != indices.tolist()


def test_codebooks_beyond_int64_have_codes_only():
    levels = [8] * 22
    with pytest.raises(
        ValueError, match=r"FSQ: levels must have a product of at most 2\*\*63 to be numbered, got \(8, "
    ):
        FSQ(levels)
    module = FSQ(levels, return_indices=False)
    codes, indices = module(torch.randn(3, 22))
    assert indices is None and codes.shape == (3, 22) and module.codebook_size == 8**22
    with pytest.raises(ValueError, match=r"FSQ: levels must have a product of at most 2\*\*63 to be numbered"):
        module.codes_to_indices(codes)


def test_no_codebook_is_stored():
    module = FSQ([1000] * 6)
    assert not sum(buffer.numel() for buffer in module.buffers()) and not module.state_dict()
    small = FSQ([3, 5])
    assert small.implicit_codebook.shape == (15, 2)
    assert small.codes_to_indices(small.implicit_codebook).tolist() == list(range(15))


@pytest.mark.parametrize("options", [{}, {"num_codebooks": 2}, {"dim": 5}, {"orthogonal_rotation": True}])
def test_any_rank(options):
    torch.manual_seed(0)
    module = FSQ([5, 5, 5], **options)
    z = torch.randn(6, 7, module.dim)
    out, indices = module(z)
    for shape in ((module.dim,), (4, module.dim), (2, 3, module.dim)):
        rows = [t.flatten(0, 1)[: math.prod(shape[:-1])] for t in (z, out, indices)]
        some = module(rows[0].reshape(shape))
        torch.testing.assert_close(some[0], rows[1].reshape(shape))
        assert some[1].equal(rows[2].reshape(shape[:-1] + indices.shape[2:]))
    video = z.view(6, 7, 1, 1, -1).movedim(-1, 1)
    some = module(video)
    torch.testing.assert_close(some[0], out.view(6, 7, 1, 1, -1).movedim(-1, 1))
    assert some[1].equal(indices.unflatten(1, (7, 1, 1)))
    for empty in (z[:0], video[:0], z[:, :0]):
        assert module(empty)[0].shape == empty.shape


def test_two_dims_crash_the_peer(peer):
    with pytest.raises(Exception, match="b n"):
        peer.FSQ([5, 5])(torch.zeros(3, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"preserve_symmetry": True}, {"orthogonal_rotation": True}])
def test_bound_of_storage_dtypes_is_computed_in_float32(dtype, options):
    torch.manual_seed(0)
    module, z = FSQ([8, 8, 8], **options), torch.randn(2, 50, 3).to(dtype)
    out, indices = module(z)
    wide = module(z if dtype == torch.float64 else z.float())
    assert out.dtype == dtype and indices.equal(wide[1])
    assert_same_bits(out, wide[0].to(dtype))
    projected = FSQ([8, 8, 8], dim=5, **options).to(dtype)
    out, indices = projected(torch.randn(2, 50, 5, dtype=dtype))
    assert out.dtype == projected.indices_to_codes(indices).dtype == dtype


def test_autocast_changes_only_the_projections():
    module, z = FSQ([5, 5, 5], orthogonal_rotation=True), torch.randn(2, 50, 3)
    plain = module(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = module(z)
        projected = FSQ([5, 5, 5], dim=8)(torch.randn(2, 50, 8))
    assert_same_bits(cast[0], plain[0])
    assert cast[1].equal(plain[1]) and projected[0].dtype == torch.bfloat16


def test_nan_and_infinity():
    module = FSQ([5, 5])
    out, indices = module(torch.tensor([[math.nan, 0.0], [math.inf, -math.inf]]))
    assert indices.tolist() == [-1, 4] and out[0, 0].isnan() and out[1].tolist() == [1, -1]
    assert module.codes_to_indices(out).tolist() == [-1, 4]
    assert module.indices_to_level_indices(indices).tolist() == [[-1, -1], [4, 0]]
    assert module.indices_to_codes(indices)[0].isnan().all()


PADDED = [
    ({}, (3, 6, 3)),
    ({"dim": 5}, (3, 6, 5)),
    ({"channel_first": True}, (3, 3, 6)),
    ({"orthogonal_rotation": True, "num_codebooks": 2}, (3, 6, 6)),
    ({"preserve_symmetry": True, "noise_dropout": 0.5}, (3, 6, 3)),
]


@pytest.mark.parametrize("options, shape", PADDED)
def test_padding_reaches_neither_outputs_nor_gradients(options, shape):
    torch.manual_seed(0)
    module = FSQ([5, 5, 5], **options)
    lengths = torch.tensor([6, 2, 0])
    valid = torch.arange(6) < lengths[:, None]
    channel = 1 if module.channel_first else -1
    z = torch.randn(shape)
    poisoned = torch.where(valid.unsqueeze(channel), z, torch.nan).requires_grad_()
    torch.manual_seed(1)
    out, indices = module(poisoned, lengths=lengths)
    torch.manual_seed(1)
    by_mask = module(poisoned, mask=valid)
    assert_same_bits(by_mask[0], out)
    assert by_mask[1].equal(indices)
    torch.manual_seed(1)
    expected = module(z)
    assert_same_bits(out.movedim(channel, -1)[valid], expected[0].movedim(channel, -1)[valid])
    assert (out.movedim(channel, -1)[~valid] == 0).all() and (indices[~valid] == -1).all()
    assert indices[valid].equal(expected[1][valid])
    out.square().sum().backward()
    assert (poisoned.grad.movedim(channel, -1)[~valid] == 0).all() and not poisoned.grad.isnan().any()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    if not module.noise_dropout:
        module.zero_grad()
        decoded = module.indices_to_codes(indices, lengths=lengths)
        torch.testing.assert_close(decoded, out)
        assert_same_bits(module.indices_to_codes(indices, mask=valid), decoded)
        if module.has_projections:
            decoded.square().sum().backward()
            assert all(p.grad.isfinite().all() for p in module.project_out.parameters())


def test_mask_of_images():
    module, z = FSQ([5, 5]), torch.randn(2, 2, 3, 4)
    mask = torch.rand(2, 3, 4) > 0.5
    out, indices = module(torch.where(mask[:, None], z, torch.nan), mask=mask)
    assert_same_bits(out, torch.where(mask[:, None], module(z)[0], 0))
    assert indices.equal(torch.where(mask, module(z)[1], -1))


class Operators(TorchDispatchMode):
    """Records the operators that run and the bytes they allocate."""

    VIEWS = frozenset(
        {
            "transpose",
            "permute",
            "view",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "_unsafe_view",
            "t",
            "detach",
            "alias",
        }
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))

    @property
    def computing(self):
        return [name for name in self.names if name not in self.VIEWS]


@compiled_kernels
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options, shape",
    [
        ({}, (2, 9, 3)),
        ({"num_codebooks": 2}, (2, 9, 6)),
        ({}, (2, 3, 4, 5)),
        ({"num_codebooks": 2}, (2, 6, 4, 5)),
        ({"channel_first": True}, (2, 3, 7)),
        ({}, (9, 3)),
    ],
)
def test_one_operator_and_views(options, shape, training):
    module, z = FSQ([8, 5, 5], **options).train(training), torch.randn(shape)
    for given in (z, z.requires_grad_()):
        with Operators() as ran:
            out, indices = module(given)
        assert ran.computing == ["fsq"]
        assert out.untyped_storage().nbytes() == z.nbytes
        assert out.is_contiguous() and indices.is_contiguous()
    # a crop: its rows cannot be merged by a reshape
    if len(shape) == 4:
        crop = torch.randn(2, shape[1], 6, 7)[..., 1:-1, 1:-1]
        with Operators() as ran:
            module(crop)
        assert ran.computing == ["fsq"]


def test_indices_are_not_computed_unless_asked_for():
    module = FSQ([8, 5, 5], return_indices=False)
    out, indices = module(torch.randn(4, 3))
    assert indices is None and out.shape == (4, 3)
    module.track_usage()
    assert module(torch.randn(4, 3))[1] is None and module.usage().counts.sum() == 4


@pytest.mark.parametrize("index", [25, 300, -2])
def test_level_indices_out_of_range(index):
    with pytest.raises(ValueError, match=rf"^FSQ: indices must lie in \[-1, 25\), got {index}$"):
        FSQ([5, 5]).indices_to_level_indices(torch.tensor([0, index, -1, 24]))


def test_rotation_on_meta():
    assert FSQ([5, 5], orthogonal_rotation=True).to("meta")(torch.zeros(1, 3, 2, device="meta"))[0].shape == (1, 3, 2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_usage_counts_recomputed_batches_once(use_reentrant):
    module, z = FSQ([5, 5]), torch.randn(1, 10, 2, requires_grad=True)
    module.track_usage()
    # exp saves a tensor after the quantiser, so the recomputation runs the quantiser
    checkpoint(lambda z: module(z)[0].exp().square(), z, use_reentrant=use_reentrant).sum().backward()
    assert module.usage().counts.sum() == 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"orthogonal_rotation": True}])
def test_codes_in_the_dtype_of_z(dtype, options):
    module, z = FSQ([7, 7, 7], **options), torch.randn(1, 50, 3).to(dtype)
    out, indices = module(z)
    codes = module.indices_to_codes(indices, dtype=dtype)
    assert codes.dtype == out.dtype == dtype and codes.equal(out)
    assert module.indices_to_codes(indices).dtype == torch.float32


@pytest.mark.parametrize(
    "options, shape",
    [
        ({}, (2, 9, 3)),
        ({}, (2, 3, 4, 5)),
        ({"num_codebooks": 2, "dim": 8}, (2, 8, 4, 5)),
        ({"preserve_symmetry": True, "noise_dropout": 0.5, "orthogonal_rotation": True}, (2, 9, 3)),
    ],
)
def test_compiles_without_graph_breaks(options, shape):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = FSQ([5, 5, 5], **options)
    module.track_usage()
    plain, z = copy.deepcopy(module), torch.randn(shape, requires_grad=True)
    for training in (True, False):
        compiled = torch.compile(module.train(training), fullgraph=True, backend="aot_eager")
        plain.train(training)
        for _ in range(2):
            torch.manual_seed(1)
            got = compiled(z)
            torch.manual_seed(1)
            expected = plain(z)
            torch.testing.assert_close(got, expected)
        if not (training and module.noise_dropout):
            grads = [torch.autograd.grad(out.square().sum(), z)[0] for out, _ in (got, expected)]
            torch.testing.assert_close(*grads)
    assert module.usage().counts.equal(plain.usage().counts)


def test_compiles_with_padding():
    torch._dynamo.reset()
    module, z = FSQ([5, 5, 5], dim=8), torch.randn(2, 9, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for options in ({"mask": torch.rand(2, 9) > 0.5}, {"lengths": torch.tensor([4, 9])}):
        torch.testing.assert_close(compiled(z, **options), module(z, **options))


def test_noise_dropout_is_the_share_unlike_the_peers_constant_half(peer):
    torch.manual_seed(0)
    options = {"levels": [9, 9], "preserve_symmetry": True, "noise_dropout": 0.1}
    z = torch.randn(1, 20_000, 2)
    shares = []
    for kind in (FSQ, peer.FSQ):
        module = kind(**options)
        codes = module.quantize(z).detach()
        inner = codes.abs() < 0.5  # here the clamp changes no offset
        moved = module(z)[0] != codes
        shares.append(moved[inner].float().mean().item())
        assert (module.eval()(z)[0] == codes).all()
        assert ((module.maybe_apply_noise(codes) - codes).abs() <= 0.5).all()
    assert abs(shares[0] - 0.1) < 0.01 and abs(shares[1] - 0.5) < 0.02


def test_usage_equals_codebook_usage_of_collected_indices():
    torch.manual_seed(0)
    module, seen = FSQ([5, 5, 3], num_codebooks=2), []
    with pytest.raises(RuntimeError, match=r"^FSQ: usage needs track_usage\(\) to be called first$"):
        module.usage()
    module(torch.randn(9, 6))
    module.track_usage()
    for n in (50, 1, 0):
        lengths = torch.tensor([n, n // 2])
        seen.append(module(torch.randn(2, n, 6), lengths=lengths)[1].flatten())
    for got, expected in zip(module.usage(), pyflow.ops.codebook_usage(torch.cat(seen), 75), strict=True):
        assert_same_bits(got, expected)
    assert "_counts" not in module.state_dict()
    module.track_usage()
    empty = module.usage()
    assert empty.counts.numel() == 0 and empty.fraction == 0 and empty.perplexity == 0
    with Operators() as ran:
        module(torch.randn(9, 6))
    assert "_local_scalar_dense" not in ran.names and "scatter_add_" in ran.names


def test_usage_survives_moves():
    module = FSQ([5, 5])
    module.track_usage()
    z = torch.randn(90, 2)
    module(z)
    want = module.usage().counts
    for moved in (module.bfloat16(), module.float(), module.to_empty(device="cpu")):
        assert_same_bits(moved.usage().counts, want)
    module = FSQ([5, 5]).to("meta")
    module.track_usage()
    module.to_empty(device="cpu")(z)
    assert_same_bits(module.usage().counts, want)


def test_usage_of_a_codebook_too_large_to_count():
    text = (
        r"^FSQ: track_usage needs a codebook of at most 2\*\*24 entries, got 1000000000; "
        r"collect indices and use pyflow.ops.codebook_usage$"
    )
    with pytest.raises(ValueError, match=text):
        FSQ([1000] * 3).track_usage()


def test_rotation_of_unequal_levels_warns():
    with pytest.warns(UserWarning, match=r"FSQ: orthogonal_rotation suits levels that are all the same, got \(5, 3\)"):
        FSQ([5, 3], orthogonal_rotation=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hard", [False, True])
def test_bound_with_another_margin(dtype, hard):
    torch.manual_seed(0)
    quantizer, z = FSQ([8, 5, 7]), torch.randn(500, 3).to(dtype)
    # the same codes as with the default margin, which this one does not differ from by a float64's rounding
    near, codes = quantizer.bound(z, eps=1e-3 + 1e-15, hard_clamp=hard), quantizer.bound(z, hard_clamp=hard)
    assert near.dtype == codes.dtype == dtype
    assert (near != codes).sum() <= 1
    wide = quantizer.bound(z.float(), eps=0.1, hard_clamp=hard)
    torch.testing.assert_close(quantizer.bound(z, eps=0.1, hard_clamp=hard), wide.to(dtype), atol=1e-2, rtol=0)


def test_copies_and_prints():
    module = copy.deepcopy(FSQ([8, 5], dim=4))
    assert repr(module).startswith("FSQ(\n  levels=(8, 5), dim=4, num_codebooks=1, variant=vqp")
    moved = FSQ([8, 5], dim=4).to("meta")
    assert moved._levels.is_meta and moved._basis.is_meta


@pytest.mark.parametrize(
    "error, text, options",
    [
        (ValueError, r"FSQ: levels must be integers >= 2, got \(8, 1\)", {"levels": (8, 1)}),
        (TypeError, "FSQ: levels must be a list of integers, got int", {"levels": 8}),
        (ValueError, r"FSQ: levels must be at least 3 without preserve_symmetry, got \(2, 5\)", {"levels": [2, 5]}),
        (ValueError, "FSQ: noise_dropout must be 0 without preserve_symmetry, got 0.5", {"noise_dropout": 0.5}),
        (ValueError, r"FSQ: noise_dropout must lie in \[0, 1\], got 1.5", {"noise_dropout": 1.5}),
        (TypeError, "FSQ: noise_dropout must be a number, got str", {"noise_dropout": "half"}),
        (ValueError, "FSQ: num_codebooks must be at least 1, got 0", {"num_codebooks": 0}),
        (TypeError, "FSQ: dim must be an integer, got float", {"dim": 2.0}),
        (ValueError, "FSQ: dim must be at least 1, got 0", {"dim": 0}),
        (
            ValueError,
            "FSQ: keep_num_codebooks_dim must be true for 2 codebooks, got False",
            {"num_codebooks": 2, "keep_num_codebooks_dim": False},
        ),
    ],
)
def test_wrong_options(error, text, options):
    with pytest.raises(error, match=f"^{text}$"):
        FSQ(**{"levels": [5, 5], **options})


@pytest.mark.parametrize(
    "error, text, call",
    [
        (ValueError, r"FSQ: z must have 2 channels in dim -1, got shape \(4, 3\)", lambda m, z: m(z[0])),
        (ValueError, r"FSQ: z must have 2 channels in dim 1, got shape \(2, 4, 3, 1\)", lambda m, z: m(z[..., None])),
        (ValueError, r"FSQ: z must have 2 channels in dim -1, got shape \(\)", lambda m, z: m(z[0, 0, 0])),
        (TypeError, "FSQ: z must be float32, float64, bfloat16 or float16, got int64", lambda m, z: m(z.long())),
        (TypeError, "FSQ: z must be a tensor, got list", lambda m, z: m([0.0])),
        (
            TypeError,
            "FSQ: z must have the dtype of the parameters, float32, got float64",
            lambda m, z: FSQ([5, 5], dim=3)(z.double()),
        ),
        (
            ValueError,
            "FSQ: mask and lengths must not be given together, got both",
            lambda m, z: m(z[..., :2], mask=torch.ones(2, 4) > 0, lengths=torch.tensor([1, 2])),
        ),
        (
            TypeError,
            "FSQ: mask must be bool, true at valid positions, got float32",
            lambda m, z: m(z[..., :2], mask=torch.ones(2, 4)),
        ),
        (TypeError, "FSQ: mask must be a tensor, got list", lambda m, z: m(z[..., :2], mask=[True])),
        (
            ValueError,
            r"FSQ: mask must have the shape \(2, 4\), got \(2, 4, 2\)",
            lambda m, z: m(z[..., :2], mask=z[..., :2] > 0),
        ),
        (
            ValueError,
            "FSQ: mask must be on the device of the input, cpu, got meta",
            lambda m, z: m(z[..., :2], mask=torch.ones(2, 4, dtype=torch.bool, device="meta")),
        ),
        (
            ValueError,
            r"FSQ: lengths must have the shape \(2,\), got \(3,\)",
            lambda m, z: m(z[..., :2], lengths=torch.tensor([1, 2, 3])),
        ),
        (
            ValueError,
            r"FSQ: lengths must lie in \[0, 4\], got 5",
            lambda m, z: m(z[..., :2], lengths=torch.tensor([1, 5])),
        ),
        (
            ValueError,
            r"FSQ: lengths must lie in \[0, 4\], got -1",
            lambda m, z: m(z[..., :2], lengths=torch.tensor([-1, 4])),
        ),
        (
            TypeError,
            "FSQ: lengths must be integers, got float32",
            lambda m, z: m(z[..., :2], lengths=torch.tensor([1.0, 2.0])),
        ),
        (TypeError, "FSQ: lengths must be a tensor, got list", lambda m, z: m(z[..., :2], lengths=[1, 2])),
        (
            ValueError,
            r"FSQ: lengths must come with sequences, positions of shape \(B, n\), got \(4,\)",
            lambda m, z: m(z[0, :, :2], lengths=torch.tensor([1])),
        ),
        (TypeError, "FSQ: indices must be integers, got float32", lambda m, z: m.indices_to_codes(z)),
        (TypeError, "FSQ: indices must be a tensor, got list", lambda m, z: m.indices_to_level_indices([1])),
        (
            ValueError,
            r"FSQ: indices must end in a dim of 2 codebooks, got shape \(4, 3\)",
            lambda m, z: FSQ([5, 5], num_codebooks=2).indices_to_codes(z[0].long()),
        ),
        (
            ValueError,
            r"fsq_decode: indices must lie in \[-1, 25\), got 25",
            lambda m, z: m.indices_to_codes(torch.tensor([25])),
        ),
        (
            ValueError,
            r"FSQ: zhat must have 2 channels last, got shape \(2, 4, 3\)",
            lambda m, z: m.codes_to_indices(z),
        ),
        (
            ValueError,
            r"FSQ: z must have 2 channels last, got shape \(2, 4, 1\)",
            lambda m, z: m.bound(z[..., :1], eps=1e-2),
        ),
    ],
)
def test_wrong_inputs(error, text, call):
    with pytest.raises(error, match=f"^{text}$"):
        call(FSQ([5, 5]), torch.zeros(2, 4, 3))


def test_trains_an_encoder_and_a_decoder():
    torch.manual_seed(0)
    net = nn.ModuleList((nn.Linear(6, 16), FSQ([5, 5, 5], dim=16), nn.Linear(16, 6)))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x, losses = torch.randn(64, 6), []
    for _ in range(60):
        encoded, _ = net[1](net[0](x))
        losses.append((net[2](encoded) - x).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("lead", ((7,), (3, 5)))
def test_the_projection_behind_the_codes_is_a_linear_layer(lead, bias, monkeypatch):
    linear, other = nn.Linear(3, 10, bias).double(), nn.Linear(10, 3).double()
    codes = torch.randn(*lead, 3, dtype=torch.float64, requires_grad=True)
    inputs = (codes, *linear.parameters())
    assert "Widened" not in type(_projected_out(linear, codes).grad_fn).__name__
    monkeypatch.setattr("pyflow.nn.fsq._ROWS", 1)
    out = _projected_out(linear, codes)
    assert "Widened" in type(out.grad_fn).__name__ and torch.equal(out, linear(codes))
    grad = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(linear(codes), inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    call = lambda x, *parts: _Widened.apply(x, *parts, *[None] * (2 - len(parts)))
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)
    # torch's own product under everything that looks into it
    narrower = _projected_out(other, torch.randn(4, 10, dtype=torch.float64))
    assert "Widened" not in type(narrower.grad_fn).__name__
    tangent = torch.func.jvp(lambda x: _projected_out(linear, x), (codes.detach(),), (codes.detach(),))[1]
    torch.testing.assert_close(tangent, codes.detach() @ linear.weight.detach().T)
    seen = []
    linear.register_forward_hook(lambda *_: seen.append(1))
    _projected_out(linear, codes)
    assert seen == [1]


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", ((600, 16), (2, 300, 16), (2, 16, 20, 20)))
def test_out_may_be_changed_in_place(shape, bias):
    quantizer, z = FSQ([8, 5, 5, 5], dim=16, projection_has_bias=bias), torch.randn(shape)
    inputs = (z.requires_grad_(), *quantizer.parameters())
    want, got = quantizer(z)[0].relu(), nn.ReLU(inplace=True)(quantizer(z)[0])
    assert_same_bits(got, want)
    for each, wanted in zip(*(torch.autograd.grad(o.square().sum(), inputs) for o in (got, want)), strict=True):
        assert_same_bits(each, wanted)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", ((600, 16), (2, 300, 16), (2, 16, 20, 20)))
def test_batched_gradients_of_the_projections(shape, bias):
    quantizer, z = FSQ([8, 5, 5, 5], dim=16, projection_has_bias=bias).double(), torch.randn(shape).double()
    inputs = (z.requires_grad_(), *quantizer.parameters())
    out = quantizer(z)[0]
    grads = torch.randn(2, *out.shape).double()
    batched = torch.autograd.grad(out, inputs, grads, retain_graph=True, is_grads_batched=True)
    for i, grad in enumerate(grads):
        for each, want in zip(batched, torch.autograd.grad(out, inputs, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(each[i], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", (FSQ, functools.partial(ResidualFSQ, num_quantizers=2)))
def test_hooks_of_all_modules_see_the_projections(kind):
    quantizer, z = kind(levels=[8, 5, 5, 5], dim=16), torch.randn(1, 600, 16)
    seen = []
    hook = register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        quantizer(z)
    finally:
        hook.remove()
    assert seen.count(quantizer.project_in) == seen.count(quantizer.project_out) == 1
