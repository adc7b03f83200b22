"""Training of the reader: what it is told is true, moved with the picture; a short run learns, is resumed and written; its errors are counted right."""

import json

import numpy as np
import pytest
import torch

from labkit.errors import LabkitError
from labkit.scenes.reader import CELLS, MAPS, OBJECT, PICTURE, Reader, ReaderConfig, load_reader
from labkit.scenes.render import render, render_many
from labkit.scenes.scene import is_held_out, sample_scene
from labkit.scenes.verify import Read, read_one
from labkit.training import data, verifier, verifier_errors
from labkit.training.data import TEST_SEED, scenes
from labkit.training.degrade import BLURS, blur, reconstruct, spoil
from labkit.training.loop import LoopConfig
from labkit.training.verifier import MOST, WORLD, HeldOut, Reading, Truth, halved, moved, truth
from labkit.training.verifier_errors import compare, score, table
from tests.test_scenes_verify import perfect


@pytest.fixture(scope="module")
def shown():
    """24 scenes of all kinds and their pictures (24, 128, 128, 3) uint8."""
    of = scenes(WORLD, TEST_SEED + 400, 24)
    return of, render_many(of, workers=1)


def pixels(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


# -- what is true --------------------------------------------------------------------------------------------------


def test_truth_is_the_scene_s(shown):
    true = truth(shown[0])
    masks = render(shown[0]).masks  # (24, K, 128, 128)
    for i, scene in enumerate(shown[0]):
        for k, obj in enumerate(scene.objects):
            assert [values[true.says[i, k, j]] for j, (name, values) in enumerate(OBJECT.items())] == [getattr(obj, name) for name in OBJECT]
            cells, covered = true.owner[i] == k, torch.nn.functional.avg_pool2d(masks[i, k][None], 2)[0] > 0.5
            assert (cells & covered).sum() / (cells | covered).sum() > 0.9, "the middle of a cell is hit where most of it is covered"
            rows, columns = cells.nonzero().T
            down, across = true.foot[i, k].tolist()
            assert rows.min() < down < rows.max() + 2 and columns.min() < across < columns.max() + 1, "it stands within its outline"
            assert down > rows.float().mean(), "and in the lower half"
        assert (true.says[i, len(scene.objects) :] == -100).all() and not (true.owner[i] == len(scene.objects)).any() or len(scene.objects) == MOST
        assert [values[true.picture[i, j]] for j, values in enumerate(PICTURE.values())] == [getattr(scene, name) for name in PICTURE]


def test_held_out_world_is_what_training_leaves_out():
    assert all(is_held_out(scene) for scene in scenes(HeldOut(), TEST_SEED, 12)) and not any(is_held_out(s) for s in scenes(WORLD, TEST_SEED, 12))


def test_truth_moves_with_the_picture(shown):
    """A picture in which every object is painted in a grey of its own shows, once moved, the owners that were moved with it."""
    true = truth(shown[0])
    painted = (true.owner.float() / MOST)[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)
    for seed in range(4):
        image, after = moved(painted, true, torch.Generator().manual_seed(seed))
        owner = (image[:, 0, ::2, ::2] * MOST).round().to(torch.uint8)
        assert (owner == after.owner).float().mean() > 0.999 and not torch.equal(after.owner, true.owner)
        for i in range(len(owner)):
            k = int(true.owner[i].min())
            columns, before = (after.owner[i] == k).nonzero()[:, 1].float(), (true.owner[i] == k).nonzero()[:, 1].float()
            inside, sign = true.foot[i, k, 1] - before.mean(), -1 if i < len(owner) // 2 else 1  # the first half is mirrored
            assert float(after.foot[i, k, 1] - columns.mean()) == pytest.approx(float(sign * inside), abs=1.1)
    small, half = halved(painted, true)
    assert small.shape[-1] == 64 and half.owner.shape[-1] == CELLS // 2 and torch.equal(half.foot, true.foot / 2)


def test_true_maps_have_the_least_loss(shown):
    """The objective is near zero for the truth, and rises when any part of it is exchanged."""
    true, told = truth(shown[0]), [*perfect(shown[0])]

    class Oracle(torch.nn.Module):
        def forward(self, image):
            return {name: torch.stack([one[name] for one in told]) for name in told[0]}

    batch = {"image": torch.zeros(24, 3, 128, 128), "truth": tuple(vars(true).values())}
    best = Reading(Oracle())(batch)
    assert best["loss"] < 0.02 and best["right"] == 1
    wrong = {"owner": true.owner.flip(2), "foot": true.foot + 2, "says": torch.where(true.says == 0, 1, true.says), "picture": true.picture.flip(0)}
    for name, part in wrong.items():
        worse = Reading(Oracle())({**batch, "truth": tuple((vars(true) | {name: part}).values())})
        assert worse["loss"] > best["loss"] + 0.2, name


def test_small_objects_count_as_much_as_large_ones(shown):
    """Two objects, one of ten cells and one of a thousand, both wrong in colour: each has half of the loss."""
    owner = torch.full((1, CELLS, CELLS), MOST, dtype=torch.uint8)
    owner[0, :1, :10], owner[0, 10:40, :40] = 0, 1
    true = Truth(owner, torch.zeros(1, MOST, 2), torch.tensor([[[0] * 4, [0] * 4, [-100] * 4, [-100] * 4]]), torch.zeros(1, 3, dtype=torch.long))

    def loss(wrong):
        class Fixed(torch.nn.Module):
            def forward(self, image):
                told = {name: torch.zeros(1, n, CELLS, CELLS) for name, n in MAPS.items()}
                told["colour"][0, 0] = 5.0
                told["colour"][0, 0, owner[0] == wrong] = -5.0
                return told | {name: torch.zeros(1, len(v)) for name, v in PICTURE.items()}

        return float(Reading(Fixed())({"image": torch.zeros(1, 3, 128, 128), "truth": tuple(vars(true).values())})["colour"])

    assert loss(0) == pytest.approx(loss(1), rel=1e-4)


# -- what spoils pictures ------------------------------------------------------------------------------------------


def test_spoiled_pictures_stay_pictures_and_are_drawn_from_the_seed(shown):
    x = pixels(shown[1][:1]).repeat(8, 1, 1, 1)
    one, two, other = (spoil(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.shape == x.shape and one.min() >= 0 and one.max() <= 1
    assert (one.mean((1, 2, 3)) - x.mean((1, 2, 3))).abs().max() < 0.15, "brightness stays about what it was"
    assert blur(x, 44).var() < x.var() and len(BLURS) == 4


def test_reconstruction_is_the_model_s_and_noise_is_every_other_picture_s(shown):
    class Identity:  # an autoencoder of the plainest kind: the latents are the pictures
        def encode_image(self, x):
            return x

        def decode(self, z):
            return z

    same = reconstruct(Identity(), shown[1][:6], batch_size=4)
    assert np.array_equal(same, shown[1][:6])
    noisy = reconstruct(Identity(), shown[1][:6], seed=3, batch_size=4)
    assert np.array_equal(noisy[1::2], shown[1][1:6:2]) and all((noisy[i] != shown[1][i]).any() for i in (0, 2, 4))
    assert np.array_equal(noisy, reconstruct(Identity(), shown[1][:6], seed=3, batch_size=4))


# -- the run -------------------------------------------------------------------------------------------------------


def test_reader_is_trained_resumed_and_written(tmp_path, monkeypatch, shown):
    """A few steps on two dozen scenes learn light and style of them; a run stopped half-way ends at the same weights."""
    class Plain:
        def encode_image(self, x):
            return x

        def decode(self, z):
            return z

    for name, value in (("HELD_OUT", 8), ("RECONSTRUCTED", 8), ("SMALL", 20)):
        monkeypatch.setattr(verifier, name, value)
    monkeypatch.setattr(data, "SHARD", 8)
    small = ReaderConfig(stem=8, widths=(8, 16, 16, 16), blocks=(0, 0, 0, 0))
    monkeypatch.setattr(verifier, "Reader", lambda: Reader(small))
    config = LoopConfig(steps=24, batch_size=8, lr=1e-2, warmup=1, cooldown=0.1, ema_decay=0.5, save_every=6)
    whole = verifier.main(tmp_path / "a", tmp_path / "judge", config, pictures=24, lab=Plain())
    log = [json.loads(line) for line in (tmp_path / "a" / "verifier" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and {"object", "foot", *OBJECT, *PICTURE, "right"} <= set(log[0])
    assert load_reader(tmp_path / "judge").config == small
    assert json.loads((tmp_path / "judge" / "config.json").read_text())["training"] == {"pictures": 24 + 8 + 8, "steps": 24, "batch_size": 8}

    class Stop(Exception):
        pass

    plain = verifier.recipe

    def stopping(*arguments):
        made = plain(*arguments)
        made.stop_step = lambda step, losses: (_ for _ in ()).throw(Stop) if step == 14 else None
        return made

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "data").symlink_to(tmp_path / "a" / "data")
    monkeypatch.setattr(verifier, "recipe", stopping)
    with pytest.raises(Stop):
        verifier.main(tmp_path / "b", tmp_path / "other", config, pictures=24, lab=Plain())
    monkeypatch.setattr(verifier, "recipe", plain)
    again = verifier.main(tmp_path / "b", tmp_path / "other", config, pictures=24, lab=Plain())
    for (name, one), two in zip(whole.state_dict().items(), again.state_dict().values()):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)
    with pytest.raises(LabkitError, match="is a file"):
        verifier.main(tmp_path / "judge" / "config.json")


def test_pictures_and_sources_must_match():
    with pytest.raises(LabkitError, match="give one for each"):
        verifier.recipe(Reader(), [np.zeros((3, 128, 128, 3), np.uint8)], None, torch.arange(4))


# -- its errors ----------------------------------------------------------------------------------------------------


def test_a_perfect_reading_is_right_in_everything_and_each_fault_in_its_own(shown):
    scene = next(s for s in shown[0] if len(s.objects) == 2)
    said = read_one(next(perfect([scene])))
    right = compare(scene, said)
    assert all(all(rows) for rows in right.values()) and len(right["shape"]) == 2 and len(right["count"]) == 1
    from dataclasses import replace

    other = replace(said, objects=(replace(said.objects[0], colour="red" if said.objects[0].colour != "red" else "blue"), said.objects[1]))
    faults = compare(scene, other)
    assert sum(faults["colour"]) == 1 and all(faults["shape"]) and faults["everything"] == [False] and all(faults["objects found"])
    lost = compare(scene, replace(said, objects=said.objects[:1]))
    assert sum(lost["objects found"]) == sum(lost["shape"]) == 1 and lost["count"] == [False] and all(lost["read objects that are there"])
    more = compare(scene, replace(said, objects=(*said.objects, replace(said.objects[0], mask=~said.objects[0].mask))))
    assert sum(more["read objects that are there"]) == 2 and len(more["read objects that are there"]) == 3 and more["count"] == [False]
    night = compare(scene, Read(said.objects, "night" if scene.light != "night" else "day", said.style, said.table))
    assert night["light"] == [False] and night["everything"] == [False]


def test_score_counts_objects_and_pictures(shown, monkeypatch):
    of, pictures = shown
    answers = iter([read_one(told) for told in perfect(of)])
    monkeypatch.setattr(verifier_errors, "read", lambda images, reader=None: [next(answers) for _ in images])
    found = score(of, pictures)
    assert found["shape"]["n"] == sum(len(s.objects) for s in of) and found["count"]["n"] == len(of) and all(row["share"] == 1 for row in found.values())
    assert found["relation"]["n"] > 0
    said = table({"renders": found})
    assert said.count("\n") == 1 + len(found) and "100.00%" in said
    with pytest.raises(LabkitError, match="at least 1"):
        verifier_errors.publish(None, None, 0)


def test_figures_are_kept_beside_the_weights(tmp_path):
    from labkit.models.sources import verify_sums

    verifier.save(Reader(ReaderConfig(widths=(8, 8, 8, 8))), tmp_path, {})
    verifier_errors.write({"renders": {}}, tmp_path)
    verify_sums(tmp_path)
    assert json.loads((tmp_path / "errors.json").read_text()) == {"renders": {}}


def test_rearranged_scenes_have_the_same_specification():
    from labkit.scenes.scene import rearranged

    rng = np.random.default_rng(0)
    for seed in range(20):
        one = sample_scene(np.random.default_rng(seed), styles=WORLD.styles)
        two = rearranged(one, rng)
        what = [sorted((o.shape, o.colour, o.size, o.material) for o in s.objects) for s in (one, two)]
        assert what[0] == what[1] and (one.table, one.light, one.style) == (two.table, two.light, two.style)
        assert [(o.x, o.y) for o in one.objects] != [(o.x, o.y) for o in two.objects] and one.tone != two.tone
