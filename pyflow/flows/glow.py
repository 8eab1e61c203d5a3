"""Glow: multi-scale flow of ActNorm, 1x1 convolutions and affine couplings."""

from __future__ import annotations

from torch import nn

from .. import _checks as check
from ..nn import ActNorm, AffineCoupling, Invertible1x1Conv, ReversibleSequential
from .multiscale import MultiScale, Squeeze, check_images
from .nets import Conditional, conv_net, zero_conv


class Glow(MultiScale):
    """Multi-scale flow with invertible 1x1 convolutions.

    Each level squeezes 2x2 pixels into channels and runs `steps` times (ActNorm, 1x1 convolution, affine coupling).
    Each level but the last then splits off half of the channels: they get a Gaussian prior, and a convolution of the
    other half predicts its mean and scale.

    Args:
        shape: (C, H, W) of one image; H and W divisible by 2**levels.
        steps: steps per level.
        levels: number of scales.
        hidden: channels inside the coupling networks.
        reversible: recompute activations in backward (`pyflow.nn.ReversibleSequential`).
        context_features: size of a context (B, context_features) that the density is conditioned on, 0 for none; its
            entries are further channels of what the networks see, those of the splits too.

    Returns:
        `log_prob(x, context=None)` in nats, (B,); `forward(x, context=None) -> (z, logdet)` with z (B, C * H * W),
        standard normal under the model; `inverse(z, context=None) -> (x, logdet)`;
        `sample(n, context=None, temperature=1.0, seed=None)` and `sample_and_log_prob`, with gradients `rsample` and
        `rsample_and_log_prob`.

    Raises:
        ValueError: shape is not (C, H, W) or not divisible, steps, levels or hidden < 1, or x has another shape; the
            context is missing, has another width, or is given to a flow without.

    Notes:
        The first training batch initialises the ActNorms. The prior of a split is the inverse of an affine coupling,
        so that z is standard normal at every scale. Every network's last convolution is initialised to 0.

    Source:
        Kingma and Dhariwal 2018, Glow, arXiv:1807.03039, section 3.

    Example:
        >>> import torch
        >>> flow = Glow((1, 4, 4), steps=2, levels=2, hidden=8)
        >>> flow.log_prob(torch.rand(3, 1, 4, 4)).shape, flow.sample(2, seed=0).shape
        (torch.Size([3]), torch.Size([2, 1, 4, 4]))
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        steps: int = 8,
        levels: int = 3,
        hidden: int = 128,
        reversible: bool = False,
        context_features: int = 0,
    ) -> None:
        seen = check.at_least("Glow", "context_features", context_features, 0)
        steps, levels = check.at_least("Glow", "steps", steps, 1), check.at_least("Glow", "levels", levels, 1)
        reversible = check.flag("Glow", "reversible", reversible)
        event = check.event_shape("Glow", shape)
        check_images("Glow", event, 2**levels)
        hidden = check.at_least("Glow", "hidden", hidden, 1)
        stages, splits = [], []
        for level in range(levels):
            channels = 4 * event[0] * 2**level
            layers = [layer for _ in range(steps) for layer in _step(channels, hidden, seen)]
            stages.append(ReversibleSequential(Squeeze(), *layers, recompute=reversible))
            if level < levels - 1:
                last = zero_conv(channels // 2 + seen, channels)
                splits.append(AffineCoupling(Conditional(last) if seen else last, split="channel"))
        super().__init__(event, stages, splits, "gaussian", seen)


def _step(channels: int, hidden: int, context: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    net = conv_net(channels // 2, hidden, channels, context)
    coupling = AffineCoupling(net, split="channel", scale_map="sigmoid", shift_first=True)
    return ActNorm(channels), Invertible1x1Conv(channels), coupling
