"""Dashboards are drawn from what Prometheus answers, and a panel without data does not pass for one. Their files have
only names, types and choices that Grafana's schema has, as its own SDK for Python carries it."""

import copy
import importlib.util
import json
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any

import httpx
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "helm" / "baton" / "dashboards").glob("*.json"))

register_default_plugins()  # panels of the type time series, queries of Prometheus


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_dashboards", ROOT / "scripts" / "draw_dashboards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prometheus(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[str]:
    """One that answers every query with `answer`; the queries that it got."""
    asked: list[str] = []

    def get(client: httpx.Client, url: str, *, params: dict[str, Any]) -> httpx.Response:
        asked.append(params["query"])
        return httpx.Response(200, json=answer(params) if callable(answer) else answer)

    monkeypatch.setattr(httpx.Client, "get", get)
    return asked


def a_line(params: dict[str, Any]) -> dict[str, Any]:
    values = [[params["start"], "1"], [params["end"], "2"]]
    return {"status": "success", "data": {"result": [{"metric": {"instance": "a:1"}, "values": values}]}}


def test_every_dashboard_becomes_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prometheus(monkeypatch, a_line)
    assert script().main(["--out", str(tmp_path), "--job", "fleet"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {f"dashboard-{file.stem}.png" for file in FILES}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())
    assert asked and not any("$" in query for query in asked)
    assert all('job=~"fleet"' in query for query in asked)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({"status": "success", "data": {"result": []}}, "no data"),
        ({"status": "success", "data": {"result": [{"metric": {}, "values": [[0, "NaN"]]}]}}, "no data"),
        ({"status": "error", "error": "parse error"}, "A: parse error"),
    ],
)
def test_panels_without_data_are_named(
    answer: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prometheus(monkeypatch, answer)
    (tmp_path / FILES[0].name).write_bytes(FILES[0].read_bytes())
    drawing = script()
    monkeypatch.setattr(drawing, "FOLDER", tmp_path)
    assert drawing.main(["--out", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(json.loads(FILES[0].read_text())["panels"])
    assert all(line.endswith(why) for line in lines)


def test_numbers_carry_their_units() -> None:
    shown = script().shown
    told = [shown(0.25, "percentunit"), shown(2.5e6, "Bps"), shown(1500, "short"), shown(1, "bool_yes_no")]
    assert told == ["25 %", "2.5 MB/s", "1.5k", "yes"]
    assert [shown(0.0125, "s"), shown(1.5, "s"), shown(0, "s")] == ["12.5 ms", "1.5 s", "0 s"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_grafanas_schema_knows_every_field_and_value(file: Path) -> None:
    assert list(complaints(json.loads(file.read_text()))) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("titel",), "a"),
        (("time", "form"), "now-1h"),
        (("refresh",), 30),
        (("templating", "list", 1, "type"), "qery"),
        (("panels", 0, "type"), "timeserie"),
        (("panels", 0, "gridPos", "w"), "8"),
        (("panels", 0, "targets", 0, "exprs"), "up"),
        (("panels", 0, "options", "legends"), {}),
        (("panels", 0, "options", "legend", "displayMode"), "lists"),
        (("panels", 0, "fieldConfig", "defaults", "custom", "showPoints"), "nver"),
    ],
)
def test_what_grafanas_schema_does_not_know_is_found(path: tuple[Any, ...], value: Any) -> None:
    board = copy.deepcopy(json.loads(FILES[0].read_text()))
    place = board
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert list(complaints(board))


def complaints(ours: dict[str, Any]) -> Iterator[str]:
    model = Dashboard.from_json(ours)
    # A name that the schema does not have is lost on the way through it; what it adds are defaults.
    yield from lost(ours, json.loads(JSONEncoder(sort_keys=True).encode(model)))
    yield from misfits(model, Dashboard)


def lost(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    if isinstance(ours, dict):
        for key, value in ours.items():
            yield from lost(value, theirs[key], f"{path}.{key}") if key in theirs else [f"{path}.{key}"]
    elif isinstance(ours, list):
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from lost(one, other, f"{path}[{i}]")
    elif ours != theirs:
        yield path


def misfits(value: Any, hint: Any, path: str = "") -> Iterator[str]:
    """`from_json` takes any value; the hints of its classes say which are right."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, UnionType):
        if all(any(True for _ in misfits(value, one)) for one in arguments):
            yield f"{path}: {value!r}"
    elif typing.get_origin(hint) is list and isinstance(value, list):
        for i, one in enumerate(value):
            yield from misfits(one, arguments[0], f"{path}[{i}]")
    elif hint is object and path.endswith((".options", ".custom")):
        # Raw where the SDK has no such panel.
        yield from [path] if isinstance(value, dict) else misfits(value, type(value), path)
    elif choices := choices_of(hint):
        yield from [] if value in choices else [f"{path}: {value!r}"]
    elif hasattr(value, "from_json"):
        for name, inner in typing.get_type_hints(type(value)).items():
            yield from misfits(getattr(value, name), inner, f"{path}.{name}")
    elif hint in (str, bool, int, float, NoneType):
        fits = isinstance(value, (int, float) if hint is float else hint)
        yield from [] if fits else [f"{path}: {value!r}"]


def choices_of(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return tuple(choice.value for choice in hint) if isinstance(hint, type) and issubclass(hint, Enum) else ()
