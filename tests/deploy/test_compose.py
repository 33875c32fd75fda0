"""compose.yaml and the Dockerfile say only what the code has: commands, settings, ports, health checks."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

import baton
from baton.config import RouterConfig, WorkerConfig
from baton.otel import is_wanted
from baton.settings import load
from baton_cli.main import app

ROOT = Path(__file__).parents[2]
COMPOSE_TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
DOCKERFILE = (ROOT / "services" / "Dockerfile").read_text().replace("\\\n", " ")
PINS = (ROOT / "services" / "pins.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONFIGS = {
    "router": RouterConfig,
    "prefill": WorkerConfig,
    "decode": WorkerConfig,
    "prefill-gpu": WorkerConfig,
    "decode-gpu": WorkerConfig,
}


def stage(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of one build stage and of those it is built from."""
    stages: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for line in DOCKERFILE.splitlines():
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, current = arguments.partition(" AS ")
            stages[current] = (base, [])
        elif instruction.isupper() and stages:
            stages[current][1].append((instruction, arguments.strip()))
    base, lines = stages[name]
    return (stage(base) if base in stages else []) + lines


def image_env(name: str) -> dict[str, str]:
    pairs = (shlex.split(arguments) for instruction, arguments in stage(name) if instruction == "ENV")
    return dict(pair.split("=", 1) for line in pairs for pair in line)


def resolved(value: object) -> str:
    """Compose's ${NAME:-default} with nothing set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))


def environment(service: str) -> dict[str, str]:
    target = COMPOSE["services"][service]["build"]["target"]
    own = {name: resolved(value) for name, value in COMPOSE["services"][service]["environment"].items()}
    return image_env(target) | own


def secret_file(service: str, mounted: Path) -> Path:
    """On this side, of a secret that the service finds at `mounted`."""
    assert mounted.parent == Path("/run/secrets") and mounted.name in COMPOSE["services"][service]["secrets"]
    return ROOT / resolved(COMPOSE["secrets"][mounted.name]["file"])


def test_compose_follows_the_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, ROOT / "compose.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_runs_the_processes_of_up() -> None:
    always = {name for name, settings in COMPOSE["services"].items() if "profiles" not in settings}
    assert always == {"redis", "router", "prefill", "decode"}


@pytest.mark.parametrize("service", CONFIGS)
def test_every_variable_is_a_setting_with_a_valid_value(service: str) -> None:
    env = {name: value for name, value in environment(service).items() if name.startswith("BATON_")}
    for name, secret in ((n, v) for n, v in env.items() if n.endswith("_FILE")):
        env[name] = str(secret_file(service, Path(secret)))
    config = load(CONFIGS[service], file=None, env=env, overrides={})
    assert config.index.redis_url == "redis://redis:6379/0"
    assert config.host == "0.0.0.0"


@pytest.mark.parametrize("service", CONFIGS)
def test_every_command_is_one_of_baton(service: str) -> None:
    target = COMPOSE["services"][service]["build"]["target"]
    default = next(json.loads(a) for i, a in reversed(stage(target)) if i == "CMD")
    arguments = COMPOSE["services"][service].get("command", default)
    assert ("ENTRYPOINT", '["baton"]') in stage(target)
    done = CliRunner().invoke(app, [*arguments, "--help"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("target", ["router", "worker"])
def test_ports_and_health_checks_are_those_of_the_settings(target: str) -> None:
    env = image_env(target)
    config = load(
        RouterConfig if target == "router" else WorkerConfig,
        file=None,
        env={k: v for k, v in env.items() if k.startswith("BATON_")},
        overrides={},
    )
    ports = [config.port, config.grpc_port if isinstance(config, RouterConfig) else config.metrics_port]
    exposed = next(arguments.split() for instruction, arguments in stage(target) if instruction == "EXPOSE")
    assert exposed == [str(port) for port in ports]
    check = next(arguments for instruction, arguments in stage(target) if instruction == "HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert command[:2] == ["baton", "probe"]
    assert f":{config.port}" in command[2]
    assert CliRunner().invoke(app, ["probe", "--help"]).exit_code == 0


# --- the profile `observability` ---

OBSERVERS = {
    name: settings
    for name, settings in COMPOSE["services"].items()
    if settings.get("profiles") == ["observability"]
}
CONFIGS_OF_OBSERVERS = ROOT / "compose"


def test_observers_are_locked_down_and_answer_on_this_machine_only() -> None:
    assert set(OBSERVERS) == {"otel-collector", "prometheus", "grafana", "jaeger"}
    for settings in OBSERVERS.values():
        assert settings["read_only"] is True and settings["cap_drop"] == ["ALL"]
        assert re.search(r":v?\d+\.\d+\.\d+$", settings["image"])
        assert all(resolved(port).startswith("127.0.0.1:") for port in settings.get("ports", []))


def test_what_observers_mount_is_there() -> None:
    for settings in OBSERVERS.values():
        for volume in settings.get("volumes", []):
            source, _, options = volume.partition(":")
            assert (ROOT / source).exists() and options.endswith(":ro")


def test_prometheus_scrapes_the_metrics_port_of_every_process(tmp_path: Path) -> None:
    file = CONFIGS_OF_OBSERVERS / "prometheus.yaml"
    [job] = yaml.safe_load(file.read_text())["scrape_configs"]
    ports = {name: found["port"] for found in job["dns_sd_configs"] for name in found["names"]}
    for service in CONFIGS:
        env = {name: value for name, value in environment(service).items() if name.startswith("BATON_")}
        config = load(
            CONFIGS[service],
            file=None,
            env={n: v for n, v in env.items() if not n.endswith("_FILE")},
            overrides={},
        )
        wanted = config.port if isinstance(config, RouterConfig) else config.metrics_port
        assert ports.pop(service) == wanted
    assert not ports
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = subprocess.run([promtool, "check", "config", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_has_the_alerts_of_the_chart() -> None:
    """Made by `.venv/bin/python tests/deploy/helm_engine.py`."""
    from helm_engine import COMPOSE_ALERTS, compose_alerts

    assert COMPOSE_ALERTS.read_text() == compose_alerts()
    prometheus = yaml.safe_load((CONFIGS_OF_OBSERVERS / "prometheus.yaml").read_text())
    [rules] = prometheus["rule_files"]
    mounted = {v.split(":")[1]: v.split(":")[0] for v in OBSERVERS["prometheus"]["volumes"]}
    assert ROOT / mounted[f"/etc/{rules}"] == COMPOSE_ALERTS  # beside the file that names it
    # What the rules select and group by is what Prometheus gives here.
    [job] = prometheus["scrape_configs"]
    text = COMPOSE_ALERTS.read_text()
    assert set(re.findall(r'\bjob="([^"]*)"', text)) == {job["job_name"]}
    given = {relabelling["target_label"] for relabelling in job["relabel_configs"]}
    assert set(re.findall(r"labels\.(\w+)", text)) == given


def test_traces_find_their_way_to_jaeger() -> None:
    asked = re.search(r"OTEL_EXPORTER_OTLP_ENDPOINT=http://([\w-]+):(\d+) docker compose", COMPOSE_TEXT)
    assert asked is not None
    service, port = asked.groups()
    collector = yaml.safe_load((CONFIGS_OF_OBSERVERS / f"{service}.yaml").read_text())
    assert collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"] == f"0.0.0.0:{port}"
    [exporter] = collector["service"]["pipelines"]["traces"]["exporters"]
    assert collector["exporters"][exporter]["endpoint"].partition(":")[0] in OBSERVERS
    for service in CONFIGS:
        assert not is_wanted(environment(service))  # off unless somebody says where to
        assert COMPOSE["services"][service]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]


def test_grafana_finds_data_and_dashboards() -> None:
    provisioned = CONFIGS_OF_OBSERVERS / "grafana"
    sources = yaml.safe_load((provisioned / "datasources" / "baton.yaml").read_text())["datasources"]
    assert {re.sub(r"http://([\w-]+):\d+", r"\1", source["url"]) for source in sources} <= set(OBSERVERS)
    [provider] = yaml.safe_load((provisioned / "dashboards" / "baton.yaml").read_text())["providers"]
    mounted = {v.split(":")[1]: v.split(":")[0] for v in OBSERVERS["grafana"]["volumes"]}
    assert list((ROOT / mounted[provider["options"]["path"]]).glob("*.json"))


def test_the_published_port_is_the_routers() -> None:
    [published] = COMPOSE["services"]["router"]["ports"]
    assert resolved(published) == f"127.0.0.1:{RouterConfig().port}:{RouterConfig().port}"


@pytest.mark.parametrize("service", CONFIGS)
def test_containers_are_locked_down(service: str) -> None:
    settings = COMPOSE["services"][service]
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    target = settings["build"]["target"]
    assert ("USER", "10001:10001") in stage(target)
    assert all("build-essential" not in arguments for _, arguments in stage(target))


def test_what_the_build_copies_is_there_and_not_ignored() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for instruction, arguments in stage("build-router") + stage("build-worker"):
        if instruction == "COPY":
            for source in arguments.split()[:-1]:
                assert (ROOT / source).exists()
                assert source.partition("/")[0] in allowed


def test_the_router_image_gets_the_base_requirements_and_traces_only() -> None:
    installs = [arguments for instruction, arguments in stage("build-router") if "$PIP install" in arguments]
    assert installs == ["$PIP install -r base.txt -r otel.txt -c pins.txt", "$PIP install --no-deps ."]
    assert not any(Requirement(line).name == "torch" for line in PROJECT["dependencies"])


def test_the_images_hold_nothing_that_installs() -> None:
    assert any("venv --without-pip /opt/baton" in arguments for _, arguments in stage("builder"))
    for target in ("router", "worker"):
        copied = [arguments for instruction, arguments in stage(target) if "--from=" in arguments]
        assert copied == [f"--from=build-{target} /opt/baton /opt/baton"]


def test_every_requirement_of_the_images_is_pinned_within_its_range() -> None:
    lines = [line for line in PINS.splitlines() if not line.startswith("#")]
    pinned = {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in map(Requirement, lines)
    }
    extras = PROJECT["optional-dependencies"]
    for line in PROJECT["dependencies"] + extras["worker"] + extras["otel"]:
        required = Requirement(line)
        assert required.specifier.contains(pinned[canonicalize_name(required.name)]), line


def test_the_images_say_the_version_of_the_code() -> None:
    labels = " ".join(arguments for instruction, arguments in stage("runtime") if instruction == "LABEL")
    assert f'org.opencontainers.image.version="{baton.__version__}"' in labels
