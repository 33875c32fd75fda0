"""Baton's engine beside its peers on this machine: throughput, latency, interference, and the goals set for them.

    python benchmarks/bench_engine.py --make-peer-env DIR      once: vLLM for CPUs and what it needs; network, 4 GB
    python benchmarks/bench_engine.py --peers DIR --out benchmarks/results/engine.md

    --quick            one round of small loads: whether everything works
    --rounds N         default 3; every server takes its turn in every round
    --only GROUP ...   step, tiny, aggregated, disaggregated, shipped; default: all
    --without TEXT     leave out the rows whose name contains it; may be repeated

Regime: one machine without a GPU; client and servers share its cores. The servers of a group run at the same time and
are stopped (SIGSTOP) but for the one that is measured. Models have random weights (scripts/make_bench_model.py): 372
million parameters in Qwen-0.5B's shape, and a tiny one; bfloat16, greedy, streamed, no prompt twice. Without `--peers`
the peers' rows say "not installed".

Cells are medians over the rounds, with the least and the greatest. CPU seconds are those of all processes of a server.
Progress goes to stderr; the last line of stdout is one JSON object with all samples and verdicts.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_bench import loads, results
from engine_bench.loads import Failed, Lengths, Sample
from engine_bench.peers import Peers, baton, make_peer_env
from engine_bench.results import Results, goal_table, tables, verdicts
from engine_bench.servers import Server, Spec, all_running, awake

ROOT = Path(__file__).parent.parent
PARTS = Path(__file__).parent / "engine_bench"
GROUPS = ("step", "tiny", "aggregated", "disaggregated", "shipped")
DEFAULT_MODELS = Path(tempfile.gettempdir()) / "baton-bench-models"
USUAL = Lengths(prompt=256, output=64)
# More answer than prompt, as in the conversations behind the "24 times" that vLLM once claimed.
CHATTY = Lengths(prompt=64, output=256)
NOT_INSTALLED = "not installed: --make-peer-env, then --peers"


@dataclass(frozen=True)
class Sizes:
    num_rounds: int = 3
    num_requests: dict[int, int] = field(default_factory=lambda: {1: 2, 8: 8, 32: 32})  # by concurrency
    alone_s: float = 8.0
    num_long: int = 4
    num_tiny: int = 128
    num_tiny_generate: int = 4
    num_steps: int = 300


QUICK = Sizes(
    1, {1: 1, 8: 8, 32: 32}, alone_s=3.0, num_long=1, num_tiny=64, num_tiny_generate=1, num_steps=50
)


@dataclass(frozen=True)
class Contestant:
    row: str
    phases: tuple[str, ...]
    spec: Spec | None  # None: a peer, and there are none here


@dataclass(frozen=True)
class Offline:
    """A process of its own in each round, which prints its sample."""

    row: str
    phase: str
    argv: tuple[str, ...]


class Bench:
    def __init__(self, sizes: Sizes, models: Path, peers: Peers, without: list[str], log_dir: Path) -> None:
        self.results = Results()
        self._sizes = sizes
        self._models = models
        self._peers = peers
        self._without = without
        self._log_dir = log_dir
        self._started_s = time.monotonic()
        self._phases: dict[str, Callable[[Server, int], Sample]] = {
            **{f"c{c}": self._throughput(USUAL, c, number) for c, number in sizes.num_requests.items()},
            "tiny": self._throughput(CHATTY, 64, sizes.num_tiny),
            "long": lambda server, seed: loads.decoders_and_long_prompts(
                server, sizes.alone_s, sizes.num_long, seed
            ),
            "prefix": loads.prefix_hit,
        }

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._started_s:6.0f} s  {text}", file=sys.stderr, flush=True)

    # --- groups ---

    def step(self) -> None:
        argv = ("step_cost.py", str(self._model("tiny")), "--steps", str(self._sizes.num_steps))
        self._take_turns([], [Offline(results.STEP, "step", argv)])

    def tiny(self) -> None:
        model, sizes = self._model("tiny"), self._sizes
        served = baton(results.BATON, model, "--max-num-seqs", "64", num_threads=2)
        many, few = (64, sizes.num_tiny), (1, sizes.num_tiny_generate)
        offline = [
            _offline(results.BATON_OFFLINE, "tiny", "baton", model, CHATTY, *many),
            _offline(results.GENERATE, "tiny", "generate", model, CHATTY, *few),
            _offline(results.GENERATE_1, "tiny", "generate", model, CHATTY, *few, num_threads=1),
        ]
        self._take_turns([Contestant(results.BATON, ("tiny",), served)], offline)

    def aggregated(self) -> None:
        model, peers = self._model("qwen-0.5b"), self._peers
        chunks = ("--max-num-batched-tokens", "256")
        every, two = tuple(f"c{c}" for c in self._sizes.num_requests), ("c1", "c8")
        contestants = [
            Contestant(results.BATON, (*every, "prefix"), baton(results.BATON, model, num_threads=2)),
            self._peer(results.VLLM, every, lambda row: peers.vllm(row, model, "0-1")),
            self._peer(results.VLLM_256, every, lambda row: peers.vllm(row, model, "0-1", *chunks)),
            self._peer(results.SERVE, two, lambda row: peers.transformers_serve(row, model, 2)),
        ]
        offline = [
            _offline(results.GENERATE, f"c{c}", "generate", model, USUAL, c, c)
            for c in self._sizes.num_requests
        ]
        self._take_turns(contestants, offline)

    def disaggregated(self) -> None:
        model, peers = self._model("qwen-0.5b"), self._peers
        chunks = ("--max-num-batched-tokens", "256")
        both, long = ("c1", "c8", "long"), ("long",)
        pair = baton(results.BATON_PAIR, model, prefill=1, num_threads=1)
        replicas = baton(results.BATON_REPLICAS, model, num_threads=1, replicas=2)
        contestants = [
            Contestant(results.BATON_PAIR, both, pair),
            Contestant(results.BATON_REPLICAS, both, replicas),
            Contestant(results.BATON_256, long, baton(results.BATON_256, model, *chunks, num_threads=2)),
            self._peer(results.VLLM_1, both, lambda row: peers.vllm(row, model, "0")),
            self._peer(results.VLLM_PAIR_QUIET, both, lambda row: peers.vllm_pair(row, model, as_shipped=False)),
        ]  # fmt: skip
        self._take_turns(contestants, [])

    def shipped(self) -> None:
        """A group of its own, because with the one above the memory of a small machine would not do."""
        model, peers = self._model("qwen-0.5b"), self._peers
        pair = self._peer(
            results.VLLM_PAIR,
            ("c1", "c8", "long"),
            lambda row: peers.vllm_pair(row, model, as_shipped=True),
        )
        self._take_turns([pair], [])

    # --- how a group is run ---

    def _take_turns(self, contestants: list[Contestant], offline: list[Offline]) -> None:
        wanted = [each for each in contestants if self._is_wanted(each.row)]
        phases = {each.row: each.phases for each in wanted}

        def missed(row: str, why: str) -> None:
            for phase in phases[row]:
                self.results.miss(row, phase, why)

        for each in wanted:
            if each.spec is None:
                missed(each.row, NOT_INSTALLED)
        specs = [each.spec for each in wanted if each.spec is not None]
        with all_running(specs, self._log_dir, self.say, lambda spec, why: missed(spec.name, why)) as servers:
            for server in servers:
                with contextlib.suppress(Failed, RuntimeError), awake(server):  # said when it is measured
                    loads.throughput(server, USUAL, 2, 2, seed=-1)  # first touch of everything
            for number in range(self._sizes.num_rounds):
                for server in servers:
                    self._turn(server, phases[server.spec.name], number)
                for each in offline:
                    if self._is_wanted(each.row):
                        self._measure_offline(each, seed=number)

    def _turn(self, server: Server, phases: tuple[str, ...], seed: int) -> None:
        """What fails is said and left out; the others go on."""
        for phase in phases:
            try:
                with awake(server):
                    sample = self._phases[phase](server, seed)
            except (Failed, RuntimeError) as error:
                self.say(f"round {seed + 1}  {server.spec.name}, {phase}: {error}")
                self.results.miss(server.spec.name, phase, str(error))
            else:
                self._note(server.spec.name, phase, seed, sample)

    def _measure_offline(self, each: Offline, seed: int) -> None:
        argv = [sys.executable, str(PARTS / each.argv[0]), *each.argv[1:], "--seed", str(seed)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            self.results.miss(each.row, each.phase, (done.stderr.strip().splitlines() or ["it ended"])[-1])
            return
        self._note(each.row, each.phase, seed, json.loads(done.stdout))

    def _note(self, row: str, phase: str, seed: int, sample: Sample) -> None:
        self.results.add(row, phase, sample)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in sample.items())
        self.say(f"round {seed + 1}  {row}, {phase}: {shown}")

    def _throughput(
        self, lengths: Lengths, concurrency: int, num_requests: int
    ) -> Callable[[Server, int], Sample]:
        # A seed of its own for each, so that no prompt is sent twice.
        return lambda server, seed: loads.throughput(
            server, lengths, concurrency, num_requests, 1000 * (seed + 1) + concurrency
        )

    def _peer(self, row: str, phases: tuple[str, ...], spec: Callable[[str], Spec]) -> Contestant:
        return Contestant(row, phases, spec(row) if self._peers.installed else None)

    def _is_wanted(self, row: str) -> bool:
        return not any(text in row for text in self._without)

    def _model(self, shape: str) -> Path:
        directory = self._models / shape
        if not (directory / "tokenizer.json").is_file():
            self.say(f"making {directory}")
            script = ROOT / "scripts" / "make_bench_model.py"
            command = [sys.executable, str(script), "--shape", shape, "--out", str(directory)]
            subprocess.run(command, check=True, stdout=sys.stderr)
        return directory


def _offline(
    row: str,
    phase: str,
    engine: str,
    model: Path,
    lengths: Lengths,
    batch: int,
    num_requests: int,
    num_threads: int = 2,
) -> Offline:
    numbers = {"threads": num_threads, "batch": batch, "requests": num_requests, **lengths._asdict()}
    flags = [part for name, number in numbers.items() for part in (f"--{name}", str(number))]
    return Offline(row, phase, ("offline.py", engine, str(model), *flags))


# --- the report ---


def conditions(peers: Peers, load_before: float, sizes: Sizes) -> dict[str, Any]:
    names = ("torch", "transformers")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "rounds": sizes.num_rounds,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average_before": round(load_before, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("baton-llm", *names)},
        "peers": peers.versions if peers.installed else None,
        "preloaded": [Path(path).name for path in peers.preloaded] if peers.installed else None,
    }


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def report(found: Results, where: dict[str, Any]) -> str:
    versions = where["versions"] | {f"peer's {name}": v for name, v in (where["peers"] or {}).items()}
    lines = [
        "# The engine beside its peers",
        "",
        f"`python benchmarks/bench_engine.py {' '.join(sys.argv[1:])}`, {where['date']}, commit {where['commit']}.",
        f"{where['rounds']} rounds, {where['cores']} cores of {where['cpu']}, load average "
        f"{where['load_average_before']} before and {where['load_average_after']} after.",
        "Python " + where["python"] + ", " + ", ".join(f"{name} {v}" for name, v in versions.items()) + ".",
        "Cells are medians (least-greatest); what is measured and how is said at the top of the script.",
        "",
        "## Goals",
        "",
        goal_table(found),
        "",
        "## Measurements",
        *tables(found),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = _options()
    if options.make_peer_env is not None:
        make_peer_env(options.make_peer_env)
        return
    sizes = QUICK if options.quick else Sizes(num_rounds=options.rounds)
    log_dir = Path(tempfile.mkdtemp(prefix="bench-engine-"))
    peers, load_before = Peers(options.peers), os.getloadavg()[0]
    if peers.installed and not peers.is_current:
        sys.exit(f"{options.peers} is an older one: run --make-peer-env {options.peers} again")
    bench = Bench(sizes, options.models, peers, options.without, log_dir)
    bench.say(f"logs of the servers in {log_dir}, load average {load_before:.2f}")
    for group in options.only:
        bench.say(f"--- {group}")
        getattr(bench, group)()
    where = conditions(peers, load_before, sizes)
    text = report(bench.results, where)
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    samples = [
        {"row": row, "phase": phase, "samples": s} for (row, phase), s in bench.results.samples.items()
    ]
    goals = [verdict.json for verdict in verdicts(bench.results)]
    print(json.dumps({"conditions": where, "goals": goals, "results": samples}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make-peer-env", type=Path, metavar="DIR")
    parser.add_argument("--peers", type=Path, metavar="DIR", default=Path("no-peers"))
    parser.add_argument(
        "--models", type=Path, metavar="DIR", default=DEFAULT_MODELS, help="made where missing"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    parser.add_argument("--rounds", type=int, default=Sizes.num_rounds)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--without", action="append", default=[], metavar="TEXT")
    return parser.parse_args()


if __name__ == "__main__":
    main()
