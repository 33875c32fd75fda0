"""What is sent and when, decided before anything is sent: a pure function of the specification and its seed.

Arrivals, prompts and output lengths come from three random streams of the same seed, so that a change of the
rate leaves the prompts as they were, and a change of the output lengths leaves the arrivals.

    open loop     requests leave at their planned times, however slow the answers are. `poisson` gaps are
                  exponential and unclipped: without the long ones the load would be higher and have no lulls
    closed loop   N users, each sends the next request when the last one ended: a slow server gets less load
"""

import enum
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, repeat
from pathlib import Path
from typing import NamedTuple, Protocol

import orjson

from baton.demo_task import NAMES, TOWNS, VOCABULARY, recall_prompt
from baton.errors import ConfigError
from baton_loadtest.lengths import Lengths

Prompt = str | tuple[int, ...]  # text, or token ids


class PromptKind(enum.StrEnum):
    DEMO = "demo"  # recall prompts of the demo model; answers are checked; lengths count (name, town) pairs
    WORDS = "words"  # random words; lengths count words
    RANDOM = "random"  # random token ids; lengths count tokens
    SHARED_PREFIX = (
        "shared-prefix"  # groups with a common beginning; ids if there is a vocab_size, else words
    )
    FILE = "file"  # JSONL, in its order, again from the top at its end


class Arrival(enum.StrEnum):
    POISSON = "poisson"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    index: int
    at_s: float  # seconds after the start; 0 in a closed loop, where the users decide
    prompt: Prompt
    max_tokens: int
    expected: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Exactly one of `rate` (open loop, requests per second) and `concurrency` (closed loop) is set."""

    prompt_len: Lengths
    output_len: Lengths
    seed: int = 0
    rate: float | None = None
    arrival: Arrival = Arrival.POISSON
    concurrency: int | None = None
    prompt_kind: PromptKind = PromptKind.DEMO
    vocab_size: int | None = None
    prefix_len: int = 256
    num_groups: int = 4
    prompts_file: Path | None = None

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.concurrency is None):
            raise ConfigError("give either a rate (open loop) or a concurrency (closed loop)")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ConfigError(f"the rate must be greater than 0, got {self.rate:g}")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"the concurrency must be at least 1, got {self.concurrency}")
        if self.prompt_kind is PromptKind.DEMO and self.prompt_len.highest > _MAX_PAIRS:
            raise ConfigError(
                f"a demo prompt has at most {_MAX_PAIRS} pairs; the length {self.prompt_len} allows more"
            )
        if self.prompt_kind is PromptKind.RANDOM and self.vocab_size is None:
            raise ConfigError("random prompts are token ids and need a vocabulary size; or use words")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ConfigError(f"the vocabulary size must be at least 1, got {self.vocab_size}")
        if self.prompt_kind is PromptKind.FILE and self.prompts_file is None:
            raise ConfigError("prompts from a file need the file")
        if self.prefix_len < 1 or self.num_groups < 1:
            raise ConfigError("the prefix length and the number of groups must be at least 1")

    @property
    def regime(self) -> str:
        """One sentence for the report: what load this is."""
        if self.concurrency is not None:
            load = f"closed loop, {self.concurrency} user{'s' if self.concurrency > 1 else ''}"
        elif self.arrival is Arrival.POISSON:
            load = f"open loop, Poisson {self.rate:g} req/s (exponential gaps, unclipped)"
        else:
            load = f"open loop, constant {self.rate:g} req/s"
        return f"{load}; {self._prompts_text}; output up to {self.output_len} tokens"

    @property
    def _prompts_text(self) -> str:
        match self.prompt_kind:
            case PromptKind.DEMO:
                return f"demo recall prompts of {self.prompt_len} pairs, answers checked"
            case PromptKind.WORDS:
                return f"random words, {self.prompt_len}"
            case PromptKind.RANDOM:
                return f"random token ids below {self.vocab_size}, {self.prompt_len}"
            case PromptKind.SHARED_PREFIX:
                unit = "words" if self.vocab_size is None else "token ids"
                shared = f"{self.num_groups} shared prefixes of {self.prefix_len} {unit}"
                return f"{shared}, own part {self.prompt_len}"
            case PromptKind.FILE:
                return f"prompts of {self.prompts_file}"

    def requests(self) -> Iterator[PlannedRequest]:
        """Without end; take as many as you need. Raises ConfigError for an unreadable prompts file."""
        prompts = self._prompts()
        times = self._times()
        rng = self._random("output lengths")
        for index, (at_s, draft) in enumerate(zip(times, prompts, strict=False)):
            drawn = self.output_len.sample(rng)
            yield PlannedRequest(index, at_s, draft.prompt, draft.max_tokens or drawn, draft.expected)

    def _times(self) -> Iterator[float]:
        if self.rate is None:
            return repeat(0.0)
        if self.arrival is Arrival.POISSON:
            return accumulate(poisson_gaps(self._random("arrivals"), self.rate))
        return (index / self.rate for index, _ in enumerate(repeat(None)))

    def _prompts(self) -> Iterator["Draft"]:
        if self.prompts_file is not None and self.prompt_kind is PromptKind.FILE:
            return cycle(read_prompts(self.prompts_file))
        rng = self._random("prompts")
        source = self._source(rng)
        return (source.draw(rng) for _ in repeat(None))

    def _source(self, rng: random.Random) -> "PromptSource":
        if self.prompt_kind is PromptKind.DEMO:
            return DemoRecall(self.prompt_len)
        source: RandomWords | RandomTokens = RandomWords(self.prompt_len)
        if self.vocab_size is not None and self.prompt_kind is not PromptKind.WORDS:
            source = RandomTokens(self.prompt_len, self.vocab_size)
        if self.prompt_kind is not PromptKind.SHARED_PREFIX:
            return source
        return SharedPrefix([source.of_length(rng, self.prefix_len) for _ in range(self.num_groups)], source)

    def _random(self, stream: str) -> random.Random:
        # A text seed is hashed with SHA-512: the same in every process, unrelated for neighbouring seeds.
        return random.Random(f"{self.seed}/{stream}")


def poisson_gaps(rng: random.Random, rate: float) -> Iterator[float]:
    """Seconds between arrivals of a Poisson process with `rate` per second."""
    return (rng.expovariate(rate) for _ in repeat(None))


class Draft(NamedTuple):
    prompt: Prompt
    expected: str | None = None
    max_tokens: int | None = None  # None: drawn from the output lengths


class PromptSource(Protocol):
    def draw(self, rng: random.Random) -> Draft: ...


@dataclass(frozen=True, slots=True)
class DemoRecall:
    num_pairs: Lengths

    def draw(self, rng: random.Random) -> Draft:
        return Draft(*recall_prompt(rng, self.num_pairs.sample(rng)))


@dataclass(frozen=True, slots=True)
class RandomWords:
    lengths: Lengths

    def draw(self, rng: random.Random) -> Draft:
        return Draft(self.of_length(rng, self.lengths.sample(rng)))

    def of_length(self, rng: random.Random, num_words: int) -> Prompt:
        return " ".join(rng.choices(VOCABULARY, k=num_words))


@dataclass(frozen=True, slots=True)
class RandomTokens:
    lengths: Lengths
    vocab_size: int

    def draw(self, rng: random.Random) -> Draft:
        return Draft(self.of_length(rng, self.lengths.sample(rng)))

    def of_length(self, rng: random.Random, num_tokens: int) -> Prompt:
        return tuple(rng.choices(range(self.vocab_size), k=num_tokens))


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    prefixes: Sequence[Prompt]
    own_part: PromptSource

    def draw(self, rng: random.Random) -> Draft:
        return Draft(_joined(rng.choice(self.prefixes), self.own_part.draw(rng).prompt))


def _joined(prefix: Prompt, rest: Prompt) -> Prompt:
    if isinstance(prefix, str) and isinstance(rest, str):
        return f"{prefix} {rest}"
    assert isinstance(prefix, tuple) and isinstance(rest, tuple)
    return prefix + rest


def read_prompts(path: Path) -> list[Draft]:
    """One JSON object per line: {"prompt": text or token ids, "max_tokens": 64, "expected": "the answer"};
    all but the prompt may be missing. Raises ConfigError with the line's number."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    drafts = [_draft(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not drafts:
        raise ConfigError(f"{path} holds no prompt")
    return drafts


def _draft(line: bytes, where: str) -> Draft:
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict) or "prompt" not in entry:
        raise ConfigError(f'{where}: needs an object with "prompt"')
    if unknown := sorted(entry.keys() - {"prompt", "expected", "max_tokens"}):
        raise ConfigError(f"{where}: unknown field {', '.join(unknown)}; known: prompt, max_tokens, expected")
    prompt, expected, max_tokens = entry["prompt"], entry.get("expected"), entry.get("max_tokens")
    if isinstance(prompt, list) and prompt and all(type(token_id) is int for token_id in prompt):
        prompt = tuple(prompt)
    elif not isinstance(prompt, str) or not prompt:
        raise ConfigError(f"{where}: prompt must be a text or a list of token ids")
    if expected is not None and not isinstance(expected, str):
        raise ConfigError(f"{where}: expected must be a text")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise ConfigError(f"{where}: max_tokens must be a whole number of at least 1")
    return Draft(prompt, expected, max_tokens)


_MAX_PAIRS = min(len(NAMES), len(TOWNS))
