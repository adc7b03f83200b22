"""Is a head's map an explanation? Whether how well it lies on its object predicts what the network loses without the head.

    IoU_h   = |map_h above the middle of its range  and  mask| / |either|               mean over scenes, noun words and noise levels
    cost_h  = mean over the objects' places of (eps - eps_hat without h)^2, over that of the whole network, less 1
    rho     = Spearman's rank correlation of IoU_h and cost_h over all heads h          and of size_h and cost_h, as a control

Teacher-forced: a rendered scene, whose masks are exact, is noised at some levels, and the network is asked once at each, with the true
caption and without guidance. size_h is the root mean square of what head h hands on: a head that says much may cost much wherever it looks.
Intervals are 95 % of 1000 correlations over scenes drawn again with replacement; the heads stay the same, so they speak of this
network and not of networks. Jain & Wallace 2019, "Attention is not Explanation", asked the question of text.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from labkit.device import Noise
from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.measure.grounding import targets_of
from labkit.probes.intervene import PATTERNS, Where, ablate
from labkit.probes.sites import aspect, short
from labkit.scenes.captions import describe
from labkit.scenes.render import render
from labkit.scenes.scene import scene_from_seed
from labkit.schedule import eps_prediction, q_sample
from labkit.tap import listen, taps

FIRST_SEED = 30_000_000  # scenes that nothing was trained on; those of grounding.py too
DRAWS = 1000  # of the bootstrap
SIDE = 32  # places a side at which maps and masks are compared


@dataclass(frozen=True)
class Plan:
    """What is measured: so many scenes of one or two objects, at these timesteps, heads set to "zero" or to their "mean" over places."""

    scenes: int = 60
    t: tuple[int, ...] = (750, 500, 250)
    by: str = "zero"
    batch: int = 20

    def __post_init__(self) -> None:
        if self.scenes < 2 or self.batch < 1 or not self.t:
            raise LabkitError(f"{self.scenes} scenes in batches of {self.batch} at {len(self.t)} timesteps: give two scenes or more, and one timestep at least.")


@dataclass(frozen=True, eq=False)
class Batch:
    """Some scenes, noised: x_t = q(x0, t, eps); `masks` (B, h, w) of all objects at the latents' places; `nouns[i]`: (tokens, mask (SIDE, SIDE)) of scene i."""

    x0: Tensor
    eps: Tensor
    c: Tensor
    masks: Tensor
    nouns: list[list[tuple[list[int], Tensor]]]


@dataclass(frozen=True, eq=False)
class Measured:
    """`iou`, `size` and `cost`, each (scene, head), for `heads` named as "up.1.1.0 head 2"; cost relative to the whole network's error."""

    heads: tuple[str, ...]
    iou: Tensor
    size: Tensor
    cost: Tensor


# --- one network, many scenes -------------------------------------------------------------------------------------


def measure(lab: LatentDiffusion, plan: Plan = Plan(), progress: bool = True) -> Measured:
    """IoU, size and cost of every head of cross-attention. Raises LabkitError if the model does not know the captions' words."""
    layers = [tap.rpartition(".")[0] for tap in taps(lab.unet, PATTERNS["heads"])]
    heads = [(layer, head) for layer in layers for head in range(lab.unet.get_submodule(layer).num_heads)]
    eps_of = eps_prediction(lab.unet, lab.schedule)
    parts = []
    starts = range(0, plan.scenes, plan.batch)
    with tqdm(total=len(starts) * len(plan.t) * len(heads), desc="heads", disable=not progress) as bar, torch.no_grad():
        for start in starts:
            batch = prepared(lab, FIRST_SEED + start, min(plan.batch, plan.scenes - start))
            found = [at_level(lab, batch, t, (heads, plan.by), lambda x_t, t: eps_of(x_t, t, batch.c), bar) for t in plan.t]
            parts.append(torch.stack(found).mean(0))  # (3, scene, head)
    iou, size, cost = torch.cat(parts, dim=1)
    return Measured(tuple(f"{short(layer)} head {head}" for layer, head in heads), iou, size, cost)


def prepared(lab: LatentDiffusion, first: int, count: int) -> Batch:
    """Scenes of `count` seeds from `first` on, rendered, encoded and described."""
    scenes = [scene_from_seed(seed, counts=(1, 2)) for seed in range(first, first + count)]
    f = lab.vae.config.factor
    rendered = render(scenes, size=lab.unet.config.sample_size * f)
    x0 = lab.encode_image(rendered.image)  # (B, 4, h, w)
    captions = [describe(scene) for scene in scenes]
    nouns = []
    for caption, masks in zip(captions, rendered.masks):  # masks: (K, H, W)
        said = [(list(noun.tokens), masks[list(noun.objects)].sum(0)) for noun in targets_of(lab, caption) if noun.kind == "shape"]
        nouns.append([(tokens, F.adaptive_avg_pool2d(mask[None], SIDE)[0] > 0.5) for tokens, mask in said])
    covered = F.adaptive_avg_pool2d(rendered.masks.sum(1), x0.shape[-2:]).clamp(0, 1).to(x0)  # (B, h, w)
    eps = Noise(range(first, first + count), tuple(x0.shape[1:])).draw().to(x0)
    return Batch(x0, eps, lab.encode_text([caption.text for caption in captions]), covered, nouns)


def at_level(lab: LatentDiffusion, batch: Batch, t: int, taken: tuple[list[tuple[str, int]], str], eps_hat: Callable, bar) -> Tensor:
    """IoU, size and cost at one noise level, (3, scene, head); heads taken out one by one."""
    (heads, by), maps, sizes = taken, {}, {}
    x_t = q_sample(batch.x0, t, batch.eps, lab.schedule).to(lab.dtype)

    def seen(x: Tensor, tap: str) -> None:
        layer, last = tap.rsplit(".", 1)
        (maps if last == "probs" else sizes)[layer] = x.float().cpu()

    with listen(lab.unet, {PATTERNS["cross"]: seen, PATTERNS["heads"]: seen}):
        whole = error(eps_hat(x_t, t), batch)  # (B,)
    rows = []
    for layer, head in heads:
        with ablate(lab, Where("heads", layers=layer, heads=head), by):
            cost = error(eps_hat(x_t, t), batch) / whole - 1
        share, h = maps[layer][:, head], batch.x0.shape[-2]  # (B, N, L)
        shape = aspect(share.shape[1], h, batch.x0.shape[-1])
        iou = torch.stack([mean_iou(one.view(*shape, -1), nouns) for one, nouns in zip(share, batch.nouns)])
        size = sizes[layer][:, head].square().mean((1, 2)).sqrt()  # (B,)
        rows.append(torch.stack([iou, size, cost.cpu()]))
        bar.update()
    return torch.stack(rows, dim=-1)  # (3, scene, head)


def error(eps_hat: Tensor, batch: Batch) -> Tensor:
    """The squared error of each scene's noise, mean over channels and over the places of its objects, (B,)."""
    wrong = (eps_hat.float() - batch.eps).square().mean(1)  # (B, h, w)
    return (wrong * batch.masks).sum((1, 2)) / batch.masks.sum((1, 2))


def mean_iou(share: Tensor, nouns: list[tuple[list[int], Tensor]]) -> Tensor:
    """Mean over a scene's nouns of the IoU of their map, (y, x, token) summed over the noun's tokens, with their object."""
    return torch.stack([iou(share[..., tokens].sum(-1), mask) for tokens, mask in nouns]).mean()


def iou(m: Tensor, mask: Tensor) -> Tensor:
    """|m > (min + max) / 2 and mask| / |either|: a map (y, x), enlarged bilinearly to the mask's places."""
    m = F.interpolate(m[None, None], size=mask.shape, mode="bilinear", align_corners=False)[0, 0]
    inside = m > (m.min() + m.max()) / 2
    either = (inside | mask).sum()
    return (inside & mask).sum() / either.clamp(min=1)


# --- correlation --------------------------------------------------------------------------------------------------


def spearman(a: Tensor, b: Tensor) -> float:
    """The correlation of the ranks of two sequences; equal values share the mean of their ranks. 0 where one of them is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    length = (x.norm() * y.norm()).item()
    return float((x * y).sum() / length) if length else 0.0


def ranks(a: Tensor) -> Tensor:
    """Ranks from 1, (n,) float64; of equal values the mean."""
    _, place, count = a.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[place]


def correlated(predictor: Tensor, cost: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rho over heads of the means over scenes of two (scene, head) tables, and its 95 % bootstrap interval over scenes."""
    generator, n = torch.Generator().manual_seed(seed), len(cost)
    drawn = [torch.randint(n, (n,), generator=generator) for _ in range(DRAWS)]
    again = torch.tensor([spearman(predictor[i].mean(0), cost[i].mean(0)) for i in drawn], dtype=torch.float64)
    low, high = torch.quantile(again, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return spearman(predictor.mean(0), cost.mean(0)), low, high


def run(lab: LatentDiffusion, out: str | Path, plan: Plan = Plan(), progress: bool = True) -> dict:
    """Measure, and leave faithfulness.json, .txt and .png in `out`; the figures as a dict. Raises LabkitError."""
    from labkit.plots import save, scatter, write

    found = measure(lab, plan, progress)
    rho = {name: correlated(getattr(found, name), found.cost) for name in ("iou", "size")}
    heads = [{"head": name, **{what: float(getattr(found, what)[:, i].mean()) for what in ("iou", "size", "cost")}} for i, name in enumerate(found.heads)]
    result = {"model": lab.name, "plan": asdict(plan), "spearman with cost, and its 95 % interval": rho, "heads": heads}
    write(Path(out) / "faithfulness.json", json.dumps(result, indent=1) + "\n")
    write(Path(out) / "faithfulness.txt", table(result) + "\n")
    groups = [head.split(" head")[0] for head in found.heads]
    said = f"rank correlation {rho['iou'][0]:+.2f} [{rho['iou'][1]:+.2f}, {rho['iou'][2]:+.2f}]"
    figure = scatter(found.iou.mean(0), found.cost.mean(0), groups, ("IoU of the head's noun maps with the objects", "error added without the head"), f"Do maps explain? {said}")
    save(figure, Path(out) / "faithfulness.png")
    return result


def table(result: dict) -> str:
    """What was found, in lines: the correlations, and the heads from dearest to cheapest."""
    lines = [f"rank correlation with what a head costs, over {len(result['heads'])} heads, 95 % over {result['plan']['scenes']} scenes"]
    for name, about in (("iou", "IoU of its maps"), ("size", "size of its output")):
        rho, low, high = result["spearman with cost, and its 95 % interval"][name]
        lines.append(f"  {about:20} {rho:+.2f}  [{low:+.2f}, {high:+.2f}]")
    lines.append(f"  {'head':20}  IoU    size    cost")
    for head in sorted(result["heads"], key=lambda head: -head["cost"]):
        lines.append(f"  {head['head']:20} {head['iou']:5.3f}  {head['size']:6.3f}  {head['cost']:+.1%}")
    return "\n".join(lines)
