"""What `baton up` shows: the children's output with names in front, the table, a dead child's last words."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

COLORS = ("cyan", "magenta", "yellow", "green", "blue", "bright_red")
MIN_WIDTH = 120  # where the output is no terminal


class View:
    """Owns the terminal while `up` runs."""

    def __init__(self, console: Console, *, prefix: bool) -> None:
        """`prefix` is off for JSON logs, which name their component themselves and must stay whole lines."""
        self.console = console
        self._prefix = prefix
        self._colors: dict[str, str] = {}
        self._status: Status | None = None
        if not console.is_terminal:
            console.width = max(console.width, MIN_WIDTH)

    def line(self, name: str, line: str) -> None:
        """One line of a child's output."""
        if not self._prefix:
            self.console.out(line, highlight=False)
            return
        color = self._colors.setdefault(name, COLORS[len(self._colors) % len(COLORS)])
        text = Text.assemble((f"{name:<10}| ", color), Text.from_ansi(line))
        self.console.print(text, soft_wrap=True, highlight=False)

    def child_env(self, env: Mapping[str, str]) -> dict[str, str]:
        """Children write to a pipe and cannot know whether their output ends on a terminal."""
        colored = self.console.is_terminal and not self.console.no_color
        return {**env, ("FORCE_COLOR" if colored else "NO_COLOR"): "1"}

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """A spinner on a terminal, plain lines elsewhere, fed by `waiting_for`."""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status("starting") as self._status:
            try:
                yield
            finally:
                self._status = None

    def waiting_for(self, names: Set[str]) -> None:
        if not names:
            return
        text = f"waiting for {', '.join(sorted(names))}"
        if self._status is not None:
            self._status.update(text)
        else:
            self.note(text, "dim")

    def note(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True, highlight=False)

    def tail(self, name: str, lines: Sequence[str]) -> None:
        self.note(f"--- the last {len(lines)} lines of {name} ---", "bold red")
        for line in lines:
            self.console.print(Text.from_ansi(line), soft_wrap=True, highlight=False)

    def table(self, rows: Sequence[tuple[str, int, Mapping[str, Any]]]) -> None:
        """(name, pid, what it said when it was ready)"""
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        for column in ("component", "pid", "address", "role", "transport", "model", "blocks"):
            table.add_column(column, overflow="fold")
        for name, pid, info in rows:
            table.add_row(name, str(pid), *_cells(name, info))
        self.console.print()
        self.console.print(table)


def _cells(name: str, info: Mapping[str, Any]) -> list[str]:
    num_blocks, block_size = info.get("num_blocks"), info.get("block_size")
    return [
        str(info.get("address") or info.get("url") or "-"),
        " ".join(info["roles"]) if "roles" in info else name.rpartition("-")[0] or name,
        str(info.get("transport") or "-"),
        str(info.get("model") or "-"),
        f"{num_blocks} x {block_size}" if num_blocks and block_size else str(num_blocks or "-"),
    ]
