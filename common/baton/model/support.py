"""Which model types Baton runs: the tables that `scripts/survey_models.py` makes by running every one of them, one
table for each version of transformers.

Torch-free, so that `baton models` answers at once.
"""

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from baton.errors import ConfigError

TABLES = Path(__file__).with_name("surveys")  # VERSION.json

OK = "ok"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`verdict`: ok, or refused (by a guard, when it is loaded), wrong (other answers than transformers' own),
    failed (not even transformers' own generate() ran, or the survey could not make a small one)."""

    verdict: str
    reason: str = ""  # why not; of an ok one, what it was seen with


@dataclass(frozen=True, slots=True)
class Survey:
    transformers: str  # the version
    types: dict[str, Verdict]

    @property
    def supported(self) -> list[str]:
        return [name for name, verdict in self.types.items() if verdict.verdict == OK]

    def why_not(self, model_type: str) -> str | None:
        """None for a supported one."""
        verdict = self.types.get(model_type)
        if verdict is None:
            return f"transformers {self.transformers}, for which Baton was surveyed, does not know it as a causal model"
        if verdict.verdict == OK:
            return None
        return f"{_MEANING[verdict.verdict]}: {verdict.reason}"


_MEANING = {
    "refused": "it cannot be right with Baton's attention",
    "wrong": "its answers were wrong in Baton's survey",
    "failed": "Baton's survey could not run it",
}


def installed_survey(tables: Path = TABLES) -> Survey:
    """That of the installed transformers. Of a version without a table: what all tables agree on. Raises
    ConfigError."""
    version = installed_version()
    if (tables / f"{version}.json").is_file():
        return read_survey(tables / f"{version}.json")
    surveys = [read_survey(path) for path in sorted(tables.glob("*.json"))]
    if not surveys:
        raise ConfigError(f"{tables} has no survey of model types")
    return agreed(surveys)


def installed_version() -> str:
    """Of transformers, without importing it. Raises ConfigError."""
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise ConfigError("transformers is not installed: pip install 'baton-llm[worker]'") from None


def agreed(surveys: list[Survey]) -> Survey:
    """A type is as good as its worst verdict; one that some survey does not know is not there."""
    names = set.intersection(*(set(survey.types) for survey in surveys))
    versions = " and ".join(survey.transformers for survey in surveys)
    worst = {
        name: max((s.types[name] for s in surveys), key=lambda v: v.verdict != OK) for name in sorted(names)
    }
    return Survey(versions, worst)


def read_survey(path: Path) -> Survey:
    """Raises ConfigError."""
    try:
        table = json.loads(path.read_text())
        return Survey(table["transformers"], {name: Verdict(**row) for name, row in table["types"].items()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a survey of model types: {error}") from error


def write_survey(survey: Survey, path: Path) -> None:
    types = {name: {"verdict": v.verdict, "reason": v.reason} for name, v in sorted(survey.types.items())}
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in types.items())
    path.write_text(
        f'{{\n  "transformers": {json.dumps(survey.transformers)},\n  "types": {{\n{rows}\n  }}\n}}\n'
    )
