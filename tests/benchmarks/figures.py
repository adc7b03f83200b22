"""The tables and pictures that README and the model card have of the shipped weights: measured in one go, kept in data/figures.json and data/pictures, filled in from there.

    python tests/benchmarks/figures.py measure [FOLDER]    default runs/figures, a folder in it for these weights; hours of two cores; goes on where it stopped
    python tests/benchmarks/figures.py fill [FOLDER]       takes what is measured there, writes the tables anew
    python tests/benchmarks/figures.py pictures [FOLDER]   takes the figures that were made there, draws the others (the explorer in Chromium, which must be there)
    python tests/benchmarks/figures.py                     writes the tables anew from what is kept

A table stands between <!-- figures: NAME --> and <!-- end -->. Beside the figures are kept the SHA-256 of the weights' own sums, so that figures of other weights are told from those of the
shipped ones (tests/test_shipped.py). The reader's errors are in data/verifier, where `labkit verify --write` leaves them.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from labkit.models.whole import whole_file

ROOT = Path(__file__).parents[2]
DATA, KEPT = ROOT / "data", ROOT / "data" / "figures.json"
DOCUMENTS = (ROOT / "README.md", DATA / "README.md")
BLOCK = re.compile(r"(<!-- figures: ([\w ]+) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)

EVALUATE, MEASURE = ("-m", "labkit", "evaluate"), ("-m", "labkit", "measure")
SWEEP = (*EVALUATE, "--quick", "--guidance", "1,2,3,4,6,8", "--out", "{out}/sweep")
ALL = (*EVALUATE, "--steps", "30", "--audit", "30000", "--out", "{out}/evaluation")
ROUNDS = (  # what runs side by side, a thread each; two evaluations share their pictures
    (SWEEP, SWEEP),
    (ALL, ALL),
    ((*MEASURE, "edits", "--out", "{out}/edits"), (*MEASURE, "grounding", "--out", "{out}/grounding")),
    ((*MEASURE, "faithfulness", "--scenes", "40", "--out", "{out}/zero"), (*MEASURE, "faithfulness", "--scenes", "40", "--by", "mean", "--out", "{out}/mean")),
    (("tests/benchmarks/heatmaps.py", "100", "tabletop", "{out}/heatmaps.json"), ("-m", "labkit", "verify", "--write")),
)
PARTS = {  # name -> file in the folder, and what of it is not kept
    "sweep": ("sweep/evaluation.json", ()),
    "evaluation": ("evaluation/evaluation.json", ()),
    "edits": ("edits/edits.json", ("rows",)),
    "grounding": ("grounding/grounding.json", ("atlas", "layers")),
    "faithfulness": ("zero/faithfulness.json", ()),
    "faithfulness by mean": ("mean/faithfulness.json", ()),
    "heat maps": ("heatmaps.json", ()),
}
AIMS = {"single object": 99, "two objects": 96, "counting": 92, "colour": 98, "position": 93, "attribute binding": 95, "material": 95, "size": 95, "light": 95, "style": 95, "held-out": 70}


def weights() -> str:
    """What tells the shipped weights from all others."""
    return hashlib.sha256((DATA / "tabletop" / "SHA256SUMS").read_bytes()).hexdigest()


# --- measure ------------------------------------------------------------------------------------------------------


def measure(out: Path) -> None:
    """Run the rounds, one after the other; those that are done are passed over. Exits where a command fails."""
    out.mkdir(parents=True, exist_ok=True)
    for number, commands in enumerate(ROUNDS):
        if (done := out / f"round-{number}").exists():
            continue
        logs = [open(out / f"round-{number}-{k}.txt", "w", encoding="utf-8") for k in range(len(commands))]
        running = []
        for command, log in zip(commands, logs):
            said = [part.format(out=out) for part in command]
            print(f"round {number}: {' '.join(said)}", flush=True)
            running.append(subprocess.Popen([sys.executable, *said], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}))
        if failed := [log.name for process, log in zip(running, logs) if process.wait()]:  # waits for all
            sys.exit(f"round {number} failed; {failed[0]} says why")
        done.touch()


def take(out: Path) -> None:
    """What was measured of the shipped weights, into data/figures.json."""
    if not all((out / f"round-{number}").exists() for number in range(len(ROUNDS))):
        sys.exit(f"{out}: not everything is measured of these weights; measure first")
    found = {"weights": weights()}
    for name, (file, left) in PARTS.items():
        found[name] = without(json.loads((out / file).read_text(encoding="utf-8")), left)
    write(KEPT, json.dumps(found, separators=(",", ":")).replace('},"', '},\n"') + "\n")


def without(value, names: tuple[str, ...]):
    """A tree of dicts and lists less the entries of these names."""
    if isinstance(value, dict):
        return {name: without(one, names) for name, one in value.items() if name not in names}
    return [without(one, names) for one in value] if isinstance(value, list) else value


def pictures(out: Path) -> None:
    """README's pictures, into data/pictures."""
    import labkit
    from labkit import plots
    from PIL import Image

    for source, name in (("grounding/grounding.png", "grounding.png"), ("edits/frontier.png", "frontier.png")):
        shutil.copyfile(out / source, DATA / "pictures" / name)
    scale = json.loads((out / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["runs"][0]["guidance"]
    with Image.open(out / "evaluation" / f"w-{scale:g}" / "samples.png") as sheet:
        sheet.convert("RGB").save(DATA / "pictures" / "samples.jpg", quality=90)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "labkit", "generate", "a red sphere on a checkered table", "--seed", "0", "--out", folder], cwd=ROOT, check=True)
        shutil.copyfile(Path(folder) / "words.png", DATA / "pictures" / "first_light.png")
    edit = labkit.optimize(labkit.load("tabletop")).edit("a red sphere on a wooden table", "a red cone on a wooden table", seed=0, blend="changed")
    plots.save(plots.edit_panels(edit), DATA / "pictures" / "edit.png")
    explorer("a red sphere left of a blue cube", "red", DATA / "pictures" / "explorer_light.jpg")


def explorer(prompt: str, word: str, target: Path) -> None:
    """The explorer's page as a browser shows it, the pointer on a word."""
    import labkit
    from playwright.sync_api import sync_playwright

    with labkit.record(lab := labkit.load("tabletop"), latents=True, keep="raw") as trace:
        lab.generate(prompt, seed=0)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(labkit.explore(trace).save(Path(folder) / "explorer.html"))
        browser = playwright.chromium.launch(executable_path=os.environ.get("LABKIT_CHROMIUM") or shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"])
        shown = browser.new_page(viewport={"width": 1280, "height": 720}, color_scheme="light")
        shown.goto(page.as_uri())
        shown.locator(".labkit-view[data-ready]").first.wait_for()
        shown.locator(f'[data-word="{word}"]').first.hover()
        shown.wait_for_timeout(500)
        shown.screenshot(path=target, type="jpeg", quality=90)
        browser.close()


# --- fill ---------------------------------------------------------------------------------------------------------


def kept() -> dict:
    """All figures by name; "verifier" is always there."""
    found = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    return found | {"verifier": json.loads((DATA / "verifier" / "errors.json").read_text(encoding="utf-8"))}


def filled(text: str, figures: dict) -> str:
    """A document with the tables that there are figures for written anew; KeyError for a name that no table has."""

    def block(match: re.Match) -> str:
        table, of = TABLES[match[2]]
        return match[1] + table(*(figures[name] for name in of)) + match[3] if all(name in figures for name in of) else match[0]

    return BLOCK.sub(block, text)


def rows(head: str, *lines: str) -> str:
    """A table; cells are parted by bars."""
    return "\n".join([f"| {head} |", "| " + " | ".join("---" for _ in head.split(" | ")) + " |", *(f"| {line} |" for line in lines)])


def percent(share: dict) -> str:
    return f"{100 * share['share']:.4g} ({100 * share['low']:.0f} to {100 * share['high']:.0f})"


def measured(value: dict, digits: int = 3) -> str:
    return f"{value['value']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def categories(evaluation: dict) -> list[tuple[str, str, str]]:
    """(name, right, alone) of each category, of the first scale; the unsaid negation stands beside the said one."""
    found, said = evaluation["runs"][0]["categories"], []
    for name, row in found.items():
        if name == "negation unsaid":
            continue
        parts = [row, found["negation unsaid"]] if name == "negation" else [row]
        said.append(("negation; unsaid" if name == "negation" else name, "; ".join(percent(p["right"]) for p in parts), "; ".join(f"{100 * p['alone']['share']:.1f}" for p in parts)))
    return said


def evaluation_with_aims(evaluation: dict) -> str:
    said = [f"{name} | {right} | {AIMS.get(name, '')}" for name, right, _ in categories(evaluation)]
    half = len(said) // 2
    run, again, renders = evaluation["runs"][0], evaluation["reconstruction"], evaluation["renders"]
    table = rows("what | right, % (95 %) | aim | what | right, % (95 %) | aim", *(f"{a} | {b}" for a, b in zip(said[:half], said[half:], strict=True)))
    return (f"{table}\n\nDiversity {run['diversity']:.2f}, saturation {run['saturation']:.3f} (renders {renders['saturation']:.3f}). The autoencoder gives {again['pictures']} test renders of one to four objects, "
            f"sketches among them, back with a PSNR of {again['psnr']:.1f} dB and an SSIM of {again['ssim']:.3f}.")


def evaluation_in_full(evaluation: dict) -> str:
    run, renders = evaluation["runs"][0], evaluation["renders"]
    six = run["six"]
    lines = [f"{name} | {right} | {alone}" for name, right, alone in categories(evaluation)]
    lines.append(f"mean of GenEval's six | {100 * six['share']:.1f} ({100 * six['low']:.1f} to {100 * six['high']:.1f}) |")
    return (f"{rows('category | right, % (95 %) | nothing beside it, %', *lines)}\n\nDiversity {run['diversity']:.3f}, saturation {run['saturation']:.3f} (renders {renders['saturation']:.3f}), "
            f"burnt {run['burnt']:.2%}, Frechet distance {run['frechet']:.3f} ({renders['frechet']:.3f} between two sets of renders of different scenes).")


def guidance(sweep: dict) -> str:
    runs = sweep["runs"]
    names = ("counting", "position", "attribute binding", "material")
    lines = ["mean of GenEval's six, % | " + " | ".join(f"{100 * run['six']['share']:.0f}" for run in runs)]
    lines += [f"{name}, % | " + " | ".join(f"{100 * run['categories'][name]['right']['share']:.0f}" for run in runs) for name in names]
    lines += [f"{name} | " + " | ".join(form(run[name]) for run in runs)
              for name, form in (("diversity", "{:.2f}".format), ("saturation", "{:.3f}".format), ("burnt", "{:.2%}".format), ("frechet", "{:.3f}".format))]
    return rows("guidance scale | " + " | ".join(f"{run['guidance']:g}" for run in runs), *lines)


def reader(errors: dict) -> str:
    shown = ("renders", "renders, reconstructed", "renders of held-out combinations")
    names = [name for name in errors[shown[0]] if not name.startswith("material, ") and name not in ("everything", "relation")]
    at = names.index("material") + 1
    names = [*names[:at], "material, photo", "material, sketch", *names[at:], "relation", "everything"]
    of = {where: max(row["n"] for name, row in errors[where].items() if name == "count") for where in (shown[0], shown[2])}
    cell = lambda r: f"{r['share']:.1%} ({r['low']:.1%} to {r['high']:.1%})"  # noqa: E731
    lines = [f"{name} | " + " | ".join(cell(errors[where][name]) for where in shown) for name in names]
    return rows(f"what | {of[shown[0]]:,} renders | the same, reconstructed | {of[shown[2]]} renders of held-out combinations", *lines)


def heat_maps(found: list[dict]) -> str:
    ap = {(row["map"], row["kind"]): row["ap"] for row in found}
    called = {"ours": "`trace.heatmap`, all layers but the middle", "all layers": "with the middle block", "up only": "the way up only", "DAAM": "DAAM"}
    lines = [f"{said} | {measured(ap[name, 'shape'])} | {measured(ap[name, 'colour'])}" for name, said in called.items()]
    both = [" / ".join(f"{ap[f'Prompt-to-Prompt, {side}', kind]['value']:.3f}" for side in ("16x16", "8x8")) for kind in ("shape", "colour")]
    blind = [" / ".join(f"{ap[name, kind]['value']:.3f}" for name in ("centre", "uniform")) for kind in ("shape", "colour")]
    return rows("heat map | shapes | colours", *lines, "Prompt-to-Prompt's, layers of 16x16 / 8x8 | " + " | ".join(both), "looks at nothing: the centre / uniform | " + " | ".join(blind))


def words(found: dict) -> str:
    forced = found["protocols"]["forced"]["grounding"]
    nouns, colours = forced["shape"], forced["colour"]
    called = {"mean": "mean over everything", "prompt_to_prompt": "Prompt-to-Prompt's (16x16 layers)", "daam": "DAAM's", "late steps": "mean over the second half of the steps"}
    four = lambda a, b: " | ".join(f"{row[what]['value']:.3f}" for row in (a, b) for what in ("ap", "iou"))  # noqa: E731
    lines = [f"{said} | {four(nouns['ways'][way], colours['ways'][way])}" for way, said in called.items()]
    lines.append("the same, spread by self-attention | " + " | ".join(measured(kind["ways"]["spread"][what]) for kind in (nouns, colours) for what in ("ap", "iou")))
    lines.append(f"best single head, chosen on one scene in five | {four(nouns['best head'], colours['best head'])}")
    blind = {"centre": "the middle of the picture", "another word": "another object's word", "uniform": "the same everywhere", "start token": "the start token", "untrained": "untrained network"}
    lines += [f"baseline: {said} | {four(nouns['ways'][way], colours['ways'][way])}" for way, said in blind.items() if way in nouns["ways"] and way in colours["ways"]]
    return f"Of {nouns['words']} nouns and {colours['words']} colours:\n\n" + rows("map | nouns: AP | nouns: IoU | colours: AP | colours: IoU", *lines)


def edits(found: dict) -> str:
    table, plain = found["table"], lambda row: row["self_attention"] == 0 and row["cross"] == 0  # noqa: E731
    pick = lambda protocol, kind, bare: next(r for r in table if (r["protocol"], r["kind"]) == (protocol, kind) and plain(r) == bare)  # noqa: E731
    lines = []
    for protocol in dict.fromkeys(row["protocol"] for row in table):
        done, bare = pick(protocol, "all", False), pick(protocol, "all", True)
        gain = next(g for g in found["gains"] if g["protocol"] == protocol and g["of"] == "outside")
        s, (low, high) = done["success"], gain["interval"]
        inside = "no counterfactual" if done["best"] is None else f"{done['inside']:.1f}, {done['nothing']:.1f}, {done['best']:.1f} dB"
        lines.append(f"{protocol} | {s['share']:.1%} ({100 * s['low']:.1f} to {100 * s['high']:.1f}) | {bare['success']['share']:.1%} | {done['outside']:.1f} dB | "
                     f"{gain['gain']:+.1f} dB ({low:.1f} to {high:.1f}) | {inside}")
    kinds = [kind for kind in dict.fromkeys(row["kind"] for row in table) if kind != "all"]
    n = pick("free", kinds[0], False)["success"]["n"]
    called = {"add": "one object more"}
    by = [f"{said} | " + " | ".join(str(pick("free", kind, bare)["success"]["right"]) for kind in kinds) for said, bare in (("verified, edited", False), ("verified, no editing", True))]
    head = "protocol | verified, edited (95 %) | verified, no editing | outside, edited | gained over no editing (95 %, paired) | inside: edited, source left as it is, best possible"
    return rows(head, *lines) + "\n\n" + rows(f"free, by kind, of {n} | " + " | ".join(called.get(kind, kind) for kind in kinds), *by)


TABLES = {  # name -> how it is written, and of which figures
    "evaluation with aims": (evaluation_with_aims, ("evaluation",)),
    "evaluation": (evaluation_in_full, ("evaluation",)),
    "guidance": (guidance, ("sweep",)),
    "verifier": (reader, ("verifier",)),
    "heat maps": (heat_maps, ("heat maps",)),
    "grounding": (words, ("grounding",)),
    "edits": (edits, ("edits",)),
}


def fill() -> None:
    figures = kept()
    for path in DOCUMENTS:
        write(path, filled(path.read_text(encoding="utf-8"), figures))


def write(path: Path, text: str) -> None:
    with whole_file(path, overwrite=True) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else ROOT / "runs" / "figures"
    folder /= weights()[:12]  # parts of a run say which model they are of by its name alone
    what = {"measure": measure, "fill": take, "pictures": pictures}
    if sys.argv[1:]:
        what.get(sys.argv[1], lambda _: sys.exit(__doc__))(folder)
    if sys.argv[1:2] in ([], ["fill"]):
        fill()
