"""The standard health service, grpc.health.v1, of one server: one answer for the server and for each of its services.

`Watch` is an async generator, not a coroutine that writes: OpenTelemetry's gRPC instrumentation breaks the latter.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Starts as not serving. A watch ends when the server closes, so that it does not use up the server's grace."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = ("", *services)
        self._serving = False
        self._closed = False
        self._changed = asyncio.Event()  # set once, then replaced

    def set_serving(self, serving: bool) -> None:
        self._serving = serving
        self._tell()

    def close(self) -> None:
        self._serving = False
        self._closed = True
        self._tell()

    async def Check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service} here")
        return _Status(status=self._status(request.service))

    async def List(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        statuses = {service: _Status(status=self._status(service)) for service in self._services}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncGenerator[Any, None]:
        told = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != told:
                yield _Status(status=status)
                told = status
            if self._closed:
                return
            await changed.wait()

    def _status(self, service: str) -> int:
        if service not in self._services:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if self._serving else _Status.NOT_SERVING)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
