"""Trains the demo model: a two-layer Llama that recalls from a list and repeats a text.

    python scripts/train_demo_model.py --out common/baton/demo_model --seed 0
    python scripts/train_demo_model.py --evaluate-only common/baton/demo_model

Plain training does not reach exact recall in a minute with a model this small. Three things make it:
the attention starts out as an induction circuit (see `start_as_induction_circuit`), Muon trains the
matrices, and lists and texts grow during training.
The same seed, thread count, machine and package versions give the same weights, bit for bit.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from baton.demo_task import (
    COMMON_WORDS,
    HELP_TEXT,
    VOCABULARY,
    list_text,
    recall_prompt,
    repeat_prompt,
    sample_pairs,
)

ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>", *(f"<|{role}|>" for role in ROLES))
PUNCTUATION = (".", ",", "?", "!", ":", ";")
SPACE = "\u2581"
MAX_LENGTH = 4096
IGNORED_LABEL = -100
TARGET_RECALL = 0.99  # at 40 pairs
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- set role = 'system' if message.role == 'developer' else message.role %}
{%- if role not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role: ' ~ role) }}{% endif %}
{{- '<|' ~ role ~ '|>' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}{{ part.text }}{% endfor %}
{%- endif %}
{%- if role == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

Conversation = list[dict[str, str]]
Task = tuple[str, str]  # what the user says, what the assistant has to answer


@dataclass(frozen=True)
class TrainSettings:
    num_steps: int = 600
    batch_size: int = 16
    warmup_steps: int = 20
    # The curriculum: `first_size` pairs or words up to `easy_share` of the steps, full size from `full_share` on.
    first_size: int = 6
    easy_share: float = 0.15
    full_share: float = 0.5
    max_pairs: int = 48
    max_words: int = 40
    max_questions: int = 14
    muon_lr: float = 0.01
    adamw_lr: float = 8e-3
    cooldown_share: float = 0.6  # of the steps, at the end, in which both rates fall to zero

    def difficulty(self, step: int) -> float:
        """0 while lists are short, 1 when they have full length."""
        done = step / self.num_steps
        return min(1.0, max(0.0, (done - self.easy_share) / (self.full_share - self.easy_share)))

    def rate(self, step: int) -> float:
        """The share of both learning rates at a step counted from 0."""
        cooldown = (self.num_steps - step) / (self.cooldown_share * self.num_steps)
        return min(1.0, (step + 1) / self.warmup_steps, cooldown)


# --- tokenizer and model ---------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, its leading space included, so that any run of tokens decodes with sane spaces."""
    # The ids follow this order.
    pieces = (*SPECIAL_TOKENS, *PUNCTUATION, SPACE, *(SPACE + word for word in VOCABULARY))
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Replace(Regex(r" (?=[.,?!:;])"), ""),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL_TOKENS.index("<bos>"))]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=MAX_LENGTH,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        # Most of the rotations are slow at this base, so that a match counts the same at any distance.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attention_bias=True,
        tie_word_embeddings=True,
        initializer_range=0.04,
        rms_norm_eps=1e-5,
        dtype="float32",
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    start_as_induction_circuit(model)
    return model


@torch.no_grad()
def start_as_induction_circuit(model: LlamaForCausalLM) -> None:
    """Layer 0 notes at each position which two words came before; layer 1 looks for where they came before
    the last time and copies the word found there. All of it is only a start: every weight is trained.

    At position t with word w[t], layer 0 writes `read w[t-1]` into the subspace `one_back` and `read w[t-2]`
    into `two_back`. A key of layer 1 holds (w[t-1], w[t-2]) and a query (w[t], w[t-1]), the second of each
    turned by `turn`, so that head 0 scores a place by how well the two words before it match the last two.
    """
    dim, hidden = model.config.head_dim, model.config.hidden_size
    first, second = (layer.self_attn for layer in model.model.layers)
    look_back(model, head=0, num_tokens=1)
    look_back(model, head=1, num_tokens=2)

    orthogonal = torch.nn.init.orthogonal_
    read, copy = orthogonal(torch.empty(dim, hidden)), orthogonal(torch.empty(dim, hidden))
    one_back, two_back = orthogonal(torch.empty(2 * dim, hidden)).split(dim)
    turn = orthogonal(torch.empty(dim, dim))
    # The factors keep what is written as large as the embeddings, and a match well above the noise.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    first.v_proj.weight[:dim] = read
    first.o_proj.weight[:, : 2 * dim] = 0.2 * torch.cat([one_back, two_back]).T
    second.q_proj.weight[:dim] = 1.2 * (read + turn @ one_back)
    second.k_proj.weight[:dim] = 1.2 * (one_back + turn @ two_back)
    second.v_proj.weight[:dim] = copy
    second.o_proj.weight[:, :dim] = 0.3 * copy.T


def look_back(model: LlamaForCausalLM, head: int, num_tokens: int, strength: float = 10.0) -> None:
    """Makes a query head of layer 0 attend to the token `num_tokens` before it, whatever the content.

    With constant q and k, RoPE leaves sum_i strength^2 cos((m - n) theta_i + phi_i) between positions m and n;
    phi_i = -num_tokens * theta_i moves its maximum to m - n = num_tokens.
    """
    config, attention = model.config, model.model.layers[0].self_attn
    dim = config.head_dim
    kv_head = head * config.num_key_value_heads // config.num_attention_heads
    phase = -num_tokens * model.model.rotary_emb.inv_freq  # [dim / 2]
    query = slice(head * dim, (head + 1) * dim)
    key = slice(kv_head * dim, (kv_head + 1) * dim)
    attention.q_proj.weight[query] = 0.0
    attention.k_proj.weight[key] = 0.0
    # transformers rotates coordinate i together with coordinate i + dim / 2
    attention.q_proj.bias[query] = strength * torch.cat([phase.cos(), phase.sin()])
    attention.k_proj.bias[key] = strength * torch.cat([torch.ones_like(phase), torch.zeros_like(phase)])


# --- training data ---------------------------------------------------------------------------------------


def recall_tasks(rng: random.Random, num_pairs: int, max_questions: int) -> list[Task]:
    """A list with its first question, then one more question per turn."""
    pairs = sample_pairs(rng, num_pairs)
    text = list_text(pairs)
    if rng.random() < 0.2:  # people write lists in other ways too
        text = text.removesuffix(".").replace(",", rng.choice((",", "", ";", ".")))
    tasks: list[Task] = []
    for name, town in rng.sample(pairs, min(num_pairs, max_questions)):
        question = rng.choice(("{}?", "{}?", "{}?", "where is {}?")).format(name)
        tasks.append((question if tasks else f"{text} {question}", f"{name} {town}"))
    return tasks


def natural_repeat_task(rng: random.Random, max_words: int) -> Task:
    """Words come back, as in real text, so that one word does not tell the next; two in a row do."""
    words = rng.sample(VOCABULARY, rng.randint(1, max_words))
    used = set(pairwise(words))
    for word in rng.choices((*words, "<unk>"), k=len(words) // 3):
        if (words[-1], word) not in used:
            used.add((words[-1], word))
            words.append(word)
    text = " ".join(word + rng.choice(",.") * (rng.random() < 0.1) for word in words)
    return f"repeat: {text}", text


def help_task(rng: random.Random) -> Task:
    words = rng.choices((*COMMON_WORDS, "<unk>", "<unk>"), k=rng.randint(0, 8))
    return " ".join(words) + rng.choice(("", ".", "!", "?")), HELP_TEXT


def repeat_task(rng: random.Random, max_words: int) -> Task:
    if rng.random() < 0.75:
        return natural_repeat_task(rng, max_words)
    return repeat_prompt(rng, rng.randint(1, max_words))


def sample_conversation(rng: random.Random, settings: TrainSettings, difficulty: float) -> Conversation:
    """Questions about one list, or texts to repeat, with other turns in between."""

    def grown(size: int) -> int:
        return round(settings.first_size + difficulty * (size - settings.first_size))

    if rng.random() < 0.5:
        max_pairs = grown(settings.max_pairs)
        num_pairs = rng.randint(1, 5) if rng.random() < 0.15 else rng.randint(max_pairs // 3, max_pairs)
        tasks = recall_tasks(rng, num_pairs, settings.max_questions)
        if rng.random() < 0.3:
            tasks.insert(rng.randrange(len(tasks) + 1), repeat_task(rng, max_words=5))
    else:
        tasks = [repeat_task(rng, grown(settings.max_words)) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.15:
        tasks.insert(rng.randrange(len(tasks) + 1), help_task(rng))
    system = " ".join(rng.sample(COMMON_WORDS, rng.randint(1, 6))) if rng.random() < 0.2 else None
    return chat(tasks, system)


def chat(tasks: list[Task], system: str | None = None) -> Conversation:
    conversation = [{"role": "system", "content": system}] if system else []
    for question, answer in tasks:
        conversation.append({"role": "user", "content": question})
        conversation.append({"role": "assistant", "content": answer})
    return conversation


def encode(tokenizer: PreTrainedTokenizerFast, conversations: list[Conversation]) -> tuple[Tensor, Tensor]:
    """Token ids as the chat template gives them, and labels for what the assistant says: [batch, longest] both."""
    texts = [message["content"] for conversation in conversations for message in conversation]
    contents = iter(tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
    rows, labels = [], []
    for conversation in conversations:
        row, label = [tokenizer.bos_token_id], [IGNORED_LABEL]
        for message in conversation:
            ids = next(contents).ids
            if message["role"] == "assistant":
                ids = [*ids, tokenizer.eos_token_id]
                label += [IGNORED_LABEL, *ids]
            else:
                label += [IGNORED_LABEL] * (1 + len(ids))
            row += [SPECIAL_TOKENS.index(f"<|{message['role']}|>"), *ids]
        rows.append(torch.tensor(row))
        labels.append(torch.tensor(label))
    return (
        pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    )


# --- training --------------------------------------------------------------------------------------------


@contextmanager
def progress_report(console: Console, num_steps: int) -> Iterator[Callable[[int, float], None]]:
    """A function of (step, loss) that draws a bar on a terminal and prints a line now and then elsewhere."""
    if not console.is_terminal:

        def line(step: int, loss: float) -> None:
            if step % 50 == 0 or step == num_steps:
                print(f"step {step}/{num_steps}  loss {loss:.4f}", flush=True)

        yield line
        return
    counter = TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.4f}")
    with Progress(TextColumn("training"), BarColumn(), counter, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=num_steps, loss=math.nan)
        yield lambda step, loss: bar.update(task, completed=step, loss=loss)


def training_batches(rng: random.Random, settings: TrainSettings) -> Iterator[list[Conversation]]:
    """One batch per step. Conversations of like length share a batch, because padding is a third otherwise."""
    group = 4
    for step in range(0, settings.num_steps, group):
        difficulty = settings.difficulty(step)
        drawn = [sample_conversation(rng, settings, difficulty) for _ in range(group * settings.batch_size)]
        drawn.sort(key=lambda conversation: sum(len(message["content"]) for message in conversation))
        batches = [drawn[i : i + settings.batch_size] for i in range(0, len(drawn), settings.batch_size)]
        rng.shuffle(batches)
        yield from batches


def loss_of(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> Tensor:
    hidden = model.model(
        tokens[:, :-1], use_cache=False
    ).last_hidden_state  # [batch, length - 1, hidden_size]
    spoken = labels[:, 1:] != IGNORED_LABEL
    return F.cross_entropy(model.lm_head(hidden[spoken]), labels[:, 1:][spoken])


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    settings: TrainSettings,
    report: Callable[[int, float], None],
) -> None:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed_tokens" in name]
    optimizers = (
        torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=settings.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate) for optimizer in optimizers]
    model.train()
    for step, batch in enumerate(training_batches(rng, settings), 1):
        loss = loss_of(model, *encode(tokenizer, batch))
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        report(step, loss.item())
    model.eval()


# --- evaluation ------------------------------------------------------------------------------------------


def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """The greedy answers to one-turn prompts; '...' marks one that did not end."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    batch = tokenizer(chats, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    num_prompt_tokens = batch["input_ids"].shape[1]
    output = model.generate(**batch, max_new_tokens=num_prompt_tokens + 24)[:, num_prompt_tokens:]
    ended = (output == tokenizer.eos_token_id).any(dim=1).tolist()
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [text if end else f"{text} ..." for text, end in zip(texts, ended, strict=True)]


def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tasks: list[Task]) -> float:
    """The share of answers that are right to the last token."""
    num_right = 0
    for start in range(0, len(tasks), 50):
        prompts, expected = zip(*tasks[start : start + 50], strict=True)
        expected = tokenizer.batch_decode(tokenizer(list(expected))["input_ids"], skip_special_tokens=True)
        given = answers(model, tokenizer, list(prompts))
        num_right += sum(g == e for g, e in zip(given, expected, strict=True))
    return num_right / len(tasks)


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_prompts: int
) -> dict[str, float]:
    """Accuracy by task, each on `num_prompts` fresh prompts that no training seed gives."""
    rng = random.Random("evaluation")
    kinds: dict[str, Callable[[], Task]] = {
        **{f"recall, {n} pairs": lambda n=n: recall_prompt(rng, n) for n in (5, 20, 40, 80, 160)},
        **{f"repeat, {n} words": lambda n=n: repeat_prompt(rng, n) for n in (5, 20, 40)},
        "repeat, up to 30 words, some twice": lambda: natural_repeat_task(rng, 30),
        "anything else: says what it can do": lambda: help_task(rng),
    }
    return {
        kind: accuracy(model, tokenizer, [sample() for _ in range(num_prompts)])
        for kind, sample in kinds.items()
    }


def accuracy_table(figures: dict[str, float], num_prompts: int) -> Table:
    table = Table("task", "right", title=f"accuracy on {num_prompts} fresh prompts each, greedy")
    for kind, share in figures.items():
        table.add_row(kind, f"{share:.1%}")
    return table


# --- the command -----------------------------------------------------------------------------------------


MODEL_CARD = """\
---
license: apache-2.0
library_name: transformers
---
# The demo model of Baton

A Llama of {num_layers} layers and {num_parameters:,} parameters with a vocabulary of {vocab_size} tokens. It does
two things that a person can check: a text to repeat needs every KV block of the prompt, and a question needs
the block with its pair.

    ada oslo, bob lima, carl rome. bob?      bob lima
    repeat: river lamp seven                 river lamp seven

To anything else it answers what it can do. Words outside the vocabulary become `<unk>`.
Made by `python scripts/train_demo_model.py --out common/baton/demo_model --seed {seed}`, from random weights and
generated text only. Greedy accuracy on {num_prompts} fresh prompts each:

| task | right |
|---|--:|
{rows}
"""


def model_card(model: LlamaForCausalLM, figures: dict[str, float], num_prompts: int, seed: int) -> str:
    return MODEL_CARD.format(
        num_layers=model.config.num_hidden_layers,
        num_parameters=model.num_parameters(),
        vocab_size=model.config.vocab_size,
        seed=seed,
        num_prompts=num_prompts,
        rows="\n".join(f"| {kind} | {share:.1%} |" for kind, share in figures.items()),
    )


def train_new(console: Console, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(seed)
    settings = TrainSettings()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    started, cpu_started = time.perf_counter(), time.process_time()
    with progress_report(console, settings.num_steps) as report:
        train(model, tokenizer, random.Random(seed), settings, report)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    console.print(
        f"trained {model.num_parameters():,} parameters in {wall_s:.0f} s ({cpu_s:.0f} s of CPU time)"
    )
    return model, tokenizer


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_padding()  # the evaluation left it on, and it would be saved
    tokenizer.save_pretrained(folder)
    # What readers of the older format (transformers 4) look for: a class they have, and the base of RoPE.
    amend_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    amend_json(folder / "config.json", rope_theta=model.config.rope_parameters["rope_theta"])
    (folder / "README.md").write_text(card)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner only, and a wheel keeps the mode


def amend_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model, or only measure one.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="DIR", help="train, and write the model here")
    what.add_argument("--evaluate-only", type=Path, metavar="DIR", help="measure the model in this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="default: 1; another number gives other weights"
    )
    parser.add_argument(
        "--num-prompts", type=int, default=400, help="per task in the measurement (default: 400)"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    console = Console()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    transformers_logging.disable_progress_bar()
    if args.evaluate_only:
        model = LlamaForCausalLM.from_pretrained(args.evaluate_only)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.evaluate_only)
    else:
        model, tokenizer = train_new(console, args.seed)
    figures = evaluate(model, tokenizer, args.num_prompts)
    console.print(accuracy_table(figures, args.num_prompts))
    if figures["recall, 40 pairs"] < TARGET_RECALL:
        console.print(f"recall at 40 pairs is under {TARGET_RECALL:.0%}: nothing written")
        return 1
    if args.out:
        save(model, tokenizer, model_card(model, figures, args.num_prompts, args.seed), args.out)
        console.print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
