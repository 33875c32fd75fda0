"""Text from token ids while they arrive: in parts, what `decode(ids, skip_special_tokens=True)` says of all.

    TokenText       one per tokenizer: knows how a token's text depends on its neighbours, makes the streams
    TextStream      one per request: token ids in, text that can no longer change out

Concatenated, the parts equal the full decode: a character that is still missing bytes is held back, as is
text that may be the beginning of a stop string. Three kinds of tokenizer, told apart by their decoder:

    bytes     a token is some bytes; the bytes of all tokens are one UTF-8 text (GPT-2, Llama 3, Qwen, ...)
    pieces    a token is a text of its own, except at the very start and for runs of byte tokens, which
              decode together or not at all (Llama 2, Gemma, Metaspace, WordPiece, word level)
    window    else: the last tokens are decoded again with the new ones, and the difference is emitted
"""

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from tokenizers import Tokenizer

from baton.request import FinishReason

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(Protocol):
    """The text of one sequence of token ids. Mutable, one per request."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now and was not before; often one token's, at times none."""
        ...

    def finish(self) -> str:
        """What was held back. Nothing may be pushed afterwards."""
        ...


# (text, the tokens that were used, why the request ended if it did). Plain, as one is made for every token.
Delta: TypeAlias = tuple[str, tuple[int, ...], FinishReason | None]


class TokenText:
    """Makes detokenizers for one tokenizer. Keeps the text of every token it has met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self.kind = _kind_of(_decoder_steps(tokenizer))
        self._bytes = _ByteTable(tokenizer, self._special_ids)
        self._pieces = _PieceTable(tokenizer, self._special_ids)

    def detokenizer(self) -> Detokenizer:
        if self.kind == "bytes":
            return _ByteLevelDetokenizer(self._bytes)
        if self.kind == "pieces":
            return _PieceDetokenizer(self._tokenizer, self._pieces)
        return _WindowDetokenizer(self._tokenizer, self._special_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text that has begun; b"" for special and unknown tokens."""
        piece = self._bytes[token_id] if self.kind == "bytes" else self._pieces[token_id]
        if isinstance(piece, int):
            return bytes([piece])
        return piece.encode() if isinstance(piece, str) else piece or b""

    def label(self, token_id: int) -> bytes:
        """What the token is called: its bytes, or the name of a special token."""
        return self.token_bytes(token_id) or (self._tokenizer.id_to_token(token_id) or "").encode()

    def stream(
        self, stop: Sequence[str] = (), stop_ids: frozenset[int] = frozenset(), min_tokens: int = 0
    ) -> "TextStream":
        return TextStream(self.detokenizer(), stop, stop_ids, min_tokens)


class TextStream:
    """One request's output. A stop string ends the text before it, wherever token borders fall; the token
    that completed it is the last one counted. The token that ended a request (`stop_ids`) has no text.
    Stop strings are not looked for in the text of the first `min_tokens`."""

    __slots__ = ("_detokenizer", "_num_unsearched", "_stop", "_stop_ids")

    def __init__(
        self, detokenizer: Detokenizer, stop: Sequence[str], stop_ids: frozenset[int], min_tokens: int = 0
    ) -> None:
        self._num_unsearched = min_tokens
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop) if stop else None
        self._stop_ids = stop_ids

    def push(self, token_ids: tuple[int, ...], finish_reason: FinishReason | None) -> Delta:
        """The first finish reason returned, which a stop string may bring before the caller's, is the end."""
        if self._stop is not None:
            return self._push_until_stop(self._stop, token_ids, finish_reason)
        if finish_reason is None:
            return self._detokenizer.push(token_ids), token_ids, None
        text = self._detokenizer.push(self._visible(token_ids, finish_reason)) + self._detokenizer.finish()
        return text, token_ids, finish_reason

    def _visible(self, token_ids: tuple[int, ...], finish_reason: FinishReason | None) -> tuple[int, ...]:
        ends = finish_reason is FinishReason.STOP and token_ids and token_ids[-1] in self._stop_ids
        return token_ids[:-1] if ends else token_ids

    def _push_until_stop(
        self, stop: "StopStrings", token_ids: tuple[int, ...], finish_reason: FinishReason | None
    ) -> Delta:
        text = ""
        for num_used, token_id in enumerate(self._visible(token_ids, finish_reason), start=1):
            piece = self._detokenizer.push((token_id,))
            if self._num_unsearched > 0:
                self._num_unsearched -= 1
                text += piece
                continue
            part, matched = stop.push(piece)
            text += part
            if matched:
                return text, token_ids[:num_used], FinishReason.STOP
        if finish_reason is not None:
            part, matched = stop.push(self._detokenizer.finish())
            text += part
            if matched:
                return text, token_ids, FinishReason.STOP
            text += stop.finish()
        return text, token_ids, finish_reason


class StopStrings:
    """Searches a text that arrives in parts for the stop string that is complete first (the longest of those
    that end at the same character), and holds back what may be the beginning of one. The result does not
    depend on how the text was cut into parts."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest = max(map(len, stop))
        self._first_characters = frozenset(text[0] for text in stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text before the stop string or certain not to be part of one, whether a stop string was found)"""
        if not text:
            return "", False
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = self._num_certain(text)
        self._held = text[keep:]
        return text[:keep], False

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held

    def _num_certain(self, text: str) -> int:
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_characters:
                tail = text[start:]
                if any(stop.startswith(tail) for stop in self._stop):
                    return start
        return len(text)


class _ByteTable(dict[int, str | bytes]):
    """token id -> its text, or its bytes where they are no text by themselves; "" for special and unknown
    tokens; filled on first use."""

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._byte_of = _byte_of_character()

    def __missing__(self, token_id: int) -> str | bytes:
        token = None if token_id in self._special_ids else self._tokenizer.id_to_token(token_id)
        self[token_id] = value = "" if token is None else self._piece(token)
        return value

    def _piece(self, token: str) -> str | bytes:
        value = self._bytes_of(token)
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value

    def _bytes_of(self, token: str) -> bytes:
        try:
            return bytes([self._byte_of[character] for character in token])
        except KeyError:  # an added token, written as it is
            return token.encode()


class _ByteLevelDetokenizer:
    __slots__ = ("_decoder", "_is_between_characters", "_table")

    def __init__(self, table: _ByteTable) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_between_characters = True

    def push(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1 and self._is_between_characters:
            piece = self._table[token_ids[0]]
            if isinstance(piece, str):
                return piece  # nearly always
        pieces = [self._table[i] for i in token_ids]
        data = b"".join([piece.encode() if isinstance(piece, str) else piece for piece in pieces])
        text = self._decoder.decode(data)
        self._is_between_characters = not self._decoder.getstate()[0]
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class _PieceTable(dict[int, str | int | None]):
    """token id -> its text after other text, or the value of a byte token, or None for what the decoder never
    sees (special and unknown tokens); filled on first use."""

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._has_byte_tokens = "ByteFallback" in [step["type"] for step in _decoder_steps(tokenizer)]

    def __missing__(self, token_id: int) -> str | int | None:
        token = None if token_id in self._special_ids else self._tokenizer.id_to_token(token_id)
        self[token_id] = value = None if token is None else self._piece(token_id, token)
        return value

    def _piece(self, token_id: int, token: str) -> str | int:
        if self._has_byte_tokens and (byte := _byte_value(token)) is not None:
            return byte
        # Only the first token of a text is special, so the second of two equal ones shows the usual text.
        first = self._tokenizer.decode([token_id])
        return self._tokenizer.decode([token_id, token_id])[len(first) :]


class _PieceDetokenizer:
    __slots__ = ("_head", "_run", "_table", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, table: _PieceTable) -> None:
        self._tokenizer = tokenizer
        self._table = table
        self._head: (
            list[int] | None
        ) = []  # ids so far; None once there is text: from then on pieces are right
        self._run = bytearray()

    def push(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token_id in token_ids:
            piece = self._table[token_id]
            if piece is None:
                continue
            if self._head is not None:
                self._head.append(token_id)
                if isinstance(piece, str):
                    text += self._begin(self._head)
            elif isinstance(piece, int):
                self._run.append(piece)
            else:
                text += self._end_run() + piece if self._run else piece
        return text

    def finish(self) -> str:
        return self._end_run() if self._head is None else self._begin(self._head)

    def _begin(self, head: list[int]) -> str:
        text = self._tokenizer.decode(head)
        if text:
            self._head = None
        return text

    def _end_run(self) -> str:
        """A byte that fits nowhere spoils its whole run, so no part of a run is certain before its end."""
        try:
            return self._run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(self._run)
        finally:
            self._run.clear()


class _WindowDetokenizer:
    """Knows only that a token's text depends on a neighbour at most."""

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._context: list[int] = []  # decoded again, their text was returned
        self._context_text = ""
        self._new: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        self._new += [i for i in token_ids if i not in self._special_ids]
        text = self._tokenizer.decode(self._context + self._new)
        if len(text) <= len(self._context_text) or text.endswith(REPLACEMENT):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        return self._advance(self._tokenizer.decode(self._context + self._new))

    def _advance(self, text: str) -> str:
        added = text[len(self._context_text) :]
        self._context, self._new = self._new, []
        self._context_text = self._tokenizer.decode(self._context)
        return added


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    decoder: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _kind_of(steps: list[dict[str, Any]]) -> str:
    names = [step["type"] for step in steps]
    if [name for name in names if name != "Fuse"] == ["ByteLevel"]:
        return "bytes"
    if names in ([], ["Metaspace"], ["WordPiece"]):
        return "pieces"
    while names[:1] == ["Replace"]:
        names = names[1:]
    if names[:1] == ["ByteFallback"]:
        names = names[1:]
    strips_the_end = any(step["type"] == "Strip" and step["stop"] for step in steps)
    return "pieces" if names in ([], ["Fuse"], ["Fuse", "Strip"]) and not strips_the_end else "window"


def _byte_value(token: str) -> int | None:
    """0x41 for "<0x41>"."""
    match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return None if match is None else int(match[1], 16)


def _byte_of_character() -> dict[str, int]:
    """The inverse of GPT-2's table: printable bytes stand for themselves, the others from U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}
