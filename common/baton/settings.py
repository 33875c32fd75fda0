"""Reads settings. A flag wins over the environment, the environment over the file, the file over the default.

    block_size of the engine:   --block-size 32   BATON_ENGINE__BLOCK_SIZE=32   engine: {block_size: 32}

One file or environment may serve all components: a setting that only another component knows is passed over.
A setting that no component knows is refused, and so is a value of the wrong type or out of range: one line
that names where it was written. An empty variable counts as absent.

What should not be seen in an environment is kept in a file, such as a mounted secret: the variable's name with `_FILE`,
here BATON_ENGINE__BLOCK_SIZE_FILE=/run/secrets/block_size.
"""

import difflib
import functools
import json
import re
import sys
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from baton.config import (
    SUPERVISOR_FD,
    LogConfig,
    RouterConfig,
    Setting,
    UpConfig,
    WorkerConfig,
    describe,
    flag,
)
from baton.errors import ConfigError

C = TypeVar("C", bound=Hashable)

ENV_PREFIX = "BATON_"
LOG_PREFIX = "BATON_LOG_"
FILE_SUFFIX = "_FILE"


class Given(NamedTuple):
    value: Any
    origin: str  # as the user knows it: "--port", "BATON_PORT", "fleet.yaml: port"
    from_text: bool = False  # an environment variable: numbers and flags are still text


def load(cls: type[C], *, file: Path | None, env: Mapping[str, str], overrides: Mapping[str, Any]) -> C:
    """`overrides` maps paths ("engine.block_size") to flag values; None means that the flag was not given.

    The file is YAML or JSON; `Path("-")` is the standard input. Raises ConfigError.
    """
    given = dict(_from_file(file)) if file is not None else {}
    given |= _from_env(env)
    given |= {path: Given(value, flag(path)) for path, value in overrides.items() if value is not None}
    return _configured(cls, given)


def load_log(env: Mapping[str, str], overrides: Mapping[str, Any]) -> LogConfig:
    """`BATON_LOG_LEVEL`, `BATON_LOG_FORMAT` and the flags `--log-level`, `--log-format`."""
    given = {s.path: Given(env.get(_log_env(s)), _log_env(s), from_text=True) for s in describe(LogConfig)}
    given |= {path: Given(value, f"--log-{path}") for path, value in overrides.items() if value is not None}
    return _configured(LogConfig, {path: g for path, g in given.items() if g.value})


def env_name(path: str) -> str:
    """`BATON_ENGINE__BLOCK_SIZE` for `engine.block_size`."""
    return ENV_PREFIX + path.upper().replace(".", "__")


def reserved_env_names() -> frozenset[str]:
    """Variables that start like a setting and are none."""
    return frozenset({SUPERVISOR_FD} | {_log_env(setting) for setting in describe(LogConfig)})


def _log_env(setting: Setting) -> str:
    return LOG_PREFIX + setting.path.upper()


@functools.cache
def _known_paths() -> frozenset[str]:
    return frozenset(s.path for cls in (UpConfig, RouterConfig, WorkerConfig) for s in describe(cls))


@functools.cache
def _known_sections() -> frozenset[str]:
    return frozenset(path.rpartition(".")[0] for path in _known_paths()) - {""}


def _from_file(file: Path) -> Iterator[tuple[str, Given]]:
    name = "standard input" if file == Path("-") else str(file)
    try:
        document = yaml.safe_load(sys.stdin.read() if file == Path("-") else file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {name}: {_reason(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML: {_one_line(str(error))}") from error
    return _flatten({} if document is None else document, "", name)


def _flatten(node: Any, path: str, file: str) -> Iterator[tuple[str, Given]]:
    if not isinstance(node, Mapping):
        raise ConfigError(f"{file}: {path or 'the file'} must be a section with settings, got {_shown(node)}")
    for key, value in node.items():
        child = f"{path}.{key}" if path else str(key)
        if child in _known_sections():
            yield from _flatten({} if value is None else value, child, file)
        elif child in _known_paths():
            yield child, Given(value, f"{file}: {child}")
        else:
            raise ConfigError(f"{file}: unknown setting {child}{_did_you_mean(child, _known_paths())}")


def _from_env(env: Mapping[str, str]) -> dict[str, Given]:
    names = {env_name(path): path for path in _known_paths()}
    given: dict[str, Given] = {}
    for name in sorted(env):
        if not name.startswith(ENV_PREFIX) or name in reserved_env_names() or not env[name]:
            continue
        setting = name if name in names else name.removesuffix(FILE_SUFFIX)
        if setting not in names or _SERVICE_LINK.match(env[name]):
            raise ConfigError(_unknown_variable(name, env[name], names.keys() | reserved_env_names()))
        if names[setting] in given:
            raise ConfigError(f"{setting} and {name} are both set: leave one of them out")
        text = env[name] if setting == name else _secret(name, Path(env[name]))
        given[names[setting]] = Given(text, name, from_text=True)
    return given


def _secret(name: str, file: Path) -> str:
    """Its text, without the line end that editors add."""
    try:
        return file.read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot read {file}: {_reason(error)}") from error


# What Kubernetes puts into every container for a Service that happens to be called baton, e.g. BATON_PORT.
_SERVICE_LINK = re.compile(r"(tcp|udp)://")


def _unknown_variable(name: str, value: str, known: frozenset[str] | set[str]) -> str:
    if _SERVICE_LINK.match(value) or re.search(r"_(SERVICE_(HOST|PORT)|PORT_\d+_)", name):
        return f"{name}={value} comes from a Kubernetes Service; set enableServiceLinks: false in the pod"
    return f"unknown environment variable {name}{_did_you_mean(name, known)}"


def _did_you_mean(name: str, known: frozenset[str] | set[str]) -> str:
    same_leaf = sorted(path for path in known if path.rpartition(".")[2] == name.rpartition(".")[2])
    close = same_leaf or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _checked(setting: Setting, given: Given) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(setting.type)
    try:
        if not given.from_text:
            # JSON's rules: a list is a tuple, a string an enum member, but "8" is no number and 1 no boolean.
            return adapter.validate_json(json.dumps(given.value, default=str), strict=True)
        if get_origin(setting.type) is tuple:
            return adapter.validate_python([part.strip() for part in given.value.split(",")])
        return adapter.validate_python(given.value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{given.origin}: {_complaint(first)}, got {_shown(given.value)}") from error


def _complaint(error: Any) -> str:
    """pydantic's message in our voice; a predicate is named after what the value must be."""
    if error["type"] == "predicate_failed" and (predicate := re.search(r"\ba_\w+", error["msg"])):
        return "must be " + predicate[0].replace("_", " ")
    return str(error["msg"]).replace("Input should be", "must be", 1)


def _configured(cls: type[C], given: Mapping[str, Given]) -> C:
    values = {s.path: _checked(s, given[s.path]) for s in describe(cls) if s.path in given}
    config: C = _build(cls(), "", values)
    return config


def _build(default: Any, prefix: str, values: Mapping[str, Any]) -> Any:
    changes: dict[str, Any] = {}
    for f in fields(default):
        path, old = prefix + f.name, getattr(default, f.name)
        if is_dataclass(old):
            changes[f.name] = _build(old, path + ".", values)
        elif path in values:
            changes[f.name] = values[path]
    return replace(default, **changes)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else _one_line(str(error))
