"""The same prompt under several guidance scales; what a stronger guidance gains and costs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL.Image import Image

from labkit.errors import LabkitError
from labkit.plots.canvas import DPI, LABEL, SMALL, TITLE, WIDTH, grid, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRADE = {
    "six": "right pictures, % (six categories)", "diversity": "how much seeds differ",
    "saturation": "saturation of colours", "frechet": "Fréchet distance from renders",
}  # fmt: skip


def guidance_sweep(
    images: Sequence[Sequence[Image]], scales: Sequence[float], seeds: Sequence[int], title: str | None = None
) -> "Figure":
    """A grid of pictures `images[row][column]`: guidance scales across, seeds down."""
    images, scales, seeds = [list(row) for row in images], list(scales), list(seeds)
    if not images or len(images) != len(seeds) or any(len(row) != len(scales) or not row for row in images):
        sizes = [len(row) for row in images]
        raise LabkitError(f"A sweep has a row a seed ({len(seeds)}) and a column a scale ({len(scales)}); its rows are {sizes}.")
    figure, axes = grid(len(seeds), len(scales), images[0][0].height / images[0][0].width, titles=1, left=0.5)
    figure.suptitle(title or "The guidance scale $w$", fontsize=TITLE)
    for row, pictures in enumerate(images):
        for column, image in enumerate(pictures):
            picture(axes[row][column], image, f"$w$ = {scales[column]:g}" if row == 0 else None)
        axes[row][0].set_ylabel(f"seed {seeds[row]}", fontsize=LABEL)
    figure.labkit_alt = (
        f"A grid of pictures of one prompt: guidance scales {', '.join(f'{w:g}' for w in scales)} from left to right, "
        f"seeds {', '.join(map(str, seeds))} from top to bottom."
    )
    return figure


def guidance_trade(runs: Sequence[dict], renders: dict[str, float], title: str | None = None) -> "Figure":
    """Four curves over the guidance scale: right pictures, diversity, saturation, distance from renders; the last two beside those of renders.

    runs, renders: as `labkit.training.evaluate.evaluate` returns them. Raises LabkitError for fewer than two scales.
    """
    from matplotlib.figure import Figure

    runs = sorted(runs, key=lambda run: run["guidance"])
    if len(runs) < 2:
        raise LabkitError("A curve over the guidance scale needs two scales or more: evaluate with --guidance 1,2,4,8.")
    w = [run["guidance"] for run in runs]
    figure = Figure(figsize=(WIDTH, 7.0), dpi=DPI, layout="constrained")
    figure.suptitle(title or "What the guidance scale $w$ gains and costs", fontsize=TITLE)
    share, low, high = ([100 * run["six"][name] for run in runs] for name in ("share", "low", "high"))
    curves = {name: share if name == "six" else [run.get(name, float("nan")) for run in runs] for name in TRADE}
    for ax, (name, says) in zip(figure.subplots(2, 2, sharex=True).flat, TRADE.items()):
        ax.plot(w, curves[name], "o-", color="#31688e", linewidth=2.5, markersize=8)
        if name == "six":
            ax.fill_between(w, low, high, color="#31688e", alpha=0.2, linewidth=0)
        elif name in renders:
            ax.axhline(renders[name], color="#666666", linestyle="--", linewidth=2, label="renders")
            ax.legend(fontsize=SMALL, frameon=False)
        ax.set_title(says, fontsize=LABEL)
        ax.tick_params(labelsize=SMALL)
        ax.margins(x=0.04, y=0.15)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in figure.axes[2:]:
        ax.set_xlabel("guidance scale $w$", fontsize=LABEL)
    said = [f"{says}: {', '.join(f'{value:.3g}' for value in curves[name])}" for name, says in TRADE.items()]
    best = w[share.index(max(share))]
    figure.labkit_alt = f"Four curves over guidance scales {', '.join(f'{x:g}' for x in w)}. {'; '.join(said)}. Most are right at {best:g}."
    return figure
