"""The survey of model types: what the loader goes by is what comes out when it is run again, and each refusal has a
reason.

Only a part of the types is run here; `make survey` runs them all.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from reference import make_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typer.testing import CliRunner

from baton.errors import ConfigError
from baton.model.support import TABLES, Survey, Verdict, installed_survey, read_survey, write_survey
from baton_cli.main import app

SCRIPT = Path(__file__).parents[1] / "scripts" / "survey_models.py"
OK = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "phi3",
    "gpt_neox",
    "gpt2",
    "opt",
    "gpt_oss",
    "cohere2",
    "olmo2",
    "phimoe",
    "llama4_text",
    "mimo_v2_flash",
]
REFUSED = ["bloom", "falcon", "mamba", "jamba", "lfm2", "diffllama", "inkling_text", "whisper"]

SURVEY = installed_survey()
this_transformers = pytest.mark.skipif(
    SURVEY.transformers != transformers.__version__,
    reason=f"the table is of transformers {SURVEY.transformers}, not of {transformers.__version__}",
)


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    table = tmp_path_factory.mktemp("survey") / "table.json"
    command = [sys.executable, SCRIPT, "--types", ",".join(OK + REFUSED), "--table", table]
    subprocess.run(command, check=True, capture_output=True, timeout=250)
    return read_survey(table)


def test_the_answers_of_these_types_are_those_of_generate(again: Survey) -> None:
    assert {name: verdict for name in OK if (verdict := again.types[name]).verdict != "ok"} == {}


def test_these_types_are_refused_and_never_wrong(again: Survey) -> None:
    assert {name: again.types[name].verdict for name in REFUSED} == dict.fromkeys(REFUSED, "refused")
    assert all(again.types[name].reason for name in REFUSED)


@this_transformers
def test_the_table_says_the_same(again: Survey) -> None:
    assert again.types == {name: SURVEY.types[name] for name in again.types}


@this_transformers
def test_the_table_has_every_causal_type() -> None:
    assert set(SURVEY.types) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(SURVEY.supported) >= 95
    assert all(verdict.reason for verdict in SURVEY.types.values() if verdict.verdict != "ok")


def test_a_table_survives_writing(tmp_path: Path) -> None:
    survey = Survey("1.2.3", {"a": Verdict("ok"), "b": Verdict("wrong", 'says "so"')})
    write_survey(survey, tmp_path / "table.json")
    assert read_survey(tmp_path / "table.json") == survey
    assert survey.supported == ["a"] and 'says "so"' in (survey.why_not("b") or "")
    assert survey.why_not("a") is None and "1.2.3" in (survey.why_not("c") or "")


def test_a_version_without_a_table_goes_by_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Survey("1.0", {"a": Verdict("ok"), "b": Verdict("ok"), "gone": Verdict("ok")})
    new = Survey("1.2", {"a": Verdict("ok"), "b": Verdict("wrong", "x"), "new": Verdict("ok")})
    for survey in (old, new):
        write_survey(survey, tmp_path / f"{survey.transformers}.json")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.1")
    between = installed_survey(tmp_path)
    assert between == Survey("1.0 and 1.2", {"a": Verdict("ok"), "b": Verdict("wrong", "x")})
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.2")
    assert installed_survey(tmp_path) == new


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_every_table_supports_the_great_families(path: Path) -> None:
    survey = read_survey(path)
    assert survey.transformers == path.stem
    assert len(survey.supported) >= 95 and not set(OK) - set(survey.supported)


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    for content in ("{", "[]", '{"transformers": "1", "types": {"a": {}}}'):
        table.write_text(content)
        with pytest.raises(ConfigError, match=r"table\.json is not a survey"):
            read_survey(table)


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_lists_every_type_with_its_reason() -> None:
    lines = CliRunner().invoke(app, ["models"]).output.splitlines()
    assert lines[0].startswith(f"{len(SURVEY.supported)} of {len(SURVEY.types)} causal types of transformers")
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [
        *SURVEY.supported,
        *(name for name in SURVEY.types if name not in SURVEY.supported),
    ]
    bloom = next(line for line in lines if line.split()[0] == "bloom")
    assert SURVEY.types["bloom"].reason in bloom


def test_the_list_needs_no_torch() -> None:
    code = (
        "import sys, rich.console, baton_cli.models as m; m.list_types(rich.console.Console());"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_command_knows_one_checkpoint(tmp_path: Path) -> None:
    directory = make_model("gqa", tmp_path)
    answer = CliRunner().invoke(app, ["models", str(directory)])
    assert answer.exit_code == 0 and "'llama': supported, up to 2048 tokens" in answer.output
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
    error = CliRunner().invoke(app, ["models", str(directory)]).exception
    assert isinstance(error, ConfigError) and "'bloom', which is not supported" in error.message
