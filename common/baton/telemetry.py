"""Log records: how a process writes what it tells. Configured once by whoever starts the process.

Logs are text for people on a terminal, one JSON object per line elsewhere. Code logs with the standard
library; fields go into `extra`, or shorter through `event(log, "worker ready", address=address)`.
"""

import datetime
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, TextIO

from baton.config import LogConfig

# Each tells of every request, connection or phase of its own at INFO, which drowns what we say.
CHATTY_LOGGERS = ("httpx", "httpcore", "huggingface_hub", "uvicorn", "filelock")
MAX_TEXT_VALUE = 80  # characters of one field on a terminal; JSON has them all


def configure_logging(
    config: LogConfig, component: str, stream: TextIO | None = None, *, show_component: bool = True
) -> None:
    """Send every record of this process to `stream` (default: stdout). Replaces what was configured before.

    `component` names the process, such as "prefill-0". Text can go without it, where a supervisor
    puts it in front.
    """
    out = sys.stdout if stream is None else stream
    as_text = config.format == "text" or (config.format == "auto" and out.isatty())
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        TextFormatter(component if show_component else "", color=wants_color(out))
        if as_text
        else JsonFormatter(component)
    )
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.root.level))


def event(log: logging.Logger, message: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """A record with named fields. Any name will do: they never clash with the attributes of `LogRecord`."""
    if log.isEnabledFor(level):
        log.log(level, message, extra={"fields": fields}, stacklevel=2)


def wants_color(stream: TextIO, env: Mapping[str, str] = os.environ) -> bool:
    if env.get("NO_COLOR"):
        return False
    return bool(env.get("FORCE_COLOR")) or stream.isatty()


_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "color_message",
    "fields",
}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    extras = {key: value for key, value in vars(record).items() if key not in _STANDARD_ATTRIBUTES}
    return extras | getattr(record, "fields", {})


class JsonFormatter(logging.Formatter):
    """One object per line: ts, level, component, logger, msg, the fields, exception."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "ts": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "component": self._component,
            "logger": record.name,
            "msg": record.getMessage(),
        }
        line |= {key: value for key, value in _fields(record).items() if key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """`12:00:01 prefill-0 INFO  worker ready  address=127.0.0.1:40001 blocks=512`"""

    _COLORS: ClassVar = {"DEBUG": "2", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}

    def __init__(self, component: str, *, color: bool) -> None:
        super().__init__()
        self._component = component
        self._color = color

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname
        parts = [self._paint(self.formatTime(record, "%H:%M:%S"), "2")]
        parts += [self._paint(self._component, "36")] if self._component else []
        parts += [self._paint(f"{level:<7}", self._COLORS.get(level, "0")), record.getMessage()]
        parts += [self._paint(f" {key}=", "2") + _text_value(value) for key, value in _fields(record).items()]
        text = " ".join(parts)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._color else text


def _text_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    if len(text) > MAX_TEXT_VALUE:
        text = text[: MAX_TEXT_VALUE - 3] + "..."
    return json.dumps(text) if not text or any(c.isspace() for c in text) else text
