"""Remote calls between Baton's processes: the contract and its two implementations."""

from baton.rpc.base import (
    DECODE_GENERATE,
    FETCH,
    PREFILL,
    ROUTER_CANCEL,
    ROUTER_GENERATE,
    ROUTER_LIST_WORKERS,
    SESSION,
    STATUS_BLOCKS,
    STATUS_GET,
    STATUS_WATCH,
    Channel,
    Handlers,
    Kind,
    Method,
    Req,
    Res,
    Rpc,
    Server,
    StreamHandler,
    UnaryHandler,
)
from baton.rpc.grpc import GrpcRpc
from baton.rpc.inproc import InprocRpc, InprocRpcNetwork
from baton.rpc.secure import Security

__all__ = [
    "DECODE_GENERATE",
    "FETCH",
    "PREFILL",
    "ROUTER_CANCEL",
    "ROUTER_GENERATE",
    "ROUTER_LIST_WORKERS",
    "SESSION",
    "STATUS_BLOCKS",
    "STATUS_GET",
    "STATUS_WATCH",
    "Channel",
    "GrpcRpc",
    "Handlers",
    "InprocRpc",
    "InprocRpcNetwork",
    "Kind",
    "Method",
    "Req",
    "Res",
    "Rpc",
    "Security",
    "Server",
    "StreamHandler",
    "UnaryHandler",
]
