"""Makes the models of `benchmarks/bench_engine.py`: real shapes, random weights, a tokenizer; nothing is downloaded.

    python scripts/make_bench_model.py --shape qwen-0.5b --out DIR
    python scripts/make_bench_model.py --shape tiny --out DIR

The same seed and torch version give the same weights. The tokenizer is of Qwen's kind, byte-level BPE, with a
vocabulary of three-letter words: `FIRST_WORD` and all ids behind it are " aaa", " aab", ... Only those are ever
generated, so that each token is text and reaches the client as an event of its own.
"""

import argparse
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCAB_SIZE = 16_384
SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>")
SPACE = "\u0120"  # as byte-level BPE writes it
BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
PREFIXES = tuple(SPACE + "".join(letters) for n in (1, 2) for letters in product(ascii_lowercase, repeat=n))
FIRST_WORD = len(SPECIAL_TOKENS) + len(BYTES) + len(PREFIXES)
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The prompt is the message as it is: what a chat endpoint and a completions endpoint compute is the same.
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"

SHAPES = {
    # Qwen2.5-0.5B with a smaller vocabulary: 372 million parameters.
    "qwen-0.5b": {
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    # Seven million parameters: what a step costs beside the arithmetic.
    "tiny": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def make_model(directory: Path, shape: str, seed: int = 0) -> None:
    torch.manual_seed(seed)
    config = Qwen2Config(
        **SHAPES[shape],
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=SPECIAL_TOKENS.index("<bos>"),
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
        dtype="bfloat16",
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[:FIRST_WORD] = 0  # logit 0: never the greedy choice
    model.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = (prefix + letter for prefix, letter in product(PREFIXES[len(ascii_lowercase) :], ascii_lowercase))
    pieces = (*PREFIXES, *islice(words, VOCAB_SIZE - FIRST_WORD))
    vocabulary = {piece: i for i, piece in enumerate((*SPECIAL_TOKENS, *BYTES, *pieces))}
    merges = [(piece[:-1], piece[-1]) for piece in pieces]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    pad, unk, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a directory, made where it is missing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_model(options.out, options.shape, options.seed)
    size = sum(path.stat().st_size for path in options.out.glob("*.safetensors"))
    print(f"{options.out}: {size / 2 / 1e6:.0f} million parameters, {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
