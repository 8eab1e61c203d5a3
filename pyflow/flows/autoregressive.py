"""MAF and IAF: affine autoregressive flows with a fast density, or with fast sampling."""

from __future__ import annotations

from torch import Tensor, nn

from .. import _checks as check
from ..nn import ActNorm, MaskedAutoregressive
from ._run import Write
from ._watch import Path
from .lower import RULES, STACKS, Look, register
from .nets import widths
from .vectors import VectorFlow, stack_of


class MAF(VectorFlow):
    """Masked autoregressive flow: the density takes one pass.

    Layers z_i = x_i exp(s_i) + t_i, where s_i and t_i depend on the features before i and on the context.

    Args:
        dim: size of x.
        layers: number of autoregressive layers, each after an ActNorm.
        hidden: hidden widths of each masked network (ReLU).
        context_features: size of a context that the density is conditioned on, 0 for none.
        reversible: recompute activations in backward (`pyflow.nn.ReversibleSequential`).

    Returns:
        `log_prob(x, context=None)` in nats, for x (..., dim) and context (..., context_features) whose leading dims
        broadcast; `forward(x, context=None) -> (z, logdet)`; `inverse(z, context=None) -> (x, logdet)`;
        `sample(n, context=None, temperature=1.0, seed=None)` and `sample_and_log_prob`, with gradients `rsample` and
        `rsample_and_log_prob`.

    Raises:
        ValueError: dim, layers or a width < 1, or x has another size; the context is missing, has another width, or is
            given to a flow without.

    Notes:
        Sampling evaluates every hidden unit once (`pyflow.nn.MaskedAutoregressive`), about half of the work of a
        density, where other packages make dim passes. On a CPU all layers run in one call, both ways, see
        `pyflow.flows.fuse`. Features are in ascending and descending order in turn, by the
        masks alone (zuko reverses them likewise, nflows by permutations between layers). The paper has batch
        normalisation between layers, nflows leaves it out by default, zuko has none; here an ActNorm, initialised by
        the first training batch, comes before every layer: it standardises the data, and the density of a sample
        does not depend on the rest of its batch. Every layer starts as the identity.

    Source:
        Papamakarios et al. 2017, Masked autoregressive flow, arXiv:1705.07057.

    Example:
        >>> import torch
        >>> flow = MAF(3, layers=2, context_features=2)
        >>> x, context = torch.randn(8, 3), torch.randn(8, 2)
        >>> flow.log_prob(x, context).shape, flow.sample(5, context, seed=0).shape
        (torch.Size([8]), torch.Size([5, 8, 3]))
    """

    def __init__(
        self,
        dim: int,
        *,
        layers: int = 5,
        hidden: tuple[int, ...] = (64, 64),
        context_features: int = 0,
        reversible: bool = False,
    ) -> None:
        dim, made = _made("MAF", dim, layers, hidden, context_features)
        super().__init__(dim, with_act_norms(dim, made), context_features, reversible)


class IAF(VectorFlow):
    """Inverse autoregressive flow: a sample and its density take one pass.

    The inverse of `MAF`: x_i = z_i exp(s_i) + t_i, where s_i and t_i depend on the features of z before i.

    Args:
        dim, layers, hidden, context_features, reversible: as for `MAF`.

    Returns:
        As for `MAF`. For variational inference, `rsample_and_log_prob(n, context)` is one pass with gradients.

    Raises:
        ValueError: as for `MAF`.

    Notes:
        `log_prob` of given x evaluates every hidden unit once, generation by generation: about half of the work of a
        pass, in dim dependent steps; prefer `MAF` to fit data. There is no ActNorm: this flow is trained by its own
        samples, and an ActNorm would set itself to the first x whose density is asked for. Every layer starts as the
        identity, so that the first samples are standard normal.

    Source:
        Kingma et al. 2016, Improved variational inference with inverse autoregressive flow, arXiv:1606.04934.

    Example:
        >>> import torch
        >>> flow = IAF(3, layers=2)
        >>> x, nats = flow.rsample_and_log_prob(16, seed=0)
        >>> loss = (nats + (x - 1).square().sum(-1)).mean()  # fits the density proportional to exp(-|x - 1|^2)
        >>> loss.backward()
        >>> bool(torch.allclose(flow.log_prob(x), nats, atol=1e-5))
        True
    """

    def __init__(
        self,
        dim: int,
        *,
        layers: int = 5,
        hidden: tuple[int, ...] = (64, 64),
        context_features: int = 0,
        reversible: bool = False,
    ) -> None:
        dim, made = _made("IAF", dim, layers, hidden, context_features)
        super().__init__(dim, [_Inverted(layer) for layer in made], context_features, reversible)


class _Inverted(nn.Module):
    """A layer whose directions are exchanged."""

    def __init__(self, layer: MaskedAutoregressive) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.inverse(x, *context)

    def inverse(self, y: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(y, *context)


def masked_layers(
    dim: int, layers: int, hidden: tuple[int, ...], context: int, transform: str, bins: int, bound: float
) -> list[MaskedAutoregressive]:
    """Return layers with the features in ascending and descending order in turn."""
    return [
        MaskedAutoregressive(
            dim, hidden, transform=transform, order=range(dim)[:: -1 if i % 2 else 1], context_features=context,
            bins=bins, bound=bound,
        )
        for i in range(layers)
    ]  # fmt: skip


def with_act_norms(dim: int, layers: list[MaskedAutoregressive]) -> list[nn.Module]:
    """Return the layers with an ActNorm before each."""
    return [part for layer in layers for part in (ActNorm(dim), layer)]


def _made(
    name: str, dim: int, layers: int, hidden: object, context: int
) -> tuple[int, list[MaskedAutoregressive]]:  # fmt: skip
    dim, layers = check.at_least(name, "dim", dim, 1), check.at_least(name, "layers", layers, 1)
    context = check.at_least(name, "context_features", context, 0)
    return dim, masked_layers(dim, layers, widths(name, hidden), context, "affine", 8, 3.0)


register(STACKS, MAF, IAF)(stack_of)


@register(RULES, _Inverted)
def _inverted(look: Look, path: Path, layer: _Inverted) -> Write:
    return look.inverted((*path, "layer"), layer.layer)
