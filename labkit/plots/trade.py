"""What a stronger guidance gains and costs, as TabletopEval measures it: one curve a measure over the guidance scale."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from labkit.errors import LabkitError
from labkit.plots.canvas import DPI, LABEL, LINE, SMALL, TITLE, WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRADE = {
    "six": "right pictures, % (six categories)", "diversity": "how much seeds differ",
    "saturation": "saturation of colours", "frechet": "Fréchet distance from renders",
}  # fmt: skip


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
        ax.plot(w, curves[name], "o-", color=LINE, linewidth=2.5, markersize=8)
        if name == "six":
            ax.fill_between(w, low, high, color=LINE, alpha=0.2, linewidth=0)
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
