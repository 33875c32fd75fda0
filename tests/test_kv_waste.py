"""The figure that the documents give can be had at any time: it counts slots, on a virtual clock."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "bench_kv_waste.py"


def test_blocks_of_sixteen_waste_less_than_two_percent_of_a_mixed_load() -> None:
    command = [sys.executable, str(BENCHMARK), "--block-size", "16", "--requests", "300"]
    lines = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert lines[0] == lines[1], "the same on every run"
    [result] = json.loads(lines[0].splitlines()[-1])["results"]
    assert 0 < result["waste_mean"] < 0.02 and result["waste_max"] < 0.02
    assert result["hit_rate"] > 0.1 and result["pool_used_mean"] > 0.4
