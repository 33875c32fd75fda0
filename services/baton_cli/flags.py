"""Command-line flags made from config fields: name, type, help and default come from `baton.config`.

A flag's own default is None, "not given", so that the environment and the file can speak.
"""

import inspect
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from baton.config import Setting, describe, flag

F = TypeVar("F", bound=Callable[..., Any])

MODEL = ("model.model", "model.served_model_name", "model.max_model_len")
TLS = ("tls.cert", "tls.key", "tls.ca", "tls.domain")
INDEX = ("index.index", "index.redis_url")
ENGINE = (
    "model.dtype",
    "engine.quantization",
    "engine.bit_exact",
    "engine.max_num_seqs",
    "engine.max_num_batched_tokens",
    "engine.block_size",
    "engine.num_blocks",
    "engine.gpu_memory_utilization",
    "engine.cpu_memory_utilization",
    "engine.swap_space_bytes",
    "engine.enable_prefix_caching",
    "engine.device",
    "engine.num_threads",
    "transfer.transport",
)
ADDRESS = ("host", "port")


class ManyValuesCommand(TyperCommand):
    """Takes several values behind one flag, `--served-model-name A B`, as vLLM does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        many = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        return super().parse_args(ctx, spread(args, many))


def spread(args: list[str], many: set[str]) -> list[str]:
    """`--name A B` becomes `--name A --name B` for every flag in `many`."""
    out: list[str] = []
    current: str | None = None
    for arg in args:
        if arg.startswith("-"):
            current = arg if arg in many else None
        elif current is not None and out[-1] != current:
            out.append(current)
        out.append(arg)
    return out


def settings_flags(cls: type, paths: tuple[str, ...]) -> Callable[[F], F]:
    """Give a command, written with `**flags`, a flag for each of these settings; `overrides` reads them."""
    settings = {setting.path: setting for setting in describe(cls)}

    def decorate(function: F) -> F:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        made = [_parameter(settings[path]) for path in paths]

        def command(**values: Any) -> Any:
            return function(**values)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = signature.replace(parameters=[*made, *own])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*made, *own)}
        return command  # type: ignore[return-value]

    return decorate


def overrides(paths: tuple[str, ...], values: dict[str, Any]) -> dict[str, Any]:
    """What `baton.settings.load` takes, from what the command was called with."""
    given = {path: values[_leaf(path)] for path in paths}
    return {path: None if value == [] else value for path, value in given.items()}


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _parameter(setting: Setting) -> inspect.Parameter:
    kind, many = _python_type(setting.type)
    name = flag(setting.path)
    option = typer.Option(
        f"{name}/--no-{name[2:]}" if kind is bool else name,
        help=_help(setting),
        metavar=_metavar(setting.type),
        show_default=False,
    )
    annotation = Annotated[(list[kind] if many else kind) | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        _leaf(setting.path), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _plain(annotation: Any) -> Any:
    """Without `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _plain(next(arg for arg in get_args(annotation) if arg is not type(None)))
    return annotation


def _python_type(annotation: Any) -> tuple[type, bool]:
    plain = _plain(annotation)
    if get_origin(plain) is tuple:
        return _python_type(get_args(plain)[0])[0], True
    # A choice stays text here: the loader complains in one line, the same for flag, variable and file.
    return (plain, False) if plain in (int, float, bool) else (str, False)


def _metavar(annotation: Any) -> str | None:
    plain = _plain(annotation)
    if get_origin(plain) is tuple:
        inner = _metavar(get_args(plain)[0]) or "TEXT"
        return f"{inner} ..."
    choices = [str(choice) for choice in get_args(plain) or (plain if hasattr(plain, "__members__") else ())]
    return "|".join(choices) or None


def _help(setting: Setting) -> str:
    default = setting.default
    if default in (None, (), ""):
        return setting.doc
    if isinstance(default, tuple):
        default = " ".join(default)
    return f"{setting.doc} (default: {default})"
