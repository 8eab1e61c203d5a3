"""Train deep stacks of invertible layers in the memory of a shallow one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._context import Context
from .spectral import SpectralNorm


class ReversibleSequential(nn.Module):
    """Invertible layers in a row whose backward rebuilds every input from its output.

    y = layer_n(... layer_1(x)), logdet = the layers' sum; nothing but y is kept for backward.

    Args:
        layers: modules with `forward(x, *context, **context) -> (y, logdet)` and `inverse(y, ...) -> (x, logdet)`.
            A layer may offer `rebuild` as the coupling layers do, to save an evaluation of its net.
        recompute: False keeps activations as any module does (faster, differentiable twice, memory grows with depth).
        preserve_rng: replay the random state of layers that drew numbers, so that dropout in a net works.

    Returns:
        `forward(x, *context, **context)` and `inverse(y, ...)`: (y, logdet (B,)). Every layer gets the context.

    Raises:
        RuntimeError: in backward with create_graph=True, since there is no graph to differentiate again; of a context
            that hides a tensor which needs a gradient.

    Notes:
        Activation memory is that of one layer plus y, at the price of one more net evaluation per coupling layer
        (two for layers without `rebuild`). Gradients equal those of the plain stack up to the rounding of the
        inverse: keep x in float32 or float64 and scale maps bounded. Autocast is replayed. Layers whose forward
        changes state (batch norm's statistics) see every batch twice. torch.compile breaks its graph here when
        gradients are wanted: compile the nets inside instead. A tensor a net closes over gets no gradient: pass it as
        context, by itself, in containers or as an attribute. Activations are kept under torch.func, forward-mode AD
        and torch.export, and where parameters are DTensors while forward is called: with fully_shard shard the whole
        stack, not its layers.

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
        if not self.recompute or not torch.is_grad_enabled() or torch.compiler.is_exporting():
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

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: int) -> nn.Module:
        return self.layers[i]


class _Rebuilding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stack, given, norms, n_given, x, *tensors):
        ctx.stack, ctx.given, ctx.norms, ctx.n_given = stack, given, norms, n_given
        # fake tensors draw nothing, and the state is none of them
        ctx.replay = _Replay(x.device, stack.preserve_rng and not isinstance(x, FakeTensor))
        y, total = x, 0
        with ctx.replay.autocast():
            for layer in stack.layers:
                y, logdet = layer(y, *given.context, **given.named)
                total = logdet + total
                ctx.replay.record()
        # layers that only relabel would hand out the input itself
        y = y.view_as(y) if y is x else y
        ctx.save_for_backward(y, *tensors[:n_given])
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
        needed = ctx.needs_input_grad[5 : 5 + ctx.n_given]
        tensors = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed)]
        weights = tensors[ctx.n_given - len(ctx.norms) :]
        args, named = ctx.given.filled(tensors)
        grads = _Sum(t for t in (*tensors, *ctx.parameters) if t.requires_grad)
        y = y.detach()
        with ctx.replay.resume(), _given(ctx.norms, weights):
            for i, layer in reversed(list(enumerate(ctx.stack.layers))):
                wanted = [t for t in tensors if t.requires_grad] + [p for p in layer.parameters() if p.requires_grad]
                y, outputs, leaves = _rebuild(layer, y, args, named, lambda i=i: ctx.replay.rewind(i))
                ctx.given.check(outputs, (*leaves, *wanted))
                found = _gradients(outputs, (grad_y, grad_logdet), (*leaves, *wanted))
                grad_y = functools.reduce(torch.add, (g for g in found[: len(leaves)] if g is not None))
                grads.add(wanted, found[len(leaves) :])
        grad_x = grad_y if ctx.needs_input_grad[4] else None
        return None, None, None, None, grad_x, *map(grads.of, (*tensors, *ctx.parameters))


@contextlib.contextmanager
def _given(norms: list[SpectralNorm], weights: list[Tensor]) -> Iterator[None]:
    """The layers meet these normalised weights."""
    before = [norm._given for norm in norms]
    try:
        for norm, weight in zip(norms, weights):
            norm._given = weight
        yield
    finally:
        for norm, weight in zip(norms, before):
            norm._given = weight


def _rebuild(
    layer: nn.Module, y: Tensor, args: tuple, named: dict, rewind: Callable[[], None]
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """(x, layer(x) with its graph, the leaves whose gradients add up to x's)."""
    rewind()
    if hasattr(layer, "rebuild"):
        return layer.rebuild(y, *args, **named)
    with torch.no_grad():
        x = layer.inverse(y, *args, **named)[0]
    rewind()
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return x, layer(leaf, *args, **named), (leaf,)


def _gradients(
    outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], inputs: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad of the outputs that have a graph."""
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads) if o.requires_grad]
    return torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)


class _Sum:
    """Gradients by tensor: a parameter shared by layers collects from each."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.totals: dict[int, Tensor | None] = {id(t): None for t in tensors}

    def add(self, tensors: list[Tensor], grads: tuple[Tensor | None, ...]) -> None:
        for tensor, grad in zip(tensors, grads):
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


class _Replay:
    """The random and autocast state of a forward, to be met again in its backward."""

    def __init__(self, device: torch.device, rng: bool) -> None:
        self.device, self.rng = device, rng
        kinds = [k for k in {"cpu", device.type} if torch.amp.is_autocast_available(k)]
        self.casts = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
        self.drawn: list[list[Tensor] | None] = []  # the state before each layer that drew numbers
        self.last = self._read()

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.casts:
                # a weight cast without a graph must not be found in the cache by a forward that wants one
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    def record(self) -> None:
        """Note, after a layer, where it started if it drew numbers."""
        state = self._read()
        drew = not all(map(torch.equal, state, self.last))
        self.drawn.append(self.last if drew else None)
        if drew:
            self.last = state

    @contextlib.contextmanager
    def resume(self) -> Iterator[None]:
        """The forward's autocast; whatever is drawn inside, the caller's random state comes back."""
        before = self._read()
        try:
            with self.autocast():
                yield
        finally:
            if any(self.drawn):
                self._write(before)

    def rewind(self, i: int) -> None:
        if self.drawn[i] is not None:
            self._write(self.drawn[i])

    def _read(self) -> list[Tensor]:
        if not self.rng:
            return []
        state = [torch.get_rng_state()]
        if self.device.type not in ("cpu", "meta"):
            state.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return state

    def _write(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.get_device_module(self.device).set_rng_state(state[1], self.device)


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
