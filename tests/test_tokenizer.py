"""The router's tokenizer gives the ids and chat prompts that transformers gives, from the same directory."""

import asyncio
import datetime
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from baton.clock import SystemClock
from baton.demo_task import DEMO_MODEL_DIR, recall_prompt
from baton.errors import ConfigError, InvalidRequest
from baton.tokenizer import INLINE_CHARACTERS, Tokenizer, load_tokenizer

WORDS = (
    "the",
    "river",
    "lamp",
    "größe",
    "東京",
    "hello",
    "don't",
    "naïve",
    "👍🏽",
    "a",
    ",",
    ".",
    "!",
    "12",
    "'",
)
CORPUS = [" ".join(random.Random(i).choices(WORDS, k=30)) for i in range(60)]
TEXTS = (
    "",
    "the river lamp",
    " hello  world\n\n\ttab ",
    "<s>hello</s> the <s> river",
    "größe 東京 👍🏽 Łódź \u0000 \u200b",
    "<|im_start|>user\nhello<|im_end|>",
    "x" * 300,
)


def write(directory: Path, **files: Any) -> Path:
    """`config={...}` becomes config.json; a value that is text becomes name.jinja."""
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, str):
            (directory / f"{name}.jinja").write_text(content)
        else:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def byte_level_json() -> Any:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        ),
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(7)  # some checkpoints ship like this; transformers ignores it
    backend.enable_padding(length=7)
    return json.loads(backend.to_str())


def sentence_piece_json(*, old_form: bool) -> Any:
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if old_form:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special + byte_tokens, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    return content


NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA = {"model_type": "llama", "vocab_size": 512, "eos_token_id": 2}


def byte_level(directory: Path, **tokenizer_config: Any) -> Path:
    return write(
        directory,
        tokenizer=byte_level_json(),
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, **tokenizer_config},
        config=LLAMA,
    )


def only_named_in_the_config(directory: Path) -> Path:
    added = {"content": "<|im_start|>", "lstrip": False, "rstrip": False, "normalized": False}
    return byte_level(
        directory,
        pad_token={"__type": "AddedToken", "content": "<pad>", "special": True},
        additional_special_tokens=["<|im_end|>"],
        added_tokens_decoder={"400": {**added, "single_word": False, "special": True}},
        add_bos_token=False,
    )


def old_special_tokens_map(directory: Path) -> Path:
    path = byte_level(directory, eos_token=None)
    return write(path, special_tokens_map={"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>"})


def without_post_processor(directory: Path) -> Path:
    path = byte_level(directory, add_bos_token=True)
    return write(path, tokenizer=byte_level_json() | {"post_processor": None})


def llama(**tokenizer_config: Any) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        config = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", **NAMED, **tokenizer_config}
        old_form = config.pop("old_form", True)
        tokenizer = sentence_piece_json(old_form=old_form)
        return write(directory, tokenizer=tokenizer, tokenizer_config=config, config=LLAMA)

    return make


def demo(directory: Path) -> Path:
    if not (DEMO_MODEL_DIR / "tokenizer.json").is_file():
        pytest.skip("the demo model is not here")
    return DEMO_MODEL_DIR


DIRECTORIES: dict[str, Callable[[Path], Path]] = {
    "byte_level": byte_level,
    "only_named_in_the_config": only_named_in_the_config,
    "old_special_tokens_map": old_special_tokens_map,
    "without_post_processor": without_post_processor,
    "llama": llama(),
    "llama_legacy": llama(legacy=True, tokenizer_class="LlamaTokenizerFast"),
    "llama_no_prefix_space": llama(add_prefix_space=False),
    "llama_new_form": llama(old_form=False, legacy=False),
    "llama_as_written": llama(tokenizer_class="PreTrainedTokenizerFast"),
    "demo": demo,
}


def _random_text(rng: random.Random) -> str:
    pieces = (*WORDS, "<s>", "</s>", "<|im_end|>", " ", "\n", "é", "\u3000", "<0x41>")
    return "".join(rng.choice(pieces) + rng.choice(["", " ", "  "]) for _ in range(rng.randrange(20)))


@pytest.mark.parametrize("name", DIRECTORIES)
def test_ids_and_text_equal_transformers(name: str, tmp_path: Path) -> None:
    directory = DIRECTORIES[name](tmp_path)
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    rng = random.Random(name)
    for text in (*TEXTS, *(_random_text(rng) for _ in range(200))):
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, special) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert ours.bos_token_id == theirs.bos_token_id


TEMPLATES = {
    "chatml": """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "blocks_on_their_own_lines": """
    {% for message in messages %}
        {% if message['role'] == 'user' %}
[INST] {{ message['content'] | trim }} [/INST]
        {% else %}
{{ bos_token }}{{ message['content'] }}{{ eos_token }}
        {% endif %}
    {% endfor %}""",
    "globals_and_filters": """\
{%- set ns = namespace(system='', count=0) %}
{%- for message in messages %}
  {%- if message.role == 'system' %}{% set ns.system = message.content %}{% continue %}{% endif %}
  {%- set ns.count = ns.count + 1 %}
  {%- if ns.count > 3 %}{% break %}{% endif %}
  {%- generation %}{{ message | tojson }}{% endgeneration %}
{%- endfor %}
{{- dict(system=ns.system, tools=tools, documents=documents) | tojson(indent=2) }}
{{- strftime_now('%Y') }}|{{ bos_token }}|{{ nothing }}|{{ messages[0].get('name') }}""",
    "parts": """\
{%- for message in messages %}<{{ message.role }}>
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}[{{ part.type }}:{{ part.text }}]{% endfor %}{% endif %}
{%- endfor %}""",
}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello"}],
    [
        {"role": "system", "content": "größe & <b>"},
        {"role": "user", "content": "  the river\n"},
        {"role": "assistant", "content": "東京 'quoted' \"twice\""},
        {"role": "user", "content": "a", "name": None},
    ],
]


@pytest.mark.parametrize("where", ["tokenizer_config", "named", "file"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_equal_transformers(name: str, where: str, tmp_path: Path) -> None:
    source = TEMPLATES[name]
    if where == "tokenizer_config":
        directory = byte_level(tmp_path, chat_template=source)
    elif where == "named":
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}]
        directory = byte_level(tmp_path, chat_template=named)
    else:
        directory = write(byte_level(tmp_path, chat_template="not this one"), chat_template=source)
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    chats = [*CHATS]
    if name == "parts":
        chats.append(
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
        )
    for chat in chats:
        text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ours.render_chat(chat) == text
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert ours.encode_chat(chat) == ids


def test_the_demo_models_chats_equal_transformers(tmp_path: Path) -> None:
    directory = demo(tmp_path)
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    rng = random.Random(0)
    for num_pairs in range(1, 40):
        prompt, answer = recall_prompt(rng, num_pairs)
        chat = [
            {"role": "system", "content": "hello"},
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": prompt},
        ]
        assert ours.render_chat(chat) == theirs.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        assert (
            ours.encode_chat(chat)
            == theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        )


class StoppedClock(SystemClock):
    def wall(self) -> float:
        return 1767225600.0


def _with_template(directory: Path, source: str) -> Tokenizer:
    return load_tokenizer(byte_level(directory, chat_template=source), StoppedClock())


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"


def test_the_date_in_a_template_is_the_clocks(tmp_path: Path) -> None:
    tokenizer = _with_template(tmp_path, "{{ strftime_now('%Y-%m-%d %H:%M') }}")
    expected = datetime.datetime.fromtimestamp(StoppedClock().wall()).strftime("%Y-%m-%d %H:%M")
    assert tokenizer.render_chat(CHATS[0]) == expected


def test_a_developer_is_the_system_where_the_template_knows_no_developer(tmp_path: Path) -> None:
    chat = [{"role": "developer", "content": "be kind"}]
    assert _with_template(tmp_path, PLAIN).render_chat(chat) == "system: be kind;"
    assert _with_template(tmp_path, PLAIN + "{# developer #}").render_chat(chat) == "developer: be kind;"


def test_parts_become_lines_where_the_template_takes_only_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert _with_template(tmp_path, PLAIN).render_chat([{"role": "user", "content": parts}]) == "user: a\nb;"
    refuses_lists = "{% for m in messages %}{{ m.content.strip() }}{% endfor %}"
    assert _with_template(tmp_path, refuses_lists).render_chat([{"role": "user", "content": parts}]) == "a\nb"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.mro() }}",
        "{% set n = namespace(_x=1) %}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ messages | nosuchfilter(1) }}",
    ],
)
def test_a_template_that_fails_is_the_requests_fault_and_names_messages(source: str, tmp_path: Path) -> None:
    def render() -> str:
        return _with_template(tmp_path, source).render_chat(CHATS[0])

    if "nosuchfilter" in source:
        with pytest.raises(ConfigError, match="nosuchfilter"):
            render()
        return
    with pytest.raises(InvalidRequest, match="chat template") as caught:
        render()
    assert caught.value.param == "messages"


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        load_tokenizer(byte_level(tmp_path)).encode_chat(CHATS[0])


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 2}, (5, 6)),
        ({"eos_token_id": 5}, {"eos_token_id": 2}, (5,)),
        ({}, {"eos_token_id": [2, 3]}, (2, 3)),
        ({}, {}, (1,)),  # the tokenizer's own
    ],
)
def test_end_of_sequence(
    generation_config: Any, config: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    path = write(byte_level(tmp_path), generation_config=generation_config, config=config)
    assert load_tokenizer(path).eos_token_ids == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"vocab_size": 512}, 512), ({"text_config": {"vocab_size": 600}}, 600), ({}, None)],
)
def test_vocabulary_size_is_the_models(config: Any, expected: int | None, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(byte_level(tmp_path), config=config))
    assert tokenizer.vocab_size == (expected or tokenizer.backend.get_vocab_size())


def test_a_directory_without_tokenizer_json_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist.*save_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "{"), ("config.json", "[]")]
)
def test_a_broken_file_is_named(name: str, content: str, tmp_path: Path) -> None:
    directory = byte_level(tmp_path)
    (directory / name).write_text(content)
    with pytest.raises(ConfigError, match=name):
        load_tokenizer(directory)


def test_several_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    directory = byte_level(tmp_path, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(ConfigError, match="rag"):
        load_tokenizer(directory)


async def test_a_long_text_leaves_the_event_loop_free(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path), SystemClock(), num_threads=1)
    text = " ".join(WORDS) * 4000
    encoding = asyncio.ensure_future(tokenizer.encode_async(text))
    num_turns = 0
    while not encoding.done():
        await asyncio.sleep(0)
        num_turns += 1
    assert num_turns > 100
    assert encoding.result() == tokenizer.encode(text)
    tokenizer.close()


async def test_without_threads_everything_happens_on_the_caller(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path, chat_template=PLAIN), num_threads=0)
    text = "the river " * INLINE_CHARACTERS
    coroutine = tokenizer.encode_chat_async([{"role": "user", "content": text}])
    with pytest.raises(StopIteration) as finished:
        coroutine.send(None)
    assert finished.value.value == tokenizer.encode(f"user: {text};", False)
    tokenizer.close()
