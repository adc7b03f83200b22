"""Figures of edits.

    edit_panels(edit)       the source, the edit, where they differ, and the attention of the words that the edit is about
    edit_frontier(points)   what an edit's schedules buy: how often it succeeds against how much of the source stays
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from labkit.errors import LabkitError
from labkit.plots.canvas import LABEL, SMALL, TITLE, grid, over_grey, percent, picture, plain, tinted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from labkit.editing.result import Edit

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito's: apart to colour-blind eyes too
MARKERS = "osD^vP"


def edit_panels(edit: "Edit", target: int = 0, seed: int = 0, words: Sequence[str] | None = None, title: str | None = None) -> "Figure":
    """Source and edit, and the blend's mask if there is one; below, over greyed pictures, where they differ, and the maps of words.

    `words`: those of either prompt to show, up to four panels; by default those in which the prompts differ, else the last word. All maps
    are on one scale. Raises LabkitError if there is no such target or seed, or a word is in neither prompt.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from numpy import abs as absolute
    from numpy import asarray, percentile

    maps = word_maps(edit, target, seed, words)
    before, after = edit.sources[seed], edit.edited[target][seed]
    differs = absolute(asarray(after, dtype=float) - asarray(before, dtype=float)).mean(-1)  # (H, W)
    columns = max(3, 1 + len(maps))
    figure, axes = grid(2, columns, before.height / before.width, titles=2, footer=1.2)
    figure.suptitle(title or f"“{plain(edit.prompts[0])}”\n→ “{plain(edit.prompts[1 + target])}”", fontsize=TITLE)
    picture(axes[0][0], before, "the source")
    picture(axes[0][1], after, "the edit")
    if edit.masks is not None:
        from labkit.generation import to_pil

        m = edit.masks[target, seed][None, None].expand(1, 3, -1, -1)
        picture(axes[0][2], to_pil(m)[0].resize(before.size, 0), "let in (white)")
    scale = Normalize(0, max(float(percentile(differs, 99.5)), 1.0))
    picture(axes[1][0], over_grey(before, scale(differs).clip(0, 1)), "where they differ")
    colour_bar(figure, ScalarMappable(scale, tinted()), axes[1][:1], "mean of |difference| over\nred, green, blue; of 255")
    low, high = min(float(m.map.min()) for _, m in maps), max(float(m.map.max()) for _, m in maps)
    shares = Normalize(low if low < high else 0, high)
    for ax, (side, m) in zip(axes[1][1:], maps):
        image = before if side == "source" else after
        picture(ax, over_grey(image, shares(m.resized(image.height, image.width).numpy())), f"“{plain(m.word)}” in the {side}")
    there = axes[1][1 : 1 + len(maps)]
    colour_bar(figure, ScalarMappable(shares, tinted()), there, "share of attention\n(one scale for all words)", shares=True)
    for ax in [*axes[0][2 if edit.masks is None else 3 :], *axes[1][1 + len(maps) :]]:
        ax.set_visible(False)
    figure.labkit_alt = (
        f"A picture of “{edit.prompts[0]}”, and the same edited to “{edit.prompts[1 + target]}”; {differs.mean():.1f} of 255 is the mean difference, "
        f"{(differs > 25.5).mean():.0%} of the pixels differ by more than a tenth. Below, attention as heat maps of "
        + ", ".join(f"“{m.word}” in the {side} (up to {float(m.map.max()):.1%})" for side, m in maps)
        + "."
    )
    return figure


def word_maps(edit: "Edit", target: int, seed: int, words: Sequence[str] | None) -> list:
    """[("source" or "edit", HeatMap)] of the words asked for, at most four."""
    from labkit.probes.words import words as words_of

    sides, alignment = (("source", None), ("edit", target)), edit.alignments[target]
    spans = [words_of(edit.tokenizer, edit.prompts[0]), words_of(edit.tokenizer, edit.prompts[1 + target])]
    if words is None:
        changed = [[w for w in side if w.tokens in tokens] for side, tokens in zip(spans, (alignment.gone, alignment.new))]
        wanted = [(side, w.text) for side, those in zip(sides, changed) for w in those[-2:]] or [(side, those[-1].text) for side, those in zip(sides, spans)]
        return [(name, edit.heatmap(word, which, seed)) for (name, which), word in wanted]
    found = []
    for word in words:
        tries = []
        for name, which in sides:
            try:
                found.append((name, edit.heatmap(word, which, seed)))
            except LabkitError as error:
                tries.append(error)
        if len(tries) == 2:
            raise tries[1]
    if not found:
        raise LabkitError("There are no words to show: name some of either prompt, or leave words out.")
    return found[:4]


def edit_frontier(points: Sequence[dict], title: str = "What the schedules of an edit buy", across: str = "kept", up: str = "success") -> "Figure":
    """Success against what is kept: a line for each self-attention window, a point on it for each cross-attention window.

    points: [{"cross", "self", "kept", "success", "low", "high"}], shares and dB, low and high an interval of the success; those that have a
    "name" are shown apart, with it (such as the baseline without editing). Raises LabkitError if there is none.
    """
    from matplotlib.figure import Figure

    grid_, named = [p for p in points if "name" not in p], [p for p in points if "name" in p]
    if not points:
        raise LabkitError("There are no points to draw: measure some schedules first.")
    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
    ax = figure.subplots()
    for n, share in enumerate(sorted({p["self"] for p in grid_})):
        line = sorted((p for p in grid_ if p["self"] == share), key=lambda p: p["cross"])
        colour, marker = COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]
        x, y = [p[across] for p in line], [p[up] for p in line]
        ax.errorbar(x, y, [[b - p["low"] for b, p in zip(y, line)], [p["high"] - b for b, p in zip(y, line)]], color=colour, marker=marker, ms=9, lw=2, elinewidth=1, alpha=0.9, label=f"{share:.0%}")
        for p, a, b in zip(line, x, y):
            dx, dy, side = ((7, 7, "left"), (-8, -18, "right"))[n % 2]  # neighbouring lines have their numbers on either side
            ax.annotate(f"{p['cross']:.0%}", (a, b), xytext=(dx, dy), textcoords="offset points", ha=side, fontsize=SMALL, color=colour)
    for p in named:
        ax.plot(p[across], p[up], marker="*", ms=18, color="black", ls="none")
        ax.annotate(p["name"], (p[across], p[up]), xytext=(0, 20), textcoords="offset points", ha="center", fontsize=SMALL)
    ax.set_title(title, fontsize=TITLE)
    ax.set_xlabel("PSNR outside of the changed region, against the source (dB): more of the source stays →", fontsize=LABEL)
    ax.set_ylabel("verified edits: more of the edit is there ↑", fontsize=LABEL)
    ax.yaxis.set_major_formatter(percent)
    ax.tick_params(labelsize=SMALL)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    if grid_:
        ax.legend(title="steps in which self-attention is copied\n(numbers at the points: cross-attention)", title_fontsize=SMALL, fontsize=SMALL, loc="best")
    best = max(points, key=lambda p: p[up])
    figure.labkit_alt = (
        f"Verified edits against PSNR outside of the changed region for {len(grid_)} pairs of schedules"
        + "".join(f"; {p['name']}: {p[up]:.0%} at {p[across]:.1f} dB" for p in named)
        + f"; the most edits succeed at {best[up]:.0%} with {best[across]:.1f} dB."
    )
    return figure


def colour_bar(figure: "Figure", mappable, axes: list, label: str, shares: bool = False) -> None:
    """A colour bar under panels, labelled; with `shares` its numbers are shares."""
    bar = figure.colorbar(mappable, ax=axes, location="bottom", aspect=20 * len(axes), fraction=0.06, pad=0.03)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.locator_params(nbins=4)
    if shares:
        bar.ax.xaxis.set_major_formatter(percent)
    bar.outline.set_visible(False)
