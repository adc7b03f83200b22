"""Edits against the true counterfactual: the cases are what they say, the figures are right, a stopped run goes on."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

import labkit
from labkit.__main__ import main
from labkit.errors import LabkitError
from labkit.measure import edits, edits_report
from labkit.measure.edit_cases import KINDS, Case, cases, regions, verified
from labkit.measure.edits import NO_EDITING, Plan, Setting, measure, psnr
from labkit.scenes.captions import vocabulary
from labkit.scenes.render import render
from labkit.scenes.scene import is_held_out

GROUPS = cases(6)


@pytest.fixture(scope="module")
def lab():
    return labkit.load("tabletop")


def seen(*objects, light="day"):
    return SimpleNamespace(objects=[SimpleNamespace(shape=s, colour=c, material=m) for s, c, m in objects], light=light)


def as_read(scene):
    return SimpleNamespace(objects=scene.objects, light=scene.light)


def test_each_case_changes_one_thing():
    assert [len(group) for group in GROUPS] == [5] * 6 and [case.kind for case in GROUPS[0]] == list(KINDS)
    assert GROUPS[0] == cases(6)[0] and cases(2, kinds=("colour",))[1] == [GROUPS[1][1]]
    for case in (case for group in GROUPS for case in group):
        before, after = case.scene, case.changed
        assert before.objects and not is_held_out(before) and not is_held_out(after) and case.source != case.target
        assert all(word in vocabulary() for text in (case.source, case.target) for word in text.replace(",", " ,").split())
        if case.kind == "add":
            assert after.objects[0] == before.objects[0] and len(after.objects) == 2 and replace(after, objects=before.objects) == before
            a, b = after.objects
            assert a.shape != b.shape and a.colour != b.colour and ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5 >= a.reach + b.reach
        elif case.kind == "light":
            assert replace(after, light=before.light, elevation=before.elevation) == before and after.light != before.light
        else:
            now = getattr(before.objects[0], case.kind)
            assert replace(after, objects=(replace(after.objects[0], **{case.kind: now}),)) == before and after != before


def test_the_region_holds_what_changes_and_no_more():
    case = GROUPS[0][KINDS.index("add")]
    rendered = render([case.scene, case.changed])
    inside, outside = regions(*rendered.image)
    new = rendered.masks[1, 1] > 0.5
    assert bool(inside[new].float().mean() > 0.95) and new.sum() < inside.sum() < 0.5 * inside.numel()
    assert not bool((inside & outside).any()) and bool(((rendered.image[0] - rendered.image[1]).abs().amax(0)[outside] <= 2 / 255).all())
    a, b = torch.zeros(3, 20, 20), torch.zeros(3, 20, 20)
    b[1, 10, 10] = 0.5
    inside, outside = regions(a, b, margin=2)
    assert inside.nonzero().tolist() == [[10, 10]] and int((~outside).sum()) == 25


def test_verified_asks_for_what_was_edited_and_for_what_was_not():
    by_kind = {case.kind: case for case in GROUPS[1]}
    for case in GROUPS[1]:
        assert verified(as_read(case.changed), case) and not verified(as_read(case.scene), case)
    case, obj = by_kind["colour"], by_kind["colour"].changed.objects[0]
    right = (obj.shape, obj.colour, obj.material)
    other = "cube" if obj.shape != "cube" else "cone"
    assert verified(seen(right), case) and verified(seen((None, obj.colour, "unheard of")), case)
    assert not verified(seen((other, obj.colour, obj.material)), case)  # the colour came, and the shape went
    assert not verified(seen(right, right), case) and not verified(seen(), case)
    two = by_kind["add"].changed.objects
    flat = [(o.shape, o.colour, o.material) for o in two]
    swapped = [(two[0].shape, two[1].colour, None), (two[1].shape, two[0].colour, None)]
    assert verified(seen(*flat), by_kind["add"]) and verified(seen(*flat[::-1]), by_kind["add"]) and not verified(seen(*swapped), by_kind["add"])
    assert not verified(seen(flat[0], flat[0]), by_kind["add"])  # one twice is not both
    assert not verified(SimpleNamespace(objects=by_kind["light"].changed.objects, light=by_kind["light"].scene.light), by_kind["light"])


def test_psnr():
    x, y = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    y[:, 0] = 0.1
    assert psnr(x, y) == pytest.approx(20 + 6.021, abs=1e-3)  # a quarter of the pixels
    top = torch.zeros(4, 4, dtype=torch.bool)
    top[0] = True
    assert psnr(x, y, top) == pytest.approx(20) and psnr(x, y, ~top) == 100 and psnr(x, y, top & ~top) is None and psnr(x, y, top, least=0.5) is None


PLAN = Plan(scenes=1, settings=(Setting(0.8, 0.2), NO_EDITING), kinds=("colour", "light"), steps=2)


def test_rows_by_both_protocols_and_a_stopped_run_goes_on(lab, tmp_path, monkeypatch):
    shown = []

    def read(pictures):
        shown.append(pictures)
        mask = torch.zeros(128, 128, dtype=torch.bool)
        mask[40:60, 40:60] = True
        return [SimpleNamespace(objects=[SimpleNamespace(shape=None, colour=None, material=None, mask=mask)], light=None) for _ in pictures]

    rows = measure(lab, PLAN, tmp_path, read, progress=False)
    assert [(r["protocol"], r["kind"], r["cross"]) for r in rows] == [(p, k, c) for p in ("inverted", "noised", "free") for k in ("colour", "light") for c in (0.8, 0.0)]
    teacher, noised, free = rows[:4], rows[4:8], rows[8:]
    case = cases(1, kinds=("colour",))[0][0]
    assert all(r["success"] for r in rows) and all(r["outside"] is None for r in rows if r["kind"] == "light")
    truth = render([case.scene, case.changed]).image
    inside, outside = regions(*truth)
    rebuilt = lab.decode(lab.encode_image(truth)).cpu()
    assert teacher[0]["nothing"] == pytest.approx(psnr(rebuilt[0], truth[1], inside), abs=0.05)
    assert teacher[0]["best"] == pytest.approx(psnr(rebuilt[1], truth[1], inside), abs=0.05) and teacher[0]["best"] > teacher[0]["nothing"]
    edited = shown[0]
    torch.testing.assert_close(edited[0], rebuilt[0], atol=1e-3, rtol=0)  # inverted directly, the source is its reconstruction
    assert teacher[0]["outside"] == psnr(edited[1], edited[0], outside) and teacher[0]["inside"] == psnr(edited[1], truth[1], inside)
    drawn = lab.decode(lab.generate([case.source, case.target], seed=case.seed, steps=2, progress=False).latents).cpu()
    assert noised[1]["inside"] == pytest.approx(psnr(drawn[1], truth[1], inside), abs=0.05)  # no editing: what the noise alone would draw
    assert noised[0]["nothing"] == teacher[0]["nothing"] and noised[0]["outside"] != noised[1]["outside"]
    edited = next(pictures for pictures in shown[1:] if len(pictures) == 5)  # the source, and both kinds by cross 0.8 and 0
    assert [row["outside"] for row in noised[:2]] == [psnr(one, edited[0], outside) for one in edited[1:3]]
    assert free[1]["frame"] == pytest.approx(psnr(drawn[1], drawn[0]), abs=0.05)  # no editing: the target drawn from the same noise
    far = torch.ones(128, 128, dtype=torch.bool)
    far[32:68, 32:68] = False  # eight pixels about what the reader saw
    assert free[1]["outside"] == pytest.approx(psnr(drawn[1], drawn[0], far), abs=0.05)
    monkeypatch.setattr(edits, "one_scene", lambda *_: 1 / 0)
    assert measure(lab, PLAN, tmp_path, read, progress=False) == rows
    (tmp_path / f"free-{case.seed}.json").unlink()
    with pytest.raises(ZeroDivisionError):
        measure(lab, PLAN, tmp_path, read, progress=False)
    with pytest.raises(LabkitError, match="another plan"):
        measure(lab, replace(PLAN, steps=3), tmp_path, read, progress=False)


def test_the_reader_sees_what_an_edit_is_judged_by():
    case, both = GROUPS[0][0], GROUPS[0][4].changed
    alone, pair = edits.verify.read(render([case.scene, both]).image)
    assert verified(alone, replace(case, changed=case.scene)) and not verified(alone, case)
    assert verified(pair, GROUPS[0][4]) and all(one.mask.shape == (128, 128) for one in pair.objects)


def row(kind, setting, success, **more):
    figures = {"outside": 20.0, "inside": 15.0, "nothing": 10.0, "best": 30.0, "frame": 25.0, "best success": True}
    return {"protocol": "inverted", "seed": 1, "kind": kind, **asdict(setting), "success": success, **figures, **more}


def test_summary_table_and_frontier():
    default = Setting()
    rows = [row("colour", default, True, outside=32.0), row("colour", default, True), row("light", default, False, outside=None), row("colour", NO_EDITING, True, outside=12.0)]
    found = edits_report.summary(rows)
    by = {(r["kind"], edits_report.setting_of(r)): r for r in found}
    assert set(by) == {("colour", default), ("light", default), ("all", default), ("colour", NO_EDITING), ("all", NO_EDITING)}
    assert by["all", default]["success"]["right"] == 2 and by["all", default]["success"]["n"] == 3 and by["all", default]["outside"] == 26.0
    assert by["light", default]["outside"] is None
    points = edits_report.frontier(rows)
    assert [(p["cross"], p["kept"], p.get("name")) for p in points] == [(default.cross, 26.0, None), (0.0, 12.0, "no editing")]
    text = edits_report.table({"model": "tabletop", "plan": asdict(Plan()), "table": found})
    assert "all: no editing" in text and "MISSED  inverted: success 66.7% (95 % in 20.8% to 93.8%), target 90.0%" in text
    assert "MISSED  inverted: outside 26.0 dB (95 % in 26.0 dB to 26.0 dB), target 30.0 dB" in text  # one scene: nothing to draw again
    assert "met     inverted: success 100.0%" in edits_report.table({"model": "m", "plan": asdict(Plan()), "table": edits_report.summary(rows[:2])})


def test_gains_are_of_the_same_edit_with_and_without():
    with_, without = Setting(0.4, 0.5), NO_EDITING
    rows = [row("colour", s, True, seed=seed, outside=20.0 + 9 * seed + (2.0 if s == with_ else 0.0)) for seed in range(5) for s in (with_, without)]
    rows += [row("light", with_, True, seed=0, outside=None), row("add", with_, True, seed=9, outside=90.0)]  # nothing to compare them with
    found = {g["of"]: g for g in edits_report.gains(rows)}
    assert found["outside"]["gain"] == 2.0 and found["outside"]["interval"] == [2.0, 2.0] and found["outside"]["n"] == 5
    text = edits_report.table({"model": "m", "plan": asdict(Plan()), "table": edits_report.summary(rows), "gains": edits_report.gains(rows)})
    assert "gained  inverted: outside +2.0 dB (95 % in +2.0 to +2.0) by cross 40%, self 50% over no editing, 5 edits" in text


def test_the_interval_draws_scenes_not_edits():
    pairs = [row("colour", Setting(), True, seed=seed, outside=20.0 + seed % 2 * 10) for seed in range(40) for _ in range(5)]
    low, high = edits_report.interval(pairs, "outside")
    half = 1.96 * 5 / 40**0.5  # of 40 scenes; of 200 independent edits it would be less than half of that
    assert low == pytest.approx(25 - half, abs=0.3) and high == pytest.approx(25 + half, abs=0.3)
    assert edits_report.interval([row("light", Setting(), True, outside=None)], "outside") is None


def test_the_command(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(edits_report, "GRID", (Setting(0.8, 0.2), NO_EDITING))
    monkeypatch.setattr("labkit.measure.edits.Plan.__init__.__defaults__", (1, (Setting(0.8, 0.2), NO_EDITING), ("noised", "free"), ("colour",), 1, None, edits.FIRST_SEED))
    assert main(["measure", "edits", "--scenes", "1", "--steps", "1", "--out", str(tmp_path / "e")]) == 0
    out = capsys.readouterr().out
    assert "noised: renders" in out and "free: drawn" in out and "the figure are in" in out
    found = json.loads((tmp_path / "e" / "edits.json").read_text())
    scenes = [{path.stem.split("-")[1] for path in (tmp_path / "e" / "parts" / part).glob("*-*.json")} for part in ("table", "frontier")]
    assert len(scenes[0]) == len(scenes[1]) == 1 and not scenes[0] & scenes[1]  # what is chosen on some scenes is judged on others
    assert len(found["rows"]) == 4 and len(found["frontier"]) == 2 and (tmp_path / "e" / "edits.txt").read_text() in out
    assert (tmp_path / "e" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert main(["measure", "edits", "--scenes", "0", "--out", str(tmp_path / "f")]) == 2
    assert "ask for one scene" in capsys.readouterr().err


def test_cases_that_cannot_be():
    with pytest.raises(LabkitError, match="0 scenes"):
        cases(0)
    with pytest.raises(LabkitError, match="size"):
        cases(1, kinds=("size",))
    assert isinstance(GROUPS[0][0], Case)
