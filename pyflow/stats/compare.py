"""Comparison of the layers of two networks: centred kernel alignment of all pairs, over minibatches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .. import _checks as check
from ..hsic.estimators import ratio
from ..hsic.inputs import variable
from ..hsic.kernels import KernelSpec
from ..hsic.powers import times_two_to
from ._grams import CentredGram
from ._inputs import bar, numbers_of, same, tensor_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OP = "compare_representations"
# a heat-map with more cells does not print their values
MOST_NUMBERS = 150
KERNELS = ("linear", "rbf", "laplacian", "polynomial")


@dataclass(frozen=True, eq=False)
class RepresentationComparison:
    """CKA of every layer of one network with every layer of another.

    Attributes:
        cka: (len(layers1), len(layers2)) float64 on the CPU.
        layers1, layers2: names of the layers, in the order in which they ran.
    """

    cka: Tensor
    layers1: tuple[str, ...]
    layers2: tuple[str, ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RepresentationComparison):
            return NotImplemented
        return all(same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self) -> int:
        return hash((self.layers1, self.layers2))

    def heatmap(self, axes: Axes | None = None, *, names: tuple[str, str] = ("model 1", "model 2")) -> Axes:
        """Draw the matrix with matplotlib, the first layers at the bottom left, and return the axes."""
        from matplotlib import pyplot as plt

        if axes is None:
            size = [1.8 + 0.38 * max(count, 4) for count in self.cka.shape]
            _, axes = plt.subplots(figsize=(size[1] + 0.8, size[0]), layout="constrained")
        image = axes.imshow(self.cka.numpy(), origin="lower", cmap="magma", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(self.layers2)), self.layers2, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(self.layers1)), self.layers1, fontsize=8)
        axes.set_ylabel(names[0])
        axes.set_xlabel(names[1])
        if self.cka.numel() <= MOST_NUMBERS:
            for i, row in enumerate(self.cka.tolist()):
                for j, value in enumerate(row):
                    color = "black" if value > 0.6 else "white"
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        axes.figure.colorbar(image, ax=axes, label="CKA")
        return axes

    def plot(self, path: str | Path, *, names: tuple[str, str] = ("model 1", "model 2")) -> Path:
        """Write the heat-map to an image file and return its path; missing folders are created."""
        from matplotlib import pyplot as plt

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = cast("Figure", self.heatmap(names=names).figure)
        figure.savefig(path, dpi=130)
        plt.close(figure)
        return path


@torch.no_grad()
def compare_representations(
    model1: nn.Module,
    model2: nn.Module,
    loader: Iterable[object],
    *,
    layers1: Sequence[str] | None = None,
    layers2: Sequence[str] | None = None,
    kernel: str = "linear",
    bandwidth: float | str = "median",
    progress: bool = True,
) -> RepresentationComparison:
    """CKA of all pairs of layers: mean HSIC(K, L) / sqrt(mean HSIC(K, K) mean HSIC(L, L)), unbiased, over minibatches.

    Args:
        model1, model2: modules called with one tensor; may be the same module. They run in eval mode, each on its
            device, and then return to their previous mode.
        loader: iterable of batches: tensors, arrays or pandas tables, or tuples and lists that start with one. Floats
            of arrays and tables become torch's default dtype. Batches of fewer than 4 samples are skipped.
        layers1, layers2: names of submodules (as in `named_modules`); None: all submodules without children.
        kernel: "linear", "rbf", "laplacian" or "polynomial", applied to the flattened outputs.
        bandwidth: bandwidth of rbf and laplacian: a number, or "median", computed per layer and batch.
        progress: show a bar over the batches, where tqdm is installed.

    Returns:
        `RepresentationComparison` with cka, layers1, layers2 and `heatmap`, `plot`. A module that runs more than once
        in a forward counts as one layer per run: "relu", "relu:2".

    Raises:
        TypeError, ValueError: not modules, unknown names or kernels, no batch of 4 samples, outputs that are not
            finite.

    Notes:
        The mean of the estimate does not depend on the batch size, its variance does. A minibatch stores Gram matrices
        (n x n) only, not activations (n x features, far larger); all pairs are then one matrix product.

    Source:
        Nguyen, Raghu and Kornblith 2020, Do Wide and Deep Networks Learn the Same Things?, arXiv:2010.15327.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> same = compare_representations(net, net, torch.randn(4, 32, 5), progress=False)
        >>> same.layers1, [round(v, 3) for v in same.cka.diagonal().tolist()]
        (('0', '1', '2'), [1.0, 1.0, 1.0])
    """
    check.choice(OP, "kernel", kernel, KERNELS)
    models = (model1, model2)
    for name, model in zip(("model1", "model2"), models, strict=True):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{OP}: {name} must be a module, got {type(model).__name__}")
    chosen = [_names("layers1", model1, layers1), _names("layers2", model2, layers2)]
    gram = _gram(KernelSpec(kernel, bandwidth))
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise TypeError(f"{OP}: loader must be an iterable of batches, got {type(loader).__name__}")
    layers: list[tuple[str, ...]] | None = None
    # sums over batches: of both models' Gram matrices, and of each model's with itself
    cross: Any = 0.0
    own: list[Any] = [0.0, 0.0]
    # per layer, the exponent of the power of two that scales its sums: the largest of all batches
    largest: list[Tensor | None] = [None, None]
    total = len(loader) if isinstance(loader, Sized) else None
    with evaluating(models), bar(total, "batch", progress) as done:
        for batch in loader:
            x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            done(1)
            if isinstance(x, np.ndarray) or hasattr(x, "to_numpy"):
                x = tensor_of(OP, "loader", numbers_of(OP, "loader", x))
                x = x.to(torch.get_default_dtype()) if x.is_floating_point() else x
            if not isinstance(x, Tensor):
                kind = type(batch).__name__ if x is batch else f"{type(batch).__name__} of {type(x).__name__}"
                rule = "of tensors or arrays, or tuples and lists that start with one"
                raise TypeError(f"{OP}: loader must be {rule}, got {kind}")
            if not x.dim() or x.layout is not torch.strided:
                raise ValueError(f"{OP}: loader must be of dense tensors of samples, got shape {tuple(x.shape)}")
            if len(x) < 4:
                continue
            parts = [_grams(model, names, x, gram) for model, names in zip(models, chosen, strict=True)]
            for argument, wanted, part in zip(("layers1", "layers2"), (layers1, layers2), parts, strict=True):
                without = [name for name in wanted or () if name not in part]
                if without:
                    raise ValueError(
                        f"{OP}: {argument} must run and return tensors of floats, got {without[0]!r}, which does not"
                    )
            if layers is None:
                layers = [tuple(part) for part in parts]
            elif layers != [tuple(part) for part in parts]:
                raise ValueError(f"{OP}: the same layers must run on every batch, got others")
            over = len(x) * (len(x) - 3)
            stacks = [torch.stack([gram for gram, _ in part.values()]) for part in parts]
            for m, part in enumerate(parts):
                exponents = torch.stack([exponent for _, exponent in part.values()])
                before = largest[m]
                most = exponents if before is None else torch.maximum(before, exponents)
                stacks[m] = times_two_to(stacks[m], (exponents - most).unsqueeze(1))
                if before is not None:
                    smaller = (before - most).unsqueeze(1)
                    cross = times_two_to(cross, smaller if m == 0 else smaller.mT)
                    own[m] = times_two_to(own[m], 2 * smaller.squeeze(1))
                largest[m] = most
            first, second = stacks
            cross = cross + first @ second.mT / over
            own = [total + stack.square().sum(1) / over for total, stack in zip(own, stacks, strict=True)]
    if layers is None:
        raise ValueError(f"{OP}: loader must have a batch of at least 4 samples, got none")
    cka = ratio(cross, own[0].unsqueeze(1), own[1])
    return RepresentationComparison(cka, *layers)


def _names(argument: str, model: nn.Module, names: Sequence[str] | None) -> list[str]:
    every = dict(model.named_modules())
    if names is None:
        return [name for name, module in every.items() if next(module.children(), None) is None]
    if isinstance(names, (str, Tensor)) or not isinstance(names, Iterable):
        raise TypeError(f"{OP}: {argument} must be a list of names of submodules, got {check.shown(names)}")
    names = list(names)
    for name in names:
        if name not in every:
            raise ValueError(f"{OP}: {argument} must be names of submodules, got {check.shown(name)}")
        if names.count(name) > 1:
            raise ValueError(f"{OP}: {argument} must name every submodule once, got {name!r} again")
    if not names:
        raise ValueError(f"{OP}: {argument} must not be empty")
    return names


def _gram(spec: KernelSpec) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a function from outputs (n, ...) to their U-centred Gram matrix and an exponent e, both on the CPU.

    The matrix is (n * n,) float64, in units of 2**e.
    """

    def gram(output: Tensor) -> tuple[Tensor, Tensor]:
        rows = output.reshape(len(output), -1)
        v = variable(OP, "x", rows, spec)
        centred = CentredGram(v, True)
        matrix = centred.above_rounding(torch.cat([centred.block(start) for start in centred.starts]))
        exponent = torch.zeros((), dtype=torch.int64, device="cpu") if v.exponent is None else v.exponent.cpu()
        return matrix.flatten().cpu(), exponent

    return gram


def _grams(
    model: nn.Module, names: Sequence[str], x: Tensor, gram: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Return the Gram matrices of a model's layers on a batch, in the order in which the layers ran."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, output: object) -> None:
            output = next((o for o in output if isinstance(o, Tensor)), None) if isinstance(output, tuple) else output
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            if output.is_meta:
                raise ValueError(f"{OP}: layer {name} must have values, got a meta tensor")
            if not output.dim() or len(output) != len(x):
                raise ValueError(
                    f"{OP}: layer {name!r} must have the {len(x)} samples of a batch in its first dim, got "
                    f"{tuple(output.shape)}; inputs are batches, one tensor is [x]"
                )
            runs, key = 1, name
            while key in found:
                runs += 1
                key = f"{name}:{runs}"
            found[key] = gram(output)

        return keep

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_hook(hook(name)) for name in names]
    try:
        device = next((t.device for t in (*model.parameters(), *model.buffers())), x.device)
        model(x.to(device))
    finally:
        for handle in hooks:
            handle.remove()
    if not found:
        raise ValueError(f"{OP}: some layer must return a tensor of floats, got none")
    return found


@contextlib.contextmanager
def evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Run a block in eval mode, then restore the mode of every module."""
    modes = [model.training for model in models]
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        # by `train` first: a module may do more there than set the flag, for example merge weights
        for model, training in zip(models, modes, strict=True):
            model.train(training)
        for module, training in before:
            module.training = training
