"""The ways in which OpenAI's and vLLM's requests ask for an answer of a certain form; at most one of them.

    response_format                              OpenAI
    structured_outputs                           vLLM
    guided_json, guided_regex, guided_choice, guided_grammar    vLLM, older

What is wrong inside a schema or an expression is found by the worker that compiles it.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

import orjson
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from baton.request import Grammar, GrammarKind
from baton_router.openai.strict import Neutral, Strict

Schema = dict[str, Any] | str | bool
Choice = Annotated[list[str], Field(min_length=1)]

ANY_OBJECT = Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')


class JsonSchemaFormat(Strict):
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    strict: bool | None = None  # the answer always keeps to the schema


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "json_schema", "belongs to the type json_schema, and must be there", {"field": "json_schema"}
            )
        return self

    @property
    def grammar(self) -> Grammar | None:
        if self.json_schema is not None:
            return json_grammar(self.json_schema.schema_)
        return ANY_OBJECT if self.type == "json_object" else None


class StructuredOutputs(Strict):
    neutral: ClassVar[Neutral] = {
        "disable_additional_properties": (None, False),
        "disable_any_whitespace": (None, False),
        "disable_fallback": (None, True, False),  # there is only one implementation
        "structural_tag": (None,),
        "whitespace_pattern": (None,),
    }

    json_: Annotated[Schema | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Choice | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.grammars) != 1:
            raise PydanticCustomError(
                "structured_outputs", "must have exactly one of json, json_object, regex, choice and grammar"
            )
        return self

    @property
    def grammars(self) -> list[Grammar]:
        found = list(grammars(self.json_, self.regex, self.choice, self.grammar).values())
        return [*found, ANY_OBJECT] if self.json_object else found


def grammars(
    schema: Schema | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> dict[str, Grammar]:
    """Those that are given, by name."""
    found = {}
    if schema is not None:
        found["json"] = json_grammar(schema)
    if regex is not None:
        found["regex"] = Grammar(GrammarKind.REGEX, regex)
    if choice is not None:
        found["choice"] = Grammar(GrammarKind.CHOICE, orjson.dumps(choice).decode())
    if grammar is not None:
        found["grammar"] = Grammar(GrammarKind.LARK, grammar)
    return found


def json_grammar(schema: Schema) -> Grammar:
    source = schema if isinstance(schema, str) else orjson.dumps(schema).decode()
    return Grammar(GrammarKind.JSON_SCHEMA, source)
