"""labkit beside diffusers: the same weights, the same settings, in one process and in turns; medians, and whether outputs agree.

    python tests/benchmarks/speed.py                     all of it
    python tests/benchmarks/speed.py unet32 loop         those named: unet64, unet32, bf16, loop, decode, load

The geometry is that of Stable Diffusion 1.5, the weights are random. `load` starts a fresh Python for each reading.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice, product
from string import ascii_lowercase
from pathlib import Path

import torch

from labkit.diffusion import LatentDiffusion
from labkit.models.clip import CLIPText
from labkit.models.config import SD15_TEXT, SD15_UNET, SD15_VAE
from labkit.models.formats import unet_to_diffusers, vae_to_diffusers
from labkit.models.unet import UNet
from labkit.models.vae import VAE
from labkit.packing import pack

STEPS, GUIDANCE = 20, 7.5


def alternate(ours: Callable, theirs: Callable, rounds: int) -> tuple[float, float, tuple]:
    """Median seconds of two functions called in turns, after one call of each that does not count; and what those returned."""
    first = ours(), theirs()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for f, seconds in zip((ours, theirs), times):
            start = time.perf_counter()
            f()
            seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1]), first


def report(what: str, target: float, ours: Callable, theirs: Callable, rounds: int = 5) -> None:
    mine, other, (a, b) = alternate(ours, theirs, rounds)
    difference = float((a.float() - b.float()).norm() / b.float().norm())
    print(f"{what:48} labkit {mine:7.2f} s  diffusers {other:7.2f} s  ratio {mine / other:.2f} (target {target})  difference {difference:.1e}", flush=True)


def networks() -> tuple[UNet, torch.nn.Module]:
    """labkit's U-Net and diffusers', around the same random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    ours = UNet(SD15_UNET).eval().requires_grad_(False)
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(unet_to_diffusers(SD15_UNET))
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return ours, theirs.eval().requires_grad_(False)


def unet(side: int, target: float, half: bool = False) -> None:
    ours, theirs = networks()
    x, c, t = torch.randn(2, 4, side, side), torch.randn(2, 77, 768), torch.tensor(500)
    fast = pack(ours.bfloat16() if half else ours)
    if half:  # ours in bfloat16 against theirs in float32, which shares no weights any more
        x16, c16 = x.bfloat16(), c.bfloat16()
        report(f"U-Net, bfloat16 against float32, {side}x{side}, batch 2", target, lambda: fast(x16, t, c16), lambda: theirs(x, t, c).sample)
    else:
        report(f"U-Net, float32, {side}x{side}, batch 2", target, lambda: fast(x, t, c), lambda: theirs(x, t, c).sample)


def decode() -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    ours = VAE(SD15_VAE).eval().requires_grad_(False)
    theirs = AutoencoderKL.from_config(vae_to_diffusers(SD15_VAE)).eval().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    z, fast = torch.randn(1, 4, 64, 64), pack(ours)
    report("VAE decode, 512 pixels", 0.65, lambda: fast.decode(z), lambda: theirs.decode(z).sample, 3)


def loop() -> None:
    """20 steps of DDIM with guidance at 256 pixels: latents to latents, text states given."""
    from diffusers import DDIMScheduler

    from labkit.guidance import classifier_free
    from labkit.samplers import ddim
    from labkit.schedule import Schedule, ScheduleConfig

    ours, theirs = networks()
    fast, schedule = pack(ours), Schedule(ScheduleConfig())
    config = vars(ScheduleConfig())
    x, c, uncond = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768), torch.randn(1, 77, 768)

    def mine() -> torch.Tensor:
        for step in ddim(classifier_free(fast, c, uncond, GUIDANCE), x, schedule, STEPS):
            pass
        return step.x

    def other() -> torch.Tensor:
        scheduler, z = DDIMScheduler(**config, clip_sample=False), x
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            a, b = theirs(torch.cat([z, z]), t, torch.cat([uncond, c])).sample.chunk(2)
            z = scheduler.step(a + GUIDANCE * (b - a), t, z).prev_sample
        return z

    report(f"{STEPS} steps of DDIM, guidance {GUIDANCE}, 256 pixels", 0.5, mine, other, 1)


def load() -> None:
    """From starting Python to a loaded pipeline; the folder is read once before, so that it is in memory for both."""
    from labkit.checkpoint import save_pipeline
    from labkit.schedule import ScheduleConfig

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        tokenizer = large_tokenizer()
        save_pipeline(LatentDiffusion(UNet(SD15_UNET), VAE(SD15_VAE), CLIPText(SD15_TEXT), tokenizer, ScheduleConfig()), target)
        mine = f"import labkit; labkit.load({str(target)!r}, 'cpu')"
        other = f"from diffusers import StableDiffusionPipeline; StableDiffusionPipeline.from_pretrained({str(target)!r})"

        def start(code: str) -> Callable:
            return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

        ours, theirs, _ = alternate(start(mine), start(other), 5)
        print(f"{'start Python, load SD 1.5 from memory':48} labkit {ours:7.2f} s  diffusers {theirs:7.2f} s  ratio {ours / theirs:.2f} (target 0.5)", flush=True)
        just_unet(target)
        ours, bare, _ = alternate(start("import torch, labkit"), start("import torch"), 5)
        print(f"{'import labkit beside import torch':48} {ours - bare:+.2f} s (target 0.3)", flush=True)


def just_unet(model: Path) -> None:
    """The U-Net alone, in fresh processes: seconds of loading without imports, and the largest memory after it and after reading it all once."""
    ours = (
        "from labkit.models import files, folder, formats, unet\n"
        "def load(path):\n"
        "    source = folder.Folder(path)\n"
        "    config = formats.unet_config(source.config('unet'))\n"
        "    table, file = source.tensors('unet', 'meta')\n"
        "    return files.fill(lambda: unet.UNet(config), table, lambda: source.tensors('unet', 'cpu')[0], file)\n"
    )
    theirs = "from diffusers import UNet2DConditionModel\ndef load(path): return UNet2DConditionModel.from_pretrained(path / 'unet')\n"
    told = (
        "import time, torch, pathlib, re\n"  # Linux only; ru_maxrss would start from the parent's
        "def most(): return int(re.search('VmHWM: *([0-9]+)', pathlib.Path('/proc/self/status').read_text().replace(chr(9), ' '))[1]) / 1e6\n"
        f"before, start = most(), time.perf_counter()\nunet = load(pathlib.Path({str(model)!r}))\n"
        "seconds, loaded = time.perf_counter() - start, most()\nsum(p.sum() for p in unet.parameters())\n"
        "print(seconds, loaded - before, most() - before, sum(p.nbytes for p in unet.parameters()) / 1e9)"
    )
    for name, code in (("labkit", ours), ("diffusers", theirs)):
        runs = [subprocess.run([sys.executable, "-c", code + told], check=True, capture_output=True, text=True).stdout.split() for _ in range(5)]
        seconds, loaded, read, size = (statistics.median(map(float, column)) for column in zip(*runs))
        print(f"U-Net of {size:.2f} GB, {name:9} {seconds:7.2f} s  memory {loaded:.2f} GB when loaded, {read:.2f} GB when all of it has been read", flush=True)


def large_tokenizer():
    """A tokenizer of the true size, 49,408 tokens: all words of two and three letters and some of four."""
    from labkit.models.tokenizer import Tokenizer, build_vocabulary

    small, _ = build_vocabulary(["a"])
    letters, room = ascii_lowercase, 49_408 - len(small)
    merges = [(a, b) for a, b in product(letters, letters)] + [(a + b, c) for a, b, c in product(letters, letters, letters)]
    merges += [(a + b + c, d) for a, b, c, d in islice(product(letters, repeat=4), room - len(merges))]
    *tokens, bos, eos = sorted(small, key=small.get)
    tokens += ["".join(pair) for pair in merges]
    return Tokenizer({token: i for i, token in enumerate([*tokens, bos, eos])}, merges, max_length=77)


PARTS = {
    "unet64": lambda: unet(64, 0.65), "unet32": lambda: unet(32, 0.5), "bf16": lambda: unet(32, 0.35, half=True),
    "loop": loop, "decode": decode, "load": load,
}  # fmt: skip

if __name__ == "__main__":
    unknown = [name for name in sys.argv[1:] if name not in PARTS]
    if unknown:
        sys.exit(f"there is no {unknown[0]!r}; there are {', '.join(PARTS)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with torch.no_grad():
        for name in sys.argv[1:] or PARTS:
            PARTS[name]()
