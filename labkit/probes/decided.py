"""When a picture is decided: the prompt is exchanged at step k, and what follows is compared with both prompts' own pictures.

    x(k):  c for steps 0 ... k-1,  c' from step k on,  the same noise
    share(k) = d(x(k), x(N)) / (d(x(k), x(N)) + d(x(k), x(0))),    d the root mean square difference of the pictures

x(N) is the first prompt's picture, x(0) the second's. Share 1 is the second prompt's picture, share 0 the first's: a step from which on
the share stays low is one after which it no longer matters what is said. Balaji et al. 2022 (eDiff-I, figure 4) exchange prompts so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.probes.courses import by_row, condition, drawn, seeds_of, telling
from labkit.recipe import complete


@dataclass(frozen=True, eq=False)
class Switched:
    """`images[seed][k]` (PIL) of prompts exchanged at step `at[k]`; `share` (seed, k): how much of the second prompt's picture is there."""

    images: list[list]
    at: tuple[int, ...]
    share: Tensor
    seeds: tuple[int, ...]
    prompts: tuple[str, str]
    read: list[list] | None = None  # what `judge` said of each picture, read[seed][k]

    @property
    def decided(self) -> int:
        """The first of the steps at which, in the mean over seeds, the picture is nearer to the first prompt's than to the second's."""
        return next(k for k, share in zip(self.at, self.share.mean(0)) if share < 0.5)


def switch_prompt(
    lab: LatentDiffusion, first: str, second: str, at: Sequence[int] | None = None, seeds: int | Sequence[int] = 0,
    judge: Callable[[list], Sequence] | None = None, **options,
) -> Switched:  # fmt: skip
    """Draw `first` and go over to `second` at each step of `at` (default: all), with every seed; 0 is the second alone, N the first alone.

    `judge(images)` may read the pictures, such as `labkit.scenes.verify.classify`; `options` as in `lab.generate`. Raises LabkitError.
    """
    seeds = seeds_of(seeds)
    steps = complete(lab, first, **options).steps
    at = sorted({0, steps, *(range(steps + 1) if at is None else at)})
    if wrong := [k for k in at if type(k) is not int or not 0 <= k <= steps]:
        raise LabkitError(f"There is no step {wrong[0]!r} to exchange the prompt at; there are 0 (the second prompt alone) to {steps} (the first alone).")
    a, b = (condition(lab, prompt, **options) for prompt in (first, second))
    images, shares = [], []
    for seed in seeds:
        told = lambda i: by_row(lambda x, y: torch.cat([x if i < k else y for k in at]), a, b)  # noqa: E731
        pictures, latents = drawn(lab, [first] * len(at), telling(lab, told), seed=[seed] * len(at), **options)
        pixels = lab.decode(latents).cpu()
        to_first, to_second = ((pixels - pixels[end]).pow(2).flatten(1).mean(1).sqrt() for end in (-1, 0))
        images.append(pictures)
        shares.append(to_first / (to_first + to_second).clamp(min=1e-12))
    read = None if judge is None else [list(judge(row)) for row in images]
    return Switched(images, tuple(at), torch.stack(shares), tuple(seeds), (first, second), read)
