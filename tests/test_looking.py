"""Looking: interpolation, switching, paths, text and guidance, each against what it must be where that is known."""

import math

import pytest
import torch
from families import write
from tiny import build

import labkit
from labkit.device import Noise
from labkit.errors import LabkitError
from labkit.generation import to_pil
from labkit.guidance import classifier_free, in_eps
from labkit.probes.between import between_prompts, between_seeds, slerp
from labkit.probes.decided import switch_prompt
from labkit.probes.guided import diversity, measure_guidance, saturation
from labkit.probes.paths import paths, principal
from labkit.probes.texts import alike, by_layer, lens, token_states
from labkit.recipe import complete
from labkit.tap import listen, taps

A, B = "a red ball", "a blue cube left of a red ball"
DRAW = {"steps": 3, "height": 16, "width": 32}


@pytest.fixture(scope="module")
def lab():
    return build()


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl"])
def model(request, tmp_path_factory):
    return labkit.load(write(request.param, tmp_path_factory.mktemp(request.param)), "cpu")


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).abs().max() < tolerance * max(1, float(b.abs().max())))


def plain(lab, prompt, seed=0, **options) -> torch.Tensor:
    return lab.generate(prompt, seed=seed, progress=False, **{**DRAW, **options}).latents


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


# --- between ---------------------------------------------------------------------------------------------------------


def test_slerp_stays_on_the_sphere_and_goes_at_one_speed():
    a, b = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    half = slerp(a, b, 0.5)
    assert abs(float(half.norm()) - (float(a.norm()) + float(b.norm())) / 2) < 0.02 * float(a.norm())
    assert float(torch.lerp(a, b, 0.5).norm()) < 0.8 * float(a.norm())  # the twin: a straight line, too short to be noise
    x, y = torch.tensor([1.0, 0]), torch.tensor([0, 1.0])
    for f in (0.25, 1 / 3, 0.5):
        assert torch.allclose(slerp(x, y, f), torch.tensor([math.cos(f * math.pi / 2), math.sin(f * math.pi / 2)]), atol=1e-6)
    assert torch.allclose(slerp(x, 3 * x, 0.5), 2 * x)  # parallel


def test_between_seeds_begins_and_ends_with_the_seeds_own_pictures(lab):
    images, latents = between_seeds(lab, A, (3, 4), 5, **DRAW)
    assert near(latents[:1], plain(lab, A, 3)) and near(latents[-1:], plain(lab, A, 4)) and len(images) == 5
    assert (latents[0] - latents[-1]).abs().max() > 1e-2 and images[0].tobytes() == to_pil(lab.decode(plain(lab, A, 3)))[0].tobytes()
    for wrong in ({"n": 1}, {"n": 2.5}, {"seeds": (1,)}):
        with pytest.raises(LabkitError):
            between_seeds(lab, A, **wrong)


def test_between_prompts_begins_and_ends_with_the_prompts_own_pictures(model):
    latents = between_prompts(model, (A, B), 3, 3, **DRAW)[1]
    assert near(latents[:1], plain(model, A, 3)) and near(latents[-1:], plain(model, B, 3))
    assert (latents[1] - latents[0]).abs().max() > 1e-3 < (latents[1] - latents[2]).abs().max()
    for wrong in ("red ball", (A,)):
        with pytest.raises(LabkitError):
            between_prompts(model, wrong)


# --- when a picture is decided ---------------------------------------------------------------------------------------


def test_switching_at_the_ends_is_not_switching_and_in_between_is_what_it_says(model):
    found = switch_prompt(model, A, B, at=[1], seeds=[3, 4], judge=lambda images: [image.size for image in images], **DRAW)
    assert found.at == (0, 1, 3) and found.seeds == (3, 4) and found.share.shape == (2, 3)
    assert torch.allclose(found.share[:, 0], torch.ones(2), atol=1e-3) and torch.allclose(found.share[:, -1], torch.zeros(2), atol=1e-3)
    assert found.read == [[(32, 16)] * 3] * 2 and found.decided in (1, 3)
    for row, seed in zip(found.images, (3, 4)):
        for image, prompt in ((row[0], B), (row[-1], A)):
            own = to_pil(model.decode(plain(model, prompt, seed)))[0]
            assert max(abs(a - b) for a, b in zip(own.tobytes(), image.tobytes(), strict=True)) <= 1
    # by hand: the first step with one prompt's states, the others with the other's
    options = {"guidance": 7.5, "sampler": "ddim", **DRAW}
    by_hand = switch_prompt(model, A, B, at=[1], seeds=3, **options)
    c, d = (model.conditions(complete(model, prompt, **options)) for prompt in (A, B))  # each a pair: of "cond" and of "uncond"

    def network(x, t, c):
        with torch.no_grad():
            return model.unet(x, t, c)

    from labkit.samplers import SAMPLERS, first_latent

    count = iter(range(3))
    halves = [in_eps(classifier_free(network, each[0], each[1], 7.5), model.schedule) for each in (c, d)]
    x = first_latent("ddim", Noise([3], (4, 8, 16)).draw(), model.schedule, 3)
    for step in SAMPLERS["ddim"](lambda x, t: halves[next(count) >= 1](x, t), x, model.schedule, 3):
        pass
    own = to_pil(model.decode(step.x))[0]
    assert max(abs(a - b) for a, b in zip(own.tobytes(), by_hand.images[0][1].tobytes(), strict=True)) <= 1
    with pytest.raises(LabkitError, match="0 .the second prompt alone. to 3"):
        switch_prompt(model, A, B, at=[4], **DRAW)


def test_nothing_stays_and_recording_goes_on(lab):
    before = plain(lab, A)
    with labkit.record(lab) as trace:
        switch_prompt(lab, A, B, at=[1], **DRAW)
    assert trace.images == 3 and torch.equal(plain(lab, A), before)


# --- paths -----------------------------------------------------------------------------------------------------------


def test_principal_directions_of_points_whose_directions_are_known():
    g = torch.Generator().manual_seed(0)
    axis = torch.linalg.qr(torch.randn(20, 20, generator=g))[0][:2]  # two orthogonal directions in 20 dimensions
    along = torch.tensor([[t, 0.3 * math.sin(3 * t)] for t in torch.linspace(-1, 1, 41).tolist()])
    X = along @ axis + 5.0
    coordinates, share = principal(X, 2)
    centred = along - along.mean(0)
    assert float(share.sum()) == pytest.approx(1, abs=1e-5) and share[0] > share[1]
    assert torch.allclose(distances(coordinates, coordinates), distances(centred, centred), atol=1e-4)  # distances are kept
    assert torch.allclose(principal(X.flip(0), 2)[0].flip(0), coordinates, atol=1e-4)  # and signs do not depend on the order


def test_paths_begin_with_the_noise_and_end_with_the_picture(lab):
    found = paths(lab, A, seeds=(3, 4, 5), directions=8, **DRAW)
    assert found.coordinates.shape == (3, 4, 8) and len(found.t) == 3 and 0.8 < float(found.share.sum()) <= 1 + 1e-5
    ends = torch.stack([Noise([s], (4, 8, 16)).draw()[0].flatten() for s in (3, 4, 5)] + [plain(lab, A, s).flatten() for s in (3, 4, 5)])
    flat = torch.cat([found.coordinates[:, 0], found.coordinates[:, -1]])
    assert torch.all(distances(flat, flat) <= distances(ends, ends) * (1 + 1e-3) + 1e-3)  # a projection shortens
    whole = paths(lab, A, seeds=(3, 4), directions=7, **DRAW)  # 8 points span 7 directions: nothing is lost
    flat, ends = torch.cat([whole.coordinates[:, 0], whole.coordinates[:, -1]]), ends[[0, 1, 3, 4]]
    assert torch.allclose(distances(flat, flat), distances(ends, ends), rtol=1e-3)
    assert paths(lab, A, seeds=(3, 4), what="x0", **DRAW).coordinates.shape == (2, 3, 2)
    for wrong in ({"what": "eps"}, {"seeds": []}, {"directions": 99}, {"directions": 0}):
        with pytest.raises(LabkitError):
            paths(lab, A, **{"seeds": (3, 4), **wrong, **DRAW})


# --- text ------------------------------------------------------------------------------------------------------------


def test_token_states_and_how_finished_they_are(model):
    states = token_states(model, B)
    encoder, tokenizer = model.texts[0]
    hidden = encoder.hidden(tokenizer(B))
    assert states.shape == {"layer": len(hidden), "token": 10, "channel": encoder.config.hidden_size}
    assert torch.equal(states.at(layer=2).values, hidden[2][0, :10])
    assert states.labels["token"] == ("start", "a 1", "blue", "cube", "left", "of", "a 2", "red", "ball", "end")
    near_ = by_layer(states)
    assert torch.allclose(near_.values[-1], torch.ones(10)) and near_.values[0].max() < 0.999 and near_.axes == ("layer", "token")
    with pytest.raises(LabkitError, match="There is no text encoder 2"):
        token_states(model, B, 2)


def test_the_lens_at_the_last_layer_is_the_picture_itself(model):
    images, layers = lens(model, A, seed=3, **DRAW)
    assert layers == tuple(range(len(images)))
    own = to_pil(model.decode(plain(model, A, 3)))[0]
    assert max(abs(a - b) for a, b in zip(own.tobytes(), images[-1].tobytes(), strict=True)) <= 1
    assert images[0].tobytes() != images[-1].tobytes()
    (alone,), _ = lens(model, A, [0], seed=3, **DRAW)
    assert max(abs(a - b) for a, b in zip(alone.tobytes(), images[0].tobytes(), strict=True)) <= 1
    for wrong in ([], [99], [-1], ["last"]):
        with pytest.raises(LabkitError, match="give some of 0 to"):
            lens(model, A, wrong)


def test_alike_is_a_cosine_of_what_is_not_common(lab):
    found = alike(lab, ["red", "blue", "red ball"])
    assert found.axes == ("text", "other") and torch.allclose(found.values.diagonal(), torch.ones(3)) and torch.allclose(found.values, found.values.T)
    h = [lab.text_encoder.hidden(lab.tokenizer(w))[-1][0] for w in ("red", "blue", "red ball")]
    m = torch.stack([h[0][1], h[1][1], h[2][1:3].mean(0)]).detach()
    m = m - m.mean(0)
    assert float(found.values[0, 1]) == pytest.approx(float(torch.nn.functional.cosine_similarity(m[0], m[1], dim=0)), abs=1e-5)
    with pytest.raises(LabkitError, match="three texts"):
        alike(lab, ["red", "blue"])


def test_tabletops_synonyms_are_alike():
    found = alike(labkit.load("tabletop", "cpu"), ["sphere", "ball", "cube", "cone"]).values
    assert found[0, 1] > 0.8 and found[0, 1] > found[0, 2:].max() + 0.5


# --- guidance --------------------------------------------------------------------------------------------------------


def test_angles_are_those_of_the_two_predictions(model):
    """eps_c and eps_u are asked for one by one, with the same x_t; of v networks too."""
    found = measure_guidance(model, A, (1.0, 6.0), (3, 4), judge=lambda images: range(len(images)), **DRAW)
    assert found.angles.shape == (3, 2, 2) and found.measures["adherence"].tolist() == [[0, 1], [2, 3]]
    assert [row["w"] for row in found.table()] == [1.0, 6.0] and found.table()[1]["adherence"] == 2.0
    said = {}
    with listen(model.unet, {"out": lambda x, name: said.update({model.layout.i: x.clone()})}):
        steps = list(model.steps(A, guidance=6.0, seed=4, **DRAW))
    from labkit.probes.trajectory import given

    for i, step in enumerate(steps):
        x_t, a = given(step, model), model.schedule.alpha_bar_at(step.t)
        eps = [o if model.schedule_config.prediction_type == "epsilon" else math.sqrt(a) * o + math.sqrt(1 - a) * x_t for o in said[i].chunk(2)]
        cos = torch.nn.functional.cosine_similarity(eps[0].flatten(), eps[1].flatten(), dim=0)
        assert float(found.angles[i, 1, 1]) == pytest.approx(math.degrees(math.acos(float(cos))), rel=2e-2, abs=0.05)
    assert not any(tap.active for tap in taps(model.unet).values())


def test_entropy_is_that_of_each_places_attention(lab):
    found = measure_guidance(lab, A, (2.0, 5.0), (3, 4), **DRAW)
    bits = []
    with listen(lab.unet, {"*.attn2.probs": lambda p, name: bits.append(float(-(p[1] * p[1].log2()).nan_to_num().sum(-1).mean()))}):
        lab.generate(A, guidance=5.0, seed=4, progress=False, **DRAW)
    assert float(found.measures["entropy"][1, 1]) == pytest.approx(sum(bits) / len(bits), rel=1e-3)
    assert 0 < float(found.measures["entropy"].max()) < 4  # 16 tokens


def test_pictures_are_the_same_and_measured_as_defined(lab):
    found = measure_guidance(lab, A, (2.0, 5.0), (3, 4), **DRAW)
    alone = lab.generate(A, guidance=5.0, seed=3, progress=False, **DRAW).image
    assert max(abs(a - b) for a, b in zip(alone.tobytes(), found.images[0][1].tobytes(), strict=True)) <= 1
    x = torch.zeros(2, 1, 4)
    x[1, 0, 0] = 1
    assert float(diversity(x)[0]) == pytest.approx(0.5) and float(diversity(torch.zeros(3, 1, 4))[0]) == 0
    image = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.4, 0.2, 0.4], [0, 0, 0]]).T.reshape(1, 3, 2, 2)
    assert float(saturation(image)) == pytest.approx((1 + 0 + 0.5 + 0) / 4)


@pytest.mark.parametrize("wrong", [{"scales": (1.0, 1.0)}, {"scales": ()}, {"scales": (0,)}, {"seeds": 3}, {"rescale": 0.5}, {"sampler": "heun"}, {"interval": (1, 2)}])
def test_what_cannot_be_measured_is_said(lab, wrong):
    with pytest.raises(LabkitError):
        measure_guidance(lab, A, **{"scales": (2.0,), "seeds": (3, 4), **DRAW, **wrong})
