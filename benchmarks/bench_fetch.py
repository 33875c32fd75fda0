"""The second turn of a chat: the part of it that only a decode worker holds, fetched from there and computed.

    python benchmarks/bench_fetch.py [--pairs 9] [--transports tcp shm] [--tokens 1000] [--model demo] [--write]

One router, one prefill and one decode worker as processes of this machine. A first turn of --tokens random tokens and
an answer of as many; then, with 30 more, the whole of it again. The prefill worker holds the first half, the decode
worker both. `fetched`: the prefill worker fetches the second half. `computed`: it computes it, because the decode
worker has not got it either: the first turn was answered with one token, and the second one brings the same tokens as
its own. Prompts are new each time; the two take turns, and so do the transports.

TTFT is the router's, from its record of the request. --write puts the table into benchmarks/results/fetch.md. The last
line of stdout is one JSON object.
"""

import argparse
import contextlib
import json
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from bench_fleet import fleet
from handover_ttft import wait_for_pair
from machine import describe_machine, spread

from baton.transfer.choose import available

RESULTS = Path(__file__).parent / "results" / "fetch.md"
NUM_QUESTION, NUM_WARM_UP = 30, 2
INDEXED_S = 1.0  # until the router has heard of the blocks of the first turn
FIRST_TOKEN, LAST_TOKEN = 10, 499  # words of the demo model's vocabulary


@dataclass
class Times:
    fetched_ms: list[float] = field(default_factory=list)
    computed_ms: list[float] = field(default_factory=list)
    num_fetched: list[int] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.fetched_ms, self.computed_ms, strict=True)]


class Bench:
    def __init__(self, client: httpx.Client, num_tokens: int) -> None:
        self._client = client
        self._num_tokens = num_tokens
        self._rng = random.Random(0)

    def fetched(self, url: str) -> tuple[float, int]:
        """ms to the first token, tokens that were fetched."""
        prompt = self._random(self._num_tokens)
        answer, _ = self._ask(url, prompt, self._num_tokens)
        record = self._second_turn(url, [*prompt, *answer])
        return 1e3 * record["ttft_s"], record["num_fetched_tokens"]

    def computed(self, url: str) -> float:
        prompt = self._random(self._num_tokens)
        self._ask(url, prompt, 1)
        record = self._second_turn(url, [*prompt, *self._random(self._num_tokens)])
        if record["num_fetched_tokens"]:
            raise SystemExit("what was to be computed was fetched")
        return 1e3 * record["ttft_s"]

    def _second_turn(self, url: str, conversation: list[int]) -> Any:
        time.sleep(INDEXED_S)
        return self._ask(url, [*conversation, *self._random(NUM_QUESTION)], 2)[1]

    def _ask(self, url: str, prompt: list[int], num_tokens: int) -> tuple[list[int], Any]:
        body = {"model": "demo", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        answer = self._client.post(f"{url}/v1/completions", json=body).raise_for_status().json()
        record = self._client.get(f"{url}/debug/requests/{answer['id']}").raise_for_status().json()
        return answer["choices"][0]["token_ids"], record

    def _random(self, number: int) -> list[int]:
        return [self._rng.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(number)]


def measure(transports: list[str], num_pairs: int, num_tokens: int, model: str) -> dict[str, Times]:
    found = {transport: Times() for transport in transports}
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(timeout=120))
        flags = ("--model", model, "--served-model-name", "demo", "--prefill", "1", "--decode", "1")
        urls = {name: stack.enter_context(fleet("--transport", name, *flags)) for name in transports}
        for name, url in urls.items():
            wait_for_pair(client, url, name)
        bench = Bench(client, num_tokens)
        for number in range(NUM_WARM_UP + num_pairs):
            for name, url in urls.items():
                took = [("fetched", bench.fetched), ("computed", bench.computed)]
                took_ms = {what: ask(url) for what, ask in (took if number % 2 else reversed(took))}
                if number >= NUM_WARM_UP:
                    ms, num_fetched = took_ms["fetched"]
                    found[name].fetched_ms.append(ms)
                    found[name].num_fetched.append(num_fetched)
                    found[name].computed_ms.append(took_ms["computed"])
    return found


def report(found: dict[str, Times], args: argparse.Namespace, load: float) -> str:
    rows = [
        f"| {name} | {spread(times.fetched_ms, 1)} | {spread(times.computed_ms, 1)} | {spread(times.ratios)} | "
        f"{min(times.num_fetched)}-{max(times.num_fetched)} |"
        for name, times in found.items()
    ]
    return "\n".join(
        [
            "# A prefix fetched from a decode worker, and computed",
            "",
            "```",
            f"python benchmarks/bench_fetch.py --pairs {args.pairs} --tokens {args.tokens} --model {args.model}",
            "```",
            "",
            f"{describe_machine()}, load average {load:.1f} at the start. Median (least-greatest) of {args.pairs} "
            "pairs; what is measured stands at the beginning of the script.",
            "",
            "| transport | TTFT fetched ms | TTFT computed ms | pair by pair | tokens fetched |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--transports", nargs="+", default=[t for t in ("shm", "tcp") if t in available()])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    found = measure(args.transports, args.pairs, args.tokens, args.model)
    text = report(found, args, load)
    print(text)
    if args.write:
        RESULTS.write_text(text)
    print(json.dumps({name: vars(times) for name, times in found.items()}))


if __name__ == "__main__":
    main()
