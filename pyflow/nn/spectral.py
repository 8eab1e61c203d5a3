"""Spectral and weight normalisation of every layer of a model, as torch parametrizations."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize

from .. import _checks as check
from ..ops import spectral_normalize
from ._context import Context

# rounds that bring random u and v near the singular vectors before the first forward, as in torch
STARTING_ROUNDS = 15

Filter = Callable[[str, nn.Module], bool]
# a weight and its u and v
Normalised = tuple[Tensor, Tensor | None, Tensor | None]
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class SpectralNorm(nn.Module):
    """The parametrization W / sigma(W); buffers and their names are those of torch's spectral_norm."""

    _u: Tensor | None
    _v: Tensor | None

    def __init__(self, weight: Tensor, dim: int, n_iter: int, through_iteration: bool) -> None:
        super().__init__()
        self.dim, self.n_iter, self.through_iteration = dim, n_iter, through_iteration
        self._given: dict[int, Normalised] = {}  # by the root, to the thread in which its forward runs
        self._kept: Normalised | None = None  # what the forward whose backward runs was given, for a recomputation
        if weight.dim() > 1 and not through_iteration:
            matrix = self.matrix(weight.detach())
            for name, size in (("_u", matrix.shape[0]), ("_v", matrix[0].numel())):
                self.register_buffer(name, F.normalize(weight.new_empty(size).normal_(), dim=0))

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight with its outputs in front."""
        return weight.movedim(self.dim, 0) if self.dim else weight

    def vectors(self, matrix: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if matrix.dim() == 1:
            return None, None
        if self.through_iteration:
            return matrix.new_ones(matrix.shape[0]), matrix.new_ones(matrix[0].numel())
        return self._u, self._v

    @property
    def rounds(self) -> int:
        """A block that is recomputed for its gradient finds u and v where its forward has left them."""
        moves = self.training and not check.in_backward()
        return self.n_iter if moves or self.through_iteration else 0

    @property
    def given(self) -> Normalised | None:
        if torch.compiler.is_compiling():
            # by a root inside the graph or around it
            return next(iter(self._given.values()), None)
        return self._given.get(threading.get_ident())

    def give(self, normalised: Normalised | None) -> None:
        """Let this thread meet this weight; None: no more."""
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        if normalised is None:
            self._given.pop(thread, None)
        else:
            self._given[thread] = normalised

    @property
    def held(self) -> Tensor | None:
        """The normalised weight, if the root has made it."""
        given = self.given
        # a block that is recomputed for its gradient sees the weight it saw before
        held = self._kept if given is None and check.in_backward() else given
        return None if held is None else held[0]

    def forward(self, weight: Tensor) -> Tensor:
        held = self.held
        if held is not None:
            return held
        if self._kept is not None and not torch.compiler.is_compiling():
            # on its own from here on
            self._kept = None
        return normalize([(self, weight)], self.rounds)[0][0]

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_given": {}, "_kept": None}

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_iter={self.n_iter}, through_iteration={self.through_iteration}"


def normalize(layers: list[tuple[SpectralNorm, Tensor]], rounds: int, again: bool = False) -> list[Normalised]:
    """The normalised weights of layers on one device; the layers' u and v move on. `again`: as they were kept."""
    matrices = [norm.matrix(weight) for norm, weight in layers]
    vectors = [norm.vectors(matrix) for (norm, _), matrix in zip(layers, matrices, strict=True)]
    through = layers[0][0].through_iteration
    if again and not through:
        vectors = [norm._kept[1:] for norm, _ in layers]
    weights, u, v, _ = spectral_normalize(
        matrices, [a for a, _ in vectors], [b for _, b in vectors], n_iter=rounds, through_iteration=through
    )
    if rounds and not through:
        # in place, for DDP's broadcasts; what the backward needs are u and v themselves
        with torch.no_grad():
            for (a, b), new_a, new_b in zip(vectors, u, v, strict=True):
                if a is not None:
                    a.copy_(new_a)
                    b.copy_(new_b)
    weights = [
        weight.movedim(0, norm.dim) if norm.dim else weight for (norm, _), weight in zip(layers, weights, strict=True)
    ]
    return list(zip(weights, u, v, strict=True))


class _Together:
    """Hooks of the root: before its forward all layers are normalised in one call, after it nothing is given."""

    def __init__(self, layers: list[parametrize.ParametrizationList]) -> None:
        self.layers = layers

    @property
    def norms(self) -> list[SpectralNorm]:
        return [layer[0] for layer in self.layers]

    def before(self, root: nn.Module, args: object) -> None:
        again = check.in_backward() and all(norm._kept is not None for norm in self.norms)
        groups: dict[tuple[object, int], list[tuple[SpectralNorm, Tensor]]] = {}
        for layer in self.layers:
            norm, weight = layer[0], layer.original
            groups.setdefault((weight.device, norm.rounds), []).append((norm, weight))
        for (_, rounds), layers in groups.items():
            for (norm, _), normalised in zip(layers, normalize(layers, rounds, again), strict=True):
                norm.give(normalised)

    def after(self, root: nn.Module, args: object, output: object) -> None:
        given = [norm.given for norm in self.norms]
        for norm in self.norms:
            norm.give(None)
        if torch.compiler.is_compiling() or check.in_backward():
            return
        if not torch.is_grad_enabled():
            given = [None] * len(given)
        self.keep(given)
        plain = torch._C._functorch.peek_interpreter_stack() is None and not torch.jit.is_tracing()
        if torch.is_grad_enabled() and plain:
            # the backward of a forward starts at its outputs
            nodes = {normalised[0].grad_fn for normalised in given if normalised is not None}
            for tensor in [output] if isinstance(output, Tensor) else Context((output,), {}).tensors:
                if tensor.grad_fn is not None and tensor.grad_fn not in nodes:
                    tensor.register_hook(lambda _: self.keep(given))

    def keep(self, given: list[Normalised | None]) -> None:
        for norm, normalised in zip(self.norms, given, strict=True):
            norm._kept = normalised


# u and v change in place in every forward, which what is made in inference mode must not
@torch.inference_mode(False)
def apply_spectral_norm(
    model: nn.Module,
    filter: Filter | None = None,
    *,
    name: str = "weight",
    n_iter: int | None = None,
    through_iteration: bool = False,
) -> nn.Module:
    """Divide the weight of every layer by its largest singular value, all layers in one call per forward.

    Args:
        model: any module; changed in place. Its forward is where the layers are normalised, so call it and not its
            parts (a part called on its own normalises its layers one by one).
        filter: filter(layer's name, layer) picks layers; default every layer with a float parameter of this name:
            linear, convolutions, transposed ones, embeddings, the gains of norms.
        name: of the parameter.
        n_iter: rounds of power iteration per forward while training; default 1, or 5 with `through_iteration`.
        through_iteration: u and v start from ones in every forward and gradients pass through the rounds; the
            usual form keeps u and v in buffers, starts them at random, and holds them in the backward.

    Returns:
        The model.

    Raises:
        TypeError: `n_iter` is not an integer.
        ValueError: n_iter < 1; no layer is picked; a picked layer lacks the parameter, or has it normalised, lazy,
            sharded, or all zeros, which have no direction.

    Notes:
        state_dict has the keys and shapes of torch.nn.utils.parametrizations.spectral_norm, and loads either way.
        In eval mode u and v stay. Of transposed convolutions dim 1 is the output, as in torch. The normalised
        weights of a forward are held for its backward, so that what activation checkpointing (use_reentrant=False)
        recomputes there, the model or a block of it, meets them again and u and v stay. torch does not pickle
        parametrized modules: save the state_dict; copy.deepcopy works.
        With `through_iteration`, ones that are orthogonal to a layer's leading vector miss its singular value.

    Source:
        Miyato et al. 2018, Spectral normalization for GANs, arXiv:1802.05957.

    Example:
        >>> model = apply_spectral_norm(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)))
        >>> y = model(torch.ones(1, 8))
        >>> model[1].weight.detach()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    op = "apply_spectral_norm"
    n_iter = check.at_least(op, "n_iter", (5 if through_iteration else 1) if n_iter is None else n_iter, 1)
    layers = []
    picked = _picked(op, model, filter, name)
    for path, layer in picked:
        weight = getattr(layer, name).detach()
        if _read(weight) and not bool(weight.any()):
            raise ValueError(f"{op}: {_where(path, name)} must not be all zeros, they have no direction")
    for _, layer in picked:
        weight = getattr(layer, name)
        dim = 1 if isinstance(layer, _TRANSPOSED) and weight.dim() > 1 else 0
        norm = SpectralNorm(weight, dim, n_iter, through_iteration).train(layer.training)
        # unsafe: torch would check the shape by a call, which moves u and v
        parametrize.register_parametrization(layer, name, norm, unsafe=True)
        layers.append(layer.parametrizations[name])
    if not through_iteration:
        with torch.no_grad():
            for device in {layer.original.device for layer in layers}:
                there = [(layer[0], layer.original) for layer in layers if layer.original.device == device]
                normalize(there, STARTING_ROUNDS)
    together = _Together(layers)
    model.register_forward_pre_hook(together.before)
    model.register_forward_hook(together.after, always_call=True)
    return model


def remove_spectral_norm(model: nn.Module) -> nn.Module:
    """Make the normalised weights plain parameters again, with the values they have now.

    Example:
        >>> model = remove_spectral_norm(apply_spectral_norm(nn.Linear(8, 4)))
        >>> list(model.state_dict())
        ['bias', 'weight']
    """
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Together)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    for layer in [*model.modules()]:
        if not parametrize.is_parametrized(layer):
            continue
        for name in [n for n, norms in layer.parametrizations.items() if isinstance(norms[0], SpectralNorm)]:
            layer.parametrizations[name].eval()
            parametrize.remove_parametrizations(layer, name)
    return model


def apply_weight_norm(
    model: nn.Module, filter: Filter | None = None, *, name: str = "weight", dim: int = 0
) -> nn.Module:
    """Write the weight of every layer as g v / |v|, with torch's own parametrization.

    Args:
        model: any module; changed in place.
        filter: as in `apply_spectral_norm`.
        name: of the parameter.
        dim: the dim that keeps one norm per index; a vector, such as a norm's gain, has one norm.

    Returns:
        The model; its parameters are new, so make the optimizer afterwards.

    Raises:
        ValueError: no layer is picked; a picked layer lacks the parameter, has it normalised, lazy or sharded, has
            no such dim, or has a row of zeros, which has no direction.

    Source:
        Salimans and Kingma 2016, arXiv:1602.07868.

    Example:
        >>> sorted(apply_weight_norm(nn.Linear(8, 4)).state_dict())
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
    """
    op = "apply_weight_norm"
    layers = _picked(op, model, filter, name)
    for path, layer in layers:
        weight = getattr(layer, name).detach()
        if weight.dim() > 1 and not -weight.dim() <= dim < weight.dim():
            shape = tuple(weight.shape)
            raise ValueError(f"{op}: dim must be one of {_where(path, name)}, of shape {shape}, got {dim}")
        if _read(weight) and not bool((_norms(weight, dim) > 0).all()):
            raise ValueError(f"{op}: {_where(path, name)} must not have a row of zeros, it has no direction")
    for _, layer in layers:
        parametrizations.weight_norm(layer, name, None if getattr(layer, name).dim() == 1 else dim)
    return model


def remove_weight_norm(model: nn.Module) -> nn.Module:
    """Make the weights plain parameters again."""
    for layer in [*model.modules()]:
        if not parametrize.is_parametrized(layer):
            continue
        for name, norms in [*layer.parametrizations.items()]:
            if isinstance(norms[0], parametrizations._WeightNorm):
                parametrize.remove_parametrizations(layer, name)
    return model


def _read(weight: Tensor) -> bool:
    """Whether there are numbers to look at."""
    return not weight.is_meta and not isinstance(weight, FakeTensor)


def _norms(weight: Tensor, dim: int) -> Tensor:
    return torch.norm_except_dim(weight, 2, -1 if weight.dim() == 1 else dim)


def _where(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _picked(op: str, model: nn.Module, filter: Filter | None, name: str) -> list[tuple[str, nn.Module]]:
    """(path, layer) of the layers to normalise."""
    picked = []
    for path, layer in [*model.named_modules()]:
        if isinstance(layer, (parametrize.ParametrizationList, SpectralNorm)):
            continue
        weight = getattr(layer, "_parameters", {}).get(name)
        picks = filter is None or filter(path, layer)
        if picks and weight is not None and (is_lazy(weight) or hasattr(weight, "placements")):
            state = "lazy, run a batch first" if is_lazy(weight) else "sharded yet, call fully_shard afterwards"
            raise ValueError(f"{op}: {_where(path, name)} must not be {state}")
        normalised = parametrize.is_parametrized(layer, name)
        if filter is None:
            # a slope is no gain: its norm is its size
            if isinstance(layer, nn.PReLU) or weight is None or not weight.is_floating_point() or not weight.dim():
                continue
        elif not picks:
            continue
        elif normalised:
            raise ValueError(f"{op}: {_where(path, name)} must not be parametrized already")
        elif weight is None or not weight.dim():
            raise ValueError(f"{op}: {type(layer).__name__} {path!r} has no parameter {name!r} of one dim or more")
        picked.append((path, layer))
    if not picked:
        raise ValueError(f"{op}: no layer of {type(model).__name__} was picked that has a parameter {name!r}")
    return picked
