"""The command line: all files or none, bad input in one line with exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import build

import labkit
from labkit import __main__ as cli
from labkit import checkpoint
from labkit.checkpoint import save_pipeline, write_sums
from labkit.models import sources
from labkit.samplers import SAMPLERS

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red ball left of a blue cube"
FILES = ["guidance.png", "image.png", "recipe.json", "trajectory.png", "words.png"]
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pipeline(build(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(model, capsys):
    """Run a command in this process: (exit code, lines on stdout, lines on stderr)."""

    def call(*argv):
        code = cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_writes_the_picture_the_figures_and_the_recipe(model, tmp_path):
    """As a user does it: another process, another folder, a path with a space."""
    out = tmp_path / "my pictures" / "one"
    command = [sys.executable, "-m", "labkit", "generate", PROMPT, "--seed", "3", "--out", str(out), "--model", str(model)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert (done.returncode, done.stderr) == (0, "") and str(out) in done.stdout
    assert listing(out) == FILES
    for name in FILES:
        if name.endswith(".png"):
            image = Image.open(out / name)
            assert image.format == "PNG" and image.size == (16, 16) if name == "image.png" else image.width >= 600
    recipe = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["labkit"] == labkit.__version__ and recipe["recipe"]["prompt"] == [PROMPT]
    again = labkit.load(recipe["model"], "cpu").generate(**recipe["recipe"], progress=False).image
    assert again.tobytes() == Image.open(out / "image.png").tobytes()


def test_generate_without_figures_and_quotes(run, model, tmp_path):
    code, out, err = run("generate", "a", "red", "ball", "--no-figures", "--model", model, "--out", tmp_path,
                         "--steps", 2, "--width", 32, "--negative", "blue", "--guidance", 3, "--sampler", "ddpm")  # fmt: skip
    assert (code, err) == (0, []) and listing(tmp_path) == ["image.png", "recipe.json"]
    recipe = json.loads((tmp_path / "recipe.json").read_text())["recipe"]
    assert (recipe["prompt"], recipe["negative_prompt"], recipe["guidance"], recipe["width"]) == (["a red ball"], ["blue"], 3, 32)
    assert Image.open(tmp_path / "image.png").size == (32, 16)


def test_generate_with_rescaled_guidance_in_an_interval(run, model, tmp_path):
    asked = ("generate", "a red ball", "--guidance", 30, "--steps", 4, "--model", model, "--out")
    code, out, err = run(*asked, tmp_path / "a", "--rescale", 0.7, "--interval", 300, "999")
    assert (code, err) == (0, []) and listing(tmp_path / "a") == FILES
    recipe = json.loads((tmp_path / "a" / "recipe.json").read_text())["recipe"]
    assert (recipe["rescale"], recipe["interval"]) == (0.7, [300, 999])
    again = labkit.load(model, "cpu").generate(**recipe, progress=False).image
    assert again.tobytes() == Image.open(tmp_path / "a" / "image.png").tobytes()
    assert run(*asked, tmp_path / "b", "--no-figures")[0] == 0
    assert (tmp_path / "b" / "image.png").read_bytes() != (tmp_path / "a" / "image.png").read_bytes()


def test_variant_and_check_where_weights_are_opened(run, model, tmp_path):
    """A model with a second set of weights, which is zero, and broken."""
    folder = Path(shutil.copytree(model, tmp_path / "two"))
    for path in folder.glob("*/*.safetensors"):
        tensors = load_file(path)
        save_file({name: torch.full_like(t, torch.nan) if name == "conv_in.bias" else t for name, t in tensors.items()}, path.with_suffix(".bad.safetensors"))
    assert run("info", folder, "--check", "--device", "cpu")[0] == 0 and run("info", folder, "--variant", "bad", "--device", "cpu")[0] == 0
    for command in (("info", folder), ("evaluate", folder), ("generate", "a ball", "--no-figures", "--out", tmp_path / "out", "--model", folder)):
        code, out, err = run(*command, "--variant", "bad", "--check", "--device", "cpu")
        assert (code, out, len(err)) == (2, [], 1) and "conv_in.bias holds NaN" in err[0] and ".bad.safetensors" in err[0]
        code, out, err = run(*command, "--variant", "fp16", "--device", "cpu")
        assert (code, len(err)) == (2, 1) and "there is variant=None, variant='bad'" in err[0]
    code, _, err = run("generate", "a ball", "--no-figures", "--steps", 1, "--out", tmp_path / "out", "--model", folder, "--variant", "bad")
    assert code == 2 and "not finite" in err[0] and listing(tmp_path / "out") == []


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("ddim", "ddpm")])
def test_generate_with_every_sampler(run, model, tmp_path, sampler):
    figures = sampler in ("heun", "dpm_solver_karras")  # two calls a step, timesteps that are not the table's
    code, out, err = run("generate", "a red ball", "--sampler", sampler, "--steps", 2, "--model", model, "--out", tmp_path,
                         *([] if figures else ["--no-figures"]))  # fmt: skip
    assert (code, err) == (0, []) and listing(tmp_path) == (FILES if figures else ["image.png", "recipe.json"])
    assert json.loads((tmp_path / "recipe.json").read_text())["recipe"]["sampler"] == sampler


@pytest.mark.parametrize("w", [0, 1])
def test_generate_without_guidance(run, model, tmp_path, w):
    assert run("generate", "a red ball", "--guidance", w, "--steps", 1, "--model", model, "--out", tmp_path)[0] == 0
    assert set(listing(tmp_path)) >= {"image.png", "trajectory.png", "guidance.png", "recipe.json"}
    assert ("words.png" in listing(tmp_path)) == (w == 1)  # with w = 0 nobody looked at the words


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([""], ["prompt is empty"]),
        ([" \t"], ["prompt is empty"]),
        (["a red ball left of a blue ball left of a red ball left of a cube"], ["too long", "14 tokens", "of a cube' is cut off"]),
        (["a red dog"], ["'dog'", "knows these words: a ball blue cube left of red"]),
        (["a red bal"], ["'bal'", "Did you mean 'ball'?"]),
        (["a ball", "--negative", "a dog"], ["'dog'"]),
        (["a ball", "--steps", "0"], ["steps is 0", "positive"]),
        (["a ball", "--steps", "-1"], ["steps is -1", "positive"]),
        (["a ball", "--steps", "two"], ["--steps", "'two'", "generate -h"]),
        (["a ball", "--steps", "5000"], ["steps is 5000", "at most 1000"]),
        (["a ball", "--guidance", "nan"], ["Guidance is nan", "finite"]),
        (["a ball", "--guidance", "inf"], ["Guidance is inf", "finite"]),
        (["a ball", "--rescale", "2"], ["rescale is 2.0", "0 (off) to 1"]),
        (["a ball", "--interval", "700", "300"], ["700.0 to t = 300.0", "lower timestep first"]),
        (["a ball", "--interval", "700"], ["--interval", "expected 2 arguments"]),
        (["a ball", "--variant", "fp16"], ["no weights called variant 'fp16'", "variant=None"]),
        (["a ball", "--width", "17"], ["width is 17", "multiple of 4"]),
        (["a ball", "--height", "-8"], ["height is -8", "multiple of 4"]),
        (["a ball", "--seed", "-1"], ["seed -1 is out of range"]),
        (["a ball", "--sampler", "eular"], ["'eular'", "ddim, ddpm, euler, euler_ancestral, heun"]),
        (["a ball", "--device", "tpu"], ["'tpu'", "'cpu'"]),
        (["a ball", "--model", "no-such-model"], ["No model called 'no-such-model'", "'tabletop'"]),
        (["a ball", "--model", "nobody/no-such-model"], ["nobody/no-such-model", "HF_HUB_OFFLINE"]),
        (["a ball", "--colour", "red"], ["unrecognized arguments: --colour"]),
        ([], ["required: prompt"]),
    ],
)
def test_bad_input_is_one_line_code_2_and_no_file(run, model, tmp_path, arguments, says):
    known = [] if "--model" in arguments else ["--model", model]
    code, out, err = run("generate", *arguments, *known, "--out", tmp_path / "out")
    assert code == 2 and out == [] and len(err) == 1 and err[0].startswith("labkit: ")
    assert all(part in err[0] for part in says), err[0]
    assert listing(tmp_path) == []


def test_damaged_weights_are_told_on_the_command_line_too(run, model, tmp_path, monkeypatch):
    def attempt(change):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(model, tmp_path / "data" / "tabletop")
        write_sums(tmp_path / "data" / "tabletop")
        change(tmp_path / "data" / "tabletop")
        code, out, err = run("generate", "a ball", "--steps", 1, "--no-figures", "--out", tmp_path / "out", "--device", "cpu")
        return code, err

    def tamper(folder):
        content = bytearray((folder / UNET_FILE).read_bytes())
        content[-1] ^= 1
        (folder / UNET_FILE).write_bytes(content)

    monkeypatch.setattr(sources, "DATA", tmp_path / "data")
    monkeypatch.setattr(checkpoint, "DATA", tmp_path / "data")
    cases = {
        "was changed": tamper,
        "SHA-256": lambda folder: os.truncate(folder / UNET_FILE, 5000),
        "missing": lambda folder: (folder / UNET_FILE).unlink(),
        "not there": shutil.rmtree,
    }
    for says, change in cases.items():
        code, err = attempt(change)
        assert code == 2 and len(err) == 1 and says in err[0], err
        assert listing(tmp_path / "out") == []
    assert attempt(lambda folder: None) == (0, [])


def test_weights_of_another_architecture(run, model, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(model, folder)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "block_out_channels": [32, 96]}))
    code, out, err = run("info", folder)
    assert (code, out, len(err)) == (2, [], 1) and "of another shape" in err[0]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_told_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(labkit, "load", lambda *_: pytest.fail("it worked before it looked"))
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, err = run("generate", "a ball", "--out", out)
        assert code == 2 and len(err) == 1 and "is a file, not a folder" in err[0]
    monkeypatch.setattr(cli.os, "access", lambda *_: False)  # a test that runs as root may write anywhere
    code, _, err = run("generate", "a ball", "--out", tmp_path / "new")
    assert code == 2 and "cannot be written to" in err[0] and listing(tmp_path) == ["file"]


def test_all_files_or_none(tmp_path, monkeypatch):
    folder, write = tmp_path / "a" / "b", Path.write_bytes

    def full(path, content):
        if path.name == "two":
            raise OSError(28, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", full)
        with pytest.raises(labkit.LabkitError, match="No space left"):
            cli.write_all(folder, {"one": b"1", "two": b"2"})
    assert listing(tmp_path) == []  # not even the folders

    cli.write_all(folder, {"one": b"1"})
    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", full)
        with pytest.raises(labkit.LabkitError):
            cli.write_all(folder, {"one": b"new", "two": b"2"})
    assert listing(folder) == ["one"] and (folder / "one").read_bytes() == b"1"

    (folder / "three").mkdir()
    with pytest.raises(labkit.LabkitError, match="three is a folder"):
        cli.write_all(folder, {"one": b"new", "three": b"3"})
    assert (folder / "one").read_bytes() == b"1"
    cli.write_all(folder, {"one": b"new"})
    assert (folder / "one").read_bytes() == b"new" and listing(folder) == ["one", "three"]


def test_an_interrupt_is_130_and_leaves_nothing(run, model, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", interrupt)
        code, _, err = run("generate", "a ball", "--steps", 1, "--no-figures", "--model", model, "--out", tmp_path / "out")
    assert (code, err) == (130, ["labkit: stopped"]) and listing(tmp_path) == []


# --- the other commands ----------------------------------------------------------------------------------------------


def test_info(run, model):
    code, out, err = run("info", model, "--device", "cpu")
    text = "\n".join(out)
    assert (code, err) == (0, []) and "tiny: 16 x 16 pixels" in text and "knows 7 words: a ball blue" in text
    parameters = sum(p.numel() for p in labkit.load(model, "cpu").unet.parameters())
    assert f"{parameters:,}" in text


def test_train_and_evaluate_hand_on_what_they_are_told(run, model, tmp_path, monkeypatch):
    from labkit.training import draw, evaluate, tabletop, verifier_errors

    told, quick = [], draw.QUICK
    monkeypatch.setattr(tabletop, "train", lambda *a: told.append(a))
    monkeypatch.setattr(evaluate, "evaluate", lambda lab, out, plan, data: told.append((lab.name, out, plan, data)) or {"runs": [], "renders": {}})
    monkeypatch.setattr(verifier_errors, "publish", lambda lab, data, pictures: told.append((lab.name, data, pictures)) or {})
    assert run("train", "vae", "--preset", "smoke", "--folder", tmp_path, "--device", "cpu")[0] == 0
    assert run("train", "all")[0] == 0
    assert run("evaluate", model, "--prompts", 5, "--steps", 3)[0] == 0
    assert run("evaluate", model, "--quick", "--seeds", 3, "--guidance", "1,2.5,8", "--audit", 500, "--data", tmp_path, "--out", tmp_path / "out")[0] == 0
    assert run("verify", model, "--pictures", 40)[0] == 0
    assert told[0] == ("vae", tmp_path, tabletop.PRESETS["smoke"], "cpu")
    assert told[1] == ("all", Path("runs/tabletop"), tabletop.PRESETS["tabletop"], None)
    assert told[2] == ("tiny", Path("runs/evaluation/tiny"), draw.Plan(prompts=5, steps=3), evaluate.RENDERS)
    assert told[3] == ("tiny", tmp_path / "out", replace(quick, seeds=3, guidance=(1.0, 2.5, 8.0), audit=500), str(tmp_path))
    assert told[4] == ("tiny", evaluate.RENDERS, 40)
    assert run("evaluate", model, "--guidance", "1,x")[2][0].count("no list of guidance scales") == 1
    for bad, says in ((["train", "all", "--preset", "huge"], "'huge'"), (["train", "unet"], "invalid choice: 'unet'"), (["paint"], "'paint'"), ([], "COMMAND")):
        code, out, err = run(*bad)
        assert (code, out, len(err)) == (2, [], 1) and says in err[0]


def test_help_and_version(capsys):
    for argv, says in ((["--version"], labkit.__version__), (["-h"], "generate"), (["generate", "-h"], "--guidance")):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0 and says in capsys.readouterr().out


# --- the package's front door ----------------------------------------------------------------------------------------


def test_public_names_are_there_and_lazy(model):
    for name in labkit.__all__:
        assert getattr(labkit, name) is not None
    assert set(labkit.__all__) <= set(dir(labkit))
    with pytest.raises(AttributeError, match="labkit has no 'lod'"):
        labkit.lod
    code = "import sys, labkit; assert not {'torch', 'numpy', 'PIL', 'matplotlib', 'transformers', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)
    lab = labkit.load(model, device="cpu")
    assert (type(lab), str(lab.dtype)) == (labkit.LatentDiffusion, "torch.float32")
    with pytest.raises(labkit.LabkitError, match="Unknown dtype"):
        labkit.load(model, device="cpu", dtype="float12")


def test_version_is_the_packages():
    import tomllib

    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"] == labkit.__version__
