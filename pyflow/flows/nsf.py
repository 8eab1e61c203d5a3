"""NSF: neural spline flows with couplings or autoregressive layers."""

from __future__ import annotations

from typing import cast

from torch import nn

from .. import _checks as check
from ..nn import ActNorm, SplineCoupling
from ..nn.autoregressive import identity_slopes
from .autoregressive import masked_layers, with_act_norms
from .lower import STACKS, register
from .nets import mlp, start_at_zero, widths
from .vectors import VectorFlow, stack_of


class NSF(VectorFlow):
    """Neural spline flow.

    Layers of monotone rational-quadratic splines whose bins a network computes: from the other part of x
    (couplings), or from the features before in an order (autoregressive).

    Args:
        dim: size of x.
        layers: number of layers, each after an ActNorm.
        hidden: hidden widths of each network (ReLU).
        bins: number of bins of a spline, at least 2.
        bound: > 0; bins cover [-bound, bound], outside a spline is the identity.
        context_features: size of a context that the density is conditioned on, 0 for none.
        autoregressive: masked autoregressive layers instead of couplings; always so for dim 1.
        reversible: recompute activations in backward (`pyflow.nn.ReversibleSequential`).

    Returns:
        `log_prob(x, context=None)` in nats, for x (..., dim) and context (..., context_features) whose leading dims
        broadcast; `forward(x, context=None) -> (z, logdet)`; `inverse(z, context=None) -> (x, logdet)`;
        `sample(n, context=None, temperature=1.0, seed=None)` and `sample_and_log_prob`, with gradients `rsample` and
        `rsample_and_log_prob`.

    Raises:
        ValueError: dim, layers or a width < 1, a number out of range, or x has another size; the context is missing,
            has another width, or is given to a flow without.

    Notes:
        Couplings change one half and the other in turn, where a half is every other feature in every second pair of
        layers, so that features of one half meet too; the paper's code shuffles features between layers, zuko (whose
        NSF is autoregressive unless passes=2) reverses their order, and `autoregressive` does likewise, by the masks
        alone. nflows' and zuko's layers have no normalisation; here an ActNorm, initialised by the first training
        batch, comes before every layer: it brings the data into the bounds, and the density of a sample does not
        depend on the rest of its batch. Every layer starts as the identity. A coupling samples as fast as it
        evaluates, an autoregressive layer in half of the work but in dim dependent steps.

    Source:
        Durkan et al. 2019, Neural spline flows, arXiv:1906.04032.

    Example:
        >>> import torch
        >>> flow = NSF(4, layers=2, hidden=(16,))
        >>> flow.log_prob(torch.randn(8, 4)).shape, flow.sample(3, seed=0).shape
        (torch.Size([8]), torch.Size([3, 4]))
        >>> flow = NSF(1, context_features=5)  # the density of a number given five others
        >>> flow.log_prob(torch.randn(8, 1), torch.randn(8, 5)).shape
        torch.Size([8])
    """

    def __init__(
        self,
        dim: int,
        *,
        layers: int = 8,
        hidden: tuple[int, ...] = (64, 64),
        bins: int = 8,
        bound: float = 3.0,
        context_features: int = 0,
        autoregressive: bool = False,
        reversible: bool = False,
    ) -> None:
        dim, layers = check.at_least("NSF", "dim", dim, 1), check.at_least("NSF", "layers", layers, 1)
        bins, bound = check.at_least("NSF", "bins", bins, 2), check.positive("NSF", "bound", bound)
        context = check.at_least("NSF", "context_features", context_features, 0)
        hidden, ordered = widths("NSF", hidden), check.flag("NSF", "autoregressive", autoregressive)
        if ordered or dim == 1:
            made = masked_layers(dim, layers, hidden, context, "rq_spline", bins, bound)
            parts = with_act_norms(dim, made)
        else:
            parts = _couplings(dim, layers, hidden, context, bins, bound)
        super().__init__(dim, parts, context, reversible)


def _couplings(
    dim: int, layers: int, hidden: tuple[int, ...], context: int, bins: int, bound: float
) -> list[nn.Module]:  # fmt: skip
    parts: list[nn.Module] = []
    for i in range(layers):
        sizes = dim - dim // 2, dim // 2
        net = mlp(sizes[i % 2], hidden, (3 * bins - 1) * sizes[1 - i % 2], context)
        last = start_at_zero(cast("nn.Linear", net[-1]))
        identity_slopes(last.bias, bins)
        split = "interleave" if i % 4 > 1 else "half"
        parts += [ActNorm(dim), SplineCoupling(net, bins=bins, bound=bound, split=split, swap=i % 2 == 1)]
    return parts


register(STACKS, NSF)(stack_of)
