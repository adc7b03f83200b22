"""Training of the judge of generated pictures (scenes/verify.py) on renders, and the measure of its own error.

    L = sum_a CE(head_a(h(x)), a(scene)),   a = count, colour, shape, size, material, table, light

What it will see is not renders but what a decoder made of latents: softer, with small errors in patches and in tint. So half
of the training pictures are blurred, and all get noise at several scales, and a little gain, tint and shift. Unlike the
diffusion model the judge is shown the held-out combination: a judge that never saw a purple cone would call it something else.
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from labkit.errors import LabkitError
from labkit.models.sources import write_sums
from labkit.scenes.scene import Scene, scene_from_seed
from labkit.scenes.verify import ATTRIBUTES, SIDE, WEIGHTS, Classifier, share, shrink
from labkit.training.data import TEST_SEED, World, renders, scenes
from labkit.training.loop import LoopConfig, Player, Recipe, Share, run

CONFIG = LoopConfig(steps=2000, batch_size=64, lr=3e-3, warmup=60, cooldown=0.7, weight_decay=0.05, ema_decay=0.99, save_every=50)
PICTURES, HELD_OUT, TEST = 11_000, 300, 1000  # scenes of the training world; purple cones, as many as of every other pair; scenes to test on
HELD_OUT_TEST = 200  # purple cones to test on; theirs are the seeds from TEST_SEED on, the training ones come just before
BLURS = (SIDE, 44, 30, 22)  # the side that pictures are brought down to and up again, one quarter of a batch each
UNKNOWN = -100  # of a scene with several objects: there is no one colour; cross_entropy leaves it out


@dataclass(frozen=True)
class HeldOut:
    """The combination that training leaves out, purple cones, as a world that `renders` can draw."""

    counts: tuple[int, ...] = (1,)
    styles: tuple[str, ...] = ("photo",)

    def scene(self, seed: int) -> Scene:
        return scene_from_seed(seed, counts=self.counts, styles=self.styles, held_out="only")


class Judgement(nn.Module):
    """The objective: cross entropy of all heads, and the share of objects with colour and shape both right."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, batch: dict) -> dict[str, Tensor]:
        logits, labels = self.classifier(batch["image"]), batch["labels"]  # labels (B, number of attributes)
        losses = {name: F.cross_entropy(logits[name].float(), labels[:, i], ignore_index=UNKNOWN) for i, name in enumerate(ATTRIBUTES)}
        one = labels[:, 0] == 0
        right = torch.stack([logits[name].argmax(1) == labels[:, i] for i, name in enumerate(ATTRIBUTES) if name in ("colour", "shape")])
        return {"loss": sum(losses.values()), "right": right.all(0)[one].float().mean(), **losses}


def labels(of: list[Scene]) -> Tensor:
    """Index of the true value of every attribute: (N, number of attributes), UNKNOWN where there are several objects."""
    def row(scene: Scene) -> list[int]:
        known = {"count": "one" if len(scene.objects) == 1 else "several", "table": scene.table, "light": scene.light}
        if len(scene.objects) == 1:
            known |= {name: getattr(scene.objects[0], name) for name in ("colour", "shape", "size", "material")}
        return [values.index(known[name]) if name in known else UNKNOWN for name, values in ATTRIBUTES.items()]

    return torch.tensor([row(scene) for scene in of])


def small(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) -> uint8 (N, 64, 64, 3), as the judge will see them."""
    parts = [(shrink(images[i : i + 500]) * 255).round().byte().permute(0, 2, 3, 1) for i in range(0, len(images), 500)]
    return torch.cat(parts).numpy()


def blur(x: Tensor, side: int) -> Tensor:
    """Down to side x side and up again: (B, 3, 64, 64)."""
    return F.interpolate(F.interpolate(x, size=(side, side), mode="area"), size=x.shape[-2:], mode="bilinear")


def spoil(x: Tensor, g: torch.Generator) -> Tensor:
    """What generation may do to a picture: (B, 3, 64, 64) in [0, 1], before and after; the subject stays what it was."""
    B = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g)

    x = x.flip(3) if torch.rand((), generator=g) < 0.5 else x
    dy, dx = torch.randint(0, 9, (2,), generator=g).tolist()
    x = F.pad(x, (4, 4, 4, 4), mode="replicate")[..., dy : dy + SIDE, dx : dx + SIDE]
    x = torch.cat([blur(part, side) if side < SIDE else part for part, side in zip(x.chunk(len(BLURS)), BLURS)])
    for side, most in ((SIDE, 0.05), (32, 0.05), (8, 0.04)):  # grain, the decoder's patches, and blotches of wrong tint
        noise = F.interpolate(uniform(-1.7, 1.7, B, 3, side, side), size=(SIDE, SIDE), mode="nearest" if side == SIDE else "bilinear")
        x = x + uniform(0, most, B, 1, 1, 1) * noise
    gain, tint, lift = uniform(0.85, 1.15, B, 1, 1, 1), uniform(0.95, 1.05, B, 3, 1, 1), uniform(-0.05, 0.05, B, 1, 1, 1)
    return (x * gain * tint + lift).clamp(0, 1)


def recipe(classifier: Classifier, images: np.ndarray, labels: Tensor) -> Recipe:
    """Pictures (N, 64, 64, 3) uint8 and the indices of their attributes (N, number of attributes)."""

    def batch(step: int, share: Share) -> dict:
        g = share.generator(step)
        index = torch.randint(len(images), (share.batch_size,), generator=g)
        x = torch.from_numpy(images[index.numpy()]).permute(0, 3, 1, 2).float() / 255
        return {"image": share.mine(spoil(x, g)), "labels": share.mine(labels[index])}

    return Recipe([Player("verifier", Judgement(classifier), {"classifier": classifier})], batch)


def main(folder: str | Path = "runs/tabletop", target: str | Path = WEIGHTS, config: LoopConfig = CONFIG, pictures: int = PICTURES,
         test_pictures: int = TEST, device: str | None = "cpu") -> dict:
    """Train the judge in folder/verifier, measure it on renders it never saw, write it to `target`; the measured errors."""
    folder = Path(folder)
    if folder.is_file():
        raise LabkitError(f"{folder} is a file; name a folder to train in")
    torch.manual_seed(config.seed)
    cones = renders(HeldOut(), TEST_SEED - HELD_OUT, HELD_OUT + HELD_OUT_TEST, folder / "data" / "held-out", workers=1)
    images = np.concatenate([small(renders(World(), 0, pictures, folder / "data")), small(cones[:HELD_OUT])])
    truth = labels(scenes(World(), 0, pictures) + scenes(HeldOut(), TEST_SEED - HELD_OUT, HELD_OUT))
    classifier = run(recipe(Classifier(), images, truth), config, folder / "verifier", device)["classifier"].cpu()
    test = renders(World(), TEST_SEED, test_pictures, folder / "data"), labels(scenes(World(), TEST_SEED, test_pictures))
    figures = errors(classifier, *test) | {
        f"held-out {name}": row for name, row in errors(classifier, cones[HELD_OUT:], labels(scenes(HeldOut(), TEST_SEED, HELD_OUT_TEST))).items()}
    save(classifier, target, {"pictures": len(images), "steps": config.steps, "batch_size": config.batch_size, "errors": figures})
    return figures


def errors(classifier: Classifier, images: np.ndarray, truth: Tensor) -> dict:
    """The judge's hits on renders, clean and blurred; all attributes on those with one object, the count on all."""
    x, one, found = shrink(images), truth[:, 0] == 0, {}
    for side in (SIDE, *BLURS[2:]):
        name = "renders" if side == SIDE else f"renders, blurred to {side}x{side}"
        spoiled = x if side == SIDE else blur(x, side)
        found[name] = hits(classifier, spoiled[one], truth[one]) | {"count": hits(classifier, spoiled, truth)["count"]}
    return found


@torch.no_grad()
def hits(classifier: Classifier, x: Tensor, truth: Tensor) -> dict:
    """Of pictures (N, 3, 64, 64): how often each attribute, and colour and shape together, is right, with 95 % intervals."""
    device = next(classifier.parameters()).device
    logits = [classifier(part.to(device)) for part in x.split(100)]
    right = {name: torch.cat([part[name] for part in logits]).argmax(1).cpu() == truth[:, i] for i, name in enumerate(ATTRIBUTES)}
    right = {"colour and shape": right["colour"] & right["shape"], **right}
    return {name: share(int(row.sum()), len(row)) for name, row in right.items()}


def save(classifier: Classifier, target: str | Path, about: dict) -> None:
    """Write model.safetensors (float16) and config.json, each whole or not at all."""
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() if value.is_floating_point() else value for name, value in classifier.state_dict().items()}
    save_file(state, target / "model.safetensors.tmp", metadata={"format": "pt"})
    config = {"widths": classifier.widths, "attributes": ATTRIBUTES, "side": SIDE, **about}
    (target / "config.json.tmp").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for name in ("model.safetensors", "config.json"):
        os.replace(target / f"{name}.tmp", target / name)
    write_sums(target)
