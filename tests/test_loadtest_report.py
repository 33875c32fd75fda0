"""What comes out: the command end to end against a scripted server, its last line, files and complaints."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from loadtest_server import (
    DONE,
    END,
    Received,
    Script,
    Step,
    chat_event,
    chunk,
    forever,
    good_answer,
    head,
    pause,
    plain,
    serving,
    usage_event,
)
from typer.testing import CliRunner, Result

from baton_loadtest.cli import loadtest
from baton_loadtest.metrics import Slo, measure
from baton_loadtest.page import page
from baton_loadtest.record import ErrorKind, RequestRecord
from baton_loadtest.report import ClientCost, Report, histogram

MODELS = plain(200, b'{"data": [{"id": "demo"}]}')
HEALTH = plain(200, b'{"status": "ok", "transport": "tcp"}')


def _server(answer: Script) -> Script:
    def script(received: Received) -> Sequence[Step]:
        if received.method == "GET":
            return MODELS if received.path == "/v1/models" else HEALTH
        return answer(received)

    return script


def _recall(received: Received) -> list[Step]:
    """As the demo model answers, but wrong about everybody with a or b."""
    listed, _, question = received.body["messages"][0]["content"].rpartition(". ")
    towns = dict(pair.split() for pair in listed.split(", "))
    name = question.rstrip("?")
    words = [name, "nowhere" if name < "c" else towns[name]]
    events = [chat_event({"role": "assistant", "content": ""}), chat_event({"content": words[0]})]
    events += [chat_event({"content": " " + words[1]}), chat_event({}, "stop"), usage_event(90, 3)]
    return [Step(head()), *(Step(chunk(event), pause(0.002)) for event in events), Step(chunk(DONE) + END)]


def _run(*flags: object) -> Result:
    app = typer.Typer()
    app.command()(loadtest)
    return CliRunner().invoke(app, [str(flag) for flag in flags], env={"COLUMNS": "120"})


def _last_line(result: Result) -> dict[str, object]:
    return json.loads(result.stdout.splitlines()[-1])


# The command


def test_a_closed_loop_run_from_flags_to_files(tmp_path: Path) -> None:
    flags = ["--concurrency", 4, "--num-requests", 40, "--warmup", 8, "--seed", 5, "--slo", "ttft=20,itl=15s"]
    with serving(_server(_recall)) as server:
        result = _run("--base-url", server.url, *flags, "--out", tmp_path / "new", "--api-key", "sk-secret")
        sent = [received for received in server.received if received.method == "POST"]
        assert server.num_opened - 1 <= 4  # one more for the questions before
    assert result.exit_code == 0, result.output

    line = _last_line(result)
    metrics = line["metrics"]
    assert (metrics["num_requests"], metrics["num_ok"], metrics["num_warmup"]) == (40, 40, 8)
    assert metrics["num_checked"] == 40
    assert 0 < metrics["num_wrong"] < 40
    assert metrics["goodput"]["fraction"] == pytest.approx((40 - metrics["num_wrong"]) / 40)
    assert metrics["num_output_tokens"] == 120
    assert metrics["ttft_s"]["num"] == 40 and metrics["itl_s"]["num"] == 40
    assert f"{metrics['num_wrong']} of 40 answers are wrong" in line["warnings"]

    parameters = line["parameters"]
    assert (parameters["model"], parameters["seed"], parameters["concurrency"]) == ("demo", 5, 4)
    assert (parameters["warmup"], parameters["slo"], parameters["prompt_len"]) == (
        8,
        "ttft=20,itl=15",
        "uniform:4-40",
    )
    assert line["regime"].startswith("closed loop, 4 users; demo recall prompts")
    assert line["server"]["health"]["transport"] == "tcp"
    assert line["machine"]["cpu_count"] == os.cpu_count()
    assert line["client"]["cpu_s"] > 0
    assert line["client"]["max_in_flight"] == 4
    assert {"load_average_before", "load_average_after"} <= line["client"].keys()

    assert len(sent) == 48
    assert {received.headers["authorization"] for received in sent} == {"Bearer sk-secret"}
    assert "ignore_eos" not in sent[0].body

    records = [json.loads(text) for text in (tmp_path / "new/records.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(48))
    assert all(record["sent_s"] < record["token_s"][0] < record["done_s"] for record in records)
    assert json.loads((tmp_path / "new/report.json").read_text()) == line
    assert "TTFT" in result.stdout and "goodput" in result.stdout
    for text in (result.output, *(path.read_text() for path in (tmp_path / "new").iterdir())):
        assert "sk-secret" not in text


def test_an_open_loop_run_with_failures(tmp_path: Path) -> None:
    count = iter(range(1000))

    def answer(received: Received) -> list[Step]:
        return (
            plain(503, b'{"error": {"message": "no worker"}}')
            if next(count) % 4 == 0
            else good_answer("a", "b")
        )

    flags = [
        "--rate",
        400,
        "--num-requests",
        60,
        "--prompt-kind",
        "random",
        "--vocab-size",
        99,
        "--prompt-len",
        5,
    ]
    with serving(_server(answer)) as server:
        result = _run("--base-url", server.url + "/v1", *flags, "--output-len", 2)
        body = server.received[-1].body
    assert result.exit_code == 0, result.output
    assert len(body["prompt"]) == 5
    assert (body["max_tokens"], body["ignore_eos"]) == (2, True)
    metrics = _last_line(result)["metrics"]
    assert (metrics["num_ok"], metrics["num_failed"], metrics["errors"]) == (45, 15, {"http 503": 15})
    assert "15 x http 503" in result.stdout
    assert "http 503: no worker" in result.stdout


def test_a_run_by_duration(tmp_path: Path) -> None:
    flags = ["--duration", 0.5, "--concurrency", 2, "--prompt-kind", "words", "--prompt-len", 3]
    with serving(_server(lambda received: [Step(wait=pause(0.01)), *good_answer("a")])) as server:
        result = _run("--base-url", server.url, *flags)
    assert result.exit_code == 0, result.output
    line = _last_line(result)
    assert line["parameters"]["num_requests"] is None
    assert line["parameters"]["duration_s"] == 0.5
    assert line["metrics"]["num_ok"] >= 2


def test_no_success_is_exit_status_1() -> None:
    with serving(_server(lambda received: plain(500, b"broken"))) as server:
        result = _run("--base-url", server.url, "--num-requests", 3)
    assert result.exit_code == 1
    assert _last_line(result)["metrics"]["num_failed"] == 3


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rate", "0"], "rate"),
        (["--rate", "5", "--concurrency", "2"], "rate (open loop) or a concurrency"),
        (["--concurrency", "0"], "concurrency"),
        (["--num-requests", "0"], "number of requests"),
        (["--duration", "-1"], "duration"),
        (["--warmup", "-1"], "warm-up"),
        (["--prompt-len", "uniform:9"], "uniform:9"),
        (["--prompt-len", "fixed:4000"], "pairs"),
        (["--output-len", "gauss:9"], "gauss"),
        (["--prompt-kind", "random"], "vocabulary"),
        (["--prompt-kind", "words", "--prompts-file", "x.jsonl"], "not both"),
        (["--prompts-file", "/nowhere/x.jsonl"], "/nowhere/x.jsonl"),
        (["--slo", "speed=3"], "speed=3"),
        (["--api", "responses"], "responses"),
        (["--temperature", "-1"], "temperature"),
        (["--timeout", "0"], "timeout"),
        (["--base-url", "example"], "base URL"),
        (["--base-url", "http://127.0.0.1:1"], "no server at http://127.0.0.1:1/v1"),
        (["--out", "/dev/null/x"], "/dev/null/x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_flag_is_one_clear_line(flags: list[str], complaint: str) -> None:
    result = _run(*flags)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("loadtest: ")
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_interrupted_run_reports_what_it_has() -> None:
    """Ctrl-C on a real process: quick answers are reported, those in flight are cancelled, no traceback."""
    count = iter(range(1000))

    def answer(received: Received) -> list[Step]:
        return good_answer("a", "b") if next(count) < 5 else [Step(head()), Step(wait=forever)]

    code = "import typer; from baton_loadtest.cli import loadtest; typer.run(loadtest)"
    with serving(_server(answer)) as server:
        command = [sys.executable, "-W", "error", "-c", code, "--base-url", server.url, "--concurrency", "2"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            waiting = server.wait_until(lambda: sum(r.method == "POST" for r in server.received) == 7)
            server.call(waiting)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130, stderr
    line = json.loads(stdout.splitlines()[-1])
    assert line["interrupted"] is True
    assert line["metrics"]["num_requests"] == line["metrics"]["num_ok"] == 5
    assert "Traceback" not in stderr


# The report on its own


def _records(num: int) -> list[RequestRecord]:
    return [
        RequestRecord(
            index=index,
            planned_s=index * 0.1,
            sent_s=index * 0.1,
            done_s=index * 0.1 + 0.5,
            first_byte_s=index * 0.1 + 0.1,
            token_s=(index * 0.1 + 0.2, index * 0.1 + 0.3),
            finish_s=index * 0.1 + 0.4,
            status=200,
            error=ErrorKind.CUT if index % 10 == 3 else None,
            error_text="<b>& gone" if index % 10 == 3 else "",
            num_tokens=3,
            finish_reason="stop",
            text="<i>ada oslo</i>",
            expected="ada oslo" if index % 10 == 4 else None,
        )
        for index in range(num)
    ]


def _report(records: Sequence[RequestRecord], *, cpu_share: float = 0.1, kind: str = "words") -> Report:
    return Report(
        regime="closed loop, 1 user <script>alert(1)</script>",
        parameters={"model": "m", "base_url": "http://h/v1", "slo": "e2e=1", "prompt_kind": kind},
        server={},
        metrics=measure(records, slo=Slo(e2e=1)),
        cost=ClientCost(0.1, cpu_share, 0.5, 0.6, 1, 1),
    )


class _Balance(HTMLParser):
    VOID = frozenset({"meta", "line", "circle", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("num", [0, 1, 200, 12_000])
def test_the_page_is_whole_and_self_contained(num: int) -> None:
    records = _records(num)
    html = page(_report(records), records)
    balance = _Balance()
    balance.feed(html)
    assert balance.open == []
    assert balance.links == []
    assert "<script" not in html and "<b>" not in html and "<i>" not in html
    assert len(html) < 3_000_000

    drawings = [html[start : html.index("</svg>", start) + 6] for start in _positions(html, "<svg")]
    assert len(drawings) == (3 if num else 0)
    for drawing in drawings:
        for mark in ElementTree.fromstring(drawing).iter("circle"):
            assert 64 <= float(mark.attrib["cx"]) <= 640 and 0 <= float(mark.attrib["cy"]) <= 220
    assert html.count('class="dot red"') == num // 10 + (num % 10 > 3)


def _positions(text: str, part: str) -> list[int]:
    found, start = [], text.find(part)
    while start >= 0:
        found.append(start)
        start = text.find(part, start + 1)
    return found


def test_the_json_line_is_one_line_of_plain_json() -> None:
    line = _report(_records(50)).json_line()
    assert "\n" not in line
    assert json.loads(line, parse_constant=pytest.fail)["tool"] == "baton loadtest"


def test_a_busy_client_is_told() -> None:
    assert any("90% of a core" in warning for warning in _report(_records(20), cpu_share=0.9).warnings())
    assert not any("of a core" in warning for warning in _report(_records(20)).warnings())


def test_prompts_that_the_server_knew_before_are_told() -> None:
    cached = [replace(record, num_prompt_tokens=100, num_cached_tokens=94) for record in _records(20)]
    new = [replace(record, num_prompt_tokens=100, num_cached_tokens=3) for record in _records(20)]
    assert any("94% of the prompt tokens were cached" in warning for warning in _report(cached).warnings())
    assert not any("cached" in warning for warning in _report(new).warnings())
    assert not any("cached" in warning for warning in _report(cached, kind="shared-prefix").warnings())


def test_a_late_client_is_told() -> None:
    late = [replace(record, planned_s=record.sent_s - 0.05) for record in _records(20)]
    assert any("sent late (p99 50 ms)" in warning for warning in _report(late).warnings())


def test_a_histogram_shows_every_value() -> None:
    assert histogram([0.0, 1.0], num_bins=4) == "0.0 ms |█  █| 1000.0 ms"
    assert histogram([0.5, 0.5], num_bins=2) == "500.0 ms |█ | 500.0 ms"
    line = histogram([*[0.001] * 1000, 0.002], num_bins=3)
    assert line == "1.0 ms |█ ▁| 2.0 ms"
