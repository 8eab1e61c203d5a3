"""HSIC as a loss, and training by the HSIC bottleneck."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import TypedDict

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..hsic.estimators import ESTIMATORS, rows_needed
from ..hsic.inputs import result_dtype, together, variable
from ..hsic.kernels import KERNELS, Bandwidth, KernelSpec, Variable
from ..hsic.regularised import regularised
from ..ops import hsic


class _Options(TypedDict):
    estimator: str
    normalize: bool
    kernel: str
    kernel_y: str | None
    degree: int
    gamma: float | None
    coef0: float


class HSICLoss(nn.Module):
    """HSIC of two batches as a loss: minimise it to make them independent, maximise it to make them dependent.

    Args:
        estimator: "biased", "biased_n2" or "unbiased" (its mean does not depend on the batch size).
        normalize: divide by sqrt(HSIC(x, x) HSIC(y, y)), which gives CKA: scaling x or y does not lower the loss.
        kernel, bandwidth, kernel_y, bandwidth_y, degree, gamma, coef0: as for `pyflow.ops.hsic`; a bandwidth may be
            an `nn.Parameter`, which is registered with the module.

    Notes:
        forward(x, y): flattens the dims after the first, treats (n,) as one column, and returns a 0-d loss.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 3)
        >>> loss = HSICLoss(normalize=True)
        >>> loss(x, x[:, :1]).item() > loss(x, torch.randn(64, 1)).item()
        True
    """

    def __init__(
        self,
        *,
        estimator: str = "biased",
        normalize: bool = False,
        kernel: str = "rbf",
        bandwidth: Bandwidth = "median",
        kernel_y: str | None = None,
        bandwidth_y: Bandwidth | None = None,
        degree: int = 3,
        gamma: float | None = None,
        coef0: float = 1.0,
    ) -> None:
        super().__init__()
        check.choice("HSICLoss", "estimator", estimator, ESTIMATORS)
        check.choice("HSICLoss", "kernel", kernel, KERNELS)
        check.choice("HSICLoss", "kernel_y", kernel if kernel_y is None else kernel_y, KERNELS)
        # plain attributes, so that a Parameter is registered
        self.bandwidth, self.bandwidth_y = bandwidth, bandwidth_y
        self.options: _Options = {
            "estimator": estimator, "normalize": normalize, "kernel": kernel, "kernel_y": kernel_y, "degree": degree,
            "gamma": gamma, "coef0": coef0,
        }  # fmt: skip

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return hsic(
            _rows("HSICLoss", "x", x),
            _rows("HSICLoss", "y", y),
            bandwidth=self.bandwidth,
            bandwidth_y=self.bandwidth_y,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value is not None)


class HSICBottleneck(nn.Module):
    """Train every layer with its own objective, without gradients between layers.

    The input of layer i is detached; the layer minimises nHSIC(z_i, x) - beta nHSIC(z_i, y), which removes information
    about the input and keeps information about the target. An optional head is trained on the last layer's output
    with its own loss.

    Args:
        layers: modules that run one after the other; each is trained separately.
        head: applied to the detached output of the last layer; None: `forward` returns that output.
        beta: weight of the dependence on the target.
        sigma: kernel width: exp(-|a - b|^2 / (2 sigma^2 d)) for d features.
        epsilon: as for `pyflow.ops.nhsic`.
        optimizer: called with the parameters of one layer. None: Adam with learning rate 1e-3.
        criterion: loss of the head. None: cross-entropy.

    Notes:
        `update(x, y)` takes one optimiser step for every layer and returns the losses. Class labels, (n,) integers,
        use the equality kernel, other targets the Gaussian kernel. With cross-entropy and a head that ends in
        `nn.Linear`, a label without an output is refused before any step; other errors of the head or its loss come
        after the layers have taken their steps. The optimisers are not part of state_dict, and keep the dtype of the
        parameters at the first update.

    Source:
        Ma, Lewis and Kleijn 2019, The HSIC Bottleneck: Deep Learning without Back-Propagation, arXiv:1908.01580.

    Example:
        >>> layers = [nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU())]
        >>> model = HSICBottleneck(layers, nn.Linear(8, 3))
        >>> model.update(torch.randn(16, 4), torch.arange(16) % 3).shape
        torch.Size([3])
    """

    layers: nn.ModuleList
    head: nn.Module | None

    def __init__(
        self,
        layers: Iterable[nn.Module],
        head: nn.Module | None = None,
        *,
        beta: float = 100.0,
        sigma: float = 5.0,
        epsilon: float = 1e-5,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if isinstance(layers, nn.Module) and not isinstance(layers, (nn.Sequential, nn.ModuleList)):
            raise TypeError(f"{name}: layers must be a list of modules, got {type(layers).__name__}")
        if optimizer is not None:
            check.function(name, "optimizer", optimizer)
        if criterion is not None:
            check.function(name, "criterion", criterion)
        self.layers, self.head = nn.ModuleList(layers), head
        if not len(self.layers):
            raise ValueError(f"{name}: layers must not be empty")
        self.beta = check.positive(name, "beta", beta)
        self.sigma = check.positive(name, "sigma", sigma)
        self.epsilon = check.positive(name, "epsilon", epsilon)
        self.criterion = criterion or nn.functional.cross_entropy
        make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
        parameters = [[p for p in module.parameters() if p.requires_grad] for module in self._trained()]
        # a layer without parameters has no optimiser
        self._optimizers = [make(group) if group else None for group in parameters]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if self.head is None else self.head(x)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step on a batch x (n, ...), y (n,) or (n, ...); return the losses: layers first, then the head."""
        self._check_optimizers()
        self._check_labels(y)
        losses, z, aim = [], x, self._aim(x, y)
        for layer, optimizer in zip(self.layers, self._optimizers, strict=False):
            z = layer(z.detach())
            losses.append(self._step(optimizer, functools.partial(self._towards, aim, z)))
        if self.head is not None:
            read = self.head(z.detach())
            labels = y.long() if _are_labels(y) else y
            losses.append(self._step(self._optimizers[-1], lambda: self.criterion(read, labels)))
        return torch.stack(losses)

    def _trained(self) -> list[nn.Module]:
        return [*self.layers, *([self.head] if self.head is not None else ())]

    def _check_optimizers(self) -> None:
        for module, optimizer in zip(self._trained(), self._optimizers, strict=True):
            own = {id(p) for p in module.parameters()}
            if optimizer and not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                raise RuntimeError(
                    f"{type(self).__name__}: parameters must be those its optimisers were made for, got others; "
                    "to_empty and load_state_dict(assign=True) replace them, so build it from layers that are ready"
                )

    def _check_labels(self, y: Tensor) -> None:
        """Refuse labels that the head has no output for, before a layer takes a step."""
        last = self.head[-1] if isinstance(self.head, nn.Sequential) and len(self.head) else self.head
        if not isinstance(last, nn.Linear) or self.criterion is not nn.functional.cross_entropy:
            return
        if _are_labels(y) and check.values_are_checked(y):
            # cross_entropy ignores the label -100
            wrong = y[((y < 0) & (y != -100)) | (y >= last.out_features)]
            if wrong.numel():
                most = last.out_features - 1
                raise ValueError(f"{type(self).__name__}: y must hold labels from 0 to {most}, got {wrong[0].item()}")

    def objective(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return nHSIC(z, x) - beta nHSIC(z, y)."""
        return self._towards(self._aim(x, y), z)

    def _aim(self, x: Tensor, y: Tensor) -> Tensor:
        """Return Rx - beta Ry; nHSIC is linear in R, so all layers share it."""
        op = type(self).__name__
        of_y = variable(op, "y", y, KernelSpec("delta")) if _are_labels(y) else self._variable("y", y)
        pair = [self._variable("x", x), of_y]
        pair = together(op, pair)
        rows_needed(op, len(pair[0].z), "biased")
        with torch.no_grad():
            given, wanted = (regularised(op, name, v, self.epsilon) for name, v in zip("xy", pair, strict=True))
            return given - self.beta * wanted

    def _towards(self, aim: Tensor, z: Tensor) -> Tensor:
        v = self._variable("z", z)
        return (regularised(type(self).__name__, "z", v, self.epsilon) * aim).sum().to(result_dtype(z))

    def _variable(self, name: str, x: Tensor) -> Variable:
        rows = _rows(type(self).__name__, name, x)
        spec = KernelSpec("rbf", self.sigma * math.sqrt(rows.shape[-1]))
        return variable(type(self).__name__, name, rows, spec)

    def _step(self, optimizer: torch.optim.Optimizer | None, loss_of: Callable[[], Tensor]) -> Tensor:
        with torch.set_grad_enabled(optimizer is not None):
            loss = loss_of()
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.detach()


def _are_labels(y: object) -> bool:
    return isinstance(y, Tensor) and y.dim() == 1 and not y.is_floating_point()


def _rows(op: str, name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} must be (n,) or (n, ...), got a scalar")
    return x.unsqueeze(1) if x.dim() == 1 else x.flatten(1)
