"""A whole flow in one call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .._torch import has_hooks
from ..nn import ReversibleSequential
from ._fuser import Fuser, Fusing
from ._peers import stand_of
from ._structure import explain
from ._watch import Path
from .base import Flow
from .lower import STACKS, Layers, Look, register


def fuse(flow: nn.Module | Sequence[nn.Module], *, frozen: bool = False) -> Fused:
    """Run the layers of a flow by `pyflow.ops.flow_program`: one call for many layers, forward, inverse and training.

    Args:
        flow: a flow of `pyflow.flows`, `pyflow.nn.ReversibleSequential`, one invertible layer, or invertible layers in
            an nn.Sequential, an nn.ModuleList or a list; or a flow or layers of nflows, normflows or glasflow, or a
            flow of zuko.
        frozen: a snapshot for inference: a copy of the flow in eval mode without gradients of parameters. Later changes
            of the flow are not seen, the copy must not be changed, and a call reads neither modules nor parameters.

    Returns:
        A module that holds the flow as `flow` (its parameters and state_dict are those of the flow, with this prefix)
        and has its methods, with its arguments and results: forward, inverse, log_prob, sample, ... `explain()` returns
        a line for each run of layers that are fused and for each layer that is left, with the reason.

    Raises:
        TypeError: flow is no module with an inverse, nor a list of them.

    Notes:
        NICE, RealNVP of vectors, NSF, MAF and IAF do this by themselves: they need `fuse` for `frozen` and `explain`
        only.
        Layers with instructions: ActNorm, Scale, Invertible1x1Conv (of vectors), AdditiveCoupling, AffineCoupling and
        SplineCoupling with split "half" or "interleave", MaskedAutoregressive, and stacks of them. Their networks:
        nn.Linear, ReLU, LeakyReLU, Tanh, SiLU, GELU, ELU, Sigmoid, LayerNorm, BatchNorm1d in eval mode, in an
        nn.Sequential; nn.Identity is nothing, nor is nn.Dropout in eval mode. Other layers run as they are between the
        fused ones, as do subclasses of these, and modules with hooks, parametrizations, pruned or normalised weights,
        or a forward of their own; a stack that recomputes activations is fused whole or not at all. NICE is one layer
        here.

        Of nflows (0.14, and its copy in glasflow): couplings (affine, additive, rational-quadratic), masked
        autoregressive layers, linear layers without cache, permutations, PointwiseAffineTransform, ActNorm, BatchNorm
        in eval mode, stacks and inverses; ResidualNet and MADE, sbi's ContextSplineMap and dingo's DenseResidualNet;
        StandardNormal, DiagonalNormal, ConditionalDiagonalNormal and glasflow's MultivariateUniform. Of normflows
        (1.7): AffineCouplingBlock by channels, MaskedAffineFlow, AffineConstFlow, ActNorm, Permute, InvertibleAffine,
        LULinearPermute, MaskedAffineAutoregressive, the rational-quadratic splines, PeriodicWrap, PeriodicShift,
        Reverse and Composite; MLP, ResidualNet and MADE; DiagGaussian, Uniform and UniformGaussian. Of zuko (1.6):
        couplings, masked autoregressive and elementwise layers (additive, affine, rational-quadratic or NCSF's
        circular), permutations, rotations, LULinearTransform, inverses; MLP, MaskedMLP; DiagNormal of mean 0 and scale
        1, BoxUniform; the fused flow returns zuko's distributions. Embedding networks and other base distributions run
        before and behind the program. Buffers of permutations, features, bounds and shifts, and the order that masks
        give an autoregressive inverse, are read once, and again when the buffers are replaced or written to in place,
        but not through `.data`; all other buffers are read at every call.

        Layers run as they are where a program has no kernel: on a GPU, but with `pyflow.backend("triton")`; with the
        backends "reference" and "cuda"; under torch.func transforms, forward-mode AD and torch.export; for x that is
        not a dense float32 or float64 matrix or not of the parameters' dtype and device; with a mask; with global
        module hooks; while the first batch of a training has to initialise a layer. The result is the same but for
        rounding, which may move a row over the end of a uniform base.

        A fused run computes in its own dtype under autocast. It keeps x for the backward, and results of wide
        layers up to 128 MB (float32). Modules are looked at once; every call compares what was found with what is there
        (30 us for eight couplings), and reads the parameters anew: hooks of parameters, optimisers, EMA, `.data`,
        functional_call and replaced submodules work. Under torch.compile hooks that are added after the
        compilation are not seen, as for any module, nor is what is written in place to the buffers that are read once.

    Source:
        Layer by layer: Dinh et al. 2014, arXiv:1410.8516; Dinh et al. 2016, arXiv:1605.08803.

    Example:
        >>> import torch
        >>> from pyflow.nn import ActNorm, AffineCoupling
        >>> flow = fuse([ActNorm(2), AffineCoupling(nn.Linear(1, 2))])
        >>> y, logdet = flow(torch.randn(8, 2))
        >>> print(flow.explain())
        flow.layers.0 to flow.layers.1: fused, 1 ActNorm, 1 AffineCoupling as 1 Scale, 1 Net, 1 Affine
    """
    if isinstance(flow, (list, tuple)) or type(flow) in (nn.Sequential, nn.ModuleList):
        flow = ReversibleSequential(*_flat(flow), recompute=False)
    kind = FusedLayers if stand_of(flow) is None else FusedFlow
    if not isinstance(flow, nn.Module) or (kind is FusedLayers and not hasattr(flow, "inverse")):
        raise TypeError(f"fuse: flow must be a module with an inverse or a list of them, got {type(flow).__name__}")
    if not frozen:
        return kind(flow)
    flow = copy.deepcopy(flow).eval().requires_grad_(False)
    fused = kind(flow)
    for module in (fused, flow):
        if isinstance(module, Fusing):
            module._fuser = Fuser(module, frozen=True)
    return fused


class Fused(Fusing):
    """The module that `fuse` returns: it holds the flow, and has what it does not have itself."""

    flow: Any

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def explain(self) -> str:
        """Return a line for each run of layers that are fused, and for each layer that is left, with the reason."""
        return explain(self.flow if isinstance(self.flow, Flow) else self)

    def _program(
        self, x: Any, given: tuple[Any, ...], inverse: bool, prior: str | None = None, repeats: int | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Return what the layers do with x and what is given after it, see `Fuser.run`; None if they have to run."""
        # a flow checks its arguments, and runs its own programs
        if isinstance(self.flow, Flow) or not isinstance(x, Tensor) or x.is_nested or x.dim() != 2:
            return None
        return self._fuser.run(self, x, given, int(x.shape[1]), inverse, prior, repeats)

    def __getattr__(self, name: str) -> Any:
        flow = self.__dict__.get("_modules", {}).get("flow")
        if flow is None or name == "flow" or name.startswith("_"):
            return super().__getattr__(name)
        return getattr(flow, name)


class FusedLayers(Fused):
    """Layers, or a flow of pyflow."""

    def forward(self, x: Tensor, *context: Any, **named: Any) -> tuple[Tensor, Tensor]:
        given = self._given(context, named)
        result = None if given is None else self._program(x, given, False)
        return self.flow(x, *context, **named) if result is None else result

    def inverse(self, y: Tensor, *context: Any, **named: Any) -> tuple[Tensor, Tensor]:
        given = self._given(context, named)
        result = None if given is None else self._program(y, given, True)
        return self.flow.inverse(y, *context, **named) if result is None else result

    def _given(self, context: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...] | None:
        """Return the arguments of the layers after x, None if there are others; other packages name the context."""
        own = type(self.flow).__module__.startswith("pyflow.")
        if named and (own or context or [*named] != ["context"]):
            return None
        given = (*context, *named.values())
        return () if not own and given == (None,) else given


class FusedFlow(Fused):
    """A flow of another package: its own methods, in which its layers are one."""

    def forward(self, *args: Any, **named: Any) -> Any:
        # hooks of the flow run when it is called
        alone = has_hooks(self.flow) or "forward" in vars(self.flow)
        return self.flow(*args, **named) if alone else self._stand().forward(*args, **named)

    def _stand(self) -> Any:
        stand = stand_of(self.flow)
        assert stand is not None
        return stand(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "flow" or "flow" not in self.__dict__.get("_modules", {}):
            return nn.Module.__getattr__(self, name)
        return getattr(self._stand(), name)


def _flat(layers: Any) -> list[Any]:
    return [each for layer in layers for each in (_flat(layer) if type(layer) is nn.Sequential else [layer])]


@register(STACKS, FusedLayers, FusedFlow)
def _fused(look: Look, path: Path, fused: Fused) -> Layers:
    yield (*path, "flow"), fused.flow
