"""The site builds without a warning, says what the code has, and shows no command that nobody runs."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from baton.config import UpConfig, WorkerConfig, describe
from baton_cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))

# What runs each command of the pages: a test file, or a part of CI.
RUN_BY = {
    "make run": "tests/test_cli.py",
    "make test": ".ci/run",
    "make install": ".ci/run",
    "make docs": "tests/test_docs.py",
    "make test-containers": "tests/deploy/test_containers.py",
    "baton up": "tests/test_cli.py",
    "baton chat": "tests/test_cli.py",
    "baton doctor": "tests/test_ledger.py",
    "baton loadtest": "tests/test_cli.py",
    "baton certs": "tests/test_certificates.py",
    "baton generate": "tests/test_generate.py",
    "baton models": "tests/test_models.py",
    "curl": "tests/test_system_api.py",
    ".venv/bin/python scripts/draw_dashboards.py": "tests/test_draw_dashboards.py",
}


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts" / "docs_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands() -> list[tuple[str, str]]:
    """(page, command) of every `$ ...` line that is not marked as not run."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
            lines = re.findall(r"^\$ (.*)$", block, re.MULTILINE)
            found += [(page.name, line) for line in lines if "not run here" not in line]
    return found


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING -" not in done.stderr + done.stdout
    assert (tmp_path / "index.html").is_file()
    page = (tmp_path / "configuration.html").read_text()
    for cls in (UpConfig, WorkerConfig):
        assert all(setting.path in page for setting in describe(cls))


def test_pages_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    assert "font: false" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_is_run_by_somebody(page: str, command: str) -> None:
    runners = [where for start, where in RUN_BY.items() if command.startswith(start)]
    assert runners, f"{page} shows `{command}`: name the test that runs it, or mark it as not run here"
    assert (ROOT / runners[0]).exists()


@pytest.mark.parametrize(("page", "command"), [c for c in commands() if c[1].startswith("baton ")])
def test_every_flag_of_a_command_exists(page: str, command: str) -> None:
    name, *arguments = command.partition(" #")[0].split()[1:]
    shown = CliRunner().invoke(app, [name, "--help"]).output
    for argument in arguments:
        assert not argument.startswith("-") or argument in shown, f"{page}: {command}"


def test_the_flags_for_those_who_come_from_vllm_exist() -> None:
    page = (ROOT / "docs" / "migrate-vllm.md").read_text()
    shown = CliRunner().invoke(app, ["up", "--help"]).output
    ours = re.findall(r"^\| [^|]+ \| ([^|]+) \|", page, re.MULTILINE)
    for flag in re.findall(r"`(--[a-z-]+)`", " ".join(ours)):
        assert flag in shown, flag
    variables = set(re.findall(r"`(BATON_\w+)", page))
    known = {hooks().env_name(s.path) for s in describe(UpConfig)}
    assert variables <= known, variables - known


def test_an_unknown_marker_fails() -> None:
    with pytest.raises(KeyError):
        hooks().fill("{{ nonsense }}")


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in PAGES if f"- {page.name}\n" not in navigation] == []


def test_links_between_pages_lead_somewhere() -> None:
    names = {page.name for page in PAGES}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+\.md)", page.read_text()):
            assert target in names, f"{page.name} links to {target}"
