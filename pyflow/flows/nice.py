"""NICE: additive couplings that update two fixed halves in turn."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..nn import Scale
from ..nn._split import divide, join
from ..ops import additive_coupling, flow_log_prob
from ..program import Additive
from ._run import Write, Writer
from ._watch import Path
from .base import Flow
from .lower import RULES, Look, NoInstruction, children, register
from .lower.own import own_net
from .nets import mlp, widths

_SPLITS = ("half", "interleave")
# standard deviation of each prior at scale 1
_SPREAD = {"gaussian": 1.0, "logistic": math.pi / math.sqrt(3)}


class NICE(Flow):
    """Non-linear independent components estimation.

    b += m_1(a), a += m_2(b), b += m_3(a), ...; z = [a, b] * exp(log_scale); log p(x) = log prior(z) + sum log_scale.

    Args:
        dim: size of x, (B, dim), at least 2.
        couplings: number of additive couplings; they update the two halves in turn.
        hidden: hidden widths of each coupling's ReLU network; its last layer is linear.
        prior: "logistic" or "gaussian".
        split: elements of x that form a, "interleave" (even positions) or "half" (the first half); for odd dim a has
            one element more than b.
        data_init: initialise log_scale so that z of the first training batch has the prior's standard deviation;
            else log_scale starts at 0.
        context_features: size of a context (B, context_features) that the density is conditioned on, 0 for none.

    Returns:
        `log_prob(x, context=None)` in nats, (B,); `forward(x, context=None) -> (z, logdet)` with z = [a, b];
        `inverse(z, context=None) -> (x, logdet)`; `sample(n, context=None, temperature=1.0, seed=None)` and
        `sample_and_log_prob`, with gradients `rsample` and `rsample_and_log_prob`.

    Raises:
        ValueError: dim < 2, couplings < 1, an unknown prior or split, or x has another shape; the context is missing,
            has another width, or is given to a flow without.

    Notes:
        The usual description permutes x between couplings. Updating two fixed halves in turn gives the same family of
        functions: permuting the rows and columns of the weights has the effect of a permutation within a half. No
        data is moved or concatenated, and log_prob never stores z. Where it can, the flow runs in one call, see
        `pyflow.flows.fuse`.

    Source:
        Dinh et al. 2014, NICE, arXiv:1410.8516, sections 3 and 5.1.

    Example:
        >>> flow = NICE(4, hidden=(16,))
        >>> x = torch.rand(8, 4)
        >>> flow.log_prob(x).shape, flow.sample(2, temperature=0.7, seed=0).shape
        (torch.Size([8]), torch.Size([2, 4]))
    """

    def __init__(
        self,
        dim: int,
        *,
        couplings: int = 4,
        hidden: tuple[int, ...] = (1000,) * 5,
        prior: str = "logistic",
        split: str = "interleave",
        data_init: bool = False,
        context_features: int = 0,
    ) -> None:
        dim = check.at_least("NICE", "dim", dim, 2)
        couplings = check.at_least("NICE", "couplings", couplings, 1)
        super().__init__((dim,), prior, context_features)
        check.choice("NICE", "split", split, _SPLITS)
        self.dim, self.split = dim, split
        hidden = widths("NICE", hidden)
        sizes = dim - dim // 2, dim // 2
        self.nets = nn.ModuleList(
            mlp(sizes[i % 2], hidden, sizes[1 - i % 2], self.context_features) for i in range(couplings)
        )
        self.scale = Scale(dim, data_init=data_init, std=_SPREAD[prior])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if (result := self._program(x, context)) is not None:
            return result
        return self.scale(torch.cat(self._couple(x, context), 1))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if (result := self._program(z, context, inverse=True)) is not None:
            return result
        h, logdet = self.scale.inverse(z)
        self._check_dtype("z", z)
        given = self._given(context, z)
        halves = list(h.split(self._sizes(), 1))
        for i, net in reversed(list(enumerate(self.nets))):
            kept, changed = i % 2, 1 - i % 2
            halves[changed] = additive_coupling(halves[changed], net(halves[kept], *given), inverse=True)
        return join(halves[0], halves[1], self.split, False), logdet

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self._forward_pre_hooks or self._forward_hooks:
            # hooks run only when the module is called: fully_shard gathers the parameters in one
            return super().log_prob(x, context)
        if (nats := self._program_log_prob(x, context)) is not None:
            return nats
        halves = self._couple(x, context)
        if self.scale.may_start:
            self.scale.start(torch.cat(halves, 1))
        log_scales = self.scale.log_scale.split(self._sizes())
        a, b = (flow_log_prob(h, s, prior=self.prior) for h, s in zip(halves, log_scales, strict=True))
        return a + b

    def _couple(self, x: Tensor, context: Tensor | None) -> list[Tensor]:
        check.float_tensor("NICE", "x", x)
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(f"NICE: x must have the shape (B, {self.dim}), got {tuple(x.shape)}")
        self._check_dtype("x", x)
        given = self._given(context, x)
        halves = list(divide("NICE", x, self.split, False, None)[:2])
        for i, net in enumerate(self.nets):
            kept, changed = i % 2, 1 - i % 2
            halves[changed] = additive_coupling(halves[changed], net(halves[kept], *given))
        return halves

    def _sizes(self) -> tuple[int, int]:
        return self.dim - self.dim // 2, self.dim // 2


@register(RULES, NICE)
def _nice(look: Look, path: Path, flow: NICE) -> Write:
    split = look.watch.option(path, flow, lambda m: m.split)
    nets = [own_net(look, *net) for net in children(look, (*path, "nets"), flow.nets)]
    if type(flow.scale) is not Scale:
        raise NoInstruction((*path, "scale"), flow.scale, "it is no Scale")
    scale = look.layer((*path, "scale"), flow.scale)
    steps = list(enumerate(nets))

    def write(writer: Writer) -> None:
        parts = writer.split("half" if writer.inverse else split)
        if writer.inverse:
            scale(writer)
        for i, net in reversed(steps) if writer.inverse else steps:
            writer.net(parts[i % 2], net)
            writer.add(Additive(parts[1 - i % 2], writer.inverse))
        writer.join(*parts, split if writer.inverse else "half")
        if not writer.inverse:
            scale(writer)

    return write
