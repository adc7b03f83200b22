"""The way of many latents from noise to picture, in the plane in which they differ most."""

from typing import TYPE_CHECKING

from labkit.errors import LabkitError
from labkit.plots.canvas import LABEL, MAP, SMALL, TITLE, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def latent_paths(paths, title: str | None = None) -> "Figure":
    """`paths` of `labkit.paths`: one line a seed, coloured from the first step to the last; the seeds' numbers where they end."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    xy = paths.coordinates[..., :2].tolist()
    if not xy or len(xy[0][0]) < 2 or len(xy[0]) < 2:
        raise LabkitError("A figure of paths needs two directions and two steps: labkit.paths(lab, prompt, seeds) gives them.")
    figure = Figure(figsize=(9, 7), dpi=100, layout="constrained")
    figure.suptitle(plain(title or f"“{paths.prompt}”: {len(xy)} ways from noise to picture"), fontsize=TITLE)
    ax = figure.subplots()
    n = len(xy[0]) - 1
    for seed, points in zip(paths.seeds, xy):
        lines = LineCollection([points[k : k + 2] for k in range(n)], cmap=MAP, norm=Normalize(0, n * 1.15), linewidths=2.5)
        lines.set_array(list(range(n)))
        ax.add_collection(lines)
        ax.plot(*points[-1], "o", color="black", markersize=6)
        ax.annotate(str(seed), points[-1], xytext=(6, 4), textcoords="offset points", fontsize=SMALL)
    ax.autoscale()
    ax.margins(0.08)
    for k, name in enumerate(("x", "y")):
        getattr(ax, f"set_{name}label")(f"principal direction {k + 1} ({float(paths.share[k]):.0%} of the variance)", fontsize=LABEL)
    ax.tick_params(labelsize=SMALL)
    ax.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(ScalarMappable(Normalize(0, n * 1.15), MAP), ax=ax, aspect=40, boundaries=[k / 50 * n for k in range(51)])
    bar.set_label("steps done", fontsize=LABEL)
    bar.set_ticks(sorted({0, n // 2, n}))
    bar.ax.tick_params(labelsize=SMALL)
    shares = " and ".join(f"{float(s):.0%}" for s in paths.share[:2])
    figure.labkit_alt = (
        f"Paths of {len(xy)} latents ({'x_t' if paths.what == 'x_t' else 'predicted x0'}) of “{paths.prompt}” over {n} steps in the plane of their two principal "
        f"directions, which have {shares} of the variance; seeds {', '.join(map(str, paths.seeds))}."
    )
    return figure
