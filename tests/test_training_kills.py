"""Training that is killed by the system at any moment, or finds the disk full: the last checkpoint is whole, and what comes out is what would have come out."""

import json
import sys
from pathlib import Path

import pytest
from test_training import child, same, saved

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork, SIGKILL and a limit on the size of files, which Windows has not")

KILLS, STEPS = 20, 84  # four steps of a life are kept at most, so none comes to the end before it is killed

# A process that imports once and forks a life at a time. A life tells it of every step ("s") and of every checkpoint it begins to write ("w").
NURSERY = """
import json, os, random, signal, statistics, sys, time
import test_training as t
from pathlib import Path
from labkit.training import loop

root, kills, steps = Path({root!r}), {kills}, {steps}
import torch._dynamo  # with the next line, what each life would else import for itself
loop.State(t.tiny(), t.CONFIG, t.Accelerator(cpu=True))
recipe = t.tiny()

def live(folder, tell, most):
    save, steps_done = loop.torch.save, []
    def saving(state, file):
        os.write(tell, b"w")
        save(state, file)
    loop.torch.save = saving
    def stop(step, losses):
        os.write(tell, b"s")
        steps_done.append(step)
        if len(steps_done) > most:  # the parent is late on a busy machine: wait for it
            time.sleep(600)
    recipe.stop_step = stop
    t.train(recipe, folder, steps=steps, save_every=1)

def born(folder, most=steps):
    hear, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            live(folder, tell, most)
            code = 0
        finally:
            os._exit(code)
    os.close(tell)
    return pid, hear

def buried(pid, hear):
    os.close(hear)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

start = time.monotonic()
pid, hear = born(root / "whole")
heard = []
while event := os.read(hear, 1):
    heard.append((event, time.monotonic()))
assert buried(pid, hear) == 0, "the undisturbed run failed"
first = heard[0][1] - start
writing = statistics.median(b - a for (what, a), (_, b) in zip(heard, heard[1:]) if what == b"w")
stepping = statistics.median(b - a for (what, a), (_, b) in zip(heard, heard[1:]) if what == b"s")

rng, ends, torn, killed = random.Random(0), [], 0, root / "killed"
for life in range(kills):
    pid, hear = born(killed, most=4)
    kind = life % 4
    if kind == 0:  # while it starts
        time.sleep(rng.uniform(0, first))
    else:
        wanted, events = (b"s" if kind == 1 else b"w"), rng.randint(1, 3)  # in a step; as a checkpoint is begun; at any moment of writing one
        while events:
            events -= os.read(hear, 1) == wanted
        time.sleep({{1: rng.uniform(0, stepping), 2: 0, 3: rng.uniform(0, 1.2 * writing)}}[kind])
    os.kill(pid, signal.SIGKILL)
    ends.append(buried(pid, hear))
    torn += any(killed.glob(".*.unfinished"))
pid, hear = born(killed)
while os.read(hear, 1):
    pass
print("RESULT", json.dumps({{"ends": ends, "torn": torn, "took": [first, stepping, writing], "last": buried(pid, hear)}}))
"""


def run(code):
    process = child(code)
    said = process.communicate(timeout=280)[0]
    assert process.returncode == 0, said
    return json.loads(said.split("RESULT ")[1].splitlines()[0])


def test_killed_twenty_times_it_ends_at_the_weights_of_an_undisturbed_run(tmp_path):
    found = run(NURSERY.format(root=str(tmp_path), kills=KILLS, steps=STEPS))
    assert found["ends"] == [-9] * KILLS, "every life but the last was ended by SIGKILL"
    assert found["last"] == 0 and found["torn"] > 0, "some were writing a checkpoint"
    whole, killed = saved(tmp_path / "whole"), saved(tmp_path / "killed")
    assert whole["step"] == STEPS and same(whole, killed), "the kills changed something: weights, averages or optimisers"
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {"checkpoint.pt", "log.jsonl"}, "half-written files are removed"
    logs = [[json.loads(line)["step"] for line in open(tmp_path / name / "log.jsonl")] for name in ("whole", "killed")]
    assert logs[0] == logs[1] == [*range(0, STEPS, 10), STEPS - 1]


# What is larger than the limit meets what a full disk is: writing fails in the middle of the file.
FULL = """
import json, resource, signal
from contextlib import contextmanager
from pathlib import Path
import numpy as np
from PIL import Image
import test_training as t
from labkit.errors import LabkitError
from labkit.models.vae import VAE
from labkit.training import data, diffusion

root, results = Path({root!r}), {{}}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

@contextmanager
def room(size):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

def full(name, folder, size, work):
    folder.mkdir(exist_ok=True)
    with room(size):
        try:
            work()
            said = "no error"
        except LabkitError as error:
            said = str(error)
    results[name] = {{"said": said, "left": sorted(p.name for p in folder.iterdir())}}

class Sheet:
    def __call__(self, modules):
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))

t.train(t.tiny(), root / "whole")
t.train(t.tiny(), root / "checkpoint", steps=4, cooldown=0.0)
size = (root / "checkpoint" / "checkpoint.pt").stat().st_size
full("checkpoint", root / "checkpoint", size // 2, lambda: t.train(t.tiny(), root / "checkpoint"))
results["checkpoint"]["step"] = t.saved(root / "checkpoint")["step"]
t.train(t.tiny(), root / "checkpoint")
full("log", root / "log", 10, lambda: t.train(t.tiny(), root / "log"))
t.train(t.tiny(), root / "log")
painting = t.tiny()
painting.sheet = Sheet()
full("sheet", root / "sheet", 60_000, lambda: t.train(painting, root / "sheet"))

data.SHARD = 3
draw = lambda: data.renders(data.World(), 0, 3, root / "renders", workers=1)
full("renders", root / "renders", 100_000, draw)
results["renders"]["then"] = draw().shape
t.torch.manual_seed(0)
vae, images = VAE(t.TINY_VAE), np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
encode = lambda: diffusion.latents(vae, images, root / "latents" / "latents.safetensors", "cpu")
full("latents", root / "latents", 1000, encode)
results["latents"]["then"] = encode()["mean"].shape
print("RESULT", json.dumps(results))
"""


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("full")
    return root, run(FULL.format(root=str(root)))


@pytest.mark.parametrize("what, file", [("checkpoint", "checkpoint.pt"), ("log", "log.jsonl"), ("sheet", "sheet-000010.png"), ("latents", "latents.safetensors"),
                                        ("renders", "renders-1-1-2-photo-00000000.npy")])  # fmt: skip
def test_a_full_disk_is_said_in_one_line(full, what, file):
    root, results = full
    said = results[what]["said"]
    assert said.startswith(f"{Path(root, what, file)}: cannot be written (") and said.endswith("start again.") and "\n" not in said


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_nothing_half_written(full):
    root, results = full
    assert results["checkpoint"]["step"] == 4
    left = {what: found["left"] for what, found in results.items()}
    assert left == {"checkpoint": ["checkpoint.pt", "log.jsonl"], "log": ["log.jsonl"], "sheet": ["checkpoint.pt", "log.jsonl"], "latents": [], "renders": []}


def test_with_room_again_it_goes_on_to_the_same(full):
    root, results = full
    for what, logged in (("checkpoint", [0, 3, 9]), ("log", [0, 9])):  # the first of them was done at step 3 before
        assert same(saved(root / "whole"), saved(root / what)), what
        assert [json.loads(line)["step"] for line in open(root / what / "log.jsonl")] == logged
    assert results["renders"]["then"] == [3, 128, 128, 3] and results["latents"]["then"] == [4, 4, 8, 8]
