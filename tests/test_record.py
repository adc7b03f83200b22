"""record: what is kept is what flowed, under the right names, in the memory that was announced; and models of every family can be recorded."""

import copy

import pytest
import torch
from families import write
from tiny import build

import labkit
from labkit.errors import LabkitError
from labkit.models.layers import Attention
from labkit.probes.keep import Keep, Store, size
from labkit.probes.named import Named
from labkit.probes.record import record
from labkit.probes.sites import fits, short, sites
from labkit.tap import listen, taps

PROMPTS = ["a red ball", "a blue cube left of a red ball"]
DRAW = {"progress": False, "height": 16, "width": 32, "steps": 3, "seed": [1, 2]}  # not square


@pytest.fixture(scope="module")
def lab():
    return build()


@pytest.fixture(scope="module")
def recorded(lab):
    """The same generation, recorded in each way, and by hand: what flowed through each tap in each call."""
    flowed, traces = {}, {}
    everything = {"attention": ("cross", "self"), "states": ("resid", "queries", "text"), "latents": True}
    for keep in ("sums", "steps", "raw"):
        with record(lab, keep=keep, **everything) as traces[keep]:
            lab.generate(PROMPTS, **DRAW)
    patterns = ("*.attn1.probs", "*.attn2.probs", "*.attn2.q", "*.resid")
    with listen(lab.unet, {pattern: lambda x, name: flowed.setdefault(name, []).append(x.clone()) for pattern in patterns}):
        lab.generate(PROMPTS, **DRAW)
    return traces, {name: torch.stack(calls) for name, calls in flowed.items()}  # (step, row, ...); rows: uncond 0, 1, cond 0, 1


def attached(lab) -> bool:
    return any(tap.active for tap in taps(lab.unet).values()) or "steps" in vars(lab)


# --- the same numbers, however they are kept -------------------------------------------------------------------------


@pytest.mark.parametrize("image, branch, row", [(0, "uncond", 0), (1, "uncond", 1), (0, "cond", 2), (1, "cond", 3)])
def test_what_is_kept_is_what_flowed(recorded, image, branch, row):
    traces, flowed = recorded
    which = {"image": image, "branch": branch}
    for name, calls in flowed.items():
        layer, _, what = name.rpartition(".")
        steps = calls[:, row]  # (step, ...)
        for keep, trace in traces.items():
            if name.endswith("attn2.probs"):
                got = trace.attention(layer=layer, **which)
                expected = steps.mean(0)  # (head, N, token)
                if keep == "steps":
                    single = trace.run.plan.columns
                    expected = torch.cat([expected[..., :single], expected[..., single:].sum(-1, keepdim=True)], -1).mean(0)
                assert got.axes == (("head",) if keep != "steps" else ()) + ("y", "x", "token")
            elif name.endswith("attn1.probs"):
                got, expected = trace.self_attention(layer, **which), steps.mean(0)
                expected = expected.mean(0) if keep == "steps" else expected
            elif name.endswith("attn2.q"):
                continue
            else:
                got, expected = trace.residual(layer, **which), steps.mean(0)
            assert (got.values.flatten() - expected.flatten()).abs().max() < 1e-6 * max(1, float(expected.abs().max())), (name, keep)
    # by itself: each step, of the raw recording
    for name in (n for n in flowed if n.endswith("attn2.probs")):
        layer = name.removesuffix(".probs")
        every = traces["raw"].attention(layer=layer, step=slice(None), **which)
        assert every.axes[0] == "step" and every.labels["step"] == (0, 1, 2)
        assert torch.equal(every.values.flatten(2, 3), flowed[name][:, row])
        assert torch.equal(traces["raw"].attention(layer=layer, step=1, **which).values, every.at(step=1).values)
        assert torch.equal(traces["raw"].attention(layer=layer, step=slice(1, 3), **which).values, every.values[1:])
        assert torch.equal(traces["raw"].attention(layer=layer, step=slice(1, 3), head=0, **which).values, every.values[1:, 0])


@pytest.mark.parametrize("word", ["red", "red ball", "BOS", "EOS", "padding", 2, (1, 2)])
@pytest.mark.parametrize("image", [0, 1])
def test_streaming_equals_raw_aggregated_afterwards(recorded, word, image):
    traces, _ = recorded
    raw = traces["raw"]
    by_hand = []
    for layer in raw.layers():
        m = raw.attention(layer=layer, image=image, step=slice(None)).values[..., list(raw.tokens(word, image))].sum(-1).mean((0, 1))
        by_hand.append(torch.nn.functional.interpolate(m[None, None], (8, 16), mode="bilinear")[0, 0])
    for trace in traces.values():
        assert (trace.heatmap(word, image).map - sum(by_hand) / len(by_hand)).abs().max() < 1e-6
    for step in (0, slice(1, 3)):  # per step, from an eighth of the memory
        assert (raw.heatmap(word, image, step=step).map - traces["steps"].heatmap(word, image, step=step).map).abs().max() < 1e-6
    assert (raw.heatmap(word, image, step=0).map - raw.heatmap(word, image, step=2).map).abs().max() > 1e-4  # steps are not alike


def test_tokens_by_every_name(recorded):
    run = recorded[0]["sums"].run
    assert run.tokens("red") == (2,) and run.tokens("red ball") == (2, 3) and run.tokens("a", 1) == (1, 6) and run.tokens("a", 1, occurrence=1) == (6,)
    assert run.tokens("BOS") == (0,) and run.tokens("EOS") == (4,) and run.tokens("EOS", 1) == (9,)
    assert run.tokens("padding") == tuple(range(5, 16)) and run.tokens("padding", 1) == tuple(range(10, 16)) and run.tokens("padding", branch="uncond") == tuple(range(2, 16))
    assert run.tokens(3) == (3,) and run.tokens((3, 1, 3)) == (1, 3)
    for wrong in (16, -1, (), True, "dog"):
        with pytest.raises(LabkitError):
            run.tokens(wrong)


def test_layers_by_name_short_name_pattern_and_resolution(recorded):
    trace = recorded[0]["raw"]
    assert short("up_blocks.1.attentions.0.transformer_blocks.0.attn2") == "up.1.0.0"
    every = trace.layers()
    assert trace.layers("mid") == trace.layers("mid_block*") == trace.layers(resolution=(4, 8)) == trace.layers(resolution=4)
    assert trace.layers("up") + trace.layers("mid") + trace.layers("down") != () and set(trace.layers(("up", "down", "mid"))) == set(every)
    assert trace.layers(resolution=8) == trace.layers(("down", "up")) and fits("up_blocks.1.attentions.0.attn2", "up.1") and not fits("up_blocks.10.x", "up.1")
    several = trace.attention("red", layer="up", step=slice(None))
    assert several.axes == ("step", "layer", "head", "y", "x") and several.labels["layer"] == trace.layers("up")
    for k, layer in enumerate(trace.layers("up")):
        assert torch.equal(several.values[:, k], trace.attention("red", layer=layer, step=slice(None)).values)
    for ask in (lambda: trace.layers("up.7"), lambda: trace.layers(resolution=5), lambda: trace.attention("red"), lambda: trace.residual("attn")):
        with pytest.raises(LabkitError, match="there are|There are|choose"):
            ask()


@pytest.mark.parametrize(
    "keep, ask, says",
    [
        ("sums", lambda t: t.heatmap("red", step=1), "keep='steps'"),
        ("steps", lambda t: t.attention("red", layer="mid", head=1), "heads were averaged"),
        ("steps", lambda t: t.heatmap(12), "Padding tokens, from 10 on, were added up"),
        ("raw", lambda t: t.heatmap("red", step=3), "There are steps 0 to 2, there is no step 3"),
        ("raw", lambda t: t.heatmap("red", step=slice(5, 9)), "no recorded step in 5:9"),
        ("raw", lambda t: t.attention("mid_block.attentions.0.transformer_blocks.0.attn2"), "first comes a word"),
        ("raw", lambda t: t.nonsense, "has no 'nonsense'"),
    ],
)
def test_what_was_not_kept_is_said(recorded, keep, ask, says):
    with pytest.raises((LabkitError, AttributeError), match=says) as error:
        ask(recorded[0][keep])
    assert "\n" not in str(error.value)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["sums", "steps", "raw"])
def test_the_memory_is_the_announced_one(lab, recorded, keep):
    run = recorded[0][keep].run
    taken = sum(store.values.untyped_storage().nbytes() for store in run.stores.values())
    assert run.plan.bytes == taken


def test_sums_do_not_grow_with_steps_and_steps_do(lab, capsys):
    def taken(keep, steps):
        with record(lab, keep=keep) as trace:
            lab.generate(PROMPTS[0], **{**DRAW, "steps": steps, "seed": 1})
        return trace.run.plan.bytes

    assert taken("sums", 1) == taken("sums", 7) and capsys.readouterr().out == ""
    assert taken("raw", 6) == 6 * taken("raw", 1) == 6 * taken("sums", 1)
    assert taken("steps", 6) < taken("raw", 6) / 2
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"Recording takes {size(taken('raw', 6))}: 4 sites, 6 steps, 1 x 2 branches")


def test_over_the_budget_nothing_is_drawn(lab):
    calls = []
    with record(lab, keep=Keep(steps=True, budget=1e5)) as trace, listen(lab.unet, {"*.resid": lambda x, name: calls.append(name)}):
        with pytest.raises(LabkitError, match=r"would take 344 kB and its budget is 100 kB: .*Keep\(layers='up.1'"):
            lab.generate(PROMPTS[0], **{**DRAW, "seed": 1})
    assert calls == [] and trace.runs == [] and not attached(lab)


def test_some_layers_and_branches_are_kept_and_only_there_is_listened(lab):
    with record(lab, keep=Keep(steps=True, layers=("mid", "down"), branches=("cond",))) as trace:
        active = [name for name, tap in taps(lab.unet).items() if tap.active]
        lab.generate(PROMPTS, **DRAW)
    assert all(name.startswith(("mid", "down")) and name.endswith("attn2.probs") for name in active) and len(active) == 2
    assert trace.branches == ("cond",) and len(trace.layers()) == 2
    for wrong in (Keep(layers="attn7"),):
        with pytest.raises(LabkitError, match="no layer fits 'attn7'; there are: down_blocks"), record(lab, keep=wrong):
            raise AssertionError("never reached")
    with record(lab, keep=Keep(branches=("uncond",))), pytest.raises(LabkitError, match="none is computed, only cond"):
        lab.generate(PROMPTS, guidance=1, **DRAW)
    for wrong in ({"branches": "cond"}, {"branches": ("edit",)}, {"branches": ()}, {"budget": 0}):
        with pytest.raises(LabkitError):
            Keep(**wrong)


def test_a_store_of_two_calls_a_step_is_their_mean():
    store = Store(torch.zeros(3, 1, 2), True, [0] * 3)
    for i, value in ((0, 1.0), (1, 2.0), (1, 4.0)):
        store.add(torch.full((1, 2), value), i)
    assert store.mean(0, 1)[0].tolist() == [3.0, 3.0] and store.mean(0)[0].tolist() == pytest.approx([7 / 3] * 2)  # over calls
    values, steps = store.mean(0, slice(None))
    assert steps == (0, 1) and values.tolist() == [[1.0, 1.0], [3.0, 3.0]]  # step 2 never came


# --- all that can be asked of a run ----------------------------------------------------------------------------------


def test_heun_and_an_interval_and_a_run_that_stops_early(lab):
    with record(lab, keep="raw") as trace:
        lab.generate(PROMPTS, **DRAW, sampler="heun")
    assert trace.attention(layer="mid", step=slice(None)).shape["step"] == 3
    assert (trace.attention(layer="mid").values.sum(-1) - 1).abs().max() < 1e-5
    with record(lab, keep="raw") as trace:
        t = [step.t for step in lab.steps(PROMPTS[0], steps=4, interval=(300, 800))]
    guided = tuple(i for i, one in enumerate(t) if 300 <= one <= 800)
    assert 0 < len(guided) < 4
    assert trace.attention(layer="mid", branch="uncond", step=slice(None)).labels["step"] == guided
    assert trace.attention(layer="mid", step=slice(None)).labels["step"] == (0, 1, 2, 3)
    with record(lab, keep="raw") as trace:
        for step in lab.steps(PROMPTS[0], steps=4):
            if step.i == 1:
                break
    assert trace.attention(layer="mid", step=slice(None)).labels["step"] == (0, 1)


def test_several_images_of_a_prompt_and_guidance_off(lab):
    with record(lab, attention=("cross", "self")) as trace:
        lab.generate(PROMPTS[0], **{**DRAW, "seed": [3, 4, 5]}, guidance=1)
    assert trace.images == 3 and trace.branches == ("cond",) and trace.plan.branches == ("cond",)
    with record(lab) as alone:
        lab.generate(PROMPTS[0], **{**DRAW, "seed": 5}, guidance=1)
    assert (trace.heatmap("red", image=2).map - alone.heatmap("red").map).abs().max() < 1e-5
    assert (trace.heatmap("red", image=1).map - alone.heatmap("red").map).abs().max() > 1e-5
    assert (trace.self_attention("mid", image=2).sum("key_y", "key_x").values - 1).abs().max() < 1e-5


def test_too_long_a_prompt_is_refused_and_starts_no_run(lab):
    with record(lab) as trace, pytest.raises(LabkitError, match="too long"):
        lab.generate("a red ball left of a blue cube left of a red ball left of a cube", **DRAW)
    assert trace.runs == []


def test_text_states_are_those_of_each_layer(lab, recorded):
    trace = recorded[0]["sums"]
    for branch, prompts in (("cond", PROMPTS), ("uncond", ["", ""])):
        with torch.no_grad():
            hidden = lab.text_encoder.hidden(lab.tokenizer(prompts))
        got = trace.text(image=1, branch=branch)
        assert got.axes == ("layer", "token", "channel") and torch.equal(got.values, torch.stack(hidden)[:, 1])
        assert torch.equal(trace.text("text_encoder.1", 1, branch).values, hidden[1][1])
    with record(lab) as nothing:
        lab.generate(PROMPTS[0], **{**DRAW, "seed": 0})
    for ask in (nothing.text, nothing.residual, nothing.self_attention):
        with pytest.raises(LabkitError, match="recorded in this run"):
            ask()


def test_the_middle_block_alone(lab):
    with record(lab, attention=None, states="mid") as trace:
        active = [name for name, tap in taps(lab.unet).items() if tap.active]
        lab.generate(PROMPTS, **DRAW)
    assert active == ["mid_block.resid"] and trace.residual().axes == ("channel", "y", "x") and trace.residual().shape["channel"] == 64


@pytest.mark.parametrize("how", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("keep", ["sums", "raw"])
def test_bit_identical_and_on_the_fused_path_after_an_exception(lab, how, keep):
    fused = []
    plain = lab.generate(PROMPTS, **DRAW).latents
    with pytest.raises(how):
        with record(lab, ("cross", "self"), latents=True, states=("resid", "text", "queries"), keep=keep):
            for step in lab.steps(PROMPTS, steps=3):
                if step.i == 1:
                    raise how
    assert not attached(lab)
    attention = [m for m in lab.unet.modules() if isinstance(m, Attention)]
    before = [m.attend for m in attention]
    try:
        for m in attention:
            m.attend = lambda *qkv, real=m.attend: fused.append(1) or real(*qkv)
        assert torch.equal(lab.generate(PROMPTS, **DRAW).latents, plain)
    finally:
        for m, attend in zip(attention, before):
            m.attend = attend
    assert len(fused) == 3 * len(attention)  # every layer, in every step


def test_zero_sites_are_an_error(lab):
    blind = copy.copy(lab)
    blind.unet = torch.nn.Linear(1, 1)
    for options in ({}, {"attention": "self"}, {"attention": None, "states": "resid"}, {"attention": None, "states": "queries"}):
        with pytest.raises(LabkitError, match="no tap matches"), record(blind, **options):
            raise AssertionError("never reached")
    for options in ({"attention": None}, {"attention": "both"}, {"states": "residual"}, {"keep": "all"}):
        with pytest.raises(LabkitError), record(lab, **options):
            raise AssertionError("never reached")
    assert "steps" not in vars(blind) and not attached(lab)


# --- every family ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl", "refiner", "tabletop"])
def model(request, tmp_path_factory):
    if request.param == "tabletop":
        return labkit.load("tabletop", "cpu")
    return labkit.load(write(request.param, tmp_path_factory.mktemp(request.param)), "cpu")


def test_every_family_not_square(model):
    f = model.vae.config.factor * 2 ** (len(model.unet.config.block_out_channels) - 1)
    draw = {"steps": 2, "seed": [3, 4], "height": 2 * f, "width": f, "guidance": 4.0, "progress": False}
    prompts = ["a red sphere", "a blue cube left of a red cube"] if model.vocabulary else PROMPTS
    plain = model.generate(prompts, **draw).latents
    seen: dict = {}
    everything = {"attention": ("cross", "self"), "states": ("resid", "text", "queries"), "latents": True, "keep": "raw"}
    with record(model, **everything) as trace, listen(model.unet, {"*.probs": lambda x, name: seen.setdefault(name, []).append(x.clone())}):
        drawn = model.generate(prompts, **draw).latents
    assert (drawn - plain).abs().max() < 1e-4 * max(1, float(plain.abs().max()))
    assert torch.equal(model.generate(prompts, **draw).latents, plain)
    assert trace.run.plan.bytes == sum(store.values.nbytes for store in trace.stores.values())
    assert {site.tap for site in trace.plan.sites.values()} == {name for name in taps(model.unet) if name.endswith((".probs", ".resid", ".attn2.q"))}
    for name, calls in seen.items():
        layer = name.removesuffix(".probs")
        get = trace.attention if name.endswith("attn2.probs") else trace.self_attention
        for image in (0, 1):
            got = get(layer=layer, step=1, image=image)  # (head, y, x, ...)
            assert got.shape["y"] == 2 * got.shape["x"] and torch.equal(got.values.flatten(), calls[1][2 + image].flatten())
    red = trace.heatmap("red", image=1)
    assert red.map.shape == trace.size and red.map.shape[0] == 2 * red.map.shape[1] and 0 <= float(red.map.min()) <= float(red.map.max()) <= 1
    with record(model) as sums:
        model.generate(prompts, **draw)
    assert (sums.heatmap("red", image=1).map - red.map).abs().max() < 1e-6
    texts = trace.text("text_encoder.*")
    assert texts.shape["layer"] == len(model.texts[0][0].encoder.layers) + 1


def test_recorded_optimised_models_too(lab):
    from labkit.packing import available, optimize

    if not available():
        pytest.skip("this build of torch lacks the kernels")
    fast = optimize(lab)
    with record(fast, states="queries", keep="raw") as a, record(lab, states="queries", keep="raw") as b:
        fast.generate(PROMPTS, **DRAW)
        lab.generate(PROMPTS, **DRAW)
    assert (a.heatmap("red").map - b.heatmap("red").map).abs().max() < 1e-4 and not attached(fast)


# --- names -----------------------------------------------------------------------------------------------------------


def test_axes_have_names():
    x = Named(torch.arange(24.0).view(2, 3, 4), ("step", "head", "x"), {"step": (5, 7)})
    assert x.shape == {"step": 2, "head": 3, "x": 4} and repr(x) == "Named(step 2, head 3, x 4)"
    assert x.mean("step", "x").axes == ("head",) and torch.equal(x.mean("step", "x").values, x.values.mean((0, 2)))
    assert torch.equal(x.at(step=7, head=1).values, x.values[1, 1]) and x.sum().values is x.values
    assert torch.equal(x.sum("head").values, x.values.sum(1)) and x.sum("head").labels == {"step": (5, 7)}
    for wrong in (lambda: x.mean("layer"), lambda: x.at(step=0), lambda: x.at(head=3), lambda: Named(torch.zeros(2), ("a", "b")),
                  lambda: Named(torch.zeros(2), ("a",), {"a": (1,)})):  # fmt: skip
        with pytest.raises(LabkitError):
            wrong()


def test_as_xarray_where_there_is_xarray(monkeypatch):
    import sys
    from types import SimpleNamespace

    x = Named(torch.zeros(2, 3), ("step", "x"), {"step": (5, 7)})
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(LabkitError, match="pip install xarray"):
        x.to_xarray()
    monkeypatch.setitem(sys.modules, "xarray", SimpleNamespace(DataArray=lambda values, dims, coords: (values.shape, dims, coords)))
    assert x.to_xarray() == ((2, 3), ("step", "x"), {"step": [5, 7]})


def test_shapes_are_known_beforehand(model):
    f = 2 ** (len(model.unet.config.block_out_channels) - 1)
    for kind in ("cross", "self", "resid", "queries"):
        for site in sites(model.unet, kind, (3 * f, 2 * f), 16):
            if kind != "resid":
                assert site.shape[1] * 2 == site.shape[2] * 3
