"""Glow: multi-scale flow of ActNorm, 1x1 convolutions and affine couplings."""

from __future__ import annotations

from torch import nn

from .. import _checks as check
from ..nn import ActNorm, AffineCoupling, Invertible1x1Conv, ReversibleSequential
from .multiscale import MultiScale, Squeeze, check_images
from .nets import conv_net, counts, zero_conv


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

    Returns:
        `log_prob(x)` in nats, (B,); `forward(x) -> (z, logdet)` with z (B, C * H * W), standard normal under the model;
        `inverse(z) -> (x, logdet)`; `sample(n, temperature=1.0, seed=None)`.

    Raises:
        ValueError: shape is not (C, H, W) or not divisible, steps, levels or hidden < 1, or x has another shape.

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
    ) -> None:
        counts("Glow", steps=steps, levels=levels)
        event = check.event_shape("Glow", shape)
        check_images("Glow", event, 2**levels)
        hidden = check.at_least("Glow", "hidden", hidden, 1)
        stages, splits = [], []
        for level in range(levels):
            channels = 4 * event[0] * 2**level
            layers = [layer for _ in range(steps) for layer in _step(channels, hidden)]
            stages.append(ReversibleSequential(Squeeze(), *layers, recompute=reversible))
            if level < levels - 1:
                splits.append(AffineCoupling(zero_conv(channels // 2, channels), split="channel"))
        super().__init__(event, stages, splits, "gaussian")


def _step(channels: int, hidden: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    net = conv_net(channels // 2, hidden, channels)
    coupling = AffineCoupling(net, split="channel", scale_map="sigmoid", shift_first=True)
    return ActNorm(channels), Invertible1x1Conv(channels), coupling
