"""A figure as a file, or in a notebook: always with its description, complete or not at all."""

import os
import uuid
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from labkit.errors import LabkitError
from labkit.plots.canvas import DPI

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    figure.savefig(file := BytesIO(), format="png", dpi=DPI, metadata=metadata, bbox_inches="tight", pad_inches=0.08)  # no title cut, no empty margin
    return file.getvalue()


def write(path: str | Path, content: bytes | str) -> Path:
    """Write a file, a text as UTF-8, under another name, then give it its own. Raises LabkitError where that cannot be."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, path)
    except OSError as error:
        raise LabkitError(f"{path}: cannot be written ({error.strerror or error}); choose another place.") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return path


def described(figure: "Figure") -> str:
    """The figure's description; LabkitError if it has none, since a figure without words is lost on some readers."""
    alt = getattr(figure, "labkit_alt", "")
    if not alt:
        raise LabkitError("This figure has no description: set figure.labkit_alt to a sentence that says what it shows.")
    return alt
