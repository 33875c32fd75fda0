from baton.v1 import request_pb2 as _request_pb2
from baton.v1 import ticket_pb2 as _ticket_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FetchRequest(_message.Message):
    __slots__ = ("prefix", "ticket", "timeout_s")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    prefix: _request_pb2.Request
    ticket: _ticket_pb2.Ticket
    timeout_s: float
    def __init__(self, prefix: _Optional[_Union[_request_pb2.Request, _Mapping]] = ..., ticket: _Optional[_Union[_ticket_pb2.Ticket, _Mapping]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("num_held_tokens",)
    NUM_HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_held_tokens: int
    def __init__(self, num_held_tokens: _Optional[int] = ...) -> None: ...
