"""The figures: functions that take data and return a matplotlib `Figure`; one file a kind of figure.

    words.py         word_heatmaps(image, heatmaps)         where each word had the attention
    trajectories.py  trajectory(x_t, x0, t)                 what the network was given at a step, and what it took the picture to be
    guidance.py      guidance_sweep(images, scales, seeds)  the same prompt under several guidance scales
    course.py        strips, curves, maps, arrows, clouds   pictures in rows, lines, numbers over places, vectors and points in a plane
    edits.py         edit_panels(edit), edit_frontier(...)  source, edit, difference and maps; what the schedules of edits buy
    rows.py          rows_of_pictures(images, columns)      from one thing to another: seeds, prompts, layers, steps
    measures.py      measures(x, rows, across)              numbers against a number, one panel a measure
    paths.py         latent_paths(paths)                    the way of many latents from noise to picture
    matrix.py        matrix(values, rows, columns, meaning) a table of numbers as colours

    canvas.py        what they are made of: sizes of type, a grid of axes, pictures without frames, maps of colour over grey
    files.py         show, save, png: a figure in a notebook or as a file

A new kind of figure is a file of its own and a line here and below; `from labkit import plots` has all of them. Each figure is made
without pyplot, so it belongs to nobody's global state and may be drawn in a thread or a widget's callback. Maps of colour are
perceptually uniform, panels that are compared share their limits, and every figure carries what it shows in words,
`figure.labkit_alt`, which `show` puts into the notebook and `save` into the file. Importing it does not import matplotlib.
"""

from labkit.plots.canvas import DPI, LABEL, LARGEST, LINE, MAP, SMALL, TINT, TITLE, WIDTH, grid, over_grey, picture, plain, tinted
from labkit.plots.course import arrows, clouds, curves, maps, strips
from labkit.plots.edits import edit_frontier, edit_panels
from labkit.plots.files import described, png, save, show, write
from labkit.plots.guidance import guidance_sweep
from labkit.plots.matrix import matrix
from labkit.plots.measures import measures
from labkit.plots.paths import latent_paths
from labkit.plots.rows import rows_of_pictures
from labkit.plots.trajectories import trajectory
from labkit.plots.words import place, word_heatmaps

__all__ = [
    *("word_heatmaps", "trajectory", "guidance_sweep", "edit_panels", "edit_frontier"),
    *("strips", "curves", "maps", "arrows", "clouds"),
    *("rows_of_pictures", "measures", "latent_paths", "matrix"),
    *("show", "save", "png", "write", "described"),
    *("grid", "picture", "over_grey", "tinted", "plain", "place"),
    *("DPI", "LABEL", "LARGEST", "LINE", "MAP", "SMALL", "TINT", "TITLE", "WIDTH"),
]
