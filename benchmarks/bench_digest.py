"""What the digests of KV cost at each end of a hand-over, against the time of computing that KV. In CPU seconds.

    python benchmarks/bench_digest.py [--model demo] [--tokens 512 2048] [--rounds 5]

One engine computes the prompts in this process (one thread, no prefix cache); then the pieces of each prompt, cut as
`baton.handover.outgoing` cuts them, are digested from blocks of a pool of the same layout, as the sender and the
receiver each do once. `share` is one end's digests / the prefill. The last line is one JSON object.
"""

import argparse
import json
import random
import statistics
import time
from dataclasses import replace

import torch

from baton.config import TransferConfig
from baton.handover.outgoing import Outgoing, layer_group_ends
from baton.kv.layout import KVLayout
from baton.kv.storage import KVStorage
from baton.llm import LLM
from baton.request import BlockId, RequestId, SamplingParams
from baton.transfer import adapt
from baton.transfer.digest import Digester
from baton.transfer.wire import PieceHeader

CHUNK = 512  # tokens of one step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    results = {}
    with LLM(args.model, max_num_batched_tokens=CHUNK, enable_prefix_caching=False) as llm:
        layout = llm.runner.storage.layout
        storage = KVStorage(layout, max(args.tokens) // layout.block_size + 1)
        storage.data.copy_(torch.randint(0, 256, storage.data.shape, dtype=torch.uint8))
        for num_tokens in args.tokens:
            prompts = [_prompt(llm.runner.vocab_size, num_tokens, seed) for seed in range(args.rounds)]
            prefill_s = statistics.median(_prefill(llm, prompt) for prompt in prompts)
            digest_s = statistics.median(_digest(storage, prompt) for prompt in prompts)
            num_bytes = num_tokens * layout.block_bytes // layout.block_size
            results[num_tokens] = {"prefill_s": prefill_s, "digest_s": digest_s, "bytes": num_bytes}
            print(
                f"{num_tokens} tokens, {num_bytes / 1e6:.2f} MB of KV: prefill {prefill_s * 1e3:.1f} ms, digests "
                f"{digest_s * 1e3:.2f} ms ({num_bytes / digest_s / 1e9:.2f} GB/s), share {digest_s / prefill_s:.2%}"
            )
    print(json.dumps(results))


def _prompt(vocab_size: int, num_tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(num_tokens)]


def _prefill(llm: LLM, prompt: list[int]) -> float:
    before_s = time.process_time()
    llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True), use_tqdm=False)
    return time.process_time() - before_s


def _digest(storage: KVStorage, prompt: list[int]) -> float:
    layout, ids = storage.layout, [BlockId(i) for i in range(storage.num_blocks)]
    pieces = [(header, adapt.payload(storage, ids, header)) for header in _headers(layout, len(prompt))]
    before_s = time.process_time()
    digester = Digester("bench", prompt)
    for header, payload in pieces:
        digester.digest(header, layout, payload)
    return time.process_time() - before_s


def _headers(layout: KVLayout, num_tokens: int) -> list[PieceHeader]:
    config = TransferConfig()
    outgoing, found = Outgoing(layout, 0, num_tokens, config.piece_bytes), []
    ends = layer_group_ends(layout.num_layers, config.num_layer_groups) or (layout.num_layers,)
    for end in (*range(CHUNK, num_tokens, CHUNK), num_tokens):
        for num_layers in ends:
            outgoing.written(end, num_layers)
            while (span := outgoing.take()) is not None:
                header = PieceHeader(
                    RequestId("r"), 1, len(found), span.layer_start, span.layer_end, span.token_start,
                    span.token_end, 0, head_end=layout.heads[1], run_tokens=layout.block_size, dtype=layout.dtype,
                )  # fmt: skip
                found.append(replace(header, num_bytes=adapt.payload_bytes(layout, header)))
    return found


if __name__ == "__main__":
    main()
