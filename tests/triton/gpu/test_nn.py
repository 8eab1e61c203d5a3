"""Layers on a GPU: outputs and gradients match those of the same weights on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pyflow
from pyflow.nn import (
    FSQ,
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    GroupedResidualFSQ,
    HSICBottleneck,
    HSICLoss,
    Invertible1x1Conv,
    ResidualFSQ,
    ReversibleSequential,
    Scale,
    apply_spectral_norm,
    apply_weight_norm,
    remove_spectral_norm,
)  # fmt: skip

from .common import DEVICE, INTERPRETED, assert_near, check_compiled, compare_module, draw, needs_cuda

VECTORS, IMAGES = (9, 6), (4, 4, 6, 6)

pytestmark = pytest.mark.usefixtures("kernels")


def mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def conv(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, outputs, 3, padding=1))


def couplings(layers=4, width=6):
    half = width // 2
    return [AffineCoupling(mlp(half, 2 * half), swap=i % 2 == 1, scale_map="tanh") for i in range(layers)]


def stack(**options):
    return ReversibleSequential(ActNorm(6), *couplings(), Scale(6), **options)


# name -> (module, shape of its input)
INVERTIBLE = {
    "additive half": (lambda: AdditiveCoupling(mlp(3, 3)), VECTORS),
    "additive checkerboard": (lambda: AdditiveCoupling(conv(4, 4), split="checkerboard", swap=True), IMAGES),
    "affine half": (lambda: AffineCoupling(mlp(3, 6), scale_map="sigmoid", eps=1e-3, shift_first=True), VECTORS),
    "affine interleave": (lambda: AffineCoupling(mlp(3, 6), split="interleave", packing="interleaved"), VECTORS),
    "affine channel": (lambda: AffineCoupling(conv(2, 4), split="channel", packing="scale_shift"), IMAGES),
    "affine checkerboard": (lambda: AffineCoupling(conv(4, 8), split="checkerboard", scale_map="softplus"), IMAGES),
    "actnorm": (lambda: ActNorm(4), IMAGES),
    "scale": (lambda: Scale((6,)), VECTORS),
    "conv": (lambda: Invertible1x1Conv(4), IMAGES),
    "conv of vectors": (lambda: Invertible1x1Conv(6), VECTORS),
    "reversible": (stack, VECTORS),
    "not recomputed": (lambda: stack(recompute=False), VECTORS),
}  # fmt: skip
# name -> (module, shape of its input)
QUANTIZERS = {
    "fsq": (lambda: FSQ([8, 5, 5]), (4, 10, 3)),
    "fsq symmetric": (lambda: FSQ([5, 4, 2], preserve_symmetry=True), (4, 10, 3)),
    "fsq hard": (lambda: FSQ([5, 3], bound_hard_clamp=True), (4, 10, 2)),
    "fsq codebooks": (lambda: FSQ([5, 3], num_codebooks=3), (4, 10, 6)),
    "fsq images": (lambda: FSQ([7, 5, 5, 5]), (2, 4, 6, 6)),
    "residual": (lambda: ResidualFSQ(levels=[5, 5, 3], num_quantizers=3), (4, 10, 3)),
    "residual images": (
        lambda: ResidualFSQ(levels=[5, 4], num_quantizers=2, is_channel_first=True, bound_hard_clamp=False),
        (2, 2, 5, 5),
    ),
    "grouped": (lambda: GroupedResidualFSQ(dim=4, groups=2, levels=[5, 5], num_quantizers=2), (4, 10, 4)),
}  # fmt: skip


def made(table, name):
    torch.manual_seed(0)
    make, shape = table[name]
    module = make().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module, draw(shape)


@pytest.mark.parametrize("method", ["forward", "inverse"])
@pytest.mark.parametrize("name", INVERTIBLE)
def test_invertible_layers(name, method):
    module, x = made(INVERTIBLE, name)
    compare_module(module, [x], 1e-4, method)


@pytest.mark.parametrize("name", ["affine half", "actnorm", "conv", "scale"])
def test_masks(name):
    module, x = made(INVERTIBLE, name)
    mask = torch.zeros(len(x), 1, *x.shape[2:], dtype=torch.bool)
    mask[0] = True
    with pyflow.backend("auto"):
        want = module(x, mask=mask)
    for a, b in zip(module.to(DEVICE)(x.to(DEVICE), mask=mask.to(DEVICE)), want, strict=True):
        assert_near(a, b, 1e-5)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers(name):
    module, x = made(QUANTIZERS, name)
    outputs = compare_module(module, [1.5 * x], 1e-5)
    assert not outputs[1].is_floating_point()
    module = module.to(DEVICE)
    out, indices = module(1.5 * x.to(DEVICE))
    if getattr(module, "is_channel_first", False):
        # decoding takes and returns stages and channels in the last dim
        out, indices = out.movedim(1, -1), indices.movedim(1, -1)
    if name.startswith("fsq"):
        assert_near(module.indices_to_codes(indices), out, 1e-6)
    else:
        assert_near(module.get_output_from_indices(indices), out, 1e-5)


@pytest.mark.parametrize("kind", [FSQ, ResidualFSQ])
def test_quantizers_with_projections(kind):
    torch.manual_seed(0)
    module = FSQ([8, 5, 5], dim=12) if kind is FSQ else ResidualFSQ(levels=[8, 5, 5], num_quantizers=2, dim=12)
    x = draw((4, 50, 12))
    with pyflow.backend("auto"):
        want = module(x)
    got = copy.deepcopy(module).to(DEVICE)(x.to(DEVICE))
    # after a matrix product a value near a boundary may round to the other level
    assert (got[1].cpu() == want[1]).double().mean() > 0.98
    assert ((got[0].cpu() - want[0]).abs() < 1e-4).double().mean() > 0.98


def test_quantizers_count_mask_and_drop():
    fsq, x = FSQ([5, 3]).to(DEVICE), draw((4, 10, 2)).to(DEVICE)
    fsq.track_usage()
    _, indices = fsq(x, lengths=torch.tensor([10, 3, 0, 7], device=DEVICE))
    assert (indices == -1).sum(1).tolist() == [0, 7, 10, 3]
    counts = fsq.usage().counts
    assert counts.sum().item() == 20 and counts.device.type == DEVICE
    residual = ResidualFSQ(levels=[5, 3], num_quantizers=4, quantize_dropout=True).to(DEVICE).train()
    draws = []
    for seed in (3, 3, *range(4, 30)):
        torch.manual_seed(seed)
        draws.append(residual(x)[1])
    assert torch.equal(draws[0], draws[1]) and len({int((d[0, 0] >= 0).sum()) for d in draws}) > 1
    active = residual(x, active=torch.tensor(2, device=DEVICE))[1]
    assert (active >= 0).all((0, 1)).tolist() == [True, True, False, False]


@needs_cuda
def test_dropout_of_stages_never_waits():
    residual = ResidualFSQ(levels=[5, 3], num_quantizers=4, quantize_dropout=True).to(DEVICE).train()
    x = draw((4, 10, 2)).to(DEVICE).requires_grad_()
    residual(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        residual(x)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_reversible_gradients_match_the_plain_stack():
    module, x = made(INVERTIBLE, "reversible")
    plain = ReversibleSequential(*module.layers, recompute=False)
    results = []
    for net in (module.to(DEVICE), plain.to(DEVICE)):
        leaf = x.to(DEVICE).requires_grad_()
        y, logdet = net(leaf)
        loss = y.square().sum() + logdet.sum()
        results.append([y.detach(), *torch.autograd.grad(loss, (leaf, *net.parameters()))])
    for a, b in zip(*results, strict=True):
        assert_near(a, b, 1e-4)


def test_reversible_replays_the_random_state():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 6))
    module = ReversibleSequential(AffineCoupling(net, scale_map="tanh"), *couplings(2)).to(DEVICE).train()
    x = draw(VECTORS).to(DEVICE)
    grads = []
    for recompute in (True, False):
        module.recompute = recompute
        torch.manual_seed(7)
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(module(leaf)[0].square().sum(), leaf)[0])
    assert_near(*grads, 1e-4)


@needs_cuda
def test_reversible_needs_the_memory_of_one_layer():
    x, peaks = draw((20_000, 64)).to(DEVICE).requires_grad_(), {}
    for recompute in (False, True):
        module = ReversibleSequential(*couplings(24, 64), recompute=recompute).to(DEVICE)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        module(x)[0].sum().backward()
        peaks[recompute] = torch.cuda.max_memory_allocated() - before
        del module
    assert peaks[True] < peaks[False] / 4


def normalised(apply=apply_spectral_norm, **options):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.LayerNorm(6), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(256, 10)
    )
    return apply(net, **options)


@pytest.mark.parametrize("options", [{}, {"n_iter": 3}, {"through_iteration": True}], ids=str)
def test_spectral_norm(options):
    model, x = normalised(**options), draw((2, 3, 8, 8))
    compare_module(model, [x], 2e-4)
    there = copy.deepcopy(model).to(DEVICE)
    for _ in range(3):
        got = there(x.to(DEVICE))
        with pyflow.backend("auto"):
            want = model(x)
        assert_near(got, want, 1e-4)
    for (key, a), b in zip(there.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5, msg=key)
    assert_near(remove_spectral_norm(there.eval())(x.to(DEVICE)), got, 1e-3)


def test_spectral_norm_applied_on_the_device():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).to(DEVICE)
    apply_spectral_norm(model)
    for _ in range(50):
        model(torch.ones(1, 8, device=DEVICE))
    for layer in model.eval():
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=1e-3)


def test_weight_norm():
    compare_module(normalised(apply_weight_norm), [draw((2, 3, 8, 8))], 2e-4)


@pytest.mark.parametrize(
    "options", [{}, {"normalize": True, "estimator": "unbiased"}, {"kernel": "laplacian", "bandwidth": 2.0}], ids=str
)
def test_hsic_loss(options):
    compare_module(HSICLoss(**options), [draw((40, 3)), draw((40, 2, 4), seed=1)], 1e-4)


def test_hsic_loss_with_a_learned_bandwidth():
    loss = HSICLoss(bandwidth=nn.Parameter(torch.tensor(1.5)), bandwidth_y=2.0)
    compare_module(loss, [draw((40, 3)), draw((40, 5), seed=1)], 1e-3)


def test_hsic_bottleneck_training_matches_the_cpu():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh())]
    state, head = copy.deepcopy(nn.ModuleList(layers)).state_dict(), nn.Linear(8, 3)
    losses = {}
    for device in ("cpu", DEVICE):
        parts = copy.deepcopy(nn.ModuleList(layers)).to(device)
        parts.load_state_dict(state)
        model = HSICBottleneck(parts, copy.deepcopy(head).to(device))
        x, y = draw((32, 4)).to(device), torch.arange(32, device=device) % 3
        losses[device] = torch.stack([model.update(x, y) for _ in range(3)]).cpu()
    torch.testing.assert_close(losses[DEVICE], losses["cpu"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["affine half", "affine checkerboard", "conv", "reversible", "fsq", "residual"])
def test_trains_under_autocast(name):
    module, x = made({**INVERTIBLE, **QUANTIZERS}, name)
    body = nn.Conv2d(4, 4, 1) if x.dim() == 4 else nn.Linear(x.shape[-1], x.shape[-1])
    model = nn.ModuleList([body, module]).to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    leaf = x.to(DEVICE).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y, *rest = module(body(leaf))
    assert y.dtype == torch.bfloat16
    loss = y.float().square().mean() + sum(r.mean() for r in rest if r.is_floating_point())
    loss.backward()
    optimizer.step()
    for parameter in (leaf, *model.parameters()):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32
        assert parameter.isfinite().all()


def test_spectral_norm_under_autocast():
    model, x = normalised().to(DEVICE), draw((2, 3, 8, 8)).to(DEVICE)
    want = model(x)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = model(x)
    got.sum().backward()
    assert got.dtype == torch.bfloat16
    assert_near(got.float(), want, 0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["affine channel", "actnorm", "conv", "reversible", "residual"])
def test_state_moves_between_devices(name):
    table = {**INVERTIBLE, **QUANTIZERS}
    module, x = made(table, name)
    there = copy.deepcopy(module).to(DEVICE)
    with torch.no_grad():
        for parameter in there.parameters():
            parameter.mul_(0.5)
    fresh = table[name][0]().eval()
    fresh.load_state_dict(there.state_dict())
    with pyflow.backend("auto"):
        want = fresh(x)
    assert_near(there(x.to(DEVICE))[0], want[0], 1e-4)
    assert all(p.device.type == "cpu" for p in fresh.parameters())


def test_actnorm_never_waits_after_initialisation():
    layer, x = ActNorm(4).to(DEVICE), draw(IMAGES).to(DEVICE)
    layer(x)
    if INTERPRETED:
        pytest.skip("the interpreter has nothing to wait for")
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)
        layer.inverse(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_layers_compile_without_graph_breaks():
    module, x = made(INVERTIBLE, "affine half")
    check_compiled(module.to(DEVICE), [x], 1e-4)
