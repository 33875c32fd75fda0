"""The chart as Helm sees it: renders, lints and checks it with the real engine from PyPI, without a cluster.

Run as a script it writes what is made from other things: the settings' part of helm/baton/values.schema.json, from
`baton.config`, and compose/alerts.yaml, from the chart's PrometheusRule.
"""

import functools
import json
import shlex
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter
from test_compose import image_env

from baton.config import ModelConfig, RouterConfig, WorkerConfig, describe

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "baton"
SCHEMA = CHART / "values.schema.json"
COMPOSE_ALERTS = ROOT / "compose" / "alerts.yaml"
EXAMPLES = {path.stem: path for path in sorted((ROOT / "helm" / "examples").glob("*.yaml"))}

# What the chart says itself, from its own values, so that ports, probes, Services and policies agree.
CHART_OWNED = {
    "host", "port", "grpc_port", "metrics_port", "advertise_host", "stop_grace_s", "roles", "worker_id", "workers",
    "api_keys_file", "health_port", "tls.cert", "tls.key", "tls.ca", "tls.domain",
    "transfer.host", "transfer.port", "transfer.advertise_host", "index.index", "index.redis_url",
}  # fmt: skip
SETTINGS = {"modelSettings": ModelConfig, "routerSettings": RouterConfig, "workerSettings": WorkerConfig}

Manifest = dict[str, Any]


def example(name: str) -> dict[str, Any]:
    """Values of helm/examples; "defaults" are none."""
    return {} if name == "defaults" else yaml.safe_load(EXAMPLES[name].read_text()) or {}


def render(
    values: dict[str, Any], *, name: str = "demo", namespace: str = "prod", kube_version: str = "v1.33.0"
) -> dict[str, str]:
    """Template path -> text, as `helm template` renders it. Raises HelmError."""
    options = {"name": name, "namespace": namespace, "kube_version": kube_version}
    rendered: dict[str, str] = json.loads(_render(json.dumps(values), json.dumps(options)))
    return rendered


@functools.cache
def _render(values: str, options: str) -> str:
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        # `Chart.render` knows no Kubernetes version; what it calls does.
        text: str = helm_python._native.call_string("helm_render", chart._raw(), values, options)
    return text


def manifests(values: dict[str, Any], **options: Any) -> list[Manifest]:
    files = render(values, **options)
    documents = (yaml.safe_load_all(text) for path, text in sorted(files.items()) if path.endswith(".yaml"))
    return [document for file in documents for document in file if document]


def notes(values: dict[str, Any]) -> str:
    return next(text for path, text in render(values).items() if path.endswith("NOTES.txt"))


def lint(values: dict[str, Any], kube_version: str) -> list[str]:
    import helm_python

    report = helm_python.lint(CHART, values, strict=True, kube_version=kube_version)
    found = [f"{m['path']}: {m['error']}" for m in report["messages"] if m["severity"] > 1]
    return [*found, *report["errors"]]


def check_values(values: dict[str, Any]) -> None:
    """Raises HelmValuesError for what values.schema.json refuses."""
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)


# --- reading manifests ---


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def dashboards(manifests: list[Manifest]) -> dict[str, Any]:
    """File name -> what Grafana reads."""
    found = (m for m in of_kind(manifests, "ConfigMap") if m["metadata"]["name"].endswith("-dashboards"))
    return {name: json.loads(text) for m in found for name, text in m["data"].items()}


def dashboard_queries(manifests: list[Manifest]) -> list[str]:
    panels = (panel for board in dashboards(manifests).values() for panel in board["panels"])
    return [target["expr"] for panel in panels for target in panel["targets"]]


def workloads(manifests: list[Manifest]) -> list[Manifest]:
    return of_kind(manifests, "Deployment", "StatefulSet")


def ours(manifests: list[Manifest]) -> list[Manifest]:
    return [w for w in workloads(manifests) if container_of(w)["name"] in ("router", "worker")]


def pod_of(workload: Manifest) -> Manifest:
    pod: Manifest = workload["spec"]["template"]
    return pod


def container_of(workload: Manifest) -> Manifest:
    (container,) = pod_of(workload)["spec"]["containers"]
    return container


def component(manifest: Manifest) -> str:
    return str(manifest["metadata"]["labels"]["app.kubernetes.io/component"])


def environment(container: Manifest, *, pod_ip: str, secret: str) -> dict[str, str]:
    """As the process will see it: the image's variables, the manifest's, references resolved."""
    env = image_env(container["name"])
    for entry in container["env"]:
        source = entry.get("valueFrom", {})
        value = pod_ip if "fieldRef" in source else secret if "secretKeyRef" in source else entry["value"]
        env[entry["name"]] = value.replace("$(POD_IP)", pod_ip)
    return env


def config_file(manifests: list[Manifest], workload: Manifest, directory: Path) -> Path:
    """The file that the pod finds under --config."""
    container, volumes = container_of(workload), pod_of(workload)["spec"]["volumes"]
    path = Path(container["args"][container["args"].index("--config") + 1])
    mount = next(m for m in container["volumeMounts"] if path.is_relative_to(m["mountPath"]))
    volume = next(v["configMap"] for v in volumes if v["name"] == mount["name"])
    key = next(i["key"] for i in volume["items"] if i["path"] == str(path.relative_to(mount["mountPath"])))
    (data,) = (c["data"] for c in of_kind(manifests, "ConfigMap") if c["metadata"]["name"] == volume["name"])
    file = directory / key
    file.write_text(data[key])
    return file


def first_request(text: str) -> bytes:
    """The body of the request in the notes."""
    command = shlex.split(next(line for line in text.splitlines() if "curl" in line and " -d " in line))
    return command[command.index("-d") + 1].encode()


# --- the schema of the values ---


def settings_schema(config: type) -> dict[str, Any]:
    """JSON schema of those settings of a config class that `settings` and `model` in the values may hold."""
    schema = _section()
    for setting in describe(config):
        if setting.path in CHART_OWNED or (setting.path.startswith("model.") and config is not ModelConfig):
            continue
        section, _, leaf = setting.path.rpartition(".")
        owner = schema["properties"].setdefault(section, _section()) if section else schema
        owner["properties"][leaf] = TypeAdapter(setting.type).json_schema()
    return schema


def _section() -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def write_schema() -> None:
    schema = json.loads(SCHEMA.read_text())
    schema["$defs"] |= {name: settings_schema(config) for name, config in SETTINGS.items()}
    SCHEMA.write_text(json.dumps(schema, indent=2) + "\n")


# --- the alerts of compose.yaml ---


def compose_alerts() -> str:
    """The chart's rules for the one job that compose/prometheus.yaml scrapes."""
    (rules,) = of_kind(manifests({"monitoring": {"alerts": {"enabled": True}}}), "PrometheusRule")
    text = yaml.safe_dump(rules["spec"], sort_keys=False, width=110)
    header = "# Made from helm/baton/templates/alerts.yaml:   .venv/bin/python tests/deploy/helm_engine.py\n"
    return header + text.replace('job="prod/demo-baton"', 'job="baton"')


if __name__ == "__main__":
    write_schema()
    COMPOSE_ALERTS.write_text(compose_alerts())
