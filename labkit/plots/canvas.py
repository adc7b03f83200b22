"""What figures are made of: sizes, a grid of axes, pictures and maps of colour in them.

Maps of colour are perceptually uniform; a figure is made without pyplot, so it belongs to nobody's global state.
"""

from typing import TYPE_CHECKING

from PIL.Image import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 12.0  # inches; with type of 13 points and more it can be read from the back row
TITLE, LABEL, SMALL = 18, 15, 13
MAP = "magma"  # lightness rises evenly, also in grey and to colour-blind eyes
LINE = "#3b528b"  # of curves: dark enough on white, told apart from black by all eyes
TINT = 0.65  # how much of a panel is the map's colour; the rest is the greyed picture
LARGEST = 3.2  # inches: a picture of 128 pixels is not worth more
DPI = 100


def grid(rows: int, columns: int, shape: float, titles: int, left: float = 0.0, footer: float = 0.0) -> tuple["Figure", list[list]]:
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


def percent(share: float, _=None) -> str:
    """A share as a mark of an axis says it: in per cent, and where the mark is (2.5%, not 2%)."""
    return f"{100 * share:.3g}%"


def plain(text: str) -> str:
    """Text as it is typed, where matplotlib would read mathematics between dollar signs."""
    return text.replace("$", r"\$")
