"""TabletopEval: what is drawn is what the list says, what is counted is what was drawn, and an interrupted run goes on where it was."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from labkit.errors import LabkitError
from labkit.scenes.judge import right
from labkit.scenes.prompts import CATEGORIES, load_prompts
from labkit.scenes.reader import WEIGHTS
from labkit.scenes.render import render_many
from labkit.scenes.scene import Object, Scene, sample_scene
from labkit.training import data, draw, evaluate, memorisation
from labkit.training.data import TEST_SEED, renders, scenes
from labkit.training.draw import QUICK, UNSAID, Plan, claim, fingerprint, jobs
from labkit.training.evaluate import GENEVAL, by_prompt, table
from labkit.training.sheets import grid, sheet
from labkit.training.verifier import WORLD
from tests.benchmarks import agreement
from tests.test_scenes_prompts import as_read

SHIPPED = pytest.mark.skipif(not (WEIGHTS / "config.json").exists(), reason="the reader's weights are not here")
TINY = Plan(prompts=2, seeds=2, captions=4, reconstructions=4, guidance=(3.0,), steps=5)


class Pretender:
    """Stands for a model: draws a true render of what a prompt of the list wants, or of other colours where the guidance is 1."""

    name, defaults = "pretender", {"guidance": 4.0, "steps": 20}
    metadata = {"training": {"counts": list(WORLD.counts), "styles": list(WORLD.styles), "pictures": 16}}

    def __init__(self):
        self.calls = []
        self.wanted = {(p.text, p.negative): p.wants for p in load_prompts()}
        self.unet = self.vae = self.text_encoder = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(self.unet.weight), torch.nn.init.ones_(self.unet.bias)

    def generate(self, prompt, negative_prompt, seed, guidance, steps, progress):
        self.calls.append((list(prompt), list(negative_prompt), list(seed), guidance, steps))
        of = [self.scene(text, negative, number, guidance) for text, negative, number in zip(prompt, negative_prompt, seed)]
        return type("Generation", (), {"images": [Image.fromarray(picture) for picture in render_many(of, workers=1)]})

    def scene(self, text, negative, seed, guidance):
        wants = self.wanted.get((text, negative))
        asked = [*wants.things, *(thing for thing, count in wants.counts for _ in range(count))] if wants else []
        for k in range(500):  # objects that fit, where a sample put others: until no rule of the prompt is broken
            other = sample_scene(np.random.default_rng(1000 * seed + k), counts=(max(len(asked), 1),), held_out="any")
            things = [vars(o) | t for o, t in zip(other.objects, asked or [{}])]
            if guidance == 1.0:
                things = [t | {"colour": "cyan" if t["colour"] != "cyan" else "red"} for t in things]
            whole = {name: getattr(other, name) for name in ("table", "light", "style")} | dict(wants.picture if wants else ())
            made = Scene(tuple(Object(**t) for t in things), **whole)
            if not wants or guidance == 1.0 or right(as_read(made), wants):
                return made
        raise AssertionError(text)

    def encode_image(self, x):
        return x

    def decode(self, z):
        return (z + 0.1).clamp(0, 1)


@pytest.fixture
def shards(monkeypatch):
    monkeypatch.setattr(data, "SHARD", 8)
    monkeypatch.setattr(memorisation, "SHARD", 8)


# -- what is drawn -------------------------------------------------------------------------------------------------


def test_jobs_are_the_list_s_and_seeds_are_the_prompt_s():
    prompts = load_prompts()
    full, quick = jobs(prompts, Plan()), jobs(prompts, QUICK)
    assert {category: len(row) for category, row in full.items()} == {**dict.fromkeys((*CATEGORIES, UNSAID), 400), "captions": 500}
    assert sum(len(row) for category, row in full.items() if category in CATEGORIES) == 4800 and set(GENEVAL) < set(CATEGORIES)
    seeds = [job.seed for category, row in full.items() if category != UNSAID for job in row]
    assert len(set(seeds)) == len(seeds), "no two pictures start from the same noise"
    for category, row in quick.items():
        assert set(row) <= set(full[category]), "fewer pictures, not others"
        assert len(row) == (100 if category == "captions" else 20)
    assert {c for j in quick["counting"] for _, c in prompts[j.prompt].wants.counts} == {2, 3, 4}, "fewer prompts have the same variety"
    assert [(j.text, j.seed) for j in full[UNSAID]] == [(j.text, j.seed) for j in full["negation"]]
    assert not any(j.negative for j in full[UNSAID]) and all(j.negative for j in full["negation"])


def test_bad_plans_are_refused():
    for bad in ({"prompts": 0}, {"seeds": 5}, {"seeds": 0}, {"captions": 1}, {"reconstructions": 0}, {"guidance": ()}):
        with pytest.raises(LabkitError, match="an evaluation needs"):
            Plan(**bad)


def test_folder_of_another_evaluation_is_refused(tmp_path):
    claim(tmp_path / "out", {"weights": "1", "steps": 20})
    claim(tmp_path / "out", {"weights": "1", "steps": 20})
    with pytest.raises(LabkitError, match="steps 20, not 30.*another folder"):
        claim(tmp_path / "out", {"weights": "1", "steps": 30})
    (tmp_path / "file").write_text("")
    with pytest.raises(LabkitError, match="is a file"):
        claim(tmp_path / "file", {})


def test_fingerprint_changes_with_a_weight():
    lab = Pretender()
    before = fingerprint(lab)
    assert before == fingerprint(Pretender()) and len(before) == 16
    lab.unet.weight.data += 1e-3
    assert fingerprint(lab) != before


# -- what is counted -----------------------------------------------------------------------------------------------


@SHIPPED
def test_true_pictures_score_and_false_ones_do_not(tmp_path, shards, capsys):
    from dataclasses import replace

    lab, out = Pretender(), tmp_path / "out"
    found = evaluate.evaluate(lab, out, replace(TINY, guidance=(3.0, 1.0), audit=16), tmp_path / "data")
    true, false = found["runs"]
    shares = {category: row["right"]["share"] for category, row in true["categories"].items() if category != UNSAID}
    assert set(shares) == set(CATEGORIES) and np.mean(list(shares.values())) >= 0.85, shares
    assert true["six"]["share"] >= 0.8 and true["six"]["low"] <= true["six"]["share"] <= true["six"]["high"]
    for category in ("colour", "attribute binding"):
        assert false["categories"][category]["right"]["share"] == 0, "everything is painted wrong"
    assert all(row["alone"]["share"] <= row["right"]["share"] for row in true["categories"].values())
    assert found["renders"]["saturation"] > 0 and true["frechet"] > 0 and 0 < true["diversity"] < 4
    assert 19.9 < found["reconstruction"]["psnr"] < 23  # the pretender adds 0.1
    audit = true["audit"]
    assert audit["training pictures"] == 16 and audit["two renders of one specification"]["n"] == 4

    said = capsys.readouterr().out
    assert all(category in said for category in CATEGORIES) and "mean of first six" in said and "diversity" in said and "nearer than any unseen render" in said
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(found))
    verdicts = json.loads((out / "w-3" / "verdicts.json").read_text())
    assert {len(rows) for rows in verdicts.values()} == {4} and "read" in verdicts["colour"][0]
    assert Image.open(out / "w-3" / "samples.png").size == (8 * 128, 128) and Image.open(out / "w-1" / "counting.png").size[0] == 10 * 132


@SHIPPED
def test_interrupted_evaluation_goes_on_and_draws_nothing_twice(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(draw, "BATCH", 2)
    lab, out = Pretender(), tmp_path / "out"
    whole = lab.generate

    def stops(*arguments, **named):
        if len(lab.calls) == 7:
            raise KeyboardInterrupt
        return whole(*arguments, **named)

    lab.generate = stops
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(lab, out, TINY, tmp_path / "data", quiet=True)
    lab.generate = whole
    found = evaluate.evaluate(lab, out, TINY, tmp_path / "data", quiet=True)
    drawn = [(text, negative, seed) for call in lab.calls for text, negative, seed in zip(*call[:3])]
    wanted = [(j.text, j.negative, j.seed) for row in jobs(load_prompts(), TINY).values() for j in row]
    assert sorted(drawn) == sorted(wanted), "each picture was drawn once"
    assert {call[3:] for call in lab.calls} == {(3.0, 5)}
    calls = len(lab.calls)
    assert evaluate.evaluate(lab, out, TINY, tmp_path / "data", quiet=True) == found and len(lab.calls) == calls
    sheet_of = out / "w-3" / "pictures" / "colour-0000.png"
    Image.open(sheet_of).crop((0, 0, 128, 128)).save(sheet_of)
    with pytest.raises(LabkitError, match="colour-0000.png holds 1 pictures where 2 belong"):
        evaluate.evaluate(lab, out, TINY, tmp_path / "data", quiet=True)
    lab.unet.weight.data += 1
    with pytest.raises(LabkitError, match="pictures of another evaluation"):
        evaluate.evaluate(lab, out, TINY, tmp_path / "data", quiet=True)


def test_seeds_of_a_prompt_stay_together():
    rows = [{"prompt": 7, "right": True}, {"prompt": 9, "right": False}, {"prompt": 7, "right": False}]
    assert by_prompt(rows, "right") == [[1.0, 0.0], [0.0]]


def test_table_has_a_column_for_each_scale():
    row = {"right": {"share": 0.5, "low": 0.4, "high": 0.6}, "alone": {"share": 0.25, "low": 0.2, "high": 0.3}}
    measured = {"diversity": 0.1, "saturation": 0.2, "burnt": 0.0, "frechet": 3.0}
    runs = [{"guidance": w, "categories": {"colour": row}, "six": row["right"], **measured} for w in (1.0, 4.0)]
    about = {"model": "m", "steps": 20, "prompts": 2, "seeds": 1, "renders": {"saturation": 0.3}, "reconstruction": {"pictures": 1, "psnr": 30, "ssim": 0.9}}
    said = table({**about, "runs": runs})
    assert said.count("50.0 [40.0, 60.0]") == 4 and said.count("25.0") == 2 and "renders: 0.3" in said


# -- learnt by heart? ----------------------------------------------------------------------------------------------


def test_copies_of_training_pictures_are_found(tmp_path, shards):
    trained = renders(WORLD, 0, 16, tmp_path, workers=1)
    unseen = renders(WORLD, TEST_SEED, 8, tmp_path, workers=1)
    same = renders(WORLD, memorisation.CAPTION_SEED, 8, tmp_path, workers=1)
    copies = np.clip(trained[3:11].astype(int) + np.random.default_rng(0).integers(-3, 4, trained[3:11].shape), 0, 255).astype(np.uint8)
    found = memorisation.audit(copies, same, unseen, (WORLD, 16), tmp_path)
    assert found["nearer than any two renders of one specification"] == found["nearer than any unseen render"] == 8
    assert found["unseen renders nearer than those"] < 8 == memorisation.audit(same, same, copies, (WORLD, 16), tmp_path)["unseen renders nearer than those"]
    honest = memorisation.audit(same, same, unseen, (WORLD, 16), tmp_path)
    near = honest["generated, to the nearest training picture"]
    assert near["least"] > 10 * found["generated, to the nearest training picture"]["least"] and near["least"] <= near["1 %"] <= near["median"]
    assert "16 training pictures" in memorisation.sentence(honest)


def test_nearest_is_the_least_of_all_pairs(tmp_path, shards):
    x, y = memorisation.thumbs(renders(WORLD, TEST_SEED, 4, tmp_path, workers=1)), memorisation.thumbs(renders(WORLD, 0, 12, tmp_path, workers=1))
    by_hand = torch.stack([(x - row).square().mean(1).sqrt() for row in y]).amin(0)
    torch.testing.assert_close(memorisation.nearest(x, WORLD, 12, tmp_path), by_hand, rtol=1e-3, atol=1e-4)


def test_the_pictures_that_are_looked_through_are_those_the_model_was_trained_on(tmp_path):
    from types import SimpleNamespace

    lab = SimpleNamespace(name="one", metadata={"training": {"counts": [1, 1, 2], "styles": ["photo"], "pictures": 20}})
    assert memorisation.world_of(lab, 20) == data.World(counts=(1, 1, 2), styles=("photo",))
    lab.metadata["training"]["groups"] = 0.25
    assert memorisation.world_of(lab, 20) == data.World(counts=(1, 1, 2), styles=("photo",), groups=0.25)
    lab.metadata["training"]["hidden"] = 0.05
    assert memorisation.world_of(lab, 20) == data.World(counts=(1, 1, 2), styles=("photo",), groups=0.25, hidden=0.05)
    with pytest.raises(LabkitError, match="was trained on 20 pictures, and 21 are to be looked through: give --audit 20"):
        memorisation.world_of(lab, 21)
    with pytest.raises(LabkitError, match="does not say what it was trained on"):
        memorisation.world_of(SimpleNamespace(name="one", metadata={}), 1)


# -- sheets --------------------------------------------------------------------------------------------------------


def test_sheets_frame_what_is_wrong():
    grey = np.full((128, 128, 3), 128, np.uint8)
    row = {"image": grey, "text": "a red cube left of a blue sphere on a plain table", "negative": "", "read": "nothing; plain table", "right": True}
    paper = np.asarray(sheet([row, row | {"right": False}], columns=2)).astype(int)
    orange = (paper[..., 0] > 200) & (paper[..., 1] < 130) & (paper[..., 2] < 60)
    assert orange[:, 132:].any() and not orange[:, :132].any()
    assert np.asarray(grid([grey] * 3, columns=2)).shape == (256, 256, 3)


# -- beside labels made by eye ---------------------------------------------------------------------------------------


def test_labels_are_of_the_pictures():
    labels, pictures = agreement.labelled()
    assert len(labels) == len(pictures) == 100 and sum(len(label["objects"]) for label in labels) > 120
    assert sum(thing["shape"] is not None and thing["colour"] is not None for label in labels for thing in label["objects"]) >= 75


@SHIPPED
def test_reader_agrees_with_who_looked():
    """97 % is the aim; what is measured is in the card. Exchanged labels disagree, so the measure can fail."""
    from labkit.scenes.verify import read

    labels, pictures = agreement.labelled()
    readings = read(pictures)
    found = {name: np.mean(rows) for name, rows in agreement.agreements(labels, readings).items()}
    assert all(found[name] >= 0.97 for name in ("colour and shape", "count", "light", "table")), found
    exchanged = agreement.agreements(labels, readings[::-1])
    assert np.mean(exchanged["colour and shape"]) < 0.3


def test_tests_world_is_the_captions_world():
    """The scenes that captions are of are the ones that are rendered beside them."""
    first = next(p for p in load_prompts() if p.scene is not None)
    from labkit.scenes.captions import caption

    assert caption(scenes(WORLD, first.scene, 1)[0], np.random.default_rng(first.scene)).text == first.text and first.scene == memorisation.CAPTION_SEED
