"""What a hand-over of 2,000 tokens of the demo model adds to the time to the first token; for bench_transfer.py."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np
from bench_fleet import fleet

from baton.demo_task import DEMO_MODEL_DIR
from baton.kv.layout import KVLayout, LayerLayout
from baton.request import RequestId
from baton.transfer.digest import Digester
from baton.transfer.wire import PieceHeader

NUM_TOKENS, BLOCK_SIZE = 2000, 16
NUM_WARM_UP = 3
READY_S = 60.0


@dataclass
class HandOver:
    """One entry per prompt; each is asked of both fleets."""

    pair_ms: list[float] = field(default_factory=list)  # time to the first token
    alone_ms: list[float] = field(default_factory=list)
    pair_second_ms: list[float] = field(default_factory=list)  # from the first token to the second
    alone_second_ms: list[float] = field(default_factory=list)
    digest_s: float = 0.0
    kv_bytes: int = 0

    @property
    def added_ms(self) -> list[float]:
        return [pair - alone for pair, alone in zip(self.pair_ms, self.alone_ms, strict=True)]

    @property
    def digest_share(self) -> float:
        return 1e3 * self.digest_s / float(np.median(self.alone_ms))


def measure_hand_over(num_pairs: int) -> HandOver:
    found = compare(num_pairs, range(10, 500))
    found.digest_s, found.kv_bytes = time_digest()
    return found


def compare(num_pairs: int, token_ids: range, model: str = "demo", flags: Sequence[str] = ()) -> HandOver:
    """Two workers and one, of the same model and with the same flags."""
    found = HandOver()
    rng = random.Random(0)
    flags = "--model", model, *flags
    with (
        fleet(*flags, "--transport", "shm", "--prefill", "1", "--decode", "1") as pair_url,
        fleet(*flags, "--prefill", "0", "--decode", "1") as alone_url,
        httpx.Client(timeout=60) as client,
    ):
        wait_for_pair(client, pair_url)
        for number in range(NUM_WARM_UP + num_pairs):
            prompt = [rng.choice(token_ids) for _ in range(NUM_TOKENS)]
            sides = [(pair_url, found.pair_ms, found.pair_second_ms)]
            sides.insert(number % 2, (alone_url, found.alone_ms, found.alone_second_ms))
            for url, first_ms, second_ms in sides:
                first, second = ask(client, url, prompt, model)
                if number >= NUM_WARM_UP:
                    first_ms.append(1e3 * first)
                    second_ms.append(1e3 * (second - first))
    return found


def wait_for_pair(client: httpx.Client, url: str, transport: str = "shm") -> None:
    """Until a golden prompt has gone through it."""
    ends_s = time.monotonic() + READY_S
    while [pair["transport"] for pair in client.get(f"{url}/health").json()["pairs"]] != [transport]:
        if time.monotonic() > ends_s:
            raise SystemExit(f"the pair did not prove itself over {transport}")
        time.sleep(0.2)


def ask(client: httpx.Client, url: str, prompt: list[int], model: str) -> tuple[float, float]:
    """Seconds to the first and to the second token, by the router's own record: some tokens make no text to stream."""
    body = {"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    answer = client.post(f"{url}/v1/completions", json=body)
    answer.raise_for_status()
    record = client.get(f"{url}/debug/requests/{answer.json()['id']}").json()
    first, second = record["first_token_s"], record["finished_s"]
    return first - record["arrival_s"], second - record["arrival_s"]


def time_digest() -> tuple[float, int]:
    """Seconds of one side's digests for the KV of the prompt in one piece, and its bytes; the best of some."""
    config = json.loads((DEMO_MODEL_DIR / "config.json").read_text())
    layer = LayerLayout(config["num_key_value_heads"], config["head_dim"], config["head_dim"])
    layout = KVLayout(BLOCK_SIZE, (layer,) * config["num_hidden_layers"], "float32", 4)
    num_blocks = NUM_TOKENS // BLOCK_SIZE
    payload = [memoryview(np.random.default_rng(i).bytes(layout.block_bytes)) for i in range(num_blocks)]
    header = PieceHeader(
        RequestId("bench"), 1, 0, 0, layout.num_layers, 0, NUM_TOKENS, num_blocks * layout.block_bytes,
        head_end=layer.num_kv_heads, run_tokens=BLOCK_SIZE, dtype="float32",
    )  # fmt: skip
    times = []
    for _ in range(10):
        started_s = time.process_time()
        Digester("bench", range(NUM_TOKENS)).digest(header, layout, payload)
        times.append(time.process_time() - started_s)
    return min(times), header.num_bytes
