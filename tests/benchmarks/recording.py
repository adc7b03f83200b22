"""What recording costs: time of a step beside the same step without it, and the memory that is held in the end.

    python tests/benchmarks/recording.py                         all of it
    python tests/benchmarks/recording.py labkit,DAAM 5 3         those named, steps, rounds

Stable Diffusion 1.5's geometry, random weights, 256 pixels, guidance (batch 2). All contestants draw at the same time, each one step in
turn, so that whatever else the machine does falls on all alike; ratios are medians over steps of (contestant / the same host without
recording in the same turn). The same ratio of processor seconds is beside it: it does not count the time that others took.

    labkit             word heat maps as labkit.record makes them; "cond": without the negative prompt's; "steps": every step's
    P2P store          as Prompt-to-Prompt's AttentionStore: all maps of up to 32x32 places, cross and self, summed over steps
    all maps           every cross-attention map of every step appended to a list
    DAAM               the package `daam` (0.2.0) in diffusers' pipeline parts, where it can be imported; beside diffusers without it
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace

import torch
from speed import GUIDANCE, networks

import labkit
from labkit.diffusion import LatentDiffusion
from labkit.models.clip import CLIPText
from labkit.models.config import CLIPTextConfig, VAEConfig
from labkit.models.tokenizer import Tokenizer, build_vocabulary
from labkit.models.vae import VAE
from labkit.packing import pack
from labkit.probes.keep import size
from labkit.schedule import ScheduleConfig
from labkit.tap import listen, taps

PROMPT = "a red sphere left of a blue cube on a table"
SIDE = 256  # pixels
LABKIT, DIFFUSERS = "labkit, no recording", "diffusers, no recording"


class Turn:
    """One contestant: its listeners are at the taps of the network that all share only while it is its turn."""

    def __init__(self, unet: torch.nn.Module, make: Callable) -> None:
        self.taps = list(taps(unet).values())
        self.run, self.held = make()
        self.listeners = [list(tap.listeners) for tap in self.taps]
        self.leave()

    def leave(self) -> None:
        for tap in self.taps:
            tap.listeners = []

    def step(self) -> tuple[float, float]:
        """Wall and processor seconds of its next step."""
        for tap, listeners in zip(self.taps, self.listeners):
            tap.listeners = list(listeners)
        start, cpu = time.perf_counter(), time.process_time()
        next(self.run)
        taken = time.perf_counter() - start, time.process_time() - cpu
        self.leave()
        return taken


def recorded(lab: LatentDiffusion, stack: ExitStack, steps: int, **options) -> tuple[Iterator, Callable[[], int]]:
    trace = stack.enter_context(labkit.record(lab, **options))
    run = drawn(lab, steps)
    return run, lambda: sum(store.values.nbytes for store in trace.stores.values())


def stored(lab: LatentDiffusion, stack: ExitStack, steps: int) -> tuple[Iterator, Callable[[], int]]:
    """Prompt-to-Prompt's store: in each step the conditional half of all maps of up to 32x32 places is kept, then added to the sum."""
    now: dict[str, list] = {}
    total: dict[str, list] = {}

    def listener(probs: torch.Tensor, name: str) -> None:
        if probs.shape[2] <= 32**2:
            now.setdefault(name, []).append(probs[len(probs) // 2 :])  # a view: it keeps the other half alive, as published

    def between() -> Iterator:
        for step in drawn(lab, steps):
            for name, maps in now.items():
                if name in total:
                    total[name][0] += maps[0]
                else:
                    total[name] = maps
            now.clear()
            yield step

    stack.enter_context(listen(lab.unet, {"*.probs": listener}))
    return between(), lambda: sum(m.untyped_storage().nbytes() for maps in total.values() for m in maps)


def appended(lab: LatentDiffusion, stack: ExitStack, steps: int) -> tuple[Iterator, Callable[[], int]]:
    maps: list[torch.Tensor] = []
    stack.enter_context(listen(lab.unet, {"*.attn2.probs": lambda probs, name: maps.append(probs)}))
    return drawn(lab, steps), lambda: sum(m.nbytes for m in maps)


def drawn(lab: LatentDiffusion, steps: int) -> Iterator:
    return lab.steps(PROMPT, steps=steps, guidance=GUIDANCE, seed=0, height=SIDE, width=SIDE)


def diffusers_steps(unet, steps: int) -> Iterator:
    """The same network calls in diffusers' U-Net."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**vars(ScheduleConfig()), clip_sample=False)
    scheduler.set_timesteps(steps)
    torch.manual_seed(0)
    z, c = torch.randn(1, 4, SIDE // 8, SIDE // 8), torch.randn(2, 77, 768)
    for t in scheduler.timesteps:
        with torch.no_grad():
            a, b = unet(torch.cat([z, z]), t, c).sample.chunk(2)
        z = scheduler.step(a + GUIDANCE * (b - a), t, z).prev_sample
        yield t


def daam_steps(unet, stack: ExitStack, steps: int) -> tuple[Iterator, Callable[[], int]]:
    """diffusers' U-Net with daam's hooks on it; the pipeline around it is what daam's hooks ask for."""
    import daam

    pipe = SimpleNamespace(unet=unet, vae_scale_factor=8, check_inputs=lambda *a, **k: None, tokenizer=None)
    hooks = daam.trace(pipe)
    hooks.latent_hw = (SIDE // 8) ** 2  # it reads 512 pixels off the model; at 256 its own factors would leave out every map
    for hook in hooks.module:
        if hasattr(hook, "latent_hw"):
            hook.latent_hw = hooks.latent_hw
    stack.enter_context(hooks)
    return diffusers_steps(unet, steps), lambda: sum(m.nbytes for _, m in hooks.all_heat_maps)


def main(names: str = "", steps: int = 5, rounds: int = 4) -> None:
    unet, theirs = networks()
    tokenizer = Tokenizer(*build_vocabulary(PROMPT.split()), max_length=77)
    vae = VAE(VAEConfig((8, 8, 8, 8), 1, norm_num_groups=4))  # text and pictures are not what is timed
    lab = LatentDiffusion(pack(unet), vae, CLIPText(CLIPTextConfig(len(tokenizer), 77, 768, 64, 1, 12)), tokenizer, ScheduleConfig(), "sd15 geometry")
    del unet
    one = labkit.Keep(branches=("cond",))
    contestants = {
        "labkit": (LABKIT, lambda l, s: recorded(l, s, steps)),
        "labkit cond": (LABKIT, lambda l, s: recorded(l, s, steps, keep=one)),
        "labkit steps": (LABKIT, lambda l, s: recorded(l, s, steps, keep="steps")),
        "P2P store": (LABKIT, lambda l, s: stored(l, s, steps)),
        "all maps": (LABKIT, lambda l, s: appended(l, s, steps)),
        "DAAM": (DIFFUSERS, lambda l, s: daam_steps(hooked, s, steps)),
    }
    if unknown := [name for name in names.split(",") if names and name not in contestants]:
        sys.exit(f"there is no {unknown[0]!r}; there are {', '.join(contestants)}")
    contestants = {name: how for name, how in contestants.items() if not names or name in names.split(",")}
    if "DAAM" in contestants:
        try:
            import daam  # noqa: F401

            hooked = copy.deepcopy(theirs, {id(x): x for x in theirs.parameters()})
        except ImportError as error:
            print(f"DAAM is left out: {error}")
            del contestants["DAAM"]
    hosts = {LABKIT: (None, lambda l, s: (drawn(l, steps), lambda: 0)), DIFFUSERS: (None, lambda l, s: (diffusers_steps(theirs, steps), lambda: 0))}
    contestants = {host: hosts[host] for host in dict.fromkeys(host for host, _ in contestants.values())} | contestants
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    work: dict[str, list[float]] = {name: [] for name in contestants}
    held = {}
    for round_ in range(rounds + 1):  # the first does not count
        with ExitStack() as stack:
            turns = {name: Turn(lab.unet, lambda make=make: make(copy.copy(lab), stack)) for name, (_, make) in contestants.items()}
            for _ in range(steps):
                for name, turn in turns.items():
                    seconds, cpu = turn.step()
                    if round_:
                        wall[name].append(seconds)
                        work[name].append(cpu)
            held = {name: turn.held() for name, turn in turns.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {steps} steps, {rounds} rounds in turns, medians")
    for name, (host, _) in contestants.items():
        ratio = [f"{statistics.median(a / b for a, b in zip(t[name], t[host])):.3f}" if host else "" for t in (wall, work)]
        print(f"{name:26} {statistics.median(wall[name]):6.2f} s a step  time x {ratio[0]:6}  processor x {ratio[1]:6}  holds {size(held[name])}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
