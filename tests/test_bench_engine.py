"""What the engine benchmark says follows from what it measured; its figures are taken elsewhere."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_bench import results
from engine_bench.loads import FIRST_WORD, _gaps, text_of
from engine_bench.results import Results, goal_table, tables, verdicts
from engine_bench.servers import Process, Server, Spec
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton import LLM, SamplingParams
from baton_loadtest.record import RequestRecord

ROOT = Path(__file__).parent.parent
RATE = "output_tok_per_s"


def _verdict(found: Results, word: str) -> results.Verdict:
    [verdict] = [verdict for verdict in verdicts(found) if word in verdict.goal.text]
    return verdict


def _with_rates(ours: float, vllm: float, chunked: float) -> Results:
    found = Results()
    for row, rate in ((results.BATON, ours), (results.VLLM, vllm), (results.VLLM_256, chunked)):
        found.add(row, "c8", {RATE: rate})
    return found


def test_nothing_measured_is_no_verdict() -> None:
    assert {verdict.met for verdict in verdicts(Results())} == {None}
    assert goal_table(Results()).count("not measured") == len(results.GOALS)


def test_a_rate_has_to_reach_the_better_of_the_peers() -> None:
    assert _verdict(_with_rates(150, 132, 144), "concurrency 8: tok/s against the better vllm").met is True
    assert _verdict(_with_rates(140, 132, 144), "concurrency 8: tok/s against the better vllm").met is False


@pytest.mark.parametrize(("hit_s", "met"), [(0.2, True), (0.3, False)])
def test_a_time_has_to_stay_below(hit_s: float, met: bool) -> None:
    found = Results()
    found.add(results.BATON, "prefix", {"cold_ttft_s": 2.5, "hit_ttft_s": hit_s})
    verdict = _verdict(found, "prefix hit")
    assert verdict.met is met
    assert f"{hit_s * 1e3:.0f} / 2500 ms" in str(verdict)


def test_medians_decide_and_the_spread_is_shown() -> None:
    found = Results()
    for rate in (100.0, 10.0, 130.0):
        found.add(results.BATON, "c8", {RATE: rate})
    found.add(results.VLLM, "c8", {RATE: 99.0})
    assert _verdict(found, "concurrency 8: tok/s against the better vllm").met is True
    assert found.cell(results.BATON, "c8", RATE) == "100 (10-130)"


def test_what_is_missing_is_said() -> None:
    found = Results()
    found.miss(results.VLLM, "c8", "not installed: see there\nand more")
    text = "\n".join(tables(found))
    assert f"- {results.VLLM}, c8: not installed: see there" in text and "and more" not in text
    assert f"| {results.VLLM} | - " in text


def test_a_gap_counts_where_it_ends() -> None:
    record = RequestRecord(0, 0.0, 0.0, 9.0, token_s=(1.0, 2.0, 4.5, 5.0, 8.0))
    assert list(_gaps([record], (2.0, 5.0))) == [2.5, 0.5]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    script = ROOT / "scripts" / "make_bench_model.py"
    command = [sys.executable, script, "--shape", "tiny", "--out", directory]
    subprocess.run(command, check=True, capture_output=True)
    return directory


def test_the_models_are_what_every_engine_takes(tiny: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    assert 2e6 < model.num_parameters() < 10e6
    ids = [FIRST_WORD, FIRST_WORD + 700, *range(16_200, 16_384)]
    text = text_of(ids)
    assert tokenizer(text)["input_ids"] == ids, "the same prompt as text and as ids"
    assert tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == text
    with LLM(str(tiny), dtype="bfloat16", num_blocks=64) as llm:
        [output] = llm.generate(ids, SamplingParams(max_tokens=32, temperature=0))
    assert len(output.token_ids) == 32, "it never chooses its end token"
    assert len(output.text.split()) == 32, "every token is a word"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core leaves no choice")
def test_a_thread_that_a_server_bound_is_moved_and_one_that_is_free_stays(tmp_path: Path) -> None:
    free = sorted(os.sched_getaffinity(0))
    binds_itself = (
        "import os, threading; threading.Thread(target=threading.Event().wait).start(); "
        f"os.sched_setaffinity(0, {{{free[-1]}}}); print('bound', flush=True); threading.Event().wait()"
    )
    server = Server(
        Spec("peer", (Process((sys.executable, "-c", binds_itself), core=free[0]),), ()), tmp_path
    )
    try:
        [log] = tmp_path.iterdir()
        while "bound" not in log.read_text():
            time.sleep(0.01)
        server.bind()
        threads = [int(path.name) for path in Path(f"/proc/{server._processes[0].pid}/task").iterdir()]
        assert os.sched_getaffinity(server._processes[0].pid) == {free[0]}
        assert {tuple(sorted(os.sched_getaffinity(thread))) for thread in threads} <= {
            (free[0],),
            tuple(free),
        }
    finally:
        server.stop()


def test_code_stats_counts_every_line_once() -> None:
    script = ROOT / "scripts" / "code_stats.py"
    done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    counted = {row.split("|")[1].strip(): int(row.split("|")[3]) for row in done.stdout.splitlines() if "| " in row[:2]
               and row.split("|")[3].strip().isdigit()}  # fmt: skip
    files = [path for path in (ROOT / "common" / "baton").rglob("*.py") if "v1" not in path.parts]
    total = sum(len(path.read_text().splitlines()) for path in files)
    assert sum(lines for name, lines in counted.items() if name.startswith("common/baton")) == total
    assert "The longest functions there" in done.stdout


def test_the_step_cost_runs(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "engine_bench" / "step_cost.py"
    command = [sys.executable, script, "demo", "--sequences", "8", "--steps", "5"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    cost = json.loads(done.stdout)
    assert 0 < cost["tensors_cpu_s"] < cost["step_cpu_s"]


def test_the_structured_output_bench_runs(tiny: Path) -> None:
    script = ROOT / "benchmarks" / "bench_structured.py"
    command = [
        sys.executable,
        script,
        "--model",
        tiny,
        "--threads",
        "1",
        "--batch",
        "2",
        "--rounds",
        "1",
        "--steps",
        "3",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    cells = json.loads(done.stdout.splitlines()[-1])
    assert {cell["kind"]: cell["rounds"][0]["masks_s"] > 0 for cell in cells} == {
        "plain": False, "biased": False, "json": True
    }  # fmt: skip
    assert "| 1 | 2 | " in done.stdout
