"""From words to token positions: occurrences, sub-words, phrases, punctuation, and what is said when a word is not there."""

import pytest
from labkit.errors import LabkitError
from labkit.models.tokenizer import Tokenizer, build_vocabulary
from labkit.probes.words import find, words

WORDS = "a red green blue ball cube left of dog in front the table and 's shirt t".split()


@pytest.fixture(scope="module")
def tok():
    return Tokenizer(*build_vocabulary(WORDS))


def text_of(tok, prompt, tokens):
    """What the prompt says at these positions, read back through the tokenizer's spans."""
    spans = tok.encode(prompt).spans
    return [prompt[slice(*spans[t])] for t in tokens]


def test_one_word_is_one_position(tok):
    assert find(tok, "a red ball left of a blue cube", "red") == (2,)
    assert find(tok, "a red ball left of a blue cube", "cube") == (8,)


def test_all_occurrences_or_one(tok):
    prompt = "a red ball and a red cube"
    assert find(tok, prompt, "red") == (2, 6)
    assert find(tok, prompt, "red", 0) == (2,) and find(tok, prompt, "red", occurrence=1) == (6,)
    for wrong in (2, -1, True, "first", 0.0):
        with pytest.raises(LabkitError, match=r"occurs 2 time.*0 to 1"):
            find(tok, prompt, "red", wrong)


def test_a_word_of_several_tokens_is_merged(tok):
    prompt = "a zebra and a ball"
    assert find(tok, prompt, "zebra") == (2, 3, 4, 5, 6)
    assert text_of(tok, prompt, find(tok, prompt, "zebra")) == list("zebra")
    assert find(tok, prompt, "ball") == (9,)


def test_part_of_a_word_is_not_the_word(tok):
    for prompt, word in (("a redball", "red"), ("a red ball", "re"), ("the table", "tab"), ("balls", "ball")):
        with pytest.raises(LabkitError, match="is not in the prompt"):
            find(tok, prompt, word)


def test_phrases(tok):
    prompt = "a red ball left of a red cube"
    assert find(tok, prompt, "red ball") == (2, 3)
    assert find(tok, prompt, "left of") == (4, 5)
    assert find(tok, prompt, "a red") == (1, 2, 6, 7)
    with pytest.raises(LabkitError, match="'ball red' is not in the prompt. Its words are: a, red, ball, left, of, cube"):
        find(tok, prompt, "ball red")


@pytest.mark.parametrize("word", ["Red", "RED", " red ", "red,", '"red"', "red!"])
@pytest.mark.parametrize("prompt", ["a red ball", "A Red, ball", 'a "RED" ball.', "a\n red\tball", "(red)ball"])
def test_case_space_and_punctuation_do_not_matter(tok, prompt, word):
    assert [t.lower() for t in text_of(tok, prompt, find(tok, prompt, word))] == ["red"]


def test_apostrophes_and_hyphens(tok):
    prompt = "the dog's t-shirt"
    assert text_of(tok, prompt, find(tok, prompt, "dog")) == ["dog"]
    assert text_of(tok, prompt, find(tok, prompt, "dog's")) == ["dog", "'s"]
    assert text_of(tok, prompt, find(tok, prompt, "t-shirt")) == ["t", "-", "shirt"]
    assert text_of(tok, prompt, find(tok, prompt, "shirt")) == ["shirt"]
    assert [w.text for w in words(tok, prompt)] == ["the", "dog's", "t-shirt"]


def test_accents_however_typed(tok):
    for prompt in ("a cafe\u0301 table", "a café table"):
        for word in ("café", "cafe\u0301", "CAFÉ"):
            assert len(find(tok, prompt, word)) == 5  # c a f and the two bytes of é
    with pytest.raises(LabkitError):
        find(tok, "a café table", "cafe")


def test_emoji_digits_and_signs(tok):
    prompt = "a 🐱, 512x512 c++ ❤️ 2.5"
    assert [w.text for w in words(tok, prompt)] == ["a", "🐱", "512x512", "c", "++", "❤️", "2.5"]
    assert len(find(tok, prompt, "🐱")) == 4
    assert text_of(tok, prompt, find(tok, prompt, "2.5")) == ["2", ".", "5"]


def test_punctuation_as_typed(tok):
    assert find(tok, "a ball, a cube", ",") == (3,)
    with pytest.raises(LabkitError, match="';' is not in the prompt"):
        find(tok, "a ball, a cube", ";")


def test_start_and_end_by_name(tok):
    prompt = "a red ball"
    for name in ("BOS", "bos", "<bos>", "<|startoftext|>"):
        assert find(tok, prompt, name) == (0,)
    for name in ("EOS", "eos", "<|endoftext|>"):
        assert find(tok, prompt, name) == (4,)
    assert find(tok, "", "EOS") == (1,)
    assert find(tok, "the eos ball", "EOS") == (2, 3, 4), "a word of the prompt comes first"
    assert find(tok, "red " * 100, "EOS") == (76,)


def test_words_cover_the_prompt(tok):
    prompt = '  A red ball, left of "the" cube.'
    found = words(tok, prompt)
    assert [w.text for w in found] == ["A", "red", "ball", "left", "of", "the", "cube"]
    for w in found:
        assert prompt[w.start : w.end] == w.text
        assert "".join(text_of(tok, prompt, w.tokens)) == w.text
        assert w.tokens == find(tok, prompt, w.text)
    assert words(tok, "") == [] == words(tok, " ... !")


def test_words_cut_off_by_the_context(tok):
    prompt = "red " * 74 + "blue green cube"
    assert find(tok, prompt, "blue") == (75,)
    with pytest.raises(LabkitError, match="'green' was cut off: the prompt has 77 tokens and the text encoder reads 75"):
        find(tok, prompt, "green")
    with pytest.raises(LabkitError, match="cut off"):
        find(tok, "red " * 76, "red", 75)
    assert find(tok, "red " * 76, "red") == tuple(range(1, 76)), "those that are read"
    with pytest.raises(LabkitError, match="cut off"):
        find(tok, "red " * 74 + "zebra", "zebra")  # half of a word is not the word
    assert [w.text for w in words(tok, prompt)][-1] == "blue" and words(tok, prompt)[-1].tokens == (75,)
    short = Tokenizer(tok.vocab, tok.merges, max_length=5)
    assert [w.text for w in words(short, "a red ball left of")] == ["a", "red", "ball"]


@pytest.mark.parametrize("word", ["", "  ", None, 3])
def test_a_word_that_is_none(tok, word):
    with pytest.raises(LabkitError, match="Its words are: a, ball"):
        find(tok, "a ball", word)


def test_the_error_of_an_empty_prompt(tok):
    with pytest.raises(LabkitError, match="has no words"):
        find(tok, "", "ball")
