"""What servers and channels agree upon: how errors travel, and the options of connections."""

import grpc

from baton import errors
from baton.errors import BatonError, DeadlineExceeded, Unavailable

ERROR_TRAILER = "baton-error-bin"
MAX_MESSAGE_BYTES = 64 << 20  # a watch's snapshot of 3 million blocks; a prompt of 16 million tokens

Code = grpc.StatusCode

STATUS_OF: dict[str, grpc.StatusCode] = {
    errors.InvalidRequest.code: Code.INVALID_ARGUMENT,
    errors.Unauthenticated.code: Code.UNAUTHENTICATED,
    errors.ModelNotFound.code: Code.NOT_FOUND,
    errors.RequestTooLarge.code: Code.INVALID_ARGUMENT,
    errors.Overloaded.code: Code.RESOURCE_EXHAUSTED,
    errors.Unavailable.code: Code.UNAVAILABLE,
    errors.WorkerLost.code: Code.UNAVAILABLE,
    errors.DeadlineExceeded.code: Code.DEADLINE_EXCEEDED,
    errors.Cancelled.code: Code.CANCELLED,
    errors.TransferError.code: Code.ABORTED,
    errors.TransferRefused.code: Code.FAILED_PRECONDITION,
    errors.ConfigError.code: Code.FAILED_PRECONDITION,
}

# What a status means that came without our trailer: from gRPC itself. A server that closes cancels what still runs.
MEANING: dict[grpc.StatusCode, type[BatonError]] = {
    Code.UNAVAILABLE: Unavailable,
    Code.CANCELLED: Unavailable,
    Code.DEADLINE_EXCEEDED: DeadlineExceeded,
}

# A host that is gone without a word is noticed after keepalive time + timeout. The pings are answered by threads of
# gRPC's own, so a Python process that is busy for a while is not taken for dead.
_COMMON_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2500),
    ("grpc.http2.ping_timeout_ms", 2500),  # without it an unanswered keepalive ping is given a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
SERVER_OPTIONS = (
    *_COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),  # two servers on one port would share its calls in silence
    ("grpc.http2.min_ping_recv_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),  # never close a connection over keepalive pings
)
CHANNEL_OPTIONS = (
    *_COMMON_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 3000),  # despite its name: how long one attempt to connect may take
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),  # a channel's backoff is its own
    ("grpc.enable_http_proxy", 0),  # http_proxy in the environment is not meant for us
)
