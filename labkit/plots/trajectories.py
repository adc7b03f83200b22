"""From noise to picture: what the network was given at a step, and what it took the picture to be."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL.Image import Image

from labkit.errors import LabkitError
from labkit.plots.canvas import LABEL, TITLE, grid, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def trajectory(x_t: Sequence[Image], x0: Sequence[Image], t: Sequence[int], title: str | None = None) -> "Figure":
    """Two rows, noisiest first: the decoded latent x_t, and the clean picture predicted from it, at each timestep t."""
    x_t, x0, t = list(x_t), list(x0), list(t)
    if not t or not len(x_t) == len(x0) == len(t):
        raise LabkitError(f"A trajectory is as many x_t ({len(x_t)}) as x0 ({len(x0)}) as timesteps ({len(t)}), one at least.")
    figure, axes = grid(2, len(t), x_t[0].height / x_t[0].width, titles=1, left=0.8)
    figure.suptitle(title or "From noise to picture", fontsize=TITLE)
    for column in range(len(t)):
        picture(axes[0][column], x_t[column], f"$t$ = {t[column]}")
        picture(axes[1][column], x0[column])
    axes[0][0].set_ylabel("latent $x_t$,\ndecoded", fontsize=LABEL)
    axes[1][0].set_ylabel("predicted $x_0$,\ndecoded", fontsize=LABEL)
    figure.labkit_alt = (
        f"Two rows of {len(t)} pictures from noise to image, at timesteps {', '.join(map(str, t))}: "
        "above the noisy latent, decoded, below the clean picture that the network predicts from it."
    )
    return figure
