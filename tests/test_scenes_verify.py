"""The reader of pictures: true maps become the true scene, the shipped weights see what is there, what is no picture is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from labkit.errors import CheckpointError, LabkitError
from labkit.scenes.reader import CELLS, MAPS, OBJECT, PICTURE, REACH, WEIGHTS, Reader, ReaderConfig, load_reader
from labkit.scenes.render import render, render_many
from labkit.scenes.scene import COLOURS, SHAPES, scene_from_seed
from labkit.scenes.verify import gather, on_table, peaks, read, read_one
from labkit.training import verifier
from labkit.training.data import TEST_SEED, scenes
from labkit.training.verifier import MOST, WORLD, HeldOut, truth
from labkit.training.verifier_errors import compare

SHIPPED = pytest.mark.skipif(not (WEIGHTS / "config.json").exists(), reason="the reader's weights are not here")


def perfect(of):
    """What a network that knows the truth would answer: maps (channels, 64, 64) and logits for each scene."""
    true = truth(of)
    cells = torch.stack(torch.meshgrid(*[torch.arange(CELLS)] * 2, indexing="ij")) + 0.5
    for owner, foot, says, picture in zip(true.owner, true.foot, true.says, true.picture):
        told = {"object": torch.where(owner < MOST, 9.0, -9.0)[None], "foot": torch.zeros(2, CELLS, CELLS)}
        told |= {name: torch.zeros(len(values), CELLS, CELLS) for name, values in OBJECT.items()}
        for k in range(MOST):
            at = owner == k
            told["foot"][:, at] = ((foot[k][:, None, None] - cells) / REACH)[:, at]
            for i, name in enumerate(OBJECT):
                if says[k, i] >= 0:
                    told[name][says[k, i], at] = 9.0
        yield told | {name: torch.eye(len(values))[picture[i]] * 9 for i, (name, values) in enumerate(PICTURE.items())}


# -- from maps to scenes -------------------------------------------------------------------------------------------


def test_true_maps_are_read_as_the_true_scene():
    """Also where objects hide half of each other and look alike: only votes can part those."""
    of = [scene_from_seed(seed, styles=WORLD.styles, held_out="any") for seed in range(TEST_SEED + 7000, TEST_SEED + 7150)]
    alike = 0
    for scene, told in zip(of, perfect(of)):
        assert all(all(values) for values in compare(scene, read_one(told)).values()), scene
        for seen, obj in zip(read_one(told).objects, sorted(scene.objects, key=lambda o: o.x)):
            assert 0.9 < seen.confidence <= 1
        alike += len({(o.shape, o.colour) for o in scene.objects}) < len(scene.objects)
    assert alike > 10


def test_two_of_a_kind_that_touch_are_two_by_their_votes():
    p, foot = torch.zeros(CELLS, CELLS), torch.zeros(2, CELLS, CELLS)
    p[20:30, 10:30] = 1.0
    rows, columns = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
    foot[0], foot[1] = 28.5 - rows - 0.5, torch.where(columns < 20, 14.5, 24.5) - columns - 0.5
    owner, feet = gather(p, foot)
    assert len(feet) == 2 and {tuple(round(x, 1) for x in f) for f in feet} == {(28.5, 14.5), (28.5, 24.5)}
    assert (owner[20:30, 10:20] == owner[25, 15]).all() and (owner[20:30, 20:30] == owner[25, 25]).all() and owner[25, 15] != owner[25, 25]
    assert (owner[p == 0] == -1).all()
    foot[1] = 19.5 - columns - 0.5  # all vote for the same place: one object, however wide
    assert len(gather(p, foot)[1]) == 1


def test_specks_and_stray_votes_are_no_objects():
    p, foot = torch.zeros(CELLS, CELLS), torch.zeros(2, CELLS, CELLS)
    assert gather(p, foot)[1] == []
    p[5:8, 5:8] = 1.0  # nine cells that vote for themselves
    p[30:40, 30:40] = 1.0
    rows, columns = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
    foot[0], foot[1] = torch.where(rows > 20, 38.0, 6.5) - rows - 0.5, torch.where(columns > 20, 35.0, 6.5) - columns - 0.5
    owner, feet = gather(p, foot)
    assert len(feet) == 1 and (owner[5:8, 5:8] == -1).all() and (owner[30:40, 30:40] == 0).all()


def test_peaks_are_apart():
    votes = torch.cat([torch.full((40, 2), 20.5), torch.full((30, 2), 22.4), torch.tensor([[40.5, 20.5]]).repeat(30, 1)])
    found = peaks(votes, torch.ones(len(votes)))
    assert found.tolist()[0] == [20.5, 20.5] and len(found) == 2 and peaks(torch.zeros(0, 2), torch.zeros(0)).shape == (0, 2)


def test_feet_lead_back_to_the_table():
    """Where the camera projects (x, y, 0) one looks at (x, y)."""
    camera = scene_from_seed(3).camera()
    places = np.array([(-1.2, -0.9, 0.0), (0.0, 0.3, 0.0), (1.1, 1.3, 0.0)])
    u, v, _ = camera.project(places)
    for (x, y, _), a, b in zip(places, u, v):
        assert on_table(camera, a, b) == (pytest.approx(x, abs=1e-6), pytest.approx(y, abs=1e-6))
    far = on_table(camera, 0.5, -5.0)  # above the horizon
    assert np.isfinite(far).all() and far[1] > 50


def test_places_are_read_to_a_tenth_of_an_object():
    """From true maps; what remains is the camera, which is not read: its turn, pitch and distance vary by a few hundredths."""
    missed = []
    for scene, told in zip(of := scenes(WORLD, TEST_SEED + 8000, 60), perfect(of)):
        made = read_one(told).scene()
        assert (made.light, made.style, made.table) == (scene.light, scene.style, scene.table)
        for o in scene.objects:
            twins = [(o.x - p.x, o.y - p.y) for p in made.objects if (p.shape, p.colour, p.size) == (o.shape, o.colour, o.size)]
            missed.append(min(twins, key=lambda off: abs(off[0]) + abs(off[1])))
    missed = np.abs(missed)
    assert missed.mean(0)[0] < 0.05 and missed.mean(0)[1] < 0.1 and missed.max() < 0.4


# -- the network ---------------------------------------------------------------------------------------------------


def test_reader_is_small_and_answers_for_every_cell():
    reader = Reader().eval()
    assert 2 * sum(p.numel() for p in reader.parameters()) < 3 * 2**20  # bytes in float16
    told = reader(torch.rand(2, 3, 128, 128))
    assert {name: tuple(value.shape) for name, value in told.items()} == {
        **{name: (2, channels, CELLS, CELLS) for name, channels in MAPS.items()}, **{name: (2, len(values)) for name, values in PICTURE.items()}}
    assert OBJECT["colour"] == tuple(COLOURS) and OBJECT["shape"] == SHAPES
    moved = reader(torch.rand(1, 3, 128, 128).roll(16, 3))
    assert not torch.equal(moved["object"], told["object"][:1])


def test_a_picture_s_answer_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    reader, x = Reader().eval(), torch.rand(3, 3, 128, 128)
    for name, value in reader(x).items():
        torch.testing.assert_close(reader(x[1:2])[name], value[1:2], rtol=1e-3, atol=1e-4)


@SHIPPED
def test_shipped_reader_sees_what_is_there():
    """On 60 scenes of all kinds, a fifth of them sketches, that no training has seen; the published shares are of 5,000."""
    of = scenes(WORLD, TEST_SEED + 6000, 50) + scenes(HeldOut(), TEST_SEED + 6000, 10)
    # white metal mirrors its surroundings, and hatching hides a shine: see the card
    tallies, bounds = {}, {"material": 0.9, "material, sketch": 0.6, "everything": 0.75}
    for scene, said in zip(of, read(render_many(of, workers=1))):
        for name, right in compare(scene, said).items():
            tallies.setdefault(name, []).extend(right)
    for name, rows in tallies.items():
        assert np.mean(rows) >= bounds.get(name, 0.95), (name, np.mean(rows))
    assert (WEIGHTS / "model.safetensors").stat().st_size < 3 * 2**20


@SHIPPED
def test_reader_follows_the_picture_not_a_habit():
    """Red and blue exchanged are exchanged in the answer; red's pixels made blue are blue; mirrored, left is right; an empty table is empty."""
    found = next(s for s in scenes(WORLD, TEST_SEED + 9000, 200) if (s.light, s.style, len(s.objects)) == ("day", "photo", 2))
    scene = replace(found, objects=tuple(replace(o, colour=colour, material="rubber") for o, colour in zip(found.objects, ("red", "blue"))))
    other = replace(scene, objects=tuple(replace(o, colour={"red": "blue", "blue": "red"}[o.colour]) for o in scene.objects))
    picture = render(scene).image
    plain, exchanged, reddened, mirrored = read(torch.cat([picture, render(other).image, picture.flip(1), picture.flip(3)]))
    assert sorted(o.colour for o in plain.objects) == ["blue", "red"]
    assert [o.colour for o in plain.objects] == [o.colour for o in reversed(exchanged.objects)]
    for before, after in zip(plain.objects, reddened.objects):  # with channels exchanged, red is this world's blue, and blue lies between its red and orange
        assert after.colour in {"red": ("blue",), "blue": ("red", "orange")}[before.colour]
    assert [o.colour for o in plain.objects] == [o.colour for o in reversed(mirrored.objects)]
    assert plain.objects[0].x == pytest.approx(-mirrored.objects[-1].x, abs=0.2)
    far = tuple(replace(o, x=60.0 + i, y=0.0) for i, o in enumerate(scene.objects))
    assert read(render(replace(scene, objects=far)).image)[0].objects == ()


# -- pictures and files --------------------------------------------------------------------------------------------


def test_read_takes_tensors_arrays_and_pil_of_any_size():
    torch.manual_seed(0)
    reader, pictures = Reader().eval(), render_many(scenes(WORLD, 5, 3), workers=1)
    reader.head.bias.data[:4] = 3.0  # "object" nearly everywhere, so that there is something to compare
    ways = [pictures, torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255, [Image.fromarray(p) for p in pictures]]
    one, two, three = (read(way, reader, batch_size=2) for way in ways)
    for a, b, c in zip(one, two, three):
        assert [(o.shape, o.box) for o in a.objects] == [(o.shape, o.box) for o in b.objects] == [(o.shape, o.box) for o in c.objects]
        assert a.light == b.light == c.light
    assert len(read(Image.fromarray(pictures[0]), reader)) == 1
    large = read(torch.rand(1, 3, 256, 320), reader)[0]
    assert all(tuple(o.mask.shape) == (256, 320) and o.box[2] <= 320 and o.box[3] <= 256 for o in large.objects)


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
        read(images, Reader().eval())
    assert "\n" not in str(error.value)


def test_saved_reader_is_the_one_that_was_trained_and_damage_is_named(tmp_path):
    torch.manual_seed(0)
    reader = Reader(ReaderConfig(widths=(16, 16, 24, 24), blocks=(1, 0, 1, 0))).eval()
    verifier.save(reader, tmp_path / "judge", {"note": "untrained"})
    again, x = load_reader(tmp_path / "judge"), torch.rand(1, 3, 128, 128)
    assert not again.training and not any(p.requires_grad for p in again.parameters()) and again.config == reader.config
    for name, value in reader(x).items():
        torch.testing.assert_close(again(x)[name], value, rtol=0.02, atol=0.02)  # kept in float16
    assert sorted(path.name for path in (tmp_path / "judge").iterdir()) == ["SHA256SUMS", "config.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match="cannot be opened.*git checkout"):
        load_reader(tmp_path / "nowhere")
    weights = tmp_path / "judge" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be opened"):
        load_reader(tmp_path / "judge")
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    (tmp_path / "judge" / "config.json").write_text(json.dumps({**config, "says": {"colour": ["mauve"]}}))
    with pytest.raises(CheckpointError, match="attributes are not this version's"):
        load_reader(tmp_path / "judge")
