"""checks: every reference passes, every known mistake is named, an empty skeleton is told what to write; so are other wrong answers.

The solutions printed in the notebooks are run here too: what a reader unfolds is what passes.
"""

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
        assert len(text) > 20 and text.rstrip().endswith((".", "?", "`.", "$.")), text


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
    names = {"torch": torch, "math": import_module("math"), "F": torch.nn.functional}
    exec(solution, names)
    assert check(names[name]), check(names[name])
    empty = {**names}
    exec(skeleton.split("check.")[0], empty)
    assert check(empty[name]).passed is None


def test_every_check_is_an_exercise_of_its_notebook():
    used = {f"{file}.{name}" for _, file, name, _, _ in exercises()}
    there = {name for name in CHECKS if any(e[1] == name.split(".")[0] for e in exercises())}
    assert used == there
