"""Byte-level byte-pair encoding, the way CLIP does it: text -> token ids.

    word -> symbols (its UTF-8 bytes, each as one printable character; the last one carries "</w>")
    while some neighbouring pair is in the merge list:  join the pair of the lowest rank (leftmost first)
    ids = [<|startoftext|>] + tokens, cut so that <|endoftext|> still fits + [<|endoftext|>] + padding

Sennrich et al. 2016 (arXiv 1508.07909) for the merges; Radford et al. 2021 (arXiv 2103.00020, CLIP) for the rest: text in Unicode
form NFC and lower case, split into runs of letters, single digits, runs of anything else, and English contractions.
Every token knows which characters of the prompt it came from, so that an attention map can be put back on a word.
"""

import json
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import regex
import torch
from torch import LongTensor

from labkit.errors import CheckpointError, LabkitError
from labkit.models.files import read_json, read_text
from labkit.models.header import AGAIN

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END = "</w>"
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


@dataclass(frozen=True)
class Tokens:
    """A tokenised text: `ids`, the vocabulary's `pieces`, and `spans`, the (start, end) characters of each (None for BOS and EOS)."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    spans: tuple[tuple[int, int] | None, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Tokenizer:
    """CLIP's tokenizer: `tok(prompts)` gives ids (B, max_length), the same as `transformers.CLIPTokenizer` padded to full length."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], max_length: int = 77, pad: str = EOS):
        missing = [t for t in (BOS, EOS, pad) if t not in vocab] + [a + b for a, b in merges if a + b not in vocab]
        if missing:
            raise LabkitError(f"The vocabulary lacks {len(missing)} token(s) it needs, first {missing[0]!r}: its files do not belong together.")
        if max_length < 3:
            raise LabkitError(f"max_length is {max_length}; a prompt needs at least 3 places (start, one token, end).")
        self.vocab, self.merges, self.max_length, self.pad = dict(vocab), list(merges), max_length, pad
        self.pieces = {i: t for t, i in vocab.items()}
        self.bos_id, self.eos_id, self.pad_id = vocab[BOS], vocab[EOS], vocab[pad]
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        self._alphabet = byte_alphabet()
        # Special tokens are found in the prompt as typed, before anything else; with SD 2.x this makes every "!" a padding token.
        self._special = regex.compile("|".join(regex.escape(t) for t in sorted({BOS, EOS, pad}, key=len, reverse=True)))
        self._known_words: dict[str, tuple[str, ...]] = {}

    @classmethod
    def from_files(cls, vocab_json: str | Path, merges_txt: str | Path, max_length: int = 77, pad: str = EOS) -> "Tokenizer":
        """Read CLIP's two files: vocab.json (token -> id) and merges.txt (one pair a line, best first)."""
        vocab, lines = read_json(vocab_json), read_text(merges_txt).split("\n")
        if wrong := next(((token, i) for token, i in vocab.items() if type(i) is not int or not 0 <= i < 10**7), None):
            raise CheckpointError(f"{vocab_json}: {wrong[0]!r} has the id {wrong[1]!r}, a number from 0 is expected; {AGAIN}.")
        lines = lines[1:] if lines[0].startswith("#version") else lines  # "# #" is a merge, "#version: 0.2" is not
        return cls(vocab, _pairs([line.split() for line in lines if line.strip()], merges_txt), max_length, pad)

    @classmethod
    def from_folder(cls, folder: str | Path, max_length: int = 77) -> "Tokenizer":
        """Read a `tokenizer/` folder; its tokenizer_config.json, where there is one, says the padding token and may say a shorter length."""
        try:
            return cls._from_folder(Path(folder), max_length)
        except CheckpointError:
            raise
        except LabkitError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:  # a list for a table, a word for a number, ...
            raise CheckpointError(f"{folder}: these are no files of a CLIP tokenizer ({type(error).__name__}: {error}); fetch it again.") from None

    @classmethod
    def _from_folder(cls, folder: Path, max_length: int) -> "Tokenizer":
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        # Files older than `added_tokens_decoder` keep their special tokens in a file of their own, and that one wins (SD 2.x: pad "!").
        if "added_tokens_decoder" not in config and (folder / "special_tokens_map.json").exists():
            config = {**config, **read_json(folder / "special_tokens_map.json")}
        pad = config.get("pad_token") or EOS
        pad = pad["content"] if isinstance(pad, dict) else pad
        said = config.get("model_max_length")
        max_length = min(int(said), max_length) if isinstance(said, (int, float)) else max_length
        if (folder / "vocab.json").exists():
            return cls.from_files(folder / "vocab.json", folder / "merges.txt", max_length, pad)
        if (folder / "tokenizer.json").exists():  # what transformers 5 saves: everything in one file
            whole = read_json(folder / "tokenizer.json")
            model = whole.get("model") or {}
            if model.get("type") != "BPE" or model.get("end_of_word_suffix") != END:
                raise CheckpointError(f"{folder / 'tokenizer.json'}: not a CLIP tokenizer (byte-pair encoding with '</w>' is expected).")
            vocab = {**model["vocab"], **{t["content"]: t["id"] for t in whole.get("added_tokens", [])}}
            pairs = [m.split() if isinstance(m, str) else m for m in model["merges"]]
            return cls(vocab, _pairs(pairs, folder / "tokenizer.json"), max_length, pad)
        raise CheckpointError(f"{folder}: no vocab.json and merges.txt (nor tokenizer.json) in this tokenizer folder.")

    def save_folder(self, folder: str | Path) -> None:
        """Write the four files of a CLIP tokenizer; `transformers.CLIPTokenizer.from_pretrained(folder)` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": BOS, "eos_token": EOS, "pad_token": self.pad, "unk_token": EOS}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.max_length, "do_lower_case": True, "errors": "replace"}
        merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self.merges)
        for name, text in {
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False),
            "merges.txt": merges,
            "tokenizer_config.json": json.dumps({**config, **special}, indent=2) + "\n",
            "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        }.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")

    def __len__(self) -> int:
        return len(self.vocab)

    def __call__(self, prompts: str | list[str]) -> LongTensor:
        """Token ids of one prompt or several, (B, max_length): cut where too long, filled with the padding token where short."""
        rows = [self.encode(p).ids for p in ([prompts] if isinstance(prompts, str) else prompts)]
        ids = torch.full((len(rows), self.max_length), self.pad_id, dtype=torch.long)
        for row, tokens in zip(ids, rows):
            row[: len(tokens)] = torch.tensor(tokens)
        return ids  # (B, L)

    def encode(self, text: str) -> Tokens:
        """The tokens the text encoder reads: BOS, the prompt as far as it fits, EOS; without padding."""
        all_of_it = self.tokenize(text)
        n = self.max_length - 2
        return Tokens(
            (self.bos_id, *all_of_it.ids[:n], self.eos_id), (BOS, *all_of_it.pieces[:n], EOS), (None, *all_of_it.spans[:n], None)
        )

    def cut(self, text: str) -> str:
        """The end of the prompt that does not fit into the context and is never read; "" if all of it fits."""
        spans = self.tokenize(text).spans
        return text[spans[self.max_length - 2][0] :].strip() if len(spans) > self.max_length - 2 else ""

    def decode(self, ids) -> str:
        """Text of token ids, special tokens left out, one space between words."""
        letters = {char: byte for byte, char in enumerate(self._alphabet)}
        text = "".join(self.pieces[int(i)].replace(END, " ") for i in ids if int(i) not in (self.bos_id, self.eos_id, self.pad_id))
        return b" ".join(bytes(letters[c] for c in word) for word in text.split(" ")).decode("utf-8", "replace").strip()

    def tokenize(self, text: str) -> Tokens:
        """All tokens of a text, however long, without BOS and EOS."""
        if not isinstance(text, str):
            raise LabkitError(f"A prompt is a string; this is {type(text).__name__}: {text!r}.")
        found: list[tuple[str, tuple[int, int]]] = []
        start = 0
        for special in self._special.finditer(text):
            found += self._plain(text[start : special.start()], start) + [(special.group(), special.span())]
            start = special.end()
        found += self._plain(text[start:], start)
        return Tokens(tuple(self.vocab.get(p, self.eos_id) for p, _ in found), tuple(p for p, _ in found), tuple(s for _, s in found))

    def _plain(self, text: str, offset: int) -> list[tuple[str, tuple[int, int]]]:
        """(piece, span) for text without special tokens; `offset` is where it begins in the prompt."""
        text, origin = normalise(text)
        found = []
        for match in WORDS.finditer(text):  # white space is what the pattern steps over, so a run of it counts as one space
            chars = [i for i in range(*match.span()) for _ in text[i].encode("utf-8", "replace")]  # byte -> its character
            first = 0
            for piece in self._merge("".join(self._alphabet[b] for b in match.group().encode("utf-8", "replace"))):
                last = first + len(piece.removesuffix(END)) - 1
                found.append((piece, (origin[chars[first]][0] + offset, origin[chars[last]][1] + offset)))
                first = last + 1
        return found

    def _merge(self, word: str) -> tuple[str, ...]:
        """Join the symbols of one word, the pair of lowest rank first, until no pair of neighbours is in the list."""
        if word not in self._known_words:
            symbols = [*word[:-1], word[-1] + END]
            while len(symbols) > 1:
                rank, i = min((self._rank.get(pair, len(self._rank)), i) for i, pair in enumerate(zip(symbols, symbols[1:])))
                if rank == len(self._rank):
                    break
                symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            self._known_words[word] = tuple(symbols)
        return self._known_words[word]


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte 0..255: itself where it is printable Latin-1, else one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (b for b in range(256) if b not in printable)
    stand_in = {b: chr(256 + n) for n, b in enumerate(others)}
    return [stand_in.get(b, chr(b)) for b in range(256)]


nfc = partial(unicodedata.normalize, "NFC")


def normalise(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Unicode form NFC in lower case, and for each of its characters the (start, end) in `text` that it came from."""
    starts: list[int] = []  # of the runs of characters which may compose with each other, and with nothing outside
    for i, char in enumerate(text):
        run = text[starts[-1] : i] if starts else ""
        if not run or (not unicodedata.combining(char) and nfc(run + char) == nfc(run) + nfc(char)):
            starts.append(i)
    out, origin = [], []
    for start, end in zip(starts, [*starts[1:], len(text)]):
        for char in nfc(text[start:end]):
            # character by character: str.lower() of a whole word would make a Greek final sigma, which CLIP's vocabulary has not seen
            out += char.lower()
            origin += [(start, end)] * len(char.lower())
    return "".join(out), origin


def build_vocabulary(words) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary for a closed world: (token -> id, merges), in which each of the given words is exactly one token.

    Byte-pair encoding is learnt on the words until none is left in two parts, so no merge of one word can break another; all other
    text still encodes, byte by byte. Order of the ids as in CLIP: 256 bytes, 256 bytes that end a word, merges, BOS, EOS.
    """
    alphabet = byte_alphabet()
    words = sorted({normalise(word.strip())[0] for word in words})
    wrong = [w for w in words if not WORDS.fullmatch(w)]
    if wrong:
        raise LabkitError(f"{wrong[0]!r} can not be one token: CLIP splits text into runs of letters, single digits and runs of signs.")
    split = [[alphabet[b] for b in w.encode()] for w in words]
    split = [[*s[:-1], s[-1] + END] for s in split]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for s in split for pair in zip(s, s[1:])):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = [_joined(s, best) for s in split]
    printable_first = sorted(alphabet, key=ord)  # "!" is token 0, as in CLIP
    tokens = [*printable_first, *(c + END for c in printable_first), *("".join(m) for m in merges), BOS, EOS]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tok = Tokenizer(vocab, merges)
    broken = [w for w in words if len(tok.tokenize(w)) != 1]
    if broken:
        raise LabkitError(f"{broken[0]!r} does not come out as one token; leave it out of the vocabulary.")
    return vocab, merges


def _joined(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def _pairs(rows, path) -> list[tuple[str, str]]:
    wrong = next((row for row in rows if len(row) != 2), None)
    if wrong is not None:
        raise CheckpointError(f"{path}: a merge is two symbols, but one reads {' '.join(wrong)!r}; the file is damaged, fetch it again.")
    return [tuple(row) for row in rows]
