"""Grounding: the scores are the textbook's, the maps are what the network attends to, and a planted attention is found."""

import json

import numpy as np
import pytest
import torch

import labkit
from labkit.errors import LabkitError
from labkit.measure import grounding, grounding_report
from labkit.measure.grounding import BASELINES, METHODS, SELF, TAUS, Plan, Target
from labkit.models.unet import UNet
from labkit.plots import grounding_atlas
from labkit.scenes.scene import Object, Scene
from labkit.tap import taps


@pytest.fixture(scope="module")
def lab():
    return labkit.load("tabletop", device="cpu")


def textbook_ap(scores, mask):
    """Recall's gain times precision at every threshold, one by one."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        said = scores >= threshold
        now = float((said & mask).sum() / mask.sum())
        total += (now - recall) * float((said & mask).sum() / said.sum())
        recall = now
    return total


def test_average_precision_is_the_textbooks_also_with_ties():
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 7, generator=g) < 0.3
    for levels in (3, 10**6):
        scores = (torch.rand(4, 2, 6, 7, generator=g) * levels).floor()
        found = grounding.average_precision(scores, mask)
        assert found.shape == (4, 2)
        for i, j in np.ndindex(4, 2):
            assert float(found[i, j]) == pytest.approx(textbook_ap(scores[i, j].flatten(), mask.flatten()), abs=1e-5)
    assert float(grounding.average_precision(mask.float(), mask)) == 1
    assert float(grounding.average_precision(torch.ones(6, 7), mask)) == pytest.approx(float(mask.float().mean())), "a constant map knows nothing"
    assert grounding.average_precision(torch.full((6, 7), torch.nan), mask).isnan()


def test_iou_is_of_the_map_cut_at_a_share_of_its_own_maximum():
    mask = torch.tensor([[True, True, False, False]])
    scores = torch.tensor([[2.0, 1.0, 0.9, 0.0]])
    assert grounding.ious(scores, mask, (0.4, 0.47, 0.6)).tolist() == pytest.approx([2 / 3, 1.0, 1 / 2])
    assert torch.equal(grounding.ious(5 * scores, mask), grounding.ious(scores, mask)), "the scale of a map does not matter"


def test_the_maps_are_the_networks_attention_at_each_noise_level(lab):
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    maps = grounding.noised(lab, lab.unet, z, "a red cube", Plan(steps=3), 5)
    layers = [layer for layer in maps if layer != SELF]
    assert len(layers) == len(taps(lab.unet, "*.attn2.probs"))
    for layer in layers:
        assert maps[layer].shape[0] == 3
        torch.testing.assert_close(maps[layer].sum(-1), torch.ones(maps[layer].shape[:-1]))
    assert maps[SELF].shape == (3, 256, 256)
    torch.testing.assert_close(maps[SELF].sum(-1), torch.ones(3, 256))
    one = grounding.noised(lab, lab.unet, z, "a red cube", Plan(steps=3), 6)
    assert not torch.equal(one[layers[0]], maps[layers[0]]), "another seed is another noise"
    assert not any(tap.active for tap in taps(lab.unet).values())


def test_what_is_drawn_is_what_generate_draws(lab):
    z, maps = grounding.drawn(lab, "a red cube", Plan(steps=2), 5)
    torch.testing.assert_close(z, lab.generate("a red cube", steps=2, seed=5, progress=False).latents, atol=1e-3, rtol=0)  # fused there
    with labkit.record(lab) as trace:
        lab.generate("a red cube", steps=2, seed=5, progress=False)
    tokens = trace.run.tokens("cube")
    mine = grounding.average(maps, tokens)
    each = [grounding.enlarged(trace.attention("cube", layer).values.mean(0)) for layer in trace.layers()]  # (SIDE, SIDE) each
    torch.testing.assert_close(mine, torch.stack(each).mean(0), atol=1e-4, rtol=1e-3)


def planted(where: dict, size=16, layers=("down_blocks.0.attn2", "up_blocks.2.attn2"), tokens=6):
    """Maps in which each token looks at its own rectangle (top, bottom, left, right)."""
    m = torch.full((2, 3, size, size, tokens), 0.01)
    for token, (top, bottom, left, right) in where.items():
        m[:, :, top:bottom, left:right, token] = 1.0
    return {layer: m for layer in layers}


def test_planted_attention_has_full_marks_and_another_words_none(lab):
    maps = planted({1: (2, 6, 2, 6), 3: (10, 14, 8, 14)})
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[4:12, 4:12] = True
    mine, other = Target("cube", "shape", (1,), (0,)), Target("ball", "shape", (3,), (1,))
    ways = torch.stack([*grounding.methods(lab, maps, mine.tokens), *grounding.baselines(maps, mine, [mine, other], maps)])
    assert ways.shape == (len(METHODS + BASELINES), 32, 32)
    ap = dict(zip(METHODS + BASELINES, grounding.average_precision(ways, mask).tolist()))
    assert all(ap[way] > 0.99 for way in (*METHODS, "untrained")), ap
    assert ap["uniform"] == pytest.approx(1 / 16) and ap["another word"] < 1 / 16 + 0.01 and ap["start token"] < 0.1
    alone = grounding.baselines(maps, mine, [mine], maps)
    assert alone[BASELINES.index("another word")].isnan().all()


def test_spreading_by_self_attention_fills_the_object(lab):
    maps = planted({1: (3, 4, 3, 4)})  # one place of the object only
    inside = torch.zeros(16, 16)
    inside[2:6, 2:6] = 1
    S = torch.where(inside.flatten()[:, None] == inside.flatten()[None], 1.0, 0.0)
    maps[SELF] = (S / S.sum(1, keepdim=True)).expand(2, 256, 256)
    mask = grounding.enlarged(inside, mode="nearest") > 0
    late, spread = grounding.methods(lab, maps, (1,))[-2:]
    assert float(grounding.average_precision(late, mask)) < 0.4 and float(grounding.average_precision(spread, mask)) > 0.99


def two(first=("cube", "red"), second=("sphere", "blue")):
    objects = tuple(Object(shape, colour, "large", "rubber", x, 0.0) for (shape, colour), x in ((first, -1.0), (second, 1.0)))
    return Scene(objects, "plain", "day", "photo")


class Seen:
    def __init__(self, *objects):
        self.objects = objects


class One:
    def __init__(self, shape, colour, mask):
        self.shape, self.colour, self.mask = shape, colour, mask


def test_binding_is_the_share_on_its_own_noun():
    masks = [torch.zeros(128, 128, dtype=torch.bool) for _ in range(2)]
    masks[0][16:48, 16:48] = True
    masks[1][80:112, 64:112] = True
    red, blue = Target("red", "colour", (1,), (0,)), Target("blue", "colour", (3,), (1,))
    maps = planted({1: (2, 6, 2, 6), 3: (2, 6, 2, 6)})  # both colours look at the first object
    assert grounding.bound(maps, red, [red, blue], masks, two(), None)["share"] > 0.9
    assert grounding.bound(maps, blue, [red, blue], masks, two(), None)["share"] < 0.1
    swapped = Seen(One("cube", "blue", masks[0]), One("sphere", "blue", masks[1]))
    found = grounding.bound(maps, red, [red, blue], masks, two(), swapped)
    assert found["right"] is False and found["share"] > 0.9, "a cube in the wrong colour is the cube all the same"
    assert grounding.bound(maps, red, [red, blue], masks, two(second=("cube", "blue")), None) == {}
    assert grounding.bound(maps, red, [red, blue], masks, two(), Seen(One("cube", "red", masks[0]))) == {}
    assert grounding.bound(maps, Target("cube", "shape", (1,), (0,)), [], masks, two(), None) == {}


def test_auc_is_the_share_of_pairs_in_order():
    right = torch.tensor([True, True, False, False])
    assert grounding_report.auc(torch.tensor([0.9, 0.4, 0.4, 0.1]), right) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert np.isnan(grounding_report.auc(torch.ones(2), torch.tensor([True, True])))


def test_the_bootstrap_draws_scenes_and_not_words():
    values = torch.cat([torch.zeros(500), torch.ones(500)])
    within = grounding_report.mean(values, [0] * 500 + [1] * 500)  # two scenes: the mean may be 0 or 1
    apart = grounding_report.mean(values, list(range(1000)))
    assert (within["low"], within["high"]) == (0, 1) and 0.45 < apart["low"] < apart["high"] < 0.55
    assert within["value"] == apart["value"] == 0.5


def test_captions_name_colour_and_shape_of_every_object_and_are_those_of_the_scene(lab):
    for seed in range(grounding.FIRST_SEED, grounding.FIRST_SEED + 6):
        scene, said = grounding.told(seed)
        assert len(scene.objects) in (1, 2)
        for target in grounding.targets_of(lab, said):
            if target.kind == "colour":
                assert scene.objects[target.objects[0]].colour == target.text
            ids, alone = lab.tokenizer([said.text])[0], lab.tokenizer([target.text])[0]
            assert len(target.tokens) == 1 and ids[target.tokens[0]] == alone[1]  # each word of this world is a token


def test_one_command_measures_resumes_and_draws(lab, tmp_path, monkeypatch):
    plan, calls = Plan(scenes=10, steps=2), []
    true = grounding.one_scene
    monkeypatch.setattr(grounding_report, "one_scene", lambda *args: calls.append(args[-1]) or true(*args))
    found = grounding_report.run(lab, tmp_path, plan, ("forced",), progress=False)
    assert len(calls) == 10
    nouns = found["protocols"]["forced"]["grounding"]["shape"]
    assert nouns["words"] >= 8 and np.shape(nouns["atlas"]) == (2, len(nouns["layers"]), 4)
    assert nouns["ways"]["mean"]["ap"]["value"] > nouns["ways"]["untrained"]["ap"]["value"], "training taught it something"
    for row in nouns["ways"].values():
        assert row["tau"] in TAUS and 0 <= row["iou"]["low"] <= row["iou"]["value"] <= row["iou"]["high"] <= 1
    text = (tmp_path / "grounding.txt").read_text(encoding="utf-8")
    assert "baseline: untrained" in text and "binding" in text and json.loads((tmp_path / "grounding.json").read_text())["plan"]["scenes"] == 10
    again = grounding_report.run(lab, tmp_path, Plan(scenes=11, steps=2), ("forced",), progress=False)
    assert len(calls) == 11 and again["protocols"]["forced"]["words"] != {}, "what is there is not measured again"
    with pytest.raises(LabkitError, match="the scenes of another plan"):
        grounding_report.run(lab, tmp_path, Plan(scenes=10, steps=3), ("forced",), progress=False)
    with pytest.raises(LabkitError, match="too few"):
        grounding_report.run(lab, tmp_path / "few", Plan(scenes=9), ("forced",))
    figure = grounding_atlas(found)
    assert "Average precision" in figure.labkit_alt and len(figure.axes) == 3
    with pytest.raises(LabkitError, match="No words of kind 'count'"):
        grounding_atlas(found, "count")


def test_untrained_is_a_network_of_the_same_kind(lab):
    torch.manual_seed(0)
    result = grounding.one_scene(lab, UNet(lab.unet.config).eval(), Plan(steps=2), grounding.FIRST_SEED)
    words, kept = result["words"], [row for row in result["words"] if row["drawn"]]
    assert all(row["drawn"] for row in words) and len(result["head_ap"]) == len(kept) == len(result["method_iou"])
    assert result["method_iou"].shape[1:] == (len(METHODS + BASELINES), len(TAUS))
