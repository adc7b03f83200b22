"""Long sweeps: a function of every combination of a grid, one file a combination, resumed where it stopped, in as many processes as one likes.

    for each item of grid:   file there?  -> done;    lock it, or leave it to who has it;    work(item) -> file, complete or not at all

    def work(guidance, seed):
        return {"image": lab.generate(prompt, guidance=guidance, seed=seed).image}
    sweep({"guidance": [1, 2, 4, 8], "seed": range(100)}, work, "runs/guidance")        # in one process, or started twice, or by torchrun

The operating system takes a lock back when its owner ends, however it ends, so a process that is killed leaves nothing to clean up: its
item is done again by another one, or by the next run. What a file holds depends on its item alone, not on who made it or when.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from labkit.errors import LabkitError
from labkit.generation import from_pil, to_pil
from labkit.models.files import read_safetensors

PLAIN = (str, int, float, bool, type(None))
LONGEST = 80  # characters of an item's name


def sweep(grid: Mapping[str, Sequence], work: Callable[..., Mapping], folder: str | Path, progress: bool = True) -> list[dict]:
    """Call `work(**item)` for every combination of the grid's values whose file is not yet in `folder`; all results, in the grid's order.

    An item's values are numbers, texts, True, False or None. `work` returns a table of plain values, tensors and PIL pictures; a result
    is what it returned, with the item's own values beside it. An error of `work` ends the sweep; what is done stays. Raises LabkitError if the
    grid is empty or holds other values, if `work` returns something else, and if the folder cannot be written.
    """
    from tqdm.auto import tqdm

    items, folder = items_of(grid), Path(folder)
    try:
        (folder / "locks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabkitError(f"{folder}: cannot be written ({error.strerror}); choose another folder.") from None
    with tqdm(total=len(items), desc=folder.name, disable=not progress) as bar:
        waiting = [item for item in items if not done(folder, item, bar)]
        for patient in (False, True):  # first what nobody works at; then wait for what others do, and do what they did not finish
            left = []
            for item in waiting:
                with locked(folder / "locks" / f"{name_of(item)}.lock", patient) as mine:
                    if not mine:
                        left.append(item)
                    elif not done(folder, item, bar):
                        write_item(folder, item, work(**item))
                        bar.update()
            waiting = left
    return [read_item(folder, item) for item in items]


def items_of(grid: Mapping[str, Sequence]) -> list[dict]:
    """All combinations, the last name running fastest; LabkitError if there are none, or if a value is none of JSON's."""
    axes = {name: list(values) for name, values in grid.items()}
    wrong = [(name, value) for name, values in axes.items() for value in values if not isinstance(value, PLAIN) or value != value]
    if not axes or not all(axes.values()) or wrong:
        about = f"{wrong[0][0]} has {wrong[0][1]!r}" if wrong else "it is empty"
        raise LabkitError(f"A grid has a list of numbers or texts for each name, but {about}; such as {{'guidance': [1, 4], 'seed': range(3)}}.")
    return [dict(zip(axes, values)) for values in product(*axes.values())]


def name_of(item: dict) -> str:
    """What an item's files are called: its values, as far as they may stand in a name, and a hash of all of it."""
    text = json.dumps(item, sort_keys=True, ensure_ascii=True)
    said = "".join(c if c.isascii() and (c.isalnum() or c in "=.,-") else "_" for c in ",".join(f"{k}={v}" for k, v in item.items()))
    return f"{said[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def done(folder: Path, item: dict, bar) -> bool:
    """Whether an item's file is there; if so the bar moves on."""
    there = (folder / f"{name_of(item)}.safetensors").exists()
    bar.update(there)
    return there


@contextmanager
def locked(path: Path, patient: bool) -> Iterator[bool]:
    """Hold a file's lock while the block runs: yields whether it could be had, after waiting for it if `patient`."""
    with open(path, "a+b") as file:
        try:
            lock(file, patient)
        except OSError:
            yield False
            return
        yield True  # closing the file, or dying, gives the lock back


def lock(file, patient: bool) -> None:
    """Lock an open file for this process; OSError if another one has it and we are not patient."""
    if os.name == "nt":
        import msvcrt

        file.seek(0)
        while True:
            with suppress(OSError) if patient else _as_it_is():  # LK_LOCK gives up after ten seconds
                return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if patient else msvcrt.LK_NBLCK, 1)
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


# --- one item's file ----------------------------------------------------------------------------------------------


def write_item(folder: Path, item: dict, result: Mapping) -> None:
    """Write an item's result, under another name first; LabkitError if it holds what a file cannot."""
    from safetensors.torch import save

    if not isinstance(result, Mapping) or not all(isinstance(name, str) for name in result):
        raise LabkitError(f"A sweep's work returns a table of results by name, such as {{'score': 0.5}}; this is {type(result).__name__}.")
    images = {name: value for name, value in result.items() if isinstance(value, Image.Image)}
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in result.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in result.items() if name not in images and name not in tensors}
    try:
        story = json.dumps({"item": item, "plain": plain, "images": sorted(images), "order": list(result)})
    except (TypeError, ValueError) as error:
        raise LabkitError(f"A result is made of numbers, texts, lists, tensors and PIL pictures, but {error}.") from None
    tensors |= {name: (from_pil(image)[0] * 255).round().to(torch.uint8).contiguous() for name, image in images.items()}
    unfinished = folder / f".{uuid.uuid4().hex}.unfinished"
    try:
        unfinished.write_bytes(save(tensors, metadata={"labkit_item": story}))  # one entry only: their order in the file is not fixed
        os.replace(unfinished, folder / f"{name_of(item)}.safetensors")
    except OSError as error:
        raise LabkitError(f"{folder}: cannot be written ({error.strerror or error}); what is done so far stays there.") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()


def read_item(folder: str | Path, item: dict) -> dict:
    """An item's result with the item's values; LabkitError if it is not there or damaged."""
    from safetensors import safe_open

    path = Path(folder) / f"{name_of(item)}.safetensors"
    tensors = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        story = json.loads((file.metadata() or {}).get("labkit_item", "null"))
    if not isinstance(story, dict) or story.get("item") != item:
        raise LabkitError(f"{path}: is not the result of {item}; delete it, and it will be made again.")
    found = {**story["plain"], **tensors}
    for name in story["images"]:
        found[name] = to_pil(found[name][None].float() / 255)[0]
    return {**item, **{name: found[name] for name in story["order"]}}
