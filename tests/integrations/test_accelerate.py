"""`pyflow.accelerate`, `patch` and `pyflow run`: what they do to objects and classes, whatever the kernels are."""

import copy
import functools
import gc
import importlib
import importlib.metadata
import pickle
import re
import subprocess
import sys
import types
import unittest.mock
import warnings
import weakref

import pytest
import torch
from torch import nn

import pyflow.cli
from pyflow import _classes, _definitions
from pyflow.integrations import _fast, _patch

zuko = pytest.importorskip("zuko")
nflows = pytest.importorskip("nflows")

from nflows import distributions, flows, transforms
from nflows.nn.nets import ResidualNet


def made(layers=2, seed=0):
    """A flow of nflows whose parameters hide nothing."""
    torch.manual_seed(seed)
    each = [
        layer
        for i in range(layers)
        for layer in (
            transforms.AffineCouplingTransform((torch.arange(4) + i) % 2, lambda a, b: ResidualNet(a, b, 8)),
            transforms.LULinear(4, identity_init=False),
        )
    ]
    flow = flows.Flow(transforms.CompositeTransform(each), distributions.StandardNormal([4]))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return flow


def x(rows=6, seed=1):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def flow():
    return made()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_accelerated_flow_computes_the_same_in_one_program(flow):
    want, ids = flow.log_prob(x()), [id(each) for each in (*flow.parameters(), *flow.modules())]
    names, keys = [name for name, _ in flow.named_modules()], [*flow.state_dict()]
    spaces = [{*vars(each)} for each in flow.modules()]
    report = pyflow.accelerate(flow)
    close(flow.log_prob(x()), want)
    assert isinstance(flow, flows.Flow) and type(flow).__name__ == "Flow"
    assert ids == [id(each) for each in (*flow.parameters(), *flow.modules())]
    assert names == [name for name, _ in flow.named_modules()] and keys == [*flow.state_dict()]
    assert spaces == [{*vars(each)} for each in flow.modules()]  # nothing of pyflow is in the objects
    assert report.calls()[0] == ("", 1, 0, {})
    assert [entry.path for entry in report.replaced] == [
        "",
        *(f"_transform{end}" for end in ("", "._transforms.0", "._transforms.2")),
    ]
    assert "2 AffineCouplingTransform, 2 LULinear as" in report.replaced[0].reason and not report.left
    assert "the model: nflows.flows.base.Flow (and 3 layers in it, for calls of their own)" in str(report)


def test_restore_gives_every_object_its_class_again(flow):
    kinds = [type(each) for each in flow.modules()]
    with pyflow.accelerate(flow) as report:
        assert kinds != [type(each) for each in flow.modules()]
    assert kinds == [type(each) for each in flow.modules()] and report.calls() == []
    pyflow.accelerate(flow).restore()
    assert kinds == [type(each) for each in flow.modules()]


def test_restore_is_refused_once_another_class_lies_over_ours(flow):
    report = pyflow.accelerate(flow)
    layer = flow._transform
    layer.register_parameter("w", nn.Parameter(torch.ones(1)))
    nn.utils.parametrize.register_parametrization(layer, "w", nn.Identity())
    with pytest.raises(
        RuntimeError, match="_transform has got the class ParametrizedCompositeTransform since it was acc"
    ):
        report.restore()
    assert type(flow) is not flows.Flow
    nn.utils.parametrize.remove_parametrizations(layer, "w")
    report.restore()
    assert type(layer) is transforms.CompositeTransform


def test_copies_are_fast_and_pickles_are_the_packages_own(flow):
    pyflow.accelerate(flow)
    want = flow.log_prob(x())
    for twin in (copy.deepcopy(flow), copy.copy(flow)):
        assert type(twin) is type(flow)
        assert torch.equal(twin.log_prob(x()), want) and _fast.record(twin).fast == 1
    deep = copy.deepcopy([flow, flow])
    assert deep[0] is deep[1] and deep[0]._transform is not flow._transform
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        text = pickle.dumps(flow, protocol)
        assert b"pyflow" not in text
        back = pickle.loads(text)
        assert type(back) is flows.Flow and type(back._transform) is transforms.CompositeTransform
        close(back.log_prob(x()), want)


def test_a_copy_is_restored_alone(flow):
    report = pyflow.accelerate(flow)
    deep = copy.deepcopy(flow)
    with pytest.raises(ValueError, match=r"accelerated already; call restore\(\) .* for a copy restore\(copy\)$"):
        pyflow.accelerate(deep)
    deep._transform.register_parameter("w", nn.Parameter(torch.ones(1)))
    nn.utils.parametrize.register_parametrization(deep._transform, "w", nn.Identity())
    with pytest.raises(RuntimeError, match="_transform has got the class Parametrized"):
        report.restore(deep)
    nn.utils.parametrize.remove_parametrizations(deep._transform, "w")
    report.restore(deep)
    assert type(deep) is flows.Flow and type(deep._transform) is transforms.CompositeTransform
    assert type(flow) is not flows.Flow and report.calls()
    report.restore(deep)
    with pytest.raises(
        TypeError,
        match=r"^restore: copied must be a torch.nn.Module, a pipeline of diffusers or .* fast methods, got list$",
    ):
        report.restore([deep])
    report.restore()
    assert type(flow) is flows.Flow


def test_a_pickle_loads_where_pyflow_is_not_installed(flow, tmp_path):
    pyflow.accelerate(flow)
    torch.save(flow, tmp_path / "flow.pt")
    code = (
        "import sys; sys.modules['pyflow'] = None; import torch;"
        f"print(type(torch.load({str(tmp_path / 'flow.pt')!r}, weights_only=False)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "<class 'nflows.flows.base.Flow'>"


def test_optimisers_state_dicts_hooks_and_modes_work_as_before(flow):
    other, seen = made(), []
    pyflow.accelerate(flow)
    for model in (flow, other):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            (-model.log_prob(x(16)).mean()).backward()
            optimizer.step()
    close(flow.log_prob(x()), other.log_prob(x()))
    third = made(seed=5)
    third.load_state_dict(flow.state_dict())
    close(third.log_prob(x()), flow.log_prob(x()))
    flow.load_state_dict(made(seed=7).state_dict())
    close(flow.log_prob(x()), made(seed=7).log_prob(x()))
    flow._transform.register_forward_hook(lambda *args: seen.append(1))
    close(flow.log_prob(x()), made(seed=7).log_prob(x()))
    assert seen == [1] and not flow.eval().training


def test_a_call_that_kernels_do_not_take_runs_as_in_the_package_and_is_counted(flow):
    report = pyflow.accelerate(flow.double())
    want = flow.log_prob(x().double())
    with pyflow.backend("reference"):
        close(flow.log_prob(x().double()), want)
    with pytest.raises(RuntimeError, match="same dtype"):
        flow.log_prob(x())
    assert report.calls()[0] == ("", 1, 2, {
        "cpu has no kernel with pyflow.backend 'reference'": 1,
        "its parameters are not plain tensors of x's dtype and device": 1,
    })  # fmt: skip
    assert report.calls()[1].fallback == 2  # its layers were tried next


def test_a_flow_without_an_instruction_promises_no_gain():
    flow = nflows.flows.MaskedAutoregressiveFlow(4, 8, num_layers=2, num_blocks_per_layer=1, dropout_probability=0.2)
    report = pyflow.accelerate(flow)
    assert str(report).count("expect") == 1 and "    expect no gain while all layers are left" in str(report)
    flow.log_prob(x())
    ((reason, count),) = report.calls()[0].reasons.items()
    assert count == 1 and "Dropout" in reason


def test_layers_run_alone_and_in_models(flow):
    layer = made()._transform._transforms[0]
    want, model = layer(x()), nn.ModuleDict({"a": nn.Linear(4, 4), "b": layer})
    report = pyflow.accelerate(model)
    close(layer(x()), want)
    back, _ = layer.inverse(want[0])
    close(back, x())
    assert report.calls() == [("b", 2, 0, {})]


def test_a_model_without_anything_known_says_what_it_looked_for():
    report = pyflow.accelerate(nn.Linear(2, 2))
    assert not report.replaced and not report.left
    assert str(report).startswith("Linear: nothing to accelerate. Looked for\n  ")
    assert "nflows: AdditiveCouplingTransform, " in str(report)


def test_what_a_user_names_is_left_or_taken(flow):
    report = pyflow.accelerate(flow, include=["*.0"])
    assert [entry.path for entry in report.replaced] == ["_transform._transforms.0"]
    report.restore()
    report = pyflow.accelerate(flow, exclude=transforms.AffineCouplingTransform)
    assert [entry.path for entry in report.replaced] == ["", "_transform"]
    assert {entry.reason for entry in report.left} == {"it is among those to exclude"}
    assert "left: _transform._transforms.2: nflows.transforms.coupling.AffineCouplingTransform: it is among" in str(
        report
    )
    report.restore()
    assert pyflow.accelerate(flow, include="AffineCouplingTransform").replaced[0].path == "_transform._transforms.0"
    with pytest.raises(TypeError, match="accelerate: include must hold names, patterns or classes, got int"):
        pyflow.accelerate(made(), include=[3])


def test_objects_that_are_more_than_their_class_are_left(flow):
    layers = flow._transform._transforms
    layers[0].forward = types.MethodType(transforms.AffineCouplingTransform.forward, layers[0])
    layers[2].register_buffer("b", torch.ones(1))
    nn.utils.parametrize.register_parametrization(layers[2], "b", nn.Identity())
    report = pyflow.accelerate(flow)
    assert {entry.path: entry.reason for entry in report.left} == {
        "_transform._transforms.0": "it has its own forward",
        "_transform._transforms.2": "it has parametrizations",
    }
    assert (
        "_transform._transforms.0 (AffineCouplingTransform): left, it has its own forward" in report.replaced[0].reason
    )
    close(flow.log_prob(x()), made().log_prob(x()))


class Derived(flows.Flow):
    pass


def test_a_subclass_is_left_and_its_layers_are_fast(flow):
    derived = Derived(flow._transform, flow._distribution)
    report = pyflow.accelerate(derived)
    assert report.replaced[0].path == "_transform"
    close(derived.log_prob(x()), made().log_prob(x()))


class NoSubclass(transforms.IdentityTransform):
    def __init_subclass__(cls):
        raise TypeError("NoSubclass must not have subclasses")


class OfItsClass(transforms.IdentityTransform):
    def forward(self, inputs, context=None):
        return super(self.__class__, self).forward(inputs, context)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (NoSubclass, "NoSubclass must not have subclasses"),
        (OfItsClass, r"its method forward uses super\(self.__class__, self\)"),
    ],
)
def test_a_class_that_cannot_have_a_subclass_is_left(kind, reason, monkeypatch):
    name = _classes.named(kind)
    monkeypatch.setitem(_fast.FAST, name, {"forward": lambda self, *args: _fast.LEFT})
    monkeypatch.setitem(_fast.SAYS, name, lambda _: "")
    report = pyflow.accelerate(nn.Sequential(kind()))
    assert not report.replaced and [entry.path for entry in report.left] == ["0"]
    assert re.fullmatch(reason, report.left[0].reason)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda flow: pyflow.accelerate(flow) and flow, r"the model is accelerated already; call restore\(\)"),
        (lambda flow: nn.Sequential(pyflow.accelerate(flow) and flow), "0 is accelerated already"),
        (torch.compile, "the model is compiled already; accelerate it before"),
        (lambda flow: nn.Sequential(torch.compile(flow)), "0 is compiled already"),
        (lambda flow: torch.jit.trace(nn.Linear(4, 4), x()), "model must not be scripted or traced, got TopLevel"),
    ],
)
def test_models_that_it_is_too_late_for(change, message, flow):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = change(flow)
    kinds = [type(each) for each in model.modules()]
    with pytest.raises(ValueError, match=f"accelerate: {message}"):
        pyflow.accelerate(model)
    assert kinds == [type(each) for each in model.modules()]


def test_what_is_no_model_is_refused():
    with pytest.raises(
        TypeError,
        match=r"accelerate: model must be a torch.nn.Module, a pipeline of diffusers or .* fast methods, got dict",
    ):
        pyflow.accelerate({})


def test_verify_compares_outputs_and_gradients(flow, monkeypatch):
    state = torch.random.get_rng_state()
    pyflow.accelerate(flow, verify=x()).restore()
    assert torch.equal(torch.random.get_rng_state(), state)
    quick = _fast.FAST["nflows.flows.base.Flow"]
    monkeypatch.setitem(quick, "_log_prob", lambda self, inputs, context: quick_log_prob(self, inputs, context) * 1.001)
    quick_log_prob = _fast.own_method(flows.Flow, "_log_prob")
    _fast._method.cache_clear()
    _fast._fast_class.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=r"verify found a difference, the model is as it was: the output differs by"
        ):
            pyflow.accelerate(flow, verify=x())
    finally:
        _fast._method.cache_clear()
        _fast._fast_class.cache_clear()
    assert type(flow) is flows.Flow
    with pytest.raises(ValueError, match="accelerate: verify: Named returns no tensors"):
        pyflow.accelerate(Named(), verify=x())
    with pytest.raises(ValueError, match=r"accelerate: verify must have at least one row, got the shape \(0, 4\)"):
        pyflow.accelerate(flow, verify=x()[:0])
    with pytest.raises(TypeError, match="accelerate: verify must be a batch, or a tuple of arguments, got bool"):
        pyflow.accelerate(flow, verify=True)


def test_verify_says_what_did_not_run_fast(flow):
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        report = pyflow.accelerate(flow, verify=x())
    finally:
        hook.remove()
    said = str(report)
    assert "    ran as in its package with the batch of verify: there are hooks of all modules\n" in f"{said}\n"
    assert "expect " not in said
    report.restore()
    with pyflow.accelerate(flow, verify=x()) as report:
        assert "ran as in its package" not in str(report) and "expect " in str(report)


class Named(nn.Module):
    def forward(self, x):
        return "name"


def test_a_changed_source_is_left_and_named_and_another_release_warned_of(flow, monkeypatch):
    monkeypatch.setattr(_classes, "_digests", frozenset)
    monkeypatch.setitem(_classes.TESTED, "nflows", ("0.1",))
    for cached in (_classes._why_unknown, _classes._warn):
        cached.cache_clear()
    try:
        release = importlib.metadata.version("nflows")
        with pytest.warns(
            UserWarning, match=f"pyflow was tested with nflows 0.1, this is {release}: classes"
        ) as warned:
            report = pyflow.accelerate(flow)
        assert len(warned) == 1 and not report.replaced
        assert report.left[0] == (
            "", "nflows.flows.base.Flow", "the source of nflows.flows.base.Flow is not that of nflows 0.1"
        )  # fmt: skip
        assert "the source of nflows" in pyflow.flows.fuse(flow).explain()
    finally:
        for cached in (_classes._why_unknown, _classes._warn):
            cached.cache_clear()


def test_a_replaced_method_makes_a_class_unknown(monkeypatch):
    monkeypatch.setattr(transforms.AdditiveCouplingTransform, "_scale_and_shift", lambda self, params: params)
    _classes._why_unknown.cache_clear()
    try:
        reason = _classes.why_unknown(transforms.AdditiveCouplingTransform)
    finally:
        _classes._why_unknown.cache_clear()
    assert reason == "its method _scale_and_shift has been replaced"


def test_every_class_that_is_installed_has_a_known_source():
    digests, made_of = _classes._digests(), _classes.sources()
    unknown = [name for name, same in made_of.items() if _definitions.digest(name, same) not in digests]
    modules = {same[0].__module__ for same in made_of.values()}
    unknown += [module for module in modules if _definitions.file_digest(module) not in digests]
    assert len(made_of) > 500 and not unknown, "write pyflow/_sources.py anew: _classes.print_sources()"
    for name in _fast.FAST:
        module, _, kind = name.rpartition(".")
        if module.partition(".")[0] in _classes.PACKAGES and module in sys.modules:
            assert not _classes.why_unknown(getattr(sys.modules[module], kind))


def test_nothing_is_kept_of_objects_that_are_gone(flow):
    pyflow.accelerate(flow)
    flow.log_prob(x())
    before, ref = len(_fast.RECORDS), weakref.ref(flow)
    calls = _fast.totals()["nflows.flows.base.Flow"][0]
    del flow
    gc.collect()
    # pytest's fixture holds the flow until the test ends
    if ref() is None:
        assert len(_fast.RECORDS) < before
    assert _fast.totals()["nflows.flows.base.Flow"][0] == calls


def test_it_compiles_without_graph_breaks_before_any_call(flow):
    want = flow.log_prob(x())
    pyflow.accelerate(flow)
    close(torch.compile(flow.log_prob, fullgraph=True)(x()), want)


def test_patched_classes_run_fast_whoever_makes_their_objects(flow):
    want, own = flow.log_prob(x()), flows.Flow.__dict__["_log_prob"]
    with pyflow.patch("nflows") as report:
        assert "nflows.flows.base.Flow" in report.replaced and not report.left
        for each in (flow, made()):
            close(each.log_prob(x()), want)
            assert _fast.record(each).fast == 1
        close(Derived(flow._transform, flow._distribution).log_prob(x()), want)
        assert b"pyflow" not in pickle.dumps(flow)
        pyflow.patch("nflows")  # twice changes nothing
    assert flows.Flow.__dict__["_log_prob"] is own and "_log_prob" not in vars(flows.SimpleRealNVP)
    assert type(flow) is flows.Flow
    pyflow.patch("zuko", "nflows")
    assert hasattr(zuko.flows.NSF.forward, "_pyflow_own")
    pyflow.unpatch()
    assert not hasattr(zuko.flows.NSF.forward, "_pyflow_own") and flows.Flow.__dict__["_log_prob"] is own


WAITS = """
import importlib.util, sys, pyflow
sys.meta_path.insert(0, type("Old", (), {"find_module": lambda self, name, path=None: None})())
with pyflow.patch() as report:
    assert "zuko" in report.waiting and "once it is imported: zuko" in str(report), report
    assert not PEERS & {*sys.modules}, sys.modules
    with pyflow.patch() as inner:
        assert not inner.waiting
    assert importlib.util.find_spec("zuko") and "zuko" in report.waiting
    import zuko.flows
    assert "zuko.flows.spline.NSF" in report.replaced and "zuko" not in report.waiting
    assert zuko.__loader__ is zuko.__spec__.loader and zuko.__loader__.get_source("zuko")
    assert hasattr(zuko.flows.NSF.forward, "_pyflow_own")
assert not hasattr(zuko.flows.NSF.forward, "_pyflow_own") and not report.waiting
import normflows
assert not [name for name in report.replaced if name.startswith("normflows")]
assert not [finder for finder in sys.meta_path if "pyflow" in type(finder).__module__]
""".replace("PEERS", repr({"diffusers", "normflows", "nflows", "vector_quantize_pytorch", "zuko"}))


def test_packages_are_patched_once_they_are_imported():
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_import_that_fails_is_the_package_s_error(monkeypatch, tmp_path):
    (tmp_path / "zuko.py").write_text("raise OSError('no disk')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "zuko")
    with pyflow.patch() as report:
        with pytest.raises(OSError, match="no disk"):
            importlib.import_module("zuko")
        assert "zuko" in report.waiting
        # and one of ours is a warning
        (tmp_path / "zuko.py").write_text("")
        monkeypatch.setattr(_patch, "_found", lambda name: 1 / 0)
        with pytest.warns(UserWarning, match=r"pyflow\.patch did nothing to zuko: division by zero"):
            importlib.import_module("zuko")
        monkeypatch.undo()


def test_patch_knows_its_packages():
    with pytest.raises(ValueError, match=r"patch: packages are .*nflows.*, got 'numpy'"):
        pyflow.patch("numpy")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    report = pyflow.patch("zuko")
    assert report.left[0][0] == "zuko" and "it cannot be imported" in report.left[0][1]


SCRIPT = """
import sys, torch
from zuko.flows import NSF
print(sys.argv[1:], __name__)
print(NSF(2, transforms=1, hidden_features=(8,))().log_prob(torch.zeros(3, 2)).shape[0])
"""


def test_a_script_runs_on_kernels_without_a_change(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = [str(script), "--patch", "zuko", "-v", "--lr", "1", "data", "--", "-v"]
    done = subprocess.run([sys.executable, "-m", "pyflow", "run", *words], capture_output=True, text=True, check=True)
    assert done.stdout == "['--lr', '1', 'data', '-v'] __main__\n3\n"
    assert "zuko.flows.spline.NSF: 1 fast, 0 as in the package" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch", "numpy", "no.py"], "patch: packages are"),
        (["no.py", "--patch", "zuko"], "no.py is no file"),
        (["-m", "no.such"], "no module named no.such"),
    ],
)
def test_what_cannot_run_is_one_sentence(words, message, capsys):
    assert pyflow.cli.main(["run", *words]) == 2
    pyflow.unpatch()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pyflow run: {message}")


def test_the_environment_patches_when_pyflow_is_imported(monkeypatch):
    monkeypatch.setenv("PYFLOW_PATCH", "zuko")
    pyflow._patch_as_asked()
    assert hasattr(zuko.flows.NSF.forward, "_pyflow_own")
    pyflow.unpatch()
    monkeypatch.setenv("PYFLOW_PATCH", "numpy")
    with pytest.warns(UserWarning, match="PYFLOW_PATCH='numpy' did nothing: patch: packages are"):
        pyflow._patch_as_asked()


def test_nested_patches_end_with_the_outer_one(monkeypatch):
    with pyflow.patch("nflows"):
        with pyflow.patch("nflows"):
            pass
        monkeypatch.setitem(sys.modules, "zuko", None)
        with pyflow.patch("zuko"):
            pass
        assert hasattr(flows.Flow._log_prob, "_pyflow_own")
    assert not hasattr(flows.Flow._log_prob, "_pyflow_own")


def test_a_package_that_cannot_be_imported_is_named(monkeypatch, tmp_path):
    (tmp_path / "zuko.py").write_text("raise OSError('no disk')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "zuko")
    assert pyflow.patch("zuko").left[0] == ("zuko", "it cannot be imported: no disk")
    pyflow.unpatch()


def test_copies_keep_a_class_that_lies_over_ours(flow):
    want = flow.log_prob(x())
    pyflow.accelerate(flow)
    layer = flow._transform
    layer.register_parameter("w", nn.Parameter(torch.ones(1)))
    nn.utils.parametrize.register_parametrization(layer, "w", nn.Identity())
    for twin in (copy.deepcopy(flow), copy.copy(flow)):
        assert type(twin._transform) is type(layer)
        close(twin.log_prob(x()), want)
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(flow)


def test_methods_that_a_layer_has_of_its_own_run(flow):
    pyflow.accelerate(flow)
    flow.log_prob(x())
    layer = flow._transform._transforms[0]
    layer._scale_and_shift = lambda params: (params[:, 2:].exp(), params[:, :2])
    got, alone = flow.log_prob(x()), layer(x())[0]
    own = made()
    own._transform._transforms[0]._scale_and_shift = layer._scale_and_shift
    close(got, own.log_prob(x()))
    close(alone, own._transform._transforms[0](x())[0])


def test_layers_take_their_arguments_by_name(flow):
    layer = flow._transform._transforms[0]
    want = layer(x())
    report = pyflow.accelerate(layer)
    for got in (layer(inputs=x(), context=None), layer(x(), None), layer(context=None, inputs=x())):
        close(got, want)
    close(layer.inverse(inputs=want[0])[0], x())
    assert report.calls()[0].fast == 4
    for args, named in (((), {}), ((), {"z": x()}), ((x(), None, None), {}), ((x(),), {"more": 1})):
        with pytest.raises(TypeError):
            layer(*args, **named)


def test_a_distribution_of_zuko_pickles_as_zukos_own():
    flow = zuko.flows.MAF(2, 1, transforms=1, hidden_features=(8,))
    given, seen = torch.zeros(3, 1), torch.ones(3, 2)
    own = flow(given)
    pyflow.accelerate(flow)
    fast = flow(given)
    for each in (fast, fast.transform, flow.transform.transforms[0](given)):
        assert b"pyflow" not in pickle.dumps(each)
    for twin in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast), copy.copy(fast)):
        assert type(twin) is type(own)
        close(twin.log_prob(seen), own.log_prob(seen))
    for name in ("bijective", "domain", "codomain"):
        assert getattr(fast.transform, name) == getattr(own.transform, name)


@pytest.mark.parametrize(
    "replace",
    [
        lambda own: lambda self, params: params,
        lambda own: functools.wraps(own)(lambda self, params: params),
        lambda own: functools.partial(own),
        lambda own: unittest.mock.MagicMock(),
        lambda own: torch.exp,
    ],
)
def test_a_method_that_is_replaced_later_makes_a_class_unknown(monkeypatch, replace):
    kind = transforms.AdditiveCouplingTransform
    assert not _classes.why_unknown(kind)
    monkeypatch.setattr(kind, "_coupling_transform_forward", replace(kind._coupling_transform_forward))
    assert _classes.why_unknown(kind) == "its method _coupling_transform_forward has been replaced"


def test_a_class_is_unknown_once_what_it_uses_is(monkeypatch):
    used = ("nflows.utils.torchutils.searchsorted", "zuko.transforms.MonotonicRQSTransform.bin")
    spline = transforms.PiecewiseRationalQuadraticCouplingTransform
    digests = set(_classes._digests())
    for name, kind in zip(used, (spline, zuko.transforms.MonotonicRQSTransform), strict=True):
        same = _classes._made_of(kind)[name]
        digests -= {_definitions.digest(name, same), _definitions.file_digest(same[0].__module__)}
    monkeypatch.setattr(_classes, "_digests", lambda: frozenset(digests))
    _classes._why_unknown.cache_clear()
    try:
        for name, kind in zip(used, (spline, zuko.flows.NSF), strict=True):
            assert _classes.why_unknown(kind).startswith(f"the source of {name} is not that of")
        assert not _classes.why_unknown(transforms.AdditiveCouplingTransform)
    finally:
        _classes._why_unknown.cache_clear()


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (["-m", "resnet", "-v", "-vv", "-m5"], ["-m", "resnet", "-vv", "-m5"]),
        (["--", "-v", "--", "a"], ["-v", "--", "a"]),
        (["a", "--patch=zuko", "--patch", "zuko", "--", "--patch"], ["a", "--patch"]),
    ],
)
def test_what_a_script_gets_of_the_words_behind_it(words, own, tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:])")
    assert pyflow.cli.main(["run", "--patch", "zuko", str(script), *words]) == 0
    pyflow.unpatch()
    assert capsys.readouterr().out == f"{own}\n"


def test_verify_takes_complex_outputs_and_runs_in_inference_mode(flow):
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, x):
            return torch.complex(self.flow.log_prob(x), x[:, 0])

    with torch.inference_mode():
        assert pyflow.accelerate(Complex(), verify=x().clone()).replaced
