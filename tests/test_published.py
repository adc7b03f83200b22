"""Published heat maps against small re-derivations of the published code, from raw attention; and words that the prompt does not have."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import build

import labkit
from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.models.config import UNetConfig
from labkit.models.tokenizer import Tokenizer, build_vocabulary
from labkit.models.unet import UNet
from labkit.probes.open_vocabulary import open_vocabulary
from labkit.probes.published import daam, expanded, prompt_to_prompt
from labkit.probes.record import record
from labkit.tap import listen
from tiny import strong

PROMPT = "a blue cube left of a red ball"
DRAW = {"progress": False, "height": 32, "width": 32, "steps": 3, "seed": [1, 2]}


@pytest.fixture(scope="module")
def lab() -> LatentDiffusion:
    """Four levels, as Stable Diffusion has them: 16x16 latents, attention at 16, 8, 4 and in the middle at 2, so that DAAM's factor 8 occurs."""
    lab = build()
    (lab.unet,) = strong(UNet(UNetConfig((16, 32, 32, 32), (True, True, True, False), (2, 2, 4, 4), 1, 48, norm_num_groups=8, sample_size=16)))
    with torch.no_grad():
        for name, p in lab.unet.named_parameters():
            p.mul_(8 if "attn2.to_q" in name else 1)  # attention far from uniform
    lab.tokenizer, lab.vocabulary = Tokenizer(*build_vocabulary("a blue left of red ball".split()), max_length=16), frozenset()  # "cube" in pieces
    return lab


@pytest.fixture(scope="module")
def recorded(lab):
    """A trace of sums, and by hand the raw maps of the second picture's conditional row: {layer: [step][head, N, token]}."""
    raw: dict = {}
    with record(lab, states="queries") as trace, listen(lab.unet, {"*.attn2.probs": lambda x, name: raw.setdefault(name, []).append(x[3].clone())}):
        lab.generate(PROMPT, **DRAW)
    return trace, raw


def test_prompt_to_prompt_is_what_the_published_code_computes(recorded):
    trace, raw = recorded
    # AttentionStore sums over steps and divides; aggregate_attention gathers every head of every layer of one size and takes one mean
    store = {name: sum(steps) / len(steps) for name, steps in raw.items()}
    gathered = torch.cat([m.reshape(-1, 8, 8, 16) for name, m in store.items() if m.shape[1] == 64 and ("up" in name or "down" in name)])
    assert len(gathered) == 2 * 3  # down once, up twice, two heads
    aggregated = gathered.sum(0) / gathered.shape[0]  # (8, 8, token)
    red = trace.run.tokens("red", 1)[0]
    shown = aggregated[:, :, red] / aggregated[:, :, red].max()
    ours = prompt_to_prompt(trace, "red", 8, image=1)
    assert ours.map.shape == (8, 8) and (ours.map - shown).abs().max() < 1e-6 and ours.map.max() == 1
    assert ours.averages == "mean over all steps, 3 layers of 8x8 and all heads, divided by its maximum"
    pieces = aggregated[:, :, list(trace.run.tokens("cube", 1))].sum(-1)
    assert (prompt_to_prompt(trace, "cube", 8, image=1).map - pieces / pieces.max()).abs().max() < 1e-6
    # twins: another token, another picture, all layers, the other resolution
    assert (ours.map - aggregated[:, :, red + 1] / aggregated[:, :, red + 1].max()).abs().max() > 1e-2
    assert (ours.map - prompt_to_prompt(trace, "red", 8, image=0).map).abs().max() > 1e-2
    with pytest.raises(LabkitError, match="No layer has the resolution 5; there are 16x16"):
        prompt_to_prompt(trace, "red", 5)


def published_daam(raw: dict, latent: int, read: int) -> torch.Tensor:
    """compute_global_heat_map as published, up to the size of the latents: one dictionary of sums over steps, one stack of upsampled maps."""
    sums: dict = {}
    for name, steps in raw.items():
        if "mid_block" in name:
            continue
        for probs in steps:
            for head, m in enumerate(probs):  # (N, token)
                side = int(math.sqrt(m.shape[0]))
                factor = int(math.sqrt(latent**2 // m.shape[0]))
                if factor == 8:
                    continue
                key = factor, name, head
                sums[key] = sums.get(key, 0) + m.T.reshape(-1, side, side)
    every = torch.stack([F.interpolate(m[:, None], size=(latent, latent), mode="bicubic").clamp(min=0) for m in sums.values()])
    return every.mean(0)[:read, 0]  # (token, latent, latent)


def test_daam_is_what_the_published_code_computes(recorded):
    trace, raw = recorded
    read = len(trace.run.tokenizer.encode(PROMPT))
    maps = published_daam(raw, 16, read)
    for word in ("red", "cube", "a"):
        tokens = list(trace.run.tokens(word, 1))
        ours = daam(trace, word, image=1)
        assert (ours.map - maps[tokens].mean(0)).abs().max() < 1e-5, word
        share = maps / (maps[1:-1].sum(0, keepdim=True) + 1e-6)
        assert (daam(trace, word, normalise=True, image=1).map - share[tokens].mean(0)).abs().max() < 1e-5
        # DAAM's own expand_as: bicubic to the picture, from 0 to 1
        large = F.interpolate(maps[tokens].mean(0)[None, None], size=(32, 32), mode="bicubic")[0, 0]
        assert (expanded(ours, 32, 32) - (large - large.min()) / (large.max() - large.min() + 1e-8)).abs().max() < 1e-5
        assert (expanded(ours, 32, 32, absolute=True) - large).abs().max() < 1e-5
    assert len(trace.run.tokens("cube", 1)) > 1
    # twins: pieces added, bilinear, the middle block with it
    cube = daam(trace, "cube", image=1).map
    assert (cube - maps[list(trace.run.tokens("cube", 1))].sum(0)).abs().max() > 1e-3
    assert (cube / 3 - trace.heatmap("cube", image=1).map / len(trace.run.tokens("cube", 1))).abs().max() > 1e-3


def test_daams_factor_eight_is_left_out(recorded):
    trace, _ = recorded
    from labkit.probes.published import factor

    assert sorted({factor(trace.run, layer) for layer in trace.layers()}) == [1, 2, 4, 8]
    assert "8 layers" not in daam(trace, "red").averages and "9 layers" in daam(trace, "red").averages  # (1 + 2) at each of 16, 8 and 4


def test_daam_needs_heads_and_both_are_drawn_in_their_units(lab):
    with record(lab, keep="steps") as trace:
        lab.generate(PROMPT, **DRAW)
    with pytest.raises(LabkitError, match="each head by itself"):
        daam(trace, "red")
    m = prompt_to_prompt(trace, "red", 8)
    assert "“red” (1, " in m.plot().labkit_alt
    from labkit import plots

    with pytest.raises(LabkitError, match="different units"):
        plots.word_heatmaps(trace.picture(), [m, trace.heatmap("red")])


# --- words that the prompt does not have -----------------------------------------------------------------------------


def test_stored_queries_with_the_prompt_itself_are_the_recorded_maps(recorded, lab):
    trace, _ = recorded
    for word in ("red", "cube", "left of", "EOS"):
        for image in (0, 1):
            assert (open_vocabulary(trace, lab, PROMPT, word, image).map - trace.heatmap(word, image).map).abs().max() < 1e-5
    one = open_vocabulary(trace, lab, PROMPT, "red", layers="mid")
    assert (one.map - trace.heatmap("red", layers="mid").map).abs().max() < 1e-5


def test_any_word_can_be_asked_about(recorded, lab):
    trace, _ = recorded
    other = open_vocabulary(trace, lab, "a dog", "dog", image=1)  # spelled in pieces, not in the prompt
    assert other.map.shape == (16, 16) and "words of “a dog”" in other.averages and len(other.tokens) > 1
    c = lab.encode_text("a dog")
    by_hand = []
    for layer in trace.layers(kind="queries"):
        attention, store = lab.unet.get_submodule(layer), trace.stores["queries", layer, "cond"]
        q = store.values[:, 1].flatten(2, 3)  # (step, head, N, d)
        k = attention.to_k(c).view(16, attention.num_heads, -1).permute(1, 2, 0)  # (head, d, L)
        m = ((q @ k) / math.sqrt(q.shape[-1])).softmax(-1)[..., list(other.tokens)].sum(-1).mean((0, 1))  # (N,)
        side = int(math.sqrt(len(m)))
        by_hand.append(F.interpolate(m.view(1, 1, side, side), size=(16, 16), mode="bilinear")[0, 0])
    assert (other.map - sum(by_hand).detach() / len(by_hand)).abs().max() < 1e-5
    with pytest.raises(LabkitError, match="'cat' is not in the prompt. Its words are: a, dog"):
        open_vocabulary(trace, lab, "a dog", "cat")


def test_queries_have_to_be_recorded(lab):
    with record(lab) as trace:
        lab.generate(PROMPT, **DRAW)
    with pytest.raises(LabkitError, match="states='queries'"):
        open_vocabulary(trace, lab, "a dog", "dog")


def test_a_saved_trace_answers_too(recorded, lab, tmp_path):
    trace, _ = recorded
    again = labkit.load_trace(labkit.save_trace(trace, tmp_path / "trace"))
    assert torch.equal(open_vocabulary(again, lab, "a dog", "dog").map, open_vocabulary(trace, lab, "a dog", "dog").map)
    assert torch.equal(daam(again, "red").map, daam(trace, "red").map)
