"""The table and the figure of measured edits: one command, its files complete or not there.

    success   share of verified edits, with Wilson's 95 % interval
    outside, inside   means of the edits' PSNR in dB, with 95 % of 1000 means over scenes drawn again with replacement (bootstrap)

`python -m labkit measure edits` measures twice: the default setting beside no editing on all scenes, by all protocols (the table), and
a grid of settings on a few scenes, noised (the frontier). Settings are chosen by the frontier and judged by the table, so the two share no
scene.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.measure.edit_cases import KINDS
from labkit.measure.edits import FORCED, NO_EDITING, PROTOCOLS, Plan, Setting, measure
from labkit.scenes.verify import share

GRID = tuple(Setting(cross, self_) for self_ in (0.0, 0.2, 0.5) for cross in (0.0, 0.2, 0.4, 0.8))
PART = 3  # the frontier is measured on one scene in so many
APART = 1_000_000  # seeds between the table's scenes and the frontier's
TARGETS = {"success": 0.90, "outside": 30.0}
FIGURES = ("outside", "inside", "nothing", "best", "frame")


def run(lab: LatentDiffusion, out: str | Path, plan: Plan = Plan(), read: Callable | None = None, progress: bool = True) -> dict:
    """Measure a plan and its frontier, and leave edits.json, edits.txt and frontier.png in `out`; the figures as a dict, printed by who calls.

    A run that was stopped goes on where it was (`out`/parts). `read` as in `labkit.measure.edits.measure`. Raises LabkitError.
    """
    from labkit.plots import edit_frontier, save, write

    out = Path(out)
    if out.is_file():
        raise LabkitError(f"{out} is a file; name a folder for the figures.")
    rows = measure(lab, plan, out / "parts" / "table", read, progress)
    few = replace(plan, scenes=max(plan.scenes // PART, 1), protocols=("noised",), settings=GRID, first_seed=plan.first_seed + APART)
    points = frontier(measure(lab, few, out / "parts" / "frontier", read, progress))
    found = {"model": lab.name, "plan": asdict(plan), "table": summary(rows), "gains": gains(rows), "frontier": points, "rows": rows}
    write(out / "edits.json", json.dumps(found, indent=1) + "\n")
    write(out / "edits.txt", table(found) + "\n")
    save(edit_frontier(points), out / "frontier.png")
    return found


def summary(rows: Sequence[dict]) -> list[dict]:
    """The rows of each protocol, setting and kind (and of all kinds) as one: success with its interval, means of the rest."""
    found = []
    for protocol in PROTOCOLS:
        settings = dict.fromkeys(setting_of(row) for row in rows if row["protocol"] == protocol)
        for kind in (*KINDS, "all"):
            for setting in settings:
                these = [row for row in rows if row["protocol"] == protocol and setting_of(row) == setting and kind in (row["kind"], "all")]
                if these:
                    found.append({"protocol": protocol, "kind": kind, **asdict(setting), **figures(these)})
    return found


def figures(rows: Sequence[dict]) -> dict:
    """{"success": {right, n, share, low, high}, "outside": dB, ...}; None where nothing was measured."""
    one = {"success": share(sum(row["success"] for row in rows), len(rows))}
    if rows[0]["protocol"] in FORCED:
        one["best success"] = share(sum(row["best success"] for row in rows), len(rows))
    elif right := [row for row in rows if row["source right"]]:
        one["success of right sources"] = share(sum(row["success"] for row in right), len(right))
    one |= {name: mean([row.get(name) for row in rows]) for name in FIGURES}
    return one | {f"{name} interval": interval(rows, name) for name in ("outside", "inside")}


def gains(rows: Sequence[dict]) -> list[dict]:
    """What editing gains over no editing, edit by edit, in dB: the mean difference for each protocol and setting, with its interval over scenes."""
    found = []
    plain = {(row["protocol"], row["seed"], row["kind"]): row for row in rows if setting_of(row) == NO_EDITING}
    for protocol, setting in dict.fromkeys((row["protocol"], setting_of(row)) for row in rows if setting_of(row) != NO_EDITING):
        these = [row for row in rows if (row["protocol"], setting_of(row)) == (protocol, setting)]
        for name in ("outside", "inside", "frame"):
            pairs = [(row, plain.get((protocol, row["seed"], row["kind"]))) for row in these if row.get(name) is not None]
            apart = [{"seed": row["seed"], name: row[name] - other[name]} for row, other in pairs if other and other.get(name) is not None]
            if apart:
                found.append({"protocol": protocol, **asdict(setting), "of": name, "gain": mean([d[name] for d in apart]), "interval": interval(apart, name), "n": len(apart)})
    return found


def frontier(rows: Sequence[dict]) -> list[dict]:
    """The points of `edit_frontier`, all kinds together; outside is of those kinds that leave one."""
    points = []
    for setting in dict.fromkeys(setting_of(row) for row in rows):
        these = figures([row for row in rows if setting_of(row) == setting])
        hits = these["success"]
        point = {"cross": setting.cross, "self": setting.self_attention, "kept": these["outside"], "success": hits["share"], "low": hits["low"], "high": hits["high"]}
        points.append(point | ({"name": "no editing"} if setting == NO_EDITING else {}) | {"n": hits["n"], "inside": these["inside"]})
    return [point for point in points if point["kept"] is not None]


def table(found: dict) -> str:
    """The figures as lines of text, and whether the targets are met."""
    plan = found["plan"]
    lines = [f"{found['model']}: {plan['scenes']} scenes, {plan['steps']} steps, edits in each of {', '.join(plan['kinds'])}"]
    head = f"  {'setting':<34}{'verified':>10}{'share':>8}  95 % interval {'outside':>9}{'inside':>8}{'nothing':>9}{'best':>7}{'frame':>7}"
    about = {
        "inverted": "inverted: renders, from the noise that DDIM finds; region and counterfactual exact",
        "noised": "noised: renders, from noise that knows nothing of them; region and counterfactual exact",
        "free": "free: drawn from the caption, then read; region as read",
    }
    for protocol in dict.fromkeys(row["protocol"] for row in found["table"]):
        lines += [about[protocol], head]
        for row in (row for row in found["table"] if row["protocol"] == protocol):
            s = row["success"]
            name = "no editing" if setting_of(row) == NO_EDITING else setting_of(row).name
            numbers = "".join(f"{'-' if row[key] is None else format(row[key], '.1f'):>{width}}" for key, width in zip(FIGURES, (9, 8, 9, 7, 7)))
            lines.append(f"  {row['kind'] + ': ' + name:<34}{s['right']:>5} of{s['n']:>4}{s['share']:>7.1%}  {s['low']:>6.1%} ..{s['high']:>6.1%} {numbers}")
    lines.append("outside: PSNR to the source where nothing should change; inside: to the true counterfactual where something should; nothing: of the")
    lines.append("source left as it is; best: of the counterfactual sent through the autoencoder; frame: of the whole picture to the source. In dB.")
    for protocol in dict.fromkeys(row["protocol"] for row in found["table"]):
        row = next(row for row in found["table"] if row["protocol"] == protocol and row["kind"] == "all" and setting_of(row) != NO_EDITING)
        for name, goal in TARGETS.items():
            value = row[name]["share"] if name == "success" else row[name]
            if value is not None:
                between = [row[name]["low"], row[name]["high"]] if name == "success" else row[f"{name} interval"]
                form = "{:.1%}" if name == "success" else "{:.1f} dB"
                said = f"{form.format(value)} (95 % in {form.format(between[0])} to {form.format(between[1])}), target {form.format(goal)}"
                lines.append(f"{'met   ' if value >= goal else 'MISSED'}  {protocol}: {name} {said}")
    for g in found.get("gains", ()):
        between = "{:+.1f} to {:+.1f}".format(*g["interval"])
        lines.append(f"gained  {g['protocol']}: {g['of']} {g['gain']:+.1f} dB (95 % in {between}) by {setting_of(g).name} over no editing, {g['n']} edits")
    return "\n".join(lines)


def interval(rows: Sequence[dict], name: str, draws: int = 1000) -> list[float] | None:
    """The middle 95 % of means over scenes drawn with replacement: edits of one scene are not independent of each other."""
    import numpy as np

    scenes: dict[int, list[float]] = {}
    for row in rows:
        if row.get(name) is not None:
            scenes.setdefault(row["seed"], []).append(row[name])
    if not scenes:
        return None
    sums, counts = np.array([sum(v) for v in scenes.values()]), np.array([len(v) for v in scenes.values()])
    drawn = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))  # (draws, scenes)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return [round(float(q), 2) for q in np.quantile(means, (0.025, 0.975))]


def setting_of(row: dict) -> Setting:
    return Setting(row["cross"], row["self_attention"], row["blend"])


def mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return round(sum(there) / len(there), 2) if there else None
