"""Interventions do what they say, there and nowhere else, and leave nothing behind; grids say which part does what."""

from contextlib import ExitStack

import pytest
import torch
from families import write
from tiny import build

import labkit
from labkit.errors import LabkitError
from labkit.probes.causal import ablate_heads, measure, patch_grid, recovery
from labkit.probes.intervene import PATTERNS, Where, ablate, capture, patch, replace, scale
from labkit.probes.record import record
from labkit.probes.table import Table
from labkit.tap import listen, taps

PROMPT, OTHER = "a red ball", "a blue cube"
KEYS_AND_VALUES = (Where("keys"), Where("values"))


@pytest.fixture(scope="module")
def lab():
    return build()


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl"])
def family(request, tmp_path_factory):
    return labkit.load(str(write(request.param, tmp_path_factory.mktemp("families") / request.param)), device="cpu")


def draw(lab, prompt=PROMPT, seed=0, **options):
    return lab.generate(prompt, seed=seed, progress=False, **{"steps": 4, "guidance": 5.0, **options}).latents


def seen(lab, tap, *managers, prompt=PROMPT, **options):
    """What flows behind the interventions at the taps that a pattern fits: {(tap, step): (rows, ...)}."""
    found = {}
    with ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager)
        stack.enter_context(listen(lab.unet, {tap: lambda x, name: found.__setitem__((name, lab.layout.i), x.clone())}))
        draw(lab, prompt, **options)
    return found


# ---- what an intervention does -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PATTERNS)
def test_every_kind_is_zeroed_where_it_flows(lab, kind):
    after = seen(lab, PATTERNS[kind], ablate(lab, Where(kind)))
    assert after and all(not x.any() for x in after.values())
    assert list(dict.fromkeys(name for name, _ in after)) == list(taps(lab.unet, PATTERNS[kind]))


@pytest.mark.parametrize("kind, axes", [("heads", 2), ("cross", 2), ("keys", 2), ("self values", 2), ("resid", (2, 3))])
def test_the_mean_is_that_over_places_or_tokens(lab, kind, axes):
    layer = "mid" if kind != "resid" else "down.0"
    last = PATTERNS[kind].removeprefix("*.")
    plain = seen(lab, PATTERNS[kind], steps=1)
    after = seen(lab, PATTERNS[kind], ablate(lab, Where(kind, layers=layer), by="mean"), steps=1)
    (tap,) = [name for name, _ in after if name.startswith("mid" if layer == "mid" else "down_blocks.0.resid")]
    assert tap.endswith(last)
    assert torch.allclose(after[tap, 0], plain[tap, 0].mean(axes, keepdim=True).expand_as(plain[tap, 0]), atol=1e-6)
    assert not torch.allclose(after[tap, 0], plain[tap, 0], atol=1e-4)


def test_heads_steps_branches_and_pictures_are_those_that_were_asked_for(lab):
    """Only up.1's first layer, head 1, step 1 and 2, branch "cond", picture 1 of 3; all else is what it was before the first change."""
    where = Where("heads", layers="up.1.0", heads=1, steps=slice(1, 3), branch="cond", images=1)
    options = {"prompt": [PROMPT, OTHER, PROMPT], "seed": [0, 1, 2]}
    touched = {}

    def change(x, tap):
        touched[tap, lab.layout.i] = x.clone()
        return torch.full_like(x, 7.0)

    after = seen(lab, "*.attn2.heads", replace(lab, where, change), **options)
    assert {i for _, i in touched} == {1, 2} and {tap for tap, _ in touched} == {"up_blocks.1.attentions.0.transformer_blocks.0.attn2.heads"}
    for key, before in touched.items():
        want = before.clone()
        want[3 + 1, 1] = 7.0  # rows are branch-major: three of "uncond", then three of "cond"
        assert torch.equal(after[key], want), key
    changed = [draw(lab, **options), None]
    with replace(lab, where, change):
        changed[1] = draw(lab, **options)
    same = [torch.equal(a, b) for a, b in zip(*changed)]
    assert same == [True, False, True], "another picture of the batch changed"


def test_the_picture_of_a_word_without_attention_is_that_of_other_tokens(lab):
    """Keys and values of a word that is never attended to do not matter; those of one that is do."""
    deaf = ablate(lab, Where("cross", tokens="red"))
    with deaf:
        without = draw(lab)
    with ablate(lab, Where("cross", tokens="red")), scale(lab, Where("values", tokens="red"), 100.0):
        loud = draw(lab)
    assert torch.equal(without, loud) and not torch.equal(without, draw(lab))


@pytest.mark.parametrize("tokens, columns", [("red", [2]), ("red ball", [2, 3]), ("BOS", [0]), (4, [4]), ((1, 3), [1, 3]), (slice(4, None), list(range(4, 16)))])
def test_tokens_are_a_words_or_positions(lab, tokens, columns):
    after = seen(lab, "mid_block*attn2.probs", scale(lab, Where("cross", tokens=tokens, branch="cond"), 0.0), steps=1)
    (probs,) = after.values()
    zero = (probs[1] == 0).flatten(0, 1).all(0).nonzero().flatten().tolist()
    assert zero == columns and (probs[0] != 0).all()


def test_each_row_has_its_own_word(lab):
    after = seen(lab, "mid_block*attn2.probs", scale(lab, Where("cross", tokens="cube"), 0.0), prompt=["a cube", "a red cube", "a ball"], seed=[0, 1, 2], steps=1)
    (probs,) = after.values()
    zero = [(row == 0).flatten(0, 1).all(0).nonzero().flatten().tolist() for row in probs]
    assert zero == [[], [], [], [2], [3], []], "rows: uncond of three pictures, cond of three"


def test_a_scale_of_one_and_a_replacement_by_itself_change_nothing(lab):
    plain = draw(lab)
    with scale(lab, Where("heads", heads=(0, 1), steps=(0, 2)), 1.0), replace(lab, Where("resid", layers="up.0"), lambda x, tap: x):
        assert torch.equal(draw(lab), plain)


def test_a_tensor_may_stand_in_for_what_flows(lab):
    after = seen(lab, "mid_block.resid", replace(lab, Where("resid", layers="mid"), torch.tensor(0.25)))
    assert all((x == 0.25).all() for x in after.values())


# ---- patching ----------------------------------------------------------------------------------------------------


def test_all_keys_and_values_of_the_text_are_the_text(family):
    """A run with another text's keys and values in all layers and steps is that text's run: nothing else reads the text (SDXL: but the pooled one)."""
    plain, options = draw(family), {"steps": 3}
    good = draw(family, OTHER, **options)
    with capture(family, KEYS_AND_VALUES[0]) as keys, capture(family, KEYS_AND_VALUES[1]) as values:
        draw(family, OTHER, **options)
    with patch(family, KEYS_AND_VALUES[0], keys), patch(family, KEYS_AND_VALUES[1], values):
        reads_once = family.text_encoder_2 is None
        assert torch.allclose(draw(family, **options), good, atol=1e-4) == reads_once
    assert torch.equal(draw(family), plain)


@pytest.mark.parametrize("kind", ["heads", "cross", "values", "self", "resid"])
def test_patching_a_run_into_itself_changes_nothing(family, kind):
    with capture(family, Where(kind)) as same:
        plain = draw(family)
    with patch(family, Where(kind), same):
        assert torch.equal(draw(family), plain)


def test_the_last_residual_stream_of_every_step_decides_the_picture(lab):
    """up_blocks ends in the residual stream that the last convolution reads, so a patch there is the other run, given one noise."""
    with capture(lab, Where("resid", layers="up.1")) as last:
        good = draw(lab, OTHER)
    with patch(lab, Where("resid", layers="up.1"), last):
        assert torch.allclose(draw(lab), good, atol=1e-5)
    with patch(lab, Where("resid", layers="up.1", branch="cond", steps=slice(0, 2)), last):
        part = draw(lab)
    assert not torch.allclose(part, good, atol=1e-3) and not torch.allclose(part, draw(lab), atol=1e-3)


def test_one_captured_picture_serves_all_and_several_go_one_to_one(lab):
    with capture(lab, Where("resid", layers="up.1")) as one:
        good = draw(lab, OTHER, seed=3)
    with patch(lab, Where("resid", layers="up.1"), one):
        all_of_them = draw(lab, [PROMPT, PROMPT], seed=[3, 3])
    assert torch.allclose(all_of_them, good.expand_as(all_of_them), atol=1e-5)
    with capture(lab, Where("resid", layers="up.1")) as two:
        pair = draw(lab, [OTHER, "a red cube"], seed=[3, 4])
    with patch(lab, Where("resid", layers="up.1"), two):
        assert torch.allclose(draw(lab, [PROMPT, PROMPT], seed=[3, 4]), pair, atol=1e-5)


def test_a_sampler_that_calls_twice_a_step_is_patched_call_by_call(lab):
    with capture(lab, Where("resid", layers="up.1")) as last:
        good = draw(lab, OTHER, sampler="heun")
    assert {len(calls) for (_, i), calls in last.calls.items() if i < 3} == {2}
    with patch(lab, Where("resid", layers="up.1"), last):
        assert torch.allclose(draw(lab, sampler="heun"), good, atol=1e-5)


@pytest.mark.parametrize("asked, drawn, said", [
    ({}, {"steps": 5}, "Step 4 .* steps 0 to 3; draw both runs with the same number of steps"),
    ({}, {"guidance": 1.0}, None),  # the branch that is computed is there
    ({"guidance": 1.0}, {}, "no branch 'uncond'"),
    ({}, {"prompt": [PROMPT] * 3, "seed": [0, 1, 2]}, "2 pictures were captured and 3 are drawn"),
    ({}, {"prompt": [PROMPT] * 2, "seed": [0, 1], "height": 32}, "one size"),
    ({"where": Where("resid", layers="mid")}, {}, "nothing of up_blocks.1.resid, only of mid_block.resid"),
])  # fmt: skip
def test_runs_that_do_not_fit_are_refused(lab, asked, drawn, said):
    asked, drawn = dict(asked), {"prompt": [PROMPT] * 2, "seed": [0, 1], **drawn}
    with capture(lab, asked.pop("where", Where("resid", layers="up.1"))) as source:
        draw(lab, **{"prompt": [OTHER] * 2, "seed": [0, 1], **asked})
    if said is None:
        with patch(lab, Where("resid", layers="up.1"), source):
            draw(lab, **drawn)
        return
    with pytest.raises(LabkitError, match=said), patch(lab, Where("resid", layers="up.1"), source):
        draw(lab, **drawn)


def test_capturing_has_a_budget(lab, monkeypatch):
    monkeypatch.setattr("labkit.probes.intervene.BUDGET", 1000)
    with pytest.raises(LabkitError, match="more than 1e-06 GB"), capture(lab, Where("self")):
        draw(lab)


# ---- nothing is left behind, and nothing is silently missed ------------------------------------------------------


def test_the_network_is_bit_identical_after(family):
    plain, weights = draw(family), {name: p.clone() for name, p in family.unet.state_dict().items()}
    with ablate(family, Where("cross", layers="mid")):
        assert not torch.equal(draw(family), plain)
    with pytest.raises(ZeroDivisionError), ablate(family, Where("heads")), scale(family, Where("values"), 2.0):
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), replace(family, Where("resid"), lambda x, tap: (_ for _ in ()).throw(KeyboardInterrupt)):
        draw(family)
    assert torch.equal(draw(family), plain) and not any(tap.active for tap in taps(family.unet).values())
    assert all(torch.equal(p, weights[name]) for name, p in family.unet.state_dict().items())


def test_taps_have_no_parameters_and_keep_the_fused_path(lab, monkeypatch):
    assert not any(name.endswith((".k", ".v", ".q")) for name in lab.unet.state_dict())
    attention = lab.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    calls = []
    fused = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, k, v: calls.append(1) or fused(q, k, v))
    with ablate(lab, Where("values", layers="mid", tokens=1)):
        draw(lab, steps=1)
    assert calls == [1], "values can be read without the explicit softmax"


def test_an_optimised_model_is_probed_like_any_other(lab):
    pytest.importorskip("torch.backends.mkldnn")
    fast = labkit.optimize(lab)
    for where in (Where("heads", heads=1), Where("keys", layers="mid", tokens=2), Where("cross", steps=1), Where("values"), Where("resid", layers="down.0")):
        with scale(lab, where, 0.5):
            want = draw(lab)
        with scale(fast, where, 0.5):
            got = draw(fast)
        assert torch.allclose(got, want, atol=1e-4), where
    assert torch.allclose(draw(fast), draw(lab), atol=1e-4), "remembered keys and values were changed for good"


@pytest.mark.parametrize("where, said", [
    (lambda: Where("neurons"), "no kind 'neurons' of activation; there are: heads, cross"),
    (lambda: Where(branch="both"), "use 'cond', 'uncond', or None"),
    (lambda: Where("heads", tokens="red"), "'heads' has no axis of the text's tokens; cross, keys, values"),
    (lambda: Where("resid", heads=1), "no heads"),
    (lambda: Where(layers="attic"), "fits 'attic'; there are: down.0.0.0, mid.0.0"),
    (lambda: Where(layers="mid", heads=4), "mid.0.0 has heads 0 to 3, not 4"),
    (lambda: Where(layers="down.0", heads=(0, 2)), "down.0.0.0 has heads 0 to 1"),
    (lambda: Where(layers="mid", heads=slice(9, None)), "heads 0 to 3"),
    (lambda: Where("keys", tokens=16), "tokens 0 .BOS. to 15, not 16"),
    (lambda: Where("keys", tokens="cube"), "'cube' is not in the prompt. Its words are: a, red, ball"),
    (lambda: Where(images=1), "images 0 to 0, not 1"),
    (lambda: Where(steps=4), "never took place: nothing was drawn in the block that has steps 4"),
    (lambda: Where(steps=slice(7, None), branch="cond"), "never took place"),
])  # fmt: skip
def test_what_is_not_there_is_named(lab, where, said):
    with pytest.raises(LabkitError, match=said):
        with ablate(lab, where()):
            draw(lab)


def test_a_branch_that_is_not_computed_and_a_block_without_drawing_are_errors(lab):
    with pytest.raises(LabkitError, match="never took place: .* branch 'uncond'"), ablate(lab, Where(branch="uncond")):
        draw(lab, guidance=1.0)
    with pytest.raises(LabkitError, match="never took place"), ablate(lab, Where()):
        pass
    with pytest.raises(LabkitError, match="Nothing was captured"), capture(lab, Where(steps=9)):
        draw(lab)
    with pytest.raises(LabkitError, match="use 'zero' or 'mean'"), ablate(lab, Where(), by="median"):
        pass


def test_the_network_called_directly_is_edited_where_nothing_is_asked_of_a_run(lab):
    x, c = torch.randn(1, 4, 8, 8), lab.encode_text(PROMPT)
    with torch.no_grad(), ablate(lab, Where("resid", layers="up.1")):
        assert (lab.unet(x, 5, c) - lab.unet(x + 1, 5, c)).abs().max() < 1e-6
    with pytest.raises(LabkitError, match="outside of a generation"), ablate(lab, Where(steps=0)):
        lab.unet(x, 5, c)


def test_recording_sees_what_was_changed(lab):
    with scale(lab, Where("cross", tokens="red", branch="cond"), 0.0), record(lab) as trace:
        draw(lab)
    assert not trace.heatmap("red").map.any() and trace.heatmap("ball").map.any()


# ---- tables ------------------------------------------------------------------------------------------------------


def test_recovery_is_zero_for_the_corrupt_and_one_for_the_clean():
    clean, corrupt = torch.tensor([0.9, 5.0]), torch.tensor([0.1, -5.0])
    assert torch.equal(recovery(clean, clean, corrupt), torch.ones(2)) and torch.equal(recovery(corrupt, clean, corrupt), torch.zeros(2))
    assert torch.allclose(recovery(torch.tensor([0.3, 0.0]), clean, corrupt), torch.tensor([0.25, 0.5]))  # (patched - corrupt), not (clean - patched)
    with pytest.raises(LabkitError, match="measure the same"):
        recovery(clean, clean, clean)


def test_without_a_metric_the_way_from_corrupt_to_clean_is_measured(lab):
    good, bad = (lab.generate(prompt, steps=2, seed=[0, 1], progress=False) for prompt in (["a red ball"] * 2, ["a blue cube"] * 2))
    score = measure(good, bad, None)
    assert torch.allclose(score(good), torch.ones(2).double()) and torch.allclose(score(bad), torch.zeros(2).double(), atol=1e-9)
    between = type(good)(good.images, 0.25 * good.latents + 0.75 * bad.latents, {}, "")
    assert torch.allclose(score(between), torch.full((2,), 0.25).double(), atol=1e-6)


def test_ablate_heads_is_each_heads_own_ablation(lab):
    table = ablate_heads(lab, PROMPT, seeds=(0, 5), steps=2, progress=False)
    assert table.rows == ("down.0.0.0", "mid.0.0", "up.1.0.0", "up.1.1.0") and table.columns == ("0", "1", "2", "3")
    plain = draw(lab, PROMPT, seed=[0, 5], steps=2, guidance=None)
    with ablate(lab, Where("heads", layers="mid", heads=3)):
        without = draw(lab, PROMPT, seed=[0, 5], steps=2, guidance=None)
    want = ((without - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)).mean()
    assert table.at("mid.0.0", "3") == pytest.approx(float(want), rel=1e-5) and float(want) > 0
    missing = table.values.isnan()
    heads = [lab.unet.get_submodule(tap.rpartition(".")[0]).num_heads for tap in taps(lab.unet, "*.attn2.heads")]
    assert [int(4 - row.sum()) for row in missing] == heads, "a head that is not there was measured"


def test_a_metric_says_what_is_lost(lab):
    brightness = lambda g: [sum(image.convert("L").tobytes()) for image in g.images]  # noqa: E731
    table = ablate_heads(lab, PROMPT, seeds=(0,), where=Where(layers="mid"), metric=brightness, steps=1, progress=False)
    plain = lab.generate(PROMPT, seed=0, steps=1, progress=False)
    with ablate(lab, Where(layers="mid", heads=0)):
        without = lab.generate(PROMPT, seed=0, steps=1, progress=False)
    assert table.values[0, 0] == pytest.approx(brightness(plain)[0] - brightness(without)[0])


def test_patch_grid_recovers_all_where_all_is_patched(lab):
    table = patch_grid(lab, OTHER, PROMPT, Where("resid"), bins=2, seeds=(0, 1), steps=4, progress=False)
    assert table.rows == ("down.0", "down.1", "mid", "up.0", "up.1", "all layers") and table.columns == ("0 to 1", "2 to 3", "all")
    assert table.at("up.1", "all") == pytest.approx(1, abs=1e-4), "the last residual stream is all that the last layer reads"
    assert table.at("all layers", "all") == pytest.approx(1, abs=1e-4) and abs(table.at("up.1", "0 to 1") - 1) > 0.01
    with capture(lab, Where("resid")) as source:
        good = lab.generate(OTHER, seed=[0, 1], steps=4, progress=False)
    bad = lab.generate(PROMPT, seed=[0, 1], steps=4, progress=False)
    with patch(lab, Where("resid", layers="mid", steps=slice(2, 4)), source):
        got = lab.generate(PROMPT, seed=[0, 1], steps=4, progress=False)
    assert table.at("mid", "2 to 3") == pytest.approx(float(measure(good, bad, None)(got).mean()), abs=1e-5)


@pytest.mark.parametrize("call, said", [
    (lambda lab: ablate_heads(lab, PROMPT, seeds=()), "no seeds"),
    (lambda lab: ablate_heads(lab, PROMPT, where=Where("resid")), "kind 'heads' or 'self heads'"),
    (lambda lab: ablate_heads(lab, PROMPT, where=Where(heads=0)), "leave heads= out"),
    (lambda lab: patch_grid(lab, PROMPT, OTHER, bins=0), "1 to 4 ranges"),
    (lambda lab: patch_grid(lab, PROMPT, OTHER, Where("values", steps=0)), "leave steps= out"),
    (lambda lab: patch_grid(lab, PROMPT, PROMPT, Where("values", layers="mid"), bins=1, seeds=(0,), progress=False), "measure the same"),
])  # fmt: skip
def test_grids_that_cannot_be_are_refused(lab, call, said):
    with pytest.raises(LabkitError, match=said):
        call(lab)


def test_a_table_prints_and_draws_itself():
    table = Table(torch.tensor([[0.1, float("nan")], [0.25, -0.5]]), ("up.1", "mid"), ("0", "1"), ("layer", "head"), "change", "Heads")
    assert str(table).splitlines() == ["Heads (change; columns: head)", "layer      0       1", "up.1   0.100", "mid    0.250  -0.500"]
    figure = table.plot()
    assert "2 rows (up.1, mid) by 2 columns (0, 1)" in figure.labkit_alt and "0.25, mid with 0" in figure.labkit_alt
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.10", "0.25", "-0.50"], "what is missing has no number"
    with pytest.raises(LabkitError, match="there are: 0, 1"):
        table.at("mid", "2")
    with pytest.raises(LabkitError, match="2 rows and 1 columns"):
        Table(torch.zeros(2, 2), ("a", "b"), ("c",), ("x", "y"), "", "")
