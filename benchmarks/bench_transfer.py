"""How fast KV blocks cross between two processes of one machine, what it costs, and what a user notices of it.

    python benchmarks/bench_transfer.py [--rounds 7] [--pairs 25] [--transports shm,ucx,tcp] [--write]

Speed: scattered blocks of one process's pool, pushed as pieces of 4 MiB (MAX_IN_FLIGHT at once) into scattered blocks
of another's, without digest and engine. Beside it, in the same rounds and turn by turn, the ceilings: `memcpy`, one
thread copying block by block from one pool into another; `raw socket`, the same bytes from one buffer into one buffer
through one blocking socket; and `ucx_perftest` where it is installed. Ratios are taken round by round: they carry over
to other machines, GB/s do not (1 GB = 1e9 bytes).

Hand-over: prompts of 2,000 random tokens to the demo model, in turn to a prefill and a decode worker over shared memory
and to a decode worker alone, each a `baton up` of its own.

--write puts the tables into benchmarks/results/transfer.md. The last line of stdout is one JSON object.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import uvloop
from handover_ttft import HandOver, measure_hand_over
from machine import describe_machine, spread
from transfer_pair import MEMCPY, MIB, SHAPES, SOCKET, TLS, Pair, make_certificates

from baton.transfer.choose import available

RESULTS = Path(__file__).parent / "results" / "transfer.md"
GRPC_S = 3.0  # per transport
PERFTEST_PORT = 13399
# As baton.transfer.ucx sets them.
PERFTEST_ENV = {
    "UCX_TLS": "tcp",
    "UCX_NET_DEVICES": "lo",
    "UCX_RNDV_SCHEME": "put_zcopy",
    "UCX_TCP_TX_SEG_SIZE": "1M",
    "UCX_TCP_RX_SEG_SIZE": "1M",
}


class Verdict(NamedTuple):
    claim: str
    found: str
    holds: bool


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=25, help="of hand-overs")
    parser.add_argument("--transports", type=lambda names: names.split(","), default=[*available(), TLS])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    started_s = time.monotonic()
    load = os.getloadavg()[0]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        pair, idle = runner.run(measure_pair(options))
    perftest = {shape: run_perftest(size, options.rounds) for shape, size in SHAPES.items()}
    hand_over = measure_hand_over(options.pairs)
    verdicts = judge(pair, idle, hand_over)
    conditions = (
        f"{describe_machine()}, load average {load:.1f} at the start, {time.monotonic() - started_s:.0f} s"
    )
    text = "\n".join(report(pair, perftest, idle, hand_over, verdicts, conditions))
    print(text)
    if options.write:
        RESULTS.write_text(text + "\n")
    print(json.dumps({verdict.claim: verdict.holds for verdict in verdicts}))


async def measure_pair(options: argparse.Namespace) -> tuple[Pair, list[float]]:
    with tempfile.TemporaryDirectory() as certificates:
        make_certificates(Path(certificates))
        async with Pair.running(options.transports, 256 * MIB, certificates) as pair:
            await pair.round()  # first touch of every buffer
            pair.samples.clear()
            for _ in range(options.rounds):
                await pair.round()
            for name in options.transports:
                await pair.grpc_during(name, GRPC_S)
            return pair, await pair.idle_percent()


def run_perftest(num_bytes: int, rounds: int) -> list[float]:
    """GB/s of UCX's own tag messages; empty where its benchmark is not installed."""
    package = importlib.util.find_spec("libucx")
    bundled = Path(package.origin).parent if package and package.origin else Path()
    found = bundled / "bin" / "ucx_perftest"
    command = str(found) if found.exists() else shutil.which("ucx_perftest")
    if command is None:
        return []
    env = os.environ | PERFTEST_ENV | {"LD_LIBRARY_PATH": str(bundled / "lib")}
    iterations = ["-t", "tag_bw", "-s", str(num_bytes), "-n", str(256 * MIB // num_bytes), "-w", "10"]
    results = []
    for _ in range(rounds):
        port = ["-p", str(PERFTEST_PORT)]
        server = subprocess.Popen(
            [command, *port], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            time.sleep(0.5)
            client = [command, "127.0.0.1", *port, *iterations]
            output = subprocess.run(client, env=env, capture_output=True, text=True, timeout=60).stdout
        finally:
            server.kill()
            server.wait()
        # Final: iterations, latencies, then MB/s (of 2^20 bytes) average and overall
        final = re.search(r"^Final:(.*)$", output, re.MULTILINE)
        if final is None:
            return []
        results.append(float(final[1].split()[5]) * MIB / 1e9)
    return results


def judge(pair: Pair, idle: Sequence[float], hand_over: HandOver) -> list[Verdict]:
    verdicts = []
    floors = [("tcp", SOCKET, "256 KiB", 0.7), ("tcp", SOCKET, "64 KiB", 0.6)]
    floors += [("ucx", SOCKET, "contiguous", 0.5), ("ucx", SOCKET, "64 KiB", 0.4)]
    floors += [("shm", MEMCPY, shape, 0.5) for shape in SHAPES]
    for name, ceiling, shape, floor in floors:
        if (name, shape) in pair.samples:
            ratio = statistics.median(ratios(pair, name, ceiling, shape))
            verdicts.append(
                Verdict(f"{name} {shape} >= {floor:g} x {ceiling}", f"{ratio:.2f}", ratio >= floor)
            )
    for name, times in pair.grpc_ms.items():
        p99 = percentile(times, 0.99)
        verdicts.append(Verdict(f"gRPC p99 during {name} < 10 ms", f"{p99:.2f} ms", p99 < 10))
    verdicts.append(Verdict("idle CPU < 5 %", f"{max(idle):.2f} %", max(idle) < 5))
    added = statistics.median(hand_over.added_ms)
    verdicts.append(Verdict("hand-over of 2,000 tokens adds < 3 ms to TTFT", f"{added:.2f} ms", added < 3))
    share = 100 * hand_over.digest_share
    verdicts.append(Verdict("digest <= 3 % of the prefill", f"{share:.2f} %", share <= 3))
    return verdicts


def ratios(pair: Pair, name: str, ceiling: str, shape: str) -> list[float]:
    return pair.samples[name, shape].over(pair.samples[ceiling, shape])


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def report(
    pair: Pair,
    perftest: dict[str, list[float]],
    idle: Sequence[float],
    hand_over: HandOver,
    verdicts: Sequence[Verdict],
    conditions: str,
) -> list[str]:
    rounds = len(next(iter(pair.samples.values())).gb_per_s)
    lines = [
        "# KV between two processes of one machine",
        "",
        "```\nmake bench-transfer\n```",
        "",
        f"{conditions}. Median (least-greatest) of {rounds} rounds; what is measured stands at the beginning of "
        "benchmarks/bench_transfer.py.",
        "",
        "| what | blocks | GB/s | of memcpy | of the raw socket | CPU s per GB, sender + receiver |",
        "|---|---|---|---|---|---|",
    ]
    for (name, shape), samples in sorted(pair.samples.items(), key=lambda item: [*SHAPES].index(item[0][1])):
        of = [spread(ratios(pair, name, ceiling, shape)) for ceiling in (MEMCPY, SOCKET)]
        sent, received = samples.cpu_s
        lines.append(
            f"| {name} | {shape} | {spread(samples.gb_per_s)} | {of[0]} | {of[1]} | {sent:.2f} + {received:.2f} |"
        )
    for shape, values in perftest.items():
        if values:
            lines.append(f"| ucx_perftest tag_bw | {shape} | {spread(values)} | | | |")
    lines += ["", "| gRPC call during a transfer over | p50 ms | p99 ms | greatest |", "|---|---|---|---|"]
    for name, times in pair.grpc_ms.items():
        p50, p99 = percentile(times, 0.5), percentile(times, 0.99)
        lines.append(f"| {name} | {p50:.2f} | {p99:.2f} | {max(times):.2f} |")
    lines += [
        "",
        f"Idle, all connections open: {idle[0]:.2f} % of a core in the sender, {idle[1]:.2f} % in the receiver.",
        "",
        f"| 2,000 tokens, demo model, {len(hand_over.added_ms)} pairs | TTFT ms | second token ms later |",
        "|---|---|---|",
        f"| two workers, shared memory | {spread(hand_over.pair_ms)} | {spread(hand_over.pair_second_ms)} |",
        f"| decode worker alone | {spread(hand_over.alone_ms)} | {spread(hand_over.alone_second_ms)} |",
        f"| difference, pair by pair | {spread(hand_over.added_ms)} | |",
        "",
        f"The digests of these {hand_over.kv_bytes / 1e6:.1f} MB take {1e3 * hand_over.digest_s:.2f} ms on each side, "
        f"{100 * hand_over.digest_share:.2f} % of the prefill.",
        "",
        "| claim | found | |",
        "|---|---|---|",
        *(f"| {v.claim} | {v.found} | {'holds' if v.holds else '**does not hold**'} |" for v in verdicts),
    ]
    return lines


if __name__ == "__main__":
    main()
