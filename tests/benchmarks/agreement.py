"""How often the reader of pictures agrees with labels that were made by eye, of a hundred generated pictures, before it had read any.

    python tests/benchmarks/agreement.py

tests/labelled/pictures.png holds the pictures (ten by ten, 128 pixels each, drawn by the weights of the fifth run for prompts of the evaluation),
labels.json what was seen: objects with the place of their middle, colour and shape, null where one cannot say, as of bodies with the outline of a cube and the round top of a cylinder; `torn` where parts of a picture are no object, so that
there is no number of objects to agree on; light and table. A labelled object is compared with the read one whose mask's middle is nearest; none within
16 pixels is a disagreement.
"""

import json
import sys
from pathlib import Path

import numpy as np

from labkit.scenes.verify import Read, read, share

FOLDER = Path(__file__).parents[1] / "labelled"
NEAR = 16  # pixels


def labelled() -> tuple[list[dict], np.ndarray]:
    """The labels and the pictures (100, 128, 128, 3) uint8."""
    from PIL import Image

    labels = json.loads((FOLDER / "labels.json").read_text(encoding="utf-8"))
    with Image.open(FOLDER / "pictures.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    return labels, pixels.reshape(10, 128, 10, 128, 3).swapaxes(1, 2).reshape(100, 128, 128, 3)


def agreements(labels: list[dict], readings: list[Read]) -> dict[str, list[bool]]:
    """For each kind of label, whether the reading says the same; "colour and shape" is all labels of either kind together."""
    found: dict[str, list[bool]] = {name: [] for name in ("colour", "shape", "colour and shape", "count", "light", "table")}
    for label, said in zip(labels, readings, strict=True):
        middles = [(float(c.float().mean()), float(r.float().mean())) for o in said.objects for r, c in [o.mask.nonzero().T]]
        for thing in label["objects"]:
            distances = [np.hypot(x - thing["at"][0], y - thing["at"][1]) for x, y in middles]
            nearest = int(np.argmin(distances)) if distances and min(distances) <= NEAR else None
            for name in ("colour", "shape"):
                if thing[name] is not None:
                    agree = nearest is not None and getattr(said.objects[nearest], name) == thing[name]
                    found[name].append(agree)
                    found["colour and shape"].append(agree)
        if not label["torn"]:
            found["count"].append(len(said.objects) == len(label["objects"]))
        for name in ("light", "table"):
            if label[name] is not None:
                found[name].append(getattr(said, name) == label[name])
    return found


def main() -> None:
    labels, pictures = labelled()
    readings = read(pictures)
    for name, rows in agreements(labels, readings).items():
        row = share(sum(rows), len(rows))
        print(f"{name:<20}{row['right']:>4} of {row['n']:<4}{row['share']:>7.1%}   95 % in {row['low']:.1%} .. {row['high']:.1%}")
    if "--all" in sys.argv:
        for i, (label, said) in enumerate(zip(labels, readings)):
            rows = agreements([label], [said])
            if not all(all(r) for r in rows.values()):
                wrong = [name for name, row in rows.items() if not all(row)]
                print(i, wrong, "read:", [(o.colour, o.shape, o.box) for o in said.objects], "seen:", [tuple(t.values()) for t in label["objects"]])


if __name__ == "__main__":
    main()
