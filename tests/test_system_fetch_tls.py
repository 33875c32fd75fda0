"""Real processes under mutual TLS: a prefill worker fetches a prefix from a decode worker, over gRPC and TCP that ask
for certificates on both sides."""

import asyncio
from pathlib import Path

import pytest
from stack import running_stack
from test_system_fetch import INDEXED_S, ask, computed, first_turn

from baton.clock import SystemClock
from baton.errors import BatonError
from baton.messages import StatusCall
from baton.rpc import STATUS_GET, GrpcRpc
from baton_cli.certs import ROLES, Directory, make_certificates, utc_now

OK = 'baton_prefix_fetch_seconds_count{outcome="ok"}'


async def test_a_prefix_is_fetched_under_mutual_tls_and_right(tmp_path: Path) -> None:
    make_certificates(Directory(tmp_path), tuple(ROLES), "baton", 1, utc_now(), renew_all=False)
    async with running_stack(index="memory", certificates=tmp_path) as stack:
        second, owner = await first_turn(stack, "tls")
        await asyncio.sleep(INDEXED_S)
        assert await stack.metric("prefill-0", OK) == 0
        fetched = await ask(stack, second, 20)
        assert fetched.record["fetched_from"] == owner and fetched.record["transport"] == "tcp"
        assert await stack.metric("prefill-0", OK) == 1
        assert fetched.tokens == await computed(stack, second)
        await stack.until_nothing_is_used("prefill-0", "decode-0")
        channel = GrpcRpc(SystemClock()).connect(stack.addresses["decode-0"])  # without a certificate
        with pytest.raises(BatonError):
            await channel.unary(STATUS_GET, StatusCall(), timeout_s=5.0)
        await channel.aclose()
