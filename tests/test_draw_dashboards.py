"""Dashboards are drawn from what Prometheus answers, and a panel without data does not pass for one. Their files are
what Grafana's own schema knows."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "helm" / "baton" / "dashboards").glob("*.json"))


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
    assert script().main(["--out", str(tmp_path)]) == 1
    panels = sum(len(json.loads(file.read_text())["panels"]) for file in FILES)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == panels and all(line.endswith(why) for line in lines)


def test_numbers_carry_their_units() -> None:
    shown = script().shown
    told = [shown(0.25, "percentunit"), shown(2.5e6, "Bps"), shown(1500, "short"), shown(1, "bool_yes_no")]
    assert told == ["25 %", "2.5 MB/s", "1.5k", "yes"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_grafanas_schema_knows_every_field(file: Path) -> None:
    """What its model does not know is lost on the way through it; it adds what is left to its defaults."""
    ours = json.loads(file.read_text())
    assert_within(ours, json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(ours))))


def assert_within(ours: Any, theirs: Any) -> None:
    if isinstance(ours, dict):
        assert ours.keys() <= theirs.keys()
        for key, value in ours.items():
            assert_within(value, theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_within(one, other)
    else:
        assert ours == theirs
