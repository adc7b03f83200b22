"""Which tokens a word of the prompt is: the one place where words become token positions.

    prompt "a t-shirt, red"   ->   words  a | t-shirt | red   ->   tokens 1 | 2 3 4 | 6   (0 is BOS, 5 the comma, 7 EOS)

Attention speaks of tokens, people of words. A word may be several tokens, a phrase several words, and the same word may occur
twice; every heat map and every edit asks here, so that they all mean the same thing.
"""

from dataclasses import dataclass

import regex

from labkit.errors import LabkitError
from labkit.models.tokenizer import BOS, EOS, Tokens, Tokenizer, normalise

LETTERS = r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*"
ATOM = rf"{LETTERS}|[^\s\p{{L}}\p{{N}}\p{{P}}\p{{Cc}}]+"  # letters and digits, or signs that mean something ("🐱", "+"); no punctuation
ATOMS = regex.compile(ATOM)
WORD = regex.compile(rf"{LETTERS}(?:(?:['’_-]|(?<=\p{{N}})[.,](?=\p{{N}})){LETTERS})*|{ATOM}")  # "dog's", "t-shirt", "2.5"
BY_NAME = {"bos": BOS, "<bos>": BOS, "sot": BOS, BOS: BOS, "eos": EOS, "<eos>": EOS, "eot": EOS, EOS: EOS}


@dataclass(frozen=True)
class WordSpan:
    """A word as typed: prompt[start:end] is `text`; `tokens` are its positions in the text encoder's sequence."""

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]


def words(tokenizer: Tokenizer, prompt: str) -> list[WordSpan]:
    """The words of a prompt that the text encoder reads, in order; punctuation is no word, what is cut off is left out."""
    all_tokens = tokenizer.tokenize(prompt)
    spans = [WordSpan(m.group(), *m.span(), _tokens(all_tokens, *m.span())) for m in WORD.finditer(prompt)]
    return [s for s in spans if s.tokens and s.tokens[-1] < tokenizer.max_length - 1]


def find(tokenizer: Tokenizer, prompt: str, word: str, occurrence: int | None = None) -> tuple[int, ...]:
    """Token positions of a word or phrase: of all its occurrences, or of one (0 is the first).

    Upper and lower case and the punctuation between words do not matter; "dog" is found in "dog's". "BOS" and "EOS" name the start
    and end tokens, unless the prompt has such a word. Raises LabkitError, listing the words there are, if it is not there, and if
    it was cut off because the prompt is longer than the text encoder's context.
    """
    if not isinstance(word, str) or not word.strip():
        raise LabkitError(f"A word is a text that is not empty, this is {word!r}. {_there_are(tokenizer, prompt)}")
    all_tokens = tokenizer.tokenize(prompt)
    found = [tokens for start, end in _places(prompt, word) if (tokens := _tokens(all_tokens, start, end))]
    if not found and (name := BY_NAME.get(word.strip().lower())):  # only now, so that a prompt may have a word "eos"
        return (0,) if name == BOS else (len(tokenizer.encode(prompt)) - 1,)
    if not found:
        raise LabkitError(f"{word!r} is not in the prompt. {_there_are(tokenizer, prompt)}")
    if occurrence is not None:
        if type(occurrence) is not int or not 0 <= occurrence < len(found):
            raise LabkitError(f"{word!r} occurs {len(found)} time(s) in the prompt; occurrence goes from 0 to {len(found) - 1}, not {occurrence!r}.")
        found = [found[occurrence]]
    read = [tokens for tokens in found if tokens[-1] < tokenizer.max_length - 1]  # behind them comes EOS at the latest
    if not read:
        raise LabkitError(
            f"{word!r} was cut off: the prompt has {len(all_tokens)} tokens and the text encoder reads {tokenizer.max_length - 2}; "
            "shorten the prompt or move the word forward."
        )
    return tuple(sorted({token for tokens in read for token in tokens}))


def _places(prompt: str, word: str) -> list[tuple[int, int]]:
    """(start, end) in the prompt of every run of atoms that reads like the word; a piece of punctuation is looked for as typed."""
    wanted = [normalise(atom)[0] for atom in ATOMS.findall(word)]
    if not wanted:
        return [m.span() for m in regex.finditer(regex.escape(word.strip()), prompt)]
    atoms = [(normalise(m.group())[0], *m.span()) for m in ATOMS.finditer(prompt)]
    n = len(wanted)
    return [(atoms[i][1], atoms[i + n - 1][2]) for i in range(len(atoms) - n + 1) if [a[0] for a in atoms[i : i + n]] == wanted]


def _tokens(tokens: Tokens, start: int, end: int) -> tuple[int, ...]:
    """Positions, counted with BOS in front, of the tokens that have a character in prompt[start:end]."""
    return tuple(i + 1 for i, (a, b) in enumerate(tokens.spans) if a < end and b > start)


def _there_are(tokenizer: Tokenizer, prompt: str) -> str:
    there = list(dict.fromkeys(w.text for w in words(tokenizer, prompt)))
    return f"Its words are: {', '.join(there)}." if there else "It has no words."
