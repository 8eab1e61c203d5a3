"""RealNVP: affine couplings, for vectors and for images over several scales."""

from __future__ import annotations

from typing import cast

from torch import nn

from .. import _checks as check
from ..nn import ActNorm, AffineCoupling, ReversibleSequential
from ._watch import Path
from .lower import STACKS, Layers, Look, NoInstruction, children, register
from .multiscale import MultiScale, Squeeze, check_images
from .nets import conv_net, mlp, start_at_zero, widths


class RealNVP(MultiScale):
    """Real-valued non-volume-preserving flow.

    Affine couplings, each after an ActNorm, that update the two parts of x in turn. For images every level has three
    couplings on a checkerboard, squeezes 2x2 pixels into channels, has three couplings on channels and sends half of
    the channels to z; the last level has four couplings on a checkerboard.

    Args:
        shape: shape of one x: an int or (D,) for vectors; (C, H, W) for images, H and W divisible by
            2**(levels - 1).
        couplings: number of couplings (vectors only).
        hidden: hidden widths of the ReLU networks for vectors, default (64, 64); channels inside the convolutional
            networks for images, default 64.
        levels: number of scales (images only).
        scale_map, clamp: map of the log-scale, as in `pyflow.ops.affine_coupling`.
        prior: "gaussian" or "logistic".
        reversible: recompute activations in backward (`pyflow.nn.ReversibleSequential`).
        context_features: size of a context (B, context_features) that the density is conditioned on, 0 for none; its
            entries are further channels of what the networks see.

    Returns:
        `log_prob(x, context=None)` in nats, (B,); `forward(x, context=None) -> (z, logdet)` with z (B, elements of x);
        `inverse(z, context=None) -> (x, logdet)`; `sample(n, context=None, temperature=1.0, seed=None)` and
        `sample_and_log_prob`, with gradients `rsample` and `rsample_and_log_prob`.

    Raises:
        ValueError: shape is neither of the two, couplings or levels < 1, or x has another shape; the context is
            missing, has another width, or is given to a flow without.

    Notes:
        The paper uses batch normalisation. ActNorm, initialised by the first training batch, replaces it here, so
        that the density of a sample does not depend on the rest of the batch. Every network's last layer starts at 0.
        Where it can, a flow of vectors runs in one call, see `pyflow.flows.fuse`.

    Source:
        Dinh et al. 2016, RealNVP, arXiv:1605.08803, sections 3 and 4.1.

    Example:
        >>> import torch
        >>> flow = RealNVP(2, couplings=4)
        >>> flow.log_prob(torch.randn(8, 2)).shape, flow.sample(3, seed=0).shape
        (torch.Size([8]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        *,
        couplings: int = 8,
        hidden: int | tuple[int, ...] | None = None,
        levels: int = 2,
        scale_map: str = "tanh",
        clamp: float = 2.0,
        prior: str = "gaussian",
        reversible: bool = False,
        context_features: int = 0,
    ) -> None:
        seen = check.at_least("RealNVP", "context_features", context_features, 0)
        event = check.event_shape("RealNVP", shape)
        couplings = check.at_least("RealNVP", "couplings", couplings, 1)
        levels = check.at_least("RealNVP", "levels", levels, 1)
        reversible = check.flag("RealNVP", "reversible", reversible)
        options = {"scale_map": scale_map, "clamp": clamp}
        if len(event) == 1:
            if event[0] < 2:
                raise ValueError(f"RealNVP: a vector must have at least 2 elements, got {event[0]}")
            layer_widths = widths("RealNVP", (64, 64) if hidden is None else hidden)
            stages = [_vector_stage(event[0], couplings, layer_widths, seen, options)]
        else:
            check_images("RealNVP", event, 2 ** (levels - 1))
            width = check.at_least("RealNVP", "hidden", 64 if hidden is None else hidden, 1)
            stages = _image_stages(event[0], levels, width, seen, options)
        reversible_stages = [ReversibleSequential(*layers, recompute=reversible) for layers in stages]
        super().__init__(event, reversible_stages, (), prior, seen)


def _vector_stage(dim: int, couplings: int, hidden: tuple[int, ...], context: int, options: dict) -> list[nn.Module]:
    layers = []
    for i in range(couplings):
        sizes = dim - dim // 2, dim // 2
        net = mlp(sizes[i % 2], hidden, 2 * sizes[1 - i % 2], context)
        start_at_zero(cast("nn.Linear", net[-1]))
        layers += [ActNorm(dim), AffineCoupling(net, swap=i % 2 == 1, **options)]
    return layers


def _image_stages(channels: int, levels: int, hidden: int, context: int, options: dict) -> list[list[nn.Module]]:
    def couplings(n: int, split: str, seen: int) -> list[nn.Module]:
        # the net maps whole images for a checkerboard split, half of the channels for a channel split
        nets = [conv_net(seen, hidden, 2 * seen, context) for _ in range(n)]
        layers = [AffineCoupling(net, split=split, swap=i % 2 == 1, **options) for i, net in enumerate(nets)]
        return [part for layer in layers for part in (ActNorm(seen if split == "checkerboard" else 2 * seen), layer)]

    stages = []
    for _ in range(levels - 1):
        stages.append([*couplings(3, "checkerboard", channels), Squeeze(), *couplings(3, "channel", 2 * channels)])
        channels *= 2
    return [*stages, couplings(4, "checkerboard", channels)]


@register(STACKS, RealNVP)
def _stages(look: Look, path: Path, flow: RealNVP) -> Layers:
    if look.watch.option(path, flow, lambda flow: len(flow.shape)) != 1:
        raise NoInstruction(path, flow, "it is a flow of images")
    return children(look, (*path, "stages"), flow.stages)
