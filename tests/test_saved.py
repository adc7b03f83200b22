"""A trace on disk says afterwards what it said before, without its model, and where it is from."""

import json

import pytest
import torch
from tiny import build

import labkit
from labkit.errors import CheckpointError, LabkitError
from labkit.probes.keep import Keep
from labkit.probes.record import record
from labkit.probes.saved import load_trace, save_trace, weights_hash

PROMPTS = ["a red ball", "a blue cube left of a red ball"]
DRAW = {"progress": False, "height": 16, "width": 32, "steps": 3, "seed": [1, 2], "negative_prompt": ["cube", ""], "sampler": "dpm_solver_karras"}


@pytest.fixture(scope="module")
def lab():
    return build()


@pytest.fixture(scope="module")
def saved(lab, tmp_path_factory):
    with record(lab, ("cross", "self"), latents=True, states=("resid", "text", "queries"), keep=Keep(steps=True, layers=("mid", "up"))) as trace:
        lab.generate(PROMPTS[0], **{**DRAW, "seed": 5, "negative_prompt": ""})
        lab.generate(PROMPTS, **DRAW)
    return trace, save_trace(trace, tmp_path_factory.mktemp("traces") / "one")


def test_it_says_what_it_said(saved, lab):
    trace, folder = saved
    again = load_trace(folder)
    assert len(again.runs) == 2 and again.layers() == trace.layers() and again.branches == trace.branches and again.run.plan == trace.run.plan
    for word in ("red", "left of", "BOS", "padding", 3):
        for which in ({}, {"step": 1}, {"step": slice(1, 3)}, {"branch": "uncond"} if word == "padding" else {"head": 1}):
            a, b = (t.heatmap(word, image=1, **which) for t in (trace, again))
            assert torch.equal(a.map, b.map) and (a.tokens, a.averages, a.word) == (b.tokens, b.averages, b.word)
    assert [h.word for h in again.heatmaps(image=1)] == [h.word for h in trace.heatmaps(image=1)]
    assert torch.equal(again.self_attention("mid").values, trace.self_attention("mid").values)
    assert torch.equal(again.residual("mid", step=2).values, trace.residual("mid", step=2).values)
    assert torch.equal(again.text(branch="uncond").values, trace.text(branch="uncond").values)
    assert torch.equal(again.runs[0].heatmap("red").map, trace.runs[0].heatmap("red").map)
    for a, b in zip(again.steps, trace.steps, strict=True):
        assert (a.i, float(a.t), a.next_t) == (b.i, float(b.t), b.next_t) and torch.equal(a.x0, b.x0) and torch.equal(a.eps, b.eps)


def test_it_says_where_it_is_from(saved, lab):
    story = json.loads((saved[1] / "trace.json").read_text(encoding="utf-8"))
    recipe = story["runs"][1]["recipe"]
    assert (recipe["prompt"], recipe["seed"], recipe["sampler"]) == (PROMPTS, [1, 2], "dpm_solver_karras")
    assert story["model"]["name"] == "tiny" and story["model"]["sha256"]["unet"] == weights_hash(lab.unet)
    assert set(story["model"]["versions"]) == {"labkit", "torch", "python"} and story["model"]["versions"]["labkit"] == labkit.__version__
    with record(lab) as trace:
        lab.generate(**recipe, progress=False)  # the recipe draws it again
    assert torch.allclose(trace.heatmap("cube", image=1, layers=("mid", "up")).map, load_trace(saved[1]).heatmap("cube", image=1).map, atol=1e-6)


def test_the_hash_is_of_the_weights(lab):
    other = build()
    assert weights_hash(other.unet) == weights_hash(lab.unet)
    with torch.no_grad():
        other.unet.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert weights_hash(other.unet) != weights_hash(lab.unet) != weights_hash(lab.vae)


def test_with_its_model_it_has_its_picture_and_with_another_it_is_refused(saved, lab):
    trace, folder = saved
    assert load_trace(folder, lab).picture(1).tobytes() == trace.picture(1).tobytes()
    with pytest.raises(LabkitError, match="There is no picture"):
        load_trace(folder).picture()
    assert load_trace(folder).heatmap("red").plot().labkit_alt  # over grey
    other = build()
    with torch.no_grad():
        other.vae.post_quant_conv.bias += 1
    with pytest.raises(CheckpointError, match="other weights of the vae"):
        load_trace(folder, other)


def test_complete_or_not_at_all_and_never_over_another(saved, lab, tmp_path, monkeypatch):
    trace, folder = saved
    with pytest.raises(CheckpointError, match="exists already"):
        save_trace(trace, folder)
    save_trace(trace, folder, overwrite=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("labkit.probes.saved.write_json", full)
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_trace(trace, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    with record(lab) as nothing, pytest.raises(LabkitError, match="Nothing was recorded"):
        save_trace(nothing, tmp_path / "new")


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "trace.json").unlink(),
        lambda f: (f / "trace.safetensors").unlink(),
        lambda f: (f / "trace.json").write_text("{}"),
        lambda f: (f / "trace.json").write_text("[1"),
        lambda f: (f / "trace.json").write_text((f / "trace.json").read_text().replace('"calls"', '"kalls"')),
        lambda f: (f / "trace.json").write_text((f / "trace.json").read_text().replace('"attn2', '"attn9').replace("cross", "crass")),
        lambda f: (f / "trace.safetensors").write_bytes((f / "trace.safetensors").read_bytes()[:-9]),
    ],
)
def test_what_is_damaged_is_said_in_one_line(saved, tmp_path, damage):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(saved[1], folder)
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        load_trace(folder)
    assert "\n" not in str(error.value) and "copy" in str(error.value)


def test_words_of_other_prompts_are_not_known(saved):
    with pytest.raises(LabkitError, match="its prompts only"):
        load_trace(saved[1]).run.tokenizer.encode("a dog")
