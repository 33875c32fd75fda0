"""UCX as Baton uses it: a few non-blocking calls, over ucxx or, where only that is installed, ucx-py.

Nothing else imports these libraries, and they are imported when a library object is made, not before. Both are used
one level below their asyncio interface, which waits by spinning (ucxx), keeps one context per process (both), and
forgets the memory of a cancelled request while UCX may still write to it (both).

A `Request` may be forgotten only when it is `completed`: until then UCX may use its buffer, even when its endpoint is
closed already. `transfer.ucx_worker` sees to that.
"""

import ctypes
import importlib
import os
import re
from typing import Any, Protocol

from baton.errors import ConfigError

PROGRESS_STEPS = 8  # per call, each up to a segment of data, so that the event loop stays responsive


class Request(Protocol):
    @property
    def completed(self) -> bool: ...

    def error(self) -> str | None:
        """Of a completed request; None when it went well."""
        ...


class Library(Protocol):
    """One UCX worker. Not thread-safe."""

    name: str
    lanes: frozenset[str]  # UCX's names of what it could use here: tcp, rc_verbs, cuda_ipc ...
    fd: int  # once armed, readable when there is something to do
    address: bytes  # what a peer makes an endpoint from

    def progress(self) -> bool:
        """Do a bounded amount of work; False when nothing is left to do."""
        ...

    def arm(self) -> bool:
        """False when something happened meanwhile: progress again before waiting."""
        ...

    def connect(self, address: bytes) -> Any:
        """An endpoint. Whether somebody is there shows only when it is used."""
        ...

    def alive(self, endpoint: Any) -> bool: ...

    def close(self, endpoint: Any) -> None:
        """Does not wait for the peer. Receives that still wait for a message of the endpoint are cancelled."""
        ...

    def send(self, endpoint: Any, buffer: memoryview, tag: int) -> Request: ...

    def receive(self, endpoint: Any | None, buffer: memoryview, tag: int) -> Request:
        """The message may be shorter than the buffer. With an endpoint, ends with an error when that does."""
        ...

    def shut_down(self, *, abandon: bool) -> None:
        """The worker and its sockets go, as soon as no request or endpoint of it is referenced any more."""
        ...


def make_library(options: dict[str, str]) -> Library:
    """`options` are UCX settings without the prefix; the user's UCX_* environment goes first. Raises ConfigError."""
    options = {name: value for name, value in options.items() if f"UCX_{name}" not in os.environ}
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    missing = []
    for make in (UcxxLibrary, UcxPyLibrary):
        try:
            return make(options)
        except ImportError as error:
            missing.append(str(error))
        except Exception as error:
            raise ConfigError(f"UCX does not start here ({error}): choose --transport tcp") from error
    why = "; ".join(missing)
    raise ConfigError(f"UCX is not installed ({why}): pip install 'baton-llm[ucx]' or choose --transport tcp")


def _lanes(info: str) -> frozenset[str]:
    """From UCX's own description of a context, where each resource is a line that ends with `-- tcp/eth0`."""
    return frozenset(re.findall(r"--\s+(\w+)/", info))


class _UcxxRequest:
    def __init__(self, request: Any) -> None:
        self._request = request

    @property
    def completed(self) -> bool:
        return bool(self._request.completed)

    def error(self) -> str | None:
        try:
            self._request.check_error()
        except Exception as error:
            return str(error)
        return None


class UcxxLibrary:
    name = "ucxx"

    def __init__(self, options: dict[str, str]) -> None:
        self._ucxx = importlib.import_module("ucxx").libucxx
        self._array = importlib.import_module("ucxx._lib.arr").Array
        feature = self._ucxx.Feature
        context = self._ucxx.UCXContext(options, feature_flags=(feature.TAG, feature.WAKEUP))
        self.lanes = _lanes(str(context.info))
        self._worker = self._ucxx.UCXWorker(context)
        self._worker.init_blocking_progress_mode()
        self.fd: int = self._worker.epoll_file_descriptor
        self.address = bytes(self._worker.address)

    def progress(self) -> bool:
        for _ in range(PROGRESS_STEPS):
            if not self._worker.progress_once():
                # Receives of endpoints that failed meanwhile end here.
                return bool(self._worker.cancel_inflight_requests())
        return True

    def arm(self) -> bool:
        return bool(self._worker.arm())

    def connect(self, address: bytes) -> Any:
        remote = self._ucxx.UCXAddress.create_from_buffer(address)
        return self._ucxx.UCXEndpoint.create_from_worker_address(self._worker, remote, True)

    def alive(self, endpoint: Any) -> bool:
        return bool(endpoint.alive)

    def close(self, endpoint: Any) -> None:
        endpoint.close_blocking()

    def send(self, endpoint: Any, buffer: memoryview, tag: int) -> Request:
        return _UcxxRequest(endpoint.tag_send(self._array(buffer), self._ucxx.UCXXTag(tag)))

    def receive(self, endpoint: Any | None, buffer: memoryview, tag: int) -> Request:
        owner = self._worker if endpoint is None else endpoint
        return _UcxxRequest(owner.tag_recv(self._array(buffer), self._ucxx.UCXXTag(tag)))

    def shut_down(self, *, abandon: bool) -> None:
        if abandon:  # a reference that nobody gives back: its destructor never runs
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._worker))
        del self._worker


class _UcxPyRequest:
    def __init__(self) -> None:
        self.completed = False
        self.handle: Any = None
        self._error: str | None = None

    def done(self, _: Any, exception: BaseException | None) -> None:
        """The library's callback."""
        self.completed = True
        # A message that is shorter than its buffer is an error for ucx-py, but not for us.
        if exception is not None and type(exception).__name__ != "UCXMsgTruncated":
            self._error = str(exception)

    def error(self) -> str | None:
        return self._error


class UcxPyLibrary:
    """ucx-py closes a healthy endpoint by flushing it, and spins for as long as the peer hangs. So such an endpoint is
    only parked, until its peer is gone or the process ends."""

    name = "ucx-py"

    def __init__(self, options: dict[str, str]) -> None:
        self._ucx = importlib.import_module("ucp._libs.ucx_api")
        self._array = importlib.import_module("ucp._libs.arr").Array
        feature = self._ucx.Feature
        context = self._ucx.UCXContext(options, feature_flags=(feature.TAG, feature.WAKEUP))
        self.lanes = _lanes(str(context.info()))
        self._worker = self._ucx.UCXWorker(context)
        self._posted: dict[Any, list[_UcxPyRequest]] = {}  # receives, by endpoint
        self._parked: list[Any] = []
        self.fd: int = self._worker.init_blocking_progress_mode()
        self.address = bytes(self._worker.get_address())

    def progress(self) -> bool:
        self._worker.progress()
        return bool(self._worker.cancel_inflight_messages())

    def arm(self) -> bool:
        return bool(self._worker.arm())

    def connect(self, address: bytes) -> Any:
        parked, self._parked = self._parked, []
        for endpoint in parked:
            self.close(endpoint)
        remote = self._ucx.UCXAddress.from_buffer(address)
        return self._ucx.UCXEndpoint.create_from_worker_address(self._worker, remote, True)

    def alive(self, endpoint: Any) -> bool:
        return bool(endpoint.is_alive())

    def close(self, endpoint: Any) -> None:
        for request in self._posted.pop(endpoint, ()):
            if not request.completed:
                self._worker.request_cancel(request.handle)
        if endpoint.is_alive():
            self._parked.append(endpoint)
        else:
            endpoint.close()

    def send(self, endpoint: Any, buffer: memoryview, tag: int) -> Request:
        request, array = _UcxPyRequest(), self._array(buffer)
        if self._ucx.tag_send_nb(endpoint, array, array.nbytes, tag, request.done) is None:
            request.completed = True  # at once; then there is no callback
        return request

    def receive(self, endpoint: Any | None, buffer: memoryview, tag: int) -> Request:
        request, array = _UcxPyRequest(), self._array(buffer)
        request.handle = self._ucx.tag_recv_nb(
            self._worker, array, array.nbytes, tag, request.done, ep=endpoint
        )
        posted = [other for other in self._posted.get(endpoint, ()) if not other.completed]
        self._posted[endpoint] = [*posted, request]
        return request

    def shut_down(self, *, abandon: bool) -> None:
        for request in self._posted.pop(None, ()):
            if not request.completed:
                self._worker.request_cancel(request.handle)
        ctypes.pythonapi.Py_IncRef(
            ctypes.py_object(self)
        )  # or the garbage collector would flush what is parked
