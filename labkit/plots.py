"""The figures: functions that take data and return a matplotlib `Figure`.

    word_heatmaps(image, heatmaps)         where each word had the attention
    trajectory(x_t, x0, t)                 what the network was given at a step, and what it took the picture to be
    guidance_sweep(images, scales, seeds)  the same prompt under several guidance scales
    guidance_trade(runs, renders)          what a stronger guidance gains and costs, as TabletopEval measures it

Each figure is made without pyplot, so it belongs to nobody's global state and may be drawn in a thread or a widget's
callback. Maps of colour are perceptually uniform, panels that are compared share their limits, and every figure carries
what it shows in words, `figure.labkit_alt`, which `show` puts into the notebook and `save` into the file.
"""

import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image

from labkit.errors import LabkitError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from labkit.probes.heatmap import HeatMap

WIDTH = 12.0  # inches; with type of 13 points and more it can be read from the back row
TITLE, LABEL, SMALL = 18, 15, 13
MAP = "magma"  # lightness rises evenly, also in grey and to colour-blind eyes
TINT = 0.65  # how much of a panel is the map's colour; the rest is the greyed picture
LARGEST = 3.2  # inches: a picture of 128 pixels is not worth more
DPI = 100
TRADE = {
    "six": "right pictures, % (six categories)", "diversity": "how much seeds differ",
    "saturation": "saturation of colours", "frechet": "Fréchet distance from renders",
}  # fmt: skip


def word_heatmaps(image: Image, heatmaps: Sequence["HeatMap"], title: str | None = None) -> "Figure":
    """One panel a word over the greyed picture, all on one scale: the share of attention that each place gave to it.

    The scale goes from the smallest to the largest share in any panel, not from zero: tokens share what there is, and
    in most layers no word has much more than its neighbours.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    heatmaps = list(heatmaps)
    if not heatmaps:
        raise LabkitError("There are no heat maps to draw: give trace.heatmaps().")
    n = len(heatmaps) + 1
    columns = min(max(4, -(-n // 2)), 6)
    rows = -(-n // columns)
    figure, axes = grid(rows, columns, image.height / image.width, titles=rows, footer=0.85)
    figure.suptitle(title or "Where each word had the attention", fontsize=TITLE)
    low, high = min(float(h.map.min()) for h in heatmaps), max(float(h.map.max()) for h in heatmaps)
    colours = Normalize(low if low < high else 0, high)  # the same for all: a word may have little everywhere
    panels = [ax for row in axes for ax in row]
    picture(panels[0], image, "the picture")
    for ax, heatmap in zip(panels[1:], heatmaps):
        share = heatmap.resized(image.height, image.width).numpy()
        picture(ax, over_grey(image, colours(share)), f"“{plain(heatmap.word)}”")
    for ax in panels[n:]:
        ax.set_visible(False)
    bar = figure.colorbar(ScalarMappable(colours, tinted()), ax=panels, location="bottom", aspect=45, fraction=0.05, pad=0.03)
    bar.set_label(f"share of attention, the same scale in all panels\n({heatmaps[0].averages})", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.xaxis.set_major_formatter(lambda value, _: f"{value:.1%}" if high - low < 0.05 else f"{value:.0%}")
    bar.outline.set_visible(False)
    strongest = sorted(heatmaps, key=lambda h: float(h.map.max()), reverse=True)[:3]
    figure.labkit_alt = (
        f"Attention of {len(heatmaps)} words as heat maps over the picture, one panel each; strongest are "
        + ", ".join(f"“{h.word}” ({float(h.map.max()):.0%}, {place(h)})" for h in strongest)
        + f"; {heatmaps[0].averages}."
    )
    return figure


def trajectory(x_t: Sequence[Image], x0: Sequence[Image], t: Sequence[int], title: str | None = None) -> "Figure":
    """Two rows, noisiest first: the decoded latent x_t, and the clean picture predicted from it, at each timestep t."""
    x_t, x0, t = list(x_t), list(x0), list(t)
    if not t or not len(x_t) == len(x0) == len(t):
        raise LabkitError(f"A trajectory is as many x_t ({len(x_t)}) as x0 ({len(x0)}) as timesteps ({len(t)}), one at least.")
    figure, axes = grid(2, len(t), x_t[0].height / x_t[0].width, titles=1, left=0.8)
    figure.suptitle(title or "From noise to picture", fontsize=TITLE)
    for column in range(len(t)):
        picture(axes[0][column], x_t[column], f"$t$ = {t[column]}")
        picture(axes[1][column], x0[column])
    axes[0][0].set_ylabel("latent $x_t$,\ndecoded", fontsize=LABEL)
    axes[1][0].set_ylabel("predicted $x_0$,\ndecoded", fontsize=LABEL)
    figure.labkit_alt = (
        f"Two rows of {len(t)} pictures from noise to image, at timesteps {', '.join(map(str, t))}: "
        "above the noisy latent, decoded, below the clean picture that the network predicts from it."
    )
    return figure


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


def show(figure: "Figure") -> None:
    """Show a figure in a notebook as PNG with its description as alternative text, which is printed below it too."""
    from IPython.display import publish_display_data

    alt = described(figure)
    publish_display_data({"image/png": png(figure), "text/plain": alt}, {"image/png": {"alt": alt}})
    print(alt)


def save(figure: "Figure", path: str | Path) -> Path:
    """Save a figure as PNG, its description inside; the file is there complete or not at all. Raises LabkitError."""
    return write(path, png(figure))


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file's bytes, with its description as the file's Description."""
    metadata = {"Software": None, "Description": described(figure)}
    figure.savefig(file := BytesIO(), format="png", dpi=DPI, metadata=metadata)
    return file.getvalue()


def write(path: str | Path, content: bytes) -> Path:
    """Write a file under another name, then give it its own. Raises LabkitError where that cannot be."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        raise LabkitError(f"{path}: cannot be written ({error.strerror or error}); choose another place.") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return path


# --- what figures are made of -------------------------------------------------------------------------------------


def grid(
    rows: int, columns: int, shape: float, titles: int, left: float = 0.0, footer: float = 0.0
) -> tuple["Figure", list[list]]:
    """A figure with rows x columns axes for pictures of this shape (height / width); `titles` rows have titles; inches."""
    from matplotlib.figure import Figure

    side = min((WIDTH - left) / columns, LARGEST)
    size = (max(left + columns * side, WIDTH / 2), 0.55 + footer + titles * 0.35 + rows * (side * shape + 0.05))
    figure = Figure(figsize=size, dpi=DPI, layout="compressed")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0.0, hspace=0.0)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def picture(ax, image, title: str | None = None) -> None:
    """A picture without ticks and frame."""
    ax.imshow(image, interpolation="bicubic")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(title, fontsize=LABEL)


def over_grey(image: Image, strength):
    """A map (H, W) in [0, 1] as colours over the greyed picture, (H, W, 3), so that the only colour in it is the map's."""
    from matplotlib import colormaps
    from numpy import asarray

    grey = asarray(image.convert("L"), dtype=float)[..., None] / 255  # (H, W, 1)
    return (1 - TINT) * grey + TINT * colormaps[MAP](strength)[..., :3]


def tinted():
    """The colour map as it looks over a medium grey, for the colour bar."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from numpy import linspace

    return ListedColormap((1 - TINT) * 0.5 + TINT * colormaps[MAP](linspace(0, 1, 256))[:, :3])


def place(heatmap: "HeatMap") -> str:
    """Where a map has its maximum, in words."""
    h, w = heatmap.map.shape
    y, x = divmod(int(heatmap.map.argmax()), w)
    rows, columns = ("top", "middle", "bottom"), ("left", "centre", "right")
    return f"{rows[3 * y // h]} {columns[3 * x // w]}"


def plain(text: str) -> str:
    """Text as it is typed, where matplotlib would read mathematics between dollar signs."""
    return text.replace("$", r"\$")


def described(figure: "Figure") -> str:
    """The figure's description; LabkitError if it has none, since a figure without words is lost on some readers."""
    alt = getattr(figure, "labkit_alt", "")
    if not alt:
        raise LabkitError("This figure has no description: set figure.labkit_alt to a sentence that says what it shows.")
    return alt
