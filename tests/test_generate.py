"""`baton generate`: every request of a file is answered once, whatever happens on the way."""

import fcntl
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.config import EngineConfig, GenerateConfig
from baton.demo_task import recall_prompt
from baton.errors import ConfigError
from baton_cli.batch_file import AnswerFile, RequestFile
from baton_cli.generate import Summary, generate, output_path

DEADLINE_S = 90.0
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def _request(custom_id: str, body: dict[str, Any], url: str = CHAT, **fields: Any) -> dict[str, Any]:
    body = {"model": "demo", "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **fields}


def _recalls(number: int, num_pairs: int = 8) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Requests, and the right answer by custom_id."""
    rng = random.Random(5)
    tasks = {f"r{i}": recall_prompt(rng, num_pairs) for i in range(number)}
    requests = [
        _request(custom_id, {"messages": [{"role": "user", "content": prompt}]})
        for custom_id, (prompt, _) in tasks.items()
    ]
    return requests, {custom_id: expected for custom_id, (_, expected) in tasks.items()}


def _write(path: Path, requests: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """custom_id -> response; every line whole, every custom_id once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    answers = {line["custom_id"]: line["response"] for line in lines}
    assert len(answers) == len(lines), "an answer is there twice"
    assert all(line["id"] and line["error"] is None for line in lines)
    return answers


def _texts(answers: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {
        custom_id: response["body"]["choices"][0]["message"]["content"].strip()
        for custom_id, response in answers.items()
    }


def _in_process(requests: Path, **engine: Any) -> tuple[Summary, dict[str, dict[str, Any]]]:
    config = GenerateConfig(engine=EngineConfig(**{"num_blocks": 512, **engine}))
    summary = generate(config, requests, output_path(requests))
    return summary, _read(output_path(requests))


def _start(requests: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "baton_cli", "generate", str(requests), "--num-blocks", "512", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _run(requests: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    process = _start(requests, *flags)
    out, err = process.communicate(timeout=DEADLINE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)


# --- answers ---


def test_every_request_is_answered_as_over_http(tmp_path: Path) -> None:
    requests, expected = _recalls(40)
    requests.append(
        _request("c", {"prompt": [2, 5], "max_tokens": 3, "ignore_eos": True, "logprobs": 1}, COMPLETIONS)
    )
    summary, answers = _in_process(_write(tmp_path / "batch.jsonl", requests))
    assert (summary.num_ok, summary.num_failed, summary.num_before, summary.all_ok) == (41, 0, 0, True)
    completion = answers.pop("c")
    assert completion["body"]["object"] == "text_completion"
    assert len(completion["body"]["choices"][0]["logprobs"]["tokens"]) == 3
    assert _texts(answers) == expected
    for response in (*answers.values(), completion):
        assert response["status_code"] == 200
        assert response["body"]["id"].endswith(response["request_id"])
    assert summary.num_output_tokens == 3 + sum(
        response["body"]["usage"]["completion_tokens"] for response in answers.values()
    )


def test_what_is_wrong_with_a_request_is_its_answer(tmp_path: Path) -> None:
    hello: dict[str, Any] = {"messages": [{"role": "user", "content": "repeat: tea"}]}
    wrong = {
        "best_of": _request("best_of", hello | {"best_of": 3}),
        "model": _request("model", hello | {"model": "gpt-4"}),
        "messages": _request("messages", {}),
        "stream": _request("stream", hello | {"stream": True}),
        "url": _request("url", hello, "/v1/embeddings"),
        "method": _request("method", hello) | {"method": "GET"},
        "body": _request("body", hello) | {"body": "text"},
        "extra": _request("extra", hello, extra=1),
        "prompt": _request("prompt", {"prompt": [1] * 5000}, COMPLETIONS),
    }
    right = _request("right", hello | {"stream": False})
    requests = _write(tmp_path / "batch.jsonl", [*wrong.values(), right])
    summary, answers = _in_process(requests)
    assert (summary.num_ok, summary.num_failed) == (1, len(wrong))
    assert _texts({"right": answers.pop("right")}) == {"right": "tea"}
    for param, response in answers.items():
        assert response["status_code"] == (404 if param == "model" else 400)
        error = response["body"]["error"]
        assert error["param"] == param and error["message"]
    again, _ = _in_process(requests)
    assert (again.num_before, again.num_failed_before, again.all_ok) == (10, 9, False)


def test_more_requests_than_the_worker_lets_wait(tmp_path: Path) -> None:
    requests, expected = _recalls(30)
    path = _write(tmp_path / "batch.jsonl", requests)
    summary, answers = _in_process(path, max_num_seqs=8, max_num_waiting=1)
    assert summary.num_failed == 0
    assert _texts(answers) == expected


# --- stopped and resumed ---


def test_killed_and_resumed_every_request_has_one_answer(tmp_path: Path) -> None:
    requests, expected = _recalls(400)
    path = _write(tmp_path / "batch.jsonl", requests)
    answers = output_path(path)
    process = _start(path, "--max-num-seqs", "2")
    _wait_for(lambda: answers.exists() and answers.read_bytes().count(b"\n") >= 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    num_before = answers.read_bytes().count(b"\n")
    assert num_before < len(requests), "it was killed too late to show anything"
    with answers.open("ab") as file:
        file.write(b'{"id": "batch_req_1", "custom_id": "r39')  # as if it was killed while it wrote

    done = _run(path)
    assert done.returncode == 0, done.stderr
    assert f"{len(requests) - num_before} answered, 0 failed" in done.stdout
    assert f"before: {num_before}, 0 of them failed" in done.stdout
    assert _texts(_read(answers)) == expected


def test_sigterm_ends_it_and_says_how_to_go_on(tmp_path: Path) -> None:
    requests, expected = _recalls(400)
    path = _write(tmp_path / "batch.jsonl", requests)
    answers = output_path(path)
    process = _start(path, "--max-num-seqs", "2")
    _wait_for(lambda: answers.exists() and answers.stat().st_size > 0)
    process.terminate()
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert err.splitlines()[-1] == (
        f"baton: stopped; what was answered is in {answers}, and the same command goes on from there"
    )
    texts = _texts(_read(answers))
    assert 0 < len(texts) < 400
    assert texts.items() <= expected.items()


# --- files ---


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ('{"custom_id": "a"}\n{"custom_id": ', "batch.jsonl:2: not JSON"),
        ('{"custom_id": "a"}\n\n[]\n', 'batch.jsonl:3: needs an object with a "custom_id", a text'),
        ('{"custom_id": 7}\n', 'batch.jsonl:1: needs an object with a "custom_id"'),
        ('{"custom_id": "a"}\n\n{"custom_id": "a"}\n', "batch.jsonl:3: custom_id 'a' is that of line 1"),
        ("\n", "holds no request"),
    ],
)  # fmt: skip
def test_a_file_whose_answers_could_not_be_attributed_is_refused(
    tmp_path: Path, lines: str, complaint: str
) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_text(lines)
    with pytest.raises(ConfigError, match="batch") as caught:
        generate(GenerateConfig(), path, output_path(path))
    assert complaint in caught.value.message
    assert not output_path(path).exists()


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = _run(tmp_path / "nothing.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"baton: cannot read {tmp_path}/nothing.jsonl: No such file or directory\n"


def test_the_answers_never_go_into_the_requests(tmp_path: Path) -> None:
    path = _write(tmp_path / "batch.jsonl", [_request("a", {})])
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="is the file with the requests"):
        generate(GenerateConfig(), path, path)
    assert path.read_bytes() == before


def test_an_output_that_is_something_else_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nand more")
    with pytest.raises(ConfigError, match=r"notes\.txt:1: not JSON"):
        AnswerFile(path)
    assert path.read_text() == "my notes\nand more"


def test_two_runs_cannot_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path), pytest.raises(ConfigError, match="another process writes"):
        AnswerFile(path)
    with AnswerFile(path), path.open("ab") as other, pytest.raises(OSError, match="unavailable"):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    AnswerFile(path).__exit__()


def test_a_last_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path) as answers:
        answers.append({"id": "1", "custom_id": "a", "response": {"status_code": 200}})
        answers.append({"id": "2", "custom_id": "b", "response": {"status_code": 400}})
    whole = path.read_bytes()
    for cut in range(1, len(whole) + 1):
        path.write_bytes(whole[:cut])
        with AnswerFile(path) as answers:
            num_whole = whole[:cut].count(b"\n")
            assert answers.answered == dict(list({"a": True, "b": False}.items())[:num_whole])
            answers.append({"id": "3", "custom_id": "c", "response": None})
        assert [json.loads(line)["custom_id"] for line in path.read_text().splitlines()][num_whole:] == ["c"]


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    answers = AnswerFile(tmp_path / "out.jsonl")
    answers._file.close()
    answers._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    with answers, pytest.raises(ConfigError, match=r"cannot write .*out\.jsonl: No space left on device"):
        answers.append({"id": "1", "custom_id": "a", "response": None})


def test_requests_are_read_again_and_not_kept(tmp_path: Path) -> None:
    requests = RequestFile(_write(tmp_path / "batch.jsonl", _recalls(3)[0]))
    assert list(requests.custom_ids) == ["r0", "r1", "r2"]
    assert [line["custom_id"] for line in requests] == [line["custom_id"] for line in requests]
