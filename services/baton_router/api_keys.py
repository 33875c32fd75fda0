"""Who may ask: the keys of clients, from a file with one key on each line. Read once, when the router starts.

With no file everybody may ask. A key is added, given out and the old one removed with a restart after each step.
"""

import re
from collections.abc import Iterable
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path

from baton.errors import ConfigError, Unauthenticated

KEY = re.compile(r"[\x21-\x7e]+")  # what a header can hold
SCHEME = "bearer"


class ApiKeys:
    """Compares digests, all of them: how long it takes tells nothing about a key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def check(self, authorization: str | None) -> None:
        """The header of that name. Raises Unauthenticated."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != SCHEME or not key.strip():
            raise Unauthenticated("an API key is needed: Authorization: Bearer <key>")
        given = _digest(key.strip())
        if not sum(compare_digest(digest, given) for digest in self._digests):
            raise Unauthenticated("this API key is not known here")


def read_keys(file: str) -> list[str]:
    """Raises ConfigError."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_keys_file {file}: {getattr(error, 'strerror', None) or error}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ConfigError(f"api_keys_file {file}: no key in it; write one on each line")
    for number, key in enumerate(keys, 1):
        if KEY.fullmatch(key) is None:
            raise ConfigError(f"api_keys_file {file}: key {number} must be printable ASCII without spaces")
    return keys


def load_api_keys(file: str | None) -> ApiKeys | None:
    return None if file is None else ApiKeys(read_keys(file))


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
