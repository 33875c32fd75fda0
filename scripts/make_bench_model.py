"""Makes the models of `benchmarks/bench_engine.py`: real shapes, random weights, a tokenizer; nothing is downloaded.

    python scripts/make_bench_model.py --shape qwen-0.5b --out DIR
    python scripts/make_bench_model.py --shape tiny --out DIR

The same seed and torch version give the same weights. Every token but the special ones is a word of its own, `w0` to
`w16379`, so that each generated token is text and reaches the client as an event of its own.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>")
SPACE = "\u2581"
VOCAB_SIZE = 16_384
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
        model.get_input_embeddings().weight[: len(SPECIAL_TOKENS)] = 0  # logit 0: never the greedy choice
    model.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = (f"{SPACE}w{i}" for i in range(VOCAB_SIZE - len(SPECIAL_TOKENS)))
    vocabulary = {piece: i for i, piece in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
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
