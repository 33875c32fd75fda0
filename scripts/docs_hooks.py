"""What mkdocs fills in when it builds the site: reference pages made of the code, so that they cannot differ from it.

A page says `{{ settings }}` where the tables go. A marker that nobody knows fails the build.
"""

import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from annotated_types import Ge, Interval, Predicate

from baton import config
from baton.config import Setting, describe, flag
from baton.model.support import installed_survey
from baton.settings import env_name
from baton_cli import flags
from baton_router.openai import schema

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_MARKER = re.compile(r"^\{\{ (\w+)(?: (.*?))? \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return fill(markdown)


def fill(markdown: str) -> str:
    """Raises KeyError for an unknown marker."""
    return _MARKER.sub(lambda found: _MAKERS[found[1]](*(found[2] or "").split()), markdown)


# --- settings ---


def settings() -> str:
    """Every setting once, under its section, with who reads it."""
    readers = {
        "router": {setting.path for setting in describe(config.RouterConfig)},
        "worker": {setting.path for setting in describe(config.WorkerConfig)},
        "up": {setting.path for setting in describe(config.UpConfig)},
    }
    found = {
        s.path: s
        for cls in (config.UpConfig, config.RouterConfig, config.WorkerConfig)
        for s in describe(cls)
    }
    sections: dict[str, list[Setting]] = {}
    for path, setting in found.items():
        sections.setdefault(path.rpartition(".")[0], []).append(setting)
    return "\n\n".join(_section(name, sections[name], readers) for name in sorted(sections))


def log_settings() -> str:
    rows = [
        (f"`BATON_LOG_{s.path.upper()}`", f"`--log-{s.path}`", _type(s.type), _default(s.default), s.doc)
        for s in describe(config.LogConfig)
    ]
    return _table(("variable", "flag", "values", "default", "what it is"), rows)


def _section(name: str, section: list[Setting], readers: dict[str, set[str]]) -> str:
    rows = [
        (
            f"`{s.path}`",
            _type(s.type),
            _default(s.default),
            s.doc,
            ", ".join(who for who, paths in readers.items() if s.path in paths),
        )
        for s in section
    ]
    title = f"### {name}" if name else "### of a process"
    return f"{title}\n\n" + _table(("setting", "values", "default", "what it is", "read by"), rows)


def _type(annotation: Any) -> str:
    base, *rules = (
        typing.get_args(annotation) if typing.get_origin(annotation) is typing.Annotated else (annotation,)
    )
    return "".join([_name(base), *(_rule(rule) for rule in rules)])


def _name(base: Any) -> str:
    origin, arguments = typing.get_origin(base), typing.get_args(base)
    if origin is typing.Literal:
        return " ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _type(a) for a in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        base.__name__, base.__name__.lower()
    )


def _rule(rule: Any) -> str:
    match rule:
        case Ge(ge=least):
            return f", at least {least}"
        case Interval(gt=above, ge=least, le=most):
            return f", {f'above {above}' if least is None else f'from {least}'} to {most}"
        case Predicate(func=check):
            return f", {check.__name__.replace('_', ' ')}"
    raise TypeError(f"no words for {rule!r}")


def _default(value: Any) -> str:
    if value is None or value in ("", ()):
        return "-"
    if isinstance(value, tuple):
        return " ".join(f"`{each}`" for each in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def commands() -> str:
    """The flags that commands have, by the setting that they set."""
    known = {setting.path for setting in describe(config.UpConfig)} | {
        s.path for s in describe(config.WorkerConfig)
    }
    paths = [*flags.MODEL, *flags.ENGINE, *flags.INDEX, *flags.ADDRESS]
    rows = [(f"`{flag(path)}`", f"`{env_name(path)}`", f"`{path}`") for path in paths if path in known]
    return _table(("flag", "variable", "setting"), rows)


# --- HTTP ---


def fields(which: str) -> str:
    """Of a request: fields with their types, and those that have to stay at a value."""
    model = {"chat": schema.ChatCompletionRequest, "completions": schema.CompletionRequest}[which]
    rows = [
        (
            f"`{name}`",
            _json_type(prop),
            "yes" if name in model.model_json_schema().get("required", ()) else "",
        )
        for name, prop in model.model_json_schema()["properties"].items()
        if name not in model.neutral
    ]
    neutral = ", ".join(f"`{name}`" for name in sorted(model.neutral))
    return (
        _table(("field", "type", "required"), rows)
        + f"\n\nAccepted only where they ask for nothing: {neutral}. Every other field is refused by its name."
    )


def _json_type(prop: dict[str, Any]) -> str:
    if "$ref" in prop:
        return prop["$ref"].rpartition("/")[2]
    if "enum" in prop or "const" in prop:
        return " ".join(f"`{value}`" for value in prop.get("enum", [prop.get("const")]))
    options = prop.get("anyOf") or prop.get("oneOf")
    if options:
        kinds = dict.fromkeys(_json_type(option) for option in options)
        return " or ".join(kind for kind in kinds if kind != "null")
    if prop.get("type") == "array":
        return f"list of {_json_type(prop.get('items', {}))}"
    least, most = prop.get("minimum", prop.get("exclusiveMinimum")), prop.get("maximum")
    limits = f" from {least} to {most}" if most is not None and most < 2**31 - 1 else ""
    return f"{prop.get('type', 'anything')}{limits}"


# --- gRPC, models, results ---


def proto(name: str) -> str:
    text = (ROOT / "proto" / "baton" / "v1" / f"{name}.proto").read_text()
    return f"```proto\n{text.strip()}\n```"


def models() -> str:
    """What `baton models` says."""
    survey = installed_survey()
    refused = [
        (name, survey.why_not(name) or "") for name in sorted(survey.types.keys() - set(survey.supported))
    ]
    return (
        f"transformers {survey.transformers}: {len(survey.supported)} types are supported: "
        + ", ".join(f"`{name}`" for name in survey.supported)
        + ".\n\n## Refused, and why\n\n"
        + _table(("type", "why"), [(f"`{name}`", why) for name, why in refused])
    )


def result(name: str) -> str:
    """A page of benchmarks/results, its title one level lower."""
    text = (RESULTS / f"{name}.md").read_text()
    return re.sub(r"^(#+) ", r"#\1 ", text, flags=re.MULTILINE).strip()


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(_lines(head, rows))


def _lines(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |"


_MAKERS: dict[str, Callable[..., str]] = {
    "settings": settings,
    "log_settings": log_settings,
    "commands": commands,
    "fields": fields,
    "proto": proto,
    "models": models,
    "result": result,
}
