"""Spectral and weight norm against torch's own parametrizations: compiled, copied, recomputed and under DDP."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from pyflow.nn import apply_spectral_norm, apply_weight_norm, remove_spectral_norm, remove_weight_norm
from pyflow.train import add_loss, collect


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(256, 10)
    )


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LAYERS = (0, 1, 3, 5)


def torchs(model):
    for layer in [*model.modules()]:
        if isinstance(getattr(layer, "weight", None), nn.Parameter):
            parametrizations.spectral_norm(layer)
    return model


def test_equals_torch_spectral_norm_and_shares_its_state_dict():
    ours, theirs = apply_spectral_norm(net()), torchs(net())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        a, b = ours(X), theirs(X)
        torch.testing.assert_close(a, b)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            *(torch.autograd.grad(y.square().sum(), r, retain_graph=True)[0] for y, r in ((a, p), (b, q))),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    again = apply_spectral_norm(net())
    again.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(again.eval()(X), theirs.eval()(X))


def test_every_layer_has_singular_value_one():
    model = nn.ModuleDict({"body": net(), "table": nn.Embedding(20, 6), "gain": nn.LayerNorm(6)})
    model.forward = lambda x, i: (model["body"](x), model["gain"](model["table"](i)))
    apply_spectral_norm(model)
    for _ in range(200):
        model(X, torch.arange(3))
    model.eval()
    for layer in [*(model["body"][i] for i in LAYERS), model["table"], model["gain"]]:
        weight = layer.weight.movedim(1, 0) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
        assert torch.linalg.svdvals(weight.reshape(1, -1) if weight.dim() == 1 else weight.flatten(1))[0].item() == (
            pytest.approx(1, abs=1e-5)
        )


def test_eval_does_not_iterate():
    model = apply_spectral_norm(net()).eval()
    before = copy.deepcopy(model.state_dict())
    model(X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.train()(X)
    assert not torch.equal(model[0].parametrizations.weight[0]._u, before["0.parametrizations.weight.0._u"])


def test_two_forwards_before_one_backward():
    model = apply_spectral_norm(net().double())
    twin = copy.deepcopy(model)
    x = X.double()
    (model(x).square().sum() - model(2 * x).sum()).backward()
    twin(x).square().sum().backward()
    (-twin(2 * x).sum()).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_copies_are_independent_and_state_dicts_resume():
    model = apply_spectral_norm(net())
    model(X)
    other = copy.deepcopy(model)
    norm, copied = model[0].parametrizations.weight[0], other[0].parametrizations.weight[0]
    assert copied._u is not norm._u and copied.forwards is not norm.forwards
    torch.testing.assert_close(other(X), model(X))
    other(X)
    assert not torch.equal(copied._u, norm._u)


def test_compiled_whole():
    model = apply_spectral_norm(net())
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True)
    for _ in range(3):
        a, b = model(X), compiled(X)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), m[5].bias)[0] for y, m in ((a, model), (b, other))))
    torch.testing.assert_close(other[0].parametrizations.weight[0]._u, model[0].parametrizations.weight[0]._u)


def test_function_transforms_move_u_and_v_as_a_plain_call():
    x, tangent = X, X.cos()
    f = lambda model: lambda x: model(x).square().sum()
    calls = {
        "jvp": lambda model: torch.func.jvp(f(model), (x,), (tangent,))[1],
        "grad": lambda model: torch.func.grad(f(model))(x),
        "jacrev": lambda model: torch.func.jacrev(f(model))(x),
        "vmap of grad": lambda model: torch.vmap(torch.func.grad(f(model)))(x[:, None]),
    }
    for name, call in calls.items():
        model = apply_spectral_norm(net())
        # a norm's running statistics are buffers that no transform may change
        model[1] = nn.Identity()
        twin = copy.deepcopy(model)
        got = call(model)
        twin(x)
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
        # neither call may move u and v again
        torch.testing.assert_close(got, call(model.eval()), msg=name)


def test_autocast():
    model = apply_spectral_norm(net())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(X)
    assert y.dtype == torch.bfloat16 and model[0].parametrizations.weight[0]._u.dtype == torch.float32
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, recompute=False):
        h = checkpoint(self.first, x, use_reentrant=False) if recompute else self.first(x)
        return self.second(h.tanh())


def test_recomputed_block_uses_the_same_weight():
    x = torch.randn(4, 6, requires_grad=True)
    model = apply_spectral_norm(Checkpointed())
    twin = copy.deepcopy(model)
    model(x, recompute=True).square().sum().backward()
    twin(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert torch.equal(model.first.parametrizations.weight[0]._u, twin.first.parametrizations.weight[0]._u)


def disturbed(model):
    """A model whose u and v have not converged to the singular vectors, as during training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model.double()


@pytest.mark.parametrize("through_iteration", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_recomputation_uses_the_weights_of_its_own_forward(whole, through_iteration):
    model = disturbed(apply_spectral_norm(Checkpointed(), through_iteration=through_iteration))
    twin = copy.deepcopy(model)
    xs = torch.randn(2, 4, 6, dtype=torch.float64)
    ys = [checkpoint(model, x, use_reentrant=False) for x in xs] if whole else [model(x, recompute=True) for x in xs]
    with torch.no_grad():
        # another forward in between changes u and v
        model(xs[0])
    buffers = [b.clone() for b in model.buffers()]
    (3 * ys[0].square().sum() - ys[1].sum()).backward()
    assert all(map(torch.equal, model.buffers(), buffers))
    (3 * twin(xs[0]).square().sum() - twin(xs[1]).sum()).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class Wrapped:
    def __init__(self, value):
        self.value = value


class Wrapping(Checkpointed):
    def forward(self, x):
        return {"out": [Wrapped(super().forward(x, recompute=True))]}


def test_outputs_in_containers_restore_the_weights_of_their_forward():
    model = disturbed(apply_spectral_norm(Wrapping()))
    twin = copy.deepcopy(model)
    xs = torch.randn(2, 4, 6, dtype=torch.float64)
    first, second = [model(x)["out"][0].value for x in xs]
    second.sum().backward()
    first.sum().backward()
    for x in xs:
        twin(x)["out"][0].value.sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class Reporting(Checkpointed):
    """Its root returns nothing: losses are reported, and features are stored."""

    def __init__(self, recompute=True, reentrant=False):
        super().__init__()
        self.third, self.features = nn.Linear(6, 1), []
        self.recompute, self.reentrant = recompute, reentrant

    def block(self, x):
        return self.second(self.first(x).tanh()).tanh()

    def forward(self, x):
        h = checkpoint(self.block, x, use_reentrant=self.reentrant) if self.recompute else self.block(x)
        self.features.append(h)
        add_loss(self.third(h).square().sum(), "loss")


def reporting(kind=Reporting, **options):
    """A model that recomputes, and one that does not with the same u, v and weights."""
    model = disturbed(apply_spectral_norm(kind(**options)))
    twin = copy.deepcopy(model)
    twin.recompute = False
    return model, twin


def inputs(count=2):
    return torch.randn(count, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def assert_same_gradients(model, twin):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["reported", "stored"])
def test_losses_from_inside_restore_the_weights_of_their_forward(loss):
    models = reporting()
    for model in models:
        with collect() as c:
            for x in inputs():
                model(x)
        with torch.no_grad(), collect():
            # a metric in between moves u and v, and has no backward
            model(inputs()[0])
        buffers = [b.clone() for b in model.buffers()]
        first, second, _ = model.features
        total = c.total() if loss == "reported" else (first.sum(0) - 2 * second.sum(0)).square().sum()
        total.backward()
        assert all(map(torch.equal, model.buffers(), buffers))
    assert_same_gradients(*models)


def test_frozen_weights_are_those_of_their_forward():
    models = reporting()
    grads = []
    for model in models:
        model.requires_grad_(False)
        xs = inputs(3).requires_grad_()
        for x in xs:
            model(x)
        sum(f.square().sum() for f in model.features).backward()
        grads.append(xs.grad)
    assert torch.equal(*grads)


def test_a_region_repeats_its_forwards_in_their_order():
    def losses(model, x):
        # the nodes after the forwards ask for the recomputation
        return nn.functional.softplus(model(x)).sum() - nn.functional.softplus(model(2 * x)).square().sum()

    model = disturbed(apply_spectral_norm(Checkpointed()))
    twin = copy.deepcopy(model)
    sum(checkpoint(losses, model, x, use_reentrant=False) for x in inputs()).backward()
    sum(losses(twin, x) for x in inputs()).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class Nested(Reporting):
    def block(self, x):
        block = super().block
        return (checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)).cos()


@pytest.mark.parametrize("model", [Reporting, Nested])
def test_features_of_forwards_in_one_thread_or_in_many(model):
    models = reporting(model)
    for each in models:
        for x in inputs():
            each(x)
            # every thread counts the nodes of its graphs from 0
            thread = threading.Thread(target=each, args=(2 * x,))
            thread.start()
            thread.join()
        sum((i + 1) * feature.square().sum() for i, feature in enumerate(each.features)).backward()
    assert_same_gradients(*models)


def test_a_reentrant_checkpoint_never_loses_gradients():
    model, twin = reporting(reentrant=True)
    for each in (model, twin):
        for x in inputs():
            each(x.requires_grad_())
        each.features[1].sum().backward()
    assert_same_gradients(model, twin)
    with pytest.raises(
        RuntimeError, match=r"^apply_spectral_norm: the weights .*, call checkpoint with use_reentrant=F"
    ):
        model.features[0].sum().backward()


def test_several_backwards_of_one_forward_retain_the_graph():
    model = apply_spectral_norm(Checkpointed())
    twin = copy.deepcopy(model)
    x = torch.randn(4, 6)
    for each, retain in ((model, True), (twin, False)):
        h = each(x)
        h[0].sum().backward(retain_graph=retain)
        if retain:
            h[1].sum().backward()
        else:
            with pytest.raises(RuntimeError, match="retain_graph=True"):
                h[1].sum().backward()


@pytest.mark.parametrize("whole", [False, True])
def test_nothing_outlives_the_graph(whole):
    model = apply_spectral_norm(Checkpointed())
    forwards = model.first.parametrizations.weight[0].forwards
    for _ in range(3):
        x = torch.randn(4, 6)
        y = checkpoint(model, x, use_reentrant=False) if whole else model(x, recompute=True)
        y.sum().backward()
    del y
    gc.collect()
    # the last one only
    assert len(forwards._all()) == 1
    watched = weakref.ref(forwards)
    del model, forwards
    gc.collect()
    assert watched() is None


def test_one_thread_evaluates_while_another_trains():
    model = apply_spectral_norm(Meeting()).eval()
    training, evaluating = threading.Event(), threading.Event()

    def evaluate():
        with torch.no_grad():
            model(torch.ones(1, 4), lambda: (evaluating.set(), training.wait(20)))

    thread = threading.Thread(target=evaluate)

    def meet():
        thread.start()
        assert evaluating.wait(20)

    y = model(torch.ones(1, 4), meet)
    training.set()
    thread.join()
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Meeting(nn.Module):
    """Two layers with a callback between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, between):
        x = self.first(x)
        between()
        return self.second(x)


@pytest.mark.parametrize("through_iteration", [False, True])
def test_embeddings_with_sparse_gradients(through_iteration):
    torch.manual_seed(0)
    model = apply_spectral_norm(nn.Sequential(nn.Embedding(10, 4, sparse=True)), through_iteration=through_iteration)
    dense = copy.deepcopy(model)
    dense[0].sparse = False
    for module in (model, dense):
        module(torch.tensor([1, 2, 2])).square().sum().backward()
    got, expected = (module[0].parametrizations.weight.original.grad for module in (model, dense))
    assert got.layout == torch.strided
    torch.testing.assert_close(got, expected)


def test_training_after_inference_mode():
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.inference_mode():
        apply_spectral_norm(model)
        model(torch.randn(2, 4))
    model(torch.randn(2, 4)).sum().backward()
    assert model[0].parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.parametrize("apply", [apply_spectral_norm, apply_weight_norm])
@pytest.mark.parametrize("assign", [False, True])
def test_from_meta(apply, assign):
    model, x = apply(nn.Sequential(nn.Linear(4, 3))).eval(), torch.randn(2, 4)
    with torch.device("meta"):
        fresh = apply(nn.Sequential(nn.Linear(4, 3))).eval()
    if not assign:
        fresh.to_empty(device="cpu")
    fresh.load_state_dict(model.state_dict(), assign=assign)
    assert fresh(x).equal(model(x))


def test_through_iteration_starts_from_ones_and_has_no_buffers():
    model = apply_spectral_norm(net(), through_iteration=True)
    assert not any("_u" in k for k in model.state_dict())
    assert model[0].parametrizations.weight[0].rounds == 5
    a, b = model(X), model.eval()(X)
    assert a.shape == b.shape
    weight = model[0].parametrizations.weight.original
    (gradient,) = torch.autograd.grad(model[0].weight.square().sum(), weight)
    # the gradient of |W / sigma|^2 is orthogonal to W for any number of iterations
    assert abs((gradient * weight).sum().item()) < 1e-4


def test_part_called_without_the_root():
    model = apply_spectral_norm(net())
    before = model[5].parametrizations.weight[0]._u.clone()
    model[5](torch.randn(1, 256))
    assert not torch.equal(model[5].parametrizations.weight[0]._u, before)
    with pytest.raises(RuntimeError):
        model(torch.randn(1))
    assert all(model[i].parametrizations.weight[0].given is None for i in LAYERS)


def test_weights_may_pass_through_zero():
    model = apply_spectral_norm(nn.Sequential(nn.Linear(4, 3)))
    weight = model[0].parametrizations.weight.original
    nn.init.zeros_(weight)
    assert model(torch.ones(1, 4)).isfinite().all()
    with torch.no_grad():
        weight.normal_()
    for _ in range(100):
        model(torch.ones(1, 4))
    assert torch.linalg.svdvals(model.eval()[0].weight)[0].item() == pytest.approx(1, abs=1e-5)


def test_remove():
    model = apply_spectral_norm(net())
    model(X)
    y = model.eval()(X)
    remove_spectral_norm(model)
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert not (model._forward_hooks or model._forward_pre_hooks or model._forward_hooks_always_called)
    torch.testing.assert_close(model(X), y)
    model = apply_weight_norm(net())
    y = model.eval()(X)
    assert not any(parametrize.is_parametrized(m) for m in remove_weight_norm(model).modules())
    torch.testing.assert_close(model(X), y)


def test_weight_norm_equals_torch():
    ours, theirs = apply_weight_norm(net()), net()
    for i in LAYERS:
        parametrizations.weight_norm(theirs[i], dim=None if i == 1 else 0)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    torch.testing.assert_close(ours(X), theirs(X))
    torch.testing.assert_close(ours(X), net()(X))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i):
        return self.head(self.embed(i))


def test_shared_weights_stay_shared():
    torch.manual_seed(0)
    for apply, remove, parameters in (
        (apply_spectral_norm, remove_spectral_norm, 1),
        (apply_weight_norm, remove_weight_norm, 2),
    ):
        model = apply(Tied())
        assert len([*model.parameters()]) == parameters
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()
        if apply is apply_weight_norm:
            assert torch.equal(model.embed.weight, model.head.weight)
        assert remove(model).embed.weight is model.head.weight and len([*model.parameters()]) == 1
    with pytest.raises(ValueError, match=r"^apply_weight_norm: head.weight must not be shared .*, got embed.weight$"):
        apply_weight_norm(Tied(), lambda name, layer: name == "head")


def test_weight_norm_of_a_dim_counted_from_the_end():
    for dim in (-1, -2):
        model, want = (apply_weight_norm(nn.Sequential(nn.Linear(4, 3)), dim=d) for d in (dim, dim + 2))
        g = "parametrizations.weight.original0"
        assert model[0].get_parameter(g).shape == want[0].get_parameter(g).shape == ((3, 1) if dim == -2 else (1, 4))
    with pytest.raises(TypeError, match=r"^apply_weight_norm: dim must be an integer, got NoneType$"):
        apply_weight_norm(net(), dim=None)


def test_a_refused_dtype_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"^apply_spectral_norm: 1.weight must be float32, .*, got complex64$"):
        apply_spectral_norm(model, lambda name, layer: isinstance(layer, nn.Linear))
    assert not any(parametrize.is_parametrized(m) for m in model.modules()) and not model._forward_hooks


def test_frozen_weights_stay_frozen_parameters():
    model = apply_weight_norm(net().requires_grad_(False))
    assert not any(p.requires_grad for p in remove_weight_norm(model).parameters())
    assert {*model.state_dict()} == {*net().state_dict()}
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in net().named_parameters()}


def test_filter_and_names():
    model = apply_spectral_norm(net(), lambda name, layer: isinstance(layer, nn.Linear))
    assert [i for i in LAYERS if parametrize.is_parametrized(model[i])] == [5]
    model = apply_spectral_norm(nn.Sequential(nn.LSTM(3, 4)), name="weight_hh_l0")
    assert parametrize.is_parametrized(model[0], "weight_hh_l0")
    model = apply_spectral_norm(nn.Sequential(nn.Linear(2, 2), nn.PReLU()))
    assert not parametrize.is_parametrized(model[1])


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda: apply_spectral_norm(net(), n_iter=0), ValueError,
            "apply_spectral_norm: n_iter must be at least 1, got 0",
        ),
        (
            lambda: apply_spectral_norm(3), TypeError,
            "apply_spectral_norm: model must be a module, got int",
        ),
        (
            lambda: apply_spectral_norm(net(), n_iter=1.5), TypeError,
            "apply_spectral_norm: n_iter must be an integer, got float",
        ),
        (
            lambda: apply_spectral_norm(nn.ReLU()), ValueError,
            "apply_spectral_norm: no layer of ReLU was picked that has a parameter 'weight'",
        ),
        (
            lambda: apply_spectral_norm(net(), lambda name, layer: name == "2"), ValueError,
            "apply_spectral_norm: ReLU '2' has no parameter 'weight' of one dim or more",
        ),
        (
            lambda: apply_spectral_norm(apply_spectral_norm(net()), lambda name, layer: name == "0"), ValueError,
            "apply_spectral_norm: 0.weight must not be parametrized already",
        ),
        (
            lambda: apply_weight_norm(apply_spectral_norm(net())), ValueError,
            "apply_weight_norm: every weight is parametrized already; remove_spectral_norm, remove_weight_norm or torch's "
            "remove_parametrizations undoes that",
        ),
        (
            lambda: apply_spectral_norm(net(), nn.Linear), TypeError,
            "apply_spectral_norm: filter must be a function of a layer's name and the layer, got the class Linear",
        ),
        (
            lambda: apply_weight_norm(nn.BatchNorm1d(3).apply(lambda m: nn.init.zeros_(m.weight))), ValueError,
            "apply_weight_norm: weight must not have a row of zeros, it has no direction",
        ),
        (
            lambda: apply_spectral_norm(nn.Linear(3, 2).apply(lambda m: nn.init.zeros_(m.weight))), ValueError,
            "apply_spectral_norm: weight must not be all zeros, they have no direction",
        ),
        (
            lambda: apply_spectral_norm(nn.Sequential(nn.LazyLinear(3))), ValueError,
            "apply_spectral_norm: 0.weight must not be lazy, run a batch first",
        ),
        (
            lambda: apply_weight_norm(nn.Linear(3, 2), dim=5), ValueError,
            "apply_weight_norm: dim must be one of weight, of shape (2, 3), got 5",
        ),
        (
            lambda: remove_spectral_norm(apply_weight_norm(net())), ValueError,
            "remove_spectral_norm: no weight was normalised by apply_spectral_norm",
        ),
        (
            lambda: remove_weight_norm(net()), ValueError,
            "remove_weight_norm: no weight was normalised by apply_weight_norm",
        ),
        (
            lambda: remove_spectral_norm(nn.Linear), TypeError,
            "remove_spectral_norm: model must be a module, got type",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ddp_keeps_parameters_and_buffers_in_step(tmp_path):
    script = str(Path(__file__).with_name("replicated.py"))
    done = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
