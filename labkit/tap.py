"""A tap: a named point in a network where a tensor can be read or replaced.

A `Tap` is an identity module. Put into a network it gives the tensor that flows through it a stable dotted name, the
module's own path, such as `mid_block.attentions.0.transformer_blocks.0.attn2.probs`. Listening is one mechanism for both
uses: a function `fn(x, name)` that returns None has read the tensor, one that returns a tensor has replaced it.

    with listen(unet, {"*.attn2.probs": lambda probs, name: maps.append(probs)}):
        unet(x_t, t, c)

Listeners come and go with the `with` block, also when it ends in an exception or an interrupt, so no network is ever left
patched. Costly tensors are only made where somebody listens: code in front of a tap may ask `tap.active` first.
"""
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Callable, Iterator

from torch import Tensor, nn

from labkit.errors import LabkitError

Listener = Callable[[Tensor, str], Tensor | None]


class Tap(nn.Module):
    """The identity, unless somebody listens; has no parameters, so state dicts do not know it."""

    def __init__(self) -> None:
        super().__init__()
        self.listeners: list[tuple[Listener, str]] = []

    @property
    def active(self) -> bool:
        """Whether anybody listens."""
        return bool(self.listeners)

    def forward(self, x: Tensor) -> Tensor:
        for fn, name in self.listeners:
            y = fn(x, name)
            if y is None:
                continue
            if not isinstance(y, Tensor) or y.shape != x.shape:
                said = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}; a tensor replaces, None only reads"
                raise LabkitError(f"a listener at {name} returned {said}, the tap carries {tuple(x.shape)}")
            x = y
        return x


def taps(network: nn.Module, pattern: str = "*") -> dict[str, Tap]:
    """The taps of a network by dotted name, those that match a shell pattern ("*.attn2.probs"), in forward order of definition."""
    return {name: m for name, m in network.named_modules() if isinstance(m, Tap) and fnmatchcase(name, pattern)}


@contextmanager
def listen(network: nn.Module, listeners: dict[str, Listener]) -> Iterator[list[str]]:
    """Attach `{pattern: fn(x, name)}` while the block runs; yields the names of the sites listened at.

    Several listeners at one tap run in the order in which they were attached. Raises LabkitError, and attaches nothing,
    if a pattern matches no tap.
    """
    sites = [(tap, fn, name) for pattern, fn in listeners.items() for name, tap in matching(network, pattern).items()]
    entries = [(tap, (fn, name)) for tap, fn, name in sites]
    try:
        for tap, entry in entries:
            tap.listeners.append(entry)
        yield [name for _, _, name in sites]
    finally:
        for tap, entry in entries:
            tap.listeners[:] = [e for e in tap.listeners if e is not entry]


def matching(network: nn.Module, pattern: str) -> dict[str, Tap]:
    """As `taps`, but an error if there is none."""
    found = taps(network, pattern)
    if not found:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in taps(network)})
        raise LabkitError(f"no tap matches {pattern!r} in {type(network).__name__}; its taps end in: {', '.join(kinds) or '(none)'}")
    return found
