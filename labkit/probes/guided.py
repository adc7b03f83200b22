"""What the guidance scale does, in numbers: one batch of pictures, a scale and a seed each.

    adherence     what a judge of pictures says                        share of pictures, or a score; needs `judge`
    diversity     mean over pairs of seeds of  rms(x_a - x_b)          of pictures in [0, 1], at one scale
    saturation    mean over places of  (max - min) / max  of R, G, B   HSV's S
    clipped       share of channel values outside [0, 1]               what strong guidance burns out
    entropy       - sum over tokens of  A log2 A                       bits, mean over places, heads, layers, steps; branch "cond"
    angle         arccos( eps_c . eps_u / |eps_c| |eps_u| )            degrees, mean over steps

Ho & Salimans 2021 trade diversity for adherence by w; Lin et al. 2023 say why saturation follows. eps_c and eps_u are taken apart again
from what the network says and the step's guided eps = eps_u + w (eps_c - eps_u); for v networks eps_c - eps_u = sqrt(alpha_bar) (v_c - v_u).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, sqrt

import torch
from torch import Tensor

from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.generation import to_pil
from labkit.probes.courses import seeds_of
from labkit.samplers import Step
from labkit.schedule import Schedule
from labkit.tap import listen

FACTOR = {  # d eps / d output: eps = FACTOR output + what is the same in both branches
    "epsilon": lambda a: 1.0,
    "v_prediction": lambda a: sqrt(a),
    "sample": lambda a: -sqrt(a / (1 - a)),
}


@dataclass(frozen=True, eq=False)
class Guided:
    """`measures`: by name (seed, scale), but diversity (scale,); `angles` (step, seed, scale) in degrees; `images[seed][scale]`, PIL."""

    images: list[list]
    scales: tuple[float, ...]
    seeds: tuple[int, ...]
    measures: dict[str, Tensor]
    angles: Tensor
    t: tuple[float, ...]
    prompt: str

    def table(self) -> list[dict[str, float]]:
        """One row a scale: the mean of each measure over seeds."""
        means = {name: m if m.ndim == 1 else m.mean(0) for name, m in self.measures.items()}
        return [{"w": w, **{name: float(m[k]) for name, m in means.items()}} for k, w in enumerate(self.scales)]


def measure_guidance(
    lab: LatentDiffusion, prompt: str, scales: Sequence[float] = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0), seeds: int | Sequence[int] = (0, 1, 2, 3),
    judge: Callable[[list], Sequence[float]] | None = None, **options,
) -> Guided:  # fmt: skip
    """Draw a prompt at every scale with every seed, in one batch, and measure pictures, attention and eps.

    `judge(images)` gives one number a picture: how well it shows the prompt. `options` as in `lab.generate`, without rescale and interval.
    Raises LabkitError where two branches cannot be compared: scales that are all 0 or all 1, a sampler that calls the network twice a step.
    """
    scales, seeds = [float(w) for w in scales], seeds_of(seeds)
    if len(seeds) < 2 or not scales or {*scales} <= {0.0} or {*scales} <= {1.0}:
        raise LabkitError(f"scales is {scales!r}, seeds {seeds!r}: give two seeds, and scales that are not all 0 or all 1 (one branch alone has no angle).")
    if options.get("rescale") or options.get("interval") or options.get("sampler") == "heun":
        raise LabkitError("Guidance is measured without rescale and interval, and not with heun: eps could not be taken apart into its two branches.")
    w = scales * len(seeds)
    heard, entropy, steps = [], Entropy(len(w)), []
    with listen(lab.unet, {"out": lambda x, name: heard.append(x.float()), "*.attn2.probs": lambda probs, name: entropy.add(probs, lab.layout)}):
        for step in lab.steps(prompt, guidance=w, seed=[s for s in seeds for _ in scales], **options):
            steps.append((angle(step, heard.pop(), w, lab.schedule), float(step.t)))
    unclipped = pixels(lab, step.x)  # (seed * scale, 3, H, W)
    images = unclipped.clamp(0, 1)
    grid = lambda x: x.view(len(seeds), len(scales)).cpu()  # noqa: E731
    measures = {
        "diversity": diversity(images.view(len(seeds), len(scales), -1)),
        "saturation": grid(saturation(images)),
        "clipped": grid(((unclipped < 0) | (unclipped > 1)).float().flatten(1).mean(1)),
        "entropy": grid(entropy.mean()),
        "angle": grid(torch.stack([a for a, _ in steps]).mean(0)),
    }
    drawn = to_pil(images)
    if judge is not None:
        measures = {"adherence": grid(torch.as_tensor(judge(drawn), dtype=torch.float32)), **measures}
    rows = [drawn[i : i + len(scales)] for i in range(0, len(drawn), len(scales))]
    angles = torch.stack([grid(a) for a, _ in steps])  # (step, seed, scale)
    return Guided(rows, tuple(scales), tuple(seeds), measures, angles, tuple(t for _, t in steps), prompt)


@torch.no_grad()
def pixels(lab: LatentDiffusion, z: Tensor) -> Tensor:
    """Decoded pictures as the VAE gives them, (B, 3, H, W): 0 is black, 1 full, and strong guidance goes beyond."""
    z = z.to(lab.device, lab.vae.post_quant_conv.weight.dtype) / lab.vae.config.scaling_factor
    return torch.cat([lab.vae.decode(one[None]).float() for one in z]).cpu() / 2 + 0.5


def angle(step: Step, out: Tensor, w: list[float], schedule: Schedule) -> Tensor:
    """The angle between eps_c and eps_u in degrees, (B,); `out` (2B, 4, h, w) is what the network said, uncond first."""
    u, c = out.chunk(2)
    scale = torch.tensor(w).to(u).view(-1, 1, 1, 1)
    d = FACTOR[schedule.config.prediction_type](schedule.alpha_bar_at(step.t)) * (c - u)  # eps_c - eps_u
    eps_u = step.eps.to(u) - scale * d
    cos = torch.nn.functional.cosine_similarity(eps_u.flatten(1), (eps_u + d).flatten(1))
    return torch.rad2deg(cos.clamp(-1, 1).arccos())


def diversity(x: Tensor) -> Tensor:
    """Mean root mean square difference between the pictures of each pair of seeds, (scale,); x (seed, scale, values)."""
    n = len(x)
    pairs = [(a, b) for a in range(n) for b in range(a)]
    return torch.stack([(x[a] - x[b]).pow(2).mean(-1).sqrt() for a, b in pairs]).mean(0)


def saturation(images: Tensor) -> Tensor:
    """HSV's saturation, mean over places, (B,); images (B, 3, H, W) in [0, 1]. Black has none."""
    high, low = images.amax(1), images.amin(1)  # (B, H, W)
    return ((high - low) / high.clamp(min=1e-6)).flatten(1).mean(1)


class Entropy:
    """The entropy of attention in bits, added up over calls for each picture of the branch "cond"."""

    def __init__(self, images: int) -> None:
        self.total, self.calls = torch.zeros(images), 0

    def add(self, probs: Tensor, layout) -> None:
        first = layout.branches.index("cond") * layout.images
        p = probs[first : first + layout.images].float()  # (B, heads, N, L)
        self.total += torch.special.entr(p).sum(-1).mean((1, 2)).cpu() / log(2)
        self.calls += 1

    def mean(self) -> Tensor:
        return self.total / self.calls
