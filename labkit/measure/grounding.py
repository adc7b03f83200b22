"""Grounding: does a word's attention lie on its object? Every head of every layer at every step, against exact masks.

    A[step, layer, head, place, word]   the share of attention, as a map of scores      M   the pixels of the word's objects
    AP  = sum over thresholds of (recall_k - recall_{k-1}) precision_k                   of the scores as a detector of M; no threshold to choose
    IoU = |{m > tau max(m)} and M| / |{m > tau max(m)} or M|                             tau chosen on other scenes than it is reported on

Two protocols. *Forced* (teacher-forced): a rendered scene with its true caption is noised to each step's level, eps is guessed once; the masks
are exact. *Free*: the picture is drawn from the caption, and the verifier (labkit.scenes.verify) says where the described object is; its own error
is published in the model card. A word whose object is not found in the picture is counted as not drawn and has no score.

Beside the single heads stand the ways of averaging them (METHODS): the mean over everything, middle block included, the two papers', that over the second half of the steps, and
it spread by self-attention, since places that look at each other belong together (Wang et al. 2023, arXiv:2309.02773):

    m' = S m - min(S m),    S = mean self-attention of the finest layers, second half of the steps

And what a map must beat (BASELINES): the same everywhere, the middle of the picture, the start token, another word, the same network
before any training. Tang et al. 2023 (DAAM) and Marcos-Manchon et al. 2024 (OVAM) report the mean IoU of such maps on pictures whose masks
were drawn by hand.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from labkit.device import Noise
from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.models.unet import UNet
from labkit.probes.sites import aspect, level, named
from labkit.probes.words import words
from labkit.scenes import verify
from labkit.scenes.captions import Caption, caption
from labkit.scenes.render import render
from labkit.scenes.scene import Scene, scene_from_seed
from labkit.schedule import q_sample
from labkit.tap import listen

PROTOCOLS = ("forced", "free")
KINDS = ("shape", "colour", "size", "material", "relation")  # of words that speak of objects
FIRST_SEED = 30_000_000  # no training begins here; faithfulness.py takes the same scenes
SIDE = 32  # maps and masks are compared at SIDE x SIDE: a cell is 4x4 pixels of a tabletop picture, the finest maps have 16x16
TAUS = tuple(round(0.05 * k, 2) for k in range(1, 20))
METHODS = ("mean", "prompt_to_prompt", "daam", "late steps", "spread")
BASELINES = ("uniform", "centre", "start token", "another word", "untrained")

Maps = dict[str, Tensor]  # layer -> (step, head, y, x, token); where each place looks in the picture at layer SELF
SELF = "self-attention, finest layers"


@dataclass(frozen=True)
class Plan:
    """What is measured: so many scenes of one or two objects, by a protocol, at so many noise levels."""

    scenes: int = 500
    protocol: str = "forced"
    steps: int = 10
    guidance: float | None = None


@dataclass(frozen=True)
class Target:
    """A word of a caption: its kind, its token positions, the objects it speaks of."""

    text: str
    kind: str
    tokens: tuple[int, ...]
    objects: tuple[int, ...]


def one_scene(lab: LatentDiffusion, untrained: UNet, plan: Plan, seed: int) -> dict:
    """All scores of one scene: "words" [{text, kind, drawn, ...}], and for those drawn "head_ap" (word, step, layer, head) and so on, float16.

    "method_ap" (word, method) and "method_iou" (word, method, tau) stand in the order METHODS + BASELINES; "share" and "right" are the
    binding of a colour (`binding`). `untrained` is a network of the same configuration with random weights.
    """
    scene, said = told(seed)
    targets = targets_of(lab, said)
    if plan.protocol == "forced":
        truth, seen = render(scene), None
        masks = list(truth.masks[0] > 0.5)  # of each object (H, W)
        z = lab.encode_image(truth.image)  # (1, 4, h, w)
        maps = noised(lab, lab.unet, z, said.text, plan, seed)
    else:
        z, maps = drawn(lab, said.text, plan, seed)
        seen = verify.read(lab.decode(z).cpu())[0]
        masks = [found(seen, obj) for obj in scene.objects]  # None where it was not drawn
    maps_untrained = noised(lab, untrained, z, said.text, plan, seed)
    rows, head_ap, head_iou, method_ap, method_iou = [], [], [], [], []
    for target in targets:
        mine = [masks[k] for k in target.objects]
        row = {"text": target.text, "kind": target.kind, "objects": len(scene.objects), "drawn": all(m is not None for m in mine)}
        rows.append(row | bound(maps, target, targets, masks, scene, seen))
        if not row["drawn"]:
            continue
        mask = shrunk(torch.stack(mine).any(0))  # (SIDE, SIDE)
        scores = of_word(maps, target.tokens)  # (step, layer, head, SIDE, SIDE)
        head_ap.append(average_precision(scores, mask))
        head_iou.append(ious(scores, mask))
        ways = torch.stack([*methods(lab, maps, target.tokens), *baselines(maps, target, targets, maps_untrained)])
        method_ap.append(average_precision(ways, mask))
        method_iou.append(ious(ways, mask))
    empty = torch.zeros(0)
    pack = lambda parts: (torch.stack(parts) if parts else empty).half()  # noqa: E731
    return {"words": rows, "head_ap": pack(head_ap), "head_iou": pack(head_iou), "method_ap": pack(method_ap), "method_iou": pack(method_iou),
            "layers": [layer for layer in maps if layer != SELF], "objects": len(scene.objects)}  # fmt: skip


def told(seed: int) -> tuple[Scene, Caption]:
    """A scene that no training has seen, of one object or two, and a true caption of it that names colour and shape of each."""
    scene = scene_from_seed(seed, counts=(1, 2))
    for attempt in range(100):
        said = caption(scene, np.random.default_rng([seed, attempt]), "medium")
        spoken = [{w.kind for w in said.words if w.objects == (k,)} for k in range(len(scene.objects))]
        if all({"shape", "colour"} <= kinds for kinds in spoken):
            return scene, said
    raise LabkitError(f"No caption of scene {seed} names colour and shape of every object.")


def targets_of(lab: LatentDiffusion, said: Caption) -> list[Target]:
    """The words of a caption that speak of objects, where the text encoder has them."""
    spans = {span.start: span for span in words(lab.texts[0][1], said.text)}
    return [Target(w.text, w.kind, spans[w.start].tokens, w.objects) for w in said.words if w.kind in KINDS and w.objects and w.start in spans]


# --- maps ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def noised(lab: LatentDiffusion, unet: UNet, z: Tensor, text: str, plan: Plan, seed: int) -> Maps:
    """Attention of one guess at each of the steps' noise levels, of a picture's latents z (1, 4, h, w)."""
    t = lab.schedule.timesteps(plan.steps)
    eps = Noise([seed], tuple(z.shape[1:])).draw().to(z)
    x_t = q_sample(z.expand(len(t), -1, -1, -1), t, eps.expand(len(t), -1, -1, -1), lab.schedule).to(lab.dtype)
    size, heard = tuple(z.shape[2:]), Heard()
    with listen(unet, heard.listeners(lambda probs: (probs, size))):
        unet(x_t, t.to(lab.device), lab.encode_text([text] * len(t)))
    return heard.maps()


def drawn(lab: LatentDiffusion, text: str, plan: Plan, seed: int) -> tuple[Tensor, Maps]:
    """The latents of a picture drawn from a caption, (1, 4, h, w), and the conditional branch's attention at each step."""
    heard = Heard()

    def cond(probs: Tensor) -> tuple[Tensor, tuple[int, int]]:
        row = lab.layout.branches.index("cond")
        return probs[row : row + 1], lab.layout.size

    with listen(lab.unet, heard.listeners(cond)):
        *_, last = lab.steps(text, steps=plan.steps, guidance=plan.guidance, seed=seed)
    return last.x, heard.maps()


class Heard:
    """Attention as it comes: of text head by head, of the picture's places to each other as means over heads and the finest layers."""

    def __init__(self) -> None:
        self.cross: dict[str, list[Tensor]] = {}
        self.own: dict[str, list[Tensor]] = {}

    def listeners(self, rows) -> dict:
        """For `listen`; `rows(probs)` are those of the run's picture, and the size of its latents."""

        def cross(probs: Tensor, name: str) -> None:
            self.cross.setdefault(name.removesuffix(".probs"), []).append(placed(*rows(probs)))

        def own(probs: Tensor, name: str) -> None:
            mine, (h, w) = rows(probs)
            if mine.shape[2] == h * w:
                self.own.setdefault(name, []).append(mine.float().mean(1).cpu())  # (row, place, place)

        return {"*.attn2.probs": cross, "*.attn1.probs": own}

    def maps(self) -> Maps:
        whole = {layer: torch.cat(steps) for layer, steps in self.cross.items()}
        return whole | ({SELF: mean_of([torch.cat(steps) for steps in self.own.values()])} if self.own else {})


def placed(probs: Tensor, size: tuple[int, int]) -> Tensor:
    """(rows, heads, N, tokens) as (row, head, y, x, token), float32 on the CPU, for latents of `size` (h, w)."""
    y, _ = aspect(probs.shape[2], *size)
    return rearrange(probs.float().cpu(), "row head (y x) token -> row head y x token", y=y)


def of_word(maps: Maps, tokens: tuple[int, ...]) -> Tensor:
    """A word's share in each head, all layers at one size: (step, layer, head, SIDE, SIDE)."""
    return torch.stack([enlarged(share) for share in shares(maps, tokens).values()], dim=1)


def shares(maps: Maps, tokens: tuple[int, ...]) -> Maps:
    """A word's share by layer, (step, head, y, x)."""
    return {layer: m[..., list(tokens)].sum(-1) for layer, m in maps.items() if layer != SELF}


def average(maps: Maps, tokens: tuple[int, ...]) -> Tensor:
    """The mean over steps, heads and layers, (SIDE, SIDE)."""
    return mean_of([enlarged(share.mean((0, 1))) for share in shares(maps, tokens).values()])


def enlarged(m: Tensor, size: tuple[int, int] = (SIDE, SIDE), mode: str = "bilinear") -> Tensor:
    """Maps (..., y, x) at another size."""
    flat = m.reshape(-1, 1, *m.shape[-2:])
    return F.interpolate(flat, size=size, mode=mode).reshape(*m.shape[:-2], *size)


def methods(lab: LatentDiffusion, maps: Maps, tokens: tuple[int, ...]) -> list[Tensor]:
    """One map (SIDE, SIDE) for each of METHODS, over the steps given: our mean over all; the two papers'; two that leave out what is worst."""
    share, depth = shares(maps, tokens), len(lab.unet.config.block_out_channels)
    outer = named(tuple(share), ("up", "down"))
    finest = min(level(layer, depth) for layer in outer)
    of_finest = [share[layer].mean((0, 1)) for layer in outer if level(layer, depth) == finest]
    daam = [enlarged(share[layer].sum(0), mode="bicubic").clamp(min=0).mean(0) for layer in outer]  # cut head by head, then averaged, as there
    late = {layer: m[len(m) // 2 :].mean((0, 1)) for layer, m in share.items()}  # (y, x)
    whole = mean_of([enlarged(m) for m in late.values()])
    return [average(maps, tokens), enlarged(mean_of(of_finest)), mean_of(daam), whole, spread(maps, late) if SELF in maps else whole]


def spread(maps: Maps, late: Maps) -> Tensor:
    """The mean of maps (y, x), spread by the self-attention of the second half of the steps, less its minimum: (SIDE, SIDE)."""
    S = maps[SELF][len(maps[SELF]) // 2 :].mean(0)  # (N, N); rows add up to 1
    size = next(tuple(m.shape) for m in late.values() if m.numel() == len(S))
    m = (S @ mean_of([enlarged(m, size) for m in late.values()]).flatten()).view(size)
    return enlarged(m - m.min())


def baselines(maps: Maps, target: Target, targets: list[Target], maps_untrained: Maps) -> list[Tensor]:
    """One map (SIDE, SIDE) for each of BASELINES; NaN where a caption has no word that speaks of another object."""
    at = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    nothing = torch.full((SIDE, SIDE), torch.nan)
    others = [one for one in targets if not set(one.objects) & set(target.objects)]
    return [
        torch.ones(SIDE, SIDE),
        torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 0.25**2)),
        average(maps, (0,)),
        average(maps, others[0].tokens) if others else nothing,
        average(maps_untrained, target.tokens),
    ]


def mean_of(maps: list[Tensor]) -> Tensor:
    return torch.stack(maps).mean(0)


def shrunk(mask: Tensor) -> Tensor:
    """A mask (H, W) at SIDE x SIDE: where it covers more than half; at least its fullest place."""
    share = F.interpolate(mask[None, None].float(), size=(SIDE, SIDE), mode="area")[0, 0]
    return (share > 0.5) | (share == share.max())


# --- scores -------------------------------------------------------------------------------------------------------


def average_precision(scores: Tensor, mask: Tensor) -> Tensor:
    """AP of maps (..., h, w) as detectors of a mask (h, w): (...), from 0 to 1; NaN of maps with NaN.

    Places of equal score are found together, so that a constant map has the mask's share of the picture, whatever the order.
    """
    flat, truth = scores.flatten(-2), mask.flatten()
    values, order = flat.sort(dim=-1, descending=True)
    hits = truth[order].float().cumsum(-1)  # (..., P)
    ends = torch.ones_like(values, dtype=torch.bool)
    ends[..., :-1] = values[..., :-1] != values[..., 1:]  # the last of each group of equal scores
    precision = hits / torch.arange(1, values.shape[-1] + 1)
    found = torch.where(ends, hits, 0.0).cummax(-1).values  # hits up to the last whole group
    gain = found - F.pad(found, (1, 0))[..., :-1]
    ap = (gain * precision).sum(-1) / truth.sum()
    return ap.where(~flat.isnan().any(-1), torch.nan)


def ious(scores: Tensor, mask: Tensor, taus: tuple[float, ...] = TAUS) -> Tensor:
    """IoU of maps (..., h, w), cut at each tau times their maximum, with a mask (h, w): (..., tau); NaN of maps with NaN."""
    flat, truth = scores.flatten(-2), mask.flatten()
    top = flat.amax(-1, keepdim=True)
    found = []
    for tau in taus:
        inside = flat > tau * top
        both = (inside & truth).sum(-1)
        found.append(both / (inside.sum(-1) + truth.sum() - both))
    return torch.stack(found, dim=-1).where(~flat.isnan().any(-1)[..., None], torch.nan)


# --- binding ------------------------------------------------------------------------------------------------------


def bound(maps: Maps, target: Target, targets: list[Target], masks: list, scene: Scene, seen) -> dict:
    """Binding of a colour in a scene of two objects: the share of its attention on its own noun's object, and whether that came out in its colour.

        share = a_own / (a_own + a_other),   a = the mean of the word's map over an object's mask

    1/2 is no preference. Empty where it is not a colour of one of two objects of different shape and colour that both have masks. Drawn
    pictures (`seen`) are read by shape alone, so that an object in the wrong colour is its noun's object all the same.
    """
    if target.kind != "colour" or len(scene.objects) != 2 or len(target.objects) != 1:
        return {}
    k = target.objects[0]
    own, other = scene.objects[k], scene.objects[1 - k]
    if own.shape == other.shape or own.colour == other.colour:
        return {}
    right = None
    if seen is not None:
        by_shape = [[one for one in seen.objects if one.shape == obj.shape] for obj in (own, other)]
        if len(seen.objects) != 2 or [len(one) for one in by_shape] != [1, 1]:
            return {}
        masks = {k: by_shape[0][0].mask, 1 - k: by_shape[1][0].mask}
        right = by_shape[0][0].colour == own.colour
    scores = average(maps, target.tokens)
    here, there = (float(scores[shrunk(masks[j])].mean()) for j in (k, 1 - k))
    return {"share": here / (here + there), "right": right}


def found(seen, obj) -> Tensor | None:
    """The mask (H, W) of what was read as this object: its shape and colour; of several all together, of none None."""
    masks = [one.mask for one in seen.objects if (one.shape, one.colour) == (obj.shape, obj.colour)]
    return torch.stack(masks).any(0) if masks else None
