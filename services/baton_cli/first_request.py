"""The request that `make run` sends when all is ready: as a user would, over HTTP; then how it was made."""

import contextlib
import json
import random
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from baton.demo_task import recall_prompt
from baton_cli.chat_client import ChatClient

NUM_PAIRS = 20
MAX_TOKENS = 48


async def show_first_request(client: ChatClient, model: str, *, is_demo: bool, console: Console) -> None:
    """Raises ChatError."""
    prompt, expected = recall_prompt(random.Random(), NUM_PAIRS) if is_demo else ("Hello", None)
    messages = [{"role": "user", "content": prompt}]
    console.print(Text.assemble(("\nyou    ", "bold cyan"), prompt))
    console.print(Text(f"{model:<7}"[:32], style="bold green"), end="")
    pieces = []
    stream = client.stream(model, messages, max_tokens=MAX_TOKENS, temperature=0)
    async with contextlib.aclosing(stream):
        async for piece in stream:
            pieces.append(piece)
            console.print(Text(piece), end="", soft_wrap=True)
    console.print(_verdict("".join(pieces), expected))
    if client.request_id:
        console.print(_how_it_was_made(await client.get_json(f"/debug/requests/{client.request_id}")))
    asked = "bob lima, ada oslo. ada?" if is_demo else prompt
    console.print(_curl(client.base_url, model, asked, has_key=client.has_key), soft_wrap=True)


def _verdict(answer: str, expected: str | None) -> Text:
    if expected is None:
        return Text("")
    if answer.strip().rstrip(".") == expected:
        return Text("  (right)", style="green")
    return Text(f"  (wrong: expected {expected!r})", style="bold red")


def _how_it_was_made(record: Mapping[str, Any]) -> Panel:
    rows = Table.grid(padding=(0, 2))
    for name, value in _rows(record):
        rows.add_row(Text(name, style="dim"), value)
    return Panel(rows, title="how it was made", title_align="left", expand=False)


def _rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    num_blocks, num_bytes = record.get("num_blocks_transferred"), record.get("num_bytes_transferred")
    moved = f"{num_blocks} blocks, {_size(num_bytes)}" if num_blocks else "none"
    if num_blocks and record.get("transfer_s") is not None:
        moved += f" in {_milliseconds(record['transfer_s'])}"
    return [
        ("prefill worker", record.get("prefill_worker") or "-"),
        ("decode worker", record.get("decode_worker") or "-"),
        ("transport", record.get("transport") or "-"),
        ("KV transferred", moved),
        ("tokens", f"{record.get('num_prompt_tokens', '-')} in, {record.get('num_output_tokens', '-')} out"),
        ("first token", _milliseconds(record.get("ttft_s"))),
        ("between tokens", _milliseconds(record.get("mean_itl_s"))),
    ]


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _size(num_bytes: int | None) -> str:
    size = float(num_bytes or 0)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _curl(base_url: str, model: str, prompt: str, *, has_key: bool) -> Text:
    """The key itself is not shown: terminals are recorded."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True})
    quoted = body.replace("'", "'\\''")
    key = ' -H "authorization: Bearer $OPENAI_API_KEY"' if has_key else ""
    return Text(
        f"\ncurl -N {base_url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{quoted}'\n",
        style="cyan",
    )
