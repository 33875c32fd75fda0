"""Chat templates, rendered as transformers renders them: the same environment, globals and filters.

Templates come with the model, from the hub: they run in jinja2's immutable sandbox and see plain JSON data.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from baton.clock import Clock
from baton.errors import ConfigError, InvalidRequest

Message = Mapping[str, Any]  # role, content (a string or a list of {"type": "text", "text": ...}), name, ...

# What a template's own code can raise on messages it was not written for.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """One model's template. `special_tokens` ("bos_token", ...) are variables of it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], clock: Clock) -> None:
        """Raises ConfigError when the template is not valid jinja."""
        try:
            self._template = _environment(clock).from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template is not valid: {error}") from error
        # jinja2 copies the globals for every rendering, and slowly where they are a ChainMap.
        self._template.globals = dict(self._template.globals)
        self._special_tokens = dict(special_tokens)
        self._knows_developer = "developer" in source
        self._takes_parts = self._understands_parts()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt's text, special tokens included. Raises InvalidRequest where the template refuses them.

        A template that does not know the role "developer" gets "system" for it, and one that does not know
        content in parts gets their texts, a line each; else it might drop them without a word.
        """
        prepared = [self._prepare(message) for message in messages]
        try:
            return self._render(prepared, add_generation_prompt)
        except TEMPLATE_ERRORS as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self._template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
        )

    def _prepare(self, message: Message) -> dict[str, Any]:
        # Templates print a value None as "None", while they handle a missing key.
        prepared = {key: value for key, value in message.items() if value is not None}
        if prepared["role"] == "developer" and not self._knows_developer:
            prepared["role"] = "system"
        content = prepared.get("content")
        if isinstance(content, list) and not self._takes_parts:
            prepared["content"] = "\n".join(part["text"] for part in content)
        return prepared

    def _understands_parts(self) -> bool:
        """Tried, as templates say it in many ways: both texts appear, and nothing of the list around them."""
        parts = [{"type": "text", "text": "first part"}, {"type": "text", "text": "second part"}]
        try:
            text = self._render([{"role": "user", "content": parts}], add_generation_prompt=False)
        except TEMPLATE_ERRORS:
            return False
        return (
            "first part" in text and "second part" in text and "'text'" not in text and '"text"' not in text
        )


def _environment(clock: Clock) -> ImmutableSandboxedEnvironment:
    def strftime_now(format: str) -> str:
        return datetime.datetime.fromtimestamp(clock.wall()).strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.globals["dict"] = _TemplateDict()
    environment.globals["namespace"] = _TemplateNamespace
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own filter escapes HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what training learns; here it is its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


class _TemplateDict:
    """`dict(...)` without the class, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """`namespace(...)` that takes no names beginning with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may pass `self=...`
        self, *positional = args
        attributes = dict(*positional, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
