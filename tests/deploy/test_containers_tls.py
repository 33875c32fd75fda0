"""compose.yaml with compose/tls.yaml for real. See `test_containers` for what it needs."""

from collections.abc import Iterator

import pytest
from containers import MARKS, ask, compose, containers, run, running

pytestmark = MARKS
TLS = ("-f", "compose/tls.yaml")


@pytest.fixture(scope="module")
def fleet() -> Iterator[None]:
    try:
        with running(*TLS, "up", "-d", "--no-build"):
            yield
    finally:
        compose(*TLS, "down", "-v")


def test_it_answers_under_tls(fleet: None) -> None:
    assert ask() == "bob lima"
    [router], [decode] = containers("router"), containers("decode")
    with pytest.raises(AssertionError, match="UNAVAILABLE"):
        run("podman", "exec", "-e", "BATON_TLS__CERT=", decode, "baton", "probe", "127.0.0.1:50051")
    run("podman", "exec", decode, "baton", "probe", "127.0.0.1:50051")
    assert "ca.key" not in run("podman", "exec", router, "find", "/certs")


def test_new_certificates_are_taken_without_a_restart(fleet: None) -> None:
    [decode] = containers("decode")
    before = shown_by(decode)
    compose(*TLS, "run", "--rm", "certs", "certs", "/certs", "--renew")
    assert before != shown_by(decode) == run("podman", "exec", decode, "cat", "/certs/worker/tls.crt")
    assert ask() == "bob lima"


def shown_by(container: str) -> str:
    code = "import ssl; print(ssl.get_server_certificate(('127.0.0.1', 50051)), end='')"
    return run("podman", "exec", container, "python", "-c", code)
