"""labkit on the command line: draw, train, evaluate, look at a model.

    python -m labkit generate "a red sphere left of a blue cube" --seed 0 --out DIR
    python -m labkit train clip|vae|diffusion|decoder|verifier|all
    python -m labkit train diffusion --pictures FOLDER
    python -m labkit measure edits|grounding|faithfulness [MODEL]
    python -m labkit evaluate [MODEL] [--quick] [--guidance 1,2,4]
    python -m labkit verify [MODEL]
    python -m labkit info [MODEL]
    python -m labkit convert model.ckpt FOLDER|model.safetensors

Bad input is one line on stderr and exit code 2, an interrupt is 130. `generate` writes all of its files or none: they
are made in a folder beside their places and moved there when the last one is complete.
"""

import argparse
import json
import os
import shutil
import sys
import textwrap
import uuid
from io import BytesIO
from pathlib import Path

import labkit
from labkit.errors import LabkitError

SCALES = (1.0, 2.0, 4.0, 8.0)  # of the guidance figure
SEEDS = 3  # rows of the guidance figure


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        arguments = parser().parse_args(argv)
        arguments.run(arguments)
        return 0
    except LabkitError as error:
        print(f"labkit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("labkit: stopped", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """All commands and their options; a new command is one more `command(...)` and a function of its arguments."""
    top = argparse.ArgumentParser("python -m labkit", description="A lab for latent diffusion models.")
    top.add_argument("--version", action="version", version=f"labkit {labkit.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    top.error = said("python -m labkit -h")

    def command(name: str, run, about: str) -> argparse.ArgumentParser:
        it = commands.add_parser(name, help=about, description=about)
        it.error = said(f"python -m labkit {name} -h")
        it.set_defaults(run=run)
        return it

    it = command("generate", generate, "Draw a picture of a sentence, and three figures that say how it came about.")
    it.add_argument("prompt", nargs="+", help="what to draw")
    model_options(it, "--model")
    it.add_argument("--seed", type=int, default=0, help="where the noise comes from (default 0)")
    it.add_argument("--steps", type=int, help="sampling steps (default: the model's own)")
    it.add_argument("--guidance", type=float, metavar="W", help="guidance scale (default: the model's own)")
    it.add_argument("--rescale", type=float, default=0.0, metavar="PHI", help="take back that much of the contrast that guidance adds, 0 (default) to 1")
    it.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide at timesteps from LOW to HIGH only (default: at all of them)")
    it.add_argument("--negative", default="", metavar="PROMPT", help="what the picture is to keep away from")
    it.add_argument("--width", type=int, help="pixels")
    it.add_argument("--height", type=int, help="pixels")
    samplers = "ddim, ddpm, euler, euler_ancestral, heun, dpm_solver, dpm_solver_karras or unipc (default: the model's own)"
    it.add_argument("--sampler", help=f"{samplers}; heun calls the network 2 N - 1 times for N steps")
    it.add_argument("--out", default="out", metavar="DIR", help="where the files go (default: out)")
    it.add_argument("--no-figures", action="store_true", help="write the picture and its recipe only")

    it = command("train", train, "Train one part of the tabletop model, all of it, the judge of its pictures, or a model on your own pictures; goes on where a run stopped.")
    it.add_argument("stage", choices=("clip", "vae", "diffusion", "decoder", "verifier", "all"))
    it.add_argument("--preset", help="tabletop (default); tabletop-mini, a small U-Net from nothing in 15 minutes on a laptop; further, to train the shipped model on; smoke, to see the machinery work")
    it.add_argument("--folder", metavar="DIR", help="where the run lives (default: runs/PRESET, or runs/ and the name of the pictures' folder)")
    it.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")

    own = it.add_argument_group("your own pictures", "A folder with a metadata.jsonl: {\"file_name\": \"one.jpg\", \"text\": \"a red sphere\"}, a line for each picture.")
    own.add_argument("--pictures", metavar="FOLDER", help="train the U-Net of a model on with these; the new one is left in model/ of the run's folder")
    own.add_argument("--model", help="which model (default: tabletop)")
    own.add_argument("--on-bad", choices=("refuse", "skip"), help="what to do if a picture is broken or has no caption (default: refuse)")
    own.add_argument("--steps", type=int, help="of training (default 500)")
    own.add_argument("--batch-size", type=int, metavar="N", help="pictures a step (default 4)")
    own.add_argument("--lr", type=float, help="learning rate (default 1e-5; 1e-4 for tabletop)")

    it = command("evaluate", evaluate, "TabletopEval: count how often the model draws what it is told, measure its pictures; goes on where it stopped.")
    model_options(it, "model")
    it.add_argument("--quick", action="store_true", help="10 prompts a category, 2 pictures each, 100 captions: some minutes, wide intervals")
    it.add_argument("--prompts", type=int, help="a category (default 100)")
    it.add_argument("--seeds", type=int, help="pictures a prompt, 1 to 4 (default 4)")
    it.add_argument("--captions", type=int, help="pictures for the distances (default 500)")
    it.add_argument("--seed", type=int, default=0, help="where the noise comes from (default 0)")
    it.add_argument("--steps", type=int, help="sampling steps (default: the model's own)")
    it.add_argument("--guidance", type=scales, metavar="W,W,...", help="guidance scales, one or several (default: the model's own)")
    it.add_argument("--audit", type=int, default=0, metavar="N", help="also compare with the first N training pictures: is anything learnt by heart?")
    it.add_argument("--data", metavar="DIR", help="where renders are kept, made there if need be (default: runs/tabletop/data)")
    it.add_argument("--out", metavar="DIR", help="where the figures, verdicts and sheets go (default: runs/evaluation/MODEL)")

    it = command("verify", verify, "Publish the errors of the reader of pictures: on renders, and on what a model's autoencoder makes of them.")
    model_options(it, "model")
    it.add_argument("--pictures", type=int, default=5000, help="test renders (default 5000)")
    it.add_argument("--data", metavar="DIR", help="where renders are kept, made there if need be (default: runs/tabletop/data)")
    it.add_argument("--write", action="store_true", help="also leave the figures beside the reader's weights, in data/verifier")

    it = command("measure", measure, "Measure what an instrument says against what is true of the tabletop world; goes on where a run stopped.")
    about = "edits: Prompt-to-Prompt against the true counterfactual; grounding: words' attention against their objects; faithfulness: whether how well a head's map "
    it.add_argument("what", choices=("edits", "grounding", "faithfulness"), help=about + "lies predicts what its ablation costs")
    model_options(it, "model")
    it.add_argument("--scenes", type=int, help="how many (default: 60 for edits, each in five ways; 500 for grounding, 60 for faithfulness)")
    it.add_argument("--steps", type=int, help="of edits and grounding: sampling steps (default 10)")
    it.add_argument("--guidance", type=float, metavar="W", help="of edits and grounding: the guidance scale (default: the model's own)")
    it.add_argument("--by", choices=("zero", "mean"), help="of faithfulness: what a head is set to (default zero)")
    it.add_argument("--out", metavar="DIR", help="where table, figure and the parts of the run go (default out/WHAT)")

    it = command("info", info, "Say what a model is made of.")
    model_options(it, "model")

    it = command("convert", convert, "Make a diffusers folder, or a safetensors file, of an original one-file checkpoint; no code of a .ckpt is run.")
    it.add_argument("source", help="a .safetensors or .ckpt in the original layout")
    it.add_argument("target", help="a folder, or a name ending in .safetensors")
    it.add_argument("--ema", action="store_true", help="take the moving average of the U-Net, where the file has one")
    it.add_argument("--predicts", choices=("epsilon", "v_prediction"), help="what the network predicts (default: v for Stable Diffusion 2.x, else epsilon)")
    it.add_argument("--tokenizer", metavar="DIR", help="a folder with vocab.json and merges.txt (default: the cache's)")
    it.add_argument("--half", action="store_true", help="write float16 weights")
    it.add_argument("--overwrite", action="store_true", help="replace what is there")
    return top


def model_options(it: argparse.ArgumentParser, name: str) -> None:
    optional = {} if name.startswith("-") else {"nargs": "?"}
    it.add_argument(name, default="tabletop", **optional, help="tabletop (default), a folder, a one-file checkpoint, a hub id, or a hub id and /FILE.safetensors")
    it.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    it.add_argument("--variant", metavar="NAME", help="which set of weights to read where a folder has several, such as fp16")
    it.add_argument("--check", action="store_true", help="read all weights first, and refuse NaN and infinity in them")


def opened(a: argparse.Namespace) -> "labkit.LatentDiffusion":
    """The model that the options of `model_options` name."""
    return labkit.load(a.model, a.device, variant=a.variant, check=a.check)


def said(where: str):
    """What argparse calls on bad arguments: one line, like all our errors."""

    def error(message: str) -> None:
        raise LabkitError(f"{message}; see {where}")

    return error


# --- the commands -------------------------------------------------------------------------------------------------


def generate(a: argparse.Namespace) -> None:
    """image.png and recipe.json, and of the same generation words.png and trajectory.png; guidance.png beside it."""
    from labkit.probes.record import record
    from labkit.probes.sweep import sweep_guidance
    from labkit.probes.trajectory import decode_trajectory

    folder = Path(a.out)
    check_writable(folder)  # before the work, not after it
    lab = opened(a)
    prompt, progress = " ".join(a.prompt), sys.stderr.isatty()
    options = {"steps": a.steps, "negative_prompt": a.negative, "height": a.height, "width": a.width, "sampler": a.sampler}
    options |= {"rescale": a.rescale, "interval": a.interval}
    arguments = {"guidance": a.guidance, "seed": a.seed, **options}
    files = {}
    if a.no_figures:
        drawn = lab.generate(prompt, progress=progress, **arguments)
    else:
        from labkit import plots

        with record(lab, latents=True) as trace:
            drawn = lab.generate(prompt, progress=progress, **arguments)
        quoted, branch = f"“{plots.plain(prompt)}”", "cond" if "cond" in trace.branches else "uncond"
        if heatmaps := trace.heatmaps(branch=branch):  # without guidance for it (w = 0), the prompt is not looked at
            files["words.png"] = plots.png(plots.word_heatmaps(drawn.image, heatmaps, f"{quoted}: where each word had the attention"))
        way = decode_trajectory(lab, trace.steps)
        files["trajectory.png"] = plots.png(plots.trajectory(way.x_t, way.x0, way.t, f"{quoted}: from noise to picture"))
        seeds = [(a.seed + k) % 2**64 for k in range(SEEDS)]
        sweep = sweep_guidance(lab, prompt, SCALES, seeds, progress=progress, **options)
        files["guidance.png"] = plots.png(plots.guidance_sweep(sweep.images, sweep.scales, sweep.seeds, f"{quoted}: the guidance scale $w$"))
    drawn.image.save(image := BytesIO(), "PNG")
    recipe = {"labkit": labkit.__version__, "model": a.model, **({"variant": a.variant} if a.variant else {}), "recipe": drawn.recipe}
    files = {"image.png": image.getvalue(), **files, "recipe.json": (json.dumps(recipe, indent=2, ensure_ascii=False) + "\n").encode()}
    write_all(folder, files)
    print(f"{', '.join(files)} are in {folder}")


def train(a: argparse.Namespace) -> None:
    from labkit.training.tabletop import PRESETS
    from labkit.training.tabletop import train as train_stage

    if a.pictures is not None:
        return train_on(a)
    if said := [name for name in ("model", "on_bad", "steps", "batch_size", "lr") if getattr(a, name) is not None]:
        raise LabkitError(f"--{said[0].replace('_', '-')} is for your own pictures: say --pictures FOLDER with it, or leave it out.")
    preset = a.preset or "tabletop"
    if preset not in PRESETS:
        raise LabkitError(f"Unknown preset {preset!r}: use one of {', '.join(PRESETS)}.")
    train_stage(a.stage, Path(a.folder or Path("runs") / preset), PRESETS[preset], a.device)


def train_on(a: argparse.Namespace) -> None:
    """A model trained on with one's own pictures, as a folder `model` beside the run's state."""
    from dataclasses import replace

    import torch

    from labkit.checkpoint import save_pipeline
    from labkit.training.finetune import CLOSED, CONFIG, finetune, read_pictures

    if a.stage != "diffusion" or a.preset:
        raise LabkitError("Your own pictures train the U-Net of a model: python -m labkit train diffusion --pictures FOLDER [--model MODEL], without a preset.")
    lab = labkit.load(a.model or "tabletop", a.device, "float32")
    folder, asked = Path(a.folder or Path("runs") / Path(a.pictures).resolve().name), {"steps": a.steps, "batch_size": a.batch_size, "lr": a.lr}
    check_writable(folder)
    pictures = read_pictures(lab, a.pictures, a.on_bad or "refuse")
    for left in pictures.skipped:
        print(f"labkit: skipped {left}", file=sys.stderr)
    config = replace(CONFIG, lr=CLOSED if lab.vocabulary else CONFIG.lr)
    config = replace(config, **{name: value for name, value in asked.items() if value is not None})
    trained = finetune(lab, pictures, folder, config)
    save_pipeline(trained, folder / "model", torch.float16, overwrite=True)
    print(f"trained on {len(pictures)} pictures; draw with it by python -m labkit generate {json.dumps(pictures.texts[0], ensure_ascii=False)} --model {folder / 'model'}")


def evaluate(a: argparse.Namespace) -> None:
    from dataclasses import replace

    from labkit.training.draw import QUICK, Plan
    from labkit.training.evaluate import RENDERS
    from labkit.training.evaluate import evaluate as measure

    lab = fast(opened(a))
    out = Path(a.out or Path("runs") / "evaluation" / Path(lab.name).name)
    check_writable(out)
    asked = {"prompts": a.prompts, "seeds": a.seeds, "captions": a.captions, "guidance": a.guidance, "steps": a.steps, "seed": a.seed, "audit": a.audit}
    plan = replace(QUICK if a.quick else Plan(), **{name: value for name, value in asked.items() if value is not None})
    found = measure(lab, out, plan, a.data or RENDERS)
    if len(found["runs"]) > 1:
        from labkit import plots

        plots.save(plots.guidance_trade(found["runs"], found["renders"], f"{lab.name}: what the guidance scale $w$ gains and costs"), out / "guidance.png")
    print(f"figures, verdicts and sheets are in {out}")


def verify(a: argparse.Namespace) -> None:
    from labkit.training import verifier_errors
    from labkit.training.evaluate import RENDERS

    found = verifier_errors.publish(fast(opened(a)), Path(a.data or RENDERS), a.pictures)
    print(verifier_errors.table(found))
    if a.write:
        verifier_errors.write(found)


def scales(text: str) -> tuple[float, ...]:
    """Guidance scales as they are said on the command line."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of guidance scales; say for example 1,2,4") from None


def fast(lab: "labkit.LatentDiffusion") -> "labkit.LatentDiffusion":
    """The same model, optimised where it can be."""
    from labkit.packing import available

    return labkit.optimize(lab) if lab.device.type == "cpu" and available(lab.dtype) else lab


def measure(a: argparse.Namespace) -> None:
    """WHAT.json, WHAT.txt and a figure."""
    from labkit.measure import edits, edits_report, faithfulness, grounding, grounding_report

    rooms = {"edits": (edits.Plan, edits_report), "grounding": (grounding.Plan, grounding_report), "faithfulness": (faithfulness.Plan, faithfulness)}
    (plan, report), out = rooms[a.what], Path(a.out or Path("out") / a.what)
    said = {name: value for name in ("scenes", "steps", "guidance", "by") if (value := getattr(a, name)) is not None}
    if strange := [name for name in said if name not in plan.__dataclass_fields__]:
        raise LabkitError(f"--{strange[0]} is not for {a.what}: leave it out.")
    plan = plan(**said)
    check_writable(out)
    print(report.table(report.run(fast(opened(a)), out, plan, progress=sys.stderr.isatty())))
    print(f"{a.what}.json, {a.what}.txt and the figure are in {out}")


def info(a: argparse.Namespace) -> None:
    lab = opened(a)
    schedule, side = lab.schedule_config, lab.unet.config.sample_size * lab.vae.config.factor
    print(f"{lab.name}: {side} x {side} pixels, {lab.vae.config.factor} pixels a latent, {lab.dtype} on {lab.device}")
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        network = getattr(lab, part)
        if network is None:
            continue
        print(f"  {part:14} {sum(p.numel() for p in network.parameters()):>13,} parameters")
    print(f"  {'tokenizer':14} {len(lab.tokenizer):>13,} tokens, {lab.tokenizer.max_length} a prompt, start and end included")
    print(f"  {'schedule':14} {schedule.beta_schedule}, {schedule.num_train_timesteps} timesteps, predicts {schedule.prediction_type}")
    print(f"  {'defaults':14} {', '.join(f'{key} {value}' for key, value in lab.defaults.items())}")
    if lab.vocabulary:
        print(textwrap.fill(f"knows {len(lab.vocabulary)} words: {' '.join(sorted(lab.vocabulary))}", 100, initial_indent="  ", subsequent_indent="    "))


def convert(a: argparse.Namespace) -> None:
    import torch

    from labkit.convert import convert_checkpoint

    dtype = torch.float16 if a.half else None
    options = {"ema": a.ema, "prediction_type": a.predicts, "tokenizer": a.tokenizer}
    print(f"{convert_checkpoint(a.source, a.target, dtype=dtype, overwrite=a.overwrite, **options)} is complete")


# --- files --------------------------------------------------------------------------------------------------------


def check_writable(folder: Path) -> None:
    """Raise LabkitError unless files can be put into this folder, or into one that would be made for it."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise LabkitError(f"{there}: is a file, not a folder; choose another --out.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise LabkitError(f"{there}: cannot be written to; choose another --out.")


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    """Put files into a folder, all complete or none at all. Raises LabkitError where that cannot be."""
    unfinished = folder / f".unfinished-{uuid.uuid4().hex[:8]}"
    made = [p for p in (folder, *folder.parents) if not p.exists()]  # innermost first
    try:
        unfinished.mkdir(parents=True)
        for name, content in files.items():
            (unfinished / name).write_bytes(content)
        for name in files:
            if (folder / name).is_dir():
                raise IsADirectoryError(0, f"{name} is a folder there")
        for name in files:
            os.replace(unfinished / name, folder / name)
        made = []
    except OSError as error:
        raise LabkitError(f"{folder}: cannot be written ({error.strerror or error}); choose another --out.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        for p in made:
            try:
                p.rmdir()
            except OSError:
                break


if __name__ == "__main__":
    sys.exit(main())
