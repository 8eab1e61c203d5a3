"""Buffers and constants keep their values through casts, averaging, to_empty and old state_dicts."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from pyflow.nn import (
    FSQ,
    ActNorm,
    AffineCoupling,
    GroupedResidualFSQ,
    Invertible1x1Conv,
    ResidualFSQ,
    ReversibleSequential,
    Scale,
    apply_spectral_norm,
    apply_weight_norm,
)
from pyflow.ops import codebook_usage, fsq_decode
from pyflow.testing import assert_same_bits

# layers whose output changes if a value is lost
LAYERS = {
    "actnorm": lambda: ActNorm(17),
    "scale": lambda: Scale(17, data_init=True),
    "conv": lambda: Invertible1x1Conv(17),
}
QUANTISERS = {
    "fsq": lambda: FSQ([8, 5, 5]),
    "fsq symmetric": lambda: FSQ([8, 5, 5], preserve_symmetry=True),
    "fsq projected": lambda: FSQ([8, 5, 5], dim=4),
    "fsq rotated": lambda: FSQ([5, 5, 5], orthogonal_rotation=True),
    "residual": lambda: ResidualFSQ(levels=[8, 5, 5], num_quantizers=4),
    "residual projected": lambda: ResidualFSQ(levels=[8, 5, 5], num_quantizers=4, dim=4),
    "residual rotated": lambda: ResidualFSQ(levels=[5, 5, 5], num_quantizers=3, orthogonal_rotation=True),
    "residual soft": lambda: ResidualFSQ(
        levels=[8, 5, 5], num_quantizers=3, bound_hard_clamp=False, soft_clamp_input_value=[1.5, 2.1, 2.5]
    ),
    "grouped": lambda: GroupedResidualFSQ(dim=6, groups=2, levels=[8, 5, 5], num_quantizers=3),
}
UNPROJECTED = [name for name in QUANTISERS if "projected" not in name]


def decode(module, indices):
    return module.indices_to_codes(indices) if isinstance(module, FSQ) else module.get_output_from_indices(indices)


@pytest.fixture(params=QUANTISERS)
def quantiser(request):
    torch.manual_seed(0)
    return request.param, QUANTISERS[request.param]().eval()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("average", [{}, {"avg_fn": get_ema_avg_fn(0.9)}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}])
def test_averaging_keeps_buffers(name, average):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    mean = AveragedModel(layer, use_buffers=True, **average)
    x = 3 * torch.randn(64, 17) + 1
    for _ in range(4):
        layer(x)
        mean.update_parameters(layer)
    y = torch.randn(8, 17)
    torch.testing.assert_close(mean(y), layer(y))
    torch.testing.assert_close(mean.module.inverse(y), layer.inverse(y))


@pytest.mark.parametrize("name", UNPROJECTED)
def test_averaging_keeps_quantisers(name):
    torch.manual_seed(0)
    module = QUANTISERS[name]().eval()
    mean = AveragedModel(module, use_buffers=True, avg_fn=get_ema_avg_fn(0.9))
    for _ in range(4):
        mean.update_parameters(module)
    x = torch.randn(2, 50, module.dim)
    if "rotated" not in name:
        assert mean(x)[1].equal(module(x)[1])
    if isinstance(module, FSQ):
        codes = fsq_decode(module(x)[1], module.levels, variant=module.variant)
        assert mean.module.codes_to_indices(codes).equal(module(x)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", UNPROJECTED)
def test_casts_change_no_token(name, dtype):
    torch.manual_seed(0)
    module = QUANTISERS[name]().eval()
    cast = copy.deepcopy(module).to(dtype)
    x = torch.randn(1, 2000, module.dim).to(dtype)
    tokens = module(x.float())[1]
    assert cast(x)[1].equal(tokens)
    assert cast.float()(x.float())[1].equal(tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_decoding_after_a_cast_equals_forward(quantiser, dtype):
    _, module = quantiser
    module.to(dtype)
    out, indices = module(torch.randn(1, 500, module.dim, dtype=dtype))
    assert_same_bits(decode(module, indices), out)


def test_permutation_of_many_channels_survives_bfloat16():
    torch.manual_seed(0)
    layer = Invertible1x1Conv(300).bfloat16()
    assert layer.permutation.sort()[0].equal(torch.arange(300.0))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("assign", [False, True])
def test_layers_from_meta_and_older_state_dicts(name, assign):
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(64, 17)
    layer(3 * x)
    state = layer.state_dict()
    older = {k: v.bool() if k == "initialized" else v.long() if k == "permutation" else v for k, v in state.items()}
    for given in (state, older):
        dtypes = {key: value.dtype for key, value in given.items()}
        with torch.device("meta"):
            fresh = LAYERS[name]()
        if not assign:
            fresh.to_empty(device="cpu")
        fresh.load_state_dict(given, assign=assign)
        assert fresh(x)[0].equal(layer(x)[0])
        assert all(b.is_floating_point() for b in fresh.buffers())
        assert {key: value.dtype for key, value in given.items()} == dtypes


@pytest.mark.parametrize("assign", [False, True])
def test_quantisers_from_meta(quantiser, assign):
    name, module = quantiser
    with torch.device("meta"):
        fresh = QUANTISERS[name]().eval()
    if not assign:
        fresh.to_empty(device="cpu")
    fresh.load_state_dict(module.state_dict(), assign=assign)
    x = torch.randn(2, 20, module.dim)
    out, indices = fresh(x)
    assert indices.equal(module(x)[1])
    assert_same_bits(decode(fresh, indices), out)
    if isinstance(fresh, FSQ):
        assert fresh.codes_to_indices(fsq_decode(indices, fresh.levels, variant=fresh.variant)).equal(indices)
        assert fresh.indices_to_level_indices(indices).equal(module.indices_to_level_indices(indices))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_affects_new_modules_only(quantiser, dtype):
    name, module = quantiser
    x = torch.randn(2, 20, module.dim)
    out, indices = module(x)
    torch.set_default_dtype(dtype)
    try:
        assert_same_bits(decode(module, indices), out)
        if isinstance(module, FSQ):
            codes = fsq_decode(indices, module.levels, variant=module.variant)
            assert module.codes_to_indices(codes).equal(indices)
            assert module.bound(codes, eps=1e-2).dtype == torch.float32
        assert codebook_usage(indices, module.codebook_size).fraction.dtype == torch.float32
        made = QUANTISERS[name]().eval()
        out, indices = made(x.to(dtype))
        assert_same_bits(decode(made, indices), out)
        assert {p.dtype for layer in LAYERS.values() for p in layer().parameters()} == {dtype}
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_device_affects_new_modules_only(quantiser):
    _, module = quantiser
    x = torch.randn(2, 20, module.dim)
    torch.set_default_device("meta")
    try:
        module.track_usage()
        out, indices = module(x)
        again = decode(module, indices)
        module.train()(x)
        module.usage()
    finally:
        torch.set_default_device(None)
    assert_same_bits(again, out)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_indices_and_lengths_of_any_integer_dtype(quantiser, dtype):
    _, module = quantiser
    x = torch.randn(2, 20, module.dim)
    indices = module(x)[1].clamp(max=100)
    assert decode(module, indices.to(dtype)).equal(decode(module, indices))
    lengths = torch.tensor([3, 20])
    assert module(x, lengths=lengths.to(dtype))[1].equal(module(x, lengths=lengths)[1])
    if isinstance(module, FSQ):
        assert module.indices_to_level_indices(indices.to(dtype)).equal(module.indices_to_level_indices(indices))
    counts = codebook_usage(indices, module.codebook_size).counts
    assert codebook_usage(indices.to(dtype), module.codebook_size).counts.equal(counts)


def test_missing_stages_of_unsigned_tokens_add_nothing():
    module = ResidualFSQ(levels=[5, 5], num_quantizers=3, quantize_dropout=True).eval()
    tokens = module(torch.randn(1, 9, 2))[1][..., :2]
    assert module.get_output_from_indices(tokens.to(torch.uint8)).equal(module.get_output_from_indices(tokens))


def test_training_after_inference_mode(quantiser):
    name, _ = quantiser
    if name in UNPROJECTED:
        with torch.inference_mode():
            module = QUANTISERS[name]()
    else:
        module = QUANTISERS[name]()
    x = torch.randn(2, 20, module.dim, requires_grad=True)
    with torch.inference_mode():
        module.track_usage()
        module(x)
    module(x)[0].sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", [*LAYERS, *QUANTISERS])
def test_modules_pickle(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = {**LAYERS, **QUANTISERS}[name]()
    x = torch.randn(64, module.dim if name in QUANTISERS else 17)
    module(3 * x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded(x)[0].equal(module(x)[0]) and copy.deepcopy(module)(x)[0].equal(module(x)[0])


FAKE = {
    "actnorm": lambda: ActNorm(4),
    "conv": lambda: Invertible1x1Conv(4),
    "reversible": lambda: ReversibleSequential(ActNorm(4), AffineCoupling(nn.Linear(2, 4), scale_map="tanh")),
    "spectral norm": lambda: apply_spectral_norm(nn.Linear(4, 3)),
    "weight norm": lambda: apply_weight_norm(nn.Linear(4, 3)),
    "fsq": lambda: FSQ([5, 5], dim=4),
    "residual": lambda: ResidualFSQ(levels=[5, 5], num_quantizers=2, dim=4),
}


@pytest.mark.parametrize("name", FAKE)
def test_fake_tensors(name):
    with FakeTensorMode():
        module, x = FAKE[name](), torch.randn(3, 4, requires_grad=True)
        out = module(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        assert x.grad.shape == x.shape
        if name in ("fsq", "residual"):
            module(x[:, None], lengths=torch.ones(3, dtype=torch.int64))
            assert decode(module, out[1]).shape == x.shape
        elif isinstance(out, tuple):
            mask = {} if name == "conv" else {"mask": torch.zeros(3, 1)}
            assert module(x, **mask)[0].shape == x.shape


def test_clamp_that_requires_grad_is_refused():
    clamp = torch.tensor(1.5, requires_grad=True)
    with pytest.raises(ValueError, match="soft_clamp_input_value must not require grad, it is a constant"):
        ResidualFSQ(levels=[5, 5], num_quantizers=2, bound_hard_clamp=False, soft_clamp_input_value=clamp)
