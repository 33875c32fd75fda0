"""Settings: precedence, and one clear line for every mistake."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from baton.config import LogConfig, RouterConfig, UpConfig, WorkerConfig, describe
from baton.errors import ConfigError
from baton.messages import Role
from baton.settings import env_name, load, load_log


def read(
    cls: type, *, text: str | None = None, env: dict[str, str] | None = None, tmp: Path, **flags: Any
) -> Any:
    file = None
    if text is not None:
        file = tmp / "baton.yaml"
        file.write_text(text)
    return load(cls, file=file, env=env or {}, overrides={k.replace("__", "."): v for k, v in flags.items()})


def complaint(cls: type, tmp_path: Path, **how: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(cls, tmp=tmp_path, **how)
    assert "\n" not in caught.value.message
    return caught.value.message.replace(str(tmp_path), "DIR")


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    text, env = "engine: {block_size: 64, max_num_seqs: 7}", {"BATON_ENGINE__BLOCK_SIZE": "32"}
    assert read(WorkerConfig, tmp=tmp_path).engine.block_size == 16
    assert read(WorkerConfig, tmp=tmp_path, text=text).engine.block_size == 64
    assert read(WorkerConfig, tmp=tmp_path, text=text, env=env).engine.block_size == 32
    both = read(WorkerConfig, tmp=tmp_path, text=text, env=env, engine__block_size=128)
    assert (both.engine.block_size, both.engine.max_num_seqs) == (128, 7)


def test_a_flag_that_was_not_given_changes_nothing(tmp_path: Path) -> None:
    assert read(RouterConfig, tmp=tmp_path, env={"BATON_PORT": "9000"}, port=None).port == 9000


def test_an_empty_variable_counts_as_absent(tmp_path: Path) -> None:
    assert read(RouterConfig, tmp=tmp_path, env={"BATON_PORT": ""}).port == RouterConfig.port


def test_a_variable_may_name_a_file_that_holds_the_value(tmp_path: Path) -> None:
    secret = tmp_path / "redis_url"
    secret.write_text("redis://:secret@redis:6379/0\n")
    config = load(WorkerConfig, file=None, env={"BATON_INDEX__REDIS_URL_FILE": str(secret)}, overrides={})
    assert config.index.redis_url == "redis://:secret@redis:6379/0"


def test_a_value_and_a_file_for_it_are_one_too_many(tmp_path: Path) -> None:
    env = {"BATON_INDEX__REDIS_URL": "redis://a", "BATON_INDEX__REDIS_URL_FILE": str(tmp_path / "b")}
    with pytest.raises(ConfigError, match="both set"):
        load(WorkerConfig, file=None, env=env, overrides={})


def test_a_secret_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    env = {"BATON_INDEX__REDIS_URL_FILE": str(tmp_path / "absent")}
    with pytest.raises(ConfigError, match=r"BATON_INDEX__REDIS_URL_FILE: cannot read .*absent: No such file"):
        load(WorkerConfig, file=None, env=env, overrides={})


def test_environment_text_becomes_the_declared_type(tmp_path: Path) -> None:
    env = {
        "BATON_ROLES": "prefill, decode",
        "BATON_MODEL__SERVED_MODEL_NAME": "a,b",
        "BATON_ENGINE__ENABLE_PREFIX_CACHING": "false",
        "BATON_TRANSFER__LEASE_S": "2.5",
        "BATON_MODEL__MODEL": "123",
        "BATON_LOG_LEVEL": "debug",  # reserved, not a setting of the worker
    }
    config = read(WorkerConfig, tmp=tmp_path, env=env)
    assert config.roles == (Role.PREFILL, Role.DECODE)
    assert config.model.served_model_name == ("a", "b")
    assert config.engine.enable_prefix_caching is False
    assert config.transfer.lease_s == 2.5
    assert config.model.model == "123"


def test_json_is_a_config_file_and_a_config_survives_the_trip(tmp_path: Path) -> None:
    config = WorkerConfig(worker_id="p0", roles=(Role.PREFILL, Role.DECODE), metrics_port=0)
    assert read(WorkerConfig, tmp=tmp_path, text=json.dumps(asdict(config))) == config


def test_one_file_and_environment_serve_all_components(tmp_path: Path) -> None:
    text, env = "engine: {block_size: 32}\nmax_num_requests: 5", {"BATON_PREFILL": "3"}
    assert read(RouterConfig, tmp=tmp_path, text=text, env=env).max_num_requests == 5
    assert read(WorkerConfig, tmp=tmp_path, text=text, env=env).engine.block_size == 32
    assert read(UpConfig, tmp=tmp_path, text=text, env=env).prefill == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("engine: {blok_size: 8}", "unknown setting engine.blok_size; did you mean engine.block_size?"),
        ("block_size: 8", "unknown setting block_size; did you mean engine.block_size?"),
        ("zzz: 1", "unknown setting zzz"),
        ("engine: 5", "engine must be a section with settings, got 5"),
        ("[1, 2]", "the file must be a section with settings, got [1, 2]"),
        ("engine: {block_size: 24}", "engine.block_size: must be a power of two, got 24"),
        ("engine: {block_size: 0}", "engine.block_size: must be a power of two, got 0"),
        ("engine: {block_size: '8'}", "engine.block_size: must be a valid integer, got '8'"),
        ("engine: {block_size: true}", "engine.block_size: must be a valid integer, got True"),
        (
            "engine: {enable_prefix_caching: 1}",
            "engine.enable_prefix_caching: must be a valid boolean, got 1",
        ),
        ("engine: {max_num_seqs: -1}", "engine.max_num_seqs: must be greater than or equal to 1, got -1"),
        ("port: 70000", "port: must be less than or equal to 65535, got 70000"),
        ("transfer: {lease_s: .nan}", "transfer.lease_s: must be"),
        (
            "transfer: {transport: rdma}",
            "transfer.transport: must be 'auto', 'shm', 'ucx' or 'tcp', got 'rdma'",
        ),
        ("roles: [cook]", "roles: must be 'prefill' or 'decode', got ['cook']"),
        ("roles: []", "roles: at least one of prefill, decode"),
        ("model: {served_model_name: a}", "model.served_model_name: must be a valid"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_mistake_in_the_file_is_named_by_its_path(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in complaint(WorkerConfig, tmp_path, text=text)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (
            {"BATON_ENGINE__BLOK_SIZE": "8"},
            "unknown environment variable BATON_ENGINE__BLOK_SIZE; did you mean BATON_ENGINE__BLOCK_SIZE?",
        ),
        (
            {"BATON_LOGLEVEL": "x"},
            "unknown environment variable BATON_LOGLEVEL; did you mean BATON_LOG_LEVEL?",
        ),
        (
            {"BATON_PORT": "eighty"},
            "BATON_PORT: must be a valid integer, unable to parse string as an integer, got 'eighty'",
        ),
        ({"BATON_ENGINE__BLOCK_SIZE": "24"}, "BATON_ENGINE__BLOCK_SIZE: must be a power of two, got '24'"),
        (
            {"BATON_PORT": "tcp://10.0.0.1:80"},
            "BATON_PORT=tcp://10.0.0.1:80 comes from a Kubernetes Service; "
            "set enableServiceLinks: false in the pod",
        ),
    ],
)
def test_a_mistake_in_the_environment_is_named_by_its_variable(
    tmp_path: Path, env: dict[str, str], expected: str
) -> None:
    assert complaint(UpConfig, tmp_path, env=env | {"BATON_ENGINE__NUM_THREADS": "2"}) == expected


def test_a_mistake_in_a_flag_is_named_by_the_flag(tmp_path: Path) -> None:
    assert (
        complaint(WorkerConfig, tmp_path, engine__block_size=24)
        == "--block-size: must be a power of two, got 24"
    )


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config file .*nope.yaml: No such file"):
        load(RouterConfig, file=tmp_path / "nope.yaml", env={}, overrides={})


def test_log_settings_come_from_flags_before_the_environment() -> None:
    env = {"BATON_LOG_LEVEL": "warning", "BATON_LOG_FORMAT": "json"}
    assert load_log(env, {"level": "debug", "format": None}) == LogConfig(level="debug", format="json")
    with pytest.raises(ConfigError, match="BATON_LOG_LEVEL: must be 'debug', "):
        load_log({"BATON_LOG_LEVEL": "loud"}, {})


@pytest.mark.parametrize("cls", [UpConfig, RouterConfig, WorkerConfig, LogConfig])
def test_every_setting_is_described_and_has_a_valid_default(cls: type) -> None:
    settings = describe(cls)
    assert settings
    for setting in settings:
        assert setting.doc, f"{cls.__name__}.{setting.path} has no comment that documents it"
    if cls is not LogConfig:
        given = {setting.path: setting.default for setting in settings}
        assert load(cls, file=None, env={}, overrides=given) == cls()


def test_up_changes_only_where_redis_is() -> None:
    router = {setting.path: setting.default for setting in describe(RouterConfig)}
    up = {setting.path: setting.default for setting in describe(UpConfig)}
    assert {path for path in router if router[path] != up[path]} == {"index.redis_url"}
    assert env_name("index.redis_url") == "BATON_INDEX__REDIS_URL"
