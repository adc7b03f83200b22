"""A table of numbers as colours, with the numbers in it where there is room."""

from typing import TYPE_CHECKING

from labkit.errors import LabkitError
from labkit.plots.canvas import LABEL, SMALL, TITLE, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WRITTEN = 12  # columns up to which the numbers fit


def matrix(values, rows, columns, meaning: str, title: str = "", axes: tuple[str, str] = ("", "")) -> "Figure":
    """`values[row][column]`, such as cosines, under `columns` and beside `rows`; `meaning` names the colour, `axes` what runs down and across.

    Values on both sides of zero get colours that part at zero, others ones that rise evenly.
    """
    from matplotlib.figure import Figure

    values = values.tolist() if hasattr(values, "tolist") else [list(row) for row in values]
    rows, columns = [str(r) for r in rows], [str(c) for c in columns]
    if not values or not columns or len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        raise LabkitError(f"The table has {len(values)} rows of {sorted({len(row) for row in values})}, the names are {len(rows)} by {len(columns)}.")
    high = max(abs(v) for row in values for v in row)
    signed = min(v for row in values for v in row) < 0
    limits = {"cmap": "PuOr", "vmin": -high, "vmax": high} if signed else {"cmap": "magma", "vmin": 0, "vmax": high}
    cell = min(1.0, 9 / len(columns))
    figure = Figure(figsize=(min(12, max(6, 2.8 + cell * len(columns))), max(3, 1.6 + 0.6 * cell * len(rows) + 0.6)), dpi=100, layout="constrained")
    figure.suptitle(plain(title), fontsize=TITLE)
    ax = figure.subplots()
    shown = ax.imshow(values, aspect="auto", **limits)
    ax.set_xticks(range(len(columns)), [plain(c) for c in columns], rotation=40 if max(map(len, columns)) > 5 else 0, fontsize=SMALL, ha="right" if max(map(len, columns)) > 5 else "center")
    ax.set_yticks(range(len(rows)), [plain(r) for r in rows], fontsize=SMALL)
    ax.set_ylabel(plain(axes[0]), fontsize=LABEL)
    ax.set_xlabel(plain(axes[1]), fontsize=LABEL)
    for r, row in enumerate(values if len(columns) <= WRITTEN else []):
        for c, v in enumerate(row):
            dark = abs(v) > 0.6 * high if signed else v < 0.6 * high
            ax.text(c, r, f"{v:.2f}", ha="center", va="center", fontsize=SMALL, color="white" if dark else "black")
    bar = figure.colorbar(shown, aspect=30)
    bar.set_label(plain(meaning), fontsize=LABEL)
    bar.ax.tick_params(labelsize=SMALL)
    best = max(((v, r, c) for r, row in enumerate(values) for c, v in enumerate(row) if rows[r] != columns[c]), default=(0, 0, 0))
    figure.labkit_alt = (
        f"{title or 'A table'}: {meaning}, {len(rows)} rows ({', '.join(rows)}) by {len(columns)} columns ({', '.join(columns)}); "
        f"the largest off the diagonal is {best[0]:.2f}, {rows[best[1]]} with {columns[best[2]]}."
    )
    return figure
