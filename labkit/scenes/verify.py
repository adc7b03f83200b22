"""A judge of pictures with one object: which colour, shape, size and material it has, on what table, in what light.

    p_a(value | picture) = softmax(W_a h(picture))_value,   one trunk h, one linear head for each attribute a

Generated pictures are counted right or wrong by it, as GenEval (Ghosh et al. 2023) does with a detector. Here the judge is
trained on renders, where every answer is known, so that its own error can be stated beside whatever it judges. It reads
the picture at 64x64. Its weights are in data/verifier, written by training/verifier.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.errors import CheckpointError, LabkitError
from labkit.scenes.scene import COLOURS, LIGHTS, MATERIALS, SHAPES, SIZES, TABLES

SIDE = 64  # pixels the judge reads
WEIGHTS = Path(__file__).parents[2] / "data" / "verifier"
ATTRIBUTES = {
    "count": ("one", "several"),  # the other answers are about the object, so they mean something where there is one
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": SIZES,
    "material": MATERIALS,
    "table": TABLES,
    "light": LIGHTS,
}


class Classifier(nn.Module):
    """classifier(image (B, 3, 64, 64) in [0, 1]) -> {attribute: logits (B, number of values)}."""

    def __init__(self, widths: tuple[int, ...] = (24, 40, 64, 96, 128)) -> None:
        super().__init__()
        self.widths = tuple(widths)
        ins = (3, *self.widths[:-1])
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 5 if i == 3 else 3, 2, 2 if i == 3 else 1, bias=False) for i, o in zip(ins, self.widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in self.widths)
        self.mixes = nn.ModuleList(nn.Conv2d(w, w, 3, padding=1, bias=False) for w in self.widths[2:4])
        self.mix_norms = nn.ModuleList(nn.BatchNorm2d(w) for w in self.widths[2:4])
        self.heads = nn.ModuleDict({name: nn.Linear(2 * self.widths[-1], len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        h = (image - 0.5) * 4  # (B, 3, 64, 64)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            h = F.relu(norm(conv(h)))  # (B, widths[i], 32 / 2^i, 32 / 2^i)
            if 2 <= i < 4:
                h = h + F.relu(self.mix_norms[i - 2](self.mixes[i - 2](h)))
        h = torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1)  # (B, 2 widths[-1]); wherever the object stands
        return {name: head(h) for name, head in self.heads.items()}


def load_classifier(folder: str | Path = WEIGHTS) -> Classifier:
    """The trained judge in evaluation mode; CheckpointError if its files are missing or not its own."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["attributes"] != {name: list(values) for name, values in ATTRIBUTES.items()}:
            raise CheckpointError("its attributes are not this version's")
        classifier = Classifier(tuple(config["widths"]))
        state = {name: value.float() if value.is_floating_point() else value for name, value in load_file(folder / "model.safetensors").items()}
        classifier.load_state_dict(state)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: the verifier cannot be opened ({reason}); fetch it again (git checkout)") from error
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def classify(images, classifier: Classifier | None = None, batch_size: int = 64) -> list[dict[str, dict[str, float]]]:
    """What is in each picture: per picture {attribute: {value: probability}}, most probable first.

    images: Tensor (B, 3, H, W) in [0, 1], uint8 array (B, H, W, 3), or PIL pictures of one size (one or a list). Raises LabkitError if
    they are anything else.
    """
    classifier = load_classifier() if classifier is None else classifier
    found = []
    for part in shrink(images).split(batch_size):
        p = {name: logits.float().softmax(1).tolist() for name, logits in classifier(part.to(classifier.convs[0].weight.device)).items()}
        for row in range(len(part)):
            found.append({name: dict(sorted(zip(ATTRIBUTES[name], rows[row]), key=lambda pair: -pair[1])) for name, rows in p.items()})
    return found


def best(found: dict[str, dict[str, float]]) -> dict[str, str]:
    """The most probable value of every attribute of one answer of `classify`."""
    return {name: max(values, key=values.get) for name, values in found.items()}


def share(right: int, n: int, z: float = 1.96) -> dict[str, float]:
    """`right` of n as a share with Wilson's 95 % interval, which also holds near 0 and 1 (Wilson 1927): {right, n, share, low, high}."""
    if not 0 <= right <= n or n == 0:
        raise LabkitError(f"{right} of {n} is not a share; count at least one picture")
    p, extra = right / n, z * z / n
    middle, half = (p + extra / 2) / (1 + extra), z * (p * (1 - p) / n + extra / (4 * n)) ** 0.5 / (1 + extra)
    return {"right": right, "n": n, "share": round(p, 4), "low": round(max(middle - half, 0.0), 4), "high": round(min(middle + half, 1.0), 4)}


def shrink(images) -> Tensor:
    """Pictures as `classify` takes them -> (B, 3, 64, 64) float32 in [0, 1], by averaging over areas."""
    pixels = _pixels(images)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape) < 1:
        raise LabkitError(f"the pictures are {tuple(pixels.shape)}; give (B, 3, H, W) in [0, 1], uint8 (B, H, W, 3), or PIL pictures")
    if not bool(pixels.isfinite().all()) or pixels.min() < -1e-3 or pixels.max() > 1 + 1e-3:
        raise LabkitError("the pictures have values outside [0, 1]; pictures in [-1, 1] become x / 2 + 0.5")
    return F.interpolate(pixels, size=(SIDE, SIDE), mode="area") if pixels.shape[-2:] != (SIDE, SIDE) else pixels


def _pixels(images) -> Tensor:
    import numpy as np

    if isinstance(images, Tensor):
        return images.float()
    if hasattr(images, "convert"):
        images = [images]
    if isinstance(images, Sequence) and images and all(hasattr(image, "convert") for image in images):
        if len({image.size for image in images}) > 1:
            raise LabkitError("the pictures differ in size; classify one size at a time")
        images = np.stack([np.asarray(image.convert("RGB")) for image in images])
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        raise LabkitError("there are no pictures; give (B, 3, H, W) in [0, 1], uint8 (B, H, W, 3), or PIL pictures")
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
