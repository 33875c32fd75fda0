import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from baton_kernels.native import Native


@pytest.fixture(scope="module")
def ops() -> "Native":
    from baton_kernels import native  # torch, which most modules can do without

    try:
        return native.load()
    except native.Unavailable as error:
        pytest.skip(f"no native ops: {error}")


@pytest.fixture
def quiet() -> Iterator[None]:
    """For modules that provoke failures: their tracebacks are no news."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)
