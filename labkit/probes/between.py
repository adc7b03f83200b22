"""What lies between two pictures: between two seeds, and between two prompts.

    slerp(a, b; f) = sin((1 - f) theta) / sin(theta) a + sin(f theta) / sin(theta) b,    cos(theta) = a.b / |a||b|       Shoemake 1985
    c_f = (1 - f) c + f c'

Noise is interpolated on the sphere, because a straight line between two standard normal samples passes through points that are too short
to be any (half way, 1/sqrt(2) of the length), and of those the model draws grey; text states have no such length and go straight.
"""

import torch
from torch import Tensor

from labkit.device import Noise
from labkit.diffusion import Course, LatentDiffusion
from labkit.errors import LabkitError
from labkit.probes.courses import by_row, condition, drawn, telling


def slerp(a: Tensor, b: Tensor, f: float) -> Tensor:
    """The point at share f of the way from a to b on the sphere through both; a and b of one shape, taken as one vector each."""
    cos = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1).double()
    theta = cos.arccos()
    if theta.sin() < 1e-4:  # nearly parallel: the straight line is the arc
        return torch.lerp(a, b, f)
    return (((1 - f) * theta).sin() / theta.sin()).to(a) * a + ((f * theta).sin() / theta.sin()).to(a) * b


def between_seeds(lab: LatentDiffusion, prompt: str, seeds: tuple[int, int] = (0, 1), n: int = 6, **options) -> tuple[list, Tensor]:
    """`n` pictures of a prompt from one seed to another, both ends included; PIL pictures and latents (n, 4, h, w). Raises LabkitError."""
    shares = _shares(n)
    if len(seeds) != 2:
        raise LabkitError(f"seeds is {seeds!r}: give the two seeds to go between.")

    def course(noise: Noise) -> Course:
        a, b = (Noise([seed], noise.shape).draw()[0] for seed in seeds)
        return Course(torch.stack([slerp(a, b, f) for f in shares]))

    return drawn(lab, [prompt] * n, course, seed=[seeds[0]] * n, **options)


def between_prompts(lab: LatentDiffusion, prompts: tuple[str, str], seed: int = 0, n: int = 6, **options) -> tuple[list, Tensor]:
    """`n` pictures of one seed from one prompt to another, both ends included; PIL pictures and latents (n, 4, h, w). Raises LabkitError."""
    shares = _shares(n)
    if isinstance(prompts, str) or len(prompts) != 2:
        raise LabkitError(f"prompts is {prompts!r}: give the two prompts to go between.")
    a, b = (condition(lab, prompt, **options) for prompt in prompts)
    c = by_row(lambda x, y: torch.cat([torch.lerp(x, y, f) for f in shares]), a, b)
    return drawn(lab, [prompts[0]] * n, telling(lab, lambda i: c), seed=[seed] * n, **options)


def _shares(n: int) -> list[float]:
    if type(n) is not int or n < 2:
        raise LabkitError(f"n is {n!r}: give 2 pictures or more, the two ends are among them.")
    return [k / (n - 1) for k in range(n)]
