"""One model type of the survey: a small random model, through Baton's engine and through transformers' generate().

Read by `survey_models.py`, which runs this file as a process of its own: one model type per line on stdin, one verdict
as JSON per line on stdout.
"""

import asyncio
import json
import math
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from baton.clock import SystemClock
from baton.config import EngineConfig, ModelConfig
from baton.engine.engine import Engine
from baton.engine.model_runner import load_runner
from baton.engine.sequence import Sequence
from baton.errors import ConfigError
from baton.model.loader import HAS_ENCODER, STATEFUL
from baton.request import Request, RequestId, SamplingParams

MAX_MODEL_LEN = 256
VOCAB_SIZE = 256
BLOCK = 8
WINDOW = 12
NUM_TOKENS = 10
LENGTHS = (5, 23, 40)
NUM_SHARED = 2 * BLOCK  # tokens that the last prompt has in common with the one before it
TOLERANCE = 1e-3  # of the logits' standard deviation
_NUM_TRIES = 8

# Small values for whatever a config has of these.
_SMALL: tuple[tuple[int | float | bool, str], ...] = (
    (VOCAB_SIZE, "vocab_size vocab_size_per_layer_input"),
    (MAX_MODEL_LEN, "max_position_embeddings n_positions max_seq_len model_max_length"),
    (64, "hidden_size d_model n_embd embedding_size attention_hidden_size decoder_hidden_size"),
    (96, "intermediate_size ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size"),
    (96, "dense_intermediate_size intermediate_size_mlp"),
    (48, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    (48, "expert_ffn_hidden_size moe_ffn_hidden_size expert_intermediate_size"),
    (32, "kv_lora_rank"),
    (24, "q_lora_rank qk_head_dim"),
    (16, "head_dim kv_channels qk_nope_head_dim attention_chunk_size hidden_size_per_layer_input"),
    (16, "attention_head_dim global_head_dim swa_head_dim d_kv"),
    (WINDOW, "v_head_dim swa_v_head_dim sliding_window"),
    (8, "qk_rope_head_dim laurel_rank rotary_dim"),
    (4, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"),
    (4, "num_decoder_layers num_encoder_layers num_attention_heads n_head n_heads num_heads"),
    (4, "decoder_attention_heads encoder_attention_heads swa_num_attention_heads"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_key_value_heads num_kv_heads n_head_kv num_global_key_value_heads swa_num_key_value_heads"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts n_group num_expert_group"),
    (2, "max_window_layers num_kv_shared_layers"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace topk_group"),
    (1, "decoder_sparse_step num_dense_layers zero_expert_num"),
    (0.2, "initializer_range init_std"),
    (0.0, "hidden_dropout attention_dropout resid_pdrop embd_pdrop attn_pdrop dropout layerdrop"),
    (0.0, "decoder_layerdrop router_jitter_noise input_jitter_noise"),
    (True, "use_sliding_window is_decoder"),
    (False, "is_encoder_decoder add_cross_attention"),
)
SMALL = {name: value for value, names in _SMALL for name in names.split()}

# What the rules above do not find.
BY_TYPE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"layer_types": ["full_attention"] * 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4},
}
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "forced_eos_token_id")


class Reference(NamedTuple):
    prompt: tuple[int, ...]
    token_ids: list[int]  # greedy
    logits: torch.Tensor  # [NUM_TOKENS, vocab], from which they were drawn


def small_config(model_type: str) -> Any:
    """A config of every feature that the type has, at the smallest size."""
    config_class = type(AutoConfig.for_model(model_type))
    return config_class(**{**_shrink(AutoConfig.for_model(model_type)), **BY_TYPE.get(model_type, {})})


def _shrink(default: Any) -> dict[str, Any]:
    values = {name: SMALL[name] for name in default.to_dict() if name in SMALL}
    present = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    num_layers = 4
    for name, value in present.items():
        if isinstance(value, PreTrainedConfig):
            values[name] = type(value)(**_shrink(value))
        elif isinstance(value, list | tuple) and len(value) > 1 and name not in SMALL:
            kinds = sorted({repr(item): item for item in value}.items())
            if name.endswith("layer_types") or len(value) == getattr(default, "num_hidden_layers", -1):
                values[name] = [kinds[i % len(kinds)][1] for i in range(num_layers)]
    if "layer_types" in values and "sliding_window" in values:
        # Where a type knows both kinds, both are in the model, also where its default has only one of them.
        kinds_there = set(values["layer_types"])
        if kinds_there <= {"full_attention", "sliding_attention"}:
            values["layer_types"] = ["sliding_attention", "full_attention"] * 2
    if "qk_rope_head_dim" in values and "head_dim" in values:
        values["head_dim"] = values["qk_rope_head_dim"]
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    # Some refuse to have none of these.
    for i, name in enumerate(_SPECIAL_TOKENS):
        if isinstance(present.get(name), int):
            values[name] = i
    return values


def survey(model_type: str) -> dict[str, str]:
    try:
        default = AutoConfig.for_model(model_type)
    except Exception as error:
        return _verdict("failed", f"no default config: {_said(error)}")
    if getattr(default, "is_encoder_decoder", False):
        return _verdict("refused", HAS_ENCODER)
    if getattr(AutoModelForCausalLM._model_mapping[type(default)], "_is_stateful", False):
        return _verdict("refused", STATEFUL)
    try:
        model = _random_model(small_config(model_type))
    except ImportError:  # which one is missing first depends on what else is installed
        return _verdict("failed", "no small one: it needs libraries that Baton does not install")
    except Exception as error:
        return _verdict("failed", f"no small one: {_said(error)}")
    with tempfile.TemporaryDirectory() as directory:
        try:
            model.save_pretrained(directory)
            references = _references(directory)
        except Exception as error:
            return _verdict("failed", f"generate(): {_said(error)}")
        try:
            return asyncio.run(_compare(Path(directory), references))
        except ConfigError as error:
            return _verdict("refused", error.message.split(" is not supported: ")[-1])


def _random_model(config: Any) -> Any:
    torch.manual_seed(0)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if num_parameters > 20e6:
        raise ValueError(f"it has {num_parameters / 1e6:.0f}M parameters")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero after initialisation, which would hide that they are forgotten
            torch.nn.init.normal_(parameter, std=0.1)
    return model.float().eval()


@torch.inference_mode()
def _references(directory: str) -> list[Reference]:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.generation_config = GenerationConfig()
    rng = random.Random(0)
    references = [_reference(model, rng, (), length) for length in LENGTHS]
    shared = references[-1].prompt[:NUM_SHARED]
    return [*references, _reference(model, rng, shared, 13)]


def _reference(model: Any, rng: random.Random, prefix: tuple[int, ...], length: int) -> Reference:
    """The first random prompt with an answer that rounding cannot change."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    for _ in range(_NUM_TRIES):
        prompt = (*prefix, *(rng.randrange(1, VOCAB_SIZE) for _ in range(length)))
        ids = torch.tensor([prompt])
        result = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        logits = torch.stack(result.logits)[:, 0].float()
        best = logits.topk(2).values
        if not logits.isfinite().all():
            raise ValueError("its logits are not numbers")
        if (best[:, 0] - best[:, 1]).min() > 4 * TOLERANCE * logits.std():
            return Reference(prompt, result.sequences[0, len(prompt) :].tolist(), logits)
    raise ValueError("its two best logits are too often the same")


class _Listener:
    """Keeps the logits that the model gives, by the position and the id of the token that they follow."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.logits: list[tuple[int, int, torch.Tensor]] = []
        model.register_forward_hook(self._hear, with_kwargs=True)

    def _hear(self, _: object, __: object, kwargs: dict[str, Any], output: Any) -> None:
        last, logits = kwargs["logits_to_keep"], output.logits[0].float()
        ids, positions = kwargs["input_ids"][0][last].tolist(), kwargs["position_ids"][0][last].tolist()
        rows = logits if len(logits) == len(ids) else logits[last]
        self.logits += zip(positions, ids, rows, strict=True)

    def error(self, references: list[Reference]) -> float:
        """The largest difference to a reference, in standard deviations of its logits."""
        worst = 0.0
        for position, token, logits in self.logits:
            candidates = [
                ((logits - reference.logits[step]).abs().max() / reference.logits.std()).item()
                for reference in references
                if 0 <= (step := position - len(reference.prompt) + 1) < NUM_TOKENS
                and (reference.prompt[-1:] + tuple(reference.token_ids))[step] == token
            ]
            error = min(candidates, default=math.inf)
            worst = max(worst, error if error == error else math.inf)
        self.logits.clear()
        return worst


async def _compare(directory: Path, references: list[Reference]) -> dict[str, str]:
    settings = EngineConfig(
        block_size=BLOCK, num_blocks=64, max_num_seqs=4, max_num_batched_tokens=21, num_threads=1
    )
    model = ModelConfig(str(directory), dtype="float32", max_model_len=MAX_MODEL_LEN)
    loaded = load_runner(model, settings, fill_nan=True, surveyed=False)
    engine = Engine(settings, loaded.runner, SystemClock(), loaded.fingerprint)
    listener = _Listener(loaded.runner._model)
    try:
        sequences = await _generate(engine, references[:3])
        sequences += await _generate(engine, references[3:])
        error = listener.error(references)
        if any(
            r.token_ids != s.token_ids[len(r.prompt) :] for r, s in zip(references, sequences, strict=True)
        ):
            return _verdict("wrong", "other tokens than generate()")
        if error > TOLERANCE:
            return _verdict("wrong", f"logits off by {error:.2g} standard deviations")
        if sequences[-1].num_cached_tokens != NUM_SHARED:
            return _verdict(
                "wrong", f"{sequences[-1].num_cached_tokens} cached tokens instead of {NUM_SHARED}"
            )
        _spoil_a_block(engine, sequences)
        await _generate(engine, references[2:3])
        if listener.error(references[2:3]) < 10 * TOLERANCE:
            return _verdict("wrong", "a wrong block changed nothing")
        return _verdict("ok", _features(loaded.runner))
    finally:
        await loaded.runner.aclose()


async def _generate(engine: Engine, references: list[Reference]) -> list[Sequence]:
    sequences = []
    for i, reference in enumerate(references):
        request_id = RequestId(str(i))
        engine.add(
            Request(request_id, reference.prompt, SamplingParams(max_tokens=NUM_TOKENS, temperature=0))
        )
        sequences.append(engine.sequence(request_id))
    while engine.num_sequences:
        for output in (await engine.step()).outputs:
            if output.error:
                raise ConfigError(f"a step failed: {output.error}")
    engine.check_integrity()
    return sequences


def _spoil_a_block(engine: Engine, sequences: list[Sequence]) -> None:
    """The last block that the longest prompt finds in the prefix cache gets the content of another prompt's."""
    pool, data = engine._kv._pool, engine._runner.storage.data
    spoilt, foreign = pool.lookup(sequences[2].block_hashes[3]), pool.lookup(sequences[1].block_hashes[1])
    data[spoilt] = data[foreign]


def _features(runner: Any) -> str:
    layers = runner._layers
    features = {
        f"windows of {layer.window.size}" if not layer.window.chunked else f"chunks of {layer.window.size}"
        for layer in layers
        if layer.window
    }
    if any(not layer.writes for layer in layers):
        features.add("shared KV")
    if any(shape.v_dim == 0 for shape in runner.storage.layout.layers):
        features.add("latent KV")
    config = runner._model.config
    if config.get_text_config(decoder=True) is not config:
        features.add("text only")
    return ", ".join(sorted(features))


def _verdict(verdict: str, reason: str) -> dict[str, str]:
    return {"verdict": verdict, "reason": reason}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def main() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            row = survey(line.strip())
        except Exception as error:
            row = _verdict("failed", _said(error))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
