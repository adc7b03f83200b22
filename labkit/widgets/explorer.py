"""The explorer: a picture and its words; point at a word to see its heat map, at a place to see which words it listens to.

    A = softmax(Q K^T / sqrt(d)),   A[step, layer, head, place, word]: sliders choose step, layer and head, the pointer place or word

Tang et al. 2023 ("What the DAAM") look at the columns of A, one word over all places; its rows, one place over all words, are as
much of it, and both fit under one pointer.
"""

from PIL import Image

from labkit import plots
from labkit.errors import LabkitError
from labkit.generation import Generation
from labkit.probes.sites import short
from labkit.probes.trace import Run, Trace
from labkit.widgets.maps import Grid, grid, kept_apart
from labkit.widgets.view import Axis, Panel, View

MOST_STEPS = 20  # pictures of a trajectory: decoding them is what takes the time


def explore(trace: Trace | Run, picture: Generation | Image.Image | None = None, image: int = 0, branch: str = "cond", layers: str = "*") -> View:
    """Explore the attention of a recorded picture: a live widget in a notebook, with `to_html()` and `to_png()` for everywhere else.

    `record(lab, latents=True)` gives it a trajectory to play, `keep="steps"` the maps of each step, `keep="raw"` of each step and head.
    `picture`: what is shown in place of the picture as the trace has it, needed where that was loaded without its model. `image` is which
    picture of a batch; `branch` "uncond" speaks of the negative prompt's words; `layers` is a layer's name or a shell pattern. Raises
    LabkitError if there is no picture, and whatever `trace.heatmap` raises.
    """
    run = getattr(trace, "run", trace)
    heatmaps = run.heatmaps(image, branch, layers)  # raises where any of it was not recorded
    pictures = [run.picture(image) if picture is None else finished(picture, image)]
    t = {step.i: step.t for step in run.steps} if run.decode else {}
    steps = spread(tuple(t) or kept_apart(run, run.layers(layers)[0], image, branch))
    shown = grid(run, image, branch, layers, steps if set(steps) <= set(kept_apart(run, run.layers(layers)[0], image, branch)) else ())
    if t:
        pictures += [run.decode(step.x0[image : image + 1]) for step in run.steps if step.i in steps]
    prompt = run.prompts[branch][image]
    alt = f"The picture of “{prompt}”. Point at it, or use the arrow keys, to read which words a place listens to."
    axes, keep = axes_of(shown, [f"step {i + 1} of {run.recipe['steps']}" + (f", t = {t[i]:g}" if t else "") for i in steps], bool(t))
    maps = {tuple(position for position, kept in zip(key, keep) if kept): m for key, m in shown.maps.items()}
    figure = plots.word_heatmaps(pictures[0], heatmaps, f"“{plots.plain(prompt)}”: where each word had the attention")
    text = f"[An explorer of the attention of “{prompt}”: run this cell in JupyterLab to move in it. The maps of its words are below.]"
    note = f" There was no room for the maps of {' and of '.join(shown.left_out)}; fewer layers= make some." if shown.left_out else ""
    return View(f"“{prompt}”", (Panel(pictures, alt, shown.words, maps),), axes, figure, text, note)


def spread(steps: tuple[int, ...]) -> tuple[int, ...]:
    """At most MOST_STEPS of them, evenly spread, the first and the last among them."""
    n = min(len(steps), MOST_STEPS)
    return tuple(steps[round(k * (len(steps) - 1) / max(n - 1, 1))] for k in range(n))


def axes_of(shown: Grid, steps: list[str], trajectory: bool) -> tuple[tuple[Axis, ...], tuple[bool, bool, bool]]:
    """The sliders, those that have something to choose; and which of step, layer and head maps differ along."""
    axes, by_step, by_layer, by_head = [], bool(shown.steps), len(shown.layers) > 1, any(key[2] for key in shown.maps) and shown.heads > 1
    if by_step or (trajectory and steps):
        values = ("all steps" if by_step else "the end", *steps)
        axes.append(Axis("step" if by_step else "picture at", values, maps=by_step, pictures=trajectory, first=1))
    if by_layer:
        axes.append(Axis("layer", ("all layers", *map(short, shown.layers)), maps=True))
    if by_head:
        axes.append(Axis("head", ("all heads", *(f"head {h} of {shown.heads}" for h in range(shown.heads))), maps=True))
    return tuple(axes), (by_step, by_layer, by_head)


def finished(picture: Generation | Image.Image, image: int) -> Image.Image:
    """The PIL picture that the user means."""
    if isinstance(picture, Image.Image):
        return picture
    images = getattr(picture, "images", None)
    if not images or not 0 <= image < len(images):
        raise LabkitError("The picture is to be a PIL image, or the Generation that was recorded, with as many pictures.")
    return images[image]
