"""What the compiler makes of the kernels for sm_90a: no spills, room in shared memory, wide loads, tensor cores.

No GPU is needed. `python tests/kernels/compile_gate.py` prints the whole table.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

MAX_SHARED_BYTES = 227 * 1024
Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Compiled in a process of its own: in this one Triton interprets."""
    gate = Path(__file__).with_name("compile_gate.py")
    built = subprocess.run([sys.executable, gate, "--json"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    found: list[Row] = json.loads(built.stdout)
    return found


def is_attention(row: Row) -> bool:
    return row["kernel"] in ("_split_kernel", "_prefill_kernel")


def names(rows: list[Row]) -> list[str]:
    return [f"{row['case']}:{row['kernel']}" for row in rows]


def test_every_kernel_was_built(rows: list[Row]) -> None:
    kernels = {row["kernel"] for row in rows}
    assert len(kernels) == 9 and len(rows) >= 32, sorted(kernels)


def test_nothing_spills_or_outgrows_a_multiprocessor(rows: list[Row]) -> None:
    bad = [row for row in rows if row["spill_bytes"] or row["shared_bytes"] > MAX_SHARED_BYTES]
    assert not names(bad)
    assert not names([row for row in rows if {"LDL", "STL"} & row["counts"].keys()])


def test_every_kernel_moves_16_bytes_at_a_time(rows: list[Row]) -> None:
    narrow = [row for row in rows if not {"LDG.128", "LDGSTS.128"} & row["counts"].keys()]
    assert not names(narrow)


def test_all_copies_of_k_and_v_to_shared_memory_are_wide(rows: list[Row]) -> None:
    for row in filter(is_attention, rows):
        assert row["counts"]["LDGSTS"] == row["counts"]["LDGSTS.128"], row["case"]


def test_attention_runs_on_tensor_cores(rows: list[Row]) -> None:
    """Decoding has 16 rows, too few for a warp group's instruction; at full precision there are none."""
    for row in filter(is_attention, rows):
        if "fp32" not in row["case"]:
            wanted = "HMMA" if row["kernel"] == "_split_kernel" else "HGMMA"
            assert row["counts"].get(wanted), row["case"]


def test_decoding_has_two_buffers_for_k_and_v(rows: list[Row]) -> None:
    """32 KiB are one tile of K and V. With a single buffer the loads would wait for the arithmetic."""
    (row,) = (
        r for r in rows if r["case"] == "decode-H32/8-D128/128-P64-bf16" and r["kernel"] == "_split_kernel"
    )
    assert row["shared_bytes"] >= 2 * 32 * 1024
