"""Edits against the true counterfactual: does the change happen, does the rest stay, and is it the change that it should be?

    success   verified: the reader sees in the edited picture what the changed scene has (edit_cases.verified)
    outside   PSNR(edited, source picture) where the two renders agree                        how much of the rest stayed
    inside    PSNR(edited, render(changed scene)) where the renders differ                    how near the truth it came

Three protocols. *Inverted* and *noised* are teacher-forced: the source is a render with its true caption, and region and counterfactual are
exact. Its run is pinned to a path (labkit.editing.inversion): that of DDIM inversion, whose noise the picture shines through, so that even
without editing much stays; or that of the forward process, where attention alone carries the picture over. *Free*: the source is
drawn by the model from the caption; the reader says what is in it, and the region is where it sees objects in either picture (shadows
are not in it), if it tells masks; there is no counterfactual, so no `inside`.
Beside each edit stands the same target from the same noise without any editing, and what bounds it: doing nothing, and the
counterfactual sent through the autoencoder. Light changes everything, so there `outside` says nothing and is left out.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import log10
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.diffusion import LatentDiffusion
from labkit.editing.blend import Blend
from labkit.editing.inversion import invert
from labkit.editing.prompt_to_prompt import CROSS, SELF, edit
from labkit.measure.edit_cases import FIRST_SEED, KINDS, MARGIN, Case, cases, regions, verified
from labkit.measure.parts import claim
from labkit.plots import write
from labkit.scenes import verify
from labkit.scenes.render import render

FORCED = {"inverted": "direct", "noised": "noise"}  # protocol -> kind of inversion
PROTOCOLS = (*FORCED, "free")
LEAST = 0.05  # share of the picture that must lie outside for its PSNR to be counted


@dataclass(frozen=True)
class Setting:
    """How an edit is made: `edit`'s cross, self_attention and blend threshold (None: no blend)."""

    cross: float = CROSS
    self_attention: float = SELF
    blend: float | None = None

    @property
    def name(self) -> str:
        return f"cross {self.cross:.0%}, self {self.self_attention:.0%}" + ("" if self.blend is None else f", blend {self.blend:g}")


NO_EDITING = Setting(0.0, 0.0)


@dataclass(frozen=True)
class Plan:
    """What is measured: so many scenes, every kind of edit of each, in every setting."""

    scenes: int = 60
    settings: tuple[Setting, ...] = (Setting(), NO_EDITING)
    protocols: tuple[str, ...] = PROTOCOLS
    kinds: tuple[str, ...] = KINDS
    steps: int = 10
    guidance: float | None = None
    first_seed: int = FIRST_SEED


def measure(lab: LatentDiffusion, plan: Plan, folder: str | Path, read: Callable | None = None, progress: bool = True) -> list[dict]:
    """Every edit of a plan as a row; one file a scene in `folder`, so that a run that was stopped goes on where it was.

    `read`: pictures (B, 3, H, W) in [0, 1] -> what is in each (see `edit_cases.verified`); None is labkit's own. Raises LabkitError if the
    folder has rows of another plan or model.
    """
    from tqdm.auto import tqdm

    folder, read = Path(folder), read or verify.read
    said = json.dumps({"model": lab.name, **asdict(plan)}, sort_keys=True)
    claim(folder, said, "rows")
    rows = []
    todo = [(protocol, group) for group in cases(plan.scenes, plan.first_seed, plan.kinds) for protocol in plan.protocols]
    for protocol, group in tqdm(todo, desc="edits", disable=not progress):
        path = folder / f"{protocol}-{group[0].seed}.json"
        if not path.exists():
            write(path, json.dumps(one_scene(lab, group, protocol, plan, read)))
        rows += json.loads(path.read_text(encoding="utf-8"))
    return rows


def one_scene(lab: LatentDiffusion, group: Sequence[Case], protocol: str, plan: Plan, read: Callable) -> list[dict]:
    """All edits of one scene, drawn in one batch: a row for each case and setting."""
    todo = [(case, setting) for case in group for setting in plan.settings]
    asked = {"steps": plan.steps, "guidance": plan.guidance}
    truth = render([group[0].scene, *(case.changed for case in group)]).image  # (1 + cases, 3, H, W)
    asked["seed"] = group[0].seed
    source = invert(lab, truth[:1], group[0].source, FORCED[protocol], **asked) if protocol in FORCED else group[0].source
    how = {"cross": [s.cross for _, s in todo], "self_attention": [s.self_attention for _, s in todo]}
    how["blend"] = [None if s.blend is None else Blend(threshold=s.blend) for _, s in todo]
    how |= {} if protocol in FORCED else asked
    drawn = edit(lab, source, [case.target for case, _ in todo], progress=False, **how)
    pictures = lab.decode(drawn.latents[:, 0]).cpu()  # (1 + todo, 3, H, W)
    ceiling = lab.decode(lab.encode_image(truth)).cpu()
    seen = read(pictures)
    rows = []
    for n, (case, setting) in enumerate(todo, start=1):
        k = 1 + group.index(case)
        found = {"protocol": protocol, "seed": case.seed, "kind": case.kind, **asdict(setting), "success": verified(seen[n], case)}
        found["frame"] = psnr(pictures[n], pictures[0])
        inside, outside = regions(truth[0], truth[k]) if protocol in FORCED else seen_regions(seen[0], seen[n])
        found["outside"] = None if case.kind == "light" or outside is None else psnr(pictures[n], pictures[0], outside, LEAST)
        if protocol in FORCED:
            found |= {"inside": psnr(pictures[n], truth[k], inside), "nothing": psnr(pictures[0], truth[k], inside), "best": psnr(ceiling[k], truth[k], inside)}
            found["best success"] = verified(read(ceiling[k : k + 1])[0], case)
        else:
            found["source right"] = verified(seen[0], Case("", case.seed, case.scene, case.scene, case.source, case.source))
        rows.append(found)
    return rows


def psnr(x: Tensor, y: Tensor, where: Tensor | None = None, least: float = 0.0) -> float | None:
    """PSNR in dB, 100 at most, of x and y (3, H, W) in [0, 1] over the pixels `where` (H, W); None if these are not more than `least` of all."""
    where = torch.ones(x.shape[1:], dtype=torch.bool) if where is None else where
    if where.float().mean() <= least:
        return None
    mse = float((x - y).pow(2)[:, where].mean())
    return round(-10 * log10(max(mse, 1e-10)), 3)


def seen_regions(before, after) -> tuple[Tensor | None, Tensor | None]:
    """Where a reader sees objects in either picture, and where it does not `2 MARGIN` pixels away; None where it tells no masks."""
    masks = [one.mask for seen in (before, after) for one in seen.objects if getattr(one, "mask", None) is not None]
    if not masks:
        return None, None
    inside = torch.stack(masks).any(0)
    around = F.max_pool2d(inside[None, None].float(), 4 * MARGIN + 1, stride=1, padding=2 * MARGIN)[0, 0] > 0
    return inside, ~around
