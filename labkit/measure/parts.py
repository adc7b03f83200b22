"""The folder in which a measurement's parts are kept, so that a run that was stopped goes on where it was."""

from pathlib import Path

from labkit.errors import LabkitError
from labkit.plots import write


def claim(folder: Path, said: str, parts: str) -> None:
    """Say in plan.json what the parts in a folder are of; LabkitError if it says so of others already. `parts` is what they are called."""
    path = folder / "plan.json"
    if path.exists() and path.read_text(encoding="utf-8") != said:
        raise LabkitError(f"{folder} has the {parts} of another plan; name another folder, or delete it.")
    write(path, said)
