"""A tensor whose axes have names, so that nobody has to remember which one is which.

    trace.attention(step=slice(None))            axes (step, head, y, x, token) where one layer was recorded
    trace.attention(...).mean("step", "head")    axes (y, x, token)
"""

from dataclasses import dataclass, field

from torch import Tensor

from labkit.errors import LabkitError


@dataclass(frozen=True, eq=False)
class Named:
    """`values`, a tensor; `axes`, a name for each of its axes; `labels`, for some axes, what stands along them (steps, layers, tokens)."""

    values: Tensor
    axes: tuple[str, ...]
    labels: dict[str, tuple] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.axes) != self.values.ndim or len(set(self.axes)) != len(self.axes):
            raise LabkitError(f"A tensor of shape {tuple(self.values.shape)} cannot have the axes {', '.join(self.axes)}: give one name for each.")
        wrong = [axis for axis, said in self.labels.items() if axis not in self.axes or len(said) != self.values.shape[self.axes.index(axis)]]
        if wrong:
            raise LabkitError(f"The labels of {wrong[0]!r} do not fit a tensor of shape {tuple(self.values.shape)} with axes {', '.join(self.axes)}.")

    @property
    def shape(self) -> dict[str, int]:
        """The length of each axis, by name."""
        return dict(zip(self.axes, self.values.shape))

    def mean(self, *axes: str) -> "Named":
        """The mean over the named axes; LabkitError if there is no such axis."""
        return self._without(axes, self.values.mean(self._places(axes))) if axes else self

    def sum(self, *axes: str) -> "Named":
        """The sum over the named axes; LabkitError if there is no such axis."""
        return self._without(axes, self.values.sum(self._places(axes))) if axes else self

    def at(self, **where) -> "Named":
        """What stands at one label of each named axis: `at(step=5, head=3)`; axes without labels count from 0. LabkitError if it is not there."""
        found = self
        for axis, label in where.items():
            (place,) = found._places((axis,))
            there = found.labels.get(axis, tuple(range(found.values.shape[place])))
            if label not in there:
                raise LabkitError(f"There is no {axis} {label!r}; there is: {', '.join(map(str, there))}.")
            found = found._without((axis,), found.values.select(place, there.index(label)))
        return found

    def to_xarray(self):
        """The same as an xarray.DataArray; LabkitError if xarray is not installed."""
        try:
            from xarray import DataArray
        except ImportError:
            raise LabkitError("xarray is not installed: pip install xarray, or use .values, .axes and .labels.") from None
        return DataArray(self.values.numpy(), dims=self.axes, coords={axis: list(said) for axis, said in self.labels.items()})

    def __repr__(self) -> str:
        return f"Named({', '.join(f'{axis} {n}' for axis, n in self.shape.items())})"

    def _places(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        unknown = [axis for axis in axes if axis not in self.axes]
        if unknown:
            raise LabkitError(f"There is no axis {unknown[0]!r}; there are: {', '.join(self.axes) or 'none'}.")
        return tuple(self.axes.index(axis) for axis in axes)

    def _without(self, axes: tuple[str, ...], values: Tensor) -> "Named":
        labels = {axis: said for axis, said in self.labels.items() if axis not in axes}
        return Named(values, tuple(axis for axis in self.axes if axis not in axes), labels)
