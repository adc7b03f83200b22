"""The table and the figure of measured grounding and binding: one command, resumable, its files complete or not there.

    tau, and the best head, are chosen on one scene in five;  AP and IoU are means over the words of the others,
    with the middle 95 % of 1000 means over scenes drawn again with replacement (bootstrap)

`python -m labkit measure grounding` measures by both protocols (labkit.measure.grounding).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.measure.grounding import BASELINES, FIRST_SEED, KINDS, METHODS, PROTOCOLS, SIDE, TAUS, Plan, one_scene
from labkit.measure.parts import claim
from labkit.models.unet import UNet
from labkit.probes.grid import sweep
from labkit.probes.sites import short

WAYS = METHODS + BASELINES
VALIDATION = 5  # one scene in so many chooses thresholds and heads
TARGET = 0.70  # mean IoU of nouns in drawn pictures
DRAWS = 1000


def run(lab: LatentDiffusion, out: str | Path, plan: Plan = Plan(), protocols: Sequence[str] = PROTOCOLS, progress: bool = True) -> dict:
    """Measure, and leave grounding.json, grounding.txt and grounding.png in `out`; the figures as a dict. Goes on where a run stopped (`out`/parts).

    Raises LabkitError if `out` has the scenes of another plan or model, or if there are too few scenes to choose on some and report on others.
    """
    from labkit.plots import grounding_atlas, save, write

    out = Path(out)
    if out.is_file():
        raise LabkitError(f"{out} is a file; name a folder for the figures.")
    if plan.scenes < 2 * VALIDATION:
        raise LabkitError(f"{plan.scenes} scenes are too few: one in {VALIDATION} chooses the thresholds; take {2 * VALIDATION} or more.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = UNet(lab.unet.config).eval().requires_grad_(False).to(lab.device, lab.dtype)
    found = {"model": lab.name, "plan": asdict(plan), "protocols": {}}
    for protocol in protocols:
        mine = replace(plan, protocol=protocol)
        said, parts = json.dumps({"model": lab.name, **asdict(mine), "scenes": None, "side": SIDE, "ways": WAYS}, sort_keys=True), out / "parts" / protocol
        claim(parts, said, "scenes")
        seeds = range(FIRST_SEED, FIRST_SEED + plan.scenes)
        scenes = sweep({"seed": seeds}, lambda seed: one_scene(lab, untrained, mine, seed), parts, progress)
        found["protocols"][protocol] = {"grounding": grounding(scenes), "binding": binding(scenes), "words": counted(scenes)}
    write(out / "grounding.json", json.dumps(found, indent=1) + "\n")
    write(out / "grounding.txt", table(found) + "\n")
    save(grounding_atlas(found), out / "grounding.png")
    return found


# --- from scenes to figures ---------------------------------------------------------------------------------------


def grounding(scenes: Sequence[dict]) -> dict:
    """{kind: {"words", "ways": {way: {ap, iou, tau, intervals}}, "best head": {...}, "atlas": AP (step, layer, head)}} of the kinds that were scored."""
    rows = [(n, row, i) for n, scene in enumerate(scenes) for i, row in enumerate(row for row in scene["words"] if row["drawn"])]
    layers = [short(layer) for layer in scenes[0]["layers"]]
    found = {}
    for kind in KINDS:
        these = [(n, i) for n, row, i in rows if row["kind"] == kind]
        chosen, kept = [pair for pair in these if pair[0] % VALIDATION == 0], [pair for pair in these if pair[0] % VALIDATION]
        if not chosen or not kept:
            continue
        of = lambda name, pairs: torch.stack([scenes[n][name][i].float() for n, i in pairs])  # noqa: E731
        owners = [n for n, _ in kept]
        taus = of("method_iou", chosen).nanmean(0).nan_to_num(-1).argmax(-1)  # (way,)
        ap, iou = of("method_ap", kept), of("method_iou", kept)  # (word, way), (word, way, tau)
        ways = {}
        for w, way in enumerate(WAYS):
            if not bool(ap[:, w].isnan().all()):
                cut = iou[:, w, taus[w]]
                ways[way] = {"ap": mean(ap[:, w], owners), "iou": mean(cut, owners), "tau": TAUS[int(taus[w])]}
        atlas_chosen, atlas = of("head_ap", chosen).mean(0), of("head_ap", kept)  # (step, layer, head); (word, step, layer, head)
        place = np.unravel_index(int(atlas_chosen.argmax()), atlas_chosen.shape)
        step, layer, head = (int(v) for v in place)
        tau = int(of("head_iou", chosen)[:, step, layer, head].mean(0).argmax())
        best = {"step": step, "layer": layers[layer], "head": head, "tau": TAUS[tau]}
        best |= {"ap": mean(atlas[:, step, layer, head], owners), "iou": mean(of("head_iou", kept)[:, step, layer, head, tau], owners)}
        found[kind] = {"words": len(kept), "ways": ways, "best head": best, "layers": layers, "atlas": atlas.mean(0).round(decimals=4).tolist()}
    return found


def counted(scenes: Sequence[dict]) -> dict:
    """How many words there were of each kind, and of how many the object was found in the picture."""
    rows = [row for scene in scenes for row in scene["words"]]
    return {kind: {"all": len(these), "drawn": sum(row["drawn"] for row in these)} for kind in KINDS if (these := [row for row in rows if row["kind"] == kind])}


def binding(scenes: Sequence[dict]) -> dict:
    """The mean share of a colour's attention on its own noun's object; where pictures were drawn, how well it tells right colours from wrong ones (AUC)."""
    rows = [(n, row["share"], row["right"]) for n, scene in enumerate(scenes) for row in scene["words"] if "share" in row]
    if not rows:
        return {"words": 0}
    owners, shares = [n for n, *_ in rows], torch.tensor([share for _, share, _ in rows])
    found = {"words": len(rows), "share": mean(shares, owners)}
    if rows[0][2] is not None:
        right = torch.tensor([right for *_, right in rows])
        found |= {"right": int(right.sum()), "auc": resampled(owners, lambda index: auc(shares[index], right[index]))}
    return found


def auc(scores: torch.Tensor, right: torch.Tensor) -> float:
    """P(the score of a right one > that of a wrong one), ties half; NaN if there is none of either."""
    a, b = scores[right], scores[~right]
    if not len(a) or not len(b):
        return float("nan")
    return float(((a[:, None] > b).float() + 0.5 * (a[:, None] == b).float()).mean())


def mean(values: torch.Tensor, owners: Sequence[int]) -> dict:
    """{value, low, high}: the mean, and its interval by bootstrap over the scenes that own the values; values that are NaN are left out."""
    return resampled(owners, lambda index: float(values[index].nanmean()))


def resampled(owners: Sequence[int], statistic, draws: int = DRAWS) -> dict:
    """{value, low, high} of a statistic of rows, an index tensor; rows of one scene are drawn together, since they are not independent."""
    groups: dict[int, list[int]] = {}
    for row, owner in enumerate(owners):
        groups.setdefault(owner, []).append(row)
    groups, rng = [torch.tensor(rows) for rows in groups.values()], np.random.default_rng(0)
    again = [statistic(torch.cat([groups[k] for k in rng.integers(len(groups), size=len(groups))])) for _ in range(draws)]
    low, high = np.nanquantile(again, (0.025, 0.975)) if not np.isnan(again).all() else (np.nan, np.nan)
    return {name: None if np.isnan(v) else round(float(v), 4) for name, v in (("value", statistic(torch.arange(len(owners)))), ("low", low), ("high", high))}


# --- the table ----------------------------------------------------------------------------------------------------


def table(found: dict) -> str:
    """The figures as lines of text, and whether the target is met."""
    plan = found["plan"]
    about = {"forced": "renders, noised; masks exact", "free": "drawn from captions; masks as read by the verifier"}
    lines = [f"{found['model']}: {plan['scenes']} scenes of one or two objects, {plan['steps']} steps; thresholds and heads chosen on one scene in {VALIDATION}"]
    for protocol, part in found["protocols"].items():
        lines.append(f"{protocol}: {about[protocol]}")
        for kind, one in part["grounding"].items():
            drawn = part["words"][kind]
            lines.append(f"  {kind}, {one['words']} words scored" + ("" if protocol == "forced" else f"; of {drawn['all']} in all, {drawn['drawn']} drawn"))
            lines.append(f"    {'':<40}{'AP':>6} {'95 % interval':>16}{'IoU':>8} {'95 % interval':>16}   tau")
            best = one["best head"]
            for way, row in {**one["ways"], f"best head: {best['layer']}, head {best['head']}, step {best['step']}": best}.items():
                ap, iou = row["ap"], row["iou"]
                spans = [f"{v['low']:.3f} to {v['high']:.3f}" for v in (ap, iou)]
                lines.append(f"    {('baseline: ' if way in BASELINES else '') + way:<40}{ap['value']:>6.3f} {spans[0]:>16}{iou['value']:>8.3f} {spans[1]:>16}  {row['tau']:.2f}")
        bound = part["binding"]
        if bound["words"]:
            share = bound["share"]
            lines.append(f"  binding: {share['value']:.3f} of a colour's attention is on its own noun's object ({share['low']:.3f} to {share['high']:.3f}; 0.5 is no "
                         f"preference), {bound['words']} colours of two-object scenes")  # fmt: skip
            if "auc" in bound:
                said = "no wrong colour, or no right one, to tell apart" if bound["auc"]["value"] is None else "AUC {value:.3f} ({low} to {high})".format(**bound["auc"])
                lines.append(f"  does it predict a wrong colour? {said}; {bound['right']} of {bound['words']} came out right")
    if nouns := found["protocols"].get("free", {}).get("grounding", {}).get("shape"):
        way, row = max(((way, nouns["ways"][way]) for way in METHODS), key=lambda pair: pair[1]["iou"]["value"])
        lines.append(f"{'met   ' if row['iou']['value'] >= TARGET else 'MISSED'}  free, nouns: IoU {row['iou']['value']:.3f} by “{way}”, target {TARGET:.2f}")
    return "\n".join(lines)
