"""Spectral and weight normalisation of all layers of a model, as torch parametrizations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize

from .. import _checks as check
from .._torch import FakeTensor
from ._spectral_norm import SpectralNorm, Together, normalize

if TYPE_CHECKING:
    from ._spectral_norm import Normed

# power iterations on the random u and v before the first forward, as in torch
STARTING_ROUNDS = 15

Filter = Callable[[str, nn.Module], bool]
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
            as linear layers, (transposed) convolutions, embeddings and the gains of norms, but not PReLU.
        name: name of the parameter.
        n_iter: power iterations per forward while training; default 1, or 5 with `through_iteration`.
        through_iteration: u and v start from ones in every forward and gradients pass through the iterations.
            Otherwise u and v are buffers with a random start and are constants in the backward.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a module; `n_iter` is not an integer; a selected parameter is not float32, float64,
            bfloat16 or float16.
        ValueError: n_iter < 1; no layer is selected; a selected layer lacks the parameter, or it is already
            normalised, lazy, sharded, or all zeros (no direction).

    Notes:
        The state_dict has the keys and shapes of torch.nn.utils.parametrizations.spectral_norm and loads in both
        directions. In eval mode u and v do not change. For transposed convolutions dim 1 is the output, as in torch.
        The normalised weights of a forward are kept for its backward: activation checkpointing
        (use_reentrant=False) of the model, of a block or of a function that calls the model recomputes with the same
        weights and does not change u and v, whatever the loss is made of and whichever forwards ran in between.
        use_reentrant=True allows one recomputed block per forward, and raises where that forward's weights are gone;
        around the whole model it recomputes with the newest u and v.
        All weights are one node of the graph, unlike torch's: if one forward has several backwards, pass
        retain_graph=True to all but the last.
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
    _module(op, model)
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
        layers.append(cast("Normed", _parametrizations(layer)[name]))
    if not through_iteration:
        with torch.no_grad():
            for device in {layer.original.device for layer in layers}:
                there = [(layer[0], layer.original) for layer in layers if layer.original.device == device]
                normalize(there, STARTING_ROUNDS)
    together = Together(layers)
    model.register_forward_pre_hook(together.before)
    model.register_forward_hook(together.after, always_call=True)
    return model


def remove_spectral_norm(model: nn.Module) -> nn.Module:
    """Undo `apply_spectral_norm`: make the weights plain parameters with their current normalised values.

    Raises:
        TypeError: the model is not a module.
        ValueError: no weight was normalised by `apply_spectral_norm`.

    Example:
        >>> model = remove_spectral_norm(apply_spectral_norm(nn.Linear(8, 4)))
        >>> list(model.state_dict())
        ['bias', 'weight']
    """
    normalised = _normalised("remove_spectral_norm", model, SpectralNorm, "apply_spectral_norm")
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Together)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    for layer, name, norms in normalised:
        norms.eval()
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
    """Undo `apply_weight_norm`: make the weights plain parameters again.

    Raises:
        TypeError: the model is not a module.
        ValueError: no weight was normalised by `apply_weight_norm` or torch's `weight_norm`.
    """
    weights: dict[Tensor, Tensor] = {}
    normalised = _normalised("remove_weight_norm", model, parametrizations._WeightNorm, "apply_weight_norm")
    for layer, name, norms in normalised:
        direction = cast("Tensor", norms.original1)
        parametrize.remove_parametrizations(layer, name)
        weight = getattr(layer, name)
        if not isinstance(weight, nn.Parameter):
            # torch leaves a frozen weight as a buffer
            delattr(layer, name)
            weight = nn.Parameter(weight.detach(), requires_grad=False)
        setattr(layer, name, weights.setdefault(direction, weight))
    return model


def _normalised(
    op: str, model: nn.Module, norm: type, by: str
) -> list[tuple[nn.Module, str, parametrize.ParametrizationList]]:
    """Return the weights with this normalisation; raise ValueError if there are none."""
    _module(op, model)
    layers = [layer for layer in model.modules() if parametrize.is_parametrized(layer)]
    found = [(layer, name, norms) for layer in layers for name, norms in _lists(layer) if isinstance(norms[0], norm)]
    if not found:
        raise ValueError(f"{op}: no weight was normalised by {by}")
    return found


def _parametrizations(layer: nn.Module) -> nn.ModuleDict:
    return cast("nn.ModuleDict", layer.parametrizations)


def _module(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a module, got {type(model).__name__}")


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
    if isinstance(filter, type) or not (filter is None or callable(filter)):
        got = f"the class {filter.__name__}" if isinstance(filter, type) else type(filter).__name__
        raise TypeError(f"{op}: filter must be a function of a layer's name and the layer, got {got}")
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
    if not picked and any(parametrize.is_parametrized(layer, name) for layer in model.modules()):
        raise ValueError(
            f"{op}: every {name} is parametrized already; remove_spectral_norm, remove_weight_norm or torch's "
            "remove_parametrizations undoes that"
        )
    if not picked:
        raise ValueError(f"{op}: no layer of {type(model).__name__} was picked that has a parameter {name!r}")
    return picked
