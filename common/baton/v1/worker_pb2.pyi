from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role

class Load(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_waiting_tokens", "num_free_blocks", "prefill_tokens_per_s", "decode_step_s", "transfer_bytes_per_s", "decode_batch_size", "decode_seq_s", "num_measured_steps", "num_measured_tokens", "num_own")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    DECODE_SEQ_S_FIELD_NUMBER: _ClassVar[int]
    NUM_MEASURED_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_MEASURED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_OWN_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_free_blocks: int
    prefill_tokens_per_s: float
    decode_step_s: float
    transfer_bytes_per_s: float
    decode_batch_size: float
    decode_seq_s: float
    num_measured_steps: int
    num_measured_tokens: int
    num_own: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_waiting_tokens: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., decode_step_s: _Optional[float] = ..., transfer_bytes_per_s: _Optional[float] = ..., decode_batch_size: _Optional[float] = ..., decode_seq_s: _Optional[float] = ..., num_measured_steps: _Optional[int] = ..., num_measured_tokens: _Optional[int] = ..., num_own: _Optional[int] = ...) -> None: ...

class Compatibility(_message.Message):
    __slots__ = ("weights", "config", "tokenizer", "rope", "layers", "revision", "arithmetic", "dtype", "num_shards", "release", "wire_versions")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ARITHMETIC_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    weights: str
    config: str
    tokenizer: str
    rope: str
    layers: str
    revision: str
    arithmetic: str
    dtype: str
    num_shards: int
    release: str
    wire_versions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, weights: _Optional[str] = ..., config: _Optional[str] = ..., tokenizer: _Optional[str] = ..., rope: _Optional[str] = ..., layers: _Optional[str] = ..., revision: _Optional[str] = ..., arithmetic: _Optional[str] = ..., dtype: _Optional[str] = ..., num_shards: _Optional[int] = ..., release: _Optional[str] = ..., wire_versions: _Optional[_Iterable[int]] = ...) -> None: ...

class WorkerRecord(_message.Message):
    __slots__ = ("worker_id", "incarnation", "roles", "address", "transports", "model", "fingerprint", "block_size", "num_blocks", "max_model_len", "kv_block_bytes", "draining", "load", "compatibility", "prefills_ahead")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    COMPATIBILITY_FIELD_NUMBER: _ClassVar[int]
    PREFILLS_AHEAD_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    roles: _containers.RepeatedScalarFieldContainer[Role]
    address: str
    transports: _containers.RepeatedScalarFieldContainer[str]
    model: str
    fingerprint: str
    block_size: int
    num_blocks: int
    max_model_len: int
    kv_block_bytes: int
    draining: bool
    load: Load
    compatibility: Compatibility
    prefills_ahead: bool
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., roles: _Optional[_Iterable[_Union[Role, str]]] = ..., address: _Optional[str] = ..., transports: _Optional[_Iterable[str]] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_model_len: _Optional[int] = ..., kv_block_bytes: _Optional[int] = ..., draining: _Optional[bool] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., compatibility: _Optional[_Union[Compatibility, _Mapping]] = ..., prefills_ahead: _Optional[bool] = ...) -> None: ...
