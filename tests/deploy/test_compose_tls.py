"""compose/tls.yaml on top of compose.yaml: who finds which certificate, and who sees the authority's key."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_compose import COMPOSE, CONFIGS, ROOT, environment, stage
from typer.testing import CliRunner

from baton.certificates import load_certificates
from baton.clock import SystemClock
from baton.settings import load
from baton_cli.main import app

TLS = yaml.safe_load((ROOT / "compose" / "tls.yaml").read_text())
CERTS = TLS["services"]["certs"]


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Volume -> where it is mounted."""
    return dict(volume.split(":")[:2] for volume in service["volumes"])


def test_it_follows_the_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    file = ROOT / "compose" / "tls.yaml"
    done = subprocess.run([*command, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_is_about_services_of_compose() -> None:
    assert set(TLS["services"]) - {"certs"} == set(CONFIGS)
    assert not set(TLS["volumes"]) & set(COMPOSE["volumes"])
    assert all(set(mounts(service)) <= set(TLS["volumes"]) for service in TLS["services"].values())


@pytest.mark.parametrize("service", CONFIGS)
def test_every_process_finds_its_certificate_and_no_other(service: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [CERTS["command"][0], str(tmp_path)])
    assert done.exit_code == 0 and CERTS["command"][1:] == ["/certs"]
    here = TLS["services"][service]
    env = {name: value for name, value in environment(service).items() if not name.endswith("_FILE")}
    env |= {name: path.replace("/certs", str(tmp_path)) for name, path in here["environment"].items()}
    config = load(CONFIGS[service], file=None, env=env, overrides={})
    role = "router" if service == "router" else "worker"
    assert load_certificates(config.tls, role, SystemClock()) is not None
    [(volume, place)] = mounts(here).items()
    assert mounts(CERTS)[volume] == place == f"/certs/{role}"
    assert here["volumes"] == [f"{volume}:{place}:ro"]
    assert all(Path(path).is_relative_to(place) for path in here["environment"].values())
    assert here["depends_on"] == {"certs": {"condition": "service_completed_successfully"}}


def test_what_makes_certificates_may_write_them_and_speak_to_nobody() -> None:
    made = next(arguments for instruction, arguments in stage("router") if "mkdir" in arguments)
    for place in mounts(CERTS).values():
        assert place in made and "chown -R 10001:10001 /models /certs" in made  # what a new volume begins as
    assert CERTS["network_mode"] == "none" and CERTS["cap_drop"] == ["ALL"] and CERTS["read_only"]
