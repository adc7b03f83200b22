"""Training data: a picture depends on its seed alone, shards appear whole or not at all, captions fit the text encoder."""

import dataclasses

import numpy as np
import pytest
import torch

from labkit.errors import LabkitError
from labkit.scenes.captions import DETAILS, caption
from labkit.scenes.scene import is_held_out
from labkit.training import data
from labkit.training.data import TEST_SEED, World, captions, contact_sheet, renders, scenes, to_signed
from labkit.training.tabletop import build_tokenizer

WORLD = World()


@pytest.fixture
def drawn(monkeypatch):
    """Shards of 4 pictures, and a cheap renderer that notes what it is asked for; each picture still shows its scene's numbers."""
    asked = []

    def render_many(of, workers=2):
        asked.append([scene.to_json() for scene in of])
        rows = [np.random.default_rng(abs(hash(scene)) % 2**32).integers(0, 255, (8, 8, 3), np.uint8) for scene in of]
        return np.stack(rows)

    monkeypatch.setattr(data, "SHARD", 4)
    monkeypatch.setattr(data, "render_many", render_many)
    return asked


def test_renders_once_and_goes_on_where_it_was(drawn, tmp_path):
    first = renders(WORLD, 0, 6, tmp_path)
    assert first.shape == (6, 8, 8, 3) and first.dtype == np.uint8 and len(drawn) == 2
    assert np.array_equal(renders(WORLD, 0, 6, tmp_path), first) and len(drawn) == 2, "rendered again"
    (tmp_path / "renders-1-1-2-photo-00000004.npy").unlink()  # what a run that was killed had not come to
    (tmp_path / "renders-1-1-2-photo-00000004.99.tmp").write_bytes(b"half a shard")
    assert np.array_equal(renders(WORLD, 0, 9, tmp_path)[:6], first) and len(drawn) == 4
    assert drawn[2] == drawn[1] and drawn[3] == [s.to_json() for s in scenes(WORLD, 8, 4)]


@pytest.mark.parametrize("when", ["while rendering", "while writing"])
def test_a_shard_is_whole_or_not_there(drawn, tmp_path, monkeypatch, when):
    def stopped(file, array=None):
        if hasattr(file, "write"):
            file.write(b"\x93NUMPY half")
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(*((data, "render_many", lambda *a, **k: stopped(None)) if when == "while rendering" else (data.np, "save", stopped)))
        with pytest.raises(KeyboardInterrupt):
            renders(WORLD, 0, 4, tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    assert len(renders(WORLD, 0, 4, tmp_path)) == 4


def test_other_worlds_do_not_share_shards(drawn, tmp_path):
    renders(WORLD, 0, 4, tmp_path)
    renders(World(counts=(1,)), 0, 4, tmp_path)
    renders(World(styles=("sketch",)), 0, 4, tmp_path)
    assert len(drawn) == 3 and len(list(tmp_path.glob("*.npy"))) == 3


def test_a_picture_depends_on_its_seed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 2)  # the true renderer here
    both, second = renders(WORLD, 0, 2, tmp_path / "a"), renders(WORLD, 1, 1, tmp_path / "b")
    assert both.shape == (2, 128, 128, 3) and np.array_equal(both[1:], second)
    assert not np.array_equal(both[0], both[1]) and both.std() > 10


def test_an_empty_dataset_is_refused(tmp_path):
    for count in (0, -1):
        with pytest.raises(LabkitError, match="at least 1"):
            renders(WORLD, 0, count, tmp_path)


def test_scenes_are_those_of_the_seeds_and_never_held_out():
    many = scenes(WORLD, 0, 400)
    assert many[100:103] == scenes(WORLD, 100, 3) and not set(many) & set(scenes(WORLD, TEST_SEED, 400))
    assert not any(is_held_out(scene) for scene in many)
    single = sum(len(scene.objects) == 1 for scene in many) / 400
    assert {len(scene.objects) for scene in many} == {1, 2} and 0.58 < single < 0.75, "two thirds have one object"
    assert dataclasses.replace(WORLD, counts=(2,)).scene(0).objects[1]


def test_groups_may_have_to_be_apart():
    from labkit.scenes.camera import screen_box
    from labkit.scenes.scene import _hidden

    def most(scene):
        boxes = [(obj, screen_box(scene.camera(), obj)) for obj in scene.objects]
        return max(_hidden(obj, box, boxes) for obj, box in boxes)

    close, apart = World(counts=(1, 2, 3, 4), groups=1.0), World(counts=(1, 2, 3, 4), groups=1.0, hidden=0.05)
    many = scenes(apart, 0, 150)
    assert all(most(scene) < 0.05 for scene in many) and sum(most(scene) > 0.1 for scene in scenes(close, 0, 150)) > 60
    numbers = [sum(len(scene.objects) == n for scene in many) for n in (2, 3, 4)]
    assert sum(numbers) == 150 and min(numbers) > 30, "four are hard to place, and as many all the same"
    assert all(len({(obj.shape, obj.colour) for obj in scene.objects}) == 1 for scene in many) and close.name != apart.name


def test_captions_fit_the_text_encoder_and_vary():
    tokenizer, rng = build_tokenizer(), np.random.default_rng(0)
    for scene in scenes(World(counts=(1, 2, 3, 4), styles=("photo", "sketch")), 0, 150):
        for detail in DETAILS:
            text = caption(scene, rng, detail).text
            assert not tokenizer.cut(text), text
    ids = tokenizer(captions(scenes(WORLD, 0, 50), rng))
    assert ids.shape == (50, tokenizer.max_length) and (ids == tokenizer.eos_id).any(1).all()
    one = WORLD.scene(3)
    assert len({captions([one], np.random.default_rng(i))[0] for i in range(20)}) > 5, "a scene is worded afresh every time"
    assert captions([one], np.random.default_rng(1)) == captions([one], np.random.default_rng(1))


def test_to_signed_is_what_the_vae_takes():
    images = np.zeros((2, 4, 6, 3), np.uint8)
    images[:, 1, 2] = (255, 0, 51)
    x = to_signed(images)
    assert x.shape == (2, 3, 4, 6) and x.dtype == torch.float32
    torch.testing.assert_close(x[0, :, 1, 2], torch.tensor([1.0, -1.0, -0.6]))


def test_contact_sheet_reads_row_by_row():
    images = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 4, 4)
    sheet = np.asarray(contact_sheet(images, columns=2))
    assert sheet.shape == (12, 8, 3)
    assert [int(sheet[4 * r, 4 * c, 0]) for r in range(3) for c in range(2)] == [0, 64, 128, 191, 255, 255]
    assert int(np.asarray(contact_sheet(torch.full((1, 3, 4, 4), 9.0), 1)).min()) == 255, "values beyond the range are cut, not wrapped"
