"""probes: recorded sums are the sums, of the right rows, and recording changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import build
from torch import nn

from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.models.tokenizer import Tokenizer, build_vocabulary
from labkit.probes.heatmap import HeatMap, average
from labkit.probes.record import record
from labkit.probes.sweep import sweep_guidance
from labkit.probes.trajectory import decode_trajectory, given
from labkit.tap import listen, taps

PROMPTS = ["a red ball", "a blue cube left of a red ball"]
CROSS = "*.attn2.probs"


@pytest.fixture(scope="module")
def lab() -> LatentDiffusion:
    return build()


def draw(lab, *args, **kwargs):
    return lab.generate(*args, **{"progress": False, "height": 16, "width": 32, "steps": 3, **kwargs})  # not square


def attached(lab) -> bool:
    return any(tap.active for tap in taps(lab.unet).values()) or "steps" in vars(lab)


# --- sums ------------------------------------------------------------------------------------------------------------


def known(shape, name: str, i: int, seed: int) -> torch.Tensor:
    """Attention (rows, heads, N, tokens) that is different everywhere, the same for the same layer, step and seed."""
    generator = torch.Generator().manual_seed(hash((seed, len(name), name.count("1"), i)) % 2**31)
    return torch.randn(shape, generator=generator).softmax(-1)


@pytest.mark.parametrize("guidance", [5.0, 1.0, 0.0])
def test_sums_of_known_attention_in_the_right_rows(lab, guidance):
    """Every row's attention is put there by the test; what is recorded must be its mean over steps, place by place."""
    B, seen = 2, {}

    def put(probs, name):
        layout = lab.layout
        new = torch.cat([
            torch.stack([known(probs.shape[1:], name, layout.i, 10 * (branch == "cond") + image) for image in range(B)])
            for branch in layout.branches
        ])  # fmt: skip
        for row, probability in enumerate(new):
            key = (name.removesuffix(".probs"), layout.branches[row // B], row % B)
            seen.setdefault(key, []).append(probability)
        return new

    with listen(lab.unet, {CROSS: put}), record(lab) as trace:
        draw(lab, PROMPTS, guidance=guidance)
    branches = {5.0: {"uncond", "cond"}, 1.0: {"cond"}, 0.0: {"uncond"}}[guidance]
    assert set(trace.branches) == branches == {branch for _, branch, _ in seen}
    sides = set()
    for (layer, branch, image), steps in seen.items():
        got = trace.attention(layer=layer, image=image, branch=branch).values  # (head, y, x, token)
        assert len(steps) == 3 and got.shape[2] == 2 * got.shape[1]
        sides.add(tuple(got.shape[1:3]))
        assert (got.flatten(1, 2) - sum(steps) / 3).abs().max() < 1e-6
        assert torch.equal(trace.attention(layer=layer, head=1, image=image, branch=branch).values, got[1])
    assert sides == {(8, 16), (4, 8)}


def test_the_stream_is_the_raw_recording_summed(lab):
    raw = {}
    with record(lab) as trace, listen(lab.unet, {CROSS: lambda probs, name: raw.setdefault(name, []).append(probs)}):
        draw(lab, PROMPTS, seed=[1, 2])
    for name, calls in raw.items():
        layer = name.removesuffix(".probs")
        mean = torch.stack(calls).mean(0)  # (4 rows, head, N, token)
        for row, (branch, image) in enumerate([("uncond", 0), ("uncond", 1), ("cond", 0), ("cond", 1)]):
            got = trace.attention(layer=layer, image=image, branch=branch).values
            assert (got.flatten(1, 2) - mean[row]).abs().max() < 1e-6
            assert (got.sum(-1) - 1).abs().max() < 1e-5  # shares of all tokens
    # twins that would go unnoticed if these were alike: the other branch, the other picture
    a = trace.attention(layer="mid*").values
    assert (a - trace.attention(layer="mid*", branch="uncond").values).abs().max() > 1e-3
    assert (a - trace.attention(layer="mid*", image=1).values).abs().max() > 1e-3


def test_an_image_recorded_in_a_batch_is_recorded_as_alone(lab):
    with record(lab) as together:
        draw(lab, PROMPTS, seed=[1, 2])
    with record(lab) as alone:
        draw(lab, PROMPTS[1], seed=2)
    for layer in together.layers():
        assert (together.attention(layer=layer, image=1).values - alone.attention(layer=layer).values).abs().max() < 1e-4


def test_memory_does_not_grow_with_steps(lab):
    def numbers(steps):
        with record(lab) as trace:
            draw(lab, PROMPTS[0], steps=steps)
        return sum(s.values.numel() for s in trace.stores.values())

    layers_heads_tokens = (2 * 8 * 16 + 2 * 8 * 16 * 2 + 4 * 4 * 8) * 16
    assert numbers(1) == numbers(5) == 2 * layers_heads_tokens  # two branches


def test_half_precision_is_added_up_in_float32():
    lab = build()
    lab.unet.to(torch.bfloat16)
    with record(lab) as trace:
        draw(lab, PROMPTS[0], steps=30)
    assert all(s.values.dtype == torch.float32 for s in trace.stores.values())
    assert (trace.attention(layer="mid*").values.sum(-1) - 1).abs().max() < 0.01  # sums of 30 in bfloat16 would be off by 0.1


# --- heat maps -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(lab):
    with record(lab) as trace:
        draw(lab, PROMPTS, negative_prompt=["blue", "cube"])
    return trace


def by_hand(trace, tokens, image=0, branch="cond", layers=None):
    maps = []
    for layer in layers or trace.layers():
        m = trace.attention(layer=layer, image=image, branch=branch).values[..., tokens].sum(-1).mean(0)
        maps.append(F.interpolate(m[None, None], size=(8, 16), mode="bilinear", align_corners=False)[0, 0])
    return torch.stack(maps).mean(0)


def test_a_heat_map_is_the_mean_over_steps_heads_and_layers(trace):
    heatmap = trace.heatmap("cube", image=1)
    assert heatmap.tokens == (3,) and heatmap.map.shape == (8, 16)
    assert (heatmap.map - by_hand(trace, [3], 1)).abs().max() < 1e-6
    for twin in (by_hand(trace, [2], 1), by_hand(trace, [3], 0), by_hand(trace, [3], 1, "uncond")):  # off by one, other rows
        assert (heatmap.map - twin).abs().max() > 1e-4
    assert heatmap.averages == "mean over 3 steps, 4 layers and all heads; the shares of all 16 tokens sum to 1"


def test_occurrences_are_added(trace):
    both, first, second = (trace.heatmap("a", image=1, occurrence=o) for o in (None, 0, 1))
    assert (both.tokens, first.tokens, second.tokens) == ((1, 6), (1,), (6,))
    assert (both.map - first.map - second.map).abs().max() < 1e-6


def test_pieces_of_a_word_are_added():
    lab = build()
    lab.tokenizer, lab.vocabulary = Tokenizer(*build_vocabulary(["a", "ball"]), max_length=16), frozenset()
    with record(lab) as trace:
        draw(lab, "a bed")
    heatmap = trace.heatmap("bed")
    assert len(heatmap.tokens) == 3
    assert (heatmap.map - by_hand(trace, list(heatmap.tokens))).abs().max() < 1e-6


def test_layers_and_heads_can_be_chosen(trace):
    middle = trace.heatmap("red", layers="mid_block*")
    assert (middle.map - by_hand(trace, [2], layers=trace.layers("mid_block*"))).abs().max() < 1e-6
    heads = [trace.heatmap("red", layers="mid_block*", head=h) for h in range(4)]
    assert (middle.map - sum(h.map for h in heads) / 4).abs().max() < 1e-6
    assert "1 layer and head 3" in heads[3].averages


def test_all_tokens_together_are_everything(trace):
    pieces = [trace.heatmap(w, image=1).map for w in ("BOS", "EOS", "a", "blue", "cube", "left", "of", "red", "ball")]
    padding = by_hand(trace, list(range(10, 16)), 1)
    assert (sum(pieces) + padding - 1).abs().max() < 1e-5


def test_one_heat_map_for_each_word_in_reading_order(trace):
    assert [h.word for h in trace.heatmaps(image=1)] == "a blue cube left of red ball".split()
    assert [h.word for h in trace.heatmaps()] == "a red ball".split()


def test_the_other_branch_speaks_of_the_negative_prompt(trace):
    assert [h.word for h in trace.heatmaps(image=1, branch="uncond")] == ["cube"]
    assert (trace.heatmap("cube", image=1, branch="uncond").map - by_hand(trace, [1], 1, "uncond")).abs().max() < 1e-6
    with pytest.raises(LabkitError, match="'red' is not in the prompt"):
        trace.heatmap("red", branch="uncond")


def test_upsampling_keeps_places_and_shares():
    corner = torch.zeros(2, 2, 3)
    corner[:, 0, 2] = 1  # the upper right place of both heads
    up = average([corner], (4, 6))
    assert up.argmax() == 5 and up[0, 5] == 1 and up[-1, 0] == 0
    assert torch.allclose(average([torch.full((2, 2, 3), 0.3), torch.full((4, 1, 2), 0.1)], (4, 6)), torch.tensor(0.2))
    assert HeatMap("x", up, "").resized(8, 12).shape == (8, 12)


@pytest.mark.parametrize(
    "ask, says",
    [
        (lambda t: t.heatmap("dog"), "'dog' is not in the prompt. Its words are: a, red, ball"),
        (lambda t: t.heatmap("red", image=2), "images 0 to 1"),
        (lambda t: t.heatmap("red", branch="edit"), "there is: uncond, cond"),
        (lambda t: t.heatmap("red", layers="attn1"), "there are: down_blocks.0"),
        (lambda t: t.heatmap("red", head=2), "heads 0 to 1"),
        (lambda t: t.attention(), "fits 4 layers"),
        (lambda t: t.attention(layer="mid*", head=-1), "heads 0 to 3"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(trace, ask, says):
    with pytest.raises(LabkitError) as error:
        ask(trace)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_without_guidance_there_is_one_branch(lab):
    with record(lab) as trace:
        draw(lab, PROMPTS[0], guidance=1)
    assert trace.branches == ("cond",) and trace.heatmap("red").map.shape == (8, 16)
    with pytest.raises(LabkitError, match="branch 'uncond' was not computed; there is: cond"):
        trace.attention(layer="mid*", branch="uncond")


# --- recording changes nothing ---------------------------------------------------------------------------------------


def test_the_picture_is_the_same_and_nothing_stays(lab):
    plain = draw(lab, PROMPTS).latents
    with record(lab, latents=True):
        recorded = draw(lab, PROMPTS).latents
    assert (recorded - plain).abs().max() < 1e-4 * plain.abs().max()
    assert not attached(lab) and torch.equal(draw(lab, PROMPTS).latents, plain)


@pytest.mark.parametrize("how", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_after_an_error_and_what_was_recorded_is_there(lab, how):
    plain = draw(lab, PROMPTS[0]).latents
    with pytest.raises(how):
        with record(lab, latents=True) as trace:
            for step in lab.steps(PROMPTS[0], steps=5):
                if step.i == 1:
                    raise how
    assert not attached(lab) and torch.equal(draw(lab, PROMPTS[0]).latents, plain)
    assert len(trace.steps) == 2 and trace.heatmap("red").averages.startswith("mean over 2 steps")


def test_heuns_two_calls_a_step_are_averaged_and_counted_as_one_step(lab):
    calls = []
    with record(lab) as trace, listen(lab.unet, {"*.attn2.probs": lambda probs, name: calls.append((name, probs.clone()))}):
        list(lab.steps(PROMPTS[0], steps=3, sampler="heun"))
    layer = trace.layers()[0]
    seen = [probs for name, probs in calls if name.removesuffix(".probs") == layer]
    assert len(seen) == 5 and trace.heatmap("red").averages.startswith("mean over 3 steps")
    mean = torch.stack(seen).mean(0)[1]  # the rows are uncond, cond: (head, N, token)
    torch.testing.assert_close(trace.attention(layer=layer).values.flatten(1, 2), mean, rtol=1e-5, atol=1e-6)



def test_a_recording_inside_a_recording(lab):
    with record(lab) as outer:
        with record(lab) as inner:
            draw(lab, PROMPTS[0])
        draw(lab, PROMPTS[1])
    assert not attached(lab) and (len(outer.runs), len(inner.runs)) == (2, 1)
    assert torch.equal(outer.runs[0].heatmap("red").map, inner.heatmap("red").map)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_each_generation_is_a_run_and_the_latest_is_asked(lab):
    with record(lab) as trace:
        draw(lab, PROMPTS[0])
        draw(lab, PROMPTS[1])
    assert len(trace.runs) == 2
    assert trace.heatmap("cube").map.equal(trace.runs[1].heatmap("cube").map)
    with record(lab) as alone:
        draw(lab, PROMPTS[0])
    assert alone.heatmap("red").map.equal(trace.runs[0].heatmap("red").map)


def test_interleaved_generations_are_kept_apart(lab):
    with record(lab) as trace:
        for _ in zip(lab.steps(PROMPTS[0], steps=3), lab.steps(PROMPTS[1], steps=3)):
            pass
    for run, prompt in zip(trace.runs, PROMPTS, strict=True):
        with record(lab) as alone:
            list(lab.steps(prompt, steps=3))
        assert run.heatmap("red").map.equal(alone.heatmap("red").map)


def test_nothing_drawn_or_not_told_apart_is_an_error(lab):
    with record(lab) as trace:
        with pytest.raises(LabkitError, match="The prompt is empty"):
            draw(lab, " ")
    with pytest.raises(LabkitError, match="Nothing was recorded"):
        trace.heatmaps()
    begun = lab.steps(PROMPTS[0], steps=3)
    for call in (lambda: next(begun), lambda: lab.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 16, 48))):
        with pytest.raises(LabkitError, match="outside of a generation that began in this block"), record(lab):
            call()
    assert not attached(lab)


def test_zero_sites_and_nothing_to_record_are_errors(lab):
    blind = copy.copy(lab)
    blind.unet = nn.Linear(1, 1)
    for call in (lambda: record(blind), lambda: record(lab, attention=None), lambda: record(lab, attention="both")):
        with pytest.raises(LabkitError), call():
            raise AssertionError("never reached")
    assert "steps" not in vars(blind) and not attached(lab)


# --- latents, trajectory, sweep --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_recorded_steps_are_the_steps(lab, sampler):
    arguments = dict(steps=4, seed=[3, 4], sampler=sampler)
    plain = list(lab.steps(PROMPTS, **arguments))
    with record(lab, attention=None, latents=True) as trace:
        list(lab.steps(PROMPTS, **arguments))
    for a, b in zip(trace.steps, plain, strict=True):
        assert (a.i, a.t) == (b.i, b.t)
        assert torch.equal(a.x, b.x) and torch.equal(a.x0, b.x0) and torch.equal(a.eps, b.eps)
    with pytest.raises(LabkitError, match="No attention was recorded"):
        trace.heatmaps()
    # the latent a step was given is the one the step before arrived at; the first was given the noise
    noise = torch.cat([torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    for step, x_t in zip(plain, [noise] + [step.x for step in plain]):
        assert (given(step, lab) - x_t).abs().max() < 1e-3 * x_t.abs().max()


def test_a_trajectory_is_decoded_where_it_was_asked(lab):
    steps = list(lab.steps(PROMPTS, steps=7))
    way = decode_trajectory(lab, steps, picks=3, image=1)
    assert way.t == tuple(steps[i].t for i in (0, 3, 6)) and len(way.x_t) == len(way.x0) == 3
    assert decode_trajectory(lab, steps, picks=[-1, 0], image=1).t == (steps[0].t, steps[6].t)
    assert decode_trajectory(lab, steps, picks=50).t == tuple(s.t for s in steps)
    assert decode_trajectory(lab, steps, picks=1).t == (steps[6].t,)
    from labkit.generation import to_pil

    assert way.x0[2].tobytes() == to_pil(lab.decode(steps[6].x0[1:]))[0].tobytes()
    assert way.x_t[2].tobytes() == to_pil(lab.decode(given(steps[6], lab)[1:]))[0].tobytes()
    assert way.x_t[0].tobytes() != way.x0[0].tobytes()


@pytest.mark.parametrize("bad", [dict(steps=[]), dict(picks=0), dict(picks=[9]), dict(picks=[]), dict(image=5)])
def test_bad_trajectories_are_one_line(lab, bad):
    steps = bad.pop("steps", None)
    steps = list(lab.steps(PROMPTS[0], steps=2)) if steps is None else steps
    with pytest.raises(LabkitError):
        decode_trajectory(lab, steps, **bad)


def test_a_sweep_has_scales_across_and_seeds_down(lab):
    sweep = sweep_guidance(lab, PROMPTS[0], scales=(1, 4), seeds=(5, 6, 7), steps=2)
    assert (sweep.scales, sweep.seeds) == ((1.0, 4.0), (5, 6, 7)) and [len(row) for row in sweep.images] == [2, 2, 2]
    for row, seed in enumerate((5, 6, 7)):
        for column, w in enumerate((1, 4)):
            alone = lab.generate(PROMPTS[0], steps=2, seed=seed, guidance=w, progress=False).image
            near = [abs(a - b) for a, b in zip(alone.tobytes(), sweep.images[row][column].tobytes(), strict=True)]
            assert max(near) <= 1  # rounding
    for bad in (dict(scales=[]), dict(seeds=[]), dict(scales=[float("nan")])):
        with pytest.raises(LabkitError):
            sweep_guidance(lab, PROMPTS[0], **bad)
