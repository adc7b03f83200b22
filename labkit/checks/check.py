"""Checks that name the mistake: an answer is compared with the reference, and with the wrong answers that people really give.

    answer(case) = reference(case)  for all cases    ->  correct
    answer(case) = twin(case)       for all cases    ->  that twin's sentence: "You used alpha, the equation has alpha_bar."
    neither                                          ->  what can be told from the numbers: shape, sign, a constant factor, the first difference

A wrong answer is worth more than a red light. Twins are functions, so a test holds every one of them to its sentence
(tests/test_checks.py), and a case on which a twin and the reference agree is found there and not in class.
"""

import copy
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = {True: ("✓", "Correct"), False: ("✗", "Not yet"), None: ("…", "Yours to write")}


@dataclass(frozen=True)
class Verdict:
    """What a check found. `passed` is True, False, or None where nothing has been written yet; `said` is a sentence or two."""

    name: str
    passed: bool | None
    said: str

    def __bool__(self) -> bool:
        return self.passed is True

    def __repr__(self) -> str:
        sign, word = FORMATS[self.passed]
        return f"{sign} {word}: {self.said}"

    def _repr_markdown_(self) -> str:
        sign, word = FORMATS[self.passed]
        return f"{sign} **{word}.** {self.said}"


@dataclass(frozen=True)
class Check:
    """One exercise. Called with a student's function, or with a value where the reference takes no arguments, it gives a Verdict."""

    name: str                                              # what the exercise's function is called
    reference: Callable                                    # labkit's own answer
    wrong: Mapping[str, Callable]                          # a sentence that names the mistake -> the function that makes it
    task: str                                              # said to an empty skeleton: what is to be written
    praise: str                                            # said to a right answer: why it is so, or what follows
    cases: Callable[[], Sequence[tuple]] = lambda: [()]    # makes the arguments of every call anew
    tolerance: float = 1e-4                                # relative to the largest value of the reference

    def __call__(self, answer) -> Verdict:
        function = answer if callable(answer) else lambda *_: answer
        try:
            given, touched = _run(function, self.cases(), copied=True)
        except NotImplementedError:
            return Verdict(self.name, None, self.task)
        except Exception as error:  # whatever a student's code may raise
            return Verdict(self.name, False, f"`{self.name}` stopped with {_place(error)}.")
        if all(value is None or value is Ellipsis for value in given):
            return Verdict(self.name, None, self.task)
        expected, _ = _run(self.reference, self.cases())
        if (fault := next(filter(None, map(_fault, given, expected)), None)) is None and _equal(given, expected, self.tolerance):
            if touched:
                return Verdict(self.name, False, f"The result is right, but `{self.name}` changes {touched} in place, and the caller still needs it.")
            return Verdict(self.name, True, self.praise)
        for sentence, twin in self.wrong.items():
            if _equal(given, _attempt(twin, self.cases()), self.tolerance):
                return Verdict(self.name, False, sentence)
        return Verdict(self.name, False, fault or _difference(given, expected, self.tolerance))


def checks_of(module) -> dict[str, Check]:
    """The checks of a module by name, in the order in which they stand there."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Check)}


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers for a case, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- running and comparing ---------------------------------------------------------------------------------------


def _run(function: Callable, cases: Sequence[tuple], copied: bool = False) -> tuple[list, str]:
    """The function's results, and which argument it changed, in words ("" if none)."""
    results, touched = [], ""
    for case in cases:
        before = copy.deepcopy([a for a in case if isinstance(a, Tensor)]) if copied else []
        results.append(function(*case))
        after = [a for a in case if isinstance(a, Tensor)]
        if any(not torch.equal(b, a) for b, a in zip(before, after)):
            touched = "a tensor that it was given"
    return results, touched


def _attempt(twin: Callable, cases: Sequence[tuple]) -> list | None:
    try:
        return _run(twin, cases)[0]
    except Exception:  # a twin may be impossible on some case, as the mistake it stands for is
        return None


def _parts(value) -> list | None:
    """A result as a flat list of tensors, words and other single things; None if it is made of something else."""
    if isinstance(value, (tuple, list)):
        parts = [_parts(v) for v in value]
        return None if any(p is None for p in parts) else [q for p in parts for q in p]
    if isinstance(value, (bool, str)):
        return [value]
    if isinstance(value, (int, float)):
        return [torch.tensor(float(value), dtype=torch.float64)]
    if isinstance(value, Tensor):
        return [value.detach().to("cpu", torch.float64)]
    if hasattr(value, "__array__"):
        return [torch.as_tensor(value.__array__()).double()]
    return None


def _fault(given, expected) -> str | None:
    """What is wrong with the kind or shape of a result; None if it can be compared."""
    a, b = _parts(given), _parts(expected)
    if given is None or given is Ellipsis:
        return "Some calls return nothing: is there a `return` on every way through the function?"
    if a is None:
        return f"It returns {_kind(given)}; expected is {_kind(expected)}."
    if len(a) != len(b) or any(isinstance(p, Tensor) != isinstance(q, Tensor) for p, q in zip(a, b)):
        return f"It returns {_kind(given)}; expected is {_kind(expected)}."
    for p, q in zip(a, b):
        if isinstance(p, Tensor) and p.shape != q.shape and not (p.numel() == q.numel() == 1):
            return f"The result has the shape {tuple(p.shape)}; expected is {tuple(q.shape)}."
        if isinstance(p, Tensor) and bool((p.isnan() & ~q.isnan()).any()):
            return "There are NaNs in the result: a root of a negative number, 0 / 0, or infinity minus infinity."
    return None


def _equal(given: list | None, expected: list | None, tolerance: float) -> bool:
    if given is None or expected is None or len(given) != len(expected):
        return False
    for a, b in zip(map(_parts, given), map(_parts, expected)):
        if a is None or b is None or len(a) != len(b):
            return False
        for p, q in zip(a, b):
            if not isinstance(p, Tensor) or not isinstance(q, Tensor):
                if type(p) is not type(q) or p != q:
                    return False
            elif p.numel() != q.numel() or (p.shape != q.shape and p.numel() != 1):
                return False
            elif not torch.allclose(p.flatten(), q.flatten(), rtol=tolerance, atol=tolerance * _size(q), equal_nan=True):
                return False
    return True


def _size(q: Tensor) -> float:
    finite = q[q.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _difference(given: list, expected: list, tolerance: float) -> str:
    """What can be told of a wrong result that is no known mistake."""
    pairs = [(p, q) for a, b in zip(given, expected) for p, q in zip(_parts(a), _parts(b))]
    if not all(isinstance(p, Tensor) for p, _ in pairs):
        p, q = next((p, q) for p, q in pairs if not isinstance(p, Tensor) and p != q or isinstance(p, Tensor) and not torch.allclose(p, q))
        return f"The result has {_shown(p)} where {_shown(q)} is expected."
    p, q = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    norm = float(q @ q)
    ratio = float(p @ q) / norm if norm > 0 and math.isfinite(norm) else math.nan
    if math.isfinite(ratio) and ratio != 0 and torch.allclose(p, ratio * q, rtol=tolerance, atol=tolerance * _size(q)):
        return "The result has the wrong sign." if abs(ratio + 1) < tolerance else f"The result is {ratio:.4g} times what is expected, everywhere."
    for n, (a, b) in enumerate(zip(given, expected), 1):
        if not _equal([a], [b], tolerance):
            right = n - 1
            break
    u, v = next((u, v) for u, v in zip(torch.cat([x.flatten() for x in _parts(a)]), torch.cat([x.flatten() for x in _parts(b)]))
                if not torch.isclose(u, v, rtol=tolerance, atol=tolerance * _size(q), equal_nan=True))
    cases = f"{right} of {len(given)} test cases are right; in the next" if len(given) > 1 else "For the numbers it was tested with"
    return f"The kind and shape are right, the numbers are not, and it is none of the mistakes known here. {cases} it gives {u:.4g} where {v:.4g} is expected."


def _shown(value) -> str:
    return f"{value.item():.4g}" if isinstance(value, Tensor) and value.numel() == 1 else repr(value)


def _kind(value) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return {"int": "a number", "float": "a number", "NoneType": "nothing"}.get(type(value).__name__, f"a {type(value).__name__}")


def _place(error: Exception) -> str:
    """The error, and the student's line in which it happened."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    line = next((f.line for f in frames if f.line), None)
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}" + (f" ({first})" if first else "") + (f" in the line `{line}`" if line else "")
