"""`baton loadtest`: reads the flags, runs the load, shows the report. The last line of stdout is JSON.

Exit status: 0 when at least one measured request succeeded, 1 when none did, 2 for a wrong flag or a server
that does not answer, 130 after Ctrl-C (what was measured until then is still reported).
"""

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from baton.clock import SystemClock
from baton.errors import ConfigError
from baton_loadtest.client import Endpoint, OpenAIClient, RequestOptions, ServerInfo, ask_server
from baton_loadtest.lengths import parse_lengths
from baton_loadtest.metrics import Slo, measure, without_warmup
from baton_loadtest.page import page
from baton_loadtest.record import RequestRecord
from baton_loadtest.report import ClientCost, MachineState, Report, render, write_records
from baton_loadtest.runner import Extent, Runner
from baton_loadtest.workload import Arrival, PromptKind, Workload

if sys.platform != "win32":
    import uvloop

_APIS = ("auto", "chat", "completions")
_DEFAULT_CONCURRENCY = 8
_DEFAULT_NUM_REQUESTS = 100
_PLAIN_PROGRESS_S = 5.0
_PLAIN_WIDTH = 110  # of the table in a file or a pipe
# (prompt lengths, output lengths) where the user gave none. Demo answers are two words and an end.
_DEFAULT_LENGTHS = {PromptKind.DEMO: ("uniform:4-40", "fixed:16")}
_OTHER_LENGTHS = ("uniform:64-256", "fixed:64")
_FULL_LENGTH_KINDS = (PromptKind.WORDS, PromptKind.RANDOM, PromptKind.SHARED_PREFIX)


def loadtest(
    base_url: Annotated[str, typer.Option(help="Any OpenAI-compatible server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that the server lists.")] = None,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests per second.")] = None,
    arrival: Annotated[Arrival, typer.Option(help="Of an open loop.")] = Arrival.POISSON,
    concurrency: Annotated[int | None, typer.Option(help="Closed loop: number of users (default 8).")] = None,
    num_requests: Annotated[
        int | None, typer.Option(help="To measure (default 100, without --duration).")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds in which requests are sent.")] = None,
    warmup: Annotated[int, typer.Option(help="Requests sent before, counted nowhere.")] = 0,
    prompt_kind: Annotated[
        PromptKind | None, typer.Option(help="Default: demo, which checks answers.")
    ] = None,
    prompt_len: Annotated[
        str | None,
        typer.Option(help="128, uniform:16-256, lognormal:mean=200,sigma=0.8[,min=,max=], mix:0.8*..+0.2*.."),
    ] = None,
    output_len: Annotated[str | None, typer.Option(help="max_tokens, in the same forms.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Random token ids are below this.")] = None,
    prefix_len: Annotated[int, typer.Option(help="Of shared-prefix.")] = 256,
    num_groups: Annotated[int, typer.Option(help="Of shared-prefix.")] = 4,
    prompts_file: Annotated[
        Path | None, typer.Option(help='JSONL: {"prompt": .., "max_tokens": .., "expected": ..}')
    ] = None,
    api: Annotated[str, typer.Option(help="auto, chat or completions.")] = "auto",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[
        bool | None,
        typer.Option(help="Answers of full length. Default: for generated prompts other than demo."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="The same seed sends the same prompts: cached the second time.")
    ] = 0,
    slo: Annotated[str, typer.Option(help="Goodput objectives, as in ttft=0.5,itl=50ms,tpot=..,e2e=..")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 120.0,
    max_connections: Annotated[int, typer.Option(help="Of an open loop; more requests wait.")] = 512,
    api_key: Annotated[str | None, typer.Option(envvar="BATON_API_KEY", show_envvar=True)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for records.jsonl, report.json and report.html.")
    ] = None,
) -> None:
    """Send a load to a server and report latencies, throughput and goodput; the last line is JSON."""
    try:
        kind = _kind(prompt_kind, prompts_file)
        default_prompt_len, default_output_len = _DEFAULT_LENGTHS.get(kind, _OTHER_LENGTHS)
        workload = Workload(
            seed=seed,
            rate=rate,
            arrival=arrival,
            concurrency=_DEFAULT_CONCURRENCY if rate is None and concurrency is None else concurrency,
            prompt_kind=kind,
            prompt_len=parse_lengths(prompt_len or default_prompt_len),
            output_len=parse_lengths(output_len or default_output_len),
            vocab_size=vocab_size,
            prefix_len=prefix_len,
            num_groups=num_groups,
            prompts_file=prompts_file,
        )
        plan = Plan(
            endpoint=Endpoint.parse(base_url),
            model=model,
            workload=workload,
            extent=_extent(num_requests, duration, warmup),
            slo=Slo.parse(slo),
            api=api,
            temperature=temperature,
            ignore_eos=kind in _FULL_LENGTH_KINDS if ignore_eos is None else ignore_eos,
            timeout_s=timeout,
            max_connections=workload.concurrency or max_connections,
            api_key=api_key,
            out=out,
        )
        report = plan.execute()
    except ConfigError as error:
        typer.echo(f"loadtest: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(report.json_line())
    if report.interrupted:
        raise typer.Exit(130)
    raise typer.Exit(0 if report.metrics.num_ok else 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """A load test with all its settings; `execute` does it."""

    endpoint: Endpoint
    model: str | None
    workload: Workload
    extent: Extent
    slo: Slo
    api: str
    temperature: float
    ignore_eos: bool
    timeout_s: float
    max_connections: int
    api_key: str | None = field(repr=False)
    out: Path | None

    def __post_init__(self) -> None:
        if self.api not in _APIS:
            raise ConfigError(f"unknown API {self.api!r}; known: {', '.join(_APIS)}")
        if self.temperature < 0:
            raise ConfigError(f"the temperature must be at least 0, got {self.temperature:g}")
        if self.timeout_s <= 0 or self.max_connections < 1:
            raise ConfigError("the timeout must be greater than 0 and there must be at least 1 connection")

    def execute(self) -> Report:
        """Runs the load with a progress bar on stderr, prints the table on stdout, writes the files. Raises
        ConfigError when the server does not answer or the output directory cannot be written."""
        next(self.workload.requests())  # an unreadable prompts file is told before anything starts
        out = None if self.out is None else _made(self.out)
        server = ask_server(self.endpoint, self.api_key)
        model = self.model or _first_model(server)
        records: list[RequestRecord] = []
        before = MachineState.now()
        interrupted, usage = self._run(model, records)
        after = MachineState.now()
        report = Report(
            regime=self.workload.regime,
            parameters=self._parameters(model),
            server={"models": server.models, "health": server.health},
            metrics=measure(records, num_warmup=self.extent.num_warmup, slo=self.slo),
            cost=ClientCost.between(
                before, after, max_in_flight=usage.max_in_flight, num_connections_opened=usage.num_opened
            ),
            interrupted=interrupted,
        )
        measured = without_warmup(records, self.extent.num_warmup)
        Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH).print(render(report, measured))
        if out is not None:
            write_records(records, out / "records.jsonl")
            (out / "report.json").write_text(report.json_line() + "\n")
            (out / "report.html").write_text(page(report, measured))
        return report

    def _run(self, model: str, records: list[RequestRecord]) -> tuple[bool, "_Usage"]:
        usage = _Usage()
        with _progress(self.extent) as advance:

            def on_record(record: RequestRecord) -> None:
                records.append(record)
                advance(record)

            try:
                _run_fast(self._send_all(model, on_record, usage))
            except KeyboardInterrupt:
                return True, usage
        return False, usage

    async def _send_all(
        self, model: str, on_record: Callable[[RequestRecord], None], usage: "_Usage"
    ) -> None:
        clock = SystemClock()
        options = RequestOptions(model, self.api, self.temperature, self.ignore_eos, self.workload.seed)
        client = OpenAIClient(
            self.endpoint,
            options,
            clock,
            timeout_s=self.timeout_s,
            max_connections=self.max_connections,
            api_key=self.api_key,
        )
        runner = Runner(client, clock, on_record)
        try:
            async with client:
                await runner.run(self.workload, self.extent)
        finally:
            usage.max_in_flight, usage.num_opened = runner.max_in_flight, client.num_opened

    def _parameters(self, model: str) -> dict[str, Any]:
        workload, extent = self.workload, self.extent
        return {
            "base_url": self.endpoint.base_url,
            "model": model,
            "rate": workload.rate,
            "arrival": None if workload.rate is None else str(workload.arrival),
            "concurrency": workload.concurrency,
            "num_requests": extent.num_requests,
            "duration_s": extent.duration_s,
            "warmup": extent.num_warmup,
            "prompt_kind": str(workload.prompt_kind),
            "prompt_len": str(workload.prompt_len),
            "prompt_len_mean": workload.prompt_len.mean,
            "output_len": str(workload.output_len),
            "output_len_mean": workload.output_len.mean,
            "vocab_size": workload.vocab_size,
            "prefix_len": workload.prefix_len if workload.prompt_kind is PromptKind.SHARED_PREFIX else None,
            "num_groups": workload.num_groups if workload.prompt_kind is PromptKind.SHARED_PREFIX else None,
            "prompts_file": None if workload.prompts_file is None else str(workload.prompts_file),
            "api": self.api,
            "temperature": self.temperature,
            "ignore_eos": self.ignore_eos,
            "seed": workload.seed,
            "slo": str(self.slo),
            "timeout_s": self.timeout_s,
            "max_connections": self.max_connections,
        }


@dataclass(slots=True)
class _Usage:
    max_in_flight: int = 0
    num_opened: int = 0


def _run_fast(main: Coroutine[Any, Any, None]) -> None:
    loop_factory = asyncio.new_event_loop if sys.platform == "win32" else uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main)


def _kind(asked: PromptKind | None, prompts_file: Path | None) -> PromptKind:
    if prompts_file is None:
        return asked or PromptKind.DEMO
    if asked not in (None, PromptKind.FILE):
        raise ConfigError(f"prompts come from {prompts_file} or are made ({asked}), not both")
    return PromptKind.FILE


def _extent(num_requests: int | None, duration: float | None, warmup: int) -> Extent:
    if num_requests is None and duration is None:
        num_requests = _DEFAULT_NUM_REQUESTS
    if num_requests is not None and num_requests < 1:
        raise ConfigError(f"the number of requests must be at least 1, got {num_requests}")
    if duration is not None and not duration > 0:
        raise ConfigError(f"the duration must be greater than 0, got {duration:g}")
    if warmup < 0:
        raise ConfigError(f"the number of warm-up requests must be at least 0, got {warmup}")
    return Extent(num_requests, duration, warmup)


def _first_model(server: ServerInfo) -> str:
    if not server.models:
        raise ConfigError("the server lists no model; name one with --model")
    return server.models[0]


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {directory}: {error.strerror}") from None
    return directory


@contextmanager
def _progress(extent: Extent) -> Iterator[Callable[[RequestRecord], None]]:
    """Takes each record. On stderr, as stdout is for the report: a bar on a terminal, else plain lines."""
    console = Console(stderr=True)
    total = None if extent.num_requests is None else extent.num_warmup + extent.num_requests
    if not console.is_terminal:
        yield _PlainProgress(console, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Few redraws: they share the event loop's core with the measurement.
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("requests", total=total)
        num_failed = 0

        def advance(record: RequestRecord) -> None:
            nonlocal num_failed
            num_failed += not record.ok
            bar.update(
                task, advance=1, description=f"requests ({num_failed} failed)" if num_failed else "requests"
            )

        yield advance


@dataclass(slots=True)
class _PlainProgress:
    console: Console
    total: int | None
    num_done: int = 0
    num_failed: int = 0
    next_s: float = field(default_factory=lambda: time.monotonic() + _PLAIN_PROGRESS_S)

    def __call__(self, record: RequestRecord) -> None:
        self.num_done += 1
        self.num_failed += not record.ok
        if time.monotonic() < self.next_s:
            return
        self.next_s = time.monotonic() + _PLAIN_PROGRESS_S
        of_all = "" if self.total is None else f" of {self.total}"
        self.console.print(f"{self.num_done}{of_all} requests, {self.num_failed} failed", highlight=False)
