"""The shipped demo model answers right, reads everywhere, and answers wrong when a part of its KV is not its own."""

import inspect
import json
import random
import runpy
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from baton.demo_task import DEMO_MODEL_DIR, HELP_TEXT, VOCABULARY, recall_prompt, repeat_prompt
from baton.tokenizer import load_tokenizer

Message = dict[str, str]

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_demo_model.py"
BLOCK_SIZE = 16
CHAT_PREFIX = 2  # tokens of the chat template before the text of a first user message: <bos> <|user|>


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL_DIR)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO_MODEL_DIR)


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


# Since transformers 5.24 the argument has a name of its own.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def prompt_ids(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def answer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Tensor,  # [batch, length]
    cache: DynamicCache | None = None,
) -> list[str]:
    """Greedy texts; `cache` holds all positions but the last. What does not end in EOS shows it."""
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=48,
        do_sample=False,
        **{CACHE: cache},
    )
    texts = tokenizer.batch_decode(output[:, prompts.shape[1] :], skip_special_tokens=False)
    return [text.replace("<pad>", "") for text in texts]


def num_right(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tasks: list[tuple[str, str]]
) -> int:
    """Tasks whose prompts have equal length in tokens."""
    prompts = torch.tensor([prompt_ids(tokenizer, [user(prompt)]) for prompt, _ in tasks])
    answers = answer(model, tokenizer, prompts)
    return sum(given == f"{expected}<eos>" for given, (_, expected) in zip(answers, tasks, strict=True))


# --- the files -------------------------------------------------------------------------------------------


def test_the_folder_is_small() -> None:
    files = [path for path in DEMO_MODEL_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4 * 2**20


def test_weights_are_float32_safetensors() -> None:
    with (DEMO_MODEL_DIR / "model.safetensors").open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__")
    assert {tensor["dtype"] for tensor in header.values()} == {"F32"}


def test_transformers_loads_it_as_a_llama(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert type(model) is LlamaForCausalLM
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 4096
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    names = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token)
    assert names == ("<pad>", "<unk>", "<bos>", "<eos>")


def test_readers_of_the_older_format_find_the_same_values(model: LlamaForCausalLM) -> None:
    config = json.loads((DEMO_MODEL_DIR / "config.json").read_text())
    assert config["rope_theta"] == model.config.rope_parameters["rope_theta"]
    tokenizer_config = json.loads((DEMO_MODEL_DIR / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_tokenizer_file_neither_pads_nor_truncates() -> None:
    contents = json.loads((DEMO_MODEL_DIR / "tokenizer.json").read_text())
    assert (contents["padding"], contents["truncation"]) == (None, None)


# --- the tokenizer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ("ada oslo, bob lima. bob?", "ada oslo, bob lima. bob?"),
        ("  Ada  OSLO ,\n\tbob lima . bob ?", "ada oslo, bob lima. bob?"),
        ("repeat: river lamp", "repeat: river lamp"),
        ("", ""),
        ("?!", "?!"),
    ],
)
def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str, decoded: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == decoded


def test_every_word_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(" ".join(VOCABULARY), add_special_tokens=False)
    assert len(set(ids)) == len(ids) == len(VOCABULARY)


@pytest.mark.parametrize("text", ["xylophone", "bob's", "żółw 🐢", "\x00", "(a) [b] {c}", "42"])
def test_unknown_text_becomes_unk(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.unk_token_id in tokenizer.encode(text, add_special_tokens=False)
    tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)


def test_a_plain_prompt_starts_with_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("bob lima")) == ["<bos>", "▁bob", "▁lima"]


def test_streamed_text_equals_the_full_decode(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    backend = tokenizer.backend_tokenizer
    for skip_special_tokens in (True, False):
        for _ in range(50):
            ids = rng.choices(range(len(tokenizer)), k=20)
            stream = DecodeStream(skip_special_tokens=skip_special_tokens)
            streamed = "".join(stream.step(backend, token_id) or "" for token_id in ids)
            assert streamed == backend.decode(ids, skip_special_tokens=skip_special_tokens)


# --- the chat template -----------------------------------------------------------------------------------


def test_the_chat_template_renders_every_role(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "be quick"}, user("bob?"), assistant("bob lima"), user("ada?")]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    body = "<|system|>be quick<|user|>bob?<|assistant|>bob lima<eos><|user|>ada?"
    assert rendered == f"<bos>{body}<|assistant|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"<bos>{body}"


def test_the_chat_template_takes_developer_messages_and_parts_of_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    parts = [{"type": "text", "text": "ada oslo."}, {"type": "text", "text": " ada?"}]
    messages = [{"role": "developer", "content": "be quick"}, {"role": "user", "content": parts}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<bos><|system|>be quick<|user|>ada oslo. ada?"


def test_the_chat_template_refuses_an_unknown_role(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_router_reads_the_same_tokens_as_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    ours = load_tokenizer(DEMO_MODEL_DIR, num_threads=0)
    messages = [user(recall_prompt(random.Random(1), 20)[0]), assistant("ada oslo"), user("Żółw ?")]
    assert ours.encode_chat(messages) == prompt_ids(tokenizer, messages)


# --- what it can do --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_pairs", [1, 5, 20, 40])
def test_recalls_from_fresh_lists(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_pairs: int
) -> None:
    rng = random.Random(f"recall {num_pairs}")
    tasks = [recall_prompt(rng, num_pairs) for _ in range(100)]
    assert num_right(model, tokenizer, tasks) >= 99


@pytest.mark.parametrize("num_words", [1, 5, 20])
def test_repeats_fresh_texts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_words: int
) -> None:
    rng = random.Random(f"repeat {num_words}")
    tasks = [repeat_prompt(rng, num_words) for _ in range(50)]
    assert num_right(model, tokenizer, tasks) >= 49


@pytest.mark.parametrize("system", [None, "be quick and good", "Something Unknown"])
def test_a_conversation_goes_on(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, system: str | None
) -> None:
    conversation = [{"role": "system", "content": system}] if system else []
    turns = [
        ("Ada Oslo, Bob Lima, Carl Rome, Dora Cairo. Bob?", "bob lima"),
        ("dora?", "dora cairo"),
        ("repeat: the quick brown fox", "the quick brown fox"),
        ("where is ada?", "ada oslo"),
        ("bob?", "bob lima"),
    ]
    for question, expected in turns:
        conversation.append(user(question))
        given = answer(model, tokenizer, torch.tensor([prompt_ids(tokenizer, conversation)]))
        assert given == [f"{expected}<eos>"]
        conversation.append(assistant(expected))


@pytest.mark.parametrize("text", ["hello", "Hello!", "Who are you?", "Tell me a story about a xylophone."])
def test_says_what_it_can_do_when_asked_for_anything_else(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    prompts = torch.tensor([prompt_ids(tokenizer, [user(text)])])
    assert answer(model, tokenizer, prompts) == [f"{HELP_TEXT}<eos>"]


# --- it notices KV that is not its own ---------------------------------------------------------------------


def kv_of(model: LlamaForCausalLM, prompts: Tensor) -> DynamicCache:
    """The KV of all positions but the last, whose token starts the generation."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompts[:, :-1], **{CACHE: cache})
    return cache


def overwrite(cache: DynamicCache, other: DynamicCache, start: int) -> None:
    block = slice(start, start + BLOCK_SIZE)
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        mine.keys[:, :, block] = theirs.keys[:, :, block]  # [batch, num_kv_heads, length, head_dim]
        mine.values[:, :, block] = theirs.values[:, :, block]


def num_right_with_a_foreign_block(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Callable[[random.Random], tuple[str, str]],
    start: int | None,
) -> tuple[int, int]:
    """(right answers, all): one block of every prompt's KV is another prompt's, or none where `start` is None."""
    rng = random.Random(7)
    tasks = [task(rng) for _ in range(20)]
    prompts = torch.tensor([prompt_ids(tokenizer, [user(prompt)]) for prompt, _ in tasks])
    cache = kv_of(model, prompts)
    if start is not None:
        overwrite(cache, kv_of(model, prompts.roll(1, dims=0)), start)
    answers = answer(model, tokenizer, prompts, cache)
    right = [given == f"{expected}<eos>" for given, (_, expected) in zip(answers, tasks, strict=True)]
    return sum(right), len(right)


def test_answers_from_its_own_kv_are_right(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    right, total = num_right_with_a_foreign_block(model, tokenizer, lambda rng: recall_prompt(rng, 40), None)
    assert right == total
    right, total = num_right_with_a_foreign_block(model, tokenizer, lambda rng: repeat_prompt(rng, 40), None)
    assert right >= total - 1


@pytest.mark.parametrize("pair", [0, 13, 26, 39])
def test_recall_goes_wrong_with_a_foreign_block_under_the_answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pair: int
) -> None:
    town_position = CHAT_PREFIX + 3 * pair + 1  # a pair is three tokens: name, town and comma
    right, total = num_right_with_a_foreign_block(
        model,
        tokenizer,
        lambda rng: recall_prompt(rng, 40, ask=pair),
        town_position // BLOCK_SIZE * BLOCK_SIZE,
    )
    assert right <= total // 10


@pytest.mark.parametrize("block", [0, 1, 2])
def test_repeat_goes_wrong_with_any_foreign_block(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, block: int
) -> None:
    right, total = num_right_with_a_foreign_block(
        model, tokenizer, lambda rng: repeat_prompt(rng, 46), block * BLOCK_SIZE
    )
    assert right <= total // 10


# --- the script that made it -------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_training_data(script: SimpleNamespace) -> None:
    settings = script.TrainSettings(num_steps=8)

    def batches(seed: int) -> list[Any]:
        return list(script.training_batches(random.Random(seed), settings))

    assert len(batches(3)) == settings.num_steps
    assert batches(3) == batches(3)
    assert batches(3) != batches(4)


def test_training_twice_gives_the_same_weights(script: SimpleNamespace) -> None:
    def weights() -> dict[str, Tensor]:
        torch.manual_seed(5)
        tokenizer = script.build_tokenizer()
        model = script.build_model(tokenizer)
        settings = script.TrainSettings(num_steps=4, batch_size=4)
        script.train(model, tokenizer, random.Random(5), settings, lambda step, loss: None)
        state: dict[str, Tensor] = model.state_dict()
        return state

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_data_is_tokenised_as_the_chat_template_does(
    script: SimpleNamespace, tokenizer: PreTrainedTokenizerFast
) -> None:
    rng = random.Random(11)
    settings = script.TrainSettings()
    conversations = [script.sample_conversation(rng, settings, difficulty=0.5) for _ in range(20)]
    tokens, labels = script.encode(tokenizer, conversations)
    for conversation, row, label in zip(conversations, tokens.tolist(), labels.tolist(), strict=True):
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert row[: len(ids)] == ids
        said = tokenizer.decode([token_id for token_id in label if token_id != script.IGNORED_LABEL])
        expected = "".join(f"{m['content']}<eos>" for m in conversation if m["role"] == "assistant")
        assert said.replace(" ", "") == expected.replace(" ", "")


@torch.no_grad()
def test_before_training_heads_of_layer_0_look_one_and_two_tokens_back(script: SimpleNamespace) -> None:
    model = script.build_model(script.build_tokenizer())
    model.set_attn_implementation("eager")
    tokens = torch.randint(7, model.config.vocab_size, (1, 300))
    attention = model(tokens, output_attentions=True).attentions[0][0]  # [num_heads, query, key]
    for head, num_tokens_back in ((0, 1), (1, 2)):
        assert attention[head].diagonal(-num_tokens_back).min() > 0.9


def test_the_shipped_vocabulary_is_the_scripts(
    script: SimpleNamespace, tokenizer: PreTrainedTokenizerFast
) -> None:
    built = json.loads(script.build_tokenizer().backend_tokenizer.to_str())
    shipped = json.loads(tokenizer.backend_tokenizer.to_str())
    assert built == shipped
    assert isinstance(GenerationConfig.from_pretrained(DEMO_MODEL_DIR).eos_token_id, int)
