"""Training: the loop survives kills, NaNs and broken files; the objectives are the papers'; every formula against its wrong twin."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from labkit.errors import CheckpointError, LabkitError
from labkit.models.clip import CLIPText
from labkit.models.config import TABLETOP_TEXT, UNetConfig, VAEConfig
from labkit.models.unet import UNet
from labkit.models.vae import VAE, DiagonalGaussian
from labkit.schedule import Schedule, ScheduleConfig, q_sample
from labkit.tap import taps
from labkit.training import clip, data, diffusion, lessons, loop, tabletop, vae
from labkit.training.loop import LoopConfig, Player, Recipe, Share, run
from labkit.training.measures import ssim
from labkit.training.widen import widen

CONFIG = LoopConfig(steps=10, batch_size=4, lr=1e-2, warmup=3, save_every=4, ema_decay=0.9)
CPU = Share(0, 1, 4, 0, torch.device("cpu"))
TINY_VAE = VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0, sample_size=128)
TINY_UNET = UNetConfig(block_out_channels=(8, 16), cross_attention=(True, False), num_attention_heads=(2, 2), layers_per_block=1,
                       cross_attention_dim=128, norm_num_groups=4, sample_size=16)  # fmt: skip


class Fit(nn.Module):
    """|net(x) - target|^2, where the target is the next player's business too."""

    def __init__(self, net, sign=1.0):
        super().__init__()
        self.net, self.sign = net, sign

    def forward(self, batch):
        return {"loss": (self.net(batch["x"]) - self.sign * batch["x"].sum(1, keepdim=True)).pow(2).mean()}


def tiny(stop_step=lambda step, losses: None, poison=None):
    """Two players and random batches; `poison` is the step whose batch is not a number."""
    torch.manual_seed(0)
    one, two = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)), nn.Linear(3, 1)

    def batch(step, share):
        x = share.mine(torch.randn(share.batch_size, 3, generator=share.generator(step)))
        return {"x": x * (float("nan") if step == poison else 1.0)}

    return Recipe([Player("one", Fit(one), {"one": one}), Player("two", Fit(two, -1.0), {"two": two}, lr_factor=0.5)], batch, stop_step=stop_step)


def train(recipe, folder, device="cpu", **change):
    return run(recipe, replace(CONFIG, **change), folder, device=device, progress=False)


def saved(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def child(code, timeout=240, **env):
    """A Python process of its own that finds labkit and this file."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here)])
    head = "import torch; torch.set_num_threads(1)\n"
    return subprocess.Popen([sys.executable, "-c", head + code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **env})  # fmt: skip


# -- the loop ------------------------------------------------------------------------------------------------------


def test_resumed_after_kill_9_ends_at_the_weights_of_an_undisturbed_run(tmp_path):
    killed = child(f"""
import os, signal
import test_training as t
def stop(step, losses):
    if step == 6:  # two steps after the last checkpoint
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
t.train(t.tiny(stop), {str(tmp_path / "killed")!r})
print("was not killed")
""")
    said = killed.communicate(timeout=240)[0]
    assert killed.returncode == -getattr(signal, "SIGKILL", -1), said
    assert saved(tmp_path / "killed")["step"] == 4
    resumed, undisturbed = train(tiny(), tmp_path / "killed"), train(tiny(), tmp_path / "whole")
    assert same(saved(tmp_path / "killed"), saved(tmp_path / "whole")), "resuming changed something: weights, averages or optimisers"
    assert same(resumed["one"].state_dict(), undisturbed["one"].state_dict())
    assert not same(saved(tmp_path / "whole")["modules"]["one"], tiny().players[0].trains["one"].state_dict()), "nothing was learnt"
    logs = [[json.loads(line)["step"] for line in open(tmp_path / name / "log.jsonl")] for name in ("killed", "whole")]
    assert logs[0] == logs[1] == [0, 9]


def test_a_finished_run_is_not_trained_further(tmp_path):
    train(tiny(), tmp_path)
    (tmp_path / ".checkpoint.pt.0a1b2c3d.unfinished").write_bytes(b"half")  # what a run that was killed leaves
    (tmp_path / ".model.0a1b2c3d.unfinished" / "unet").mkdir(parents=True)
    before, steps = saved(tmp_path), []
    train(tiny(lambda step, losses: steps.append(step)), tmp_path)
    assert steps == [] and same(before, saved(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "log.jsonl"}


@pytest.mark.parametrize("poison, kept", [(6, 4), (2, None)])
def test_nan_stops_and_the_last_checkpoint_stays(tmp_path, poison, kept):
    with pytest.raises(LabkitError, match=rf"step {poison}: one's loss is not finite.*lower learning rate") as error:
        train(tiny(poison=poison), tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoint.pt").exists() == (kept is not None)
    if kept:
        assert saved(tmp_path)["step"] == kept
        assert all(v.isfinite().all() for v in saved(tmp_path)["modules"]["one"].values())
        train(tiny(), tmp_path)  # goes on from there
        assert saved(tmp_path)["step"] == CONFIG.steps


def test_ema_is_the_average_it_says(tmp_path):
    recipe, weights = tiny(), []
    recipe.stop_step = lambda step, losses: weights.append(recipe.players[0].trains["one"][0].weight.detach().clone())
    start = recipe.players[0].trains["one"][0].weight.detach().clone()
    averaged = train(recipe, tmp_path, steps=30, ema_decay=0.3)["one"][0].weight

    def average(d):
        mean = start
        for i, weight in enumerate(weights):
            mean = d(i) * mean + (1 - d(i)) * weight
        return mean

    torch.testing.assert_close(averaged, average(lambda i: min(0.3, (1 + i) / (10 + i))))
    assert (1 + 1) / (10 + 1) < 0.3 < (1 + 9) / (10 + 9), "both branches of the minimum are walked"
    wrong_twins = [lambda i: 0.3, lambda i: 1 - min(0.3, (1 + i) / (10 + i)), lambda i: max(0.3, (1 + i) / (10 + i))]
    short = weights[:]
    del weights[4:]  # early on the warm-up of the decay shows most
    early = average(lambda i: min(0.3, (1 + i) / (10 + i)))
    assert all((average(d) - early).abs().max() > 1e-4 for d in wrong_twins)
    assert not torch.equal(averaged, short[-1])


def test_averages_are_frozen_copies(tmp_path):
    recipe = tiny()
    averaged = train(recipe, tmp_path)
    assert set(averaged) == {"one"} and averaged["one"] is not recipe.players[0].trains["one"]
    assert not averaged["one"].training and not any(p.requires_grad for p in averaged["one"].parameters())


def test_learning_rate_rises_stays_and_falls(tmp_path, monkeypatch):
    config = LoopConfig(steps=100, batch_size=1, lr=2.0, warmup=10, cooldown=0.3)
    rates = [config.rate(i) for i in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0)
    assert rates[9:71] == [2.0] * 62 and rates[85] == pytest.approx(1.0) and rates[99] == pytest.approx(2.0 / 30)
    assert replace(config, warmup=0).rate(0) == 2.0 and min(rates) > 0
    used, true_step = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        used.append(self.param_groups[0]["lr"])
        return true_step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(tiny(), tmp_path)
    assert used[::2] == [pytest.approx(CONFIG.rate(i)) for i in range(10)], "the first player's"
    assert used[1::2] == [pytest.approx(CONFIG.rate(i) / 2) for i in range(10)], "the second's, by its factor"


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    train(tiny(), tmp_path, steps=4)
    before, true_save = saved(tmp_path), torch.save

    def crash(state, file):
        true_save(state, file)
        file.truncate(1000)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(loop.torch, "save", crash)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt: cannot be written \(No space left on device\).*Make room"):
            train(tiny(), tmp_path, cooldown=0.0)
    assert same(before, saved(tmp_path)) and {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "log.jsonl"}
    train(tiny(), tmp_path)
    assert saved(tmp_path)["step"] == 10


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "another network", "no checkpoint at all"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    train(tiny(), tmp_path, steps=2)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "another network":
        state = saved(tmp_path)
        state["modules"]["one"]["0.weight"] = torch.zeros(7, 3)
        torch.save(state, path)
    elif damage == "no checkpoint at all":
        torch.save({"step": 3}, path)
    else:
        path.write_bytes(b"" if damage == "empty" else np.random.default_rng(0).bytes(3000))
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match="cannot be resumed from.*move it away") as error:
        train(tiny(), tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == content, "the file is left for its owner to judge"


def test_impossible_settings_are_refused(tmp_path):
    for change in ({"steps": 0}, {"steps": -3}, {"batch_size": 0}):
        with pytest.raises(LabkitError, match="at least one step"):
            train(tiny(), tmp_path / "new", **change)
    with pytest.raises(LabkitError, match="'fp8': use 'no' or 'bf16'"):
        train(tiny(), tmp_path / "new", mixed_precision="fp8")
    assert not (tmp_path / "new").exists()
    with pytest.raises(LabkitError, match="no training stage 'unet'.*clip, vae, diffusion, decoder, verifier or all"):
        tabletop.train("unet", tmp_path / "new")
    with pytest.raises(LabkitError, match="train that stage first"):
        tabletop.take(tmp_path / "clip", image_tower=nn.Linear(1, 1))


def test_shares_are_the_global_batch():
    rows = torch.arange(8)
    parts = [Share(rank, 2, 8, 5, torch.device("cpu")) for rank in range(2)]
    assert sorted(torch.cat([part.mine(rows) for part in parts]).tolist()) == rows.tolist()
    draws = [torch.rand(3, generator=part.generator(7)) for part in parts]
    assert torch.equal(*draws) and not torch.equal(draws[0], torch.rand(3, generator=parts[0].generator(8)))
    assert not torch.equal(draws[0], torch.rand(3, generator=replace(parts[0], seed=6).generator(7)))


# -- the objectives ------------------------------------------------------------------------------------------------


def test_contrastive_loss_equals_a_plain_reference_also_where_captions_repeat():
    class Table(nn.Module):
        """Stands for an encoder: what it is asked for are row numbers of what it is built of."""

        def __init__(self, rows):
            super().__init__()
            self.rows, self.dim, self.config = rows, rows.shape[-1], type("C", (), {"hidden_size": rows.shape[-1]})

        def forward(self, which):
            return self.rows[which[:, 0]]

    torch.manual_seed(0)
    B, L, D = 4, 3, 6
    images, states = torch.randn(B, D), torch.randn(2 * B, L, D)
    states[2] = states[0]  # the first and the third say the same
    ids, false = torch.tensor([[0, 0], [1, 1], [0, 0], [3, 3]]), torch.arange(B, 2 * B)[:, None]
    twisted = torch.tensor([True, False, True, True])  # of the second caption there is no false one
    objective = clip.Contrast(Table(states), Table(images))
    ends = {"end": torch.tensor([2, 2, 2, 2]), "false_end": torch.tensor([1, 1, 1, 1])}
    out = objective({"image": torch.arange(B)[:, None], "ids": ids, "false": false, "twisted": twisted, **ends})
    text, lies = states[ids[:, 0], 2] @ objective.head.proj.weight.T, states[B:, 1] @ objective.head.proj.weight.T

    def reference(shared, ways=((images, text, lies), (text, images, None))):  # from pictures to captions, and back
        scale, total = objective.head.log_scale.detach().exp(), 0.0
        for a, b, others in ways:
            for i in range(B):
                cosines = [torch.dot(a[i], row) / (a[i].norm() * row.norm()) for row in b]
                if others is not None and twisted[i]:
                    cosines.append(torch.dot(a[i], others[i]) / (a[i].norm() * others[i].norm()))
                s = scale * torch.stack(cosines)
                right = [j for j in range(B) if (ids[j] == ids[i]).all()] if shared else [i]
                total += -sum(s[j] - s.exp().sum().log() for j in right) / len(right) / (2 * B)
        return total

    torch.testing.assert_close(out["loss"], reference(shared=True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["loss"], reference(shared=False), rtol=1e-5, atol=1e-5)
    assert (out["loss"] - reference(False, ((images, text, lies),) * 2)).abs() > 1e-3, "the twin that asks in one direction only"
    assert (out["loss"] - reference(False, ((images, text, None), (text, images, None)))).abs() > 1e-3, "the twin without false captions"
    nearer = [F.cosine_similarity(images[i], text[i], 0) > F.cosine_similarity(images[i], lies[i], 0) for i in (0, 2, 3)]
    assert out["told"].item() == pytest.approx(sum(map(bool, nearer)) / 3) and 0 <= out["right"] <= 1
    out["loss"].backward()
    assert objective.head.proj.weight.grad.isfinite().all(), "a caption without a twist leaves no trace"


def test_false_captions_of_a_batch_are_false_and_differ_in_little():
    text, tower = CLIPText(replace(TABLETOP_TEXT, vocab_size=len(tabletop.build_tokenizer()))), nn.Identity()
    tower.dim = 8
    shown = data.scenes(data.World(counts=(2, 3)), 0, 40)
    recipe = clip.recipe(text, tower, tabletop.build_tokenizer(), shown, np.zeros((40, 4, 4, 3), np.uint8), whereabouts=0.5)
    batch = recipe.batch(0, replace(CPU, batch_size=64))
    differ = (batch["ids"] != batch["false"]).any(1)
    assert 0.3 < batch["twisted"].float().mean() < 1 and differ[batch["twisted"]].all()
    same_words = (batch["ids"].sort(1).values == batch["false"].sort(1).values).all(1)  # as when colours are exchanged
    assert same_words[batch["twisted"]].float().mean() > 0.2
    half = recipe.batch(0, replace(CPU, batch_size=64, rank=1, world=2))
    assert all(torch.equal(half[name], batch[name][1::2]) for name in batch)


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return VAE(TINY_VAE)


class Maps(nn.Module):
    """Stands for the image tower: two cheap maps of features."""

    def features(self, image):
        return [image * 2 + 1, F.avg_pool2d(image, 4)]


def pictures(n=2, side=32):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def autoencoding(vae_net, **change):
    torch.manual_seed(1)
    weights = vae.VAELoss(**{"squared": 0.0, "perceptual_from": 10**9, "adversarial_from": 10**9, **change})
    discriminator = vae.PatchDiscriminator(8)
    x = pictures()
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    return vae.Reconstruction(vae_net, Maps(), discriminator, weights), discriminator, {"image": x, "noise": noise, "step": 5}


def test_kl_is_that_of_torch_distributions(autoencoder):
    objective, _, batch = autoencoding(autoencoder)
    q = autoencoder.encode(batch["image"])
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(q.mean, q.std), torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(q.kl(), expected.flatten(1).sum(1))
    out = objective(batch)
    torch.testing.assert_close(out["kl"], expected.sum() / batch["image"].numel())  # per pixel value, as the reconstruction is
    assert (out["kl"] - expected.mean()).abs() > 1e-3 * out["kl"], "the twin that averages over latents"
    torch.testing.assert_close(out["loss"], out["l1"] + 1e-6 * out["kl"])
    heavy = autoencoding(autoencoder, kl=0.5)[0](batch)
    torch.testing.assert_close(heavy["loss"], heavy["l1"] + 0.5 * heavy["kl"])


def test_reconstruction_terms(autoencoder):
    objective, _, batch = autoencoding(autoencoder, squared=3.0, kl=0.0, perceptual=0.5, perceptual_from=5)
    out = objective(batch)
    x, y = batch["image"], batch["reconstruction"]
    torch.testing.assert_close(y, autoencoder.decode(autoencoder.encode(x).sample(batch["noise"])))
    l1, l2 = (y - x).abs().mean(), (y - x).pow(2).mean()
    apart = 0
    for a, b in zip(Maps().features(x), Maps().features(y)):
        unit = [m / m.norm(dim=1, keepdim=True) for m in (a, b)]
        apart = apart + (unit[0] - unit[1]).pow(2).sum(1).mean() / 2
    torch.testing.assert_close(out["perceptual"], apart, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out["loss"], l1 + 3 * l2 + 0.5 * apart, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out["psnr"], 10 * torch.log10(4 / l2))  # pixels in [-1, 1]: the range is 2, its square 4
    assert "perceptual" not in objective({**batch, "step": 4})


def test_structural_term_is_what_ssim_lacks_to_one(autoencoder):
    objective, _, batch = autoencoding(autoencoder, kl=0.0, structural=0.7)
    with torch.autocast("cpu", torch.bfloat16):
        out = objective(batch)
    x, y = ((batch[name] + 1) / 2 for name in ("image", "reconstruction"))
    torch.testing.assert_close(out["ssim"], ssim(x, y).mean())  # of pixels in [0, 1], in float32
    torch.testing.assert_close(out["loss"], (batch["reconstruction"] - batch["image"]).abs().mean() + 0.7 * (1 - out["ssim"]))
    assert "ssim" not in autoencoding(autoencoder)[0](batch)


def test_adaptive_weight_makes_both_gradients_equally_long(autoencoder):
    objective, discriminator, batch = autoencoding(autoencoder, kl=0.0, adversarial_from=5, adversarial=0.3)
    out, last = objective(batch), autoencoder.decoder.conv_out.weight
    y = batch["reconstruction"]
    rec, adv = (y - batch["image"]).abs().mean(), -discriminator(y).mean()
    g_rec, g_adv = (torch.autograd.grad(part, last, retain_graph=True)[0] for part in (rec, adv))
    weight = g_rec.norm() / (g_adv.norm() + 1e-4)
    torch.testing.assert_close(out["loss"], rec + 0.3 * weight * adv, rtol=1e-4, atol=1e-6)
    g = torch.autograd.grad(out["loss"], last, retain_graph=True)[0]
    torch.testing.assert_close(g, g_rec + 0.3 * weight * g_adv, rtol=1e-4, atol=1e-6)  # the weight itself is a constant
    assert (out["loss"] - (rec + 0.3 * adv)).abs() > 1e-5, "the twin without the weight"
    assert "adversarial" not in objective({**batch, "step": 4})


def test_discriminator_learns_by_the_hinge_loss_and_rests_before_its_time(autoencoder, tmp_path):
    objective, discriminator, batch = autoencoding(autoencoder)
    batch["reconstruction"] = pictures().flip(3).requires_grad_()
    hinge = vae.Discrimination(discriminator, start=6)
    real, fake = discriminator(batch["image"]), discriminator(batch["reconstruction"])
    expected = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    torch.testing.assert_close(hinge({**batch, "step": 6})["loss"], expected)
    hinge({**batch, "step": 6})["loss"].backward()
    assert batch["reconstruction"].grad is None, "its loss must not reach the autoencoder"
    discriminator.zero_grad()
    hinge({**batch, "step": 5})["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in discriminator.parameters())

    recipe = vae.recipe(copy.deepcopy(autoencoder), Maps(), np.zeros((10, 32, 32, 3), np.uint8), vae.VAELoss(perceptual_from=10**9, adversarial_from=2))
    recipe.sheet, judge = None, recipe.players[1].trains["discriminator"]
    start, after = [p.detach().clone() for p in judge.parameters()], []
    recipe.stop_step = lambda step, losses: after.append([p.detach().clone() for p in judge.parameters()])
    train(recipe, tmp_path, steps=3, batch_size=2, weight_decay=0.0)
    assert all(map(torch.equal, start, after[0])) and all(map(torch.equal, start, after[1])), "rests"
    assert not all(map(torch.equal, start, after[2])), "and then works"
    alone = vae.recipe(copy.deepcopy(autoencoder), Maps(), np.zeros((10, 32, 32, 3), np.uint8), vae.VAELoss(adversarial=0.0, adversarial_from=0))
    assert [player.name for player in alone.players] == ["vae"]
    assert "adversarial" not in alone.players[0].objective({**batch, "step": 9})


def test_noise_prediction_is_the_mean_squared_error_of_the_noise():
    class Guess(nn.Module):
        def forward(self, x_t, t, c):
            self.seen = (x_t, t, c)
            return 0.1 * x_t

    torch.manual_seed(0)
    schedule = Schedule(ScheduleConfig())
    batch = {"x0": torch.randn(4, 4, 8, 8), "eps": torch.randn(4, 4, 8, 8), "t": torch.tensor([3, 400, 700, 999]), "ids": torch.randint(9, (4, 7))}
    objective = diffusion.NoisePrediction(Guess(), Ids(), schedule, float("inf"))
    out = objective(batch)
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = torch.cumprod(1 - beta, 0)[batch["t"]].float()[:, None, None, None]
    x_t = a.sqrt() * batch["x0"] + (1 - a).sqrt() * batch["eps"]
    error = (0.1 * x_t - batch["eps"]) ** 2
    torch.testing.assert_close(out["loss"], error.mean())
    torch.testing.assert_close(out["clean"], error[:2].mean())
    torch.testing.assert_close(out["noisy"], error[2:].mean())
    torch.testing.assert_close(objective.unet.seen[0], x_t)
    assert objective.unet.seen[1] is batch["t"] and torch.equal(objective.unet.seen[2], Ids()(batch["ids"]))
    twins = ((0.1 * x_t - batch["x0"]) ** 2).mean(), (0.1 * (a * batch["x0"] + (1 - a) * batch["eps"]) - batch["eps"]).pow(2).mean()
    assert all((out["loss"] - twin).abs() > 1e-2 for twin in twins), "a target that is not the noise; alpha_bar without its root"


def test_explicit_attention_trains_the_same_network_and_leaves_it_alone():
    torch.manual_seed(0)
    unet = UNet(TINY_UNET)
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, TINY_UNET.cross_attention_dim)
    fused = torch.autograd.grad(unet(x, t, c).pow(2).sum(), unet.parameters())
    with diffusion.explicit_attention(unet) as sites:
        assert len(sites) == len(taps(unet, "*.probs")) > 0 and all(tap.active for tap in taps(unet, "*.probs").values())
        explicit = torch.autograd.grad(unet(x, t, c).pow(2).sum(), unet.parameters())
    for a, b in zip(fused, explicit):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert not any(tap.active for tap in taps(unet).values())


def test_attention_is_explicit_where_that_trains_faster_and_has_room(monkeypatch):
    unet, cpu = UNet(TINY_UNET), torch.device("cpu")

    def explicit(precision, has, side=16):
        monkeypatch.setattr(loop, "has_bfloat16", lambda device: has)
        unet.config = replace(TINY_UNET, sample_size=side)
        objective = diffusion.NoisePrediction(unet, None, Schedule(), 5.0)
        with diffusion.attention_for(objective, LoopConfig(steps=1, batch_size=1, lr=1e-3, mixed_precision=precision), cpu):
            return any(tap.active for tap in taps(unet, "*.probs").values())

    assert explicit("bf16", has=True)
    assert not explicit("bf16", has=False) and not explicit("no", has=True) and not explicit("bf16", has=True, side=64)
    assert not any(tap.active for tap in taps(unet).values())


def test_latents_of_another_autoencoder_are_not_taken_for_this_ones(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    torch.manual_seed(0)
    one, other, path = VAE(TINY_VAE), VAE(TINY_VAE), tmp_path / "latents.safetensors"
    first = diffusion.latents(one, images, path, "cpu")
    written = path.stat().st_mtime_ns
    assert torch.equal(diffusion.latents(one, images[:2], path, "cpu")["mean"], first["mean"]) and path.stat().st_mtime_ns == written
    assert not torch.equal(diffusion.latents(other, images, path, "cpu")["mean"], first["mean"])
    assert torch.equal(diffusion.latents(one, images, path, "cpu")["mean"], first["mean"])


class Ids(nn.Module):
    """Stands for the text encoder: its states are the token ids."""

    def forward(self, ids):
        return ids[..., None].float()


def diffusion_recipe(net=None, text=None, world=None):
    g = torch.Generator().manual_seed(0)
    latents = {"mean": 3 + torch.randn(40, 4, 4, 4, generator=g), "std": torch.full((40, 4, 4, 4), 0.5), "scale": torch.tensor(1.0)}
    scenes = data.scenes(world or data.World(), 0, 40)
    return diffusion.recipe(net or nn.Identity(), text or Ids(), tabletop.build_tokenizer(), None, latents, scenes, ScheduleConfig()), latents


def test_one_caption_in_ten_is_dropped_and_latents_are_sampled():
    recipe, latents = diffusion_recipe()
    share = replace(CPU, batch_size=128)
    batches = [recipe.batch(step, share) for step in range(24)]
    empty = tabletop.build_tokenizer()([""])
    dropped = torch.cat([(batch["ids"] == empty).all(1) for batch in batches]).float().mean()
    assert abs(dropped - 0.1) < 0.02  # 3072 captions: 4 standard deviations
    t = torch.cat([batch["t"] for batch in batches])
    assert 0 <= t.min() < 10 and 990 <= t.max() < 1000 and abs(t.float().mean() - 499.5) < 25
    x0, eps = (torch.cat([batch[name] for batch in batches]) for name in ("x0", "eps"))
    torch.testing.assert_close(x0.var(), latents["mean"].var() + 0.25, rtol=0.05, atol=0)  # a sample's, not the mean's
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01
    again = recipe.batch(3, share)
    assert all(torch.equal(again[name], batches[3][name]) for name in again), "a step draws the same whenever it is taken"


def test_the_error_of_eps_weighs_as_one_of_x0_clipped():
    schedule = Schedule(ScheduleConfig())
    w, t = diffusion.min_snr(schedule, 5.0), torch.tensor([0, 300, 999])
    x0, eps = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    x_t = q_sample(x0, t, eps, schedule)
    guess = eps + 0.1
    a = schedule.alpha_bar[t].view(-1, 1, 1, 1)
    of_x0 = (((x_t - (1 - a).sqrt() * guess) / a.sqrt() - x0) ** 2).flatten(1).mean(1)  # (3,)
    torch.testing.assert_close(w[t] * ((guess - eps) ** 2).flatten(1).mean(1), schedule.snr[t].clamp(max=5.0) * of_x0)
    assert (w[schedule.snr <= 5] == 1).all() and (w[schedule.snr > 5] < 1).all(), "weights of x0 itself, min(SNR, 5), would not be 1 where it is noisy"
    assert (diffusion.min_snr(schedule, float("inf")) == 1).all()
    floored = diffusion.min_snr(schedule, 5.0, 1.0) * schedule.snr  # as an error of x0
    torch.testing.assert_close(floored, (w * schedule.snr).clamp(min=1.0))
    for gamma, floor in ((0.0, 0.0), (5.0, 6.0), (5.0, -1.0)):
        with pytest.raises(LabkitError, match="gamma"):
            diffusion.min_snr(schedule, gamma, floor)


def test_the_loss_is_weighted_and_the_text_encoder_learns():
    text = CLIPText(replace(TABLETOP_TEXT, hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=len(tabletop.build_tokenizer()), max_position_embeddings=32))
    recipe, _ = diffusion_recipe(UNet(replace(TINY_UNET, cross_attention_dim=16)), text.requires_grad_(False))
    batch = recipe.batch(0, replace(CPU, batch_size=16))
    objective, schedule = recipe.players[0].objective, Schedule(ScheduleConfig())
    out = objective(batch)
    x_t = q_sample(batch["x0"], batch["t"], batch["eps"], schedule)
    error = (objective.unet(x_t, batch["t"], text(batch["ids"])) - batch["eps"]).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(out["loss"], (diffusion.min_snr(schedule).float()[batch["t"]] * error).mean())
    assert abs(out["loss"] - error.mean()) > 1e-3
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in text.named_parameters() if "k_proj.bias" not in name)
    assert set(recipe.players[0].trains) == {"unet", "text_encoder"}


def lesson_recipe(course: lessons.Course, shown: list, steps: int = 10):
    """Noise prediction of pictures that bear their number, in the order of a course."""
    n = len(shown)
    latents = {"mean": torch.arange(float(n)).view(n, 1, 1, 1).expand(n, 4, 2, 2), "std": torch.zeros(n, 4, 2, 2), "scale": torch.tensor(1.0)}
    timetable = lessons.Timetable(course, shown, steps, 1000)
    return diffusion.recipe(nn.Identity(), Ids(), tabletop.build_tokenizer(), None, latents, shown, ScheduleConfig(), timetable=timetable)


def test_a_course_holds_one_lesson_after_the_other():
    shown = data.scenes(data.World(counts=(1, 2, 3), groups=0.3), 0, 150)
    recipe = lesson_recipe(lessons.Course(((0.0, {"place": 3.0, "number": 1.0}), (0.5, {"relation": 1.0}))), shown)
    tokenizer, share = tabletop.build_tokenizer(), replace(CPU, batch_size=256)
    first, last = recipe.batch(4, share), recipe.batch(5, share)
    said = {word: id for word, id in zip("left right front behind two three four".split(), tokenizer(["left right front behind two three four"])[0, 1:].tolist())}

    def words(row, *which):
        return any(said[word] in row.tolist() for word in which)

    alone = [len(shown[int(x.mean())].objects) == 1 for x in first["x0"]]
    assert abs(sum(alone) / 256 - 0.75) < 0.08  # three standard deviations
    empty, numbered = tokenizer([""])[0], {1: ("left", "right", "front", "behind"), 2: ("two",), 3: ("three",)}
    assert all(t >= (500 if single else 300) for single, t in zip(alone, first["t"]))
    for group, least in ((True, 0.6), (False, 0.95)):  # what stands in the middle has no place
        spoken = [(row, scene) for row, scene, single in zip(first["ids"], (shown[int(x.mean())] for x in first["x0"]), alone)
                  if single == group and not torch.equal(row, empty)]
        assert sum(words(row, *numbered[len(scene.objects)]) for row, scene in spoken) > least * len(spoken) > 30
    for row, x, t in zip(last["ids"], last["x0"], last["t"]):
        kinds = {(obj.shape, obj.colour) for obj in shown[int(x.mean())].objects}
        assert len(shown[int(x.mean())].objects) == len(kinds) == 2 and t >= 400
    assert len(last["t"].unique()) > 150 and last["t"].max() > 985
    half = recipe.batch(4, replace(share, rank=1, world=2))
    assert all(torch.equal(half[name], first[name][1::2]) for name in first)


def test_lessons_without_pictures_are_left_out_and_a_course_is_checked():
    single = data.scenes(data.World(counts=(1,)), 0, 20)
    both = lesson_recipe(lessons.Course(((0.0, {"all": 1.0, "number": 9.0}),)), single).batch(0, replace(CPU, batch_size=8))
    assert len(both["ids"]) == 8
    with pytest.raises(LabkitError, match="none of 20 pictures belongs to number"):
        lesson_recipe(lessons.Course(((0.0, {"number": 1.0}),)), single).batch(0, CPU)
    for plan in ((), ((0.2, {"all": 1.0}),), ((0.0, {"al": 1.0}),), ((0.0, {"all": 1.0}), (0.5, {"all": 1.0}), (0.3, {"all": 1.0}))):
        with pytest.raises(LabkitError, match="a course begins at 0"):
            lessons.Course(plan)
    for wrong in ({"says": ("place",)}, {"t": (0.5, 0.5)}, {"t": (0.0, 2.0)}):
        with pytest.raises(LabkitError, match="kinds of words"):
            lessons.Lesson(**wrong)


def test_processes_share_one_batch_of_pictures_and_captions():
    recipe, _ = diffusion_recipe()
    whole = recipe.batch(5, replace(CPU, batch_size=6))
    for rank in range(2):
        part = recipe.batch(5, replace(CPU, rank=rank, world=2, batch_size=6))
        for name in whole:
            assert torch.equal(part[name], whole[name][rank::2]), name


def test_scale_factor_gives_sampled_latents_unit_variance():
    class Encoder(nn.Module):
        """Means that stray by 3 about 5, and a standard deviation of 2 on top."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def encode(self, x):
            mean = 5 + 3 * F.avg_pool2d(x, 8)[:, :1].expand(-1, 4, -1, -1) * 8 * 3**0.5 * 127.5 / 128  # uniform pixels: unit variance
            return DiagonalGaussian(mean, torch.full_like(mean, 4.0).log())

    images = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8)
    scale = vae.scale_factor(Encoder(), images)
    q = Encoder().encode(data.to_signed(images))
    z = q.sample(torch.randn(q.mean.shape, generator=torch.Generator().manual_seed(0)))
    assert (z * scale).std().item() == pytest.approx(1.0, abs=0.02)
    assert scale == pytest.approx(13**-0.5, rel=0.05)
    assert abs(scale - 1 / q.mean.std()) > 0.05 and abs(scale - z.pow(2).mean() ** -0.5) > 0.05, "the posterior's spread and the mean count"


# -- several processes, and all of it ------------------------------------------------------------------------------

TWO = """
import json, torch
from labkit.device import pick_device
import test_training as t
losses, worlds = t.train_diffusion({folder!r}, device=None if pick_device().type == "cpu" else "cpu")  # nobody says "cpu" who has nothing else
if torch.distributed.is_initialized():
    assert torch.distributed.get_backend() == "gloo", torch.distributed.get_backend()
    worlds.append(torch.distributed.get_world_size())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
print("RESULT", json.dumps([losses, worlds]))
"""


def train_diffusion(folder, device="cpu"):
    """Five steps of the true recipe on a tiny network; the losses, and of how many processes each batch was told.

    In float64: Adam makes a rounding error of a vanishing gradient as large as the rate, and processors round batches of two and of four differently.
    """
    torch.manual_seed(0)
    config = replace(TINY_UNET, cross_attention_dim=1)
    recipe, _ = diffusion_recipe(UNet(config), world=data.World(counts=(1,)))
    recipe.sheet, losses, worlds, batch = None, [], [], recipe.batch
    recipe.players[0].objective.double().text.register_forward_hook(lambda module, ids, states: states.double())

    def doubled(step, share):
        worlds.append(share.world)
        return {name: x.double() if x.is_floating_point() else x for name, x in batch(step, share).items()}

    recipe.batch = doubled
    recipe.stop_step = lambda step, found: losses.append(found["loss"])
    train(recipe, folder, device, steps=5, batch_size=4, lr=1e-4)
    return losses, worlds


def test_two_processes_lose_what_one_loses(tmp_path):
    alone, worlds = train_diffusion(tmp_path / "one")
    assert worlds == [1] * 5 and len(set(alone)) == 5
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    both = [child(TWO.format(folder=str(tmp_path / "two")), RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(2)]
    try:
        said = [process.communicate(timeout=280)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    for text in said:
        losses, worlds = json.loads(text.split("RESULT ")[1].splitlines()[0])
        assert worlds == [2] * 6, "there really were two"
        assert losses == pytest.approx(alone, abs=1e-6)
    one, two = (saved(tmp_path / name)["modules"]["unet"] for name in ("one", "two"))
    apart = torch.cat([(two[name] - one[name]).abs().flatten() for name in one])
    assert apart.mean() < 1e-9 and apart.max() < 1e-6, "their gradients are averaged; steps of 1e-4 make 5e-4"
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"checkpoint.pt", "log.jsonl"}


def test_bfloat16_is_used_where_the_device_has_it_only(monkeypatch):
    seen = []

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, batch):
            seen.append(self.layer(batch["x"]).dtype)
            return {"loss": self.layer(batch["x"]).float().sum()}

    for has in (True, False):
        monkeypatch.setattr(loop, "has_bfloat16", lambda device: has)
        for precision in ("bf16", "no"):
            asks, config = Asks(), LoopConfig(steps=1, batch_size=1, lr=1e-3, mixed_precision=precision)
            state = loop.State(Recipe([Player("asks", asks, {"asks": asks})], batch=None), config, Accelerator(cpu=True))
            state.step(0, {"x": torch.ones(1, 2)})
    assert seen == [torch.bfloat16, torch.float32, torch.float32, torch.float32]


def test_all_stages_from_nothing_to_a_model_that_draws(tmp_path, monkeypatch):
    from labkit.checkpoint import load_pipeline
    from labkit.diffusion import LatentDiffusion

    monkeypatch.setattr(data, "SHARD", 12)
    short = LoopConfig(steps=2, batch_size=2, lr=1e-3, warmup=1)
    preset = tabletop.Preset(
        world=data.World(counts=(1,)), pictures=12, clip=short, vae=short, diffusion=replace(short, mixed_precision="bf16"), unet_config=TINY_UNET, vae_config=TINY_VAE,
        vae_loss=vae.VAELoss(adversarial_from=1, full_from=1), name="mine",
    )  # fmt: skip
    tabletop.train("all", tmp_path, preset, "cpu")
    parts = load_pipeline(tmp_path / "model")
    latents = diffusion.load_file(tmp_path / "latents.safetensors")
    assert parts.vae.config.scaling_factor == pytest.approx(float(latents["scale"]))
    z = latents["mean"] + latents["std"] * torch.randn(latents["mean"].shape, generator=torch.Generator().manual_seed(0))
    assert z.std().item() == pytest.approx(1.0, abs=0.05)
    trained = saved(tmp_path / "diffusion")["ema"]["unet"]
    torch.testing.assert_close(parts.unet.state_dict()["conv_in.weight"], trained["conv_in.weight"].half().float())
    assert parts.name == "mine" and (tmp_path / "model" / "SHA256SUMS").exists() and (tmp_path / "model" / "image_tower" / "model.safetensors").exists()
    lab = LatentDiffusion(parts.unet, parts.vae, parts.text_encoder, parts.tokenizer, parts.schedule_config, parts.name, parts.metadata)
    assert lab.generate("a red sphere", steps=2, progress=False).image.size == (128, 128)
    assert lab.metadata["training"] == {"counts": [1], "styles": ["photo"], "groups": 0.0, "hidden": 0.4, "pictures": 12}
    with pytest.raises(LabkitError, match="does not know 'dog'"):
        lab.generate("a dog", progress=False)
    sheets = {path.parent.name for path in tmp_path.glob("*/sheet-000002.png")}
    assert sheets == {"vae", "diffusion"}
    on = replace(preset, start=str(tmp_path / "model"), clip=None)
    with pytest.raises(LabkitError, match="does not train the text encoder by contrast; train vae, diffusion or all"):
        tabletop.train("clip", tmp_path / "on", on, "cpu")
    tabletop.train("all", tmp_path / "on", replace(on, vae=replace(short, lr=0.0), diffusion=replace(short, lr=0.0)), "cpu")
    same = load_pipeline(tmp_path / "on" / "model")
    for part in ("unet", "vae", "text_encoder"):  # a rate of zero: what comes out is what it started from
        torch.testing.assert_close(getattr(same, part).state_dict(), getattr(parts, part).state_dict(), rtol=0, atol=0)
    with pytest.raises(LabkitError, match="does not train the decoder apart; train clip, vae, diffusion or all"):
        tabletop.train("decoder", tmp_path, preset, "cpu")
    sharper = replace(on, vae=replace(short, lr=0.0), diffusion=replace(short, lr=0.0), decoder=short)
    tabletop.train("all", tmp_path / "sharper", sharper, "cpu")
    sharp, plain = load_pipeline(tmp_path / "sharper" / "model").vae.state_dict(), parts.vae.state_dict()
    moved = {name for name, value in sharp.items() if not torch.equal(value, plain[name])}
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved), "the latents stay what they are"
    kept = replace(on, vae=None, decoder=short, diffusion=replace(short, lr=0.0))
    with pytest.raises(LabkitError, match="does not train the autoencoder; train diffusion, decoder or all"):
        tabletop.train("vae", tmp_path / "kept", kept, "cpu")
    tabletop.train("all", tmp_path / "kept", kept, "cpu")
    assert not (tmp_path / "kept" / "vae").exists()
    theirs = load_pipeline(tmp_path / "kept" / "model").vae
    assert theirs.config.scaling_factor == parts.vae.config.scaling_factor, "the scale that the U-Net knows"
    moved = {name for name, value in theirs.state_dict().items() if not torch.equal(value, plain[name])}
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved), moved
    narrow = replace(TINY_UNET, block_out_channels=(8, 12))
    tabletop.train("all", tmp_path / "narrow", replace(on, vae=None, unet_config=narrow, diffusion=replace(short, lr=0.0)), "cpu")
    other = load_pipeline(tmp_path / "narrow" / "model")
    assert other.unet.config == narrow and not other.unet.conv_out.weight.any(), "a U-Net that is built otherwise begins from nothing"
    assert parts.unet.conv_out.weight.any()
    wide = replace(TINY_UNET, block_out_channels=(16, 32))
    tabletop.train("all", tmp_path / "wide", replace(on, vae=None, unet_config=wide, diffusion=replace(short, lr=0.0)), "cpu")
    grown, expected = load_pipeline(tmp_path / "wide" / "model").unet, widen(parts.unet, wide)
    torch.testing.assert_close(grown.state_dict(), {name: value.half().float() for name, value in expected.state_dict().items()}, rtol=0, atol=0)
    for part in ("vae", "text_encoder"):
        torch.testing.assert_close(getattr(other, part).state_dict(), getattr(parts, part).state_dict(), rtol=0, atol=0)
    words = replace(on, vae=None, clip=short, course=lessons.Course(((0.0, {"all": 1.0}),)), diffusion=replace(short, lr=0.0))
    tabletop.train("all", tmp_path / "words", words, "cpu")
    spoken = load_pipeline(tmp_path / "words" / "model")
    assert any(not torch.equal(a, b) for a, b in zip(spoken.text_encoder.parameters(), parts.text_encoder.parameters()))
    torch.testing.assert_close(spoken.unet.state_dict(), parts.unet.state_dict(), rtol=0, atol=0)
    towers = [(tmp_path / name / "image_tower" / "model.safetensors").read_bytes() for name in ("model", "words/model")]
    assert towers[0] == towers[1], "distances are taken by the tower that they were taken by"
    for stage in ("vae", "clip"):
        with pytest.raises(LabkitError, match="needs a model to take them from"):
            replace(preset, **{stage: None})
    before = (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    tabletop.train("all", tmp_path, preset, "cpu")  # nothing is left to do
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_presets_are_made_of_parts_that_fit():
    for name, preset in tabletop.PRESETS.items():
        with torch.device("meta"):
            unet, vae_net = UNet(preset.unet_config), VAE(preset.vae_config)
            z = vae_net.encode(torch.zeros(1, 3, 128, 128)).mean
            c = torch.zeros(1, TABLETOP_TEXT.max_position_embeddings, TABLETOP_TEXT.hidden_size)
            assert unet(z, torch.zeros(1), c).shape == z.shape == (1, 4, preset.unet_config.sample_size, preset.unet_config.sample_size), name
    mini, whole = (sum(p.numel() for p in UNet(tabletop.PRESETS[name].unet_config).parameters()) for name in ("tabletop-mini", "tabletop"))
    assert mini < 0.7 * whole
