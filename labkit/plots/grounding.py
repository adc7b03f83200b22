"""What a measurement of grounding found: every head of every layer at every step, and what averages of them are worth."""

from typing import TYPE_CHECKING

from labkit.errors import LabkitError
from labkit.plots.canvas import LABEL, LINE, MAP, SMALL, TITLE, WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = "#7F7F7F"


def grounding_atlas(found: dict, kind: str = "shape", protocol: str | None = None) -> "Figure":
    """Left the average precision of each head by step; right that of averaged maps beside baselines, with their intervals.

    `found` is what `labkit.measure.grounding_report.run` gives; `protocol` is the first that was measured unless said. Raises LabkitError if
    it has no words of that kind.
    """
    from matplotlib.figure import Figure

    protocol = next(iter(found["protocols"])) if protocol is None else protocol
    one = found["protocols"].get(protocol, {}).get("grounding", {}).get(kind)
    if one is None:
        raise LabkitError(f"No words of kind {kind!r} were scored by protocol {protocol!r}.")
    atlas, layers = one["atlas"], one["layers"]  # (step, layer, head)
    steps, heads = len(atlas), len(atlas[0][0])
    rows = [[atlas[s][l][h] for s in range(steps)] for l in range(len(layers)) for h in range(heads)]  # (layer head, step)
    figure = Figure(figsize=(1.15 * WIDTH, max(5.5, 1.6 + 0.2 * len(rows))), dpi=100, layout="constrained")
    figure.suptitle({"shape": "Do nouns look at their objects?"}.get(kind, f"Do words of {kind} look at their objects?"), fontsize=TITLE)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    shown = left.imshow(rows, aspect="auto", cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
    left.set_yticks([l * heads + (heads - 1) / 2 for l in range(len(layers))], layers, fontsize=SMALL)
    for l in range(1, len(layers)):
        left.axhline(l * heads - 0.5, color="white", linewidth=1.5)
    left.set_xlabel("step, from noise to picture", fontsize=LABEL)
    left.set_ylabel(f"layer ({heads} heads each)", fontsize=LABEL)
    left.tick_params(labelsize=SMALL)
    bar = figure.colorbar(shown, ax=left, location="bottom", aspect=30)
    bar.set_label("average precision", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    ways = [("best single head", one["best head"], LINE)] + [(way, row, LINE) for way, row in one["ways"].items()]
    baseline = {"uniform", "centre", "start token", "another word", "untrained"}
    for y, (way, row, colour) in enumerate(ways[::-1]):
        ap = row["ap"]
        colour = GREY if way in baseline else colour
        right.barh(y, ap["value"], color=colour, alpha=0.85)
        right.plot((ap["low"], ap["high"]), (y, y), color="black", linewidth=2)
        right.annotate(f"{ap['value']:.2f}", (max(ap["value"], ap["high"]), y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=SMALL)
    right.set_yticks(range(len(ways)), [way.replace("_", "-") for way, *_ in ways[::-1]], fontsize=SMALL)
    right.set_xlim(0, 1.1)
    right.set_xlabel("average precision\n(lines: 95 % intervals; grey: baselines)", fontsize=LABEL)
    right.tick_params(labelsize=SMALL)
    right.spines[["top", "right"]].set_visible(False)
    best = one["best head"]
    listed = "; ".join(f"{way} {row['ap']['value']:.2f}" for way, row, _ in ways)
    figure.labkit_alt = (
        f"Average precision of the attention of {one['words']} words as a detector of their objects. Left: {len(rows)} heads by {steps} steps, the best is head "
        f"{best['head']} of {best['layer']} at step {best['step']}. Right: {listed}."
    )
    return figure
