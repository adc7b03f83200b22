"""Sheets of pictures to look at: plain, or each with its prompt and, where it is wrong, what was read instead."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np

SIDE, STRIP, GAP = 128, 36, 4  # pixels: of a picture, of the lines under it, between two


def grid(pictures: Sequence[np.ndarray], columns: int = 8):
    """Pictures (128, 128, 3) uint8 side by side, row by row; a PIL image."""
    from PIL import Image

    rows = -(-len(pictures) // columns)
    paper = Image.new("RGB", (columns * SIDE, rows * SIDE), "white")
    for i, picture in enumerate(pictures):
        paper.paste(Image.fromarray(picture), (i % columns * SIDE, i // columns * SIDE))
    return paper


def sheet(rows: Sequence[dict], columns: int = 10):
    """Pictures with their prompts, wrong ones framed in orange with what was read; rows as in verdicts.json, with "image"; a PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    font, lines = ImageFont.load_default(size=8), -(-len(rows) // columns)
    paper = Image.new("RGB", (columns * (SIDE + GAP), lines * (SIDE + STRIP + GAP)), "white")
    pen = ImageDraw.Draw(paper)
    for i, row in enumerate(rows):
        x, y = i % columns * (SIDE + GAP) + GAP // 2, i // columns * (SIDE + STRIP + GAP) + GAP // 2
        paper.paste(Image.fromarray(row["image"]), (x, y))
        said = row["text"] + (f" / not: {row['negative']}" if row["negative"] else "")
        texts = [(line, "black") for line in folded(said, font)]
        if not row["right"]:
            texts += [(line, "#b03a00") for line in folded("read: " + row["read"].split(";")[0], font)]
            pen.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline="#e06000", width=2)
        for k, (line, colour) in enumerate(texts[:4]):
            pen.text((x, y + SIDE + 1 + 9 * k), line, fill=colour, font=font)
    return paper


def folded(text: str, font) -> list[str]:
    """The text in lines that fit under a picture, two at most."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= SIDE:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:2]


def png(image) -> bytes:
    """A PIL image as the bytes of a PNG file."""
    image.save(held := BytesIO(), "PNG")
    return held.getvalue()
