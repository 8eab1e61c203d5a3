"""Spectral and weight normalisation of all layers of a model, as torch parametrizations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize

from .. import _checks as check
from .._torch import FakeTensor, transform
from ..ops import spectral_normalize
from ._context import Context

if TYPE_CHECKING:
    from ._typed import ModuleListOf

# power iterations on the random u and v before the first forward, as in torch
STARTING_ROUNDS = 15

Filter = Callable[[str, nn.Module], bool]
# a weight and its u and v
Normalised = tuple[Tensor, Tensor | None, Tensor | None]
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class SpectralNorm(nn.Module):
    """The parametrization W / sigma(W), with the buffers of torch's spectral_norm."""

    _u: Tensor | None
    _v: Tensor | None

    def __init__(self, weight: Tensor, dim: int, n_iter: int, through_iteration: bool) -> None:
        super().__init__()
        self.dim, self.n_iter, self.through_iteration = dim, n_iter, through_iteration
        self._given: dict[int, Normalised] = {}  # by thread, while the root's forward runs
        self._kept: Normalised | None = None  # of the last forward, for recomputation in its backward
        if weight.dim() > 1 and not through_iteration:
            matrix = self.matrix(weight.detach())
            for name, size in (("_u", matrix.shape[0]), ("_v", matrix[0].numel())):
                self.register_buffer(name, F.normalize(weight.new_empty(size).normal_(), dim=0))

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight with its output dim first."""
        return weight.movedim(self.dim, 0) if self.dim else weight

    def vectors(self, matrix: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the starting (u, v) of the power iteration; (None, None) for a vector."""
        if matrix.dim() == 1:
            return None, None
        if self.through_iteration:
            return matrix.new_ones(matrix.shape[0]), matrix.new_ones(matrix[0].numel())
        return self._u, self._v

    @property
    def rounds(self) -> int:
        """Power iterations of this forward; with buffers u and v none in eval mode and in recomputation."""
        moves = self.training and not check.in_backward()
        return self.n_iter if moves or self.through_iteration else 0

    @property
    def given(self) -> Normalised | None:
        """What the root's forward in this thread has computed for this layer."""
        if torch.compiler.is_compiling():
            # one shared entry under compile, whether the root is inside the graph or around it
            return next(iter(self._given.values()), None)
        return self._given.get(threading.get_ident())

    def give(self, normalised: Normalised | None) -> None:
        """Set (or with None clear) the normalised weight that forwards in this thread return."""
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        if normalised is None:
            self._given.pop(thread, None)
        else:
            self._given[thread] = normalised

    @property
    def held(self) -> Tensor | None:
        """The normalised weight, if the root has computed it."""
        given = self.given
        # recomputation in the backward gets the same weight as the forward
        held = self._kept if given is None and check.in_backward() else given
        return None if held is None else held[0]

    def forward(self, weight: Tensor) -> Tensor:
        held = self.held
        if held is not None:
            return held
        if self._kept is not None and not torch.compiler.is_compiling():
            # the layer is called without the root: drop the weight of the last root forward
            self._kept = None
        return normalize([(self, weight)], self.rounds)[0][0]

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_given": {}, "_kept": None}

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_iter={self.n_iter}, through_iteration={self.through_iteration}"


def normalize(layers: list[tuple[SpectralNorm, Tensor]], rounds: int, again: bool = False) -> list[Normalised]:
    """Return the normalised weights of layers on one device and update their u and v.

    `again`: use the u and v of the last forward.
    """
    matrices = [norm.matrix(weight) for norm, weight in layers]
    vectors = [norm.vectors(matrix) for (norm, _), matrix in zip(layers, matrices, strict=True)]
    through = layers[0][0].through_iteration
    if again and not through:
        vectors = [norm._kept[1:] for norm, _ in layers if norm._kept is not None]
    normalised, u, v, _ = spectral_normalize(
        matrices, [a for a, _ in vectors], [b for _, b in vectors], n_iter=rounds, through_iteration=through
    )
    if rounds and not through:
        # in place, so that DDP broadcasts the buffers; the backward uses the new tensors u and v
        with torch.no_grad():
            for (a, b), new_a, new_b in zip(vectors, u, v, strict=True):
                if a is not None and b is not None and new_a is not None and new_b is not None:
                    a.copy_(new_a)
                    b.copy_(new_b)
    weights = [
        weight.movedim(0, norm.dim) if norm.dim else weight
        for (norm, _), weight in zip(layers, normalised, strict=True)
    ]
    return list(zip(weights, u, v, strict=True))


if TYPE_CHECKING:

    class _Normed(ModuleListOf[SpectralNorm]):
        """A ParametrizationList with a SpectralNorm."""

        original: Tensor


class _Together:
    """Hooks of the root: normalise all layers in one call before its forward, and clear the weights after it."""

    def __init__(self, layers: list[_Normed]) -> None:
        self.layers = layers

    @property
    def norms(self) -> list[SpectralNorm]:
        return [layer[0] for layer in self.layers]

    def before(self, root: nn.Module, args: object) -> None:
        again = check.in_backward() and all(norm._kept is not None for norm in self.norms)
        groups: dict[tuple[torch.device, int], list[tuple[SpectralNorm, Tensor]]] = {}
        for layer in self.layers:
            norm, weight = layer[0], layer.original
            groups.setdefault((weight.device, norm.rounds), []).append((norm, weight))
        for (_, rounds), layers in groups.items():
            for (norm, _), normalised in zip(layers, normalize(layers, rounds, again), strict=True):
                norm.give(normalised)

    def after(self, root: nn.Module, args: object, output: object) -> None:
        given: list[Normalised | None] = [norm.given for norm in self.norms]
        for norm in self.norms:
            norm.give(None)
        if torch.compiler.is_compiling() or check.in_backward():
            return
        if not torch.is_grad_enabled():
            given = [None] * len(given)
        self.keep(given)
        plain = transform() is None and not torch.jit.is_tracing()  # type: ignore[attr-defined]  # missing in torch.jit.__all__
        if torch.is_grad_enabled() and plain:
            # the hooks of the outputs run first in a backward: restore the weights of its own forward
            nodes = {normalised[0].grad_fn for normalised in given if normalised is not None}
            for tensor in [output] if isinstance(output, Tensor) else Context((output,), {}).tensors:
                if tensor.grad_fn is not None and tensor.grad_fn not in nodes:
                    tensor.register_hook(lambda _: self.keep(given))

    def keep(self, given: list[Normalised | None]) -> None:
        """Set the weights that recomputation in a backward returns."""
        for norm, normalised in zip(self.norms, given, strict=True):
            norm._kept = normalised


# every forward changes u and v in place, which autograd forbids for tensors made in inference mode
@torch.inference_mode(False)
def apply_spectral_norm(
    model: nn.Module,
    filter: Filter | None = None,
    *,
    name: str = "weight",
    n_iter: int | None = None,
    through_iteration: bool = False,
) -> nn.Module:
    """Spectral norm: divide every layer's weight by its largest singular value, all layers in one call per forward.

    Args:
        model: any module; changed in place. The forward of `model` normalises all layers, so call `model` and not
            its parts (a part called directly normalises its layers one by one).
        filter: filter(layer's name, layer) selects layers; default: every layer with a float parameter `name`, such
            as linear layers, (transposed) convolutions, embeddings and the gains of norms.
        name: name of the parameter.
        n_iter: power iterations per forward while training; default 1, or 5 with `through_iteration`.
        through_iteration: u and v start from ones in every forward and gradients pass through the iterations.
            Otherwise u and v are buffers with a random start and are constants in the backward.

    Returns:
        The model.

    Raises:
        TypeError: `n_iter` is not an integer; a selected parameter is not float32, float64, bfloat16 or float16.
        ValueError: n_iter < 1; no layer is selected; a selected layer lacks the parameter, or it is already
            normalised, lazy, sharded, or all zeros (no direction).

    Notes:
        The state_dict has the keys and shapes of torch.nn.utils.parametrizations.spectral_norm and loads in both
        directions. In eval mode u and v do not change. For transposed convolutions dim 1 is the output, as in torch.
        The normalised weights of a forward are kept for its backward: activation checkpointing
        (use_reentrant=False) of the model or of a block recomputes with the same weights and does not change u and v.
        torch cannot pickle parametrized modules: save the state_dict; copy.deepcopy works.
        With `through_iteration`, the largest singular value is missed if its singular vector is orthogonal to ones.

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
        check.float_tensor(op, _where(path, name), weight)
        if _read(weight) and not bool(weight.any()):
            raise ValueError(f"{op}: {_where(path, name)} must not be all zeros, they have no direction")
    for _, layer in picked:
        weight = getattr(layer, name)
        dim = 1 if isinstance(layer, _TRANSPOSED) and weight.dim() > 1 else 0
        norm = SpectralNorm(weight, dim, n_iter, through_iteration).train(layer.training)
        # unsafe=True: torch's check of the shape would call the parametrization and change u and v
        parametrize.register_parametrization(layer, name, norm, unsafe=True)
        layers.append(cast("_Normed", _parametrizations(layer)[name]))
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
    """Undo `apply_spectral_norm`: make the weights plain parameters with their current normalised values.

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
        for name in [n for n, norms in _lists(layer) if isinstance(norms[0], SpectralNorm)]:
            _parametrizations(layer)[name].eval()
            parametrize.remove_parametrizations(layer, name)
    return model


def apply_weight_norm(
    model: nn.Module, filter: Filter | None = None, *, name: str = "weight", dim: int = 0
) -> nn.Module:
    """Weight norm: write the weight of every layer as g v / |v|, with torch's own parametrization.

    Args:
        model: any module; changed in place.
        filter: as in `apply_spectral_norm`.
        name: name of the parameter.
        dim: one norm per index of this dim; a vector, such as a norm's gain, has one norm.

    Returns:
        The model; its parameters are new, so create the optimizer afterwards.

    Raises:
        ValueError: no layer is selected; a selected layer lacks the parameter; it is already normalised, lazy or
            sharded; it lacks the dim; it has a row of zeros (no direction); it is shared with a parameter that is not
            selected.

    Notes:
        Layers that share a weight share its g and v, and share the weight again after `remove_weight_norm`.

    Source:
        Salimans and Kingma 2016, arXiv:1602.07868.

    Example:
        >>> sorted(apply_weight_norm(nn.Linear(8, 4)).state_dict())
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
    """
    op = "apply_weight_norm"
    dim = check.at_least(op, "dim", dim, -(2**63))
    layers = _picked(op, model, filter, name)
    for path, layer in layers:
        weight = getattr(layer, name).detach()
        if weight.dim() > 1 and not -weight.dim() <= dim < weight.dim():
            shape = tuple(weight.shape)
            raise ValueError(f"{op}: dim must be one of {_where(path, name)}, of shape {shape}, got {dim}")
        if _read(weight) and not bool((_norms(weight, dim) > 0).all()):
            raise ValueError(f"{op}: {_where(path, name)} must not have a row of zeros, it has no direction")
    weights = [getattr(layer, name) for _, layer in layers]
    _check_shared(op, model, layers, weights, name)
    norms: dict[Tensor, parametrize.ParametrizationList] = {}
    for (_, layer), weight in zip(layers, weights, strict=True):
        # torch's -1: one norm of the whole tensor
        parametrizations.weight_norm(layer, name, -1 if weight.dim() == 1 else dim % weight.dim())
        norm = cast("parametrize.ParametrizationList", _parametrizations(layer)[name])
        # torch makes new parameters for each layer; a shared weight stays shared
        same = norms.setdefault(weight, norm)
        norm.original0, norm.original1 = same.original0, same.original1
    return model


def _check_shared(
    op: str, model: nn.Module, layers: list[tuple[str, nn.Module]], weights: list[Tensor], name: str
) -> None:
    """Raise if a weight is also a parameter of a layer that is not picked, which would keep the old weight."""
    picked = {layer for _, layer in layers}
    chosen = {weight: path for (path, _), weight in zip(layers, weights, strict=True)}
    for path, layer in model.named_modules():
        for other, weight in layer._parameters.items():
            if weight in chosen and not (layer in picked and other == name):
                raise ValueError(
                    f"{op}: {_where(chosen[weight], name)} must not be shared with a parameter that is not picked, got "
                    f"{_where(path, other)}"
                )


def remove_weight_norm(model: nn.Module) -> nn.Module:
    """Undo `apply_weight_norm`: make the weights plain parameters again."""
    weights: dict[Tensor, Tensor] = {}
    for layer in [*model.modules()]:
        if not parametrize.is_parametrized(layer):
            continue
        for name, norms in [*_lists(layer)]:
            if isinstance(norms[0], parametrizations._WeightNorm):
                direction = cast("Tensor", norms.original1)
                parametrize.remove_parametrizations(layer, name)
                weight = getattr(layer, name)
                if not isinstance(weight, nn.Parameter):
                    # torch leaves a frozen weight as a buffer
                    delattr(layer, name)
                    weight = nn.Parameter(weight.detach(), requires_grad=False)
                setattr(layer, name, weights.setdefault(direction, weight))
    return model


def _parametrizations(layer: nn.Module) -> nn.ModuleDict:
    return cast("nn.ModuleDict", layer.parametrizations)


def _lists(layer: nn.Module) -> Iterable[tuple[str, parametrize.ParametrizationList]]:
    return cast("Iterable[tuple[str, parametrize.ParametrizationList]]", _parametrizations(layer).items())


def _read(weight: Tensor) -> bool:
    """Whether the weight has values that can be read."""
    return not weight.is_meta and not isinstance(weight, FakeTensor)


def _norms(weight: Tensor, dim: int) -> Tensor:
    return torch.norm_except_dim(weight, 2, -1 if weight.dim() == 1 else dim % weight.dim())


def _where(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _picked(op: str, model: nn.Module, filter: Filter | None, name: str) -> list[tuple[str, nn.Module]]:
    """Return (path, layer) of the layers to normalise."""
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
            # PReLU's slope is skipped: normalising it would fix its size
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
