"""A stack of invertible layers whose activation memory does not grow with its depth."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import _backend
from .. import _checks as check
from .._torch import exporting, forward_mode, is_traceable_wrapper_subclass, outside_graphs, transform
from ..train._collect import innermost
from ._context import Context
from ._replay import Replay
from ._spectral_norm import SpectralNorm

if TYPE_CHECKING:
    from ._typed import InvertibleModule, ModuleListOf


class ReversibleSequential(nn.Module):
    """Stack of invertible layers whose backward rebuilds every layer's input from its output.

    y = layer_n(... layer_1(x)), logdet = sum of the layers' logdets; only y is kept for the backward.

    Args:
        layers: modules with `forward(x, *context, **context) -> (y, logdet)` and `inverse(y, ...) -> (x, logdet)`.
            A layer may define `rebuild`, as the coupling layers do, which saves an evaluation of its net; it is not
            used if a subclass or the instance overrides forward or inverse, or the layer has hooks. Nested stacks are
            flattened.
        recompute: False keeps the activations (faster, differentiable twice, memory grows with depth).
        preserve_rng: replay the random state of layers that drew numbers, so that dropout in a net works. For a layer
            that draws numbers and has no `rebuild`, the input is kept.

    Returns:
        `forward(x, *context, **context)` and `inverse(y, ...)`: (y, logdet (B,)). Every layer gets the context.

    Raises:
        RuntimeError: in the backward with create_graph=True; an object in the context hides a tensor that needs a
            gradient; in the backward, a rebuilt input differs from the input of the forward (checked on a CPU, or with
            PYFLOW_CHECK=1); a layer calls `pyflow.train.add_loss`.

    Notes:
        Activation memory is one layer's activations plus y; the cost is one more net evaluation per coupling layer
        (two per layer without `rebuild`). Gradients equal those of the plain stack up to the rounding of the
        inverse: keep x in float32 or float64 and scale maps bounded. Autocast, training flags and the backend are
        restored in the recomputation, other state is not: a layer whose forward changes state sees every batch twice
        and must give the same output both times (true for batch norm's statistics, not for a counter or a power
        iteration).
        torch.compile has a graph break here when gradients are needed: compile the nets inside instead. A tensor that
        a net closes over gets no gradient: pass it as context, directly, in a container or as an attribute.
        Activations are kept under torch.func, forward-mode AD, torch.export and torch.jit.trace, and if parameters are
        DTensors during forward: with fully_shard, shard the whole stack and not its layers. The first batch of lazy
        modules keeps its activations too.

    Source:
        Gomez et al. 2017, The Reversible Residual Network, arXiv:1707.04585; Jacobsen et al. 2018, arXiv:1802.07088.

    Example:
        >>> from pyflow.nn import AdditiveCoupling
        >>> stack = ReversibleSequential(*(AdditiveCoupling(nn.Linear(2, 2), swap=i % 2 == 1) for i in range(8)))
        >>> x = torch.randn(5, 4)
        >>> y, logdet = stack(x)
        >>> y.sum().backward()
        >>> bool(torch.allclose(stack.inverse(y)[0], x, atol=1e-4))
        True
    """

    layers: ModuleListOf[InvertibleModule]

    def __init__(self, *layers: nn.Module, recompute: bool = True, preserve_rng: bool = True) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            if not isinstance(layer, nn.Module) or not hasattr(layer, "inverse"):
                raise TypeError(
                    f"ReversibleSequential: layers must be modules with an inverse, got {type(layer).__name__} at {i}"
                )
        if not layers:
            raise ValueError("ReversibleSequential: layers must not be empty")
        self.layers = cast("ModuleListOf[InvertibleModule]", nn.ModuleList(layers))
        self.recompute = check.flag("ReversibleSequential", "recompute", recompute)
        self.preserve_rng = check.flag("ReversibleSequential", "preserve_rng", preserve_rng)

    def forward(self, x: Tensor, *context: object, **named: object) -> tuple[Tensor, Tensor]:
        plainly = not self.recompute or not torch.is_grad_enabled()
        if plainly or exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]  # missing in torch.jit.__all__
            return self._run(x, context, named)
        return self._run_rebuilding(x, context, named)

    def inverse(self, y: Tensor, *context: object, **named: object) -> tuple[Tensor, Tensor]:
        total: Any = 0
        for layer in reversed(self.layers):
            y, logdet = layer.inverse(y, *context, **named)
            total = logdet + total
        return y, total

    def _run(self, x: Tensor, context: tuple, named: dict) -> tuple[Tensor, Tensor]:
        total: Any = 0
        for layer in self.layers:
            x, logdet = layer(x, *context, **named)
            total = logdet + total
        return x, total

    @outside_graphs("ReversibleSequential rebuilds activations outside the graph; compile its nets")
    def _run_rebuilding(self, x: Tensor, context: tuple, named: dict) -> tuple[Tensor, Tensor]:
        if not isinstance(x, Tensor):
            raise TypeError(f"ReversibleSequential: x must be a tensor, got {type(x).__name__}")
        modules = [*self.modules()]
        owned = {id(p): p for m in modules for p in m._parameters.values() if p is not None and p.requires_grad}
        parameters = [*owned.values()]
        # with transforms and DTensors a layer's forward sees other parameter tensors, so gradients would be lost
        # and lazy parameters have no shape before their first forward
        if _transformed() or any(is_traceable_wrapper_subclass(p) or is_lazy(p) for p in parameters):
            return self._run(x, context, named)
        # weights normalised by the root share one graph across layers, so they are inputs like the context
        norms = [m for m in modules if isinstance(m, SpectralNorm) and m.held is not None]
        given = Context(context, named)
        tensors = [*given.tensors, *(norm.held for norm in norms)]
        return _Rebuilding.apply(self, given, norms, len(tensors), x, *tensors, *parameters)

    def _flat(self) -> Iterator[InvertibleModule]:
        """Yield the layers, with nested stacks flattened, so that every layer is rebuilt separately."""
        for layer in self.layers:
            if isinstance(layer, ReversibleSequential) and _made_by(layer, ReversibleSequential):
                yield from layer._flat()
            else:
                yield layer

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: int) -> nn.Module:
        return self.layers[i]


class _Rebuilding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stack: ReversibleSequential,
        given: Context,
        norms: list[SpectralNorm],
        n_given: int,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.layers, ctx.given, ctx.norms, ctx.n_given = [*stack._flat()], given, norms, n_given
        ctx.replay, ctx.backend = Replay(x, stack), _backend.current()
        ctx.kept = []
        y, inputs = x, []
        total: Any = 0
        with _without_losses(), ctx.replay.conditions():
            for i, layer in enumerate(ctx.layers):
                before = y
                y, logdet = layer(y, *given.context, **given.named)
                total = logdet + total
                if ctx.replay.record(before) and not _rebuilds(layer):
                    # the inverse may draw numbers in another order than the forward, so keep the input
                    ctx.kept.append(i)
                    inputs.append(before)
        # layers that return x itself: a custom Function must return another tensor
        y = y.view_as(y) if y is x else y
        ctx.save_for_backward(y, *tensors[:n_given], *inputs)
        given.forget()
        # not in save_for_backward: saved-tensor hooks may return copies, and gradients belong to these tensors
        ctx.parameters = tensors[n_given:]
        ctx.versions = [p._version for p in ctx.parameters]
        return y, total

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ReversibleSequential: create_graph=True is not supported, since activations are rebuilt and dropped; "
                "construct it with recompute=False to differentiate twice"
            )
        if [p._version for p in ctx.parameters] != ctx.versions:
            raise RuntimeError(
                "ReversibleSequential: parameters must stay as they are between forward and backward, "
                "got one modified by an inplace operation"
            )
        y, *tensors = ctx.saved_tensors
        kept = dict(zip(ctx.kept, tensors[ctx.n_given :], strict=False))
        needed = ctx.needs_input_grad[5 : 5 + ctx.n_given]
        tensors = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=False)]
        weights = tensors[ctx.n_given - len(ctx.norms) :]
        args, named = ctx.given.filled(tensors)
        grads = _Sum(t for t in (*tensors, *ctx.parameters) if t.requires_grad)
        y = y.detach()
        with _backend.on(ctx.backend), ctx.replay.resume(), _given(ctx.norms, weights):
            for i, layer in reversed(list(enumerate(ctx.layers))):
                wanted = [t for t in tensors if t.requires_grad] + [p for p in layer.parameters() if p.requires_grad]
                rewind = functools.partial(ctx.replay.rewind, i)
                x, results, leaves = _rebuild(layer, y, kept.get(i), args, named, rewind)
                ctx.replay.verify(i, layer, x, y)
                y = x
                outputs = [o for o in results if isinstance(o, Tensor)]
                ctx.given.check(outputs, (*leaves, *wanted))
                found = _gradients(outputs, (grad_y, grad_logdet), (*leaves, *wanted))
                grad_y = functools.reduce(torch.add, (g for g in found[: len(leaves)] if g is not None))
                grads.add(wanted, found[len(leaves) :])
        grad_x = grad_y if ctx.needs_input_grad[4] else None
        return None, None, None, None, grad_x, *map(grads.of, (*tensors, *ctx.parameters))


@contextlib.contextmanager
def _without_losses() -> Iterator[None]:
    """Raise if the block calls add_loss: the loss would have no graph, since the block runs without gradients."""
    collected = innermost()
    before = {} if collected is None else dict(collected.losses)
    yield
    added = [] if collected is None else [n for n, loss in collected.losses.items() if loss is not before.get(n)]
    if added:
        raise RuntimeError(
            f"ReversibleSequential: layers must not call add_loss, got a loss {added[0]!r}, which could not train what "
            "is rebuilt; construct it with recompute=False"
        )


@contextlib.contextmanager
def _given(norms: list[SpectralNorm], weights: list[Tensor]) -> Iterator[None]:
    """Let the layers use these normalised weights inside the block."""
    before = [norm.given for norm in norms]
    try:
        for norm, weight in zip(norms, weights, strict=True):
            norm.give((weight, None, None))
        yield
    finally:
        for norm, normalised in zip(norms, before, strict=True):
            norm.give(normalised)


def _made_by(layer: nn.Module, kind: type) -> bool:
    """Whether the layer runs `kind`'s forward and inverse: no subclass, instance attribute or hook overrides them, and
    no hook needs its call.
    """
    below = type(layer).__mro__[: type(layer).__mro__.index(kind)]
    overridden = any(name in vars(k) for k in (*below, layer) for name in ("forward", "inverse"))
    forward = layer._forward_hooks or layer._forward_pre_hooks
    return not (overridden or forward or layer._backward_hooks or layer._backward_pre_hooks)


def _rebuilds(layer: nn.Module) -> bool:
    """Whether the layer has a `rebuild` that matches its forward and inverse."""
    kind = next((k for k in type(layer).__mro__ if "rebuild" in vars(k)), None)
    return kind is not None and _made_by(layer, kind)


def _rebuild(
    layer: InvertibleModule, y: Tensor, x: Tensor | None, args: tuple, named: dict, rewind: Callable[[], None]
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """Return (x, layer(x) with its graph, leaves whose gradients sum to the gradient of x).

    `x` is the kept input, or None to rebuild it from y.
    """
    rewind()
    if _rebuilds(layer):
        return layer.rebuild(y, *args, **named)
    if x is None:
        with torch.no_grad():
            x = layer.inverse(y, *args, **named)[0]
        rewind()
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return x, layer(leaf, *args, **named), (leaf,)


def _gradients(
    outputs: Iterable[Tensor], grads: tuple[Tensor, ...], inputs: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad of the outputs that have a graph; a logdet may be one for all samples."""
    pairs = [(o, g.sum_to_size(o.shape).to(o.dtype)) for o, g in zip(outputs, grads, strict=False) if o.requires_grad]
    return torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)


class _Sum:
    """Sum of gradients per tensor, so that a parameter shared by layers gets all of them."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.totals: dict[int, Tensor | None] = {id(t): None for t in tensors}

    def add(self, tensors: list[Tensor], grads: tuple[Tensor | None, ...]) -> None:
        for tensor, grad in zip(tensors, grads, strict=True):
            if id(tensor) not in self.totals:
                raise RuntimeError(
                    "ReversibleSequential: parameters must be the same tensors in forward and backward; "
                    "torch.func.functional_call needs recompute=False"
                )
            if grad is not None:
                total = self.totals[id(tensor)]
                self.totals[id(tensor)] = grad if total is None else total + grad

    def of(self, tensor: Tensor) -> Tensor | None:
        return self.totals.get(id(tensor))


def _transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active."""
    return transform() is not None or forward_mode()
