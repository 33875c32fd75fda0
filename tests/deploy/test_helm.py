"""The chart renders to valid, locked-down manifests that say only what the code has: settings, ports, metrics."""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_engine import (
    CHART,
    CHART_OWNED,
    EXAMPLES,
    SCHEMA,
    SETTINGS,
    Manifest,
    check_values,
    component,
    config_file,
    container_of,
    dashboard_queries,
    dashboards,
    environment,
    example,
    first_request,
    lint,
    notes,
    of_kind,
    ours,
    pod_of,
    settings_schema,
    workloads,
)
from helm_engine import manifests as rendered
from prometheus_client import CollectorRegistry, generate_latest
from test_compose import stage
from typer.testing import CliRunner

import baton
import baton.rpc.grpc
import baton_router.app
from baton.certificates import export_expiry
from baton.config import RouterConfig, TlsConfig, WorkerConfig
from baton.settings import env_name, load, load_log
from baton.vllm_metrics import RouterVllmNames
from baton.worker_metrics import WorkerMetrics
from baton_cli.main import app
from baton_router.metrics import RouterMetrics
from baton_router.openai import schema as openai
from baton_router.openai.api import Api

helm = pytest.importorskip("helm_python", reason="Helm's engine (helm-python-sdk) is not installed")
validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

CASES = ("defaults", *EXAMPLES)
KUBE_VERSIONS = (
    "1.30",
    "1.33",
    "1.37",
)  # the oldest that the chart supports, one between, the newest known here
CUSTOM = {
    "Certificate",
    "InferencePool",
    "Issuer",
    "ServiceMonitor",
    "HTTPRoute",
    "PodMonitor",
    "PrometheusRule",
    "ScaledObject",
}  # not Kubernetes' own: no schema here
POD_IP = "10.1.2.3"
REDIS_URL = "rediss://:secret@redis.example.com:6380/0"
SCALED = {"minReplicas": 1, "maxReplicas": 2, "kvUsage": 0.5}
PREPARED = {"HOME", "HF_HOME", "HF_TOKEN", "POD_IP"}  # variables that are neither ours nor UCX's


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> list[Manifest]:
    return rendered(example(request.param))


def config_of(manifests: list[Manifest], workload: Manifest, directory: Path) -> RouterConfig | WorkerConfig:
    container = container_of(workload)
    file = config_file(manifests, workload, directory)
    env = environment(container, pod_ip=POD_IP, secret=REDIS_URL)
    env = {name: value for name, value in env.items() if name.startswith("BATON_")}
    load_log(env, {})
    if container["name"] == "router":
        return load(RouterConfig, file=file, env=env, overrides={})
    return load(WorkerConfig, file=file, env=env, overrides={})


def matches(selector: Manifest, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


# --- Helm and Kubernetes ---


@pytest.mark.parametrize("version", KUBE_VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_manifests_follow_the_schemas_of_kubernetes(name: str, version: str) -> None:
    for manifest in rendered(example(name), kube_version=f"v{version}.0"):
        assert manifest["metadata"]["name"]
        if manifest["kind"] not in CUSTOM:
            check_manifest(json.dumps(manifest), version)


@functools.cache  # most manifests are the same in several examples
def check_manifest(text: str, version: str) -> None:
    validator.validate(json.loads(text), version, strict=True)


@pytest.mark.parametrize("version", KUBE_VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_the_strict_linter_has_nothing_to_say(name: str, version: str) -> None:
    assert lint(example(name), f"v{version}.0") == []


def test_the_oldest_version_tried_is_the_oldest_allowed() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={KUBE_VERSIONS[0]}.0-0"


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"replicas": 2}, "replicas"),
        ({"router": {"replica": 2}}, "replica"),
        ({"router": {"replicas": "two"}}, "replicas"),
        ({"model": {"model": None}}, "model"),
        ({"model": {"modl": "demo"}}, "modl"),
        ({"workers": {"decode": {"gpus": 1}}}, "gpus"),
        ({"workers": {"decode": {"roles": ["decoder"]}}}, "roles"),
        ({"workers": {"decode": {"settings": {"engine": {"block_sise": 32}}}}}, "block_sise"),
        ({"workers": {"decode": {"settings": {"engine": {"max_num_seqs": 0}}}}}, "max_num_seqs"),
        ({"workers": {"decode": {"settings": {"port": 1}}}}, "port"),
        ({"workers": {"decode": {"autoscaling": {"minReplicas": 1}}}}, "maxReplicas"),
        ({"workers": {"decode": {"ucx": {"UCX_TLS": "tcp"}}}}, "UCX_TLS"),
        ({"workers": {"router": {}}}, "router"),
        ({"workers": {"Decode": {}}}, "Decode"),
        ({"tls": {"certManager": {"enabled": True, "issuer": {"kind": "Issuer"}}}}, "name"),
        ({"tls": {"ownAuthority": {"enable": True}}}, "enable"),
        ({"tls": {"ownAuthority": {"days": 0}}}, "days"),
        ({"tls": {"secrets": {"client": "x"}}}, "client"),
        ({"tls": {"domain": "*.example.com"}}, "domain"),
        ({"kvTls": {"secret": "x"}}, "kvTls"),
        ({"env": {"BATON_PORT": "1"}}, "BATON_PORT"),
        ({"images": {"router": {"tag": "latest"}}}, "tag"),
        ({"networkPolicy": {"clients": [{}]}}, "clients"),
    ],
)
def test_mistakes_in_values_are_named(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(helm.HelmValuesError, match=complaint):
        rendered(values)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"redis": {"embedded": False}}, "redis.external.urlSecret"),
        ({"workers": {"decode": {"autoscaling": SCALED}}}, "prometheusUrl"),
        ({"monitoring": {"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}}, "only one"),
        ({"model": {"model": "o/m"}, "models": {"download": True, "readOnly": True}}, "read-only"),
        ({"inferencePool": {"enabled": True}}, "inferencePool.endpointPicker.name"),
        ({"tls": {"secrets": {"router": "a"}, "certManager": {"enabled": True}}}, "only one"),
        ({"tls": {"ownAuthority": {"enabled": True}, "certManager": {"enabled": True}}}, "only one"),
        ({"tls": {"secrets": {"router": "a"}}}, "router and worker need one each"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
        ({"ingress": {"enabled": True, "tlsSecret": "tls"}}, "ingress.host"),
    ],
)  # fmt: skip
def test_what_a_choice_needs_besides_is_named(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=complaint):
        rendered(values)


# --- the chart and the code ---


def test_the_chart_has_the_version_of_the_code() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == baton.__version__


def test_the_schema_knows_the_settings_of_the_code() -> None:
    definitions = json.loads(SCHEMA.read_text())["$defs"]
    for name, config in SETTINGS.items():
        assert definitions[name] == settings_schema(config), "run tests/deploy/helm_engine.py"


def test_the_schema_and_the_values_have_the_same_keys() -> None:
    document = json.loads(SCHEMA.read_text())

    def properties(node: Any) -> dict[str, Any]:
        node = document["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        found: dict[str, Any] = node.get("properties", {})
        return found

    def compare(values: Any, node: Any, path: str) -> None:
        if isinstance(values, dict) and values and properties(node):
            assert set(values) == set(properties(node)) - {"global"}, path
            for key, value in values.items():
                compare(value, properties(node)[key], f"{path}.{key}")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    compare(values, document, "values")
    check_values(values)


def test_every_value_is_used() -> None:
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())

    def names(node: Any) -> Iterator[str]:
        for key, value in node.items():
            yield key
            if isinstance(value, dict) and key not in ("resources", "model", "workers"):
                yield from names(value)

    for name in names(yaml.safe_load((CHART / "values.yaml").read_text())):
        assert re.search(rf'[."]{name}\b', templates), name


@pytest.mark.parametrize("name", CASES)
def test_every_setting_is_one_of_the_code_and_valid(name: str, tmp_path: Path) -> None:
    values = example(name)
    manifests = rendered(values)
    for workload in ours(manifests):
        config = config_of(manifests, workload, tmp_path)
        assert config.host == "0.0.0.0"
        assert config.index.namespace == "prod.demo-baton"
        assert config.model.model == values.get("model", {"model": "demo"})["model"]
        external = values.get("redis", {}).get("embedded") is False
        assert config.index.redis_url == (REDIS_URL if external else "redis://demo-baton-redis:6379/0")
        if isinstance(config, WorkerConfig):
            assert config.advertise_host == config.transfer.advertise_host == POD_IP


def test_settings_arrive_as_written(tmp_path: Path) -> None:
    manifests = rendered(example("2p4d-rdma"))
    decode = next(w for w in ours(manifests) if component(w) == "decode")
    config = config_of(manifests, decode, tmp_path)
    assert isinstance(config, WorkerConfig)
    assert config.engine.kv_cache_bytes == 40 * 2**30  # Helm's numbers are floats
    assert config.model.max_model_len == 32768
    assert config.transfer.transport == "ucx"
    assert config.roles == ("decode",)


def test_what_the_chart_owns_is_set_by_it() -> None:
    left_to_the_code = {"worker_id", "workers", "index.index"}
    set_in_files = {"roles"}
    manifests = rendered({"router": {"apiKeysSecret": "keys"}, "tls": {"ownAuthority": {"enabled": True}}})
    names = {entry["name"] for workload in ours(manifests) for entry in container_of(workload)["env"]}
    assert {env_name(path) for path in CHART_OWNED - left_to_the_code - set_in_files} <= names


def test_other_variables_are_known_to_those_who_read_them(case: list[Manifest]) -> None:
    names = {entry["name"] for workload in ours(case) for entry in container_of(workload)["env"]}
    others = {name for name in names if not name.startswith(("BATON_", "UCX_"))}
    assert others <= PREPARED
    assert {name for name in names if name.startswith("UCX_")} <= ucx_variables()


def ucx_variables() -> set[str]:
    spec = importlib.util.find_spec("libucx")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("UCX, which lists its variables, is not installed")
    home = Path(spec.submodule_search_locations[0])
    env = os.environ | {"LD_LIBRARY_PATH": str(home / "lib")}
    listing = subprocess.run([home / "bin" / "ucx_info", "-cf"], env=env, capture_output=True, text=True)
    return set(re.findall(r"^(UCX_\w+)=", listing.stdout, re.MULTILINE))


def test_every_command_and_flag_is_one_of_baton(case: list[Manifest]) -> None:
    for workload in ours(case):
        container = container_of(workload)
        assert "command" not in container
        assert ("ENTRYPOINT", '["baton"]') in stage(container["name"])
        done = CliRunner().invoke(app, [*container["args"], "--help"])
        assert done.exit_code == 0, done.output


def test_an_init_container_fetches_what_comes_from_the_hub() -> None:
    def inits(model: dict[str, Any]) -> dict[str, list[Manifest]]:
        workloads = ours(rendered({"model": model, "models": {"download": True}}))
        return {component(w): pod_of(w)["spec"].get("initContainers", []) for w in workloads}

    found = inits({"model": "org/some-model", "revision": "v2"})
    assert found.pop("router") == []
    for containers in found.values():
        (init,) = containers
        assert init["args"] == ["fetch", "org/some-model", "--revision=v2"]
        assert CliRunner().invoke(app, [*init["args"], "--help"]).exit_code == 0
        assert init["securityContext"]["readOnlyRootFilesystem"] is True
        assert init["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"name": "HF_HOME", "value": "/models"} in init["env"]
        assert "/models" in {mount["mountPath"] for mount in init["volumeMounts"]}
    assert not any(inits({"model": "demo"}).values())
    assert not any(inits({"model": "/models/mine"}).values())


def test_ports_are_those_that_the_processes_listen_on(case: list[Manifest], tmp_path: Path) -> None:
    for workload in ours(case):
        config = config_of(case, workload, tmp_path)
        listening = (
            {"http": config.port, "grpc": config.grpc_port}
            if isinstance(config, RouterConfig)
            else {
                "grpc": config.port,
                "health": config.health_port,
                "metrics": config.metrics_port,
                "kv": config.transfer.port,
            }
        )
        container = container_of(workload)
        assert {port["name"]: port["containerPort"] for port in container["ports"]} == listening


def test_probes_ask_what_the_processes_answer(case: list[Manifest], tmp_path: Path) -> None:
    paths = {route.path for route in Api(None, None, max_body_bytes=1).routes().routes}  # type: ignore[arg-type, attr-defined]
    for workload in ours(case):
        config, container = config_of(case, workload, tmp_path), container_of(workload)
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[kind]
            if isinstance(config, RouterConfig):
                assert probe["httpGet"]["port"] == "http"
                assert probe["httpGet"]["path"] in paths
            else:
                assert probe["grpc"] == {"port": config.health_port}
        # A busy worker must not be killed for being slow to answer.
        liveness = container["livenessProbe"]
        assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60


def test_a_stopping_pod_has_the_time_that_its_process_takes(case: list[Manifest], tmp_path: Path) -> None:
    clean_up_s = baton_router.app.CLEAN_UP_S + baton.rpc.grpc.CLEAN_UP_S
    for workload in ours(case):
        config, container = config_of(case, workload, tmp_path), container_of(workload)
        before_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        given_s = pod_of(workload)["spec"]["terminationGracePeriodSeconds"]
        assert given_s > before_s + config.stop_grace_s + clean_up_s
        assert (before_s > 0) == isinstance(config, RouterConfig)  # only a router is found through a Service


def test_the_images_are_those_of_the_dockerfile(case: list[Manifest]) -> None:
    for workload in ours(case):
        container = container_of(workload)
        user = f"{pod_of(workload)['spec']['securityContext']['runAsUser']}"
        assert ("USER", f"{user}:{user}") in stage(container["name"])
        assert container["image"].rpartition("/")[2].startswith(f"baton-{container['name']}:")


# --- metrics ---


def metric_names() -> set[str]:
    """Every series that a router or worker can have."""
    names = set()
    for metrics in (WorkerMetrics, RouterMetrics):
        registry = CollectorRegistry()
        metrics(registry)
        export_expiry(None, registry)
        text = generate_latest(registry).decode()
        for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE):
            names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return names


def queries(manifests: list[Manifest]) -> list[str]:
    rules = [
        rule["expr"]
        for manifest in of_kind(manifests, "PrometheusRule")
        for group in manifest["spec"]["groups"]
        for rule in group["rules"]
    ]
    triggers = [
        trigger["metadata"]["query"]
        for manifest in of_kind(manifests, "ScaledObject")
        for trigger in manifest["spec"]["triggers"]
    ]
    return rules + triggers


def test_every_metric_in_dashboards_alerts_and_autoscaling_exists() -> None:
    manifests = rendered(example("autoscaled"))
    asked = queries(manifests) + dashboard_queries(manifests)
    used = {name for query in asked for name in re.findall(r"\bbaton_\w+(?=\{)", query)}
    assert len(used) >= 30
    assert used <= metric_names()


def test_dashboards_are_shipped_as_their_script_makes_them() -> None:
    script = importlib.util.spec_from_file_location(
        "make", CHART.parents[1] / "scripts" / "make_dashboards.py"
    )
    assert script is not None and script.loader is not None
    made = importlib.util.module_from_spec(script)
    script.loader.exec_module(made)
    files = {file.name: file.read_text() for file in (CHART / "dashboards").iterdir()}
    assert files == made.files()
    manifests = rendered(example("autoscaled"))
    shipped = dashboards(manifests)
    assert shipped == {f"baton-{name}": json.loads(text) for name, text in files.items()}
    assert dashboards(rendered({})) == {}
    [labels] = (
        m["metadata"]["labels"]
        for m in of_kind(manifests, "ConfigMap")
        if "dashboards" in m["metadata"]["name"]
    )
    assert labels["grafana_dashboard"] == "1"
    assert {
        "user-experience.json",
        "prefill.json",
        "decode.json",
        "hand-over.json",
        "prefix-cache.json",
    } == set(files)
    for board in shipped.values():
        variables = {variable["name"] for variable in board["templating"]["list"]}
        assert variables == {"datasource", "job"}
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for query in dashboard_queries(manifests):
        assert query.count("{") == query.count('job=~"$job"'), query  # of the chosen fleet only


def test_prometheus_understands_the_queries_of_the_dashboards(tmp_path: Path) -> None:
    """promtool parses them as the expressions of rules."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    rules = [
        {"record": "a", "expr": query.replace("$__rate_interval", "5m")}
        for query in dashboard_queries(rendered(example("autoscaled")))
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(
        yaml.safe_dump({"groups": [{"name": f"g{i}", "rules": [r]} for i, r in enumerate(rules)]})
    )
    done = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_queries_ask_for_this_release_only() -> None:
    manifests = rendered(example("autoscaled"))
    (monitor,) = of_kind(manifests, "PodMonitor")
    job = f'job="prod/{monitor["metadata"]["name"]}"'  # as the operator names it
    for query in queries(manifests):
        selectors = re.findall(r"\b(?:baton_\w+|up)(\{.*?\})", query)
        assert selectors and all(job in selector for selector in selectors), query


def test_a_monitor_of_services_finds_the_same_under_the_same_labels() -> None:
    manifests = rendered({"monitoring": {"serviceMonitor": {"enabled": True}}})
    (monitor,) = of_kind(manifests, "ServiceMonitor")
    endpoints = monitor["spec"]["endpoints"]
    assert monitor["spec"]["targetLabels"] == ["app.kubernetes.io/component"]
    for endpoint in endpoints:
        assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "prod/demo-baton"}]
    wanted = {endpoint["port"] for endpoint in endpoints}
    for service in of_kind(manifests, "Service"):
        assert matches(monitor["spec"]["selector"], service["metadata"]["labels"])
        found = wanted & {port["name"] for port in service["spec"]["ports"]}
        assert len(found) == (component(service) != "redis")


def test_the_monitor_finds_routers_and_workers() -> None:
    manifests = rendered(example("autoscaled"))
    (monitor,) = of_kind(manifests, "PodMonitor")
    wanted = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for workload in ours(manifests):
        assert matches(monitor["spec"]["selector"], pod_of(workload)["metadata"]["labels"])
        assert len(wanted & {port["name"] for port in container_of(workload)["ports"]}) == 1


def test_every_alert_says_what_to_do() -> None:
    (rules,) = of_kind(rendered(example("autoscaled")), "PrometheusRule")
    for rule in rules["spec"]["groups"][0]["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"] and rule["annotations"]["runbook"]


# Of every alert: series under which it fires.
FIRES: dict[str, dict[str, str]] = {
    "BatonNoDecodeWorker": {'baton_router_workers{role="prefill",state="ready"}': "1+0x60"},
    "BatonNoPrefillWorker": {'baton_router_workers{role="decode",state="ready"}': "1+0x60"},
    "BatonWorkerLost": {'baton_router_workers{role="decode",state="lost"}': "1+0x60"},
    "BatonErrors": {
        'baton_router_requests_total{endpoint="/v1/chat/completions",status="200"}': "0+90x60",
        'baton_router_requests_total{endpoint="/v1/chat/completions",status="503"}': "0+10x60",
    },
    "BatonRefusing": {
        'baton_router_requests_total{endpoint="/v1/completions",status="200"}': "0+90x60",
        'baton_router_requests_total{endpoint="/v1/completions",status="429"}': "0+10x60",
    },
    "BatonSlowFirstToken": {
        'baton_router_time_to_first_token_seconds_bucket{le="2.5"}': "0+9x60",
        'baton_router_time_to_first_token_seconds_bucket{le="10.0"}': "0+10x60",
        'baton_router_time_to_first_token_seconds_bucket{le="+Inf"}': "0+10x60",
    },
    "BatonKvFull": {
        'baton_kv_blocks{state="used"}': "99+0x60",
        'baton_kv_blocks{state="total"}': "100+0x60",
    },
    "BatonHandOversFail": {
        'baton_transfer_seconds_count{direction="received",outcome="ok"}': "0+90x60",
        'baton_transfer_seconds_count{direction="received",outcome="expired"}': "0+10x60",
    },
    "BatonKvDamaged": {'baton_transfer_digest_mismatches_total{direction="received"}': "0+1x60"},
    "BatonIndexLost": {"baton_router_index_healthy": "0+0x60"},
    "BatonCertificateExpires": {"baton_certificate_expiry_timestamp_seconds": "600000+0x60"},
    "BatonSilent": {"up": "0+0x60"},
}
# A fleet that is well: nothing fires.
WELL = {
    "up": "1+0x60",
    "baton_router_index_healthy": "1+0x60",
    "baton_certificate_expiry_timestamp_seconds": "8000000+0x60",
    'baton_router_workers{role="prefill",state="ready"}': "1+0x60",
    'baton_router_workers{role="decode",state="ready"}': "1+0x60",
    'baton_router_requests_total{endpoint="/v1/chat/completions",status="200"}': "0+100x60",
    'baton_router_requests_total{endpoint="unknown",status="404"}': "0+100x60",
    'baton_router_time_to_first_token_seconds_bucket{le="1.0"}': "0+100x60",
    'baton_router_time_to_first_token_seconds_bucket{le="+Inf"}': "0+100x60",
    'baton_kv_blocks{state="used"}': "10+0x60",
    'baton_kv_blocks{state="total"}': "100+0x60",
    'baton_transfer_seconds_count{direction="received",outcome="ok"}': "0+100x60",
    'baton_transfer_digest_mismatches_total{direction="received"}': "0+0x60",
}


def test_every_alert_fires_and_none_does_when_all_is_well(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    (manifest,) = of_kind(rendered(example("autoscaled")), "PrometheusRule")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(manifest["spec"]))
    names = [rule["alert"] for rule in manifest["spec"]["groups"][0]["rules"]]
    assert set(FIRES) == set(names)
    tests = [rule_test(name, series, fires=True) for name, series in FIRES.items()]
    tests += [rule_test(name, WELL, fires=False) for name in names]
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": tests}))
    done = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def rule_test(alert: str, series: dict[str, str], *, fires: bool) -> dict[str, Any]:
    """One of `promtool test rules`: whether the alert fires after half an hour."""
    scraped = 'job="prod/demo-baton",pod="a",app_kubernetes_io_component="decode"'
    inputs = [
        {
            "series": name.replace("}", f",{scraped}}}") if "{" in name else f"{name}{{{scraped}}}",
            "values": values,
        }
        for name, values in series.items()
    ]
    number = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)'
    samples = [{"labels": "{}", "value": int(fires)}]
    return {
        "name": alert,
        "interval": "1m",
        "input_series": inputs,
        "promql_expr_test": [{"expr": number, "eval_time": "30m", "exp_samples": samples}],
    }


def test_autoscalers_scale_what_is_there_and_nobody_else_does() -> None:
    manifests = rendered(example("autoscaled"))
    there = {(w["kind"], w["metadata"]["name"]): w for w in workloads(manifests)}
    scalers = of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject")
    assert len(scalers) == 3
    for scaler in scalers:
        target = scaler["spec"]["scaleTargetRef"]
        assert "replicas" not in there[target["kind"], target["name"]]["spec"]


def test_a_fleet_may_scale_to_zero_and_still_hear_of_requests() -> None:
    def readiness(scaling: dict[str, Any], **others: Any) -> str:
        values = {"workers": {"decode": {"autoscaling": scaling}, **others}}
        manifests = rendered(values | {"monitoring": {"prometheusUrl": "http://prometheus"}})
        (router,) = (w for w in ours(manifests) if component(w) == "router")
        path: str = container_of(router)["readinessProbe"]["httpGet"]["path"]
        return path

    zero = {"minReplicas": 0, "maxReplicas": 4, "kvUsage": 0.8}
    assert readiness(zero) == "/health"
    assert readiness({**zero, "minReplicas": 1}) == "/ready"
    assert readiness(zero, spare={"roles": ["decode"]}) == "/ready"

    scalers = of_kind(rendered(example("autoscaled")), "ScaledObject")
    for scaler in scalers:
        spec = scaler["spec"]
        from_zero = [t["metadata"] for t in spec["triggers"] if "activationThreshold" in t["metadata"]]
        assert len(from_zero) == (spec["minReplicaCount"] == 0)
        for trigger in from_zero:  # the workers that are not there say nothing
            asked = set(re.findall(r"\b(baton_\w+)\{", trigger["query"]))
            assert asked == {"baton_router_num_requests_running", "baton_router_unserved_requests_total"}


# --- names, selectors, networks ---


def test_selectors_never_change_and_select_one_workload(case: list[Manifest]) -> None:
    pods = [pod_of(workload)["metadata"]["labels"] for workload in workloads(case)]
    selectors = [workload["spec"]["selector"] for workload in workloads(case)]
    selectors += [{"matchLabels": service["spec"]["selector"]} for service in of_kind(case, "Service")]
    selectors += [budget["spec"]["selector"] for budget in of_kind(case, "PodDisruptionBudget")]
    for selector in selectors:
        assert not any("version" in label or "chart" in label for label in selector["matchLabels"])
        assert sum(matches(selector, labels) for labels in pods) == 1


def test_services_lead_to_ports_that_exist(case: list[Manifest]) -> None:
    for service in of_kind(case, "Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        (container,) = (
            container_of(w) for w in workloads(case) if matches(selector, pod_of(w)["metadata"]["labels"])
        )
        names = {port["name"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
        headless = service["spec"].get("clusterIP") == "None"
        assert headless == (container["name"] == "worker")


def test_only_the_api_is_reached_from_outside() -> None:
    manifests = rendered(example("autoscaled"))
    services = {service["metadata"]["name"]: service for service in of_kind(manifests, "Service")}
    (ingress,), (route,) = of_kind(manifests, "Ingress"), of_kind(manifests, "HTTPRoute")
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    backend = path["backend"]["service"]
    assert path["path"] == "/v1"
    assert backend["port"]["name"] in {p["name"] for p in services[backend["name"]]["spec"]["ports"]}
    (rule,) = route["spec"]["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]
    (target,) = rule["backendRefs"]
    assert target["port"] in {p["port"] for p in services[target["name"]]["spec"]["ports"]}


def test_an_inference_pool_holds_the_routers_and_takes_the_route() -> None:
    pool_values = {"enabled": True, "endpointPicker": {"name": "picker"}}
    manifests = rendered(example("autoscaled") | {"inferencePool": pool_values})
    (pool,), (route,) = of_kind(manifests, "InferencePool"), of_kind(manifests, "HTTPRoute")
    (rule,) = route["spec"]["rules"]
    assert rule["backendRefs"] == [
        {"group": pool["apiVersion"].split("/")[0], "kind": "InferencePool", "name": pool["metadata"]["name"]}
    ]
    (port,) = pool["spec"]["targetPorts"]
    found = [w for w in ours(manifests) if matches(pool["spec"]["selector"], pod_of(w)["metadata"]["labels"])]
    assert [component(w) for w in found] == ["router"]
    assert {"name": "http", "containerPort": port["number"]} in container_of(found[0])["ports"]


def test_routers_have_the_metrics_that_endpoint_pickers_read() -> None:
    registry = CollectorRegistry()
    RouterMetrics(registry)
    registry.register(RouterVllmNames(registry, "demo", "router"))
    told = generate_latest(registry).decode()
    for name in ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        assert f"# TYPE {name} gauge" in told


@pytest.mark.parametrize(
    ("source", "target", "port", "expected"),
    [
        ("router", "prefill", "grpc", True),
        ("router", "decode", "grpc", True),
        ("router", "decode", "kv", False),
        ("router", "redis", "redis", True),
        ("prefill", "decode", "kv", True),
        ("decode", "prefill", "kv", True),
        ("prefill", "decode", 50060, True),
        ("prefill", "decode", "grpc", True),
        ("prefill", "prefill", "grpc", True),
        ("prefill", "decode", "health", False),
        ("router", "decode", "health", False),
        ("decode", "redis", "redis", True),
        ("decode", "router", "http", False),
        ("decode", "router", 50052, False),
        ("redis", "decode", "grpc", False),
        ("stranger", "router", "http", True),
        ("stranger", "router", "grpc", True),
        ("stranger", "decode", "grpc", False),
        ("stranger", "decode", "kv", False),
        ("stranger", "decode", "metrics", True),
        ("stranger", "redis", "redis", False),
    ],
)
def test_who_may_speak_to_whom(source: str, target: str, port: str | int, expected: bool) -> None:
    manifests = rendered({})
    pods = {component(w): pod_of(w)["metadata"]["labels"] for w in workloads(manifests)}
    pods["stranger"] = {"app": "stranger"}
    containers = {component(w): container_of(w) for w in workloads(manifests)}
    ports = {
        name: {p["name"]: p["containerPort"] for p in container["ports"]}
        for name, container in containers.items()
    }
    number = port if isinstance(port, int) else ports[target][port]
    policies = of_kind(manifests, "NetworkPolicy")
    out = allowed(policies, "egress", "to", pods[source], pods[target], number)
    into = allowed(policies, "ingress", "from", pods[target], pods[source], number)
    assert (out and into) == expected


def allowed(
    policies: list[Manifest], way: str, peers: str, own: dict[str, str], other: dict[str, str], port: int
) -> bool:
    """What the policies on one side of a connection say; with no policy on it, all is allowed."""
    rules = [policy["spec"] for policy in policies if matches(policy["spec"]["podSelector"], own)]
    return not rules or any(
        any(entry["port"] <= port <= entry.get("endPort", entry["port"]) for entry in rule["ports"])
        and (peers not in rule or any(is_peer(peer, other) for peer in rule[peers]))
        for spec in rules
        for rule in spec[way]
    )


def is_peer(peer: Manifest, labels: dict[str, str]) -> bool:
    assert set(peer) <= {"podSelector", "namespaceSelector"}
    return matches(peer.get("podSelector", {}), labels)


def test_clients_and_monitoring_can_be_named() -> None:
    policies = of_kind(rendered(example("2p4d-rdma")), "NetworkPolicy")
    open_rules = [rule for p in policies for rule in p["spec"]["ingress"] if not rule.get("from")]
    assert open_rules == []


def test_every_pod_has_a_policy(case: list[Manifest]) -> None:
    for workload in workloads(case):
        labels = pod_of(workload)["metadata"]["labels"]
        assert any(matches(p["spec"]["podSelector"], labels) for p in of_kind(case, "NetworkPolicy"))


# --- hardening ---


def test_pods_pass_the_restricted_level(case: list[Manifest]) -> None:
    for workload in [*workloads(case), *of_kind(case, "Job")]:
        spec, container = pod_of(workload)["spec"], container_of(workload)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        kinds = {kind for volume in spec.get("volumes", ()) for kind in volume} - {"name"}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert all("hostPort" not in port for port in container.get("ports", ()))


def test_pods_hold_no_identity_and_see_no_services(case: list[Manifest]) -> None:
    (account,) = (a for a in of_kind(case, "ServiceAccount") if not is_hook(a))
    assert account["automountServiceAccountToken"] is False
    for workload in workloads(case):
        spec = pod_of(workload)["spec"]
        assert spec["serviceAccountName"] == account["metadata"]["name"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False  # BATON_ROUTER_PORT=tcp://... would be taken for a setting


def test_secrets_are_named_and_never_written(case: list[Manifest]) -> None:
    assert of_kind(case, "Secret") == []
    for workload in ours(case):
        for entry in container_of(workload)["env"]:
            assert entry["name"] != "HF_TOKEN" or set(entry["valueFrom"]) == {"secretKeyRef"}


def test_api_keys_come_from_a_secret_to_the_router_alone(tmp_path: Path) -> None:
    manifests = rendered({"router": {"apiKeysSecret": "keys"}})
    for workload in ours(manifests):
        volumes, config = pod_of(workload)["spec"]["volumes"], config_of(manifests, workload, tmp_path)
        secrets = [volume["secret"] for volume in volumes if "secret" in volume]
        if not isinstance(config, RouterConfig):
            assert secrets == []
            continue
        (secret,) = secrets
        (mount,) = (m for m in container_of(workload)["volumeMounts"] if m["name"] == "api-keys")
        assert secret["secretName"] == "keys"
        assert config.api_keys_file == f"{mount['mountPath']}/{secret['items'][0]['path']}"
    assert "Bearer $API_KEY" in notes({"router": {"apiKeysSecret": "keys"}})


@pytest.mark.parametrize(
    "choice",
    [
        {"secrets": {"router": "demo-baton-tls-router", "worker": "demo-baton-tls-worker"}},
        {"certManager": {"enabled": True}},
        {"ownAuthority": {"enabled": True}},
    ],
    ids=lambda choice: next(iter(choice)),
)
def test_router_and_workers_find_their_certificates(tmp_path: Path, choice: dict[str, Any]) -> None:
    manifests = rendered({"tls": choice})
    for workload in ours(manifests):
        config, role = config_of(manifests, workload, tmp_path), container_of(workload)["name"]
        (secret,) = (volume["secret"] for volume in pod_of(workload)["spec"]["volumes"] if "secret" in volume)
        (mount,) = (m for m in container_of(workload)["volumeMounts"] if m["name"] == "tls")
        files = (f"{mount['mountPath']}/{key}" for key in ("tls.crt", "tls.key", "ca.crt"))
        assert config.tls == TlsConfig(*files, "demo-baton.prod.svc")
        assert secret["secretName"] == f"demo-baton-tls-{role}"
        assert "subPath" not in mount  # such a mount never sees a renewed Secret


def test_the_domain_of_the_certificates_can_be_named(tmp_path: Path) -> None:
    manifests = rendered({"tls": {"domain": "fleet.example", "certManager": {"enabled": True}}})
    names = [name for c in of_kind(manifests, "Certificate") for name in c["spec"].get("dnsNames", ())]
    assert names == ["router.fleet.example", "worker.fleet.example"]
    assert {config_of(manifests, w, tmp_path).tls.domain for w in ours(manifests)} == {"fleet.example"}


def test_cert_manager_signs_with_an_authority_of_the_release_or_a_given_one() -> None:
    own = rendered({"tls": {"certManager": {"enabled": True}}})
    issuers = {issuer["metadata"]["name"] for issuer in of_kind(own, "Issuer")}
    certificates = {c["metadata"]["name"]: c["spec"] for c in of_kind(own, "Certificate")}
    assert (len(issuers), len(certificates)) == (2, 3)
    assert {spec["issuerRef"]["name"] for spec in certificates.values()} == issuers
    for role in ("router", "worker"):
        leaf = certificates[f"demo-baton-tls-{role}"]
        assert {"server auth", "client auth"} <= set(leaf["usages"])
        assert leaf["secretName"] == f"demo-baton-tls-{role}"
        assert leaf["dnsNames"] == [f"{role}.demo-baton.prod.svc"]
    (authority,) = (i["spec"]["ca"] for i in of_kind(own, "Issuer") if "ca" in i["spec"])
    assert authority["secretName"] == certificates["demo-baton-tls-ca"]["secretName"]

    issuer = {"name": "company", "kind": "ClusterIssuer"}
    given = rendered({"tls": {"certManager": {"enabled": True, "issuer": issuer}}})
    assert of_kind(given, "Issuer") == []
    for certificate in of_kind(given, "Certificate"):
        assert certificate["spec"]["issuerRef"] == {"group": "cert-manager.io", **issuer}


def test_a_router_whose_grpc_is_under_tls_is_not_announced_as_plain() -> None:
    def protocols(settings: dict[str, Any]) -> dict[str, str | None]:
        manifests = rendered({"router": {"settings": settings}, "tls": {"ownAuthority": {"enabled": True}}})
        (service,) = (s for s in of_kind(manifests, "Service") if component(s) == "router")
        return {port["name"]: port.get("appProtocol") for port in service["spec"]["ports"]}

    assert protocols({})["grpc"] == protocols({"grpc_tls": "none"})["grpc"] == "kubernetes.io/h2c"
    assert protocols({"grpc_tls": "mutual"})["grpc"] is None


# --- the hook that makes certificates ---

OWN = {"tls": {"ownAuthority": {"enabled": True}}}


def is_hook(manifest: Manifest) -> bool:
    return "helm.sh/hook" in manifest["metadata"].get("annotations", {})


def test_the_hook_is_all_that_may_speak_to_the_cluster_and_only_while_it_runs() -> None:
    manifests = rendered(OWN)
    kinds = ("ServiceAccount", "Role", "RoleBinding", "Job")
    hooks = {kind: [m for m in of_kind(manifests, kind) if is_hook(m)] for kind in kinds}
    assert sorted(m["kind"] for m in manifests if is_hook(m)) == sorted(kinds)
    (account,), (role,), (binding,), (job,) = hooks.values()
    for manifest in (account, role, binding, job):
        annotations = manifest["metadata"]["annotations"]
        assert annotations["helm.sh/hook"] == "pre-install,pre-upgrade"
        assert "hook-succeeded" in annotations["helm.sh/hook-delete-policy"]
    weights = [int(m["metadata"]["annotations"]["helm.sh/hook-weight"]) for m in (role, binding, job)]
    assert weights == sorted(set(weights))
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [s["name"] for s in binding["subjects"]] == [account["metadata"]["name"]]
    assert pod_of(job)["spec"]["serviceAccountName"] == account["metadata"]["name"]
    assert pod_of(job)["spec"]["enableServiceLinks"] is False
    assert of_kind(rendered({}), "Role", "RoleBinding", "Job") == []


def test_the_hook_may_touch_its_own_secrets_only() -> None:
    (role,) = of_kind(rendered(OWN), "Role")
    mounted = {f"demo-baton-tls-{name}" for name in ("ca", "router", "worker")}
    for rule in role["rules"]:
        assert (rule["apiGroups"], rule["resources"]) == ([""], ["secrets"])
        if rule["verbs"] != ["create"]:  # which no rule can bind to a name
            assert set(rule["resourceNames"]) == mounted
            assert set(rule["verbs"]) == {"get", "update"}


def test_containers_are_complete(case: list[Manifest]) -> None:
    for workload in workloads(case):
        container = container_of(workload)
        assert re.fullmatch(r"[^@]+(:[^:@/]+|@sha256:[0-9a-f]{64})", container["image"])
        assert not container["image"].endswith(":latest")
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]
        assert {"readinessProbe", "livenessProbe"} <= set(container)


def test_devices_go_to_workers_only() -> None:
    for workload in ours(rendered(example("2p4d-rdma"))):
        container = container_of(workload)
        devices = {"nvidia.com/gpu": 1, "rdma/hca_shared_devices_a": 1}
        is_worker = container["name"] == "worker"
        assert (devices.items() <= container["resources"]["limits"].items()) == is_worker
        assert (devices.items() <= container["resources"]["requests"].items()) == is_worker


def test_every_pod_can_be_evicted(case: list[Manifest]) -> None:
    budgets = of_kind(case, "PodDisruptionBudget")
    assert {component(b) for b in budgets} == {component(w) for w in ours(case)}
    assert all(budget["spec"]["maxUnavailable"] == 1 for budget in budgets)


# --- pools ---


def test_pools_may_have_any_name_and_number() -> None:
    workers = {
        "prefill": None,
        "decode": None,
        "both": {"roles": ["prefill", "decode"], "replicas": 0},
        "big": {"kind": "StatefulSet", "replicas": 3},
    }
    manifests = rendered({"workers": workers})
    pools = {component(w): w for w in ours(manifests) if container_of(w)["name"] == "worker"}
    assert set(pools) == {"both", "big"}
    assert pools["both"]["spec"]["replicas"] == 0
    assert (pools["big"]["kind"], pools["big"]["spec"]["replicas"]) == ("StatefulSet", 3)
    services = {service["metadata"]["name"] for service in of_kind(manifests, "Service")}
    assert pools["big"]["spec"]["serviceName"] in services


def test_a_pool_says_what_differs_from_the_defaults() -> None:
    values = {
        "workerDefaults": {"settings": {"engine": {"max_num_seqs": 8, "block_size": 32}}},
        "workers": {"decode": {"surge": False, "settings": {"engine": {"max_num_seqs": 16}}}},
    }
    manifests = rendered(values)
    (config,) = of_kind(manifests, "ConfigMap")
    engines = {
        pool: yaml.safe_load(config["data"][f"{pool}.yaml"])["engine"] for pool in ("prefill", "decode")
    }
    assert engines["prefill"] == {"max_num_seqs": 8, "block_size": 32}
    assert engines["decode"] == {"max_num_seqs": 16, "block_size": 32}
    surges = {component(w): w["spec"]["strategy"]["rollingUpdate"]["maxSurge"] for w in ours(manifests)}
    assert surges == {"router": 1, "prefill": 1, "decode": 0}


def test_only_pods_whose_settings_change_restart() -> None:
    def pods(values: dict[str, Any]) -> dict[str, Manifest]:
        return {component(w): pod_of(w) for w in ours(rendered(values))}

    before, after = pods({}), pods({"workers": {"decode": {"settings": {"engine": {"max_num_seqs": 16}}}}})
    assert {name for name in before if before[name] != after[name]} == {"decode"}


def test_long_names_fit() -> None:
    for manifest in rendered({}, name="a" * 53):
        assert len(manifest["metadata"]["name"]) <= 63


# --- what the user reads ---


def test_the_notes_say_whether_pods_speak_in_the_clear() -> None:
    assert "in the clear" in notes({})
    assert "valid for 365 days" in notes(OWN)
    given = notes({"tls": {"secrets": {"router": "a", "worker": "b"}}})
    assert "in the clear" not in given and "valid for" not in given


@pytest.mark.parametrize("name", CASES)
def test_the_first_request_of_the_notes_is_a_valid_one(name: str) -> None:
    text = notes(example(name))
    manifests = rendered(example(name))
    (service,) = (s for s in of_kind(manifests, "Service") if component(s) == "router")
    assert f"service/{service['metadata']['name']} 8000:{service['spec']['ports'][0]['port']}" in text
    body = first_request(text)
    request = openai.parse(openai.ChatCompletionRequest, body)
    model = example(name).get("model", {"model": "demo"})
    assert request.model == model.get("served_model_name", [model["model"]])[0]
