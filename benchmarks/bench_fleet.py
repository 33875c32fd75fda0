"""Latency and throughput of a fleet of processes on this machine, as its users see them.

    python benchmarks/bench_fleet.py [--transports tcp ucx] [--concurrency 1 8 32] [--num-requests 200]
                                     [--workload LOADTEST_FLAGS] [-- UP_FLAGS]

Starts `baton up` once per transport and runs `baton loadtest` at each concurrency against it. Client and servers
share the machine's cores: the figures are comparable with each other, not with a machine of its own for each.
Prints loadtest's tables; the last line is one JSON object, transport -> concurrency -> loadtest's own JSON line.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from baton.transfer.choose import available

SERVING = re.compile(r"serving on (\S+) until")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transports", nargs="+", default=sorted(available()))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--num-requests", type=int, default=200)
    parser.add_argument("--workload", default="", help='flags of loadtest, such as "--prompt-kind random"')
    parser.add_argument("up_flags", nargs="*", help="behind --: passed on to `baton up`")
    args = parser.parse_args()
    results: dict[str, dict[int, Any]] = {}
    for transport in args.transports:
        with fleet("--transport", transport, *args.up_flags) as base_url:
            results[transport] = {
                concurrency: load(base_url, transport, concurrency, args.num_requests, args.workload.split())
                for concurrency in args.concurrency
            }
    print(json.dumps(results))


@contextmanager
def fleet(*flags: str) -> Iterator[str]:
    """A running fleet's base URL."""
    command = [sys.executable, "-m", "baton_cli", "up", "--port", "0", "--log-level", "warning", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            found = next((match for line in process.stdout if (match := SERVING.search(line))), None)
            if found is None:
                raise SystemExit(process.wait())
            # What it says later must not fill the pipe and stop it.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield found[1]
        finally:
            process.terminate()


def load(base_url: str, transport: str, concurrency: int, num_requests: int, workload: list[str]) -> Any:
    print(f"\n=== {transport}, concurrency {concurrency}", flush=True)
    # A seed of its own each, or the later runs would find the earlier one's prompts in the prefix cache.
    flags = ["--concurrency", concurrency, "--num-requests", num_requests, "--warmup", concurrency]
    flags += ["--seed", 1000 + concurrency, *workload]
    command = [sys.executable, "-m", "baton_cli", "loadtest", "--base-url", base_url, *map(str, flags)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *table, last = done.stdout.splitlines()
    print("\n".join(table), flush=True)
    return json.loads(last)


if __name__ == "__main__":
    main()
