"""Certificates between processes: made, read, read again, and refused in words that say what to do. Real sockets."""

import asyncio
import shutil
import stat
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from test_mirror import record_of
from typer.testing import CliRunner

from baton import messages as m
from baton.certificates import Certificates, export_expiry, load_certificates
from baton.clock import SystemClock
from baton.config import RouterConfig, TlsConfig
from baton.errors import ConfigError, InvalidRequest, Unauthenticated, Unavailable
from baton.index.base import WorkerJoined
from baton.request import WorkerId
from baton.rpc import FETCH, ROUTER_CANCEL, SESSION, STATUS_GET, GrpcRpc, Handlers, Method, Security
from baton.rpc.base import single
from baton.rpc.grpc_server import GrpcServer
from baton.rpc.secure import channel_credentials, why_no_connection
from baton_cli.certs import CA_LIFE, ROLES, Directory, make_certificates, utc_now
from baton_cli.cluster_secrets import ClusterSecrets
from baton_cli.main import app
from baton_cli.probe import probe
from baton_router.fleet import Fleet
from baton_router.fleet_view import readiness
from baton_router.mirror import PrefixMirror

TIMEOUT_S = 5.0
CALL = m.CancelCall("r")
NOW = utc_now()


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of `baton certs`: two fleets, one of them also with certificates that have expired."""
    root = tmp_path_factory.mktemp("fleets")
    for fleet in ("ours", "foreign"):
        make(root / fleet)
    shutil.copytree(root / "ours", root / "expired")
    make(root / "expired", now=NOW - timedelta(days=10), days=5, renew_all=True)
    shutil.copytree(root / "ours", root / "elsewhere")
    make(root / "elsewhere", domain="other", renew_all=True)
    return root


def make(
    root: Path, *, domain: str = "baton", days: int = 90, now: Any = NOW, renew_all: bool = False
) -> list[str]:
    return make_certificates(Directory(root), tuple(ROLES), domain, days, now, renew_all=renew_all)


def tls(directory: Path, domain: str = "baton") -> TlsConfig:
    return TlsConfig(*(str(directory / name) for name in ("tls.crt", "tls.key", "ca.crt")), domain)


def certificates(directory: Path, own: Any = None, domain: str = "baton") -> Certificates:
    found = load_certificates(tls(directory, domain), own or directory.name, SystemClock())
    assert found is not None
    return found


async def cancel(call: m.CancelCall) -> m.CancelResult:
    return m.CancelResult(call.request_id == "r")


async def refuse(request: Any) -> Any:
    raise InvalidRequest("empty")


async def echo(requests: AsyncIterator[m.SessionUp]) -> AsyncGenerator[m.SessionDown, None]:
    async for request in requests:
        assert isinstance(request, m.Cancel)
        yield m.Failure(request.handle, Unavailable.code, "echo")


HANDLERS: Handlers = {ROUTER_CANCEL: cancel, SESSION: echo, FETCH: refuse, STATUS_GET: refuse}


@asynccontextmanager
async def worker(directory: Path | None, **options: Any) -> AsyncIterator[GrpcServer]:
    """A gRPC server as a worker has it."""
    security = Security(certificates(directory, "worker")) if directory else None
    async with serving(security, **options) as server:
        yield server


@asynccontextmanager
async def serving(security: Security | None, **options: Any) -> AsyncIterator[GrpcServer]:
    rpc = GrpcRpc(SystemClock(), security=security, **options)
    server = await rpc.serve("127.0.0.1:0", HANDLERS)
    assert isinstance(server, GrpcServer)
    server.set_serving(True)
    try:
        yield server
    finally:
        await server.aclose(0.1)


async def call(address: str, security: Security | None) -> m.CancelResult:
    channel = GrpcRpc(SystemClock(), security=security).connect(address)
    try:
        return await channel.unary(ROUTER_CANCEL, CALL, timeout_s=TIMEOUT_S)
    finally:
        await channel.aclose()


class TestFiles:
    def test_what_is_made_is_what_a_process_takes(self, fleets: Path) -> None:
        for role in ("router", "worker"):
            loaded = certificates(fleets / "ours" / role).current()
            assert loaded.not_after - NOW == timedelta(days=90) - timedelta(microseconds=NOW.microsecond)
            certificates(fleets / "ours" / "up", role)
        assert load_certificates(TlsConfig(), "worker", SystemClock()) is None

    def test_keys_are_for_their_owner_only(self, fleets: Path) -> None:
        keys = [fleets / "ours" / "ca.key", *(fleets / "ours").glob("*/tls.key")]
        assert len(keys) == 1 + len(ROLES)
        assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (lambda d: (d / "tls.key").unlink(), r"cannot read .*tls\.key: No such file"),
            (lambda d: (d / "tls.crt").write_text("?"), r"tls\.crt holds no certificate in PEM"),
            (lambda d: (d / "ca.crt").write_text(""), r"cannot use tls\.cert .*ca\.crt"),
            (
                lambda d: shutil.copy(d.parent.parent / "foreign/worker/tls.key", d),
                r"cannot use tls\.cert.*KEY_VALUES_MISMATCH",
            ),
            (
                lambda d: [shutil.copy(d.parent / f"router/tls.{e}", d) for e in ("crt", "key")],
                r"must have the DNS name worker\.baton \(see tls\.domain\); it has router\.baton",
            ),
            (
                lambda d: [
                    shutil.copy(d.parent.parent / f"expired/worker/tls.{e}", d) for e in ("crt", "key")
                ],
                r"tls\.crt expired on .*: renew it",
            ),
        ],
    )
    def test_files_that_cannot_be_used_are_named(
        self, fleets: Path, tmp_path: Path, change: Any, complaint: str
    ) -> None:
        shutil.copytree(fleets, tmp_path / "all")
        change(tmp_path / "all/ours/worker")
        with pytest.raises(ConfigError, match=complaint):
            certificates(tmp_path / "all/ours/worker")

    def test_all_three_or_none(self, fleets: Path) -> None:
        with pytest.raises(ConfigError, match="set all three, or none"):
            load_certificates(TlsConfig(cert="x"), "worker", SystemClock())

    def test_files_are_read_again_when_they_change_and_only_if_they_can_be_used(
        self, fleets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What cannot be used is said once."""
        shutil.copytree(fleets / "ours", tmp_path / "f")
        found = certificates(tmp_path / "f" / "worker")
        first = found.current()
        assert found.current() is first
        (tmp_path / "f/worker/tls.crt").write_text("half a fi")
        assert found.current() is first
        shutil.rmtree(tmp_path / "f/worker")
        assert found.current() is first
        assert found.current() is first
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
        make(tmp_path / "f")
        renewed = found.current()
        assert renewed is not first
        assert renewed.cert == (tmp_path / "f/worker/tls.crt").read_bytes()

    def test_when_it_expires_is_a_metric(self, fleets: Path) -> None:
        name, registry = "baton_certificate_expiry_timestamp_seconds", CollectorRegistry()
        found = certificates(fleets / "ours/worker")
        export_expiry(found, registry)
        assert registry.get_sample_value(name) == found.current().not_after.timestamp()


class TestAuthority:
    def test_only_what_is_due_is_renewed(self, tmp_path: Path) -> None:
        assert len(make(tmp_path)) == 1 + len(ROLES)
        assert make(tmp_path) == []
        assert make(tmp_path, now=NOW + timedelta(days=59)) == []
        assert len(make(tmp_path, now=NOW + timedelta(days=61))) == len(ROLES)
        assert len(make(tmp_path, domain="other", now=NOW + timedelta(days=61))) == len(ROLES)

    def test_a_new_authority_stands_beside_the_former_one(self, tmp_path: Path) -> None:
        make(tmp_path)
        old = (tmp_path / "ca.crt").read_bytes()
        made = make(tmp_path, now=NOW + CA_LIFE * 0.7)
        assert made[0] == "an authority for baton" and len(made) == 1 + len(ROLES)
        trusted = (tmp_path / "worker/ca.crt").read_bytes()
        new, former = x509.load_pem_x509_certificates(trusted)
        assert x509.load_pem_x509_certificate(old) == former
        leaf = x509.load_pem_x509_certificate((tmp_path / "worker/tls.crt").read_bytes())
        leaf.verify_directly_issued_by(new)

    def test_the_command_says_what_it_made(self, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["certs", str(tmp_path), "--domain", "fleet.example", "--days", "7"])
        assert done.exit_code == 0, done.output
        assert "worker: worker.fleet.example" in done.output
        assert (
            CliRunner().invoke(app, ["certs", str(tmp_path), "--domain", "fleet.example"]).output
            == "all is fresh\n"
        )
        for arguments in (["certs"], ["certs", str(tmp_path), "--secrets", "x"]):
            assert isinstance(CliRunner().invoke(app, arguments).exception, ConfigError)
        assert isinstance(
            CliRunner().invoke(app, ["certs", "--secrets", "x"]).exception, ConfigError
        )  # no pod


class TestInACluster:
    """The calls to the Kubernetes API, as it answers them."""

    def test_secrets_are_made_once_and_renewed_in_place(self) -> None:
        kept: dict[str, Any] = {}
        asked: list[str] = []

        def api(request: httpx.Request) -> httpx.Response:
            asked.append(request.method)
            name = request.url.path.removeprefix("/api/v1/namespaces/prod/secrets").strip("/")
            if request.method == "POST":
                body = httpx.Response(200, content=request.content).json()
                kept[body["metadata"]["name"]] = body
                return httpx.Response(201, json=body)
            if name not in kept:
                return httpx.Response(404)
            if request.method == "PUT":
                kept[name] = httpx.Response(200, content=request.content).json()
            return httpx.Response(200, json=kept[name])

        http = httpx.Client(base_url="https://api", transport=httpx.MockTransport(api))
        store = ClusterSecrets("demo-tls", {"a": "b"}, "/api/v1/namespaces/prod/secrets", http)
        roles = ("router", "worker")
        assert len(make_certificates(store, roles, "d", 90, NOW)) == 3
        assert set(kept) == {"demo-tls-ca", "demo-tls-router", "demo-tls-worker"}
        for secret in kept.values():
            assert secret["type"] == "kubernetes.io/tls" and secret["metadata"]["labels"] == {"a": "b"}
            assert {"tls.crt", "tls.key"} <= set(secret["data"])
        asked.clear()
        assert make_certificates(store, roles, "d", 90, NOW) == []
        assert set(asked) == {"GET"}
        asked.clear()
        assert len(make_certificates(store, roles, "d", 90, NOW + timedelta(days=70))) == 2
        assert asked.count("PUT") == 2 and "POST" not in asked

    def test_what_the_cluster_refuses_is_said(self) -> None:
        transport = httpx.MockTransport(lambda request: httpx.Response(403, text="secrets is forbidden"))
        http = httpx.Client(base_url="https://api", transport=transport)
        store = ClusterSecrets("demo-tls", {}, "/secrets", http)
        with pytest.raises(Unavailable, match=r"refuses GET .*403 secrets is forbidden"):
            store.read("ca")


class TestGrpc:
    async def test_both_sides_show_their_certificates(self, fleets: Path) -> None:
        async with worker(fleets / "ours/worker") as server:
            assert (await call(server.address, Security(certificates(fleets / "ours/router")))).found

    @pytest.mark.parametrize(
        ("serving", "calling", "complaint"),
        [
            ("ours/worker", None, "it speaks TLS: set tls.cert, tls.key and tls.ca here too"),
            (None, "ours/router", "it speaks no TLS: set tls.cert, tls.key and tls.ca there too"),
            ("foreign/worker", "ours/router", "its certificate is not accepted here: .*compare tls.ca"),
            ("ours/worker", "foreign-trusting-ours", "it does not accept our certificate.*compare tls.ca"),
            ("ours/up", "elsewhere/router", r"it is not for worker\.other, compare tls\.domain"),
        ],
    )
    async def test_who_does_not_fit_is_refused_in_words(
        self, fleets: Path, tmp_path: Path, serving: str | None, calling: str | None, complaint: str
    ) -> None:
        if calling == "foreign-trusting-ours":
            shutil.copytree(fleets / "foreign/router", tmp_path / "router")
            shutil.copy(fleets / "ours/ca.crt", tmp_path / "router")
            security: Security | None = Security(certificates(tmp_path / "router"))
        elif calling == "elsewhere/router":
            security = Security(certificates(fleets / calling, domain="other"))
        else:
            security = Security(certificates(fleets / calling)) if calling else None
        async with worker(fleets / serving if serving else None) as server:
            with pytest.raises(Unavailable, match=complaint):
                await call(server.address, security)

    async def test_an_expired_certificate_is_named_on_either_side(self, fleets: Path) -> None:
        here, there = (certificates(fleets / "ours" / role) for role in ("router", "worker"))
        old_router, old_worker = (expired(fleets, role) for role in ("router", "worker"))
        async with serving(Security(old_worker)) as server:
            with pytest.raises(Unavailable, match=r"its certificate .* has expired, renew it there"):
                await call(server.address, Security(here))
        async with serving(Security(there)) as server:
            with pytest.raises(
                Unavailable, match=r"not accept our certificate .*expired.* dates of tls\.cert"
            ):
                await call(server.address, Security(old_router))

    async def test_nothing_is_said_of_certificates_where_they_fit(self, fleets: Path) -> None:
        security = Security(certificates(fleets / "ours/router"))
        async with worker(fleets / "ours/worker") as server:
            assert await why_no_connection(server.address, security) == ""
        assert await why_no_connection(server.address, security) == ""

    async def test_only_a_router_may_call_a_worker(self, fleets: Path) -> None:
        async with worker(fleets / "ours/worker") as server:
            rpc = GrpcRpc(SystemClock(), security=Security(certificates(fleets / "ours/worker")))
            channel = rpc.connect(server.address)
            with pytest.raises(Unauthenticated, match=r"only router\.baton may call .* is for worker\.baton"):
                await anext(channel.bidi(SESSION, single(m.Cancel(1))))
            await channel.aclose()

    @pytest.mark.parametrize(
        ("method", "caller"), [(FETCH, "worker"), (STATUS_GET, "router")], ids=["fetch", "status"]
    )
    async def test_workers_fetch_from_each_other_and_routers_call_the_rest(
        self, fleets: Path, method: Method[Any, Any], caller: str
    ) -> None:
        async with worker(fleets / "ours/worker") as server:
            for role in ("router", "worker"):
                own = certificates(fleets / "ours" / role).current()
                name = ("grpc.ssl_target_name_override", "worker.baton")
                async with grpc.aio.secure_channel(
                    server.address, channel_credentials(own), [name]
                ) as channel:
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await channel.unary_unary(method.path)(b"", timeout=TIMEOUT_S)
                    is_let_in = refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # an empty request
                    is_kept_out = refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
                    assert (is_let_in, is_kept_out) == (role == caller, role != caller)

    async def test_a_caller_without_a_certificate_is_refused(self, fleets: Path) -> None:
        authority = (fleets / "ours/ca.crt").read_bytes()
        names = [("grpc.ssl_target_name_override", "worker.baton")]
        async with (
            worker(fleets / "ours/worker") as server,
            grpc.aio.secure_channel(
                server.address, grpc.ssl_channel_credentials(authority), names
            ) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(ROUTER_CANCEL.path)(b"", timeout=TIMEOUT_S)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

    @pytest.mark.parametrize(("mode", "anonymous"), [("server", True), ("mutual", False)])
    async def test_a_router_may_ask_its_clients(self, fleets: Path, mode: str, anonymous: bool) -> None:
        security = Security(certificates(fleets / "ours/router"), ask_callers=mode == "mutual")
        client = fleets / "ours/client"
        ca, key, cert = ((client / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt"))
        names = [("grpc.ssl_target_name_override", "router.baton")]
        async with serving(security) as server:
            for credentials, works in (
                (grpc.ssl_channel_credentials(ca, key, cert), True),
                (grpc.ssl_channel_credentials(ca), anonymous),
            ):
                async with grpc.aio.secure_channel(server.address, credentials, names) as channel:
                    try:
                        await channel.unary_unary(ROUTER_CANCEL.path)(b"", timeout=TIMEOUT_S)
                        assert works
                    except grpc.aio.AioRpcError:
                        assert not works

    async def test_rotation_without_a_restart(self, fleets: Path, tmp_path: Path) -> None:
        """The authority itself changes: what runs goes on, and the next connections use what is there now."""
        shutil.copytree(fleets / "ours", tmp_path / "files")
        files = tmp_path / "files"
        async with worker(files / "worker") as server:
            channel = GrpcRpc(SystemClock(), security=Security(certificates(files / "router"))).connect(
                server.address
            )
            sent: asyncio.Queue[m.SessionUp] = asyncio.Queue()

            async def requests() -> AsyncGenerator[m.SessionUp, None]:
                while True:
                    yield await sent.get()

            session = channel.bidi(SESSION, requests())
            sent.put_nowait(m.Cancel(1))
            assert (await anext(session)).handle == 1  # type: ignore[union-attr]
            former = Security(certificates(fleets / "ours/router"))
            for role in ("worker", "router"):
                for name in ("tls.key", "tls.crt", "ca.crt"):
                    swap(fleets / "foreign" / role / name, files / role / name)
            # A caller with the former authority is not let in any more: the server reads again.
            with pytest.raises(Unavailable, match="not accepted here"):
                await call(server.address, former)
            # Our channel makes a new connection with the new certificate, and the session stays on the one before.
            assert (await channel.unary(ROUTER_CANCEL, CALL, timeout_s=TIMEOUT_S)).found
            sent.put_nowait(m.Cancel(2))
            assert (await anext(session)).handle == 2  # type: ignore[union-attr]
            await session.aclose()
            assert (await channel.unary(ROUTER_CANCEL, CALL, timeout_s=TIMEOUT_S)).found
            await channel.aclose()


def expired(fleets: Path, role: Any) -> Certificates:
    """As a process holds it that started before it expired."""
    clock = LateClock()
    found = load_certificates(tls(fleets / "expired" / role), role, clock)
    assert found is not None
    clock.days_ago = 0
    return found


class LateClock(SystemClock):
    days_ago = 7

    def wall(self) -> float:
        return super().wall() - timedelta(days=self.days_ago).total_seconds()


def swap(source: Path, target: Path) -> None:
    """As a Secret's mount changes: another file under the same name."""
    shutil.copy(source, target.with_suffix(".new"))
    target.with_suffix(".new").replace(target)


class TestProbes:
    async def test_the_health_port_answers_health_and_nothing_else(self, fleets: Path) -> None:
        async with worker(fleets / "ours/worker", health_address="127.0.0.1:0") as server:
            await asyncio.to_thread(probe, server.health_address, TIMEOUT_S)
            async with grpc.aio.insecure_channel(server.health_address) as channel:
                paths = (
                    ROUTER_CANCEL.path,
                    SESSION.path,
                    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                )
                for path in paths:
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await channel.unary_unary(path)(b"", timeout=TIMEOUT_S)
                    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
            server.set_serving(False)
            with pytest.raises(Unavailable, match="NOT_SERVING"):
                await asyncio.to_thread(probe, server.health_address, TIMEOUT_S)

    async def test_a_taken_health_port_is_said(self, fleets: Path) -> None:
        async with worker(None) as server:
            with pytest.raises(ConfigError, match="is in use"):
                async with worker(None, health_address=server.address):
                    pass

    async def test_a_probe_shows_the_certificate_of_its_process(self, fleets: Path) -> None:
        async with worker(fleets / "ours/worker") as server:
            own = tls(fleets / "ours/worker")
            await asyncio.to_thread(probe, server.address, TIMEOUT_S, own)
            for bad in (TlsConfig(), tls(fleets / "foreign/worker")):
                with pytest.raises(Unavailable):
                    await asyncio.to_thread(probe, server.address, TIMEOUT_S, bad)
            env = {
                "BATON_TLS__CERT": own.cert,
                "BATON_TLS__KEY": own.key,
                "BATON_TLS__CA": own.ca,
                "BATON_PORT": "1",
            }
            run = CliRunner().invoke
            assert (await asyncio.to_thread(run, app, ["probe", server.address], env=env)).exit_code == 0
            wrong = await asyncio.to_thread(run, app, ["probe", server.address, "--peer", "router"], env=env)
            assert isinstance(wrong.exception, Unavailable)

    async def test_health_over_tls_is_open_to_the_fleet(self, fleets: Path) -> None:
        client = fleets / "ours/client"
        ca, key, cert = ((client / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt"))
        names = [("grpc.ssl_target_name_override", "worker.baton")]
        async with (
            worker(fleets / "ours/worker") as server,
            grpc.aio.secure_channel(
                server.address, grpc.ssl_channel_credentials(ca, key, cert), names
            ) as channel,
        ):
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


class TestFleet:
    @pytest.mark.parametrize("known_by", ["address", "index"])
    async def test_a_router_says_why_it_does_not_use_a_worker(self, fleets: Path, known_by: str) -> None:
        """Their certificates are of two authorities."""
        told: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        async with worker(fleets / "ours/worker") as server:
            config = RouterConfig(workers=(server.address,) if known_by == "address" else ())
            mirror = PrefixMirror(SystemClock())
            rpc = GrpcRpc(SystemClock(), security=Security(certificates(fleets / "foreign/router")))
            fleet = Fleet(
                config, rpc, mirror, None, SystemClock(), lambda name, **what: told.put_nowait((name, what))
            )
            record = replace(record_of(WorkerId("w")), address=server.address)
            if known_by == "index":
                mirror.apply(WorkerJoined(record))
            running = asyncio.create_task(fleet.run(no_trial))
            try:
                wanted = {"address": "worker.unreachable", "index": "link.failed"}[known_by]
                while (event := await asyncio.wait_for(told.get(), TIMEOUT_S))[0] != wanted:
                    pass
                where = server.address if known_by == "address" else "w"
                why = fleet.unreachable()[where]
                assert event[1]["why"] == why
                assert "its certificate is not accepted here" in why and "compare tls.ca" in why
                assert f"{where} is not used: {why}" in readiness(fleet).reasons
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)


async def no_trial(*_: Any) -> Any:
    raise AssertionError("there is no pair")
