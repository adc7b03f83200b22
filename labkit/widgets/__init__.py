"""The figures of `plots`, with a knob.

A widget here is drawn by JupyterLab alone: its pictures are made beforehand and travel to the browser once, so moving the
knob asks nothing of the kernel, which may be busy, slow or dead. Every widget stands beside the same content as a static
figure, because widgets do not survive in saved notebooks, HTML pages and other editors.
"""

from labkit.widgets.flip import flip
from labkit.widgets.guidance import guidance_slider

__all__ = ["flip", "guidance_slider"]
