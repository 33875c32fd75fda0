"""Incremental text equals the full decode, and stop strings end it where they should."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from baton.engine.detokenizer import REPLACEMENT, StopStrings, TextStream, TokenText
from baton.request import FinishReason

WORDS = (
    "the",
    "river",
    "lamp",
    "größe",
    "東京",
    "hello",
    "don't",
    "naïve",
    "👍🏽",
    "a",
    ",",
    ".",
    "!",
    "12",
    "'",
)
CORPUS = [" ".join(random.Random(i).choices(WORDS, k=30)) for i in range(60)]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
NUM_SEQUENCES = 10_000


def _add_special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<eos>", "<|user|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("é x", normalized=False)])
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return _add_special(tokenizer)


def _sentence_piece(decoder: decoders.Decoder) -> Tokenizer:
    pieces = ["<unk>", "", *BYTE_TOKENS, "▁", "▁▁", "▁▁▁▁"]
    pieces += [prefix + word for word in WORDS for prefix in ("▁", "")]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, [], byte_fallback=True)
    )
    tokenizer.decoder = decoder
    return _add_special(tokenizer)


def llama_2() -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _sentence_piece(decoders.Sequence(steps))


def gemma() -> Tokenizer:
    return _sentence_piece(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    )


def unigram() -> Tokenizer:
    """As T5 or XLNet have it, trained, and with byte tokens."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    scores = json.loads(tokenizer.to_str())["model"]["vocab"]
    scores[1:1] = [[token, -20.0] for token in BYTE_TOKENS]
    tokenizer.model = models.Unigram([tuple(each) for each in scores], 0, byte_fallback=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _add_special(tokenizer)


def metaspace() -> Tokenizer:
    return _sentence_piece(decoders.Metaspace(replacement="▁", prepend_scheme="always"))


def word_piece() -> Tokenizer:
    pieces = ["[UNK]", *WORDS, *("##" + word for word in WORDS), "n't", "'s", "do not"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return _add_special(tokenizer)


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.normalizer = normalizers.Lowercase()
    return _add_special(tokenizer)


def gpt_1() -> Tokenizer:
    pieces = [piece for word in WORDS for piece in (word, word + "</w>")]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.BPEDecoder()
    return _add_special(tokenizer)


TOKENIZERS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "byte_level": (byte_level, "bytes"),
    "llama_2": (llama_2, "pieces"),
    "gemma": (gemma, "pieces"),
    "unigram": (unigram, "pieces"),
    "metaspace": (metaspace, "pieces"),
    "word_piece": (word_piece, "pieces"),
    "word_level": (word_level, "pieces"),
    "gpt_1": (gpt_1, "window"),
}


def _random_ids(rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Also ids that no token has, and runs from one corner of the vocabulary: byte tokens, special ones."""
    size = tokenizer.get_vocab_size() + 3
    low = rng.choice([0, 0, size // 2, max(0, size - 10)])
    high = rng.choice([size, size, min(size, low + 40)])
    return [rng.randrange(low, max(high, low + 1)) for _ in range(rng.randrange(40))]


def _random_cuts(rng: random.Random, ids: Sequence[int]) -> list[tuple[int, ...]]:
    parts = []
    while ids:
        cut = rng.choice([1, 1, 1, 2, 7])
        parts.append(tuple(ids[:cut]))
        ids = ids[cut:]
    return parts


@pytest.mark.parametrize("name", TOKENIZERS)
def test_parts_add_up_to_the_full_decode(name: str) -> None:
    make, kind = TOKENIZERS[name]
    tokenizer = make()
    texts = TokenText(tokenizer)
    assert texts.kind == kind
    rng = random.Random(name)
    sequences = [_random_ids(rng, tokenizer) for _ in range(NUM_SEQUENCES)]
    expected = tokenizer.decode_batch(sequences, skip_special_tokens=True)
    for ids, text in zip(sequences, expected, strict=True):
        detokenizer = texts.detokenizer()
        parts = [detokenizer.push(part) for part in _random_cuts(rng, ids)]
        assert "".join(parts) + detokenizer.finish() == text, ids
    num_broken = sum(REPLACEMENT in text for text in expected)
    if name in ("byte_level", "llama_2", "gemma", "unigram"):
        assert num_broken > NUM_SEQUENCES / 10, "broken UTF-8 was not among the sequences"


@pytest.mark.parametrize("name", ["byte_level", "llama_2", "unigram"])
def test_a_character_is_never_split(name: str) -> None:
    tokenizer = TOKENIZERS[name][0]()
    ids = tokenizer.encode("Łódź 🦜ß").ids
    assert len(ids) > 8, "every character in one token would show nothing"
    detokenizer = TokenText(tokenizer).detokenizer()
    parts = [detokenizer.push((i,)) for i in ids]
    assert REPLACEMENT not in "".join(parts)
    assert "".join(parts) + detokenizer.finish() == tokenizer.decode(ids)


def test_text_is_not_held_back_without_need() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("the river lamp").ids
    detokenizer = TokenText(tokenizer).detokenizer()
    assert [detokenizer.push((i,)) for i in ids] == [tokenizer.decode([i]) for i in ids]


def _stop(text_parts: Sequence[str], *stop: str) -> tuple[list[str], bool]:
    matcher = StopStrings(stop)
    out = []
    for part in text_parts:
        text, matched = matcher.push(part)
        out.append(text)
        if matched:
            return out, True
    return [*out, matcher.finish()], False


@pytest.mark.parametrize(
    ("parts", "stop", "expected", "matched"),
    [
        (["hello wor", "ld!"], ["world"], ["hello ", ""], True),
        (["a", "b", "c"], ["abd"], ["", "", "abc", ""], False),
        (["ab", "abd"], ["abd"], ["", "ab"], True),
        (["x\n", "\n", "y"], ["\n\n"], ["x", ""], True),
        (["x\n", "y\n"], ["\n\n"], ["x", "\ny", "\n"], False),
        (["abcd"], ["abcd", "bc"], ["a"], True),  # "bc" is complete first
        (["xabc"], ["bc", "abc"], ["x"], True),  # both end at the same character: the longer one
        (["stop at once"], ["stop"], [""], True),
        (["", "", "s"], ["stop"], ["", "", "", "s"], False),
        (["東", "京!"], ["京"], ["東", ""], True),
    ],
)
def test_stop_string(parts: list[str], stop: list[str], expected: list[str], matched: bool) -> None:
    assert _stop(parts, *stop) == (expected, matched)


def test_stop_strings_do_not_depend_on_how_the_text_is_cut() -> None:
    rng = random.Random(7)
    num_matched = 0
    for _ in range(NUM_SEQUENCES):
        text = "".join(rng.choices("abc", k=rng.randrange(1, 30)))
        stop = ["".join(rng.choices("abc", k=rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
        cuts = sorted(rng.choices(range(len(text) + 1), k=5))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        in_parts, matched = _stop(parts, *stop)
        by_character, matched_by_character = _stop(list(text), *stop)
        assert ("".join(in_parts), matched) == ("".join(by_character), matched_by_character), (text, stop)
        assert matched == any(s in text for s in stop)
        assert not any(s in "".join(in_parts) for s in stop)
        num_matched += matched
    assert NUM_SEQUENCES / 10 < num_matched < NUM_SEQUENCES


@pytest.mark.parametrize("name", ["byte_level", "llama_2", "unigram"])
def test_streams_end_where_the_whole_text_would(name: str) -> None:
    """Stop strings and stop tokens against the full decode, wherever borders of tokens and messages fall."""
    tokenizer = TOKENIZERS[name][0]()
    texts, rng = TokenText(tokenizer), random.Random(name)
    reasons: Counter[FinishReason | None] = Counter()
    sentences = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 9))) for _ in range(NUM_SEQUENCES // 4)]
    for ids in (encoding.ids for encoding in tokenizer.encode_batch(sentences)):
        text = tokenizer.decode(ids)
        assert REPLACEMENT not in text
        start = rng.randrange(len(text))
        stop = [
            rng.choice([text[start : start + rng.randrange(1, 6)], "river\N{BELL}"]),
            rng.choice(["xyz", "東京\N{BELL}", ", "]),
        ]
        stop_id = rng.choice([None, None, rng.choice(ids)])
        ends = stop_id in ids
        visible = tokenizer.decode(ids[: ids.index(stop_id)] if ends else ids)
        expected = min(
            [(visible.find(s) + len(s), visible.find(s)) for s in stop if s in visible],
            default=(0, len(visible)),
        )[1]
        stream = texts.stream(stop, frozenset([stop_id]) if ends else frozenset())
        said, reason = "", None
        for part in _random_cuts(rng, ids[: ids.index(stop_id) + 1] if ends else ids):
            is_last = ends and part[-1] == stop_id
            piece, _, reason = stream.push(part, FinishReason.STOP if is_last else None)
            assert REPLACEMENT not in piece or REPLACEMENT in visible, "a character was split"
            said += piece
            if reason is not None:
                break
        if reason is None:
            piece, _, reason = stream.push((), FinishReason.LENGTH)
            said += piece
        assert said == visible[:expected], (ids, stop, stop_id)
        reasons[reason] += 1
    assert all(reasons[each] > NUM_SEQUENCES / 100 for each in (FinishReason.STOP, FinishReason.LENGTH))


def _letters(
    stop: Sequence[str] = (), stop_ids: frozenset[int] = frozenset(), min_tokens: int = 0
) -> TextStream:
    """Token i is the i-th letter; 26 is <eos>, a special token."""
    tokenizer = Tokenizer(models.BPE({chr(97 + i): i for i in range(26)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return TokenText(tokenizer).stream(stop, stop_ids, min_tokens)


def test_tokens_after_the_stop_string_are_dropped_however_many_come_at_once() -> None:
    stream = _letters(stop=["cd"])
    assert stream.push((0, 1, 2), None) == ("ab", (0, 1, 2), None)
    assert stream.push((3, 4, 5), FinishReason.LENGTH) == ("", (3,), FinishReason.STOP)


def test_held_text_is_flushed_when_the_request_ends() -> None:
    stream = _letters(stop=["cdz"])
    assert stream.push((1, 2, 3), None)[0] == "b"
    assert stream.push((), FinishReason.LENGTH) == ("cd", (), FinishReason.LENGTH)


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    stream = _letters(stop=["ab"], min_tokens=3)
    assert stream.push((0, 1, 0), None) == ("aba", (0, 1, 0), None)
    assert stream.push((1, 0), None) == ("b", (1, 0), None), "a stop string that began before does not count"
    assert stream.push((1, 2), None) == ("", (1,), FinishReason.STOP)


def test_the_token_that_ended_a_request_has_no_text() -> None:
    assert _letters(stop_ids=frozenset([25])).push((0, 25), FinishReason.STOP)[0] == "a"
    assert _letters(stop_ids=frozenset([25])).push((0, 25), FinishReason.LENGTH)[0] == "az"
    assert _letters(stop=["q"], stop_ids=frozenset([26])).push((0, 26), FinishReason.STOP) == (
        "a",
        (0, 26),
        FinishReason.STOP,
    )


def test_missing_bytes_at_the_end_become_a_replacement_character() -> None:
    tokenizer = byte_level()
    ids = tuple(tokenizer.encode("x🦜").ids)
    text = TokenText(tokenizer).stream().push(ids[:3], FinishReason.LENGTH)[0]
    assert text == tokenizer.decode(ids[:3]) == "x" + REPLACEMENT
