import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def quiet() -> Iterator[None]:
    """For modules that provoke failures: their tracebacks are no news."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)
