"""Programs of flows for tests: a builder that keeps their weights, drawn programs, and inverses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflow._schemas import PRIORS, SCALE_MAPS, SPLINE_VARIANTS, TAILS
from pyflow.flows import _schedule
from pyflow.program import (
    ACTIVATIONS,
    PACKINGS,
    Activation,
    Additive,
    Affine,
    Autoregressive,
    Context,
    Dense,
    Elementwise,
    Instruction,
    Linear,
    Multiplicative,
    Net,
    Part,
    Periodic,
    Prior,
    Program,
    Residual,
    Scale,
    Spline,
    Transform,
    Uniform,
    columns_of_numbers,
)  # fmt: skip

# the constant of every scale map
MAP_ARG = {"tanh": 2.0, "atan": 1.5, "softsign": 3.0}


class Builder:
    """Weights in float64, in the order in which a program's instructions ask for them."""

    def __init__(self, columns: int, context: int = 0, seed: int = 0) -> None:
        self.columns, self.context = columns, context
        self.source = torch.Generator().manual_seed(seed)
        self.weights: list[Tensor] = []
        self.constants: set[int] = set()  # places of weights without a gradient

    def draw(self, *shape: int, spread: float = 1.0) -> Tensor:
        return spread * torch.randn(shape, generator=self.source, dtype=torch.float64)

    def weight(self, *shape: int, spread: float = 0.5) -> int:
        self.weights.append(self.draw(*shape, spread=spread))
        return len(self.weights) - 1

    def matrix(self, n: int) -> int:
        """A matrix (n, n) far from singular."""
        self.weights.append(torch.eye(n, dtype=torch.float64) + self.draw(n, n, spread=0.3 / max(1, n) ** 0.5))
        return len(self.weights) - 1

    def dense(self, inputs: int, size: int, activation: str = "identity", bias: bool = True, arg: float = 0.0) -> Dense:
        weight = self.weight(size, inputs, spread=1 / max(1, inputs) ** 0.5)
        return Dense(weight, self.weight(size) if bias else -1, size, ACTIVATIONS.index(activation), arg)

    def net(
        self, columns: Sequence[int], sizes: Sequence[int], activation: str = "relu", *, context: bool = False,
        bias: bool = True, arg: float = 0.1,
    ) -> Net:  # fmt: skip
        """Hidden layers and the last one, which has no activation."""
        inputs = [len(columns) + self.context * context, *sizes]
        names = [*[activation] * (len(sizes) - 1), "identity"]
        layers = [self.dense(n, size, name, bias, arg) for n, size, name in zip(inputs[:-1], sizes, names, strict=True)]
        return Net(tuple(columns), context, tuple(layers))

    def affine(
        self, columns: Sequence[int], scale_map: str = "tanh", packing: str = "shift_scale", **options: Any
    ) -> Affine:
        map_arg = MAP_ARG.get(scale_map, 0.0)
        return Affine(tuple(columns), SCALE_MAPS.index(scale_map), PACKINGS.index(packing), map_arg, **options)

    def spline(
        self, columns: Sequence[int], tails: str | Sequence[str] | None = "linear", variant: str = "nflows", *,
        bins: int = 4, bound: float | Sequence[float] = 3.0, own: bool = False, spread: float = 0.5, **options: Any,
    ) -> Spline:  # fmt: skip
        """With a weight of its own, or numbers of the conditioner before it."""
        names = () if tails is None else (tails,) if isinstance(tails, str) else tuple(tails)
        slopes = bins + {"linear": -1, "circular": 0}.get(str(tails), 1)
        bounds = tuple(bound) if isinstance(bound, (list, tuple)) else (bound,)
        params = self.weight(len(columns), 2 * bins + slopes, spread=spread) if own else -1
        return Spline(
            tuple(columns), bins, slopes, tuple(map(TAILS.index, names)), SPLINE_VARIANTS.index(variant), bounds,
            params=params, **options,
        )  # fmt: skip

    def masked(self, mask: Tensor, activation: str = "identity", bias: bool = True, arg: float = 0.1) -> Dense:
        """A layer with a mask (size, inputs)."""
        size, inputs = mask.shape
        dense = self.dense(inputs, size, activation, bias, arg)
        self.weights.append(mask.to(torch.float64))
        self.constants.add(len(self.weights) - 1)
        return dense._replace(mask=len(self.weights) - 1)

    def made(
        self, columns: Sequence[int], hidden: Sequence[int], transform: Transform, *, order: Sequence[int] | None = None,
        kept: Sequence[int] = (), activation: str = "relu", residual: bool = False, context: str = "", bias: bool = True,
        periodic: Sequence[int] = (),
    ) -> tuple[Net, Transform]:  # fmt: skip
        """A masked net of `columns`, which come in an order, and of `kept` ones; the numbers are for the columns.

        context: "inputs" among them, "add" or "gate" in the blocks and after the first layer.
        periodic: which inputs become waves.
        """
        places = list(range(len(columns))) if order is None else list(order)
        more = self.context if context == "inputs" else 0
        degrees = torch.tensor([*(sorted(set(places)).index(place) + 1 for place in places), *[0] * (len(kept) + more)])
        parts: list[Part] = []
        if periodic:
            waves = [self.weight(len(periodic)) for _ in range(4)]
            self.constants.add(waves[0])
            parts.append(Periodic(tuple(periodic), *waves))
        most = max(1, len(set(places)))

        def layer(size: int, name: str) -> Dense:
            nonlocal degrees
            units = torch.arange(size) % most
            dense = self.masked(units[:, None] >= degrees, name, bias)
            degrees = units
            return dense

        def given(size: int, name: str, gate: bool) -> list[Part]:
            if context not in ("add", "gate"):
                return []
            return [Context(self.dense(self.context, size, name, bias), gate)]

        for i, size in enumerate(hidden):
            if not residual or i == 0:
                parts += [layer(size, "identity" if residual else activation)]
                parts += given(size, activation, False) if i == 0 else []
            if residual:
                # the sum has the width of the first layer
                inner = [Activation(ACTIVATIONS.index(activation), 0.1), layer(size, activation)]
                inner += [*given(hidden[0], "sigmoid", context == "gate")] if size == hidden[0] else []
                inner.append(layer(hidden[0], "identity"))
                parts.append(Residual(tuple(inner)))
        generations = torch.tensor([sorted(set(places)).index(place) + 1 for place in places])
        of_numbers = generations[columns_of_numbers(transform)]
        parts.append(self.masked(of_numbers[:, None] > degrees, "identity", bias))
        if residual:
            size = len(of_numbers)
            parts.append(Elementwise(self.weight(size), self.weight(size)))
        return Net((*columns, *kept), context == "inputs", tuple(parts)), transform

    def undo(self, net: Net, transform: Transform) -> Autoregressive:
        """What undoes a net and the transform after it."""
        found = _schedule.autoregressive(
            net, transform._replace(inverse=not transform.inverse), self.context,
            lambda dense: None if dense.mask < 0 else self.weights[dense.mask],
        )  # fmt: skip
        assert found is not None
        return found

    def program(self, *instructions: Instruction, outputs: Sequence[int] | None = None) -> Program:
        outputs = range(self.columns) if outputs is None else outputs
        return Program(self.columns, self.context, tuple(outputs), instructions)

    def real_nvp(self, hidden: Sequence[int], layers: int, activation: str = "relu", prior: bool = True) -> Program:
        """Every kind of instruction, with the halves swapped from layer to layer."""
        half, instructions = self.columns // 2, []
        order = list(range(self.columns))
        for layer in range(layers):
            seen, changed = order[:half], order[half:]
            n = len(changed)
            if layer % 3 == 2:
                net = self.net(seen, [*hidden, n], activation, context=self.context > 0)
                instructions += [net, Additive(tuple(changed), inverse=layer % 2 == 1)]
            else:
                net = self.net(seen, [*hidden, 2 * n], activation, context=self.context > 0)
                instructions += [net, self.affine(changed, packing=PACKINGS[layer % 3])]
            if layer == 0:
                instructions.append(
                    Linear(tuple(order), self.matrix(len(order)), self.weight(len(order)), self.weight())
                )
            order = [*changed, *seen]
        n = self.columns
        instructions.append(Scale(tuple(order), self.weight(n), self.weight(n)))
        if prior:
            instructions.append(Prior(tuple(range(n))))
        return self.program(*instructions, outputs=order)


def drawn(one: Callable[..., Any], build: Builder, steps: int, invertible: bool = False) -> Program:
    """A program whose choices are those of `one(*choices)`; an invertible one has no heads and all columns as outputs."""
    columns, instructions, asked = list(range(build.columns)), [], False

    def some(least: int = 1, most: int | None = None) -> list[int]:
        left = list(columns)
        for i in range(len(left) - 1):
            j = one(*range(i, len(left)))
            left[i], left[j] = left[j], left[i]
        return left[: one(*range(least, (len(left) if most is None else most) + 1))]

    def flags() -> dict[str, bool]:
        return {"shift_first": one(False, True), "inverse": one(False, True)}

    def spline(chosen: list[int], own: bool) -> Spline:
        tails = one("linear", "circular", [one(*TAILS) for _ in chosen])
        bound = one(3.0, [one(3.0, 1.5) for _ in chosen])
        # narrow bins and steep slopes lose digits
        mild = {"param_scale": one(1.0, 0.3), "min_bin": 0.05, "min_slope": 0.1, "inverse": one(False, True)}
        return build.spline(chosen, tails, one(*SPLINE_VARIANTS), bins=one(4, 2, 8), bound=bound, own=own, **mild)

    def undo(chosen: list[int], context: str) -> Autoregressive:
        # more generations, and scales without bounds, pass on errors that grow
        transform: Transform = spline(chosen, False)
        if one(True, False):
            transform = build.affine(chosen, one("tanh", "softsign", "atan"), one(*PACKINGS), **flags())
        pair = build.made(
            chosen, [one(1, 5, 8, 17)] * one(1, 0, 2), transform, order=[one(0, 1, 2) for _ in chosen],
            kept=[c for c in columns if c not in chosen], activation=one(*ACTIVATIONS), residual=one(False, True),
            context=context, bias=one(True, False), periodic=[i for i in range(len(chosen)) if one(False, False, True)],
        )  # fmt: skip
        return build.undo(*pair)

    kinds = ["coupling"] * (build.columns > 1 or not invertible) + ["scale", "linear", "spline", "autoregressive"]
    kinds += [] if invertible else ["prior", "uniform"]
    for _ in range(steps):
        kind = one(*kinds)
        chosen = some()
        n = len(chosen)
        if kind == "scale":
            shift, log_scale = one((True, True), (True, False), (False, True))
            places = build.weight(n) if shift else -1, build.weight(n) if log_scale else -1
            instructions.append(Scale(tuple(chosen), *places, **flags()))
        elif kind == "linear":
            bias, logdet = one(True, False), one(True, False)
            places = build.matrix(n), build.weight(n) if bias else -1, build.weight() if logdet else -1
            instructions.append(Linear(tuple(chosen), *places))
        elif kind == "spline":
            instructions.append(spline(chosen, True))
        elif kind == "autoregressive":
            context = one("", "inputs", "add", "gate") if build.context else ""
            asked |= context != ""
            instructions.append(undo(chosen, context))
        elif kind == "prior":
            instructions.append(Prior(tuple(chosen), one(*range(len(PRIORS)))))
        elif kind == "uniform":
            # so wide that no rounding decides
            ends = one(((-1e4,), (2e4,)), ((-1e4,) * n, (1e4,)))
            instructions.append(Uniform(tuple(chosen), *ends, one(False, True)))
        else:
            if invertible:
                chosen = chosen[: build.columns - 1]
            seen = [c for c in columns if c not in chosen] if invertible else some(0)
            transform = one("affine", "additive", "multiplicative", "spline")
            context = build.context > 0 and one(True, False)
            asked |= context
            splined = spline(chosen, False) if transform == "spline" else None
            each = 2 * splined.bins + splined.slopes if splined else 2 if transform == "affine" else 1
            sizes = [*[one(1, 5, 8, 17, 33)] * one(1, 0, 2), each * len(chosen)]
            net = build.net(seen, sizes, one(*ACTIVATIONS), context=context, bias=one(True, False))
            options = flags()
            instructions.append(net)
            if splined:
                instructions.append(splined)
            elif transform == "affine":
                instructions.append(build.affine(chosen, one(*SCALE_MAPS), one(*PACKINGS), **options))
            else:
                kind = Additive if transform == "additive" else Multiplicative
                instructions.append(kind(tuple(chosen), options["inverse"]))
    outputs = columns if invertible or one(True, False) else some(0)
    program = build.program(*instructions, outputs=outputs)
    return program if asked else program._replace(context=0)


def inverse_of(program: Program, weights: list[Tensor]) -> tuple[Program, list[Tensor]]:
    """The program that undoes one without heads whose outputs are its columns in order, and its weights."""
    weights, instructions, net = list(weights), [], None
    pairs: list[tuple[Instruction, ...]] = []
    for instruction in program.instructions:
        if isinstance(instruction, Net):
            net = instruction
        elif isinstance(instruction, Linear):
            inverse = torch.linalg.inv(weights[instruction.weight])
            places = [-1, -1]
            if instruction.bias >= 0:
                weights.append(-inverse @ weights[instruction.bias])
                places[0] = len(weights) - 1
            if instruction.logdet >= 0:
                weights.append(-weights[instruction.logdet])
                places[1] = len(weights) - 1
            weights.append(inverse)
            pairs.append((Linear(instruction.columns, len(weights) - 1, *places),))
        elif isinstance(instruction, Autoregressive):
            transform = instruction.transform
            pairs.append((instruction.net, transform._replace(inverse=not transform.inverse)))
        else:
            turned = instruction._replace(inverse=not instruction.inverse)
            alone = isinstance(instruction, Scale) or (isinstance(instruction, Spline) and instruction.params >= 0)
            pairs.append((turned,) if alone else (net, turned))
    instructions = [instruction for pair in reversed(pairs) for instruction in pair]
    return program._replace(instructions=tuple(instructions)), weights
