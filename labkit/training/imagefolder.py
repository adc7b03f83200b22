"""One's own pictures with captions, in the layout that the Hugging Face world calls an imagefolder.

    FOLDER/metadata.jsonl      a line for each picture: {"file_name": "one.jpg", "text": "a red sphere"};   or metadata.csv with these two columns
    FOLDER/one.jpg             any format that PIL reads

Subfolders may have metadata of their own; a name is relative to the file that says it. A picture that is broken, or has no caption, is
reported by name. All are read once at the start, so that no run of hours ends at a broken file, and again whenever they are needed, so that they
need not fit into memory.
"""

import csv
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from labkit.errors import LabkitError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")  # what ought to have a caption
NAMED = 8  # of the bad pictures, in an error of one line


@dataclass(frozen=True, eq=False)
class Pictures:
    """N pictures and their captions: pictures[i:j] is (j - i, side, side, 3) uint8, read from the disk."""

    paths: tuple[Path, ...]
    texts: tuple[str, ...]
    side: int
    sha256: str  # of all that is trained on
    skipped: tuple[str, ...]  # of what is not: its name and the reason

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, which: slice) -> np.ndarray:
        return np.stack([square(path, self.side) for path in self.paths[which]])


def read_folder(folder: str | Path, side: int, fault: Callable[[str], str | None] = lambda text: None, on_bad: str = "refuse", progress: bool = True) -> Pictures:
    """The captioned pictures of a folder, each resized and cut to its middle square of `side` pixels.

    `fault` says what is wrong with a caption, or None. Raises LabkitError if nothing can be trained on, if a name leads out of the folder, and, unless
    `on_bad` is "skip", if any picture is broken or has no good caption.
    """
    folder, digest = Path(folder), sha256()
    if on_bad not in ("refuse", "skip"):
        raise LabkitError(f"on_bad is {on_bad!r}: use 'refuse' or 'skip'.")
    if not folder.is_dir():
        raise LabkitError(f"{folder}: is no folder; name one with pictures and their captions in metadata.jsonl.")
    good, bad, told = [], [], set()
    for path, text, wrong in tqdm(list(rows(folder)), desc="pictures", disable=not progress, leave=False):
        told.add(path.resolve())
        try:
            if wrong := wrong or (fault(text) if text.strip() else "has no caption"):
                raise LabkitError(wrong)
            digest.update(square(path, side).tobytes() + text.encode("utf-8", "replace") + b"\0")
            good.append((path, text))
        except LabkitError as error:
            bad.append(f"{plain(os.path.relpath(path, folder))}: {error}")
    others = (p for p in visible(folder) if p.suffix.lower() in PICTURES and p.resolve() not in told)
    bad += [f"{plain(os.path.relpath(path, folder))}: has no caption" for path in others]
    if bad and (on_bad == "refuse" or not good):
        some = "; ".join(bad[:NAMED]) + (f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
        advice = "Mend them." if not good else "Mend them, or skip them (--on-bad skip)."
        raise LabkitError(f"{folder}: {len(bad)} of {len(bad) + len(good)} pictures cannot be trained on: {some}. {advice}")
    if not good:
        raise LabkitError(f'{folder}: has no captions; write a metadata.jsonl with a line {{"file_name": "one.jpg", "text": "what it shows"}} for each picture.')
    paths, texts = zip(*good)
    return Pictures(paths, texts, side, digest.hexdigest(), tuple(bad))


def rows(folder: Path) -> Iterator[tuple[Path, str, str | None]]:
    """What the metadata files say: a picture's place, its caption ("" if none), and what is wrong, or None."""
    root = folder.resolve()
    for meta in (p for p in visible(folder) if p.name in ("metadata.jsonl", "metadata.csv")):
        try:
            entries = list(enumerate(lines(meta), start=1))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise LabkitError(f"{meta}: cannot be read ({error}); it is to be a text in UTF-8.") from None
        for number, row in entries:
            name = row.get("file_name") if isinstance(row, dict) else None
            if not isinstance(name, str) or not name.strip():
                yield meta, "", f"entry {number} names no file_name, or is no JSON"
                continue
            path, text = meta.parent / name, row.get("text")
            try:
                inside, there = path.resolve().is_relative_to(root), path.is_file()
            except (OSError, ValueError, RuntimeError):  # a null byte, a name too long, links in a circle
                yield meta, "", f"entry {number} names {plain(name)!r}, which is no file's name"
                continue
            if not inside:
                raise LabkitError(f"{meta}: entry {number} leads out of the folder ({plain(name)}); put the picture into it.")
            yield path, text if isinstance(text, str) else "", None if there else "is not there"


def visible(folder: Path) -> list[Path]:
    """All files of a folder and its subfolders, those of hidden ones (.ipynb_checkpoints) left out."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts))


def lines(meta: Path) -> Iterator[dict | None]:
    """The entries of a metadata.jsonl or metadata.csv; None for a line that is no JSON."""
    with open(meta, encoding="utf-8-sig", newline="") as file:
        if meta.suffix == ".csv":
            yield from csv.DictReader(file)
            return
        for line in filter(str.strip, file):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield None


def square(path: Path, side: int) -> np.ndarray:
    """A picture file as (side, side, 3) uint8: turned as its EXIF says, in RGB, resized and cut to the middle; LabkitError if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return np.asarray(ImageOps.fit(rgb(ImageOps.exif_transpose(image)), (side, side), Image.Resampling.LANCZOS))
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise LabkitError(f"cannot be read ({plain((str(error).splitlines() or [type(error).__name__])[0])})") from None


def rgb(image: Image.Image) -> Image.Image:
    """Any picture in RGB: 16 bits scaled to 8, transparent places white."""
    if image.mode == "F":
        raise ValueError("its pixels are fractions, whose range nothing says")
    if image.mode.startswith("I"):  # PIL would make white of all above 255
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def plain(name: str | Path) -> str:
    """A stranger's words on one line that commands no terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode("ascii") for c in str(name)[:300])
