"""The picture of the energy demo."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ._sample_scores import Scores

matplotlib.use("Agg")

from matplotlib import pyplot as plt


def picture(
    energy_of: Callable[[Tensor], Tensor], limit: float, before: Tensor, after: Tensor, digits: dict[str, Tensor],
    quality: dict[str, Scores], by_energy: list[tuple[Tensor, Tensor]], auprc: dict[int, dict[str, float]],
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """Draw the grid within +-limit and its energy, drawn digits, and how anomalies are told by the energy."""
    figure, axes = plt.subplots(2, 4, figsize=(15.5, 8), facecolor="white")
    line = torch.linspace(-limit, limit, 200, device=before.device)
    with torch.no_grad():
        landscape = energy_of(torch.cartesian_prod(line, line)).reshape(200, 200).T.cpu().numpy()
    extent = (-limit, limit, -limit, limit)
    axes[0, 0].imshow(landscape, origin="lower", extent=extent, cmap="viridis")
    axes[0, 0].set_title("energy: low near the data")
    for axis, x, title in ((axes[0, 1], before, "generator"), (axes[0, 2], after, "after MALA")):
        axis.plot(*x.cpu().numpy().T, ".", markersize=1.5, color="0.2")
        axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    (energy, anomalous), digit = by_energy[0], next(iter(auprc))
    for mask, label in ((~anomalous, "other digits"), (anomalous, f"digit {digit}, never seen")):
        axes[0, 3].hist(energy[mask].cpu().numpy(), bins=30, density=True, alpha=0.6, label=label)
    axes[0, 3].set_title("energy of held-out digits")
    axes[0, 3].legend()
    for axis, (name, x) in zip(axes[1], digits.items(), strict=False):
        axis.imshow(tiled(x[:100]), cmap="gray_r", vmin=-1, vmax=1)
        q = quality[name]
        axis.set_title(f"digits, {name}: {q.sure:.0%} sure\nprecision {q.precision:.2f}, recall {q.recall:.2f}")
        axis.axis("off")
    for shift, name in ((-0.2, "energy"), (0.2, "nearest")):
        heights = [row[name] for row in auprc.values()]
        label = "energy" if name == "energy" else "distance to training digits"
        axes[1, 3].bar([place + shift for place in range(len(auprc))], heights, 0.4, label=label)
    axes[1, 3].plot([-0.5, len(auprc) - 0.5], [sum(row["chance"] for row in auprc.values()) / len(auprc)] * 2,
                    "--", color="0.3", label="chance")  # fmt: skip
    axes[1, 3].set(title="AUPRC of a digit never seen", xlabel="digit", ylim=(0, 1.25), xticks=range(len(auprc)))
    axes[1, 3].set_xticklabels(auprc)
    axes[1, 3].legend(loc="upper right", fontsize=8)
    figure.suptitle(f"Maximum-entropy generators, seed {args.seed}")
    figure.tight_layout(h_pad=2)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    plt.close(figure)


def tiled(images: Tensor, across: int = 10) -> np.ndarray:
    """Lay images (N, 64) side by side, with a white line between them."""
    framed = F.pad(images.unflatten(1, (8, 8)), (1, 1, 1, 1), value=-1.0)
    rows = framed.unflatten(0, (-1, across)).transpose(1, 2)
    return rows.flatten(0, 1).flatten(1).cpu().numpy()
