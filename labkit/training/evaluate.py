"""How good a model of the tabletop world is, in numbers that can be checked.

    right(prompt)  the verifier's most probable colour and shape are the prompt's      counted, with Wilson's 95 % interval
    PSNR = 10 log10(1 / mean (x - y)^2)                                               pictures in [0, 1], mean over pictures
    SSIM = mean of (2 m_x m_y + c1)(2 s_xy + c2) / ((m_x^2 + m_y^2 + c1)(s_x^2 + s_y^2 + c2))      Wang et al. 2004, eq. 13

Drawn: 100 prompts of one object, every combination of colour and shape that was trained on, and apart from them the
combination that was not (purple cones). Encoded and decoded: renders of seeds that are never trained on. The verifier's own
error, on those renders and on their reconstructions, is stated beside what it counts.
"""
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabkitError
from labkit.models.sources import verify_sums
from labkit.scenes.captions import SAY
from labkit.scenes.scene import COLOURS, SHAPES
from labkit.scenes.verify import WEIGHTS, best, classify, load_classifier, share, shrink
from labkit.training.data import TEST_SEED, World, renders, scenes
from labkit.training.verifier import hits, labels

HELD_OUT = ("purple", "cone")
PAIRS = tuple((colour, shape) for shape in SHAPES for colour in COLOURS if (colour, shape) != HELD_OUT)
# The plain form first, once with every pair; the others in turn on the way through the pairs a second time, and so on.
FORMS = ("a {colour} {shape}", "a {size} {colour} {shape}", "a {colour} {material} {shape}", "a {colour} {name} on a {table} table", "a photo of a {colour} {shape} at {time}")
BATCH = 25
RENDERS = Path(__file__).parents[2] / "runs" / "tabletop" / "data"  # made there if they are not there yet


def one_object_prompts(count: int = 100) -> list[dict[str, str]]:
    """`count` prompts of one object: [{"prompt", "colour", "shape"}], every trained pair in turn; the same list every time."""
    found = []
    for i in range(count):
        colour, shape = PAIRS[i % len(PAIRS)]
        lap = i // len(PAIRS)
        found.append(_worded(FORMS[0] if lap == 0 else FORMS[1 + i % (len(FORMS) - 1)], colour, shape, i))
    return found


def held_out_prompts(count: int = 20) -> list[dict[str, str]]:
    """`count` prompts of the combination that training left out, plain and varied in turn."""
    return [_worded(FORMS[i % len(FORMS)], *HELD_OUT, i) for i in range(count)]


def _worded(form: str, colour: str, shape: str, i: int) -> dict[str, str]:
    words = {
        "colour": colour, "shape": shape, "name": SAY[shape][-1], "size": ("large", "small")[i // 4 % 2], "material": ("rubber", "metal")[i // 4 % 2],
        "table": ("plain", "checkered", "wooden")[i // 4 % 3], "time": ("night", "sunset")[i // 4 % 2],
    }  # fmt: skip
    return {"prompt": form.format(**words).replace("a orange", "an orange"), "colour": colour, "shape": shape}


def evaluate(lab, out=None, prompts: int = 100, seed: int = 0, guidance: float | None = None, steps: int | None = None, **options) -> dict:
    """Draw, reconstruct, count; the figures as a dict, printed, and with `out` also written: evaluation.json and contact sheets.

    lab: a LatentDiffusion. Options: `pictures` (test renders to reconstruct, 500), `data` (where renders are kept, the
    project's runs/tabletop/data), `held_out` (prompts of purple cones, 20), `quiet` (no table, no progress). Raises LabkitError.
    """
    options = {"pictures": 500, "data": RENDERS, "held_out": 20, "quiet": False} | options
    if len(options) > 4 or prompts < 1 or options["pictures"] < 1 or options["held_out"] < 0:
        raise LabkitError("evaluate takes prompts >= 1 and the options pictures >= 1, data, held_out >= 0, quiet")
    if out is not None and Path(out).is_file():
        raise LabkitError(f"{out} is a file; name a folder for the figures")
    verify_sums(WEIGHTS)
    classifier = load_classifier()
    recipe = {"seed": seed, "guidance": guidance, "steps": steps}
    drawn = draw(lab, one_object_prompts(prompts), classifier, recipe, options["quiet"])
    unseen = draw(lab, held_out_prompts(options["held_out"]), classifier, recipe, options["quiet"])
    found = {
        "model": lab.name,
        "seed": seed,
        "guidance": lab.defaults["guidance"] if guidance is None else guidance,
        "steps": lab.defaults["steps"] if steps is None else steps,
        "prompts": counts(drawn),
        **({"held-out prompts (purple cones)": counts(unseen)} if unseen else {}),
        **reconstruct(lab, classifier, options["pictures"], options["data"]),
    }
    if not options["quiet"]:
        print(table(found))
    if out is not None:
        write(found, drawn, unseen, Path(out))
    return found


def draw(lab, wanted: list[dict], classifier, recipe: dict, quiet: bool = True) -> list[dict]:
    """The prompts with their pictures and what the verifier sees in them: [{..., "image", "seen", "seed"}]; picture i has seed + i."""
    from tqdm.auto import tqdm

    found = []
    for start in tqdm(range(0, len(wanted), BATCH), desc="drawing", unit=f" x {BATCH}", disable=quiet):
        part = wanted[start : start + BATCH]
        seeds = [recipe["seed"] + start + i for i in range(len(part))]
        images = lab.generate([p["prompt"] for p in part], seed=seeds, guidance=recipe["guidance"], steps=recipe["steps"], progress=False).images
        for p, image, seen, number in zip(part, images, classify(images, classifier), seeds):
            found.append({**p, "seed": number, "image": image, "seen": best(seen)})
    return found


def counts(drawn: list[dict]) -> dict:
    """How many pictures have the prompt's colour, its shape, both, and both with nothing beside them."""
    right = {name: [d["seen"][name] == d[name] for d in drawn] for name in ("colour", "shape")}
    right["colour and shape"] = [c and s for c, s in zip(right["colour"], right["shape"])]
    right["both, and one object"] = [b and d["seen"]["count"] == "one" for b, d in zip(right["colour and shape"], drawn)]
    return {name: share(sum(row), len(row)) for name, row in right.items()}


def reconstruct(lab, classifier, pictures: int, data: Path) -> dict:
    """PSNR and SSIM of test renders sent through the autoencoder, and the verifier's hits on them before and after."""
    world, before, after = World(), [], []
    images = renders(world, TEST_SEED, pictures, Path(data))
    fidelity = {"psnr": [], "ssim": []}
    for start in range(0, pictures, BATCH):
        x = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
        y = lab.decode(lab.encode_image(x)).cpu()
        fidelity["psnr"].append(psnr(x, y))
        fidelity["ssim"].append(ssim(x, y))
        before.append(shrink(x))
        after.append(shrink(y))
    truth = labels(scenes(world, TEST_SEED, pictures))
    single = truth[:, 0] == 0
    found = {"reconstruction": {"pictures": pictures, **{name: round(float(torch.cat(parts).mean()), 3) for name, parts in fidelity.items()}}}
    if single.any():
        found["verifier on renders"] = hits(classifier, torch.cat(before)[single], truth[single])
        found["verifier on reconstructions"] = hits(classifier, torch.cat(after)[single], truth[single])
    return found


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal to noise of each picture in dB, (B,); x and y (B, 3, H, W) in [0, 1]. Equal pictures give infinity."""
    return -10 * torch.log10((x - y).pow(2).flatten(1).mean(1))


def ssim(x: Tensor, y: Tensor, side: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity of each picture, (B,); x and y (B, 3, H, W) in [0, 1]. Gaussian window, colours apart, borders left out."""
    line = torch.exp(-((torch.arange(side) - side // 2) ** 2) / (2 * sigma**2)).to(x)
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, side, side)

    def local(z: Tensor) -> Tensor:
        return F.conv2d(z, window, groups=3)  # (B, 3, H - 10, W - 10)

    c1, c2 = 0.01**2, 0.03**2
    mx, my = local(x), local(y)
    vx, vy, cov = local(x * x) - mx * mx, local(y * y) - my * my, local(x * y) - mx * my
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).flatten(1).mean(1)


def table(found: dict) -> str:
    """The figures as lines of text."""
    lines = [f"{found['model']}: guidance {found['guidance']}, {found['steps']} steps, seeds from {found['seed']}"]
    for title, rows in found.items():
        if not isinstance(rows, dict):
            continue
        lines.append(title)
        for name, value in rows.items():
            if isinstance(value, dict):
                lines.append(f"  {name:<24}{value['right']:>5} of {value['n']:<5}{value['share']:>7.1%}   95 % in {value['low']:.1%} .. {value['high']:.1%}")
            else:
                lines.append(f"  {name:<24}{value:>9}")
    return "\n".join(lines)


def sheet(drawn: list[dict], columns: int = 10):
    """The pictures with their prompts, and in orange what the verifier saw instead where it is not that; a PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    side, strip, font = 128, 26, ImageFont.load_default(size=8)
    rows = -(-len(drawn) // columns)
    paper = Image.new("RGB", (columns * (side + 4), rows * (side + strip + 4)), "white")
    pen = ImageDraw.Draw(paper)
    for i, d in enumerate(drawn):
        x, y = i % columns * (side + 4) + 2, i // columns * (side + strip + 4) + 2
        paper.paste(d["image"].resize((side, side)), (x, y))
        pen.text((x, y + side + 1), d["prompt"], fill="black", font=font)
        wrong = [d["seen"][name] for name in ("colour", "shape") if d["seen"][name] != d[name]]
        wrong += ["several objects"] if d["seen"]["count"] != "one" else []
        if wrong:
            pen.text((x, y + side + 12), "seen: " + ", ".join(wrong), fill="#c04000", font=font)
            pen.rectangle((x - 1, y - 1, x + side, y + side), outline="#c04000", width=2)
    return paper


def write(found: dict, drawn: list[dict], unseen: list[dict], out: Path) -> None:
    """Leave evaluation.json (figures, and prompt, seed and verdict of every picture) and the contact sheets in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [{key: value for key, value in d.items() if key != "image"} for d in drawn + unseen]
    temporary = out / f".evaluation.{os.getpid()}.tmp"
    temporary.write_text(json.dumps({**found, "pictures": rows}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out / "evaluation.json")
    sheet(drawn).save(out / "prompts.png")
    if unseen:
        sheet(unseen).save(out / "held-out.png")
