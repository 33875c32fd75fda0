"""Structured output, log probabilities and penalties through real processes, as the OpenAI client asks for them."""

import json
from pathlib import Path

import jsonschema
import openai
import pytest
from reference import make_model
from router_parts import byte_tokenizer
from stack import running_stack

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; one token per byte."""
    directory = make_model("gqa", tmp_path_factory.mktemp("bytes"), vocab_size=260)
    byte_tokenizer().backend.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return directory


async def test_what_the_openai_client_asks_for(directory: Path) -> None:
    async with (
        running_stack(model=str(directory), index="memory") as stack,
        openai.AsyncOpenAI(base_url=f"{stack.base_url}/v1", api_key="none", max_retries=0) as client,
    ):
        ask = client.chat.completions.create
        message = [{"role": "user", "content": "who?"}]

        for seed in range(5):
            answer = await ask(
                model="test", messages=message, response_format=FORM, seed=seed, logprobs=True, top_logprobs=2,
            )  # type: ignore[call-overload]  # fmt: skip
            [choice] = answer.choices
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)
            content = choice.logprobs.content
            written = bytes(byte for entry in content for byte in entry.bytes)
            assert written.decode().removesuffix("<eos>") == choice.message.content
            assert all(len(entry.top_logprobs) == 2 for entry in content)

        stream = await ask(
            model="test", messages=message, response_format=FORM, seed=4, logprobs=True, stream=True,
        )  # type: ignore[call-overload]  # fmt: skip
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == choice.message.content
        entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
        assert [e.logprob for e in entries] == pytest.approx([e.logprob for e in content], abs=1e-3)

        with pytest.raises(openai.BadRequestError, match="cannot be compiled"):
            await ask(model="test", messages=message, extra_body={"guided_regex": "("})  # type: ignore[call-overload]

        said = await client.completions.create(
            model="test", prompt=[5, 6, 7], max_tokens=200, temperature=0, presence_penalty=2,
            frequency_penalty=2, logprobs=1, extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        assert said.choices[0].logprobs is not None
        assert len(said.choices[0].logprobs.token_logprobs or []) == 200
        repeated = await client.completions.create(
            model="test", prompt=[5, 6, 7], max_tokens=200, temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        num_distinct = [len(set(each.choices[0].token_ids)) for each in (said, repeated)]  # type: ignore[attr-defined]
        assert num_distinct[0] > num_distinct[1]
        await stack.until_nothing_is_used("prefill-0", "decode-0")
