"""Settings: frozen dataclasses, each default written once, here. `load` reads them from a file, the environment and flags."""

from dataclasses import dataclass, field

from baton.messages import Role


@dataclass(frozen=True)
class ModelConfig:
    model: str = "demo"  # a directory, a Hugging Face hub id, or "demo" for the model that ships with Baton
    revision: str | None = None
    served_model_name: tuple[str, ...] = ()  # names that clients may use; default: the model as given
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16; auto is the checkpoint's, float32 on the CPU
    max_model_len: int | None = None  # default: what the model's config allows


@dataclass(frozen=True)
class EngineConfig:
    block_size: int = 16
    num_blocks: int | None = None  # default: from kv_cache_bytes
    kv_cache_bytes: int = 256 * 2**20
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_num_waiting: int = 512
    enable_prefix_caching: bool = True
    device: str = "auto"  # auto | cpu | cuda
    num_threads: int = 1  # OpenMP threads of this worker


@dataclass(frozen=True)
class TransferConfig:
    transport: str = "auto"  # auto | ucx | tcp
    host: str = "127.0.0.1"  # address that the transport binds
    advertise_host: str | None = None  # address that peers connect to, when it is another
    lease_s: float = 10.0  # a hand-over that makes no progress for this long has failed
    push_timeout_s: float = 10.0  # for one piece
    piece_bytes: int = 4 * 2**20


@dataclass(frozen=True)
class IndexConfig:
    index: str = "redis"  # redis | memory
    redis_url: str = "redis://127.0.0.1:6379/0"
    namespace: str = "default"  # fleets with other namespaces do not see each other
    lease_s: float = 10.0


@dataclass(frozen=True)
class WorkerConfig:
    """One worker process. Several roles in one process are allowed."""

    worker_id: str = ""  # default: role-hostname-pid
    roles: tuple[Role, ...] = (Role.DECODE,)
    host: str = "127.0.0.1"
    port: int = 0
    advertise_host: str | None = None
    metrics_port: int | None = None  # plain HTTP /metrics; none when absent
    heartbeat_s: float = 1.0
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    index: IndexConfig = field(default_factory=IndexConfig)


@dataclass(frozen=True)
class RouterConfig:
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 0
    workers: tuple[str, ...] = ()  # gRPC addresses to watch directly; with `index: memory` the only way to find them
    request_timeout_s: float = 600.0
    prefill_timeout_s: float = 120.0
    reserve_timeout_s: float = 30.0
    session_timeout_s: float = 5.0  # a decode session without any message for this long is lost
    max_num_requests: int = 1024  # in flight; more are refused with 429
    model: ModelConfig = field(default_factory=ModelConfig)
    index: IndexConfig = field(default_factory=IndexConfig)


@dataclass(frozen=True)
class LogConfig:
    level: str = "info"
    format: str = "auto"  # auto | text | json; auto: text on a terminal, JSON elsewhere
