"""Long sweeps: one file an item, and whoever is killed in between, what is there in the end is what one process would have made."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from labkit.errors import LabkitError
from labkit.probes.grid import items_of, locked, name_of, read_item, sweep

GRID = {"w": [1.0, 2.5], "seed": range(3), "word": ["a/b", "é"]}


def work(w, seed, word):
    x = torch.full((2, 2), w) + seed
    return {"score": w * seed, "word length": len(word), "x": x, "picture": Image.new("RGB", (3, 2), (10 * seed, 1, 2)), "none": None}


def test_every_combination_in_order_with_its_values(tmp_path):
    found = sweep(GRID, work, tmp_path, progress=False)
    assert [(r["w"], r["seed"], r["word"]) for r in found] == [(w, s, t) for w in (1.0, 2.5) for s in range(3) for t in ("a/b", "é")]
    assert found[8]["score"] == 2.5 and found[8]["none"] is None and torch.equal(found[8]["x"], torch.full((2, 2), 3.5))
    assert found[8]["picture"].size == (3, 2) and found[8]["picture"].getpixel((0, 0)) == (10, 1, 2)
    assert list(found[8]) == ["w", "seed", "word", "score", "word length", "x", "picture", "none"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 12


def test_what_is_there_is_not_done_again_and_a_larger_grid_goes_on(tmp_path):
    calls = []

    def counted(**item):
        calls.append(item)
        return {"n": len(calls)}

    sweep({"seed": [0, 1]}, counted, tmp_path, progress=False)
    found = sweep({"seed": [0, 1, 2]}, counted, tmp_path, progress=False)
    assert [item["seed"] for item in calls] == [0, 1, 2] and [r["n"] for r in found] == [1, 2, 3]


def test_an_error_ends_it_and_what_is_done_stays(tmp_path):
    def fails(seed):
        if seed == 2:
            raise RuntimeError("broken")
        return {"seed twice": 2 * seed}

    with pytest.raises(RuntimeError, match="broken"):
        sweep({"seed": range(4)}, fails, tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 and not list(tmp_path.glob("*.unfinished"))
    assert [r["seed twice"] for r in sweep({"seed": range(4)}, lambda seed: {"seed twice": 2 * seed}, tmp_path, progress=False)] == [0, 2, 4, 6]


def test_what_somebody_has_is_left_to_him_and_done_if_he_did_not(tmp_path):
    order = []
    first = items_of({"seed": [0, 1, 2]})[0]
    (tmp_path / "locks").mkdir()
    with locked(tmp_path / "locks" / f"{name_of(first)}.lock", patient=False) as mine:
        assert mine
        other = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), "0.0", "3"], stdout=subprocess.PIPE, text=True)
        for _ in range(600):  # it does the others, and waits for the first
            if len(list(tmp_path.glob("*.safetensors"))) == 2:
                break
            time.sleep(0.1)
        assert len(list(tmp_path.glob("*.safetensors"))) == 2 and not (tmp_path / f"{name_of(first)}.safetensors").exists()
    assert other.communicate(timeout=120)[0].split() == ["1", "2", "0"] and other.returncode == 0, order


SCRIPT = """
import sys, time, torch
from labkit.probes.grid import sweep
torch.set_num_threads(1)
folder, pause, n = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
def work(seed):
    time.sleep(pause)
    print(seed, flush=True)
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(50, generator=g), "mean": seed / 7}
sweep({"seed": range(n)}, work, folder, progress=False)
"""


def start(folder: Path, pause: float, n: int = 12) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(pause), str(n)], stdout=subprocess.PIPE, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_two_processes_one_killed_and_rerun_give_what_one_gives(tmp_path):
    assert start(tmp_path / "one", 0.0).wait(120) == 0
    together = tmp_path / "two"
    victim, other = start(together, 0.3), start(together, 0.3)
    assert victim.stdout.readline().strip().isdigit()  # it has done one, and is about another
    time.sleep(0.1)
    victim.send_signal(signal.SIGKILL) if os.name != "nt" else victim.kill()
    victim.wait(60)
    survivor = other.communicate(timeout=120)[0].split()
    assert other.returncode == 0 and contents(together) == contents(tmp_path / "one")  # it did what was left behind
    assert len(set(survivor)) == len(survivor) < 12 + 1
    again = start(together, 0.0)
    assert again.communicate(timeout=120)[0] == "" and again.returncode == 0  # nothing was left to do


def test_killed_alone_and_rerun_gives_what_one_gives(tmp_path):
    assert start(tmp_path / "one", 0.0).wait(120) == 0
    victim = start(tmp_path / "again", 0.2)
    assert victim.stdout.readline() and victim.stdout.readline()  # at the second one the first is written
    victim.kill()
    victim.wait(60)
    assert 0 < len(contents(tmp_path / "again")) < 12
    assert start(tmp_path / "again", 0.0).wait(120) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "one")


def test_no_item_is_done_twice_at_once(tmp_path):
    runs = [start(tmp_path, 0.05) for _ in range(3)]
    done = [seed for run in runs for seed in run.communicate(timeout=180)[0].split()]
    assert sorted(map(int, done)) == list(range(12))


@pytest.mark.parametrize("grid", [{}, {"seed": []}, {"seed": [torch.zeros(1)]}, {"seed": [float("nan")]}, {"seed": [[1]]}])
def test_bad_grids_are_one_line(grid, tmp_path):
    with pytest.raises(LabkitError, match="A grid has"):
        sweep(grid, work, tmp_path, progress=False)


@pytest.mark.parametrize("result", [None, [1], {"x": object()}, {"x": {1, 2}}, {1: 2}])
def test_bad_results_are_one_line_and_leave_nothing(result, tmp_path):
    with pytest.raises(LabkitError, match="is made of|returns a table"):
        sweep({"seed": [0]}, lambda seed: result, tmp_path, progress=False)
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))


def test_damaged_files_and_other_items_are_said(tmp_path):
    item = {"seed": 0}
    sweep({"seed": [0]}, lambda seed: {"x": torch.zeros(3)}, tmp_path, progress=False)
    path = tmp_path / f"{name_of(item)}.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-2])
    with pytest.raises(LabkitError, match="safetensors"):
        read_item(tmp_path, item)
    path.write_bytes(good.replace(b"seed", b"seef"))
    with pytest.raises(LabkitError, match="is not the result of"):
        read_item(tmp_path, item)
    (tmp_path / "file").write_text("")
    with pytest.raises(LabkitError, match="cannot be written"):
        sweep({"seed": [0]}, work, tmp_path / "file", progress=False)


def test_names_tell_items_apart_and_can_be_read():
    names = [name_of(item) for item in items_of({"w": [1, 1.0, "1", True, None], "text": ["a/b", "a_b", "x" * 300]})]
    assert len(set(names)) == len(names) and all(len(n) < 100 and "/" not in n for n in names) and names[0].startswith("w=1,text=a_b-")
    assert json.dumps(items_of({"seed": range(2)})) == '[{"seed": 0}, {"seed": 1}]'


def test_the_bar_counts_what_is_done(tmp_path, capsys):
    sweep({"seed": range(3)}, lambda seed: {"x": seed}, tmp_path)
    sweep({"seed": range(3)}, lambda seed: {"x": seed}, tmp_path)
    assert capsys.readouterr().err.count("3/3") >= 2
