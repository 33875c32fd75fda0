"""RPC over gRPC. The wire is the public protocol of proto/baton/v1, with health and reflection on every server.

An error travels as a gRPC status, which any client understands, and as a serialised `baton.v1.Error` in the trailer
`baton-error-bin`, from which our clients raise the very same error again.
"""

import os

from baton.clock import Clock
from baton.rpc.base import Channel, Handlers, Rpc, Server
from baton.rpc.grpc_channel import GrpcChannel
from baton.rpc.grpc_server import CLEAN_UP_S, Authorize, GrpcServer
from baton.rpc.secure import Security

__all__ = ["CLEAN_UP_S", "GrpcRpc"]


class GrpcRpc(Rpc):
    """To be used inside one running event loop: grpc.aio knows one per process. `authorize` is asked by its servers
    before every call; health and reflection are open to whoever may connect. Without `security` all is in the clear."""

    def __init__(
        self,
        clock: Clock,
        authorize: Authorize | None = None,
        security: Security | None = None,
        health_address: str | None = None,
    ) -> None:
        """`health_address`: its server answers plain health checks there, too."""
        self._clock = clock
        self._authorize = authorize
        self._security = security
        self._health_address = health_address
        # It tells stderr of every connection that ends, which is no news. Read when the first server or channel starts.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE" if security else "ERROR")

    async def serve(self, address: str, handlers: Handlers) -> Server:
        server = GrpcServer(handlers, self._clock, self._authorize, self._security)
        await server.start(address, self._health_address)
        return server

    def connect(self, address: str) -> Channel:
        return GrpcChannel(address, self._security)
