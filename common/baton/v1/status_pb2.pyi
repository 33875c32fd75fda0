from baton.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PURPOSE_UNSPECIFIED: _ClassVar[Purpose]
    PURPOSE_RUNNING: _ClassVar[Purpose]
    PURPOSE_RECEIVING: _ClassVar[Purpose]
    PURPOSE_LEASED: _ClassVar[Purpose]
    PURPOSE_DRAINING: _ClassVar[Purpose]
PURPOSE_UNSPECIFIED: Purpose
PURPOSE_RUNNING: Purpose
PURPOSE_RECEIVING: Purpose
PURPOSE_LEASED: Purpose
PURPOSE_DRAINING: Purpose

class WorkerStatus(_message.Message):
    __slots__ = ("record", "num_used_blocks", "sequence", "snapshot", "added", "removed")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    NUM_USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    record: _worker_pb2.WorkerRecord
    num_used_blocks: int
    sequence: int
    snapshot: bool
    added: _containers.RepeatedScalarFieldContainer[bytes]
    removed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, record: _Optional[_Union[_worker_pb2.WorkerRecord, _Mapping]] = ..., num_used_blocks: _Optional[int] = ..., sequence: _Optional[int] = ..., snapshot: _Optional[bool] = ..., added: _Optional[_Iterable[bytes]] = ..., removed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class StatusGetRequest(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: bool
    def __init__(self, blocks: _Optional[bool] = ...) -> None: ...

class StatusGetResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: WorkerStatus
    def __init__(self, status: _Optional[_Union[WorkerStatus, _Mapping]] = ...) -> None: ...

class StatusWatchRequest(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: bool
    def __init__(self, blocks: _Optional[bool] = ...) -> None: ...

class StatusWatchResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: WorkerStatus
    def __init__(self, status: _Optional[_Union[WorkerStatus, _Mapping]] = ...) -> None: ...

class Holder(_message.Message):
    __slots__ = ("request_id", "purpose", "block_ids", "held_s", "epoch", "lease_left_s", "note")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    HELD_S_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    purpose: Purpose
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    held_s: float
    epoch: int
    lease_left_s: float
    note: str
    def __init__(self, request_id: _Optional[str] = ..., purpose: _Optional[_Union[Purpose, str]] = ..., block_ids: _Optional[_Iterable[int]] = ..., held_s: _Optional[float] = ..., epoch: _Optional[int] = ..., lease_left_s: _Optional[float] = ..., note: _Optional[str] = ...) -> None: ...

class BlocksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BlocksResponse(_message.Message):
    __slots__ = ("worker_id", "num_blocks", "num_used", "num_free", "num_cached", "holders")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_USED_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    num_blocks: int
    num_used: int
    num_free: int
    num_cached: int
    holders: _containers.RepeatedCompositeFieldContainer[Holder]
    def __init__(self, worker_id: _Optional[str] = ..., num_blocks: _Optional[int] = ..., num_used: _Optional[int] = ..., num_free: _Optional[int] = ..., num_cached: _Optional[int] = ..., holders: _Optional[_Iterable[_Union[Holder, _Mapping]]] = ...) -> None: ...
