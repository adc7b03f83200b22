"""checks: every reference passes, every known mistake is named, an empty skeleton is told what to write; so are other wrong answers.

The solutions printed in the notebooks are run here too: what a reader unfolds is what passes.
"""

import math
import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import nbformat
import pytest
import torch

import labkit.checks
from labkit.checks.check import Check, Verdict, checks_of, seeded

ROOT = Path(__file__).resolve().parent.parent
FILES = [m.name for m in iter_modules(labkit.checks.__path__) if m.name != "check"]
CHECKS = {f"{name}.{one}": check for name in FILES for one, check in checks_of(import_module(f"labkit.checks.{name}")).items()}
TWINS = [(name, sentence) for name, check in CHECKS.items() for sentence in check.wrong]


def value_of(check: Check, function):
    """What a student hands in: the function, or for exercises without arguments its value."""
    return function if check.cases() != [()] else function()


@pytest.mark.parametrize("name", CHECKS)
def test_the_reference_passes_and_is_praised(name):
    verdict = CHECKS[name](value_of(CHECKS[name], CHECKS[name].reference))
    assert verdict.passed is True and verdict and verdict.said == CHECKS[name].praise, verdict


@pytest.mark.parametrize("name, sentence", TWINS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(TWINS)])
def test_every_known_mistake_is_named(name, sentence):
    check = CHECKS[name]
    verdict = check(value_of(check, check.wrong[sentence]))
    assert verdict.passed is False and not verdict and verdict.said == sentence, verdict


@pytest.mark.parametrize("name", CHECKS)
def test_an_empty_skeleton_is_told_what_to_write(name):
    check = CHECKS[name]

    def unwritten(*_):
        raise NotImplementedError

    for skeleton in (lambda *_: None, lambda *_: ..., unwritten, ...):
        verdict = check(skeleton)
        assert verdict.passed is None and not verdict and verdict.said == check.task, verdict


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_has_its_own_name_mistakes_and_kind_words(name):
    check = CHECKS[name]
    assert name.split(".")[1] == check.name and len(check.wrong) >= 2
    for text in (check.task, check.praise, *check.wrong):
        assert len(text) > 15 and text.rstrip().endswith((".", "?", ".)")), text


@pytest.mark.parametrize("name", CHECKS)
def test_numbers_that_are_just_wrong_are_not_passed(name):
    """Neither a hundredth too large, nor noisy, nor of another shape, nor an exception."""
    check = CHECKS[name]

    def scaled(*args):
        return bent(check.reference(*args))

    def broken(*_):
        return {}["nothing"]

    if check.cases() != [()]:
        assert check(broken).passed is False and "KeyError" in check(broken).said and 'return {}["nothing"]' in check(broken).said
    verdict = check(value_of(check, scaled))
    assert verdict.passed is False and verdict.said, verdict
    assert check(value_of(check, lambda *args: object())).passed is False


def bent(value):
    if isinstance(value, (tuple, list)):
        return type(value)(bent(v) for v in value)
    if isinstance(value, (bool, str)):
        return f"{value}?"
    return value * 1.01 + 0.003


# ---- the machinery, on a check of its own ------------------------------------------------------------------------

DOUBLE = Check("double", lambda x: 2 * x, {"You squared it.": lambda x: x * x}, "write `double`.", "twice.", lambda: [(seeded(3),), (seeded(2, 4),)])


def in_place(x):
    x *= 2
    return x


@pytest.mark.parametrize("answer, said", [
    (lambda x: x * x, "You squared it."),
    (lambda x: -2 * x, "The result has the wrong sign."),
    (lambda x: 6 * x, "The result is 3 times what is expected, everywhere."),
    (lambda x: 2 * x.T if x.ndim == 2 else 2 * x, "The result has the shape (4, 2); expected is (2, 4)."),
    (lambda x: (2 * x).tolist(), "It returns a list of 3; expected is a tensor of shape (3,)."),
    (lambda x: "2x", "It returns a str; expected is a tensor of shape (3,)."),
    (lambda x: (x - 10).sqrt(), "There are NaNs in the result"),
    (lambda x: 2 * x if x.ndim == 1 else None, "Some calls return nothing"),
    (lambda x: 2 * x + (x.ndim == 2), "1 of 2 test cases are right"),
    (lambda x: 2 * x + 1, "The kind and shape are right, the numbers are not"),
    (lambda: 0, "`double` stopped with TypeError"),
    (in_place, "The result is right, but `double` changes a tensor that it was given in place"),
])
def test_what_can_be_told_is_told(answer, said):
    verdict = DOUBLE(answer)
    assert verdict.passed is False and said in verdict.said, verdict


def test_right_numbers_pass_in_any_precision_and_as_arrays():
    assert DOUBLE(lambda x: 2 * x.float()) and DOUBLE(lambda x: (2 * x).numpy())


def test_a_value_is_checked_like_a_function():
    check = Check("count", lambda: 48, {"You forgot the channels.": lambda: 64}, "say it.", "yes.")
    assert check(48) and check(48.0) and check(torch.tensor(48))
    assert check(64).said == "You forgot the channels." and check(-48).said == "The result has the wrong sign."
    assert check(...).passed is None and check(None).passed is None
    assert check("48").passed is False


def test_words_are_compared_as_words():
    check = Check("cut", lambda t: t.split(), {"Letters.": lambda t: list(t)}, "cut.", "so.", lambda: [("a red cube",)])
    assert check(lambda t: t.split()) and check(list).said == "Letters."
    assert check(lambda t: ["a", "red", "ball"]).said == "The result has 'ball' where 'cube' is expected."


def test_a_verdict_reads_well_as_text_and_in_a_notebook():
    assert repr(Verdict("f", True, "so.")) == "✓ Correct: so." and Verdict("f", None, "write it.")._repr_markdown_() == "… **Yours to write.** write it."
    assert repr(Verdict("f", False, "no."))[0] == "✗"


# ---- the references are labkit's own ------------------------------------------------------------------------------


def test_the_samplers_references_are_the_samplers():
    """Three steps by hand with the references are three steps of labkit's samplers, on a denoiser that bends."""
    from labkit.checks import sampling
    from labkit.mixture import Mixture, exact_denoiser
    from labkit.samplers import ddim, ddpm, dpm_solver, euler, heun
    from labkit.samplers.sigmas import lambda_levels, sigma_levels, signal
    from labkit.schedule import Schedule, ScheduleConfig

    s = Schedule(ScheduleConfig(timestep_spacing="trailing", set_alpha_to_one=True))
    denoise, x_T = exact_denoiser(Mixture(seeded(3, 4, seed=7), 0.3), s), seeded(5, 4, seed=8)
    a, t = [*(s.alpha_bar_at(t) for t in s.timesteps(3).tolist()), 1.0], s.timesteps(3).tolist()

    x = x_T
    for i, step in enumerate(ddim(denoise, x_T, s, 3)):
        a_s = s.alpha_bar_at(t[i] - 333)
        x = sampling.ddim_step.reference(x, denoise(x, t[i]), a[i], a_s)
        assert torch.allclose(x, step.x)
    x, zs = x_T, [seeded(5, 4, seed=20 + i) for i in range(3)]
    for i, step in enumerate(ddpm(denoise, x_T, s, 3, noise=iter(zs).__next__)):
        x = sampling.ddpm_step.reference(x, denoise(x, t[i]), zs[i], a[i], a[i + 1])
        assert torch.allclose(x, step.x, atol=1e-6)
    ts, sigmas = sigma_levels(s, 3)

    def slope(x_bar, sigma):
        return denoise(x_bar * signal(sigma), ts[sigmas.index(sigma)])

    for run, once in ((euler, lambda x, n: sampling.euler_step.reference(x, slope(x, sigmas[n]), sigmas[n], sigmas[n + 1])),
                      (heun, lambda x, n: sampling.heun_step.reference(x, sigmas[n], sigmas[n + 1], slope))):
        x = x_T / signal(sigmas[0])
        for step in run(denoise, x_T, s, 3):
            if step.i < 2:  # Heun's last step, to sigma = 0, is Euler's
                x = once(x, step.i)
                assert torch.allclose(x * signal(sigmas[step.i + 1]), step.x)
    ts, sigmas = lambda_levels(s, 3)
    steps = list(dpm_solver(denoise, x_T, s, 3))
    h = [math.log(u / v) for u, v in zip(sigmas[:2], sigmas[1:3])]
    D = sampling.look_ahead.reference(steps[1].x0, steps[0].x0, h[1], h[0])
    by_hand = sigmas[2] / sigmas[1] * steps[0].x / signal(sigmas[1]) - math.expm1(-h[1]) * D
    assert torch.allclose(by_hand * signal(sigmas[2]), steps[1].x)


def test_the_iou_is_that_of_the_measured_grounding():
    from labkit.checks import looking
    from labkit.measure.grounding import ious

    m, mask = seeded(6, 6).abs(), seeded(6, 6, seed=1) > 0.2
    for tau in (0.1, 0.3, 0.7):
        assert torch.allclose(looking.iou.reference(m, mask, tau), ious(m, mask, (tau,))[0])


def test_psnr_is_the_evaluations_and_the_scale_factor_the_trainings():
    from labkit.checks import autoencoder
    from labkit.models.vae import DiagonalGaussian
    from labkit.training.measures import psnr
    from labkit.training.vae import scale_factor

    x, y = seeded(3, 3, 5, 5).sigmoid(), seeded(3, 3, 5, 5, seed=1).sigmoid()
    assert torch.allclose(autoencoder.psnr.reference(x, y), psnr(x, y))
    z = 3 * seeded(2, 4, 2, 2) + 1

    class Fixed(torch.nn.Conv2d):
        def encode(self, images):
            return DiagonalGaussian(z, torch.full_like(z, -60.0))

    assert abs(scale_factor(Fixed(1, 1, 1), torch.zeros(2, 8, 8, 3, dtype=torch.uint8).numpy()) - autoencoder.scale_factor.reference(z)) < 1e-6


def test_the_words_references_are_the_tokenizers_and_the_text_encoders():
    from labkit.checks import words
    from labkit.models.clip import ACTIVATIONS, CausalAttention
    from labkit.models.layers import Attention
    from labkit.models.tokenizer import Tokenizer, build_vocabulary
    from labkit.tap import listen

    vocab, merges = build_vocabulary(["lower", "newer", "blue", "low", "checkered"])
    tokenizer = Tokenizer(vocab, merges)
    for word in ("lower", "bluer", "newest", "checked", "x"):
        assert tuple(words.bpe.reference(word, tokenizer.merges)) == tokenizer.tokenize(word).pieces
    x = torch.linspace(-5, 5, 50)
    assert torch.equal(words.quick_gelu.reference(x), ACTIVATIONS["quick_gelu"](x))

    causal, seen = CausalAttention(8, 2), []
    with listen(causal, {"probs": lambda p, _: seen.append(p)}):
        causal(h := seeded(1, 5, 8).float())
    q, k = (words.split_heads.reference(proj(h), 2) for proj in (causal.q_proj, causal.k_proj))
    assert torch.allclose(words.causal.reference(q @ k.transpose(-1, -2) / 2), seen[0], atol=1e-6)

    attn, x, c = Attention(8, 2, 6), seeded(1, 9, 8).float(), seeded(1, 5, 6, seed=1).float()
    q, k, v = (words.split_heads.reference(proj(of), 2) for proj, of in ((attn.to_q, x), (attn.to_k, c), (attn.to_v, c)))
    with listen(attn, {"heads": lambda out, _: seen.append(out)}):
        attn(x, c)
    assert torch.allclose(words.cross_attention.reference(q, k, v), seen[1], atol=1e-6)


# ---- the notebooks' own solutions --------------------------------------------------------------------------------


def exercises() -> list:
    """(notebook, file, check, solution) of every line that calls a check; the solution is in the next <details>."""
    found = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        for i, cell in enumerate(cells):
            called = re.search(r"^check\.(\w+)\(", cell.source, re.M) if cell.cell_type == "code" else None
            if called:
                file = re.search(r"from labkit\.checks import (\w+) as check", "\n".join(c.source for c in cells))[1]
                solution = re.search(r"<summary>Solution</summary>\s*```python\n(.*?)```", cells[i + 1].source, re.S)
                found.append((path.stem, file, called[1], cell.source, solution and solution[1]))
    return found


@pytest.mark.parametrize("notebook, file, name, skeleton, solution", exercises(), ids=lambda v: v if isinstance(v, str) and len(v) < 30 else "")
def test_the_printed_solution_passes_and_the_skeleton_is_unwritten(notebook, file, name, skeleton, solution):
    check = CHECKS[f"{file}.{name}"]
    assert solution, f"{notebook}: no solution under the exercise {name}"
    names = {"torch": torch, "math": math, "F": torch.nn.functional}
    exec(solution, names)
    assert check(names[name]), check(names[name])
    empty = {**names}
    exec(skeleton.split("check.")[0], empty)
    assert check(empty[name]).passed is None


def test_every_check_is_an_exercise_of_its_notebook():
    used = {f"{file}.{name}" for _, file, name, _, _ in exercises()}
    there = {name for name in CHECKS if any(e[1] == name.split(".")[0] for e in exercises())}
    assert used == there
