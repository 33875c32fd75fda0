"""How much of the KV hand-over is left when the prompt is computed: with layer groups, and without.

Measured: one prompt at a time, in one chunk, through the production engine, prefill service and TCP transport with a
random-weight Llama; the receiving end is a process of its own, with the production state machine and digests. The
kernel paces the link (SO_MAX_PACING_RATE). `exposed` is the time from the end of the prompt's computation to the last
acknowledgement; with one group nothing leaves before that end, so it is the whole transfer. Rates and numbers of
groups take turns in every round.

    python benchmarks/bench_overlap.py [--rounds 7] [--tokens 256] [--hidden 768] [--layers 16] [--groups 1,2,4,8]
                                       [--write]

`last group` is the whole transfer as measured with overlap off, divided by the number of groups: the time that the
bytes of the last one take on this link. The claim is that no more than that plus 10 % is exposed. `link behind` is by
how much all bytes take longer than the whole prefill: where the link is slower than the model, no overlap can hide
that much, and nothing is claimed. --write puts the table into benchmarks/results/overlap.md. The last line of stdout
is one JSON object.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvloop
from machine import describe_machine
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from baton.clock import SystemClock
from baton.config import EngineConfig, ModelConfig, TransferConfig
from baton.engine.engine import Engine
from baton.engine.model_runner import TorchModelRunner, load_runner
from baton.engine.worker import Worker
from baton.handover.fetch import Fetcher
from baton.handover.receive import Receiver
from baton.kv.block import num_blocks_for
from baton.kv.layout import KVLayout, LayerLayout
from baton.kv.storage import KVStorage
from baton.messages import PrefillCall, PrefillResult, Role, Ticket, WorkerRecord
from baton.request import BlockId, Request, RequestId, SamplingParams, WorkerId
from baton.rpc import InprocRpc, InprocRpcNetwork
from baton.transfer.handshake import Compatibility
from baton.transfer.report import TransferReport
from baton.transfer.tcp import TcpTransport
from baton_loadtest.paced import PacedTcpTransport
from baton_prefill.service import PrefillService

VOCAB_SIZE, NUM_HEADS, HEAD_DIM, BLOCK_SIZE = 512, 16, 64, 16
RATES = (0.1e9, 0.5e9, 2e9)
WAIT_S = 60.0
RESULTS = Path(__file__).parent / "results" / "overlap.md"


def ignore(kind: str, /, **fields: object) -> None:
    pass


# --- the receiving process ---


async def receive(num_layers: int, num_blocks: int) -> None:
    """Reads one request id and prompt per line, as JSON; answers "expected" at once and "verified" when everything came
    and matched."""
    layout = KVLayout(BLOCK_SIZE, (LayerLayout(NUM_HEADS, HEAD_DIM, HEAD_DIM),) * num_layers, "float32", 4)
    clock = SystemClock()
    receiver = Receiver(KVStorage(layout, num_blocks), Compatibility().identity, clock, ignore)
    transport = TcpTransport(clock)
    print(await transport.listen(receiver), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        name, prompt = json.loads(line)
        request_id = RequestId(name)
        request = Request(request_id, tuple(prompt))
        receiver.expect(request, 1, [BlockId(i) for i in range(num_blocks)], 0, WAIT_S)
        print("expected", flush=True)
        await receiver.wait_verified(request_id)
        receiver.go_live(request_id)
        print("verified", flush=True)
    await transport.aclose()


class ReceivingProcess:
    def __init__(self, num_layers: int, num_blocks: int) -> None:
        command = [
            sys.executable,
            __file__,
            "--receive",
            "--layers",
            str(num_layers),
            "--blocks",
            str(num_blocks),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = self._read()

    async def expect(self, request: Request) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([request.request_id, request.prompt_token_ids]) + "\n")
        self._process.stdin.flush()
        await self.wait("expected")

    async def wait(self, word: str) -> None:
        assert await asyncio.to_thread(self._read) == word

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


# --- the sending process ---


def make_model(options: argparse.Namespace, directory: str) -> None:
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=options.hidden,
        intermediate_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


@dataclass
class Samples:
    exposed_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    num_bytes: int = 0


class Bench:
    def __init__(
        self, runner: TorchModelRunner, worker: Worker, receiver: ReceivingProcess, num_tokens: int
    ) -> None:
        self._runner = runner
        self._worker = worker
        self._receiver = receiver
        self._num_tokens = num_tokens
        self._random = random.Random(0)
        self._num_requests = 0
        self.samples: dict[tuple[float, int], Samples] = {}

    async def hand_over(self, bytes_per_s: float, num_groups: int) -> None:
        reported: asyncio.Future[TransferReport] = asyncio.get_running_loop().create_future()
        clock = SystemClock()
        transport = PacedTcpTransport(clock, bytes_per_s)
        config = TransferConfig(num_layer_groups=num_groups, push_timeout_s=WAIT_S)
        storage = self._runner.storage
        nobody = InprocRpc(InprocRpcNetwork(clock), clock)  # has a prefix that could be fetched
        fetcher = Fetcher(
            self._worker, Receiver(storage, "bench", clock, ignore), nobody, transport, "", config, clock, ignore,
            lambda fetched: None,
        )  # fmt: skip
        service = PrefillService(
            self._worker, storage, transport, fetcher, config, clock, ignore, reported.set_result
        )
        self._num_requests += 1
        request_id = RequestId(f"r{self._num_requests}")
        call = self._call(request_id)
        await self._receiver.expect(call.request)
        async with aclosing(service.prefill(call)) as answers:
            result = await anext(answers)
            assert isinstance(result, PrefillResult), result
            await anext(answers)  # the push has ended
        await self._receiver.wait("verified")
        report = await reported
        await service.aclose()
        await fetcher.aclose()
        await transport.aclose()
        assert report.exposed_s is not None, report
        samples = self.samples.setdefault((bytes_per_s, num_groups), Samples())
        samples.exposed_s.append(report.exposed_s)
        samples.prefill_s.append(result.prefill_s)
        samples.num_bytes = report.num_bytes

    def _call(self, request_id: RequestId) -> PrefillCall:
        prompt = tuple(self._random.randrange(VOCAB_SIZE) for _ in range(self._num_tokens))
        request = Request(request_id, prompt, SamplingParams(max_tokens=2, temperature=0.0))
        ticket = Ticket(
            handle=0,
            request_id=request_id,
            epoch=1,
            worker_id=WorkerId("receiver"),
            transport="tcp",
            address=self._receiver.address,
            fingerprint="bench",
            block_size=BLOCK_SIZE,
            num_cached_tokens=0,
            lease_s=WAIT_S,
        )
        return PrefillCall(request, ticket, WAIT_S)


async def measure(options: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    num_blocks = num_blocks_for(options.tokens, BLOCK_SIZE)
    engine_config = EngineConfig(
        num_blocks=num_blocks + 8,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=options.tokens,
        enable_prefix_caching=False,
    )
    with tempfile.TemporaryDirectory() as directory:
        make_model(options, directory)
        runner = load_runner(ModelConfig(directory, dtype="float32"), engine_config).runner
    clock = SystemClock()
    engine = Engine(engine_config, runner, clock, "bench")
    layout = runner.storage.layout
    record = WorkerRecord(
        worker_id=WorkerId("sender"),
        incarnation="1",
        roles=(Role.PREFILL,),
        address="",
        transports=("tcp",),
        model="bench",
        fingerprint="bench",
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_model_len=engine.max_model_len,
        kv_block_bytes=layout.block_bytes,
    )
    worker = Worker(record, engine, clock, ignore, index=None, lease_s=10.0, heartbeat_s=1.0)
    receiver = ReceivingProcess(options.layers, num_blocks)
    running = asyncio.create_task(worker.run())
    bench = Bench(runner, worker, receiver, options.tokens)
    try:
        await in_turn(bench.hand_over, options.groups, 1)  # first touch of every buffer
        bench.samples.clear()
        await in_turn(bench.hand_over, options.groups, options.rounds)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        receiver.close()
        await runner.aclose()
    rows = make_rows(bench.samples)
    text = "\n".join(report(rows, options, load))
    print(text)
    if options.write:
        RESULTS.write_text(text + "\n")
    print(json.dumps({f"{row.rate / 1e9:g} GB/s, {row.num_groups} groups": row.verdict for row in rows}))


async def in_turn(
    hand_over: Callable[[float, int], Awaitable[None]], groups: list[int], num_rounds: int
) -> None:
    for _ in range(num_rounds):
        for rate in RATES:
            for num_groups in groups:
                await hand_over(rate, num_groups)


@dataclass(frozen=True)
class Row:
    rate: float  # bytes per second
    num_groups: int
    samples: Samples
    last_group_s: float

    @property
    def exposed_s(self) -> float:
        return statistics.median(self.samples.exposed_s)

    @property
    def prefill_s(self) -> float:
        return statistics.median(self.samples.prefill_s)

    @property
    def sum_s(self) -> float:
        """Prefill plus exposed: sending takes processor time, which a model without a core of its own pays for."""
        parts = zip(self.samples.prefill_s, self.samples.exposed_s, strict=True)
        return statistics.median(prefill_s + exposed_s for prefill_s, exposed_s in parts)

    @property
    def link_behind_s(self) -> float:
        return max(0.0, self.samples.num_bytes / self.rate - self.prefill_s)

    @property
    def verdict(self) -> str:
        if self.num_groups == 1:
            return "overlap off"
        if self.link_behind_s:
            return "the link is slower than the model"
        return "holds" if self.exposed_s <= 1.1 * self.last_group_s else "**does not hold**"

    def cells(self) -> list[str]:
        least, most = (1e3 * pick(self.samples.exposed_s) for pick in (min, max))
        ms = [1e3 * value for value in (self.prefill_s, self.exposed_s, self.last_group_s, self.sum_s)]
        return [
            f"{self.rate / 1e9:g}", str(self.num_groups), f"{ms[0]:.0f}", f"{ms[1]:.1f} ({least:.1f}-{most:.1f})",
            f"{ms[2]:.1f}", f"{1e3 * self.link_behind_s:.1f}", f"{ms[3]:.0f}", self.verdict,
        ]  # fmt: skip


def make_rows(all_samples: dict[tuple[float, int], Samples]) -> list[Row]:
    whole_s = {
        rate: statistics.median(s.exposed_s) for (rate, groups), s in all_samples.items() if groups == 1
    }
    return [
        Row(rate, num_groups, samples, whole_s[rate] / num_groups)
        for (rate, num_groups), samples in sorted(all_samples.items())
    ]


def report(rows: list[Row], options: argparse.Namespace, load: float) -> list[str]:
    num_bytes = rows[0].samples.num_bytes
    alone_s = statistics.median(s for row in rows if row.num_groups == 1 for s in row.samples.prefill_s)
    best = {row.rate: min((r for r in rows if r.rate == row.rate), key=lambda r: r.sum_s) for row in rows}
    heads = [
        "link GB/s",
        "groups",
        "prefill ms",
        "exposed ms",
        "last group ms",
        "link behind ms",
        "sum ms",
        "",
    ]
    return [
        "# What is left of the KV hand-over when the prompt is computed",
        "",
        "```\nmake bench-overlap\n```",
        "",
        f"{options.tokens} tokens in one chunk, random-weight Llama ({options.layers} layers, hidden size "
        f"{options.hidden}, {NUM_HEADS} KV heads of {HEAD_DIM}, float32): {num_bytes / 1e6:.0f} MB of KV in "
        f"{alone_s * 1e3:.0f} ms of prefill ({num_bytes / alone_s / 1e6:.0f} MB/s) without overlap. Two processes over "
        f"TCP on loopback, the link paced by the kernel; {options.rounds} rounds, rates and numbers of groups in turn. "
        f"{describe_machine()}, load average {load:.1f} at the start, one OpenMP thread.",
        "",
        "`exposed`: from the end of the prompt's computation to the last acknowledgement, median (least-greatest). One "
        "group is overlap switched off. `last group`: the whole transfer with overlap off over the number of groups. "
        "`sum`: prefill plus exposed, median of the rounds.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
        *(f"| {' | '.join(row.cells())} |" for row in rows),
        "",
        "Least sum: "
        + ", ".join(f"{b.num_groups} groups at {rate / 1e9:g} GB/s" for rate, b in best.items())
        + ". "
        f"The default of `transfer.num_layer_groups` is {TransferConfig().num_layer_groups}. Less than the last group "
        "may be exposed, because a layer's KV is written near the layer's beginning. tests/test_layer_groups.py holds "
        "the bound on a virtual clock, where nothing else runs.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--groups", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8])
    options = parser.parse_args()
    work = receive(options.layers, options.blocks) if options.receive else measure(options)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


if __name__ == "__main__":
    main()
