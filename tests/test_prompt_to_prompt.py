"""Prompt-to-Prompt: what it draws is what two runs one after the other draw by the definition; nothing else, and nothing is left behind."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import SD15_UNET, SDXL_UNET, write

import labkit
import tiny
from labkit.checkpoint import load_pipeline
from labkit.diffusion import LatentDiffusion
from labkit.editing import control
from labkit.editing.alignment import align
from labkit.editing.blend import Blend, mask
from labkit.editing.prompt_to_prompt import Run, edit
from labkit.errors import LabkitError
from labkit.models.formats import unet_config
from labkit.models.unet import UNet
from labkit.probes.words import find
from labkit.samplers import SAMPLERS
from labkit.tap import listen, taps

FAMILIES = ("sd15", "sd21", "sdxl")
SOURCE, TARGET, LONGER = "a red ball", "a blue cube", "a red ball left of a cube"
H, W = 32, 16  # latents of the narrow models: 16 x 8; the tiny one's picture is as large as its own


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    made = {family: LatentDiffusion(**vars(load_pipeline(write(family, tmp_path_factory.mktemp("p2p") / "m")))) for family in FAMILIES}
    return {**made, "tiny": tiny.build()}


def run(lab, source=SOURCE, target=TARGET, **asked):
    size = {} if lab.name == "tiny" else {"height": H, "width": W}
    return edit(lab, source, target, **{**size, "steps": 4, "guidance": 5.0, "progress": False, **asked})


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def one_after_the_other(lab, target=TARGET, cross=range(0, 3), self_=range(0, 2), seed=0, swap=False, normalise=True, branches=("cond",), all_layers=False, **asked):
    """The definition, spelled out: draw the source and keep its attention of every layer and call; draw the target with it put in."""
    prompts = (target, SOURCE) if swap else (SOURCE, target)
    found = align(lab.texts[0][1], *prompts)
    options = {**({} if lab.name == "tiny" else {"height": H, "width": W}), "steps": 4, "guidance": 5.0, "seed": seed, "progress": False, **asked}
    kept: dict[tuple, list] = {}

    def keep(probs, name):
        kept.setdefault((name, lab.layout.i), []).append(probs.clone())

    def put(probs, name):
        i = lab.layout.i
        source = kept[name, i].pop(0)
        out = probs.clone()
        for branch in branches:
            row = lab.layout.branches.index(branch)
            if name.endswith("attn2.probs") and i in cross:
                mapped = source[row] @ found.matrix * (1 - found.own) + probs[row] * found.own
                out[row] = mapped / mapped.sum(-1, keepdim=True) if normalise else mapped
            if name.endswith("attn1.probs") and i in self_ and (all_layers or probs.shape[2] <= 256):
                out[row] = source[row]
        return out

    with listen(lab.unet, {"*.attn?.probs": keep}):
        lab.generate(prompts[0], **options)
    with listen(lab.unet, {"*.attn?.probs": put}):
        return lab.generate(prompts[1], **options).latents


@pytest.mark.parametrize("family", [*FAMILIES, "tiny"])
@pytest.mark.parametrize("target", [TARGET, LONGER])
def test_as_two_runs_one_after_the_other(family, target, labs):
    lab = labs[family]
    drawn = run(lab, target=target, cross=0.75, self_attention=0.5, seed=[3, 0])
    assert apart(drawn.latents[1, 1:], one_after_the_other(lab, target)) < 1e-5
    plain = lab.generate(SOURCE, seed=[3, 0], steps=4, guidance=5.0, height=None if family == "tiny" else H, width=None if family == "tiny" else W, progress=False)
    assert apart(drawn.latents[0], plain.latents) < 1e-4
    assert [image.size for image in drawn.sources] == [image.size for image in drawn.edited[0]] == [plain.image.size] * 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_every_sampler(sampler, labs):
    """Also those that call the network twice in a step, remember, or add noise (both sides get the same)."""
    lab = labs["sd15"]
    drawn = run(lab, cross=0.75, self_attention=0.5, sampler=sampler)
    assert apart(drawn.latents[1], one_after_the_other(lab, sampler=sampler)) < 1e-3
    same = run(lab, target=SOURCE, sampler=sampler)
    assert torch.equal(same.latents[0], same.latents[1])


TWINS = {
    "source and target swapped": dict(swap=True), "one step of cross-attention more": dict(cross=range(0, 4)), "one less": dict(cross=range(0, 2)),
    "self-attention a step longer": dict(self_=range(0, 3)), "no self-attention": dict(self_=()), "cross-attention a step late": dict(cross=range(1, 4)),
    "the unconditional branch too": dict(branches=("uncond", "cond")), "the wrong branch": dict(branches=("uncond",)), "another seed": dict(seed=1),
}  # fmt: skip


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_wrong_twins_draw_something_else(twin, family, labs):
    drawn = run(labs[family], cross=0.75, self_attention=0.5)
    assert apart(drawn.latents[1], one_after_the_other(labs[family], **TWINS[twin])) > 1e-4


def test_missing_normalisation_draws_something_else(labs):
    drawn = run(labs["tiny"], target=LONGER, cross=0.75, self_attention=0.5)
    assert apart(drawn.latents[1], one_after_the_other(labs["tiny"], LONGER, normalise=False)) > 1e-3


@pytest.mark.parametrize("family", [*FAMILIES, "tiny"])
def test_the_same_prompt_draws_the_same_bits(family, labs):
    by_word = {"ball": (0.2, 0.6), "default_": 0.5}
    for how in (dict(), dict(method="refine", reference=True), dict(cross=[by_word, 0.8, by_word], blend="ball")):
        drawn = run(labs[family], target=[SOURCE, TARGET, SOURCE], seed=[0, 9], **how)
        assert torch.equal(drawn.latents[1], drawn.latents[0]) and torch.equal(drawn.latents[3], drawn.latents[0])
        assert not torch.equal(drawn.latents[2], drawn.latents[0])


def test_the_same_prompt_draws_the_same_bits_also_where_a_batchs_rows_are_rounded_apart(labs, monkeypatch):
    """As kernels do that share rows among threads; a row's own rounding stands in for it."""
    lab = labs["tiny"]
    forward = lab.unet.forward
    monkeypatch.setattr(lab.unet, "forward", lambda x, *rest: forward(x, *rest) * (1 + 1e-6 * torch.arange(len(x)).view(-1, 1, 1, 1)))
    drawn = run(lab, target=[SOURCE, SOURCE, TARGET], reweight=[{"ball": 1}, {"ball": 3}, None], seed=[0, 9])
    assert torch.equal(drawn.latents[1], drawn.latents[0]) and not torch.equal(drawn.latents[2], drawn.latents[0])
    assert [a.tobytes() for a in drawn.edited[0]] == [a.tobytes() for a in drawn.sources]
    assert not torch.equal(drawn.latents[3], drawn.latents[0])


def test_nothing_edited_is_the_target_drawn_alone_and_targets_do_not_mix(labs):
    lab = labs["sd15"]
    off = run(lab, target=[TARGET, LONGER], cross=0.0, self_attention=0.0, seed=[1, 2], negative_prompt=["cube", ""], guidance=[3.0, 6.0])
    for k, text in enumerate((TARGET, LONGER)):
        alone = lab.generate(text, seed=[1, 2], steps=4, guidance=[3.0, 6.0], negative_prompt=["cube", ""], height=H, width=W, progress=False)
        assert apart(off.latents[1 + k], alone.latents) < 1e-5
    many = run(lab, target=[TARGET, LONGER], cross=[0.5, 1.0], self_attention=[0.25, 0.75], reweight=[None, {"left": 2}], seed=[1, 2])
    assert apart(many.latents[2, :1], run(lab, target=LONGER, cross=1.0, self_attention=0.75, reweight={"left": 2}, seed=1).latents[1]) < 1e-5
    assert apart(many.latents[1, 1:], run(lab, target=TARGET, cross=0.5, self_attention=0.25, seed=2).latents[1]) < 1e-5


@pytest.mark.parametrize("guidance, interval", [(1.0, None), (5.0, (300, 700))])
def test_one_branch_alone_and_guidance_in_an_interval(guidance, interval, labs):
    lab, asked = labs["sd15"], {"guidance": guidance, "interval": interval}
    drawn = run(lab, cross=0.75, self_attention=0.5, **asked)
    assert apart(drawn.latents[1], one_after_the_other(lab, **asked)) < 1e-4


def test_reweighting_multiplies_the_words_own_map(labs):
    lab = labs["tiny"]
    token = list(find(lab.tokenizer, SOURCE, "red"))
    for weight in (3.0, 0.0, -1.0):
        def scale(probs, name):
            out = probs.clone()
            out[1, ..., token] *= weight
            return out

        with listen(lab.unet, {"*.attn2.probs": scale}):
            expected = lab.generate(SOURCE, steps=4, guidance=5.0, progress=False).latents
        drawn = run(lab, target=None, cross=0.0, self_attention=0.0, reweight={"red": weight})
        assert apart(drawn.latents[1], expected) < 1e-4
        assert not torch.equal(drawn.latents[1], drawn.latents[0])
    assert torch.equal(*run(lab, target=None, reweight={"red": 1}).latents)


# ---- local blend --------------------------------------------------------------------------------------------------


def test_outside_of_the_mask_the_source_stays_bit_by_bit(labs):
    for family in ("sd21", "sdxl"):
        drawn = run(labs[family], seed=[0, 1], blend=Blend("cube", threshold=0.7))
        m = drawn.masks[0][:, None].bool().expand_as(drawn.latents[0])
        assert 0.02 < m.float().mean() < 0.98
        assert torch.equal(drawn.latents[1][~m], drawn.latents[0][~m])
        assert apart(drawn.latents[1][m], drawn.latents[0][m]) > 1e-3
        assert run(labs[family], seed=[0, 1]).masks is None


def test_the_mask_is_the_published_one_but_for_the_minimum():
    maps = torch.rand(2, 8, 4, 10, generator=torch.Generator().manual_seed(0))
    m = maps[..., 3] + maps[..., 5]
    padded = F.pad(m, (1, 1, 1, 1), value=-1.0)
    pooled = torch.stack([padded[:, dy : dy + 8, dx : dx + 4] for dy in range(3) for dx in range(3)]).amax(0)
    for reference, least in ((True, 0), (False, 1)):
        expected = [(one - least * one.min()) / (one.max() - least * one.min()) > 0.8 for one in pooled + 4]
        expected = torch.stack(expected).float().repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert torch.equal(mask(maps + 2, (3, 5), (16, 8), 0.8, reference), expected)
        assert bool(expected.all()) == reference  # nothing is below 0.8 of the maximum: the published mask lets all of it in
    assert mask(maps, (), (16, 8), 0.6).sum() == 0  # no words, nothing let in


def test_the_masks_of_an_edit_follow_from_its_maps(labs):
    drawn = run(labs["sd21"], target=[TARGET, LONGER], seed=[0, 1], blend=Blend(("ball", "cube"), threshold=0.8))
    tokenizer = labs["sd21"].tokenizer
    for k, text in enumerate((TARGET, LONGER)):
        words = [w for w in ("ball", "cube") if w in text]
        before = mask(drawn.maps[0], find(tokenizer, SOURCE, "ball"), (16, 8), 0.8)
        after = mask(drawn.maps[1 + k], [t for w in words for t in find(tokenizer, text, w)], (16, 8), 0.8)
        assert torch.equal(drawn.masks[k], torch.maximum(before, after)) and 0 < drawn.masks[k].mean() < 1 and not torch.equal(before, after)
    two = run(labs["sd21"], target=[TARGET, TARGET], blend=[None, Blend("cube", 0.8)])
    assert bool(two.masks[0].all()) and not bool(two.masks[1].all()) and torch.equal(two.latents[1], run(labs["sd21"], target=[TARGET, TARGET]).latents[1])
    changed = run(labs["tiny"], target=LONGER, blend="changed")  # no word is gone: the mask is of "left of a cube" alone
    assert torch.equal(changed.masks[0], mask(changed.maps[1], range(4, 8), (8, 8), 0.3))


def test_the_blend_begins_where_it_is_told(labs):
    lab, plain = labs["tiny"], run(labs["tiny"], steps=5)
    late = run(lab, steps=5, blend=Blend("cube", 0.8, start=1.0))
    assert torch.equal(late.latents, plain.latents) and late.masks is None
    for start, first in ((0.2, 1), (0.5, 2), (0.0, 0)):
        edit_ = Run(lab, SOURCE, TARGET, {"steps": 5}, False)
        edit_.control(0.8, 0.4, None)
        assert edit_.blends == [None]
        edit_.blend(Blend("cube", 0.8, start))
        edit_.maps, step = torch.rand(1, 2, 64, 16), next(lab.steps([SOURCE, TARGET], steps=5))
        assert [edit_.after(replace(step, i=i)) is not None for i in range(5)] == [i >= first for i in range(5)]


# ---- when and where -----------------------------------------------------------------------------------------------


def test_windows_of_steps(labs):
    tokenizer = labs["tiny"].tokenizer
    table = control.cross_table({"default_": 0.5, "cube": (0.25, 0.75), "left of": 0.0}, tokenizer, LONGER, 8)
    counts = {word: table[:, list(find(tokenizer, LONGER, word))].sum(1).tolist() for word in ("red", "cube", "left", "of")}
    assert counts["red"] == [1, 1, 1, 1, 0, 0, 0, 0] and counts["cube"] == [0, 0, 1, 1, 1, 1, 0, 0] and sum(counts["left"] + counts["of"]) == 0
    assert table[:, 0].tolist() == counts["red"]  # BOS goes with those that are not named
    assert control.cross_table({"cube": 0.5}, tokenizer, LONGER, 8)[:, 0].sum() == 8
    assert control.self_table(0.29, 100).sum() == 29 and control.self_table((0.1, 0.3), 10).nonzero().flatten().tolist() == [1, 2]
    # as published: T + 1 rows for cross-, T for self-attention, both rounded down
    for b, n, m in ((0.2, 10, 10), (0.4, 20, 20), (0.5, 25, 25), (0.8, 40, 40), (0.99, 50, 49), (1.0, 50, 50)):
        assert control.cross_table(b, tokenizer, LONGER, 50, reference=True)[:, 3].sum() == n
        assert control.self_table(b, 50, reference=True).sum() == m
    assert control.cross_table(0.5, tokenizer, LONGER, 5, reference=True)[:, 3].sum() == 3 != control.cross_table(0.5, tokenizer, LONGER, 5)[:, 3].sum()


def test_which_layers():
    with torch.device("meta"):
        sd, xl = UNet(unet_config(SD15_UNET)), UNet(unet_config(SDXL_UNET))
    published = {"down_blocks.2": 2, "up_blocks.1": 3}  # the five layers of 16x16
    count = lambda names: {block: sum(n.startswith(block) for n in names) for block in dict.fromkeys(".".join(n.split(".")[:2]) for n in names)}  # noqa: E731
    assert count(control.worded(sd, (64, 64))) == published and set(control.worded(sd, (64, 64)).values()) == {(16, 16)}
    assert count(control.coarse(sd, "attn1", (64, 64))) == {**published, "mid_block.attentions": 1}
    assert control.worded(sd, (96, 64)) == dict.fromkeys(control.worded(sd, (64, 64)), (24, 16))
    assert set(control.worded(xl, (128, 128)).values()) == {(32, 32)} and len(control.worded(xl, (128, 128))) == 60
    assert len(control.coarse(sd, "attn1", (16, 16))) == 16  # a small picture: all are coarse


def test_reference_takes_the_published_code_at_its_word(labs):
    lab = labs["tiny"]
    drawn = run(lab, source="a red ball", target="a red cube", cross=0.5, self_attention=0.5, reweight={"cube": 2.0}, reference=True)
    token = find(lab.tokenizer, "a red cube", "cube")[0]
    kept = {}

    def keep(probs, name):
        kept[name, lab.layout.i] = probs.clone()

    def put(probs, name):
        out, i = probs.clone(), lab.layout.i
        if name.endswith("attn2.probs") and i < int(0.5 * 5):  # 5 rows for 4 steps
            out[1] = kept[name, i][1]  # as many tokens on both sides: the identity
            out[1, ..., token] *= 2
        if name.endswith("attn1.probs") and i < int(0.5 * 4):
            out[1] = kept[name, i][1]
        return out

    with listen(lab.unet, {"*.attn?.probs": keep}):
        lab.generate("a red ball", steps=4, guidance=5.0, progress=False)
    with listen(lab.unet, {"*.attn?.probs": put}):
        expected = lab.generate("a red cube", steps=4, guidance=5.0, progress=False).latents
    assert apart(drawn.latents[1], expected) < 1e-4
    assert apart(run(lab, "a red ball", "a red cube", cross=0.5, self_attention=0.5, reweight={"cube": 2.0}).latents[1], expected) > 1e-3


# ---- what comes out, and what is left behind ----------------------------------------------------------------------


def test_what_an_edit_has(labs):
    lab = labs["tiny"]
    drawn = lab.edit(SOURCE, [TARGET, LONGER], seed=[4, 5], steps=3, progress=False)
    assert drawn.prompts == (SOURCE, TARGET, LONGER) and len(drawn.edited) == 2 and len(drawn.sources) == 2
    assert drawn.image is drawn.edited[0][0] and drawn.recipe["seed"] == [4, 5] and drawn.recipe["steps"] == 3
    torch.testing.assert_close(drawn.maps.sum(-1), torch.ones(3, 2, 8, 8))
    found = drawn.heatmap("cube", target=1, seed=1)
    assert torch.equal(found.map, drawn.maps[2, 1, ..., find(lab.tokenizer, LONGER, "cube")[0]]) and "8x8" in found.averages
    assert torch.equal(drawn.heatmap("red", target=None).map, drawn.maps[0, 0, ..., 2])
    assert drawn._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(LabkitError, match="Its words are: a, blue, cube"):
        drawn.heatmap("ball")
    with pytest.raises(LabkitError, match="2 targets and 2 seeds"):
        drawn.heatmap("cube", target=2)
    assert labkit.edit is edit


def test_the_model_is_as_before_also_after_an_exception(labs, monkeypatch):
    lab, plain = labs["tiny"], labs["tiny"].generate(SOURCE, steps=3, progress=False)
    before = {name: p.clone() for name, p in lab.unet.state_dict().items()}
    run(lab, blend="cube", reweight={"cube": 2})
    with monkeypatch.context() as m:
        m.setattr("labkit.editing.prompt_to_prompt.mask", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(lab, blend="cube")
    with pytest.raises(KeyboardInterrupt), listen(lab.unet, {"mid_block.resid": lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)}):
        run(lab)
    assert not any(tap.active for tap in taps(lab.unet).values()) and lab.layout is None and "steps" not in vars(lab)
    assert all(torch.equal(p, before[name]) for name, p in lab.unet.state_dict().items())
    assert torch.equal(lab.generate(SOURCE, steps=3, progress=False).latents, plain.latents)


def test_an_optimised_model_edits_alike():
    lab = tiny.build()
    assert apart(run(labkit.optimize(lab), blend="cube").latents, run(lab, blend="cube").latents) < 1e-3


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(source=""), "A prompt is ''"), (dict(target=["a ball", 3]), "A prompt is 3"), (dict(target=[]), "no target"), (dict(target="a green cube"), "does not know 'green'"),
        (dict(cross=1.5), "cross is 1.5"), (dict(cross=(0.6, 0.2)), "cross is"), (dict(cross={"ball": 0.5}), "'ball' is not in the prompt"),
        (dict(cross={"cube": "all"}), "cross of 'cube' is 'all'"), (dict(self_attention=True), "self_attention is True"), (dict(self_attention=[0.1, 0.2]), "2 entries for 1 target"),
        (dict(reweight={"ball": 2}), "Its words are: a, blue, cube"), (dict(reweight={"cube": None}), "weight of 'cube' is None"), (dict(reweight=3), "weights by word"),
        (dict(blend="left"), "in neither prompt"), (dict(blend=["ball", "cube"]), "2 entries for 1 target"), (dict(method="swap"), "'replace' or 'refine'"), (dict(guidance=0), "Guidance is 0"), (dict(sampler="magic"), "ddim, ddpm"),
        (dict(reference=True, target=LONGER), "3 and 7"), (dict(colour="red"), "There is no argument 'colour'"),
    ],
)  # fmt: skip
def test_what_cannot_be_edited_is_told_in_one_line(change, says, labs):
    with pytest.raises(LabkitError, match=says) as error:
        run(labs["tiny"], **change)
    assert "\n" not in str(error.value)


def test_a_blend_that_cannot_be():
    for bad in (dict(threshold=1.0), dict(threshold=-0.1), dict(start=1.5)):
        with pytest.raises(LabkitError, match="The blend has"):
            Blend("cube", **bad)
