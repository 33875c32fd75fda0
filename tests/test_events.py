"""Events as log records."""

import logging

import pytest

from baton.events import LogEvents


def test_damage_on_a_path_is_a_warning_and_the_rest_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    emit = LogEvents(logging.getLogger("events-test"))
    with caplog.at_level(logging.INFO, "events-test"):
        emit("push.done", request="r")
        emit("piece.mismatch", request="r", to="decode-0", transport="tcp", address="tcp://10.0.0.7:4000")
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.WARNING, "piece.mismatch")
    assert record.fields["address"] == "tcp://10.0.0.7:4000"  # type: ignore[attr-defined]
