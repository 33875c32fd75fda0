"""The survey of model types: what the loader goes by is what comes out when all of them are run again, and each refusal
has a reason.

A version of transformers without a table of its own goes by what all tables agree on: that is run again as well.
"""

import importlib
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
from baton.model import layers
from baton.model.loader import load_config
from baton.model.support import TABLES, Survey, Verdict, installed_survey, read_survey, write_survey
from baton_cli.main import app

SCRIPT = Path(__file__).parents[1] / "scripts" / "survey_models.py"
FAMILIES = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_neox",
]

SURVEY = installed_survey()
this_transformers = pytest.mark.skipif(
    SURVEY.transformers != transformers.__version__,
    reason=f"the table is of transformers {SURVEY.transformers}, not of {transformers.__version__}",
)


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    """Every registered causal type, about a minute of CPU time."""
    table = tmp_path_factory.mktemp("survey") / "table.json"
    subprocess.run([sys.executable, SCRIPT, "--table", table], check=True, capture_output=True, timeout=1500)
    return read_survey(table)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_answers_of_every_supported_type_are_those_of_generate(again: Survey) -> None:
    """Tokens and logits, and one wrong block changes them: see scripts/survey_case.py."""
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(again.types) == known
    missing = set(SURVEY.supported) - known
    assert not missing, "the table has types that this transformers does not know"
    assert {
        name: verdict for name in SURVEY.supported if (verdict := again.types[name]).verdict != "ok"
    } == {}
    assert len(SURVEY.supported) >= 95


@pytest.mark.slow
@this_transformers
def test_the_table_says_the_same(again: Survey) -> None:
    assert again.types == SURVEY.types


def test_every_other_type_is_refused_with_its_reason(tmp_path: Path) -> None:
    """Of this transformers, whether a table knows it or not."""
    refused = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(SURVEY.supported))
    assert len(refused) > 50
    for name in refused:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
        reason = SURVEY.why_not(name)
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path)
        assert reason and caught.value.message == f"model type {name!r} is not supported: {reason}"


@pytest.mark.parametrize("kind", ["phimoe", "llama4_text"])
def test_the_survey_notices_a_wrong_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says its windows in the attention mask only; without those of its config it has other answers."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    survey = importlib.import_module("survey_case").survey
    assert survey(kind)["verdict"] == "ok"
    monkeypatch.setattr(layers, "layer_windows", lambda config, _: (None,) * config.num_hidden_layers)
    assert survey(kind)["verdict"] == "wrong"


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
    assert len(survey.supported) >= 95 and not set(FAMILIES) - set(survey.supported)


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


def test_fetch_says_where_the_model_is_or_what_is_wrong(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["fetch", "demo"])
    assert (Path(told.output.strip()) / "config.json").is_file()
    refused = CliRunner().invoke(app, ["fetch", str(tmp_path / "nowhere")])
    assert isinstance(refused.exception, ConfigError)
    assert "does not exist" in refused.exception.message


def test_the_command_knows_one_checkpoint(tmp_path: Path) -> None:
    directory = make_model("gqa", tmp_path)
    answer = CliRunner().invoke(app, ["models", str(directory)])
    assert answer.exit_code == 0 and "'llama': supported, up to 2048 tokens" in answer.output
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
    error = CliRunner().invoke(app, ["models", str(directory)]).exception
    assert isinstance(error, ConfigError) and "'bloom', which is not supported" in error.message
