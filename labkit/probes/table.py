"""A table of measurements, its rows and columns named, that prints and draws itself."""

from dataclasses import dataclass

from torch import Tensor

from labkit.errors import LabkitError


@dataclass(frozen=True, eq=False)
class Table:
    """`values` (rows, columns), NaN where there is nothing to measure; `axes` names rows and columns; `unit` says what the numbers are."""

    values: Tensor
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    axes: tuple[str, str]
    unit: str
    title: str

    def __post_init__(self) -> None:
        if tuple(self.values.shape) != (len(self.rows), len(self.columns)):
            raise LabkitError(f"A table of {len(self.rows)} rows and {len(self.columns)} columns cannot hold values of shape {tuple(self.values.shape)}.")

    def at(self, row: str, column: str) -> float:
        """One number by the names of its row and column; LabkitError, listing them, if there are none such."""
        for name, there in ((row, self.rows), (column, self.columns)):
            if name not in there:
                raise LabkitError(f"There is no {name!r}; there are: {', '.join(there)}.")
        return float(self.values[self.rows.index(row), self.columns.index(column)])

    def plot(self):
        """The table as a matplotlib Figure, numbers written in."""
        from labkit.plots.matrix import matrix

        return matrix(self.values, self.rows, self.columns, self.unit, self.title, self.axes)

    def __str__(self) -> str:
        lines = [(self.axes[0], *self.columns)] + [
            (row, *("" if value != value else f"{value:z.3f}" for value in line)) for row, line in zip(self.rows, self.values.tolist())
        ]
        widths = [max(map(len, column)) for column in zip(*lines)]
        body = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))]).rstrip() for line in lines]
        return "\n".join([f"{self.title} ({self.unit}; columns: {self.axes[1]})", *body])
