"""The tokenizer against transformers.CLIPTokenizer, id for id, and where in the prompt each token came from."""

import json
import random
import unicodedata
from collections import Counter

import pytest
import torch
from labkit.errors import CheckpointError, LabkitError
from labkit.models.tokenizer import BOS, END, EOS, WORDS, Tokenizer, build_vocabulary, byte_alphabet, normalise
from labkit.scenes import captions

transformers = pytest.importorskip("transformers")

TABLE_WORDS = (
    "a an the red green blue yellow purple cyan orange white sphere ball cube box cylinder cone small large tiny big rubber metal matte "
    "shiny left right of in front behind on table wooden checkered plain at sunset night day photo pencil sketch and two three four with , ."
).split()

TEXT = """The quick brown fox's tail isn't brown; it's the colour of rust, they've said, and we'll see. Once upon a midnight dreary, while
I pondered, weak and weary, over many a quaint and curious volume of forgotten lore. A photograph of an astronaut riding a horse on the
moon, highly detailed, 4k, trending, 1920x1080. Der Fluss fließt über die Brücke; où est la bibliothèque? La niña corrió. Ὀδυσσεύς, ΟΔΟΣ.
Съешь же ещё этих мягких французских булок. 一只红色的猫 と 青い箱. 🐱🚀 the cat, the cats, the catalogue; banana bandana cabana."""

HARD = [
    "",
    " ",
    "\n\t ",
    "a",
    "a red ball",
    "A  Red\nBALL\r\n\tleft  of a Cube ",
    "it's they've we'll I'd 'twas don't DON'T rock'n'roll o''s ''",
    "cafe\u0301 café CAFE\u0301 A\u030angstro\u0308m",
    "İstanbul ΟΔΟΣ ὈΔΥΣΣΕΎΣ straße STRASSE ǅ ﬁ",
    "🐱 👩‍🚀 🇫🇷 ❤️ a🐱b",
    "1920x1080 4k 3.14 ½ ² ٣ Ⅷ",
    "!!! !a! ... ,,, ?! -- —",
    "non\u00a0breaking\u3000space\u2028line",
    "zero\u200bwidth\ufeff\x00nul",
    "<|startoftext|>a<|endoftext|> b <|ENDOFTEXT|> <|end of text|>",
    "(a:1.2) [b|c] {d} <e> @f #g $h %i ^j &k *l _m_ ~n `o` |p| \\q/",
    "한국어 \u1112\u1161\u11ab हिन्दी ภาษาไทย עברית العربية",
    "\u0338=\u0338 \u0301a \u0344 \u212b \uf900",
    "x" * 300,
    "red " * 200,
    TEXT,
]


def learn_merges(text: str, n: int) -> list[tuple[str, str]]:
    """Plain byte-pair encoding, kept apart from the package's own so that neither leans on the other."""
    letters = byte_alphabet()
    words = Counter(WORDS.findall(normalise(text)[0]))
    split = {w: [letters[b] for b in w.encode()][:-1] + [letters[w.encode()[-1]] + END] for w in words}
    merges = []
    for _ in range(n):
        pairs = Counter()
        for w, symbols in split.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += words[w]
        if not pairs:
            break
        a, b = max(pairs, key=lambda p: (pairs[p], p))
        merges.append((a, b))
        for symbols in split.values():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == (a, b):
                    symbols[i : i + 2] = [a + b]
                i += 1
    return merges


def vocabulary_of(merges):
    letters = sorted(byte_alphabet())
    return {t: i for i, t in enumerate(dict.fromkeys([*letters, *(c + END for c in letters), *(a + b for a, b in merges), BOS, EOS]))}


@pytest.fixture(scope="module")
def tabletop():
    return Tokenizer(*build_vocabulary(TABLE_WORDS))


@pytest.fixture(scope="module")
def learnt():
    merges = learn_merges(TEXT, 250)
    assert len(merges) == 250
    return Tokenizer(vocabulary_of(merges), merges)


def random_strings(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = TEXT.split() + TABLE_WORDS
    signs = " .,!?'\"-_()[]<>|&$#0123456789éßñΣИ猫🐱\u0301\u0308\u200d\n\t"
    out = []
    for _ in range(n):
        parts = [rng.choice(words) if rng.random() < 0.6 else "".join(rng.choices(signs, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 40))]
        out.append(rng.choice(["", " "]).join(parts))
    return out


@pytest.mark.parametrize("which", ["tabletop", "learnt"])
@pytest.mark.parametrize("pad", [EOS, "!"])
def test_ids_equal_transformers(which, pad, request, tmp_path):
    tok = request.getfixturevalue(which)
    tok = Tokenizer(tok.vocab, tok.merges, 77, pad)
    tok.save_folder(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert (again.max_length, again.pad, again.vocab, again.merges) == (77, pad, tok.vocab, tok.merges)
    texts = HARD + random_strings(300, seed=0)
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    found = tok(texts)
    assert found.dtype == torch.long
    different = [t for t, a, b in zip(texts, found, expected) if not torch.equal(a, b)]
    assert not different
    # and unpadded, uncut
    assert [list(tok.tokenize(t).ids) for t in texts] == theirs(texts, add_special_tokens=False).input_ids


def test_every_character_of_the_basic_plane_encodes_as_in_transformers(learnt, tmp_path):
    learnt.save_folder(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    # what this Python's Unicode tables do not know yet, a newer tokenizers may class otherwise
    chars = [chr(i) for i in range(0x3200) if unicodedata.category(chr(i)) not in ("Cn", "Cs")]
    texts = [f"a{c}B {c}" for c in chars]
    assert [list(learnt.tokenize(t).ids) for t in texts] == theirs(texts, add_special_tokens=False).input_ids


def test_merges_really_run_in_several_steps(learnt):
    assert max(len(p) for p in learnt.vocab if p not in (BOS, EOS)) > len(END) + 3
    assert learnt.tokenize("the").pieces == ("the</w>",)
    assert len(learnt.tokenize("theban").pieces) > 1


def test_merge_order_is_by_rank_not_from_the_left():
    vocab = vocabulary_of([("b", "c</w>"), ("a", "b")])
    assert Tokenizer(vocab, [("b", "c</w>"), ("a", "b")]).tokenize("abc").pieces == ("a", "bc</w>")
    assert Tokenizer(vocab, [("a", "b"), ("b", "c</w>")]).tokenize("abc").pieces == ("ab", "c</w>")


def test_spans_point_into_the_prompt_as_it_was_typed(tabletop):
    text = "  A Red\n  BALL, cafe\u0301 🐱 of"
    tokens = tabletop.encode(text)
    assert tokens.spans[0] is None and tokens.spans[-1] is None and tokens.pieces[0] == BOS and tokens.pieces[-1] == EOS
    assert [text[slice(*s)] for s in tokens.spans[1:5]] == ["A", "Red", "BALL", ","]
    covered = [text[slice(*s)] for s in tokens.spans[5:-1]]
    assert covered[:3] == ["c", "a", "f"]
    assert covered[3:5] == ["e\u0301", "e\u0301"], "the two bytes of é both belong to the two characters typed"
    assert covered[5:-1] == ["🐱"] * 4 and covered[-1] == "of"
    assert len(tokens) == len(tokens.ids) == len(tokens.pieces) == len(tokens.spans)


def test_spans_cover_every_character_that_is_not_space():
    tok = Tokenizer(vocabulary_of(m := learn_merges(TEXT, 100)), m)
    for text in HARD + random_strings(100, seed=1):
        spans = tok.tokenize(text).spans
        seen = {i for a, b in spans for i in range(a, b)}
        assert all(i in seen for i, c in enumerate(text) if not c.isspace() and c not in "\x1c\x1d\x1e\x1f"), text
        assert [a for a, _ in spans] == sorted(a for a, _ in spans)


def test_normalise_equals_nfc_and_lower_case_character_by_character():
    for text in HARD + random_strings(200, seed=2):
        ours, origin = normalise(text)
        assert ours == "".join(c.lower() for c in unicodedata.normalize("NFC", text))
        assert len(origin) == len(ours)
    assert normalise("ΟΔΟΣ")[0].endswith("σ"), "no final sigma"


def test_a_long_prompt_is_cut_and_the_cut_text_is_given(tabletop):
    prompt = " ".join(["red"] * 75) + " blue cube"
    assert tabletop.cut(prompt) == "blue cube"
    ids = tabletop(prompt)[0]
    assert len(ids) == 77 and ids[0] == tabletop.bos_id and ids[-1] == tabletop.eos_id and ids[-2] == tabletop.vocab["red</w>"]
    assert tabletop.cut(" ".join(["red"] * 75)) == "" == tabletop.cut("")


def test_batch_shapes_and_padding(tabletop):
    assert tabletop("a ball").shape == (1, 77)
    ids = tabletop(["", "a red ball"])
    assert ids.shape == (2, 77) and ids[0, 0] == tabletop.bos_id and (ids[0, 1:] == tabletop.eos_id).all()
    assert tabletop([]).shape == (0, 77)
    assert Tokenizer(tabletop.vocab, tabletop.merges, max_length=8)("a red ball on a table with a cone").shape == (1, 8)


@pytest.mark.parametrize("bad", [None, 3, ["a", None], [["a"]]])
def test_a_prompt_that_is_no_text_is_refused(tabletop, bad):
    with pytest.raises((LabkitError, TypeError)) as caught:
        tabletop(bad if isinstance(bad, list) else [bad])
    assert "prompt is a string" in str(caught.value)


def test_decode_gives_the_words_back(tabletop):
    for text in ["a red ball left of a large cube , at night .", "café 🐱 zzz"]:
        assert tabletop.decode(tabletop(text)[0]) == text


def test_every_word_of_a_built_vocabulary_is_one_token(tabletop):
    for word in TABLE_WORDS:
        assert tabletop.tokenize(word).pieces == (word + END,)
    assert list(tabletop.vocab)[-2:] == [BOS, EOS] and list(tabletop.vocab.values()) == list(range(len(tabletop)))
    assert tabletop.vocab["!"] == 0 and tabletop.vocab["!</w>"] == 256


def test_the_words_of_the_tabletop_world_are_one_token_each():
    words = captions.vocabulary()
    vocab, merges = build_vocabulary(words)
    tok = Tokenizer(vocab, merges)
    assert len(tok) < 1024 and all(tok.tokenize(w).pieces == (w + END,) for w in words)
    caption = "two large red metal spheres left of a small blue cube, at night"
    assert tok.decode(tok(caption)[0]).replace(" ,", ",") == caption and len(tok.encode(caption)) == len(caption.replace(",", " ,").split()) + 2


def test_words_whose_merges_could_break_each_other():
    words = "ball tuba cabana banana bandana abba baab aba bab a ab abc bcd cde cd aaaa aaa aa café cafés".split()
    vocab, merges = build_vocabulary(words)
    tok = Tokenizer(vocab, merges)
    assert [w for w in words if len(tok.tokenize(w)) != 1] == []
    assert build_vocabulary(reversed(words)) == (vocab, merges), "the order in which words are given does not matter"


def test_a_naive_left_to_right_vocabulary_would_break(tmp_path):
    """Why build_vocabulary learns its merges: chaining each word from the left makes 'ba' win inside 'cabana'."""
    chain = [("b", "a</w>"), ("b", "a"), ("ba", "t</w>"), ("c", "a"), ("ca", "b"), ("cab", "a"), ("caba", "n"), ("caban", "a</w>")]
    assert len(Tokenizer(vocabulary_of(chain), chain).tokenize("cabana")) > 1
    assert len(Tokenizer(*build_vocabulary(["ba", "bat", "cabana"])).tokenize("cabana")) == 1


@pytest.mark.parametrize("word", ["t-shirt", "two words", "don't", "12", ""])
def test_a_word_that_clip_would_split_is_refused(word):
    with pytest.raises(LabkitError, match="one token"):
        build_vocabulary(["red", word])


def test_special_tokens_map_wins_over_an_old_config(learnt, tmp_path):
    learnt.save_folder(tmp_path)  # SD 2.x: the config says one padding token, the map another, and the map is right
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!", "lstrip": False}}))
    assert Tokenizer.from_folder(tmp_path).pad == "!" == transformers.CLIPTokenizer.from_pretrained(tmp_path).pad_token


def test_the_single_file_that_transformers_5_saves(learnt, tmp_path):
    learnt.save_folder(tmp_path / "a")
    transformers.CLIPTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "b" / name).unlink(missing_ok=True)
    tok = Tokenizer.from_folder(tmp_path / "b")
    assert tok.vocab == learnt.vocab and tok.merges == learnt.merges and torch.equal(tok(HARD), learnt(HARD))


def test_damaged_files_are_named(learnt, tmp_path):
    with pytest.raises(CheckpointError, match="no vocab.json"):
        Tokenizer.from_folder(tmp_path)
    learnt.save_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(CheckpointError, match="merges.txt.*two symbols"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nzq qz\n")
    with pytest.raises(LabkitError, match="'zqqz'"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match="merges.txt: there is no such file"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("<html>")
    with pytest.raises(CheckpointError, match="vocab.json.*web page"):
        Tokenizer.from_folder(tmp_path)
