"""Which causal model types of the installed transformers Baton runs, found by running a small random model of each.

    python scripts/survey_models.py                  those that the table does not have yet for this transformers
    python scripts/survey_models.py --again          all of them
    python scripts/survey_models.py --types gpt2,opt --table /tmp/table.json

A type is ok when Baton's engine, with chunked prefill, mixed batches and a prefix hit, gives the tokens of
transformers' own generate() and its logits within 1e-3 of their standard deviation, and when one wrong KV block changes
the logits. The table is what the loader goes by. A type that crashes or takes too long ends only its own process.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from baton.errors import ConfigError
from baton.model.support import OK, TABLES, Survey, Verdict, read_survey, write_survey

CASE = Path(__file__).with_name("survey_case.py")


class Worker:
    """A process that runs cases, started again after one that ended it."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[str] | None = None

    def run(self, model_type: str) -> Verdict:
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(self._limit_s, process.kill)
        timer.start()
        try:
            process.stdin.write(model_type + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            in_time = timer.is_alive()
            timer.cancel()
        if line:
            return Verdict(**json.loads(line))
        status = process.wait()
        self._process = None
        reason = f"its process ended with status {status}" if in_time else f"more than {self._limit_s:.0f} s"
        return Verdict("failed", reason)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> "subprocess.Popen[str]":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(CASE)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(command, text=True, env=environment, stderr=subprocess.DEVNULL, **pipes)


def main() -> None:
    arguments = _arguments()
    version, known = transformers.__version__, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    types = arguments.types.split(",") if arguments.types else known
    unknown = sorted(set(types) - set(known))
    if unknown:
        sys.exit(f"transformers {version} has no causal model type {', '.join(unknown)}")
    done = {} if arguments.again and not arguments.types else _done(arguments.table, version)
    todo = [name for name in types if name not in done or arguments.types]
    worker = Worker(arguments.limit)
    try:
        for name in _with_bar(todo):
            done[name] = worker.run(name)
            write_survey(Survey(version, done), arguments.table)
    finally:
        worker.close()
    _print({name: done[name] for name in types})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", metavar="A,B", help="only these, also when the table has them")
    own = TABLES / f"{transformers.__version__}.json"
    parser.add_argument("--table", type=Path, default=own, help="default: the one that the loader reads")
    parser.add_argument("--again", action="store_true", help="also what the table has")
    parser.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="for one type; default 60")
    return parser.parse_args()


def _done(table: Path, version: str) -> dict[str, Verdict]:
    try:
        survey = read_survey(table)
    except ConfigError:
        return {}
    return dict(survey.types) if survey.transformers == version else {}


def _with_bar(names: list[str]) -> Any:
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            yield name
            progress.advance(task)


def _print(rows: dict[str, Verdict]) -> None:
    for name, row in sorted(rows.items(), key=lambda item: (item[1].verdict, item[0])):
        print(f"{row.verdict:8} {name:26} {row.reason}")
    counts = Counter(row.verdict for row in rows.values())
    print(
        f"{counts.pop(OK, 0)} of {len(rows)} ok",
        *(f"{n} {verdict}" for verdict, n in counts.items()),
        sep=", ",
    )


if __name__ == "__main__":
    main()
