"""Settings: frozen dataclasses, each default written once, here.

`baton.settings.load` fills them from a file, the environment and flags. `describe` lists them, so that flags
and documentation are made from this file and nothing is said twice: the comment behind a field is its
documentation, its type says which values are allowed.
"""

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_type_hints

from annotated_types import Ge, Interval, Predicate

from baton.errors import ConfigError
from baton.messages import Role

# `baton up` hands its children one end of a socket pair in this variable; no setting.
SUPERVISOR_FD = "BATON_SUPERVISOR_FD"


def a_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


Count: TypeAlias = Annotated[int, Ge(1)]
AtLeastZero: TypeAlias = Annotated[int, Ge(0)]
PowerOfTwo: TypeAlias = Annotated[int, Predicate(a_power_of_two)]
Port: TypeAlias = Annotated[int, Interval(ge=0, le=65535)]  # 0: any free one
Share: TypeAlias = Annotated[float, Interval(gt=0, le=1)]
Seconds: TypeAlias = Annotated[float, Interval(gt=0, le=86400)]


@dataclass(frozen=True)
class ModelConfig:
    model: str = "demo"  # a directory, a Hugging Face hub id, or "demo" for the model that ships with Baton
    revision: str | None = None  # branch, tag or commit of a hub id
    served_model_name: tuple[str, ...] = ()  # names that clients may use; default: the model as given
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as stored; float32 on CPU
    max_model_len: Count | None = None  # tokens of prompt plus answer; default: what the model allows


@dataclass(frozen=True)
class EngineConfig:
    block_size: PowerOfTwo = 16  # tokens per KV block
    num_blocks: Count | None = None  # KV blocks in the pool; default: what fits in kv_cache_bytes
    kv_cache_bytes: Count | None = None  # memory for KV blocks; default: 256 MiB, on a GPU by utilization
    gpu_memory_utilization: Share = 0.9  # of a GPU's memory, for weights, KV blocks and all else
    cpu_memory_utilization: Share | None = None  # of the memory free beside the weights, for KV blocks
    swap_space_bytes: AtLeastZero = 0  # host memory for KV of sequences that give way; 0: computed again
    max_num_seqs: Count = 64  # sequences that run at the same time
    max_num_batched_tokens: Count = 512  # tokens of one engine step; longer prompts are computed in chunks
    max_num_waiting: Count = 512  # requests that may wait in a worker; more are refused
    enable_prefix_caching: bool = True  # keep blocks of finished requests for prompts that begin alike
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the model runs
    num_threads: Count = 1  # OpenMP threads of this worker
    cpus: tuple[Annotated[int, Ge(0)], ...] = ()  # cores that the model's threads stay on; default: any
    bit_exact: bool = False  # logits never depend on batch or chunks, bit for bit; float32 on the CPU, slower
    quantization: Literal["int8"] | None = None  # int8: linear layers in 8 bits, on CPUs with AVX512-VNNI
    native_ops: bool = True  # on the CPU, Baton's compiled operations and packed weights; off: plain torch


@dataclass(frozen=True)
class TransferConfig:
    transport: Literal["auto", "shm", "ucx", "tcp"] = "auto"  # how KV travels; auto: shm, else RDMA, else TCP
    host: str = "127.0.0.1"  # address that the transport binds
    port: Port = 0  # that TCP binds, for networks with rules; 0: any free one. UCX: set UCX_TCP_PORT_RANGE
    advertise_host: str | None = None  # address that peers connect to, when it is another
    encrypt: bool = True  # with tls.cert, KV leaves the host under TLS only; off: in the clear, as UCX needs
    lease_s: Seconds = 10.0  # a hand-over that makes no progress for this long has failed
    push_timeout_s: Seconds = 6.0  # for one piece; a receiver gives it half as long again, within its lease
    piece_bytes: Count = 4 * 2**20  # blocks are sent in pieces of about this size
    min_piece_bytes: Count = 2 * 2**20  # less waits for what joins it, until the whole prompt is computed
    num_layer_groups: Count = 8  # parts of a step's layers whose KV leaves before the step ends; 1: none does


@dataclass(frozen=True)
class TlsConfig:
    """Of this process. Files are read again when they change."""

    cert: str | None = None  # PEM file: gRPC between router and workers, and KV over TCP, are under TLS
    key: str | None = None  # PEM file of its key
    ca: str | None = None  # PEM file: peers must show a certificate of this authority
    domain: str = "baton"  # certificates are for the DNS names router.DOMAIN and worker.DOMAIN


@dataclass(frozen=True)
class IndexConfig:
    index: Literal["redis", "memory"] = "redis"  # where the fleet and its prefix blocks are known
    redis_url: str = "redis://127.0.0.1:6379/0"  # or rediss:// (TLS), unix://; +sentinel, +cluster
    namespace: str = "default"  # fleets with other namespaces do not see each other
    lease_s: Seconds = 10.0  # a worker that does not renew for this long is gone


@dataclass(frozen=True)
class WorkerConfig:
    """One worker process. Several roles in one process are allowed."""

    worker_id: str = ""  # default: role-hostname-pid
    roles: tuple[Role, ...] = (Role.DECODE,)  # prefill, decode or both
    host: str = "127.0.0.1"  # address that the gRPC server binds
    port: Port = 0  # of the gRPC server; 0: any free one
    advertise_host: str | None = None  # address that peers connect to, when it is another
    metrics_port: Port | None = None  # plain HTTP /metrics; none when absent
    health_port: Port | None = None  # gRPC health without TLS, nothing else, for probes; none when absent
    heartbeat_s: Seconds = 1.0  # between two signs of life on a session that has nothing to say
    stop_grace_s: Seconds = 10.0  # after SIGTERM, for running requests to end
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)

    def __post_init__(self) -> None:
        if not self.roles:
            raise ConfigError("roles: at least one of prefill, decode")


@dataclass(frozen=True)
class RouterConfig:
    host: str = "127.0.0.1"  # address that the HTTP and gRPC servers bind
    port: Port = 8000  # of the HTTP server; 0: any free one
    grpc_port: Port = 0  # of the gRPC server; 0: any free one
    workers: tuple[str, ...] = ()  # gRPC addresses to watch; without Redis the only way to find workers
    request_timeout_s: Seconds = 600.0  # for a whole request
    prefill_timeout_s: Seconds = 120.0  # from the ticket to the first token
    reserve_timeout_s: Seconds = 30.0  # from submission to the ticket
    session_timeout_s: Seconds = 5.0  # a decode session without any message for this long is lost
    api_keys_file: str | None = None  # one key per line; /v1 and gRPC then need Authorization: Bearer
    grpc_tls: Literal["none", "server", "mutual"] = "none"  # gRPC API; mutual: clients need certificates
    max_num_requests: Count = 1024  # in flight; more are refused with 429
    canary_interval_s: Seconds = 300.0  # a pair that carries traffic proves itself again this often
    stop_grace_s: Seconds = 5.0  # after SIGTERM, for running requests to end
    log_prompts: bool = False  # log every request with the text of its prompt; else no log has any of it
    model: ModelConfig = field(default_factory=ModelConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)


@dataclass(frozen=True)
class UpConfig(RouterConfig):
    """`baton up`: a router and its workers on this machine."""

    prefill: Annotated[int, Ge(0)] = 1  # number of prefill workers
    decode: Count = 1  # number of decode workers
    ready_timeout_s: Seconds = 300.0  # for all processes together; a model from the hub is loaded in it
    engine: EngineConfig = field(default_factory=EngineConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    # Without an address of yours, `up` starts a Redis server of its own.
    index: IndexConfig = field(default_factory=lambda: IndexConfig(redis_url=""))


@dataclass(frozen=True)
class GenerateConfig:
    """`baton generate`: one engine in its own process."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True)
class ProbeConfig:
    """`baton probe`: the certificate that it shows."""

    tls: TlsConfig = field(default_factory=TlsConfig)


@dataclass(frozen=True)
class LogConfig:
    level: Literal["debug", "info", "warning", "error"] = "info"  # the least severe records that are shown
    format: Literal["auto", "text", "json"] = "auto"  # auto: text on a terminal, JSON elsewhere


class Setting(NamedTuple):
    path: str  # "engine.block_size"
    type: Any  # with the constraints, as `Annotated`
    default: Any
    doc: str


def flag(path: str) -> str:
    """`--block-size` for `engine.block_size`; a flag that may be repeated has a singular name."""
    section, _, name = path.rpartition(".")
    name = {"roles": "role"}.get(path, f"tls-{name}" if section == "tls" else name)
    return "--" + name.replace("_", "-")


@functools.cache
def describe(cls: type) -> tuple[Setting, ...]:
    """Every setting of a config class and of its sections, in the order of the source."""
    return tuple(_settings(cls, cls(), ""))


def _settings(cls: type, defaults: Any, prefix: str) -> Iterator[Setting]:
    hints = get_type_hints(cls, include_extras=True)
    docs = _field_comments(cls)
    for f in fields(cls):
        default = getattr(defaults, f.name)
        if is_dataclass(default):
            yield from _settings(type(default), default, f"{prefix}{f.name}.")
        else:
            yield Setting(prefix + f.name, hints[f.name], default, docs.get(f.name, ""))


@functools.cache
def _field_comments(cls: type) -> dict[str, str]:
    # The module's source is read once; `inspect.getsource` of a class would parse all of it for every class.
    module = inspect.getsource(inspect.getmodule(cls) or cls)
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        body = re.search(rf"^class {base.__name__}\b.*?(?=^\S|\Z)", module, re.MULTILINE | re.DOTALL)
        comments |= _FIELD.findall(body[0]) if body else ()
    return comments


_FIELD = re.compile(r"^    (\w+): .*?  # (.*)$", re.MULTILINE)
