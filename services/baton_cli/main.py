"""The `baton` command: reads flags, calls what does the work.

Only what `baton --help` needs is imported here; every command imports its own. Torch takes seconds and the
router's stack most of one, and neither is needed to print a page of help or to supervise other processes.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baton import __version__
from baton.config import GenerateConfig, ProbeConfig, RouterConfig, UpConfig, WorkerConfig
from baton.errors import BatonError, ConfigError
from baton.messages import Role
from baton_cli.flags import ADDRESS, ENGINE, INDEX, MODEL, TLS, ManyValuesCommand, overrides, settings_flags
from baton_cli.process import Main, SupervisorLink, complain, run

if TYPE_CHECKING:
    from baton.config import LogConfig

ROUTER_FLAGS = (
    *ADDRESS,
    "grpc_port",
    *MODEL,
    *INDEX,
    "workers",
    "max_num_requests",
    "api_keys_file",
    *TLS,
    "grpc_tls",
)
WORKER_FLAGS = (
    *ADDRESS,
    "advertise_host",
    "metrics_port",
    "health_port",
    "worker_id",
    *MODEL,
    *ENGINE,
    *INDEX,
    *TLS,
)
ANY_WORKER_FLAGS = ("roles", *WORKER_FLAGS)
GENERATE_FLAGS = (*MODEL, *(path for path in ENGINE if not path.startswith("transfer.")))
UP_FLAGS = (*ADDRESS, *MODEL, "prefill", "decode", *ENGINE, *INDEX, "api_keys_file", *TLS)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings in YAML or JSON; - is stdin."),
]
LogLevel = Annotated[str | None, typer.Option(metavar="debug|info|warning|error", help="Or BATON_LOG_LEVEL.")]
LogFormat = Annotated[str | None, typer.Option(metavar="auto|text|json", help="Or BATON_LOG_FORMAT.")]

app = typer.Typer(
    name="baton",
    help="Serves language models with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console script. One line on stderr for a mistake of the user's and exit code 2; 1 for the rest."""
    try:
        app()
    except BatonError as error:
        complain(error.message)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


@app.command("up", cls=ManyValuesCommand)
@settings_flags(UpConfig, UP_FLAGS)
def up_command(
    *,
    demo_request: Annotated[
        bool, typer.Option(help="Send a first request when all is ready, and show how it was made.")
    ] = False,
    config: ConfigFile = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    **flags: Any,
) -> None:
    """A router and its workers on this machine, supervised."""
    import asyncio

    from rich.console import Console

    from baton.settings import load
    from baton_cli.up import up
    from baton_cli.view import View

    settings = load(UpConfig, file=config, env=os.environ, overrides=overrides(UP_FLAGS, flags))
    log = _log_config(log_level, log_format)
    view = View(Console(), prefix=log.format != "json")
    raise typer.Exit(asyncio.run(up(settings, log, view, first_request=demo_request)))


@app.command(cls=ManyValuesCommand)
@settings_flags(RouterConfig, ROUTER_FLAGS)
def router(
    *, config: ConfigFile = None, log_level: LogLevel = None, log_format: LogFormat = None, **flags: Any
) -> None:
    """One router: the OpenAI API over HTTP, and gRPC."""
    link = SupervisorLink.from_env(os.environ)

    def import_main() -> Main:
        from baton.settings import load

        settings = load(RouterConfig, file=config, env=os.environ, overrides=overrides(ROUTER_FLAGS, flags))
        _start_logging("router", log_level, log_format, link)

        from baton_router.server import run_router

        return lambda stop, ready: run_router(settings, stop=stop, ready=ready)

    raise typer.Exit(run(import_main, link, new_loop=_fast_loop))


@app.command(cls=ManyValuesCommand)
@settings_flags(WorkerConfig, WORKER_FLAGS)
def prefill(
    *, config: ConfigFile = None, log_level: LogLevel = None, log_format: LogFormat = None, **flags: Any
) -> None:
    """One worker that prefills."""
    given = overrides(WORKER_FLAGS, flags) | {"roles": [Role.PREFILL]}
    _run_worker(config, given, log_level, log_format)


@app.command(cls=ManyValuesCommand)
@settings_flags(WorkerConfig, WORKER_FLAGS)
def decode(
    *, config: ConfigFile = None, log_level: LogLevel = None, log_format: LogFormat = None, **flags: Any
) -> None:
    """One worker that decodes."""
    given = overrides(WORKER_FLAGS, flags) | {"roles": [Role.DECODE]}
    _run_worker(config, given, log_level, log_format)


@app.command(cls=ManyValuesCommand)
@settings_flags(WorkerConfig, ANY_WORKER_FLAGS)
def worker(
    *, config: ConfigFile = None, log_level: LogLevel = None, log_format: LogFormat = None, **flags: Any
) -> None:
    """One worker with the roles you name: --role prefill --role decode."""
    _run_worker(config, overrides(ANY_WORKER_FLAGS, flags), log_level, log_format)


def _run_worker(
    file: Path | None, given: dict[str, Any], log_level: str | None, log_format: str | None
) -> None:
    link = SupervisorLink.from_env(os.environ)

    def import_main() -> Main:
        from baton.settings import load

        settings = load(WorkerConfig, file=file, env=os.environ, overrides=given)
        _start_logging(settings.worker_id or "-".join(settings.roles), log_level, log_format, link)
        _set_threads(settings.engine.num_threads)

        from baton_cli.compose import run_worker

        return lambda stop, ready: run_worker(settings, stop=stop, ready=ready)

    raise typer.Exit(run(import_main, link))


@app.command(cls=ManyValuesCommand)
@settings_flags(GenerateConfig, GENERATE_FLAGS)
def generate(
    *,
    requests: Annotated[
        Path, typer.Argument(metavar="FILE.jsonl", help="Requests in OpenAI's batch format.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: FILE.out.jsonl beside the requests."),
    ] = None,
    config: ConfigFile = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    **flags: Any,
) -> None:
    """Answer a file of requests in this process, without servers. The same command again goes on where the last one
    was stopped. Exit code 1 when a request failed: its answer says why."""
    from baton.settings import load

    settings = load(GenerateConfig, file=config, env=os.environ, overrides=overrides(GENERATE_FLAGS, flags))
    _start_logging("generate", log_level or "warning", log_format, SupervisorLink(None))
    _set_threads(settings.engine.num_threads)

    from baton_cli.generate import generate, output_path

    answers = output or output_path(requests)
    try:
        summary = generate(settings, requests, answers)
    except KeyboardInterrupt:
        complain(f"stopped; what was answered is in {answers}, and the same command goes on from there")
        raise typer.Exit(130) from None
    typer.echo(f"{summary}; {answers}")
    raise typer.Exit(0 if summary.all_ok else 1)


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="Without one: a conversation.")] = None,
    base_url: Annotated[str, typer.Option(help="Any OpenAI-compatible server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that the server lists.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True)] = None,
) -> None:
    """Talk to a server: one prompt, or a conversation."""
    from rich.console import Console

    from baton_cli.chat import ChatOptions, ask_once, talk

    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    given = {name: value for name, value in sampling.items() if value is not None}
    options = ChatOptions(base_url, model, system, api_key, given)
    raise typer.Exit(talk(options, Console()) if prompt is None else ask_once(options, prompt))


@app.command(
    add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def loadtest(context: typer.Context) -> None:
    """Measure latency, throughput and goodput of a server."""
    from baton_loadtest.cli import loadtest as command

    inner = typer.Typer(add_completion=False)
    inner.command()(command)
    inner(args=context.args, prog_name="baton loadtest")


@app.command()
@settings_flags(ProbeConfig, TLS)
def probe(
    *,
    target: Annotated[str, typer.Argument(help="http://HOST:PORT/PATH, or HOST:PORT of a gRPC server.")],
    timeout: Annotated[float, typer.Option(help="Seconds.")] = 2.0,
    peer: Annotated[str, typer.Option(metavar="router|worker", help="With TLS: what it is.")] = "worker",
    **flags: Any,
) -> None:
    """Exit code 0 when that process is healthy, 1 when not: for container health checks. With its certificate in the
    flags, or in the environment as the process has it, it speaks TLS."""
    from baton.settings import load
    from baton_cli.probe import probe

    if peer not in ("router", "worker"):
        raise ConfigError(f"--peer: must be 'router' or 'worker', got {peer!r}")
    settings = load(ProbeConfig, file=None, env=os.environ, overrides=overrides(TLS, flags))
    probe(target, timeout, settings.tls, peer)


@app.command()
def certs(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Where the authority and certificates are kept.")
    ] = None,
    secrets: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="In a pod, instead of DIR: Secrets NAME-ca, NAME-router, NAME-worker."
        ),
    ] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of these Secrets.")] = None,
    domain: Annotated[str, typer.Option(help="As in tls.domain.")] = "baton",
    days: Annotated[int, typer.Option(min=1, max=3650, help="That a certificate is valid.")] = 90,
    renew_all: Annotated[
        bool, typer.Option("--renew", help="All, not only what is about to expire.")
    ] = False,
) -> None:
    """Make, or renew, certificates for TLS between router and workers, by an authority of their own."""
    from contextlib import nullcontext

    from baton_cli.certs import ROLES, Directory, make_certificates, utc_now
    from baton_cli.cluster_secrets import ACCOUNT, ClusterSecrets

    if (directory is None) == (secrets is None):
        raise ConfigError("certs: name a directory, or --secrets")
    if secrets is not None:
        labels = dict(pair.partition("=")[::2] for pair in label or ())
        opened: Any = ClusterSecrets.in_pod(secrets, labels, os.environ, ACCOUNT)
    else:
        opened = nullcontext(Directory(directory or Path()))
    roles = ("router", "worker") if secrets is not None else tuple(ROLES)
    with opened as store:
        made = make_certificates(store, roles, domain, days, utc_now(), renew_all=renew_all)
    typer.echo("\n".join(made) or "all is fresh")


@app.command()
def models(
    model: Annotated[
        str | None,
        typer.Argument(metavar="DIR_OR_ID", help="Only this checkpoint; its weights are not read."),
    ] = None,
) -> None:
    """Which model types are supported, and why the others are not."""
    from rich.console import Console

    from baton_cli.models import check_model, list_types

    if model is None:
        list_types(Console())
    else:
        check_model(model, Console())


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(metavar="DIR_OR_ID")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
) -> None:
    """Download a model into the hub's cache (HF_HOME), as a worker would at its start; print where it is."""
    from baton.model_files import resolve_model

    typer.echo(resolve_model(model, revision))


@app.command()
def doctor(
    base_url: Annotated[str, typer.Option(help="A router.")] = "http://127.0.0.1:8000",
) -> None:
    """Say what a running fleet looks like and what is wrong with it; exit code 1 when something is."""
    from rich.console import Console

    from baton_cli.doctor import doctor

    raise typer.Exit(doctor(base_url, Console()))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"baton {__version__}")


def _set_threads(number: int) -> None:
    # Read when torch is imported; too late afterwards.
    os.environ.setdefault("OMP_NUM_THREADS", str(number))
    # Between two steps a core that waits is the router's: GNU's library would spin on it for milliseconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def _log_config(level: str | None, log_format: str | None) -> "LogConfig":
    from baton.settings import load_log

    return load_log(os.environ, {"level": level, "format": log_format})


def _start_logging(component: str, level: str | None, log_format: str | None, link: SupervisorLink) -> None:
    from baton.telemetry import configure_logging

    configure_logging(_log_config(level, log_format), component, show_component=not link.present)


def _fast_loop() -> Any:
    import uvloop

    return uvloop.new_event_loop()
