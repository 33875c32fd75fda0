"""The base of all requests: knows its fields, and refuses everything else by name."""

from typing import Any, ClassVar

import orjson
from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import PydanticCustomError

Neutral = dict[str, tuple[Any, ...]]


class Strict(BaseModel):
    """Knows its fields; those in `neutral` are checked and dropped."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            raise PydanticCustomError("object", "must be a JSON object")
        for name, values in cls.neutral.items():
            if name in fields and not any(_same(fields[name], value) for value in values):
                accepted = " or ".join(orjson.dumps(value).decode() for value in values)
                raise PydanticCustomError(
                    "unsupported", "not supported (only {accepted})", {"field": name, "accepted": accepted}
                )
        return {name: value for name, value in fields.items() if name not in cls.neutral}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core))
        schema["properties"] |= {
            name: {"enum": list(values), "description": "No other value is supported."}
            for name, values in cls.neutral.items()
        }
        return schema


def _same(value: Any, neutral: Any) -> bool:
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    return bool(value == neutral)
