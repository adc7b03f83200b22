"""Whether labkit draws what diffusers draws, at full size: the largest difference of a pixel, the same weights and seed.

    python tests/benchmarks/equality.py sd15|sd21|sdxl [--size 256] [--steps 20] [--guidance 7.5] [--folder DIR]

diffusers and transformers write random weights of the true size into a folder (float16: 2 GB for SD 1.5, 7 GB for SDXL; the
folder is removed at the end unless it was given); then labkit and diffusers, each in a process of its own, one after the
other, open it in float32 and draw one picture by DDIM. Memory: about the float32 weights, 14 GB for SDXL.

Random weights draw no picture, but every number counts in them: `spread` is the standard deviation of the pixels from 0 to
1, and `clipped` the share of them that are 0 or 1 and would hide a difference.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red ball left of a blue cube"


def main() -> int:
    a = arguments()
    if a.part:
        {"write": write, "labkit": by_labkit, "diffusers": by_diffusers}[a.part](a)
        return 0
    folder = Path(a.folder or tempfile.mkdtemp(prefix="equality-"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "HF_HUB_OFFLINE": "1"}
    environment |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    try:
        for part in ("write", "diffusers", "labkit"):
            if part == "write" and (folder / "model" / "model_index.json").exists():
                continue
            start = time.perf_counter()
            call = [a.family, "--size", str(a.size), "--steps", str(a.steps), "--guidance", str(a.guidance), "--folder", str(folder), "--part", part]
            subprocess.run([sys.executable, __file__, *call], env=environment, check=True)
            print(f"{part:10} {time.perf_counter() - start:8.1f} s", flush=True)
        return compare(a, folder)
    finally:
        if not a.folder:
            shutil.rmtree(folder, ignore_errors=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=("sd15", "sd21", "sdxl"))
    parser.add_argument("--size", type=int, default=256, help="pixels of a side, a multiple of 64 (SDXL: of 32)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--folder", help="keep the weights here, and use those that are there")
    parser.add_argument("--part", choices=("write", "labkit", "diffusers"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write(a: argparse.Namespace) -> None:
    import torch
    from families import write as save

    torch.manual_seed(0)
    save(a.family, Path(a.folder) / "model", full=True, dtype=torch.float16)


def by_labkit(a: argparse.Namespace) -> None:
    import labkit
    import torch

    lab = labkit.load(Path(a.folder) / "model", "cpu", "float32")
    drawn = lab.generate(PROMPT, a.steps, a.guidance, seed=0, height=a.size, width=a.size, sampler="ddim", progress=False)
    torch.save((lab.decode(drawn.latents), drawn.latents), Path(a.folder) / "labkit.pt")


def by_diffusers(a: argparse.Namespace) -> None:
    import diffusers
    import torch

    pipe = diffusers.DiffusionPipeline.from_pretrained(Path(a.folder) / "model", dtype=torch.float32)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        PROMPT, num_inference_steps=a.steps, guidance_scale=a.guidance, height=a.size, width=a.size, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    with torch.no_grad():  # what the pipeline does with output_type="pt", without drawing twice
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    pictures = pipe.image_processor.postprocess(image, output_type="pt")
    torch.save((pictures, latents), Path(a.folder) / "diffusers.pt")


def compare(a: argparse.Namespace, folder: Path) -> int:
    """Print the differences; 1 if a pixel differs by more than 1/255."""
    import torch

    (ours, z), (theirs, y) = (torch.load(folder / f"{who}.pt", weights_only=True) for who in ("labkit", "diffusers"))
    pixel, latent = (ours - theirs).abs().max().item(), ((z - y).abs().max() / y.abs().max()).item()
    clipped = ((theirs <= 0) | (theirs >= 1)).float().mean().item()
    print(
        f"{a.family}, {a.size} x {a.size}, {a.steps} steps, guidance {a.guidance}: largest difference of a pixel {pixel * 255:.4f}/255, "
        f"of a latent {latent:.1e} of the largest; spread {theirs.std().item():.3f}, clipped {clipped:.1%}"
    )
    return int(not pixel <= 1 / 255)


if __name__ == "__main__":
    sys.exit(main())
