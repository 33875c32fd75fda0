"""`baton models`: which model types run, which do not and why; or the same about one checkpoint."""

from collections.abc import Iterator

from rich.console import Console

from baton.errors import ConfigError
from baton.model.support import Survey, installed_survey
from baton.model_files import CONFIG_FILES, read_json, resolve_model


def list_types(console: Console) -> None:
    survey = installed_survey()
    for line in _lines(survey):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def check_model(name: str, console: Console) -> None:
    """Raises ConfigError with the reason when Baton does not run it. Reads config files only, no weights."""
    directory = resolve_model(name, files=CONFIG_FILES)
    model_type = read_json(directory / "config.json").get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"{directory / 'config.json'} names no model_type")
    why_not = installed_survey().why_not(model_type)
    if why_not:
        raise ConfigError(f"{name} is of type {model_type!r}, which is not supported: {why_not}")
    # Seconds of imports, so last: the type may be right and the rest of the config not.
    from baton.model import loader

    longest = loader.model_length(loader.load_config(directory), None)
    console.print(
        f"{name} is of type {model_type!r}: supported, up to {longest} tokens",
        highlight=False,
        soft_wrap=True,
    )


def _lines(survey: Survey) -> Iterator[str]:
    supported = survey.supported
    width = max(map(len, survey.types), default=0)
    yield f"{len(supported)} of {len(survey.types)} causal types of transformers {survey.transformers} are supported:"
    for name in supported:
        yield f"  {name:{width}}  {survey.types[name].reason}".rstrip()
    yield "not supported:"
    for name in survey.types:
        why_not = survey.why_not(name)
        if why_not:
            yield f"  {name:{width}}  {why_not}"
