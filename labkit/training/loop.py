"""The one training loop: draw a batch, take a step for each player, remember enough to go on after a kill.

    theta <- AdamW(theta, grad L(theta));    theta_ema <- d theta_ema + (1 - d) theta,   d = min(decay, (1 + i) / (10 + i))

Everything random in step i comes from a generator seeded with (seed, i), never from what ran before. A run that was killed
and resumed therefore draws what the undisturbed run draws and ends at the same weights. Several processes (accelerate,
torchrun) draw the same global batch and each takes its share.

A recipe (clip.py, vae.py, diffusion.py) is a list of players, a function that draws batches, and one that paints a sheet of
samples. A player is an objective, a module whose forward(batch) returns a dict of scalars with its "loss", and its optimiser.
Most recipes have one; the autoencoder plays against a discriminator.
"""
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from labkit.device import has_bfloat16, keep_freed_memory, pick_device
from labkit.errors import CheckpointError, LabkitError
from labkit.models.whole import whole_file


@dataclass(frozen=True)
class LoopConfig:
    """How long, how fast, how often."""

    steps: int
    batch_size: int  # over all processes together
    lr: float
    warmup: int = 200  # steps of linear rise
    cooldown: float = 0.3  # last share of the steps, over which the rate falls linearly to zero
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    save_every: int = 200
    sheet_every: int = 1000
    mixed_precision: str = "no"  # "bf16": where the device is faster in it; elsewhere, on most laptops, float32 as with "no"

    def autocasts(self, device: torch.device) -> bool:
        """Whether bfloat16 is asked for and the device is made for it."""
        return self.mixed_precision == "bf16" and has_bfloat16(device)

    def rate(self, step: int) -> float:
        """The learning rate of a step: rise, plateau, fall."""
        fall = max(int(self.steps * self.cooldown), 1)
        return self.lr * min((step + 1) / max(self.warmup, 1), 1.0, (self.steps - step) / fall)


@dataclass
class Player:
    """An objective and what it trains. Modules that only help to compute the loss stay out of `trains`."""

    name: str
    objective: nn.Module  # forward(batch) -> {"loss": (), ...}
    trains: dict[str, nn.Module]  # saved under these names; the first player's are averaged too (EMA)
    lr_factor: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    channels_last: bool = True  # the faster layout of weights for most convolutions; False where there are few channels


@dataclass
class Recipe:
    """What is trained, on what, and how to look at it."""

    players: list[Player]
    batch: Callable[[int, "Share"], dict]  # (step, share) -> this process's part of the batch
    sheet: Callable[[dict[str, nn.Module]], object] | None = None  # averaged modules -> PIL image
    stop_step: Callable[[int, dict], None] = field(default=lambda step, losses: None)  # for tests and notebooks: may raise


@dataclass(frozen=True)
class Share:
    """Which rows of the global batch are this process's, and where they go."""

    rank: int
    world: int
    batch_size: int
    seed: int
    device: torch.device

    def generator(self, step: int) -> torch.Generator:
        """The source of everything random in this step; the same in all processes."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)

    def mine(self, rows: Tensor) -> Tensor:
        """This process's rows of something drawn for the whole batch."""
        return rows[self.rank :: self.world].to(self.device)


def run(recipe: Recipe, config: LoopConfig, folder: str | Path, device: str | None = None, progress: bool = True) -> dict[str, nn.Module]:
    """Train, or go on training, in `folder`; returns the averaged modules by name.

    Leaves checkpoint.pt (complete state), log.jsonl (losses) and sheet-*.png there. Raises LabkitError if a loss stops being
    finite; the last checkpoint stays.
    """
    if config.steps <= 0 or config.batch_size <= 0:
        raise LabkitError(f"training needs at least one step and one picture a batch, got steps={config.steps}, batch_size={config.batch_size}")
    if config.mixed_precision not in ("no", "bf16"):
        raise LabkitError(f"mixed_precision is {config.mixed_precision!r}: use 'no' or 'bf16'")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=pick_device(device).type == "cpu")  # told, since without a GPU it would not join its processes
    keep_freed_memory()
    if config.batch_size % accelerator.num_processes:
        raise LabkitError(f"batch_size={config.batch_size} does not divide among {accelerator.num_processes} processes")
    state = State(recipe, config, accelerator)
    step = state.load(folder / "checkpoint.pt")
    share = Share(accelerator.process_index, accelerator.num_processes, config.batch_size, config.seed, accelerator.device)
    main = accelerator.is_main_process
    if main:
        trim_log(folder / "log.jsonl", step)
        for left in folder.glob(".*.unfinished"):  # of a run that was killed while it wrote
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    bar = tqdm(range(step, config.steps), initial=step, total=config.steps, desc=folder.name, disable=not (progress and main))
    for step in bar:
        losses = state.step(step, recipe.batch(step, share))
        recipe.stop_step(step, losses)
        bar.set_postfix({k: f"{v:.3f}" for k, v in losses.items()})
        if main and (step % 10 == 0 or step + 1 == config.steps):
            write_log(folder / "log.jsonl", {"step": step, "time": round(time.time(), 1), **{k: round(v, 5) for k, v in losses.items()}})
        if main and ((step + 1) % config.save_every == 0 or step + 1 == config.steps):
            state.save(folder / "checkpoint.pt", step + 1)
        if main and recipe.sheet and ((step + 1) % config.sheet_every == 0 or step + 1 == config.steps):
            with torch.random.fork_rng(devices=[]), whole_file(folder / f"sheet-{step + 1:06d}.png", overwrite=True) as unfinished:
                recipe.sheet(state.averaged()).save(unfinished, "PNG")
    accelerator.wait_for_everyone()
    return state.averaged()


class State:
    """Networks, optimisers and averages, and how to step, save and load them."""

    def __init__(self, recipe: Recipe, config: LoopConfig, accelerator: Accelerator) -> None:
        self.recipe, self.config, self.accelerator = recipe, config, accelerator
        self.objectives, self.optimisers = [], []
        for player in recipe.players:
            parameters = [p for m in player.trains.values() for p in m.parameters() if p.requires_grad]
            optimiser = torch.optim.AdamW(parameters, lr=config.lr, betas=player.betas, weight_decay=config.weight_decay, fused=True)
            layout = torch.channels_last if player.channels_last else torch.preserve_format
            objective = player.objective.to(accelerator.device, memory_format=layout)
            objective, optimiser = accelerator.prepare(objective, optimiser)
            self.objectives.append(objective)
            self.optimisers.append(optimiser)
        self.modules = {name: m for player in recipe.players for name, m in player.trains.items()}
        self.ema = {name: {k: v.detach().clone() for k, v in m.state_dict().items()} for name, m in recipe.players[0].trains.items()}

    def step(self, step: int, batch: dict) -> dict[str, float]:
        """One update of every player; the losses, averaged over processes. Players share `batch`, so one can leave things for the next."""
        losses = {}
        for player, objective, optimiser in zip(self.recipe.players, self.objectives, self.optimisers):
            for group in optimiser.param_groups:
                group["lr"] = self.config.rate(step) * player.lr_factor
            # torch's own, since accelerate keeps one precision for the whole process and our stages have one each
            with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.autocasts(self.accelerator.device)):
                out = objective(batch)
            values = self.accelerator.reduce(torch.stack([v.detach().float() for v in out.values()]), reduction="mean").tolist()
            losses.update(zip(out, values) if len(self.objectives) == 1 else {f"{player.name}.{k}": v for k, v in zip(out, values)}.items())
            bad = [k for k, v in zip(out, values) if v != v or abs(v) == float("inf")]
            if bad:
                raise LabkitError(
                    f"step {step}: {player.name}'s {bad[0]} is not finite; the last checkpoint is kept, resume from it with a lower learning rate than "
                    f"{self.config.lr:g}"
                )
            optimiser.zero_grad()
            self.accelerator.backward(out["loss"])
            self.accelerator.clip_grad_norm_([p for g in optimiser.param_groups for p in g["params"]], self.config.clip_norm)
            optimiser.step()
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        for name, average in self.ema.items():
            for k, v in self.modules[name].state_dict().items():
                average[k].lerp_(v.detach(), 1 - decay) if v.is_floating_point() else average[k].copy_(v)
        return losses

    def averaged(self) -> dict[str, nn.Module]:
        """Copies of the first player's modules that hold the averaged weights, in evaluation mode."""
        import copy

        copies = {name: copy.deepcopy(self.modules[name]) for name in self.ema}
        for name, module in copies.items():
            module.load_state_dict(self.ema[name])
            module.eval().requires_grad_(False)
        return copies

    def save(self, path: Path, step: int) -> None:
        """Write the whole state, in place of the last one: there is always one whole checkpoint."""
        modules, optimisers = {k: m.state_dict() for k, m in self.modules.items()}, [o.state_dict() for o in self.optimisers]
        write_state({"step": step, "ema": self.ema, "modules": modules, "optimisers": optimisers}, path)

    def load(self, path: Path) -> int:
        """Take up the state in `path` if there is one; the step to go on from."""
        if not path.exists():
            return 0
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            for name, module in self.modules.items():
                module.load_state_dict(saved["modules"][name])
            for optimiser, values in zip(self.optimisers, saved["optimisers"]):
                optimiser.load_state_dict(values)
            for name, average in self.ema.items():
                for k, v in average.items():
                    v.copy_(saved["ema"][name][k])
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]  # an empty file's error says nothing
            raise CheckpointError(f"{path} cannot be resumed from ({reason}); move it away to start afresh") from error
        return saved["step"]


def write_state(state: dict, path: Path) -> None:
    """Write what `torch.load(weights_only=True)` reads back, whole or not at all; CheckpointError where it cannot be written, as on a full disk."""
    with whole_file(path, overwrite=True) as unfinished, open(unfinished, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def write_log(path: Path, row: dict) -> None:
    """Add a line to the log; LabkitError where it cannot be written, as on a full disk."""
    try:
        with open(path, "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
    except OSError as error:
        raise LabkitError(f"{path}: cannot be written ({error.strerror or error}); the last checkpoint is whole. Make room, and start again.") from None


def trim_log(path: Path, step: int) -> None:
    """Drop log lines of steps that a killed run took after its last checkpoint."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}") and json.loads(line)["step"] < step]
        with whole_file(path, overwrite=True) as unfinished:
            unfinished.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
