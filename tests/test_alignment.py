"""alignment: who copies from whom, by any tokenizer; shares stay shares; and the published code's numbers with their quirks."""

import pytest
import torch

from labkit.editing import published
from labkit.editing.alignment import align, fewest_changes
from labkit.errors import LabkitError
from labkit.models.tokenizer import Tokenizer, build_vocabulary

WORDS = "a the cat dog on mat fluffy red , bird two".split()
L = 12
TOKENIZER = Tokenizer(*build_vocabulary(WORDS), max_length=L)  # "zyx" is none of its words: three tokens
SHORT, LONG = "a cat on mat", "a zyx on mat"
CASES = [
    ("a cat on mat", "a dog on mat"), (SHORT, LONG), (LONG, SHORT), ("zyx cat", "cat zyx"), ("a zyx", "a wvut"), ("a wvut, red", "a zy, red"),
    ("a zyx zyx zyx", "a cat cat cat"), ("a cat cat cat", "a zyx zyx zyx"), ("wvutsrqpon", "cat"), ("cat", "wvutsrqpon"),
]  # fmt: skip
GROWN = [("a cat", "a fluffy red cat"), ("a fluffy red cat", "a cat"), ("a cat on mat", "two zyx, a cat on the mat"), ("a cat", "the dog on a mat")]


def attention(*shape, seed=0):
    return torch.randn(*shape, L, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)


@pytest.mark.parametrize("source, target", CASES)
def test_replacing_gives_every_share_on_once(source, target):
    found = align(TOKENIZER, source, target)
    assert torch.equal(found.own, torch.zeros(L))
    torch.testing.assert_close(found.matrix.sum(1), torch.ones(L))
    edited = found.mixed(attention(2, 5), attention(2, 5, seed=1))
    torch.testing.assert_close(edited.sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(edited, attention(2, 5) @ found.matrix)


@pytest.mark.parametrize("method", ["replace", "refine"])
@pytest.mark.parametrize("source, target", CASES + GROWN)
@pytest.mark.parametrize("strength", [1.0, 0.4, "by token"])
def test_rows_sum_to_one_whatever_is_edited(source, target, method, strength):
    strength = torch.linspace(0, 1, L) if strength == "by token" else strength
    found = align(TOKENIZER, source, target, method)
    edited = found.mixed(attention(3, 4), attention(3, 4, seed=1), strength)
    torch.testing.assert_close(edited.sum(-1), torch.ones(3, 4))
    assert (edited >= 0).all()


def test_without_normalising_they_would_not():
    found = align(TOKENIZER, "a cat", "a fluffy red cat", "refine")
    raw = attention(1, 40) @ found.matrix * (1 - found.own) + attention(1, 40, seed=1) * found.own
    assert (raw.sum(-1) - 1).abs().max() > 0.05
    torch.testing.assert_close(found.mixed(attention(1, 40), attention(1, 40, seed=1)), raw / raw.sum(-1, keepdim=True))


def test_words_of_different_token_counts_do_not_shift_what_follows():
    """The published mapper gives "on" the map of EOS here; the right one gives it that of "on"."""
    shares = attention(1, 6)
    edited = align(TOKENIZER, SHORT, LONG).mixed(shares, attention(1, 6, seed=1))
    torch.testing.assert_close(edited[..., [0, 1, 5, 6, 7]], shares[..., [0, 1, 3, 4, 5]])  # BOS a on mat EOS
    torch.testing.assert_close(edited[..., 2:5], shares[..., 2:3].expand(1, 6, 3) / 3)
    torch.testing.assert_close(edited[..., 8:11], shares[..., 6:9])
    torch.testing.assert_close(edited[..., 11], shares[..., 9:].sum(-1))  # two paddings fewer
    back = align(TOKENIZER, LONG, SHORT).mixed(shares, attention(1, 6, seed=1))
    torch.testing.assert_close(back[..., 2], shares[..., 2:5].sum(-1))
    torch.testing.assert_close(back[..., [0, 1, 3, 4, 5]], shares[..., [0, 1, 5, 6, 7]])
    torch.testing.assert_close(back[..., 9:], shares[..., 11:].expand(1, 6, 3) / 3)


def test_replace_copies_and_refine_keeps():
    source, target = attention(1, 3), attention(1, 3, seed=1)
    replaced = align(TOKENIZER, "a cat on mat", "a dog on mat").mixed(source, target)
    torch.testing.assert_close(replaced, source)
    refined = align(TOKENIZER, "a cat on mat", "a dog on mat", "refine")
    assert refined.own.nonzero().flatten().tolist() == [2]
    unscaled = source.clone()
    unscaled[..., 2] = target[..., 2]
    torch.testing.assert_close(refined.mixed(source, target), unscaled / unscaled.sum(-1, keepdim=True))


@pytest.mark.parametrize("method", ["replace", "refine"])
@pytest.mark.parametrize("prompt", ["a cat", "two zyx, a zyx", "wvutsrqpon"])
@pytest.mark.parametrize("reference", [False, True])
def test_the_same_prompt_changes_no_bit(prompt, method, reference):
    found = align(TOKENIZER, prompt, prompt, method, reference)
    shares = attention(2, 3, 7)
    for strength in (1.0, 0.0, torch.tensor([0.0, 1.0] * 6)):
        assert torch.equal(found.mixed(shares, shares.clone(), strength), shares)
    assert found.gone == found.new == ()


@pytest.mark.parametrize(
    "before, after, pairs",
    [
        ("a cat", "a dog", [(0, 0), (1, 1)]), ("a cat", "a fluffy dog", [(0, 0), (None, 1), (1, 2)]), ("a red cat", "a cat", [(0, 0), (1, None), (2, 1)]),
        ("a cat", "the cat on a mat", [(0, 0), (1, 1), (None, 2), (None, 3), (None, 4)]), ("", "a cat", [(None, 0), (None, 1)]),
        ("a red cat and dog", "a cat and red dog", [(0, 0), (1, None), (2, 1), (3, 2), (None, 3), (4, 4)]),
    ],
)  # fmt: skip
def test_fewest_changes(before, after, pairs):
    assert fewest_changes(before.split(), after.split()) == pairs


def test_what_is_gone_and_what_is_new():
    found = align(TOKENIZER, "a cat, on mat", "a zyx, on the mat")
    assert found.gone == ((2,),) and found.new == ((2, 3, 4), (7,))


def test_it_prints_as_a_table():
    assert str(align(TOKENIZER, SHORT, LONG)).splitlines() == [
        "the target's      copies the source's",
        "<|startoftext|>   <|startoftext|>",
        "a                 a",
        "z                 1/3 of cat",
        "y                 1/3 of cat",
        "x                 1/3 of cat",
        "on                on",
        "mat               mat",
        "<|endoftext|>     <|endoftext|>",
        "padding (4)       padding (6)",
    ]
    assert ("é", "1/2 of cat") in align(TOKENIZER, "a cat", "a é").rows()  # two bytes, one character
    refined = align(TOKENIZER, "a cat", "a red cat", "refine")
    assert ("red", "keeps its own map") in refined.rows() and "<td>red</td><td>keeps its own map</td>" in refined._repr_html_()
    assert ("cat", "z + y + x") in align(TOKENIZER, LONG, SHORT).rows()
    full = align(TOKENIZER, "a cat " * 5, "a cat")  # ten words fill the context: the source has no padding
    assert full.rows()[-1] == ("padding (8)", "padding (0) and <|endoftext|>")


# ---- the published code's numbers ---------------------------------------------------------------------------------


def test_published_replacement_one_token_for_three():
    M = align(TOKENIZER, SHORT, LONG, reference=True).matrix
    expected = torch.zeros(L, L)
    expected[0, 0] = expected[1, 1] = 1
    expected[2, 2:5] = 1 / 3
    for j in range(5, L):
        expected[j, j] = 1  # "on", at 5, is given the map of EOS
    assert torch.equal(M, expected)
    assert M.sum(1).tolist()[3:5] == [0, 0]  # "on" and "mat" are dropped
    uniform = torch.full((1, L), 1 / L)
    edited = align(TOKENIZER, SHORT, LONG, reference=True).mixed(uniform, uniform)
    assert float(edited.sum()) == pytest.approx(1 - 2 / L) and not torch.allclose(M, align(TOKENIZER, SHORT, LONG).matrix)


def test_published_replacement_three_tokens_for_one():
    found = align(TOKENIZER, LONG, SHORT, reference=True)
    M = found.matrix
    assert M[2:5, 2].tolist() == [1, 1, 1] and M.sum(1).tolist() == [1, 1, 1, 2, 2, *[1] * 5, 0, 0]
    assert M.sum(0).tolist() == [1, 1, 3, *[1] * (L - 5), 0, 0] or M[:, -2:].sum() == 0
    uniform = torch.full((1, L), 1 / L)
    assert float(found.mixed(uniform, uniform)[0, 2]) == pytest.approx(3 / L)


def test_published_replacement_of_equal_counts_is_the_identity():
    for source, target in (("a cat on mat", "a dog on mat"), ("a zyx", "a wvu")):
        assert torch.equal(align(TOKENIZER, source, target, reference=True).matrix, torch.eye(L))
    with pytest.raises(LabkitError, match="2 and 3"):
        align(TOKENIZER, "a cat", "a red cat", reference=True)


def test_published_refinement():
    m, a = published.refinement(TOKENIZER, "a cat", "a fluffy cat")
    assert m.tolist() == [0, 1, -1, 2, 3, *range(5, L)] and a.tolist() == [1, 1, 0, *[1] * (L - 3)]
    m, a = published.refinement(TOKENIZER, "a cat", "a dog")  # put in the place of another: none of the source's
    assert m.tolist() == [0, 1, -1, *range(3, L)] and a[2] == 0
    m, a = published.refinement(TOKENIZER, "a cat on mat", "cat")  # shorter: padding copies words
    assert m.tolist() == [0, 2, 5, *range(3, L)] and bool(a.all())
    found = align(TOKENIZER, "a cat on mat", "cat", "refine", reference=True)
    assert found.rows()[-1] == ("padding (9)", "padding (6) and on, mat, <|endoftext|>")
    source, target = attention(1, 4), attention(1, 4, seed=1)
    m, a = published.refinement(TOKENIZER, "a cat", "a fluffy cat")
    edited = align(TOKENIZER, "a cat", "a fluffy cat", "refine", reference=True).mixed(source, target, 1.0)
    assert torch.equal(edited, source[..., m] * a + target * (1 - a))
    half = align(TOKENIZER, "a cat", "a fluffy cat", "refine", reference=True).mixed(source, target, 0.5)
    torch.testing.assert_close(half, 0.5 * edited + 0.5 * target)


def test_published_words_and_time_table():
    assert published.word_tokens(TOKENIZER, "a zyx, a zyx", "zyx") == [7, 8, 9]  # "zyx," is another word
    assert published.word_tokens(TOKENIZER, "a cat a cat", "cat") == [2, 4] and published.word_tokens(TOKENIZER, "a cat", "dog") == []
    assert published.word_tokens(TOKENIZER, "a zyx cat", 1) == [2, 3, 4]
    assert [int(published.time_table((0, b), 50).sum()) for b in (0.2, 0.4, 0.5, 0.8, 1.0)] == [10, 20, 25, 40, 51]
    assert published.time_table((0.2, 0.5), 50).nonzero().flatten().tolist() == list(range(10, 25))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(method="swap"), "'replace' or 'refine'"), (dict(source=""), "''"), (dict(target=None), "None"),
        (dict(target="a cat " * 9), "'a cat a cat a cat a cat' is cut off"), (dict(source="a  cat", target="a  dog", reference=True), "lost count"),
    ],
)  # fmt: skip
def test_what_cannot_be_aligned_is_told_in_one_line(change, says):
    with pytest.raises(LabkitError, match=says) as error:
        align(**{**dict(tokenizer=TOKENIZER, source="a cat", target="a dog"), **change})
    assert "\n" not in str(error.value)
