"""Cases of the coupling family: float32 and the tanh scale map unless the name says otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import pyflow
from pyflow import nn as layers
from pyflow.reference import coupling as ref

from .registry import FRESH, Call, Case, Outputs, Problem, available, bind, compiled, normals, peer, wide

MAIN = (16384, 392)
LARGE = (65536, 1024)
PACKINGS = ("shift_scale", "scale_shift", "interleaved")
QUICK_SWEEP = (10, 14, 18, 22)
# normflows' names of the measured scale maps; its "sigmoid" divides by the scale
NORMFLOWS_MAPS = {"exp": "exp", "sigmoid": "sigmoid_inv"}


def _reference(scale_map: str = "tanh", inverse: bool = False, packing: str | None = None) -> Callable[..., Outputs]:
    options: dict[str, Any] = {
        "scale_map": scale_map, "map_arg": 2.0 if scale_map == "tanh" else 0.0, "shift_first": False,
        "inverse": inverse, "mask": None,
    }  # fmt: skip

    def separate(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        return ref.affine_coupling(x, shift, scale, event_dims=x.dim() - 1, **options)

    def packed(x: Tensor, params: Tensor) -> Outputs:
        assert packing is not None
        return ref.affine_coupling_packed(x, params, packing=packing, dim=1, event_dims=x.dim() - 1, **options)

    return packed if packing else separate


def _op(scale_map: str = "tanh", inverse: bool = False, packing: str | None = None) -> Callable[..., Outputs]:
    if packing:
        return partial(pyflow.ops.affine_coupling_packed, packing=packing, scale_map=scale_map, inverse=inverse)
    return partial(pyflow.ops.affine_coupling, scale_map=scale_map, inverse=inverse)


def _contenders(**options: Any) -> dict[str, Callable[..., Outputs]]:
    function = _reference(**options)
    return {"eager": function, "compile": compiled(function), "pyflow": _op(**options)}


def _problem(
    functions: dict[str, Callable[..., Outputs]],
    inputs: Outputs,
    passes: int,
    backward: bool = False,
    own_inputs: dict[str, Outputs] | None = None,
    **more: Any,
) -> Problem:
    """Bind contenders to their inputs; `passes` is the number of tensors of x's size that are read or written."""
    x, rows = inputs[0], inputs[0].shape[0]
    cotangents = (*normals(x.shape, x.device, 1, x.dtype), *normals((rows,), x.device, 1)) if backward else None

    def call_of(name: str) -> Call:
        return bind(functions[name], (own_inputs or {}).get(name, inputs), cotangents)

    return Problem(
        {name: call_of(name) for name in functions},
        lambda: bind(functions["eager"], wide(inputs), cotangents and wide(cotangents))(),
        # forward writes logdet, backward reads its gradient
        passes * x.nbytes + 4 * rows * (2 if backward else 1),
        **more,
    )


def _passes(backward: bool, inverse: bool = False, packed: bool = False) -> int:
    # forward: x, shift, scale -> y; backward: grad_y, x, scale -> grad_x, grad_scale. grad_shift of a forward is grad_y
    # itself, copied if gradients are packed; the backward of an inverse also reads shift and writes grad_shift
    return 4 + backward * (7 if inverse else 6 if packed else 5)


def _plain(
    shape: tuple[int, ...],
    device: torch.device,
    *,
    inverse: bool = False,
    backward: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    inputs = normals(shape, device, 3, dtype)
    return _problem(_contenders(inverse=inverse), inputs, _passes(backward, inverse), backward)


def _strided(shape: tuple[int, ...], device: torch.device, *, backward: bool = False) -> Problem:
    """x is half of a wider tensor; shift and scale are halves of a network's output."""
    both, params = normals((shape[0], 2 * shape[1], *shape[2:]), device, 2)
    inputs = (both.chunk(2, 1)[0], *params.chunk(2, 1))
    own = {"pyflow contiguous": tuple(t.contiguous() for t in inputs)}
    functions = {**_contenders(), "pyflow contiguous": _op()}
    return _problem(functions, inputs, _passes(backward), backward, own)


def _packed(shape: tuple[int, ...], device: torch.device, *, packing: str, backward: bool = False) -> Problem:
    x, shift, scale = normals(shape, device, 3)

    def pack(result: Outputs) -> Outputs:
        return (*result[:3], ref.pack(result[3], result[4], packing, 1)) if backward else result

    return _problem(
        {**_contenders(packing=packing), "pyflow contiguous": _op()},
        (x, ref.pack(shift, scale, packing, 1)),
        _passes(backward, packed=True),
        backward,
        {"pyflow contiguous": (x, shift, scale)},
        forms={"pyflow contiguous": pack},
    )


class Fixed(nn.Module):
    """A network with a given output, so that only the coupling is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.params: list[Tensor] = []

    def forward(self, _: Tensor) -> Tensor:
        return self.params[0]


def _layer(make: Callable[[nn.Module], nn.Module]) -> Callable[[Any, Tensor], Outputs]:
    """Return a coupling layer as a function of its input and its network's output."""
    net = Fixed()
    layer = make(net)

    def function(x: Tensor, params: Tensor) -> Outputs:
        net.params = [params]
        return layer(x)

    return function


def _normflows_step(scale_map: str) -> Callable[..., Outputs]:
    flows = peer("normflows", "normflows.flows")
    # its layer maps a pair of tensors
    step: Callable[[list[Tensor], Tensor], Any] = _layer(
        lambda net: flows.AffineCoupling(net, scale_map=NORMFLOWS_MAPS[scale_map])
    )

    def function(x: Tensor, params: Tensor) -> Outputs:
        (_, y), logdet = step([x, x], params)
        return y, logdet

    return function


def _beside_peer(shape: tuple[int, ...], device: torch.device, *, scale_map: str, backward: bool = False) -> Problem:
    """Compare with normflows in its maps and packing: it has no tanh map."""
    x, shift, scale = normals(shape, device, 3)
    theirs, missing = available({"normflows": partial(_normflows_step, scale_map)})
    functions = _contenders(scale_map=scale_map, packing="interleaved") | theirs
    inputs = (x, ref.pack(shift, scale, "interleaved", 1))
    return _problem(functions, inputs, _passes(backward, packed=True), backward, missing=missing)


def _module(shape: tuple[int, ...], device: torch.device) -> Problem:
    """A whole layer with a given network output; "pyflow op" is the op alone, without concatenating the halves."""
    rows, half = shape
    (x,), (params,) = normals((rows, 2 * half), device, 1), normals((rows, 2 * half), device, 1)
    op = _op("exp", packing="interleaved")
    step = _reference("exp", packing="interleaved")

    def eager(x: Tensor, params: Tensor) -> Outputs:
        kept, changed = x.chunk(2, 1)
        y, logdet = step(changed, params)
        return torch.cat((kept, y), 1), logdet

    def op_alone(x: Tensor, params: Tensor) -> Outputs:
        return op(x.chunk(2, 1)[1], params)

    def theirs() -> Callable[..., Outputs]:
        return _layer(partial(peer("normflows", "normflows.flows").AffineCouplingBlock, scale_map="exp"))

    functions: dict[str, Callable[..., Outputs]] = {
        "eager": eager, "compile": compiled(eager), "pyflow op": op_alone,
    }  # fmt: skip
    functions["pyflow"] = _layer(partial(layers.AffineCoupling, packing="interleaved", scale_map="exp"))
    peers, missing = available({"normflows": theirs})
    forms = {"pyflow op": lambda result: (torch.cat((x[:, :half], result[0]), 1), *result[1:])}
    problem = _problem(functions | peers, (x, params), 0, forms=forms, missing=missing)
    # both halves are read and written
    problem.bytes = (problem.bytes or 0) + 2 * x.nbytes + params.nbytes
    return problem


def _deep(shape: tuple[int, ...], device: torch.device) -> Problem:
    """Forward and backward of a stack of couplings that share one network, whose gradients do not grow with depth."""
    rows, dim, hidden, *depths = shape
    (x,) = normals((rows, dim), device, 1)
    cotangents = (*normals((rows, dim), device, 1), *normals((rows,), device, 1))
    torch.manual_seed(0)
    first, last = nn.Linear(dim // 2, hidden), nn.Linear(hidden, dim)
    net = nn.Sequential(first, nn.ReLU(), last).to(device)
    with torch.no_grad():
        # small steps, so that 64 of them do not overflow
        last.weight.mul_(0.01)
        last.bias.zero_()

    def step(depth: int, recompute: bool, dtype: torch.dtype = torch.float32) -> Call:
        own_net = copy.deepcopy(net).to(dtype)
        couplings = (layers.AffineCoupling(own_net, swap=i % 2 == 1, scale_map="tanh") for i in range(depth))
        stack = layers.ReversibleSequential(*couplings, recompute=recompute)

        leaves = (x.detach().to(dtype).requires_grad_(), *own_net.parameters())
        gradients = tuple(c.to(dtype) for c in cotangents)

        def run() -> Outputs:
            outputs = stack(leaves[0])
            return *outputs, *torch.autograd.grad(outputs, leaves, gradients)

        return run

    calls, truth = {}, {}
    for depth in depths:
        for kind, recompute in (("plain", False), ("reversible", True)):
            calls[f"{kind} {depth}"] = step(depth, recompute)
            truth[f"{kind} {depth}"] = step(depth, False, torch.float64)
    return Problem(calls, truth, tolerance=1e-3)


def _additive(shape: tuple[int, ...], device: torch.device) -> Problem:
    inputs = normals(shape, device, 2)

    def eager(x: Tensor, shift: Tensor) -> Outputs:
        return (ref.additive_coupling(x, shift),)

    def op(x: Tensor, shift: Tensor) -> Outputs:
        return (pyflow.ops.additive_coupling(x, shift),)

    functions = {"eager": eager, "compile": compiled(eager), "pyflow": op}
    calls = {name: bind(function, inputs) for name, function in functions.items()}
    return Problem(calls, bind(eager, wide(inputs)), 3 * inputs[0].nbytes)


def _case(
    name: str,
    build: Callable[..., Problem],
    shape: tuple[int, ...] = MAIN,
    tiny: tuple[int, ...] | None = None,
    **more: Any,
) -> Case:
    return Case(f"coupling/{name}", build, shape, tiny or ((3, 6, 4, 4) if len(shape) == 4 else (5, 14)), **more)


_beside_contiguous = partial(
    _case,
    contenders=("eager", "compile", "pyflow contiguous", "pyflow"),
    compare=(("pyflow", "pyflow contiguous"),),
)
_with_peer = partial(_case, contenders=("eager", "compile", "normflows", "pyflow"), peer="normflows")
_main: dict[str, Callable[..., Problem]] = {
    "forward": _plain,
    "inverse": partial(_plain, inverse=True),
    "forward+backward": partial(_plain, backward=True),
}

CASES = [
    *(_case(name + FRESH, build, pages="fresh", quick=name != "inverse") for name, build in _main.items()),
    *(_case(name, build, quick=True, gpu=None if name == "inverse" else LARGE) for name, build in _main.items()),
    _case("inverse+backward", partial(_plain, inverse=True, backward=True)),
    _case("small forward", _plain, (64, 32), quick=True, gpu=(64, 32)),
    _case("small forward+backward", partial(_plain, backward=True), (64, 32), quick=True),
    _case("2 columns forward", _plain, (65536, 2)),
    _case("2 columns forward+backward", partial(_plain, backward=True), (65536, 2)),
    _with_peer("forward, exp", partial(_beside_peer, scale_map="exp"), quick=True),
    _with_peer("forward, sigmoid", partial(_beside_peer, scale_map="sigmoid")),
    _with_peer("forward+backward, exp", partial(_beside_peer, scale_map="exp", backward=True), quick=True),
    _beside_contiguous("strided forward", _strided, quick=True),
    _beside_contiguous("strided forward+backward", partial(_strided, backward=True)),
    *(_beside_contiguous(f"packed {p} forward", partial(_packed, packing=p)) for p in PACKINGS),
    *(
        _beside_contiguous(
            f"packed {p} forward+backward",
            partial(_packed, packing=p, backward=True),
            quick=p != "scale_shift",
            gpu=LARGE if p == "interleaved" else None,
        )
        for p in PACKINGS
    ),
    _beside_contiguous("image forward", _strided, (32, 24, 32, 32)),
    _beside_contiguous("image forward+backward", partial(_strided, backward=True), (32, 24, 32, 32)),
    _case("bf16 forward", partial(_plain, dtype=torch.bfloat16)),
    _case("bf16 forward+backward", partial(_plain, backward=True, dtype=torch.bfloat16)),
    _case("additive forward", _additive),
    _case(
        "module forward, exp",
        _module,
        contenders=("eager", "compile", "normflows", "pyflow op", "pyflow"),
        peer="normflows",
        compare=(("pyflow", "pyflow op"),),
        quick=True,
    ),
    _case(
        "deep stack",
        _deep,
        (1024, 64, 128, 8, 64),
        tiny=(6, 4, 8, 8, 64),
        contenders=("plain 8", "plain 64", "reversible 8", "reversible 64"),
        compare=(("reversible 64", "reversible 8"), ("plain 64", "plain 8"), ("reversible 64", "plain 64")),
        memory=True,
        quick=True,
    ),
    *(_case(f"sweep 2^{k}", _plain, (2**k // 256, 256), sweep=2**k, quick=k in QUICK_SWEEP) for k in range(10, 24)),
]
