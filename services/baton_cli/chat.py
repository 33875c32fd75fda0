"""`baton chat`: one prompt, or a prompt loop, against any OpenAI-compatible server."""

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from baton_cli.chat_client import ChatClient, ChatError, Message

HELP = "Enter sends; /new forgets the conversation; Ctrl-D or /exit leaves; Ctrl-C stops an answer."


@dataclass(frozen=True)
class ChatOptions:
    base_url: str
    model: str | None
    system: str | None
    api_key: str | None
    sampling: dict[str, Any]

    @property
    def opening(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []


def ask_once(options: ChatOptions, prompt: str) -> int:
    try:
        asyncio.run(_answer(options, [*options.opening, {"role": "user", "content": prompt}]))
    except ChatError as error:
        sys.stderr.write(f"baton: {error}\n")
        return 1
    return 0


def talk(options: ChatOptions, console: Console) -> int:
    """A conversation. An error or an interrupted answer leaves it as it was before the question."""
    console.print(HELP, style="dim", highlight=False)
    messages = options.opening
    while True:
        try:
            prompt = console.input("[bold cyan]>[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return 0
        if prompt == "/exit":
            return 0
        if prompt == "/new":
            messages = options.opening
        elif prompt:
            messages = _turn(options, console, [*messages, {"role": "user", "content": prompt}])


def _turn(options: ChatOptions, console: Console, messages: list[Message]) -> list[Message]:
    before = messages[:-1]
    try:
        answer = asyncio.run(_answer(options, messages))
    except ChatError as error:
        console.print(f"baton: {error}", style="red", highlight=False, markup=False)
        return before
    except KeyboardInterrupt:
        console.print("[interrupted]", style="dim", markup=False)
        return before
    return [*messages, {"role": "assistant", "content": answer}]


async def _answer(options: ChatOptions, messages: Sequence[Message]) -> str:
    """Print the answer as it comes; return all of it."""
    pieces = []
    async with ChatClient(options.base_url, api_key=options.api_key) as client:
        model = options.model or await client.first_model()
        async with contextlib.aclosing(client.stream(model, messages, **options.sampling)) as stream:
            try:
                async for piece in stream:
                    pieces.append(piece)
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            finally:
                if pieces:
                    sys.stdout.write("\n")
    return "".join(pieces)
