"""The figures of `plots`, with pointer and sliders.

    explore(trace)                a picture, its words, steps, layers and heads
    guidance_slider(sweep)        one prompt under several guidance scales
    before_after(before, after)   an edit, with the maps of both prompts
    flip(frames, labels, ...)     figures drawn beforehand, one at a time

All are values of one `View`, drawn by one file, panels.js: what is shown is made beforehand and travels to the browser once,
so pointing and sliding ask nothing of the kernel. `to_html()` makes one page of it that needs no network, `to_png()` the figure
that also stands below every widget, because widgets do not survive in saved notebooks and other editors.
"""

from labkit.widgets.before_after import before_after
from labkit.widgets.explorer import explore
from labkit.widgets.flip import flip
from labkit.widgets.guidance import guidance_slider
from labkit.widgets.view import View

__all__ = ["View", "before_after", "explore", "flip", "guidance_slider"]
