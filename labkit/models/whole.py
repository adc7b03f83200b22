"""A folder or a file that appears when it is complete, or not at all.

    write beside the place -> all of it is there -> rename (one step of the file system, which nobody sees half done)

Whatever stops the writing, a full disk, an interrupt, an error of ours, what was there stays as it was and nothing is left lying about.
"""

import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from labkit.errors import CheckpointError


@contextmanager
def whole_folder(folder: Path, overwrite: bool = False, mark: str = "model_index.json") -> Iterator[Path]:
    """Yields a folder to write into, which takes the name `folder` when the block ends well.

    One that exists is replaced only with `overwrite`, and only if it holds the file `mark`. Raises CheckpointError, also for OSErrors.
    """
    with _beside(folder) as unfinished:
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            if not overwrite:
                raise CheckpointError(f"{folder}: exists already; choose another name, or say overwrite=True.")
            if not (folder / mark).exists():
                raise CheckpointError(f"{folder}: is not a model (no {mark}), so it will not be replaced; choose another name.")
        unfinished.mkdir()
        yield unfinished
        _take_the_place(unfinished, folder)


@contextmanager
def whole_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a path to write to, which takes the name `path` when the block ends well; as `whole_folder`, but only files are replaced."""
    with _beside(path) as unfinished:
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder, a file is to be written; choose another name.")
        if os.path.lexists(path) and not overwrite:
            raise CheckpointError(f"{path}: exists already; choose another name, or say overwrite=True.")
        yield unfinished
        os.replace(unfinished, path)


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A hidden name beside a place; what is there in the end is removed, and so are folders made for it if nothing came of it."""
    unfinished = place.parent / f".{place.name[:200]}.{uuid.uuid4().hex[:8]}.unfinished"
    made = [p for p in place.parents if not os.path.lexists(p)]  # innermost first
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        made = []
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be written ({error.strerror or error}); nothing was changed there. Make room, or choose another place, and start again.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):
            unfinished.unlink()
        for parent in made:
            try:
                parent.rmdir()
            except OSError:
                break


def _take_the_place(unfinished: Path, folder: Path) -> None:
    """Rename; a folder that is there already is set aside first, and put back if the renaming fails."""
    if not os.path.lexists(folder):
        unfinished.rename(folder)
        return
    aside = folder.parent / f".{folder.name[:200]}.{uuid.uuid4().hex[:8]}.old"
    try:
        folder.rename(aside)
    except PermissionError as error:  # Windows, where what is open or mapped keeps its name
        raise CheckpointError(
            f"{folder}: cannot be replaced ({error.strerror}); nothing was changed there. On Windows a model that was loaded from it holds it: delete that "
            "model first, or choose another name."
        ) from None
    try:
        unfinished.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():
        warnings.warn(f"{folder} is replaced, but what it was cannot be removed while it is in use: delete {aside} later.", stacklevel=5)
