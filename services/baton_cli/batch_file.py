"""OpenAI's batch format on disk: requests in, answers out, one JSON object per line.

What could not be attributed to a request (no JSON, no custom_id, one that is there twice) is refused before anything
is computed; what is wrong with a request itself is its answer. Answers are appended and flushed one by one, so that a
run that was killed goes on where it was: a last line that was cut short is dropped, and what has an answer is left out.
"""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import orjson

from baton.errors import ConfigError


class RequestFile:
    """Read twice, once to check it, so that it need not fit into memory."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError with the number of the line that is wrong."""
        self._path = path
        self.custom_ids: dict[str, int] = {}  # and the number of the line
        for number, line in self._numbered():
            custom_id = line["custom_id"]
            if custom_id in self.custom_ids:
                first = self.custom_ids[custom_id]
                raise ConfigError(f"{path}:{number}: custom_id {custom_id!r} is that of line {first}")
            self.custom_ids[custom_id] = number
        if not self.custom_ids:
            raise ConfigError(f"{path} holds no request")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (line for _, line in self._numbered())

    def _numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with self._path.open("rb") as file:
                for number, data in enumerate(file, 1):
                    if data.strip():
                        yield number, _line(data, f"{self._path}:{number}")
        except OSError as error:
            raise ConfigError(f"cannot read {self._path}: {error.strerror}") from None


class AnswerFile:
    """Open for one writer at a time. `answered`: the custom_ids that need no answer any more, and whether it was a good
    one."""

    def __init__(self, path: Path) -> None:
        """Makes the file where there is none. Raises ConfigError, also where it holds something else."""
        self._path = path
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None
        try:
            self._lock()
            self._file.seek(0)
            self.answered = {line["custom_id"]: _is_ok(line) for line in self._complete_lines()}
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, answer: dict[str, Any]) -> None:
        """It is in the file when this returns, and outlives the process. Raises ConfigError."""
        try:
            self._file.write(orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE))
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"cannot write {self._path}: {error.strerror}") from None
        self.answered[answer["custom_id"]] = _is_ok(answer)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process writes to {self._path}") from None

    def _complete_lines(self) -> Iterator[dict[str, Any]]:
        end = 0
        for number, data in enumerate(self._file, 1):
            if not data.endswith(b"\n"):
                os.ftruncate(self._file.fileno(), end)
                return
            end += len(data)
            yield _line(data, f"{self._path}:{number}")


def _line(data: bytes, where: str) -> dict[str, Any]:
    try:
        line = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(line, dict) or not isinstance(line.get("custom_id"), str) or not line["custom_id"]:
        raise ConfigError(f'{where}: needs an object with a "custom_id", a text')
    return line


def _is_ok(answer: dict[str, Any]) -> bool:
    response = answer.get("response")
    return isinstance(response, dict) and response.get("status_code") == 200
