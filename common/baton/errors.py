"""Every error that Baton raises on purpose.

BatonError
├── RequestError            the caller's mistake; HTTP 4xx
│   ├── InvalidRequest      400  a field is wrong; `param` names it
│   ├── Unauthenticated     401  no API key, or an unknown one
│   ├── ModelNotFound       404
│   └── RequestTooLarge     400  longer than max_model_len or than the whole pool
├── Overloaded              429  no capacity; `retry_after_s` says when to come back
├── Unavailable             503  no ready worker, or the one at work was lost
│   └── WorkerLost          503  a worker died or stopped answering with this request on it
├── DeadlineExceeded        504
├── Cancelled               499  the client went away or asked for it
├── TransferError           500  the KV hand-over failed
│   └── TransferRefused     500  the receiver does not want this piece (epoch, lease, digest, layout)
├── ConfigError                  a setting is wrong; one line that says what to do
└── InternalError           500  ours
"""

from typing import ClassVar


class BatonError(Exception):
    """`code` crosses process borders; `status` is its HTTP form; `type` is OpenAI's error type."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class RequestError(BatonError):
    code, status, type = "invalid_request", 400, "invalid_request_error"


class InvalidRequest(RequestError):
    pass


class Unauthenticated(RequestError):
    code, status = "invalid_api_key", 401


class ModelNotFound(RequestError):
    code, status = "model_not_found", 404


class RequestTooLarge(RequestError):
    code = "context_length_exceeded"


class Overloaded(BatonError):
    code, status, type = "overloaded", 429, "rate_limit_error"


class Unavailable(BatonError):
    code, status = "unavailable", 503


class WorkerLost(Unavailable):
    code = "worker_lost"


class DeadlineExceeded(BatonError):
    code, status, type = "deadline_exceeded", 504, "timeout_error"


class Cancelled(BatonError):
    code, status = "cancelled", 499


class TransferError(BatonError):
    code = "transfer_failed"


class TransferRefused(TransferError):
    code = "transfer_refused"


class ConfigError(BatonError):
    code = "config"


class InternalError(BatonError):
    pass


class OutOfMemory(InternalError):
    """A step did not fit into the device's memory; nothing of it counts. Ends requests only when less does not fit
    either."""


BY_CODE: dict[str, type[BatonError]] = {
    cls.code: cls
    for cls in (
        InternalError,
        InvalidRequest,
        Unauthenticated,
        ModelNotFound,
        RequestTooLarge,
        Overloaded,
        Unavailable,
        WorkerLost,
        DeadlineExceeded,
        Cancelled,
        TransferError,
        TransferRefused,
        ConfigError,
    )
}


def from_code(code: str, message: str, param: str | None, retry_after_s: float | None) -> BatonError:
    """The inverse of an error's (code, message, param, retry_after_s) after it crossed a process border."""
    return BY_CODE.get(code, InternalError)(message, param=param, retry_after_s=retry_after_s)
