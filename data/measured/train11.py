import sys
from dataclasses import replace
import labkit
assert labkit.__file__.startswith("/tmp/frozen"), labkit.__file__
from labkit.training import tabletop
from labkit.training.lessons import Course
from labkit.training.loop import LoopConfig
from labkit.training.tabletop import PRESETS, train
if __name__ == "__main__":
    stage, steps = sys.argv[1], int(sys.argv[2])
    SECOND = Course(((0.0, {"all": 0.3, "fine": 0.2, "number": 0.25, "two": 0.15, "relation": 0.05, "early": 0.05}),))
    preset = replace(PRESETS["further"], vae=None, course=SECOND,
        diffusion=LoopConfig(steps=steps, batch_size=64, lr=6e-4, warmup=300, cooldown=0.75, mixed_precision="bf16"))
    folder = "/work/main/runs/eleventh"
    if stage == "data":
        from pathlib import Path
        tabletop.pictures(Path(folder), preset)
    elif stage == "latents":
        from labkit.training import diffusion
        from pathlib import Path
        f = Path(folder); vae = tabletop.autoencoder(f, preset)
        diffusion.latents(vae, tabletop.pictures(f, preset), f / "latents.safetensors", "cpu", vae.config.scaling_factor)
    elif stage == "export":
        tabletop.export(folder, preset, sys.argv[3])
    else:
        train(stage, folder, preset, "cpu")
