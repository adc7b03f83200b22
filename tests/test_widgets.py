"""Widgets: right pictures and shares at the right places, small, never without their static figure and their words."""

import io
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build

from labkit import plots
from labkit.errors import LabkitError
from labkit.generation import to_pil
from labkit.probes.heatmap import HeatMap
from labkit.probes.record import record
from labkit.probes.sweep import Sweep
from labkit.widgets import before_after, explore, guidance_slider, maps, view

SCALES, SEEDS = (0.0, 1.0, 4.0, 7.5), (3, 5)
PROMPT = "a red ball left of a blue cube"


def sweep() -> Sweep:
    """Pictures whose red says the scale and whose green says the seed."""
    rows = [[Image.new("RGB", (16, 16), (int(30 * w), 40 * s, 0)) for w in SCALES] for s in SEEDS]
    return Sweep(rows, SCALES, SEEDS, "a red sphere")


@pytest.fixture(scope="module")
def recorded():
    """A tiny model's two pictures with their trace."""
    lab = build()
    with record(lab, latents=True) as trace:
        generation = lab.generate([PROMPT, "a cube"], seed=[0, 1], progress=False)
    return trace, generation


def shown(made: view.View, panel: int, position: int) -> Image.Image:
    """The picture of a panel at a position of the axis of pictures, as the browser is sent it."""
    state, blob = view.packed(made)
    offset, length = state["panels"][panel]["pictures"][position]
    return Image.open(io.BytesIO(blob[offset : offset + length]))


def sent(made: view.View, panel: int, key: str) -> np.ndarray:
    """The shares (word, y, x) that the browser makes of the bytes it is sent."""
    state, blob = view.packed(made)
    offset, h, w = state["panels"][panel]["maps"][key]
    shares = []
    for _ in state["panels"][panel]["words"]:
        low, high = np.frombuffer(blob, "<f4", 2, offset)
        shares.append(low + (high - low) * np.frombuffer(blob, np.uint8, h * w, offset + 8).reshape(h, w) / 255)
        offset += 8 + h * w
    return np.stack(shares)


def published(made, monkeypatch) -> list[tuple[dict, dict]]:
    """What displaying sends to the notebook: (data, metadata) of each output."""
    outputs = []
    monkeypatch.setattr("IPython.display.publish_display_data", lambda data, metadata=None: outputs.append((data, metadata)))
    made._ipython_display_()
    return outputs


# ---- every view --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.013, 0.0131), (0.25, 0.25)])
def test_a_share_is_right_to_half_a_step(low, high):
    shares = torch.rand(3, 5, 7) * (high - low) + low
    blob = view.quantised(shares)
    assert len(blob) == 3 * (8 + 35)
    for i, share in enumerate(shares.numpy()):
        first, last = np.frombuffer(blob, "<f4", 2, i * 43)
        q = np.frombuffer(blob, np.uint8, 35, i * 43 + 8).reshape(5, 7)
        assert first == share.min() and last == share.max()
        assert abs(first + (last - first) * q / 255.0 - share).max() <= (last - first) / 509 + 1e-9


def test_the_widget_stands_above_the_static_figure(monkeypatch):
    pytest.importorskip("anywidget", reason="this environment is older than constraints.txt")
    made = guidance_slider(sweep())
    (widget, _), (figure, about) = published(made, monkeypatch)
    assert widget[view.VIEW]["model_id"]
    assert "slider" in widget["text/plain"] and "0, 1, 4, 7.5" in widget["text/plain"], "no words where widgets are not drawn"
    assert Image.open(io.BytesIO(figure["image/png"])).info["Description"] == about["image/png"]["alt"] == made.figure.labkit_alt
    assert "0x" not in repr(made), "an address in the output is different in every run"


def test_the_live_widget_carries_what_the_page_carries():
    pytest.importorskip("anywidget", reason="this environment is older than constraints.txt")
    made = guidance_slider(sweep())
    widget = made.widget()
    assert (widget.state, widget.blob) == view.packed(made) and widget._esm == view.asset("panels.js")
    assert made.widget() is not widget, "one model shown twice would be closed twice"


def test_without_anywidget_the_page_stands_in_a_frame(monkeypatch):
    monkeypatch.setattr(view, "find_spec", lambda name: None)
    (page, _), (figure, _) = published(guidance_slider(sweep()), monkeypatch)
    assert page["text/html"].startswith("<div><iframe") and "a red sphere" in page["text/html"] and "image/png" in figure
    assert view.VIEW not in page


def test_a_page_is_whole_and_asks_for_nothing(recorded):
    page = explore(recorded[0]).to_html()
    assert page.startswith("<!doctype html>") and view.asset("panels.js") in page and view.asset("panels.css") in page
    for sign in ("http", "//cdn", "import ", "url(", " src=", "fetch("):
        assert sign not in page, f"the page may ask for something: {sign}"


def test_signs_in_a_prompt_do_not_break_the_page():
    text = 'a "cube" </script><b> & more'
    page = guidance_slider(Sweep([[Image.new("RGB", (16, 8))]], (2.0,), (0,), text)).to_html()
    assert page.count("</script>") == 1 and "<b>" not in page.replace("<body>", "")
    assert json.loads(page.split("state: ")[1].split(", blob:")[0])["title"].startswith(f"“{text}”")


def test_it_can_be_made_in_another_thread():
    made = []
    thread = threading.Thread(target=lambda: made.append(guidance_slider(sweep()).to_html()))
    thread.start()
    thread.join(60)
    assert len(made) == 1


def test_it_never_touches_pyplot(recorded):
    import matplotlib.pyplot as plt

    plt.close("all")
    explore(recorded[0]), guidance_slider(sweep())
    assert plt.get_fignums() == []


def test_views_are_saved_as_page_or_figure(tmp_path):
    made = guidance_slider(sweep())
    assert made.save(tmp_path / "a.html").read_text(encoding="utf-8") == made.to_html()
    assert Image.open(made.save(tmp_path / "a.png")).info["Description"] == made.figure.labkit_alt
    with pytest.raises(LabkitError, match=".html or .png"):
        made.save(tmp_path / "a.jpg")


def test_pictures_are_scaled_down_until_they_fit():
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    rows = [[Image.fromarray(noise) for _ in range(12)]]
    files = view.fitted(rows)
    assert 0.2 * view.PICTURE_BYTES < sum(map(len, files[0])) <= view.PICTURE_BYTES
    assert Image.open(io.BytesIO(files[0][0])).width in view.SIDES
    assert rows[0][0].width == 600, "the user's picture was changed"


def test_a_view_that_is_too_large_is_refused():
    panel = view.Panel([Image.new("RGB", (8, 8))], "all", (view.Word("a", "a"),), {(i,): torch.rand(1, 300, 300) for i in range(30)})
    with pytest.raises(LabkitError, match="more than 2,000,000"):
        view.packed(view.View("large", (panel,), (), None, ""))


# ---- the explorer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [0, 1])
def test_the_explorer_sends_the_shares_that_were_recorded(recorded, image):
    trace, _ = recorded
    made = explore(trace, image=image)
    words = [word["text"] for word in made.state["panels"][0]["words"]]
    assert words == [[*PROMPT.split(), "start", "end, padding"], ["a", "cube", "start", "end, padding"]][image]
    for l, layer in enumerate(trace.layers(), 1):
        probs = trace.attention(layer=layer, image=image).values  # (head, y, x, token), the last one all padding
        for head in range(len(probs)):
            got = sent(made, 0, f"{l},{head + 1}")
            n = len(words) - 2  # a token a word here, BOS before and the rest behind
            want = torch.cat([probs[head, ..., 1 : n + 1], probs[head, ..., :1], probs[head, ..., n + 1 :].sum(-1, keepdim=True)], -1)
            assert np.allclose(got, want.permute(2, 0, 1).numpy(), atol=2.1e-3)
            assert np.allclose(got.sum(0), 1, atol=0.01), "the shares of a place are not all there"
        assert np.allclose(sent(made, 0, f"{l},0"), np.mean([sent(made, 0, f"{l},{h + 1}") for h in range(len(probs))], 0), atol=5e-3)


def test_all_layers_together_are_the_heat_map(recorded):
    trace, _ = recorded
    made = explore(trace)
    for i, word in enumerate(made.state["panels"][0]["words"]):
        if word["text"] in ("red", "ball", "cube"):
            assert np.allclose(sent(made, 0, "0,0")[i], trace.heatmap(word["text"], layers="*").map.numpy(), atol=2e-3), word
            assert np.allclose(sent(made, 0, "0,2")[i], trace.heatmap(word["text"], layers="*", head=1).map.numpy(), atol=2e-3), word


def test_a_word_that_stands_there_twice_is_two_words(recorded):
    made = explore(recorded[0])
    ids = [word["id"] for word in made.state["panels"][0]["words"]]
    assert ids == ["a", "red", "ball", "left", "of", "a 2", "blue", "cube", "<start>", "<rest>"]
    shares = sent(made, 0, "0,0")
    assert np.allclose(shares[0] + shares[5], recorded[0].heatmap("a", layers="*").map.numpy(), atol=4e-3)


def test_the_trajectory_is_the_decoded_x0_of_each_step(recorded):
    trace, generation = recorded
    made = explore(trace, generation, image=1)
    (axis, *_), n = made.axes, len(trace.steps)
    assert axis.pictures and axis.first == 1 and len(axis.values) == n + 1 == len(made.panels[0].pictures)
    assert f"t = {trace.steps[2].t}" in axis.values[3]
    assert made.panels[0].pictures[0] == generation.images[1]
    assert made.panels[0].pictures[3] == to_pil(trace.lab.decode(trace.steps[2].x0))[1]


def test_what_was_not_recorded_has_no_slider(recorded):
    trace, generation = recorded
    lab = trace.lab
    with record(lab) as plain:
        drawn = lab.generate(PROMPT, seed=0, progress=False)
    made = explore(plain)
    assert [axis.name for axis in made.axes] == ["layer", "head"] and made.panels[0].pictures == [drawn.image]
    assert [axis.name for axis in explore(plain, drawn.image, layers="mid*").axes] == ["head"]
    with pytest.raises(LabkitError, match="Generation that was recorded"):
        explore(plain, "out.png")
    plain.run.decode = None  # as in a trace that was loaded without its model
    assert explore(plain, drawn).panels[0].pictures == [drawn.image]
    with pytest.raises(LabkitError, match="There is no picture"):
        explore(plain)


@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("keep, names", [("steps", ["step", "layer"]), ("raw", ["step", "layer", "head"])])
def test_a_trace_that_keeps_steps_apart_gets_a_slider_of_maps(recorded, keep, names, latents):
    lab = recorded[0].lab
    with record(lab, latents=latents, keep=keep) as trace:
        lab.generate([PROMPT, "a cube"], seed=[0, 1], progress=False)
    made = explore(trace, image=1)
    assert [axis.name for axis in made.axes] == names and all(axis.maps for axis in made.axes) and made.axes[0].pictures == latents
    assert len(made.axes[0].values) == 5 and len(made.panels[0].pictures) == (5 if latents else 1)
    rest = ",0" if keep == "raw" else ""
    for step in range(4):
        for l, layer in enumerate(trace.layers(), 1):
            want = trace.attention("cube", layer, step=step, image=1)
            want = want.mean("head").values if "head" in want.axes else want.values
            assert np.allclose(sent(made, 0, f"{step + 1},{l}{rest}")[1], want.numpy(), atol=2e-3), (step, layer)
        assert np.allclose(sent(made, 0, f"{step + 1},0{rest}")[1], trace.heatmap("cube", image=1, layers="*", step=step).map.numpy(), atol=2e-3)
    if keep == "raw":
        want = trace.attention("a", trace.layers()[1], step=2, head=1, image=1).values
        assert np.allclose(sent(made, 0, "3,2,2")[0], want.numpy(), atol=2e-3)
    assert np.allclose(sent(made, 0, "0,0" + rest), sent(explore(recorded[0], image=1), 0, "0,0"), atol=3e-3)


def test_large_models_leave_out_combinations_and_stay_small():
    """Stable Diffusion 1.5's sixteen layers of eight heads at 64x64 latents, fifty steps, thirty words."""
    sizes = [64, 64, 32, 32, 16, 16, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    whole = [(8, 30, n, n) for n in sizes]
    side, families, left_out = maps.room(whole, 20)
    assert set() in families and {"layer"} in families and {"step"} in families and "layer by step" in left_out
    small = [(words, *maps.fit(y, x, side)) for _, words, y, x in whole]
    assert sum(maps.cost(family, small, [8] * 16, 20) for family in families) <= maps.MAP_BYTES
    assert maps.room([(8, 3, y // 8, x // 8) for *_, y, x in whole], 4)[2] == (), "what fits must be sent"


def test_large_maps_are_averaged_over_equal_areas():
    m = torch.rand(2, 3, 64, 48)
    assert torch.allclose(maps.pooled(m, 32), m.reshape(2, 3, 32, 2, 24, 2).mean((3, 5)), atol=1e-6)
    assert maps.pooled(m, 64) is m


def test_families_cost_what_they_add(recorded):
    """The bytes that are reckoned beforehand are those of the maps that are made."""
    made = explore(recorded[0])
    state, blob = view.packed(made)
    whole = [recorded[0].attention(layer=layer).values.shape for layer in recorded[0].layers()]  # (head, y, x, token)
    families = [set(), {"layer"}, {"head"}, {"layer", "head"}]
    reckoned = sum(maps.cost(f, [(10, *m[1:3]) for m in whole], [m[0] for m in whole], 0) for f in families)
    assert reckoned == len(blob) - sum(length for _, length in state["panels"][0]["pictures"])


def test_layers_are_called_what_traces_and_interventions_call_them(recorded):
    trace, _ = recorded
    layer = next(axis for axis in explore(trace).axes if axis.name == "layer")
    assert layer.values == ("all layers", "down.0.0.0", "mid.0.0", "up.1.0.0", "up.1.1.0")
    assert [trace.layers(name) for name in layer.values[1:]] == [(name,) for name in trace.layers()]


def test_what_was_left_out_is_said(recorded, monkeypatch):
    monkeypatch.setattr(maps, "MAP_BYTES", 5000)
    made = explore(recorded[0])
    assert "head" not in [axis.name for axis in made.axes] and "no room for the maps of head and of head by layer" in made.state["help"]
    assert "no room" not in explore(recorded[0], layers="mid*").state["help"]


@pytest.mark.parametrize("asked, said", [
    ({"layers": "attic*"}, "attic"), ({"image": 2}, "images 0 to 1"), ({"branch": "both"}, "'both' was not computed"),
])  # fmt: skip
def test_what_is_not_there_is_named(recorded, asked, said):
    with pytest.raises(LabkitError, match=said):
        explore(*recorded, **asked)


# ---- the guidance slider -----------------------------------------------------------------------------------------


def test_every_scale_has_its_own_picture_in_order():
    made = guidance_slider(sweep())
    assert [panel.label for panel in made.panels] == ["seed 3", "seed 5"]
    for p, seed in enumerate(SEEDS):
        for i, scale in enumerate(SCALES):
            colour = np.asarray(shown(made, p, i), dtype=float).mean((0, 1))
            assert abs(colour - [int(30 * scale), 40 * seed, 0]).max() < 3, f"a wrong picture at w = {scale}"


def test_the_slider_names_the_scales_and_starts_where_it_is_told():
    (axis,) = guidance_slider(sweep()).axes
    assert axis.values == ("w = 0", "w = 1", "w = 4", "w = 7.5") and axis.start == 2 and axis.pictures and not axis.maps
    assert guidance_slider(sweep(), start=0).axes[0].start == 0


def test_nothing_is_drawn_when_it_is_packed_again(monkeypatch):
    made, drawn = guidance_slider(sweep()), []
    monkeypatch.setattr(plots, "png", lambda figure: drawn.append(figure))
    made.to_html()
    assert drawn == []


@pytest.mark.parametrize("spoilt, said", [
    (lambda s: replace(s, images=s.images[:1]), "seed"),
    (lambda s: replace(s, images=[row[:2] for row in s.images]), "scale"),
    (lambda s: replace(s, images=[], seeds=()), "sweep"),
    (lambda s: replace(s, scales=(1.0, 1.0, 4.0, 7.5)), "twice: 1, 1, 4, 7.5"),
])  # fmt: skip
def test_a_sweep_that_is_not_whole_is_refused(spoilt, said):
    with pytest.raises(LabkitError, match=said):
        guidance_slider(spoilt(sweep()))


@pytest.mark.parametrize("start", [2, float("nan"), "4"])
def test_a_start_that_was_not_drawn_is_refused(start):
    with pytest.raises(LabkitError, match="it has 0, 1, 4, 7.5"):
        guidance_slider(sweep(), start=start)


# ---- before and after --------------------------------------------------------------------------------------------


def heat(word: str, value: float) -> HeatMap:
    return HeatMap(word, torch.full((4, 4), value).index_fill(0, torch.tensor([0]), 0.5), "one step")


def test_an_edit_shows_both_pictures_their_difference_and_their_maps():
    before, after = Image.new("RGB", (16, 16), (10, 20, 30)), Image.new("RGB", (16, 16), (10, 20, 30))
    after.putpixel((3, 5), (70, 20, 90))
    made = before_after(before, after, [heat("red", 0.1), heat("ball", 0.2)], [heat("Red", 0.3), heat("cube", 0.4)], "an edit")
    first, second, changed = made.panels
    assert [word.id for word in first.words] == ["red", "ball"] and [word.id for word in second.words] == ["red", "cube"]
    assert np.allclose(sent(made, 1, "")[1], [[0.5] * 4] + [[0.4] * 4] * 3, atol=1e-3)
    pixels = np.asarray(changed.pictures[0])
    assert pixels[5, 3] == 255 and pixels.sum() == 255 and "40 of 255" in changed.label
    assert "before and after" in made.figure.labkit_alt and "30%" not in changed.label


def test_pictures_without_maps_and_without_difference_will_do():
    same = Image.new("RGB", (16, 8), (9, 9, 9))
    made = before_after(same, same)
    assert not np.asarray(made.panels[2].pictures[0]).any() and made.to_png()


@pytest.mark.parametrize("size, maps_before, said", [
    ((8, 16), [], "keeps the size"),
    ((16, 16), [heat("red", 0.1), HeatMap("ball", torch.zeros(8, 8), "")], "several sizes"),
    ((16, 16), [heat("red", 0.1), heat("Red", 0.1)], "several heat maps"),
])  # fmt: skip
def test_an_edit_that_does_not_fit_is_refused(size, maps_before, said):
    with pytest.raises(LabkitError, match=said):
        before_after(Image.new("RGB", (16, 16)), Image.new("RGB", size), maps_before)
