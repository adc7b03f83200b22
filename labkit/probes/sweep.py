"""A sweep: the same prompt under several guidance scales, each with several seeds.

    eps = eps_u + w (eps_c - eps_u),    w across, seeds down

One row of pictures starts from one x_T, so that along it nothing but w changes. All are drawn in one batch, each with a
scale of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError


@dataclass(frozen=True, eq=False)
class Sweep:
    """`images[row][column]`: one row a seed, one column a guidance scale."""

    images: list[list[Image]]
    scales: tuple[float, ...]
    seeds: tuple[int, ...]
    prompt: str


def sweep_guidance(
    lab: LatentDiffusion, prompt: str, scales: Sequence[float] = (1.0, 2.0, 4.0, 8.0), seeds: Sequence[int] = (0, 1, 2),
    steps: int | None = None, progress: bool = False, **options,
) -> Sweep:  # fmt: skip
    """Draw a prompt at every scale with every seed, in one batch of len(scales) * len(seeds) pictures.

    `options` go to `lab.generate` (negative_prompt, height, width, sampler). Raises LabkitError if a list is empty, and
    whatever `generate` raises.
    """
    scales, seeds = list(scales), list(seeds)
    if not scales or not seeds:
        raise LabkitError("A sweep needs one guidance scale and one seed at least.")
    drawn = lab.generate(
        prompt, steps=steps, guidance=scales * len(seeds), seed=[s for s in seeds for _ in scales], progress=progress, **options
    )
    rows = [drawn.images[i : i + len(scales)] for i in range(0, len(drawn.images), len(scales))]
    return Sweep(rows, tuple(float(w) for w in scales), tuple(seeds), prompt)
