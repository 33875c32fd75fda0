"""Grammars that an answer has to match, through llguidance: compiled once, matched token by token.

    Grammars    one per worker: knows the tokens' bytes, compiles, keeps what was compiled last
    _Matcher    one per sequence: a copy of the compiled grammar and how far it has got

A tokenizer whose tokens have no bytes of their own (words that are joined with spaces) cannot be constrained.
"""

import asyncio
import functools
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import llguidance
import numpy as np

from baton.engine.detokenizer import TokenText
from baton.engine.lark_size import largest_terminal
from baton.engine.sampling_state import Bitmask, Matcher
from baton.errors import InternalError, InvalidRequest
from baton.request import Grammar, GrammarKind
from baton.tokenizer import Tokenizer

MAX_SOURCE_CHARS = 64 * 1024
# llguidance's fuel does not count what a long regular expression costs: a mask of "a?" * n + "a" * n takes time that
# grows with the cube of n, 0.1 s for n = 341 and minutes for n = 3000.
MAX_REGEX_CHARS = 1024
MAX_COMPILED = 64  # kept; each takes some hundred kilobytes
# Fuel is spent on compiling, at about 50,000 a millisecond, and on each mask, at about 14,000: with these limits the
# worst that was found takes 90 ms to compile and 30 ms for a mask.
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=2_500_000,
    step_lexer_fuel=200_000,
    max_items_in_row=10_000,
    max_grammar_size=100_000,
    max_lexer_states=50_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
FORMATS = {
    GrammarKind.JSON_SCHEMA: "json_schema",
    GrammarKind.REGEX: "regex",
    GrammarKind.LARK: "grammar",
    GrammarKind.CHOICE: "choice",
}


class Grammars:
    """Confined to the engine's event loop, but for the compiling that `prepare` does in a thread of its own; the
    matchers it makes are used in one thread at a time."""

    def __init__(self, load_tokenizer: Callable[[], Tokenizer], vocab_size: int) -> None:
        """`load_tokenizer` is called for the first grammar; it raises ConfigError. `vocab_size` is the model's."""
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._thread = ThreadPoolExecutor(
            1, "baton-grammars"
        )  # one: compiling must not take the model's cores

    async def prepare(self, grammar: Grammar) -> None:
        """Compiles it beside the event loop, so that `matcher` answers at once. Raises InvalidRequest."""
        if grammar not in self._compiled:
            loop = asyncio.get_running_loop()
            self._keep(grammar, await loop.run_in_executor(self._thread, self._compile_once, grammar))

    def matcher(self, grammar: Grammar) -> Matcher:
        """Raises InvalidRequest for a grammar that is wrong, too large or too complex."""
        compiled = self._compile_once(grammar)
        self._keep(grammar, compiled)
        return _Matcher(compiled.deep_copy(), self._vocab_size)

    def _keep(self, grammar: Grammar, compiled: llguidance.LLMatcher) -> None:
        self._compiled[grammar] = compiled
        self._compiled.move_to_end(grammar)
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)

    def _compile_once(self, grammar: Grammar) -> llguidance.LLMatcher:
        return self._compiled.get(grammar) or self._compile(grammar)

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        if len(grammar.source) > MAX_SOURCE_CHARS:
            raise InvalidRequest(
                f"the grammar has {len(grammar.source)} characters; at most {MAX_SOURCE_CHARS} are allowed",
                param="grammar",
            )
        longest = max(map(len, _regexes(grammar)), default=0)
        if longest > MAX_REGEX_CHARS:
            raise InvalidRequest(
                f"a regular expression in the {grammar.kind} has {longest} characters; at most {MAX_REGEX_CHARS} are "
                "allowed (many fixed answers are a choice)",
                param="grammar",
            )
        _check_terminals(grammar)
        tokens = self._tokens
        try:
            source = llguidance.grammar_from(FORMATS[grammar.kind], grammar.source)  # type: ignore[arg-type]
        except Exception as error:  # whatever the parsers of the formats raise
            raise InvalidRequest(f"the {grammar.kind} cannot be read: {error}", param="grammar") from None
        compiled = llguidance.LLMatcher(tokens, source, log_level=0, limits=LIMITS)
        if compiled.is_error():
            reason = compiled.get_error().partition("\n")[0]
            raise InvalidRequest(f"the {grammar.kind} cannot be compiled: {reason}", param="grammar")
        return compiled

    @functools.cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        tokenizer = self._load_tokenizer()
        if type(tokenizer.backend.model).__name__ not in ("BPE", "Unigram"):
            raise InvalidRequest(
                "structured output needs a model whose tokenizer is of the kind BPE or Unigram",
                param="grammar",
            )
        # Beyond the vocabulary, for models without an end of sequence: whoever stops there has ended anyway.
        eos = list(tokenizer.eos_token_ids) or [self._vocab_size]
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(tokenizer, self._vocab_size + 1, eos[0])), eos_token=eos
        )


def _check_terminals(grammar: Grammar) -> None:
    name, size = largest_terminal(grammar.source) if grammar.kind is GrammarKind.LARK else ("", 0)
    if size > MAX_REGEX_CHARS:
        raise InvalidRequest(
            f"the terminal {name} stands for a regular expression of more than {MAX_REGEX_CHARS} characters; make it a "
            "rule (a name in lower case), or write a long repetition inside a /regular expression/",
            param="grammar",
        )


def _regexes(grammar: Grammar) -> list[str]:
    if grammar.kind is GrammarKind.REGEX:
        return [grammar.source]
    if grammar.kind is GrammarKind.LARK:
        return re.findall(r"/(?:\\.|[^/\\\n])+/", grammar.source)
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        try:
            return list(_patterns(json.loads(grammar.source)))
        except (ValueError, RecursionError):  # said better by the compiler
            return []
    return []


def _patterns(schema: object) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(pattern := schema.get("pattern"), str):
            yield pattern
        if isinstance(named := schema.get("patternProperties"), dict):
            yield from named
    if isinstance(schema, dict | list):
        for item in schema.values() if isinstance(schema, dict) else schema:
            yield from _patterns(item)


class _Tokens:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, eos_token_id: int) -> None:
        text = TokenText(tokenizer.backend)
        added = tokenizer.backend.get_added_tokens_decoder()
        self._backend = tokenizer.backend
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted({i for i, token in added.items() if token.special} | {eos_token_id})
        self.tokens = [text.token_bytes(token_id) for token_id in range(num_tokens)]
        for token_id in self.special_token_ids:
            self.tokens[token_id] = f"<special {token_id}>".encode()

    def __call__(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


class _Matcher:
    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)

    def accept(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise InternalError(f"the grammar refused token {token_id}: {self._reason()}")

    @property
    def has_ended(self) -> bool:
        return self._matcher.is_stopped()

    def mask(self) -> Bitmask:
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)[: self._num_words]
        # An answer that became too complex to go on with: nothing is allowed, and the request fails.
        return np.zeros_like(mask) if self._matcher.is_error() else mask

    def _reason(self) -> str:
        return self._matcher.get_error().partition("\n")[0]
