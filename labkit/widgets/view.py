"""One mechanism for all widgets: pictures, their words' maps, and the axes along which both change, packed for the browser.

    share = low + (high - low) q / 255,    q = round(255 (share - low) / (high - low))      one byte a place, low and high per map

so that a share is right to (high - low) / 510, and a view with hundreds of maps takes less room than one photograph. Everything
travels once: `panels.js` draws, hovers, slides and plays from it without asking the kernel, which may be busy, slow or dead. The
same file drives the live widget and an exported page, and under the widget stands the same content as a figure, because
widgets do not survive in saved notebooks, on GitHub and in other editors.
"""

import json
from base64 import b64encode
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from numpy import asarray, float32, linspace
from PIL import Image
from torch import Tensor

from labkit import plots
from labkit.errors import LabkitError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VIEW = "application/vnd.jupyter.widget-view+json"
MOST_BYTES = 2_000_000  # of a view: what a browser is sent at once, and what a notebook's file would grow by
PICTURE_BYTES = 900_000  # of them for pictures
SIDES = (768, 512, 384, 256, 192, 128, 96, 64)  # pixels that pictures are scaled down to, until they fit
HELP = (
    "Point at a word, or move to it with Tab: where did it have the attention? Point at the picture, or move to it and use the arrow keys: "
    "which words does that place listen to? A click keeps a word."
)


@dataclass(frozen=True)
class Word:
    """A word under a picture; words of the same `id` in several panels light up together. `special`: start, padding: not of the text."""

    id: str
    text: str
    special: bool = False


@dataclass(frozen=True)
class Axis:
    """A slider: what moves along it, maps, pictures or both; `first` is where playing begins, None if it does not play."""

    name: str
    values: tuple[str, ...]
    maps: bool = False
    pictures: bool = False
    start: int = 0
    first: int | None = None


@dataclass(frozen=True, eq=False)
class Panel:
    """Pictures, one or one for each value of the axis they move along; `maps[positions]` (word, y, x): shares at positions on the axes of maps."""

    pictures: list[Image.Image]
    alt: str
    words: tuple[Word, ...] = ()
    maps: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True, eq=False)
class View:
    """A widget and the figure with the same content; in a notebook both appear, the figure below the widget."""

    title: str
    panels: tuple[Panel, ...]
    axes: tuple[Axis, ...]
    figure: "Figure"
    text: str  # what stands there where widgets cannot be drawn
    note: str = ""  # added to the help that stands below

    @property
    def state(self) -> dict:
        """What panels.js reads, plain values."""
        return packed(self)[0]

    @property
    def blob(self) -> bytes:
        """The pictures and maps that the state's offsets speak of."""
        return packed(self)[1]

    def widget(self):
        """The live widget (anywidget), a new one each time."""
        return live(*packed(self))

    def to_html(self) -> str:
        """The same thing as one page that needs no network, no kernel and no other file."""
        return page(self.title, *packed(self))

    def to_png(self) -> bytes:
        """The static figure, for print."""
        return plots.png(self.figure)

    def save(self, path: str | Path) -> Path:
        """Write the page (.html) or the figure (.png). Raises LabkitError for another ending, or where it cannot be written."""
        path = Path(path)
        if path.suffix not in (".html", ".png"):
            raise LabkitError(f"{path}: a view is saved as .html or .png, name it so.")
        return plots.write(path, self.to_html().encode() if path.suffix == ".html" else self.to_png())

    def _ipython_display_(self) -> None:
        from IPython.display import publish_display_data

        if find_spec("anywidget"):
            view = {"version_major": 2, "version_minor": 0, "model_id": self.widget().model_id}
            publish_display_data({VIEW: view, "text/plain": self.text})
        else:  # an environment older than our lists of packages: the page in a frame does the same, and makes the notebook larger
            publish_display_data({"text/html": framed(self.to_html()), "text/plain": self.text})
        plots.show(self.figure)

    def __repr__(self) -> str:
        return self.text


# --- packing ------------------------------------------------------------------------------------------------------


def packed(view: View) -> tuple[dict, bytes]:
    """A view as plain values and one run of bytes. Raises LabkitError if it takes more than 2 MB."""
    blob, panels = bytearray(), []
    files = fitted([panel.pictures for panel in view.panels])
    for panel, pictures in zip(view.panels, files):
        spans = []
        for data in pictures:
            spans.append([len(blob), len(data)])
            blob += data
        maps = {}
        for positions, shares in panel.maps.items():
            maps[",".join(map(str, positions))] = [len(blob), *shares.shape[1:]]
            blob += quantised(shares)
        words = [vars(word) for word in panel.words]
        panels.append({"label": panel.label, "alt": panel.alt, "pictures": spans, "words": words, "maps": maps})
    axes = [{**vars(axis), "label": axis.name, "values": list(axis.values), "play": axis.first is not None} for axis in view.axes]
    state = {"title": view.title, "help": HELP + view.note, "colours": colours(), "tint": plots.TINT, "axes": axes, "panels": panels}
    if (size := len(blob) + len(json.dumps(state))) > MOST_BYTES:
        raise LabkitError(f"The view takes {size:,} bytes, more than {MOST_BYTES:,}: show fewer pictures, or layers='up_blocks.*' instead of all layers.")
    return state, bytes(blob)


def quantised(shares: Tensor) -> bytes:
    """Maps (word, y, x) as bytes: of each word low and high as float32, then one byte a place."""
    parts = []
    for share in shares.detach().float().cpu().numpy():
        low, high = float32(share.min()), float32(share.max())
        q = ((share - low) * (255 / (high - low) if high > low else 0)).round().astype("uint8")  # (y, x)
        parts += [asarray([low, high], dtype="<f4").tobytes(), q.tobytes()]
    return b"".join(parts)


def fitted(rows: list[list[Image.Image]]) -> list[list[bytes]]:
    """Pictures as JPEG files, all scaled down to the largest side with which they fit together."""
    for side in SIDES:
        files = [[jpeg(picture, side) for picture in row] for row in rows]
        if sum(len(data) for row in files for data in row) <= PICTURE_BYTES:
            return files
    raise LabkitError(f"{sum(map(len, rows))} pictures are too many for one view: show fewer.")


def jpeg(picture: Image.Image, side: int) -> bytes:
    picture = picture.convert("RGB")
    picture.thumbnail((side, side))
    picture.save(file := BytesIO(), "JPEG", quality=92, subsampling=0)
    return file.getvalue()


@cache
def colours() -> list[list[int]]:
    """The colour map of all figures, 256 times red, green, blue."""
    from matplotlib import colormaps

    return (colormaps[plots.MAP](linspace(0, 1, 256))[:, :3] * 255).round().astype(int).tolist()


# --- showing ------------------------------------------------------------------------------------------------------


@cache
def asset(name: str) -> str:
    """A file that lies beside this one, panels.js or panels.css."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def live(state: dict, blob: bytes):
    """The anywidget of a packed view."""
    import anywidget
    import traitlets

    class Panels(anywidget.AnyWidget):  # the one way in which anywidget takes a front end
        _esm, _css = asset("panels.js"), asset("panels.css")
        state, blob = traitlets.Dict().tag(sync=True), traitlets.Bytes().tag(sync=True)

    return Panels(state=state, blob=blob)


def page(title: str, state: dict, blob: bytes) -> str:
    """One self-contained page: the same module, with the packed view in it and a stand-in for the widget's model."""
    told = json.dumps(state).replace("<", "\\u003c")  # no text can end the script it stands in
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>
<style>
{asset("panels.css")}
:root {{ color-scheme: light dark; }}
body {{ margin: 0; background: Canvas; }} .labkit-view {{ --tallest: 80vh; min-height: 100vh; }}
</style></head><body><div id="labkit"></div>
<script type="module">
{asset("panels.js")}
const values = {{ state: {told}, blob: Uint8Array.from(atob("{b64encode(blob).decode()}"), (c) => c.charCodeAt(0)) }};
render({{ model: {{ get: (name) => values[name] }}, el: document.getElementById("labkit") }});
</script></body></html>
"""


def framed(html: str) -> str:
    """A page as a frame inside another one."""
    return f'<div><iframe title="labkit" style="width: 100%; height: 820px; border: 0" srcdoc="{escape(html, quote=True)}"></iframe></div>'
