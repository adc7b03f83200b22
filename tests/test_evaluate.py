"""The judge and the evaluation: the shipped judge sees what is there, the counting is arithmetic one can check by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from labkit.errors import CheckpointError, LabkitError
from labkit.scenes.captions import vocabulary
from labkit.scenes.render import render_many
from labkit.scenes.scene import COLOURS, SHAPES, sample_scene
from labkit.scenes.verify import ATTRIBUTES, WEIGHTS, Classifier, best, classify, load_classifier, share, shrink
from labkit.training import data, evaluate, verifier
from labkit.training.data import TEST_SEED, World, scenes
from labkit.training.evaluate import HELD_OUT, PAIRS, held_out_prompts, one_object_prompts, psnr, ssim
from labkit.training.loop import LoopConfig

SHIPPED = pytest.mark.skipif(not WEIGHTS.exists(), reason="the judge's weights are not here")


@pytest.fixture(scope="module")
def seen():
    """24 scenes with one object that no training has seen, and their pictures."""
    of = scenes(World(counts=(1,)), TEST_SEED + 5000, 24)
    return of, render_many(of, workers=1)


# -- the judge -----------------------------------------------------------------------------------------------------


def test_judge_is_small_and_answers_for_every_attribute():
    judge = Classifier()
    assert sum(p.numel() for p in judge.parameters()) < 700_000  # 1.4 MB in float16
    out = judge(torch.rand(2, 3, 64, 64))
    assert {name: tuple(logits.shape) for name, logits in out.items()} == {name: (2, len(values)) for name, values in ATTRIBUTES.items()}
    assert ATTRIBUTES["colour"] == tuple(COLOURS) and ATTRIBUTES["shape"] == SHAPES


@SHIPPED
def test_shipped_judge_sees_what_is_there(seen):
    of, pictures = seen
    found = [best(one) for one in classify(pictures)]
    for name in ("colour", "shape"):
        right = [one[name] == getattr(scene.objects[0], name) for one, scene in zip(found, of)]
        assert sum(right) >= 22, (name, right)
    assert sum(one["light"] == scene.light for one, scene in zip(found, of)) >= 22
    assert sum(one["count"] == "one" for one in found) >= 22
    config = json.loads((WEIGHTS / "config.json").read_text())
    stated = config["errors"]["renders"]["colour and shape"]
    assert stated["n"] >= 500 and stated["low"] <= stated["share"] <= stated["high"]
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 1.5e6


@SHIPPED
def test_judge_follows_the_picture_not_a_habit(seen):
    """Red and blue exchanged in the pixels are exchanged in the answer."""
    of, pictures = seen
    chosen = [i for i, scene in enumerate(of) if scene.objects[0].colour in ("red", "blue") and scene.light == "day"]
    assert chosen
    before, after = classify(pictures[chosen]), classify(np.ascontiguousarray(pictures[chosen][..., ::-1]))
    assert all(a["colour"]["blue" if best(b)["colour"] == "red" else "red"] > b["colour"]["blue" if best(b)["colour"] == "red" else "red"] for b, a in zip(before, after))


def test_classify_takes_tensors_arrays_and_pil(seen):
    torch.manual_seed(0)
    judge, pictures = Classifier().eval(), seen[1][:3]
    as_array = classify(pictures, judge)
    as_tensor = classify(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255, judge)
    as_pil = classify([Image.fromarray(picture) for picture in pictures], judge, batch_size=2)
    alone = classify(Image.fromarray(pictures[2]), judge)
    for one, two, three in zip(as_array, as_tensor, as_pil):
        for name in ATTRIBUTES:
            assert sum(one[name].values()) == pytest.approx(1, abs=1e-5) and list(one[name].values()) == sorted(one[name].values(), reverse=True)
            assert one[name] == pytest.approx(two[name], abs=1e-5) and one[name] == pytest.approx(three[name], abs=1e-5)
    assert len(alone) == 1 and alone[0]["shape"] == pytest.approx(as_array[2]["shape"], abs=1e-5)
    assert best(as_array[0])["colour"] == max(as_array[0]["colour"], key=as_array[0]["colour"].get)


@pytest.mark.parametrize("images, says", [
    (torch.rand(2, 3, 64, 64) * 2 - 1, "outside"),
    (torch.full((1, 3, 64, 64), float("nan")), "outside"),
    (torch.rand(3, 64, 64), "give"),
    (torch.rand(1, 1, 64, 64), "give"),
    (np.zeros((1, 64, 64, 3)), "no pictures"),
    ([], "no pictures"),
    ("a red sphere", "no pictures"),
    ([Image.new("RGB", (64, 64)), Image.new("RGB", (32, 32))], "differ in size"),
])  # fmt: skip
def test_what_is_no_picture_is_refused(images, says):
    with pytest.raises(LabkitError, match=says) as error:
        classify(images, Classifier().eval())
    assert "\n" not in str(error.value)


def test_shrink_averages_over_areas():
    x = torch.rand(1, 3, 128, 128)
    torch.testing.assert_close(shrink(x)[0, :, 5, 7], x[0, :, 10:12, 14:16].mean((1, 2)))


def test_saved_judge_is_the_one_that_was_trained_and_damage_is_named(tmp_path):
    torch.manual_seed(0)
    judge = Classifier().eval()
    verifier.save(judge, tmp_path / "judge", {"note": "untrained"})
    again, x = load_classifier(tmp_path / "judge"), torch.rand(1, 3, 64, 64)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    for name, logits in judge(x).items():
        torch.testing.assert_close(again(x)[name], logits, rtol=0.01, atol=0.01)  # kept in float16
    assert sorted(path.name for path in (tmp_path / "judge").iterdir()) == ["SHA256SUMS", "config.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match="cannot be opened.*git checkout"):
        load_classifier(tmp_path / "nowhere")
    weights = tmp_path / "judge" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be opened"):
        load_classifier(tmp_path / "judge")
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    (tmp_path / "judge" / "config.json").write_text(json.dumps({**config, "attributes": {"colour": ["mauve"]}}))
    with pytest.raises(CheckpointError, match="attributes are not this version's"):
        load_classifier(tmp_path / "judge")


# -- its training --------------------------------------------------------------------------------------------------


def test_labels_are_the_scene_s():
    rng = np.random.default_rng(0)
    of = [sample_scene(rng, counts=(1, 2)) for _ in range(40)]
    for scene, row in zip(of, verifier.labels(of)):
        read = {name: values[i] if i >= 0 else None for (name, values), i in zip(ATTRIBUTES.items(), row.tolist())}
        assert (read["table"], read["light"]) == (scene.table, scene.light)
        assert read["count"] == ("one" if len(scene.objects) == 1 else "several")
        for name in ("colour", "shape", "size", "material"):
            assert read[name] == (getattr(scene.objects[0], name) if len(scene.objects) == 1 else None)


def test_spoiled_pictures_stay_pictures_and_are_drawn_from_the_seed():
    x = torch.from_numpy(render_many([World().scene(1)], workers=1)).permute(0, 3, 1, 2) / 255
    x = shrink(x).repeat(8, 1, 1, 1)
    one, two, other = (verifier.spoil(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.shape == x.shape and one.min() >= 0 and one.max() <= 1
    assert (one.mean((1, 2, 3)) - x.mean((1, 2, 3))).abs().max() < 0.15, "brightness stays about what it was"
    assert verifier.blur(x, 22).var() < x.var()


def test_judge_is_trained_measured_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 16)
    monkeypatch.setattr(verifier, "HELD_OUT", 8)
    monkeypatch.setattr(verifier, "HELD_OUT_TEST", 8)
    monkeypatch.setattr(data, "render_many", lambda of, workers=2: np.stack([np.full((128, 128, 3), 255 * (len(s.objects) > 1), np.uint8) for s in of]))
    config = LoopConfig(steps=25, batch_size=16, lr=3e-3, warmup=1, ema_decay=0.5)
    figures = verifier.main(tmp_path, tmp_path / "judge", config, pictures=32, test_pictures=16)
    assert figures["renders"]["count"]["n"] == 16 and figures["renders"]["count"]["share"] > 0.9, "black is one, white is several"
    one = sum(len(s.objects) == 1 for s in scenes(World(), TEST_SEED, 16))
    assert figures["renders"]["colour"]["n"] == one and figures["held-out renders"]["colour"]["n"] == 8
    assert json.loads((tmp_path / "judge" / "config.json").read_text())["errors"] == figures
    black, white = classify(np.stack([np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)]), load_classifier(tmp_path / "judge"))
    assert best(black)["count"] == "one" and best(white)["count"] == "several"
    with pytest.raises(LabkitError, match="is a file"):
        verifier.main(tmp_path / "judge" / "config.json")


# -- counting and measuring ----------------------------------------------------------------------------------------


def test_wilson_interval_known_values():
    found = share(8, 10)  # Wilson (1927) by hand; also Agresti & Coull's tables
    assert (found["share"], found["low"], found["high"]) == (0.8, pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert share(0, 20)["low"] == 0 and share(0, 20)["high"] == pytest.approx(0.1611, abs=1e-4)
    assert share(20, 20)["high"] == 1 and share(20, 20)["low"] == pytest.approx(0.8389, abs=1e-4)
    plain = 1.96 * (0.8 * 0.2 / 10) ** 0.5  # the wrong twin reaches above 1
    assert 0.8 + plain > 1
    for right, n in ((3, 2), (-1, 4), (0, 0)):
        with pytest.raises(LabkitError):
            share(right, n)


def test_psnr_of_known_errors():
    x = torch.full((2, 3, 16, 16), 0.5)
    y = x.clone()
    y[0] += 0.1
    y[1, 0] += 0.1  # a third of the values
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 20.0 + 4.7712]), rtol=1e-4, atol=1e-3)


def test_ssim_equals_a_plain_loop():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 14, 13, generator=g, dtype=torch.float64)
    y = (x + 0.2 * torch.randn(x.shape, generator=g, dtype=torch.float64)).clamp(0, 1)
    i = np.arange(11) - 5
    w = np.exp(-(i[:, None] ** 2 + i[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    values = []
    for c in range(3):
        for r in range(4):
            for s in range(3):
                a, b = (z[0, c, r : r + 11, s : s + 11].numpy() for z in (x, y))
                ma, mb = (w * a).sum(), (w * b).sum()
                va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    assert ssim(x, y).item() == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim(x, x).item() == pytest.approx(1) and ssim(x, 1 - x).item() < 0.1


def test_prompts_are_of_the_world_and_never_the_held_out_pair():
    prompts, known = one_object_prompts(100), set(vocabulary())
    assert prompts == one_object_prompts(100) and len({p["prompt"] for p in prompts}) > 90
    assert len(PAIRS) == 31 and HELD_OUT not in PAIRS
    assert {(p["colour"], p["shape"]) for p in prompts[:31]} == set(PAIRS), "every pair once before any comes again"
    assert all(p["prompt"] in (f"a {p['colour']} {p['shape']}", f"an {p['colour']} {p['shape']}") for p in prompts[:31])
    for p in prompts + held_out_prompts(20):
        words = p["prompt"].split()
        assert set(words) <= known and p["colour"] in words, p
    assert not any(p["prompt"].startswith(("a orange", "an blue")) for p in prompts)
    assert {(p["colour"], p["shape"]) for p in held_out_prompts(7)} == {HELD_OUT}


class Pretender:
    """Stands for a model: draws the true render of what the prompt names, or of something else for every `wrong`-th picture."""

    name, defaults = "pretender", {"guidance": 4.0, "steps": 20}

    def __init__(self, wrong=0):
        self.wrong, self.calls, self.drawn = wrong, [], 0

    def generate(self, prompt, seed, guidance, steps, progress):
        self.calls.append((list(prompt), list(seed), guidance, steps))
        wanted = {p["prompt"]: (p["colour"], p["shape"]) for p in one_object_prompts(100) + held_out_prompts(20)}
        of = []
        for text in prompt:
            self.drawn += 1
            colour, shape = wanted[text]
            colour = {"red": "blue"}.get(colour, "red") if self.wrong and self.drawn % self.wrong == 0 else colour
            only = {"colour": dict.fromkeys(COLOURS, 0) | {colour: 1}, "shape": dict.fromkeys(SHAPES, 0) | {shape: 1}, "light": {"night": 0, "sunset": 0}}
            of.append(sample_scene(np.random.default_rng(len(of)), counts=(1,), weights=only, held_out="only" if (colour, shape) == HELD_OUT else "exclude"))
        return type("Generation", (), {"images": [Image.fromarray(picture) for picture in render_many(of, workers=1)]})

    def encode_image(self, x):
        return x

    def decode(self, z):
        return (z + 0.1).clamp(0, 1)


@SHIPPED
def test_evaluation_counts_what_was_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "SHARD", 6)
    monkeypatch.setattr(evaluate, "BATCH", 5)
    lab = Pretender(wrong=4)
    found = evaluate.evaluate(lab, tmp_path / "out", prompts=12, seed=100, steps=3, pictures=6, data=tmp_path / "data", held_out=2)
    assert [len(call[0]) for call in lab.calls] == [5, 5, 2, 2]
    assert [seed for call in lab.calls[:3] for seed in call[1]] == list(range(100, 112)) and lab.calls[0][2:] == (None, 3)
    counted = found["prompts"]
    assert counted["colour"]["n"] == 12 and counted["colour"]["right"] == pytest.approx(9, abs=1), "every fourth is painted wrong"
    assert counted["shape"]["right"] >= 11 and counted["colour and shape"]["right"] <= counted["colour"]["right"]
    assert counted["both, and one object"]["right"] <= counted["colour and shape"]["right"]
    assert found["held-out prompts (purple cones)"]["colour"]["n"] == 2
    assert 19.9 < found["reconstruction"]["psnr"] < 23 and 0.8 < found["reconstruction"]["ssim"] < 1  # the pretender adds 0.1
    one = sum(len(s.objects) == 1 for s in scenes(World(), TEST_SEED, 6))
    assert found["verifier on renders"]["colour and shape"]["n"] == found["verifier on reconstructions"]["colour"]["n"] == one
    assert (found["guidance"], found["steps"], found["seed"]) == (4.0, 3, 100)
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["prompts"] == counted and [row["seed"] for row in written["pictures"]] == [*range(100, 112), 100, 101]
    assert Image.open(tmp_path / "out" / "prompts.png").size[0] == 10 * 132 and (tmp_path / "out" / "held-out.png").exists()
    said = capsys.readouterr().out
    assert "colour and shape" in said and "psnr" in said and "of 12" in said


@SHIPPED
def test_bad_input_is_refused_before_anything_is_drawn(tmp_path):
    lab = Pretender()
    for bad in ({"prompts": 0}, {"pictures": 0}, {"held_out": -1}, {"colour": "red"}):
        with pytest.raises(LabkitError, match="evaluate takes"):
            evaluate.evaluate(lab, **bad)
    (tmp_path / "file").write_text("")
    with pytest.raises(LabkitError, match="is a file"):
        evaluate.evaluate(lab, tmp_path / "file")
    assert lab.calls == []
