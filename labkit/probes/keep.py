"""What a recording keeps, and what that takes.

    "sums"    the sum over steps, each head and each token by itself     the memory of one step, however many there are
    "steps"   each step, heads averaged, padding as one                  some 1/50 of raw: per-step maps of every word
    "raw"     each step, each head, each token                           all there is

A `Keep` says the same in detail, and for which layers and branches. What would take more than its budget is refused before
anything is drawn; Stable Diffusion 1.5 at 512 pixels in 50 steps has 6.6 GB of cross-attention in float32.
"""

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from labkit.errors import LabkitError
from labkit.probes.sites import Site, fits

BRANCHES = ("uncond", "cond")


@dataclass(frozen=True)
class Keep:
    """What of a recording is kept; attributes not named are those of "sums"."""

    steps: bool = False                        # every step by itself, else their sum
    heads: bool = True                         # every head by itself, else their mean
    padding: bool = True                       # every padding token by itself, else their sum
    layers: str | tuple[str, ...] = "*"        # names, short names or shell patterns
    branches: tuple[str, ...] = BRANCHES       # which are recorded, of those that are computed
    budget: float = 2 * 2**30                  # bytes

    def __post_init__(self) -> None:
        unknown = [branch for branch in self.branches if branch not in BRANCHES]
        if isinstance(self.branches, str) or unknown or not self.branches:
            raise LabkitError(f"branches is {self.branches!r}: give some of {BRANCHES}, as a tuple.")
        if not self.budget > 0:
            raise LabkitError(f"The budget is {self.budget!r}: give a number of bytes.")

    def chosen(self, found: list[Site]) -> list[Site]:
        """Those of some sites that are of these layers; LabkitError if there were some, but not of these layers."""
        patterns = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        chosen = [site for site in found if any(fits(site.layer, pattern) for pattern in patterns)]
        if found and not chosen:
            there = ", ".join(dict.fromkeys(site.layer for site in found))
            raise LabkitError(f"Nothing would be recorded: no layer fits {self.layers!r}; there are: {there}.")
        return chosen


WAYS = {"sums": Keep(), "steps": Keep(steps=True, heads=False, padding=False), "raw": Keep(steps=True)}


@dataclass(eq=False)
class Store:
    """What one site gave in one branch: sums over network calls, (entry, image, ...) float32; one entry for all steps, or with `apart` one a step."""

    values: Tensor
    apart: bool
    calls: list[int]  # of each entry; more than one a step where a sampler (Heun) calls the network twice in one
    steps: list[int] = field(default_factory=list)  # those that were seen

    def add(self, part: Tensor, i: int) -> None:
        """Add one network call of step i, (image, ...)."""
        entry = i if self.apart else 0
        self.values[entry] += part.to(self.values.device)
        self.calls[entry] += 1
        if i not in self.steps[-1:]:
            self.steps.append(i)

    def mean(self, image: int, step: int | slice | None = None, columns: list[int] | None = None) -> tuple[Tensor, tuple[int, ...] | None]:
        """One picture's mean over all calls, or of one step, (...) and None; of a slice of steps (step, ...) and their numbers.

        `columns` picks of the last axis. Raises LabkitError if steps were not kept apart, or if there is no such step.
        """
        values = self.values[:, image]  # (entry, ...)
        entries = list(range(len(self.calls))) if step is None else self._chosen(step)
        values = values[entries] if len(entries) < len(self.calls) else values
        values = values if columns is None else values[..., columns]
        if step is None:
            return values.sum(0).cpu() / sum(self.calls), None
        calls = torch.tensor([self.calls[i] for i in entries]).view(-1, *[1] * (values.ndim - 1))
        return (values.cpu() / calls, tuple(entries)) if isinstance(step, slice) else (values[0].cpu() / calls[0], None)

    def _chosen(self, step: int | slice) -> list[int]:
        """The entries of a step or of a slice of steps."""
        if not self.apart:
            raise LabkitError("The steps were added up while they were recorded: record(lab, keep='steps'), or 'raw', keeps them apart.")
        chosen = [i for i in range(len(self.calls))[step] if self.calls[i]] if isinstance(step, slice) else [i for i in self.steps if i == step]
        if not chosen or isinstance(step, bool):
            asked = f"no recorded step in {step.start}:{step.stop}" if isinstance(step, slice) else f"no step {step!r}"
            raise LabkitError(f"There are steps {self.steps[0]} to {self.steps[-1]}, there is {asked}.")
        return chosen[:1] if not isinstance(step, slice) else chosen


@dataclass(frozen=True)
class Plan:
    """What a run will keep: its sites, and the shape of the store of each, in each branch."""

    keep: Keep
    sites: dict[str, Site]               # by tap
    shapes: dict[str, tuple[int, ...]]   # by tap: (entry, image, ...)
    branches: tuple[str, ...]
    columns: int                         # tokens kept by themselves; behind them, if there are more, one for all others

    @property
    def bytes(self) -> int:
        """What the stores take when the last step is done."""
        return 4 * len(self.branches) * sum(prod(shape) for shape in self.shapes.values())

    def store(self, tap: str, device: torch.device) -> Store:
        """An empty store. Steps that are kept leave the device of the network, sums stay there."""
        shape, apart = self.shapes[tap], self.apart(self.sites[tap])
        return Store(torch.zeros(shape, device="cpu" if apart else device), apart, [0] * shape[0])

    @property
    def grows(self) -> bool:
        """Whether the stores grow with the number of steps."""
        return any(self.apart(site) for site in self.sites.values())

    def apart(self, site: Site) -> bool:
        return self.keep.steps or site.kind == "queries"  # softmax is not linear: a mean of queries is of no use

    def reduced(self, site: Site, part: Tensor) -> Tensor:
        """What is kept of a branch's rows (image, ...) of one network call, in the shape of the site."""
        part = part.detach().float()
        if site.kind in ("cross", "self") and not self.keep.heads:
            part = part.mean(1, keepdim=True)
        if site.kind == "cross" and self.columns < part.shape[-1]:
            part = torch.cat([part[..., : self.columns], part[..., self.columns :].sum(-1, keepdim=True)], dim=-1)
        return part.reshape(len(part), *self.shapes[site.tap][2:])


def plan(found: list[Site], keep: Keep, counts: tuple[int, int], branches: tuple[str, ...], columns: int) -> Plan:
    """The Plan for sites of a U-Net and a run of `counts` (steps, pictures); LabkitError if it is empty or over its budget.

    `branches` are those that are computed, `columns` is how many tokens the longest text has, start and end included.
    """
    (steps, images), chosen = counts, {site.tap: site for site in keep.chosen(found)}
    if not (kept := tuple(branch for branch in branches if branch in keep.branches)):
        raise LabkitError(f"Nothing would be recorded: of the branches {', '.join(keep.branches)} none is computed, only {', '.join(branches)}.")
    columns = 10**9 if keep.padding else columns
    shapes = {}
    for tap, site in chosen.items():
        head, *rest = site.shape
        if site.kind in ("cross", "self") and not keep.heads:
            head = 1
        if site.kind == "cross":
            rest[-1] = min(rest[-1], columns + 1)
        shapes[tap] = (steps if keep.steps or site.kind == "queries" else 1, images, head, *rest)
    made = Plan(keep, chosen, shapes, kept, columns)
    if made.bytes > keep.budget:
        raise LabkitError(
            f"This recording would take {size(made.bytes)} and its budget is {size(keep.budget)}: record fewer layers or steps, or one branch, "
            "as in keep=Keep(layers='up.1', branches=('cond',)), or allow more, as in Keep(budget=16e9)."
        )
    return made


def size(bytes_: float) -> str:
    """Bytes for people."""
    return next(f"{bytes_ / 1000**n:.3g} {unit}" for n, unit in ((3, "GB"), (2, "MB"), (1, "kB"), (0, "bytes")) if bytes_ >= 1000**n or n == 0)
