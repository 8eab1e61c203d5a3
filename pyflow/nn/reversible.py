"""Train deep stacks of invertible layers in the memory of a shallow one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import _backend
from ..train._collect import innermost
from ._context import Context
from ._replay import Replay
from .spectral import SpectralNorm


class ReversibleSequential(nn.Module):
    """Invertible layers in a row whose backward rebuilds every input from its output.

    y = layer_n(... layer_1(x)), logdet = the layers' sum; nothing but y is kept for backward.

    Args:
        layers: modules with `forward(x, *context, **context) -> (y, logdet)` and `inverse(y, ...) -> (x, logdet)`.
            A layer may offer `rebuild` as the coupling layers do, to save an evaluation of its net; it is not used
            where a subclass, the instance or a hook changes what forward or inverse do. Stacks inside are opened.
        recompute: False keeps activations as any module does (faster, differentiable twice, memory grows with depth).
        preserve_rng: replay the random state of layers that drew numbers, so that dropout in a net works. The input of
            one that draws and has no `rebuild` is kept.

    Returns:
        `forward(x, *context, **context)` and `inverse(y, ...)`: (y, logdet (B,)). Every layer gets the context.

    Raises:
        RuntimeError: in backward with create_graph=True, since there is no graph to differentiate again; of a context
            that hides a tensor which needs a gradient; in backward where an input is not what it was (on a CPU, or
            with PYFLOW_CHECK=1); where a layer calls `pyflow.train.add_loss`.

    Notes:
        Activation memory is that of one layer plus y, at the price of one more net evaluation per coupling layer
        (two for layers without `rebuild`). Gradients equal those of the plain stack up to the rounding of the
        inverse: keep x in float32 or float64 and scale maps bounded. Autocast, training flags and the backend are
        replayed, other state is not: layers whose forward changes it see every batch twice, and must give the same
        output both times (batch norm's statistics do, a counter or a power iteration does not).
        torch.compile breaks its graph here when gradients are wanted: compile the nets inside instead. A tensor a net
        closes over gets no gradient: pass it as context, by itself, in containers or as an attribute. Activations are
        kept under torch.func, forward-mode AD, torch.export and torch.jit.trace, and where parameters are DTensors
        while forward is called: with fully_shard shard the whole stack, not its layers.

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

    def __init__(self, *layers: nn.Module, recompute: bool = True, preserve_rng: bool = True) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            if not isinstance(layer, nn.Module) or not hasattr(layer, "inverse"):
                raise TypeError(
                    f"ReversibleSequential: layers must be modules with an inverse, got {type(layer).__name__} at {i}"
                )
        if not layers:
            raise ValueError("ReversibleSequential: layers must not be empty")
        self.layers = nn.ModuleList(layers)
        self.recompute, self.preserve_rng = recompute, preserve_rng

    def forward(self, x: Tensor, *context: object, **named: object) -> tuple[Tensor, Tensor]:
        plainly = not self.recompute or not torch.is_grad_enabled()
        # what is_exporting returns, which dynamo of torch 2.11 takes for true wherever it compiles
        exported = torch.compiler._is_exporting_flag
        if plainly or exported or torch.jit.is_tracing():
            return self._run(x, context, named)
        return self._run_rebuilding(x, context, named)

    def inverse(self, y: Tensor, *context: object, **named: object) -> tuple[Tensor, Tensor]:
        total = 0
        for layer in reversed(self.layers):
            y, logdet = layer.inverse(y, *context, **named)
            total = logdet + total
        return y, total

    def _run(self, x: Tensor, context: tuple, named: dict) -> tuple[Tensor, Tensor]:
        total = 0
        for layer in self.layers:
            x, logdet = layer(x, *context, **named)
            total = logdet + total
        return x, total

    @torch.compiler.disable(reason="ReversibleSequential rebuilds activations outside the graph; compile its nets")
    def _run_rebuilding(self, x: Tensor, context: tuple, named: dict) -> tuple[Tensor, Tensor]:
        modules = [*self.modules()]
        owned = {id(p): p for m in modules for p in m._parameters.values() if p is not None and p.requires_grad}
        parameters = [*owned.values()]
        # what a parameter is outside of its layer's forward is another tensor than inside
        if _transformed() or any(map(is_traceable_wrapper_subclass, parameters)):
            return self._run(x, context, named)
        # weights that the root has normalised for all layers at once: one graph, so they enter as context does
        norms = [m for m in modules if isinstance(m, SpectralNorm) and m.held is not None]
        given = Context(context, named)
        tensors = [*given.tensors, *(norm.held for norm in norms)]
        return _Rebuilding.apply(self, given, norms, len(tensors), x, *tensors, *parameters)

    def _flat(self) -> Iterator[nn.Module]:
        """The layers, those of stacks inside too: every layer is rebuilt by itself."""
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
    def forward(ctx, stack, given, norms, n_given, x, *tensors):
        ctx.layers, ctx.given, ctx.norms, ctx.n_given = [*stack._flat()], given, norms, n_given
        ctx.replay, ctx.backend = Replay(x, stack), _backend.current()
        ctx.kept = []
        y, total, inputs = x, 0, []
        with _without_losses(), ctx.replay.conditions():
            for i, layer in enumerate(ctx.layers):
                before = y
                y, logdet = layer(y, *given.context, **given.named)
                total = logdet + total
                if ctx.replay.record(before) and not _rebuilds(layer):
                    # its inverse may draw in another order than its forward
                    ctx.kept.append(i)
                    inputs.append(before)
        # layers that only relabel would hand out the input itself
        y = y.view_as(y) if y is x else y
        ctx.save_for_backward(y, *tensors[:n_given], *inputs)
        given.forget()
        # not saved: hooks on saved tensors would hand back others, and gradients are those of these
        ctx.parameters = tensors[n_given:]
        ctx.versions = [p._version for p in ctx.parameters]
        return y, total

    @staticmethod
    def backward(ctx, grad_y, grad_logdet):
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
                x, outputs, leaves = _rebuild(layer, y, kept.get(i), args, named, lambda i=i: ctx.replay.rewind(i))
                ctx.replay.verify(i, layer, x, y)
                y = x
                outputs = [o for o in outputs if isinstance(o, Tensor)]
                ctx.given.check(outputs, (*leaves, *wanted))
                found = _gradients(outputs, (grad_y, grad_logdet), (*leaves, *wanted))
                grad_y = functools.reduce(torch.add, (g for g in found[: len(leaves)] if g is not None))
                grads.add(wanted, found[len(leaves) :])
        grad_x = grad_y if ctx.needs_input_grad[4] else None
        return None, None, None, None, grad_x, *map(grads.of, (*tensors, *ctx.parameters))


@contextlib.contextmanager
def _without_losses() -> Iterator[None]:
    """Nothing inside may add a loss: there is no graph yet, and in the backward it is too late."""
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
    """The layers meet these normalised weights."""
    before = [norm.given for norm in norms]
    try:
        for norm, weight in zip(norms, weights, strict=True):
            norm.give((weight, None, None))
        yield
    finally:
        for norm, normalised in zip(norms, before, strict=True):
            norm.give(normalised)


def _made_by(layer: nn.Module, kind: type) -> bool:
    """Whether a call does what `kind` says: nothing below it or on the instance has a forward or inverse of its own."""
    below = type(layer).__mro__[: type(layer).__mro__.index(kind)]
    overridden = any(name in vars(k) for k in (*below, layer) for name in ("forward", "inverse"))
    return not (overridden or layer._forward_hooks or layer._forward_pre_hooks)


def _rebuilds(layer: nn.Module) -> bool:
    """Whether the layer's `rebuild` knows its forward and inverse."""
    kind = next((k for k in type(layer).__mro__ if "rebuild" in vars(k)), None)
    return kind is not None and _made_by(layer, kind)


def _rebuild(
    layer: nn.Module, y: Tensor, x: Tensor | None, args: tuple, named: dict, rewind: Callable[[], None]
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """(x, layer(x) with its graph, the leaves whose gradients add up to x's), of an x that was kept or is rebuilt."""
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
    outputs: Iterable[Tensor], grads: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad of the outputs that have a graph; a logdet may be one for all samples."""
    pairs = [(o, g.sum_to_size(o.shape).to(o.dtype)) for o, g in zip(outputs, grads, strict=False) if o.requires_grad]
    return torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)


class _Sum:
    """Gradients by tensor: a parameter shared by layers collects from each."""

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
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
