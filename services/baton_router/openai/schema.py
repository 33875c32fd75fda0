"""OpenAI's requests and answers, as far as Baton honours them.

A field is honoured, or accepted only at the value that asks for nothing (`NEUTRAL`), or refused by its name. Types
are strict: "10" is no integer, and neither is true.
"""

from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from baton.engine.sampling_state import MAX_ALLOWED_TOKEN_IDS, MAX_BIASES, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS
from baton.errors import InvalidRequest
from baton.request import Grammar, SamplingParams, TokenBias
from baton_router.openai import structured
from baton_router.openai.strict import Neutral, Strict
from baton_router.openai.structured import ResponseFormat, StructuredOutputs

MAX_COUNT = 2**31 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_SAMPLES = 128  # and what the worker runs at the same time
MAX_BIAS = 100
MAX_PRIORITY = 2**31 - 1
MAX_SALT_CHARACTERS = 256
SEEDS = 2**64

# What clients send by default. Any other value asks for something that Baton does not do.
NEUTRAL_IN_ALL: Neutral = {
    "best_of": (None, 1),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1),
    "metadata": (None, {}),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}
NEUTRAL_IN_CHAT: Neutral = NEUTRAL_IN_ALL | {
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None, False),
    "audio": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),  # says how tools are called, and there are none
    "prediction": (None,),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
NEUTRAL_IN_COMPLETIONS: Neutral = NEUTRAL_IN_ALL | {"suffix": (None, "")}
# Clients give an assistant's answer back as they got it.
NEUTRAL_IN_MESSAGES: Neutral = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "reasoning_content": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}


def _stop_strings(value: Any) -> list[str] | None:
    """A string or a list of them."""
    stop = [value] if isinstance(value, str) else value
    if stop is None:
        return None
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(stop) > MAX_STOP_STRINGS:
        raise PydanticCustomError("stop", "must be at most {limit} strings", {"limit": MAX_STOP_STRINGS})
    if not all(0 < len(text) <= MAX_STOP_CHARACTERS for text in stop):
        raise PydanticCustomError(
            "stop", "must be strings of 1 to {limit} characters", {"limit": MAX_STOP_CHARACTERS}
        )
    return stop


def _seed(value: Any) -> Any:
    """Any integer. One of more than 64 bits has become a float when it comes here."""
    if isinstance(value, float) and value.is_integer() and abs(value) >= 2**63:
        value = int(value)
    return value % SEEDS if type(value) is int else value


def _biases(value: Any) -> Any:
    """JSON's names are strings, so token ids are, too."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("logit_bias", "must name at most {limit} tokens", {"limit": MAX_BIASES})
    if not all(isinstance(name, str) and name.isascii() and name.isdecimal() for name in value):
        raise PydanticCustomError("logit_bias", "must map token ids, as strings, to numbers")
    return {int(name[:20]): bias for name, bias in value.items()}


def _prompt(value: Any) -> str | list[int]:
    """A text or token ids, bare or as the only one of a list."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise PydanticCustomError("prompt", "must be one prompt: send several as requests of their own")
        value = value[0]
    if isinstance(value, list) and all(type(token_id) is int for token_id in value):
        return value
    if isinstance(value, str):
        return value
    raise PydanticCustomError("prompt", "must be a string or a list of token ids")


_ONE_OR_MORE_STRINGS = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOP_STRINGS},
            {"type": "null"},
        ]
    }
)
_TEXT_OR_TOKEN_IDS = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}, "minItems": 1}]}
)


class SamplingFields(Strict):
    """How tokens are drawn: the same limits behind both front doors."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = None
    seed: Annotated[int | None, BeforeValidator(_seed), WithJsonSchema({"type": "integer"})] = None
    stop: Annotated[list[str] | None, BeforeValidator(_stop_strings), _ONE_OR_MORE_STRINGS] = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKEN_IDS)] | None
    ) = None
    ignore_eos: bool | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    allowed_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS)]
        | None
    ) = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def sampling(self, max_tokens: int, drawn_seed: int) -> SamplingParams:
        """`max_tokens` and `drawn_seed` stand in for what the request left out."""
        seed = drawn_seed if self.seed is None else self.seed
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            top_k=max(0, self.top_k or 0),  # -1, too, means all tokens
            seed=seed % SEEDS,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_p=float(self.min_p or 0),
            presence_penalty=float(self.presence_penalty or 0),
            frequency_penalty=float(self.frequency_penalty or 0),
            repetition_penalty=1.0 if self.repetition_penalty is None else float(self.repetition_penalty),
            min_tokens=self.min_tokens or 0,
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            n=self.n or 1,
            prompt_logprobs=self.prompt_logprobs,
        )


class StreamOptions(Strict):
    neutral: ClassVar[Neutral] = {
        "continuous_usage_stats": (None, False),
        "include_obfuscation": (None, False),
    }

    include_usage: bool | None = None


class ApiRequest(SamplingFields):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_CHARACTERS)] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None  # lower is earlier
    return_token_ids: bool | None = None
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS, allow_inf_nan=False)]] | None,
        BeforeValidator(_biases),
    ] = None
    bad_words: Annotated[list[str] | None, BeforeValidator(_stop_strings), _ONE_OR_MORE_STRINGS] = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: structured.Schema | None = None
    guided_regex: str | None = None
    guided_choice: structured.Choice | None = None
    guided_grammar: str | None = None
    # By OpenAI's definition these have no effect on the answer; they are written to the log.
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "only allowed when stream is true", {"field": "stream_options"}
            )
        return self

    @model_validator(mode="after")
    def _one_grammar(self) -> Self:
        if len(self._grammars) > 1:
            first, second = list(self._grammars)[:2]
            raise PydanticCustomError(
                "grammar", "cannot be combined with {first}", {"field": second, "first": first}
            )
        return self

    @property
    def _grammars(self) -> dict[str, Grammar]:
        """By the field that asks for it."""
        guided = structured.grammars(
            self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar
        )
        found = {f"guided_{name}": grammar for name, grammar in guided.items()}
        if self.structured_outputs is not None:
            [found["structured_outputs"]] = self.structured_outputs.grammars
        if self.response_format is not None and self.response_format.grammar is not None:
            found["response_format"] = self.response_format.grammar
        return found

    @property
    def grammar(self) -> Grammar | None:
        return next(iter(self._grammars.values()), None)

    @property
    def biases(self) -> tuple[TokenBias, ...]:
        return tuple(TokenBias(token_id, float(bias)) for token_id, bias in (self.logit_bias or {}).items())

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    @property
    def num_of_prompt(self) -> int | None:
        """Log probabilities of the prompt's tokens, for whatever part of the answer."""
        return self.prompt_logprobs

    @property
    def is_about_prompt(self) -> bool:
        """Nothing is to be generated."""
        return False

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TextPart(Strict):
    type: Literal["text"]
    text: str


def _content_tag(value: Any) -> str | None:
    return "=text" if isinstance(value, str) else "=parts" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("=text")] | Annotated[list[TextPart], Tag("=parts"), Field(min_length=1)],
    Discriminator(
        _content_tag,
        custom_error_type="content",
        custom_error_message="must be a string or a list of text parts",
    ),
]


class ChatMessage(Strict):
    neutral: ClassVar[Neutral] = NEUTRAL_IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = None
    tool_call_id: str | None = None


class ChatCompletionRequest(ApiRequest):
    neutral: ClassVar[Neutral] = NEUTRAL_IN_CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError(
                "max_tokens", "give this or max_completion_tokens, not both", {"field": "max_tokens"}
            )
        return self

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError(
                "top_logprobs", "only allowed when logprobs is true", {"field": "top_logprobs"}
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def template_messages(self) -> list[dict[str, Any]]:
        return [message.model_dump(exclude_none=True) for message in self.messages]


class CompletionRequest(ApiRequest):
    neutral: ClassVar[Neutral] = NEUTRAL_IN_COMPLETIONS

    prompt: Annotated[str | list[int], BeforeValidator(_prompt), _TEXT_OR_TOKEN_IDS]
    add_special_tokens: bool | None = None  # to a prompt of text; true when absent
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _something_to_say(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError(
                "max_tokens", "must be at least 1 where echo is not true", {"field": "max_tokens"}
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_of_prompt(self) -> int | None:
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in wanted if number is not None), default=None)

    @property
    def is_about_prompt(self) -> bool:
        return self.max_tokens == 0

    @property
    def limit(self) -> int | None:
        return 1 if self.is_about_prompt else self.max_tokens


RequestT = TypeVar("RequestT", bound=Strict)


def parse(request_type: type[RequestT], body: bytes) -> RequestT:
    """Raises InvalidRequest with the first thing that is wrong, by name."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    return validate(request_type, fields)


def validate(request_type: type[RequestT], fields: Any) -> RequestT:
    try:
        return request_type.model_validate(fields)
    except ValidationError as errors:
        raise _translate(errors.errors(include_url=False, include_input=False)[0]) from None


def _translate(error: ErrorDetails) -> InvalidRequest:
    context = error.get("ctx", {})
    steps = [step for step in error["loc"] if not str(step).startswith("=")]
    if "field" in context:
        steps.append(context["field"])
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")
    match error["type"]:
        case "missing":
            return InvalidRequest(f"{param} is required", param=param)
        case "extra_forbidden":
            return InvalidRequest(f"{param} is not a field that is known here", param=param)
    reason = error["msg"].replace("Input should be", "must be").replace("List should have", "must have")
    return InvalidRequest(f"{param or 'the body'}: {reason}", param=param or None)


# --- answers, for the documentation; they are written as plain JSON ---


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class PromptToken(BaseModel):
    """One of those that could have been in the place of a prompt token."""

    logprob: float
    rank: int
    decoded_token: str


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: str
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptToken] | None] | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptToken] | None] | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "baton"
    max_model_len: int | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
