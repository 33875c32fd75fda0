"""The client against a scripted server: exact times, every way an answer can go wrong, no socket left."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from loadtest_server import (
    DONE,
    END,
    Received,
    ScriptedServer,
    Step,
    chat_event,
    chunk,
    forever,
    good_answer,
    head,
    plain,
    serving,
    sse,
    stream,
    text_event,
    usage_event,
)

from baton.clock import Clock, SystemClock
from baton.errors import ConfigError
from baton_loadtest.client import Answer, Endpoint, OpenAIClient, RequestOptions, ask_server
from baton_loadtest.lengths import Fixed
from baton_loadtest.record import ErrorKind, RequestRecord
from baton_loadtest.runner import Extent, Runner
from baton_loadtest.workload import PlannedRequest, Workload


class ManualClock(SystemClock):
    """Stands still until it is moved; deadlines pass when the test says so."""

    def __init__(self) -> None:
        self.time_s = 100.0
        self.deadline = asyncio.timeout(None)
        self.num_readings = 0
        self._read = asyncio.Event()

    def now(self) -> float:
        self.num_readings += 1
        self._read.set()
        return self.time_s

    def timeout(self, seconds: float | None) -> asyncio.Timeout:
        self.deadline = asyncio.timeout(None)
        return self.deadline

    async def reading(self, number: int) -> None:
        while self.num_readings < number:
            self._read.clear()
            await self._read.wait()


def _client(
    url: str, clock: Clock | None = None, *, timeout_s: float = 20.0, **options: object
) -> OpenAIClient:
    max_connections = options.pop("max_connections", 8)
    api_key = options.pop("api_key", None)
    return OpenAIClient(
        Endpoint.parse(url),
        RequestOptions("demo", **options),  # type: ignore[arg-type]
        clock or SystemClock(),
        timeout_s=timeout_s,
        max_connections=max_connections,  # type: ignore[arg-type]
        api_key=api_key,  # type: ignore[arg-type]
    )


def _request(
    index: int = 0, prompt: str | tuple[int, ...] = "hello", expected: str | None = None
) -> PlannedRequest:
    return PlannedRequest(index, 0.0, prompt, 16, expected)


async def _ask(steps: Sequence[Step], *, timeout_s: float = 20.0) -> tuple[RequestRecord, ScriptedServer]:
    """One request to a server that answers with `steps`; all sockets are closed afterwards."""
    async with ScriptedServer(lambda received: steps) as server:
        async with _client(server.url, timeout_s=timeout_s) as client:
            record = await client.send(_request(), 0.0)
        await server.wait_until(lambda: server.num_open == 0)
    return record, server


# Time stamps


async def test_each_event_carries_the_time_at_which_it_was_read() -> None:
    clock = ManualClock()
    delays = [0.25, 0.5, 0.125, 2.0]
    events = [text_event("a"), text_event("b"), text_event("c"), text_event("", "length")]

    def after(delay_s: float, num_reads: int) -> Callable[[], Awaitable[None]]:
        async def wait() -> None:
            # 2 readings before the first byte (idle look-up, sending), then one per read from the socket.
            await clock.reading(2 + num_reads)
            clock.time_s += delay_s

        return wait

    def script(received: Received) -> list[Step]:
        steps = [Step(head(), after(1.0, 0))]
        steps += [
            Step(chunk(event), after(delay, 1 + i))
            for i, (event, delay) in enumerate(zip(events, delays, strict=True))
        ]
        return [*steps, Step(chunk(DONE) + END, after(4.0, 5))]

    async with ScriptedServer(script) as server, _client(server.url, clock) as client:
        record = await client.send(_request(), planned_s=99.5)

    assert record.ok, record
    assert (record.planned_s, record.sent_s, record.first_byte_s) == (99.5, 100.0, 101.0)
    assert record.token_s == (101.25, 101.75, 101.875)
    assert (record.finish_s, record.done_s) == (103.875, 107.875)
    assert record.ttft_s == 1.25
    assert list(record.gaps_s()) == [0.5, 0.125]
    assert record.tpot_s == pytest.approx((103.875 - 101.25) / 2)
    assert record.e2e_s == 7.875
    assert record.lag_s == 0.5


async def test_events_of_one_read_arrive_together() -> None:
    packed = chunk(text_event("a") + text_event("b") + text_event("c", "length") + DONE) + END
    record, _ = await _ask([Step(head() + packed)])
    assert record.ok
    assert len(record.token_s) == 3
    assert len(set(record.token_s)) == 1
    assert record.tpot_s is None


# What a stream says


CHAT = (
    chat_event({"role": "assistant", "content": ""})
    + chat_event({"content": "bob "})
    + chat_event({"content": ""})  # a token without visible text
    + chat_event({"content": "lima"})
    + chat_event({}, "stop")
    + usage_event(120, 4, 96)
    + DONE
)


def _answered(
    pieces: Sequence[bytes], content_type: bytes = b"text/event-stream; charset=utf-8"
) -> RequestRecord:
    answer = Answer()
    answer.status = 200
    answer.header(b"Content-Type", content_type)
    for number, piece in enumerate(pieces):
        answer.body(piece, float(number))
    answer.end()
    return answer.record(_request(expected="bob lima"), planned_s=0.0, sent_s=0.0, done_s=99.0)


def test_a_chat_stream_is_read() -> None:
    record = _answered([CHAT])
    assert record.ok
    assert record.text == "bob lima"
    assert record.correct is True
    assert len(record.token_s) == 3  # the opening and the closing event carry no token
    assert (record.num_prompt_tokens, record.num_cached_tokens, record.num_tokens) == (120, 96, 4)
    assert record.finish_reason == "stop"
    assert record.request_id == "chatcmpl-1"


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_where_the_network_cuts_the_bytes_does_not_matter(newline: bytes) -> None:
    data = (b": a comment\n\n" + CHAT).replace(b"\n", newline)
    whole = _answered([data])
    assert whole.ok and whole.text == "bob lima"
    for cut in range(1, len(data)):
        record = _answered([data[:cut], data[cut:]])
        assert (record.ok, record.text, record.num_tokens, len(record.token_s)) == (True, "bob lima", 4, 3)
    bytewise = _answered([bytes([byte]) for byte in data])
    assert (bytewise.ok, bytewise.text) == (True, "bob lima")


def test_reasoning_counts_as_tokens_but_is_not_the_answer() -> None:
    record = _answered(
        [chat_event({"reasoning_content": "hm"}) + chat_event({"content": "bob lima"}, "stop")]
    )
    assert (len(record.token_s), record.text, record.correct) == (2, "bob lima", True)


def test_without_usage_events_are_counted() -> None:
    record = _answered([text_event("bob "), text_event("lima", "stop")])
    assert record.num_tokens is None
    assert record.num_output_tokens == 2


def test_a_wrong_answer_is_a_wrong_answer() -> None:
    assert _answered([text_event("ada oslo", "stop")]).correct is False


def test_tokens_without_any_text_are_first_seen_at_the_end() -> None:
    record = _answered([text_event("", "length"), usage_event(5, 3)])
    assert record.ok
    assert record.token_s == (0.0,)


@pytest.mark.parametrize(
    ("pieces", "kind", "text"),
    [
        ([text_event("bob ")], ErrorKind.CUT, "without a finish reason"),
        ([text_event("bob ") + DONE], ErrorKind.CUT, "without a finish reason"),
        ([], ErrorKind.CUT, "without a finish reason"),
        ([text_event("", "stop") + usage_event(5, 0)], ErrorKind.EMPTY, "finish reason stop"),
        ([text_event("", "stop")], ErrorKind.EMPTY, "finish reason stop"),
        (
            [text_event("bob ") + sse({"error": {"message": "worker lost", "code": "worker_lost"}}) + DONE],
            ErrorKind.ERROR_EVENT,
            "worker lost",
        ),
        ([sse({"error": "plain text"})], ErrorKind.ERROR_EVENT, "plain text"),
        ([b"data: {broken\n\n"], ErrorKind.PROTOCOL, "cannot read the event"),
        ([b"data: 5\n\n"], ErrorKind.PROTOCOL, "cannot read the event"),
        ([sse({"choices": [7]})], ErrorKind.PROTOCOL, "cannot read the event"),
        ([sse({"choices": [{"text": 7}]})], ErrorKind.PROTOCOL, "a text is int"),
        ([b"data: " + b"x" * (2 << 20)], ErrorKind.PROTOCOL, "a line of more than"),
    ],
)
def test_a_stream_that_is_not_whole_is_an_error(pieces: list[bytes], kind: ErrorKind, text: str) -> None:
    record = _answered(pieces)
    assert record.error is kind
    assert text in record.error_text
    assert record.correct is None


def test_an_answer_that_is_no_stream_is_an_error() -> None:
    record = _answered([b'{"choices": []}'], content_type=b"application/json")
    assert record.error is ErrorKind.PROTOCOL
    assert "application/json" in record.error_text


# Failures on the wire


@pytest.mark.parametrize(
    ("steps", "label", "text"),
    [
        (plain(500, b'{"error": {"message": "the engine died"}}'), "http 500", "the engine died"),
        (plain(429, b'{"error": {"message": "no capacity"}}'), "http 429", "no capacity"),
        (plain(503, b"<html>" + b"x" * 10_000, "text/html"), "http 503", "<html>x"),
        (plain(404, b"", "text/plain"), "http 404", ""),
        ([Step(head(500)), Step(chunk(b'{"error": {"message": "half'), abort=True)], "http 500", "half"),
        ([Step(abort=True)], "connect", "no answer"),
        ([Step(b"HTTP/1.1 200"), Step(abort=True)], "connect", "no answer"),
        ([Step(head()), Step(chunk(text_event("a"))), Step(abort=True)], "cut stream", ""),
        ([Step(head()), Step(chunk(text_event("a")) + END)], "cut stream", "without a finish reason"),
        (stream(text_event("a"), sse({"error": {"message": "worker lost"}})), "error event", "worker lost"),
        ([Step(head()), Step(chunk(sse({"error": {"message": "lost"}})), abort=True)], "error event", "lost"),
        ([Step(b"SSH-2.0-OpenSSH_9.2\r\n")], "protocol", "not HTTP"),
        ([Step(head()), Step(b"zz\r\nnot a chunk\r\n")], "protocol", "not HTTP"),
        (plain(200, b'{"choices": []}'), "protocol", "application/json"),
    ],
)
async def test_failures_are_told_apart(steps: list[Step], label: str, text: str) -> None:
    record, _ = await _ask(steps)
    assert record.error_label == label
    assert text in record.error_text
    assert len(record.error_text) < 5000


async def test_an_answer_without_length_ends_with_its_connection() -> None:
    body = text_event("a") + text_event("b", "stop") + DONE
    closing = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    record, _ = await _ask([Step(closing + body, abort=False), Step(abort=True)])
    assert record.ok, record
    assert record.text == "ab"


async def test_nobody_there_is_a_connect_error() -> None:
    async with ScriptedServer(lambda received: []) as server:
        url = server.url
    async with _client(url) as client:
        record = await client.send(_request(), 0.0)
    assert record.error is ErrorKind.CONNECT
    assert record.status is None
    assert record.error_text == "Connection refused"


@pytest.mark.parametrize("num_events", [0, 2])
async def test_a_request_past_its_deadline_hangs_up(num_events: int) -> None:
    clock = ManualClock()

    def read(num_reads: int) -> Callable[[], Awaitable[None]]:
        return lambda: clock.reading(2 + num_reads)

    async def expire() -> None:
        await clock.reading(2 + 1 + num_events)
        clock.deadline.reschedule(asyncio.get_running_loop().time())
        await forever()

    events = [Step(chunk(text_event("a")), read(1 + number)) for number in range(num_events)]
    steps = [Step(head()), *events, Step(wait=expire)]
    server = ScriptedServer(lambda received: steps)
    async with server, _client(server.url, clock, timeout_s=0.3) as client:
        record = await client.send(_request(), 0.0)
        await server.wait_until(lambda: server.num_open == 0)
    assert record.error is ErrorKind.TIMEOUT
    assert record.error_text == "no end after 0.3 s"
    assert len(record.token_s) == num_events


async def test_the_deadline_is_the_one_that_was_asked_for() -> None:
    record, _ = await _ask([Step(wait=forever)], timeout_s=0.1)
    assert (record.error, record.status) == (ErrorKind.TIMEOUT, None)


async def test_a_cancelled_request_hangs_up_and_leaves_the_client_usable() -> None:
    hang = [True]

    def script(received: Received) -> Sequence[Step]:
        return (
            [Step(head()), Step(chunk(text_event("a"))), Step(wait=forever)] if hang[0] else good_answer("a")
        )

    async with ScriptedServer(script) as server, _client(server.url, max_connections=1) as client:
        task = asyncio.create_task(client.send(_request(), 0.0))
        await server.wait_until(lambda: len(server.received) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.wait_until(lambda: server.num_open == 0)
        assert "busy=0 idle=0" in repr(client)

        hang[0] = False
        assert (await client.send(_request(), 0.0)).ok


async def test_cancelled_while_waiting_for_a_connection_frees_nothing_twice() -> None:
    def script(received: Received) -> Sequence[Step]:
        return [Step(head()), Step(wait=forever)]

    async with ScriptedServer(script) as server, _client(server.url, max_connections=1) as client:
        tasks = [asyncio.create_task(client.send(_request(i), 0.0)) for i in range(3)]
        await server.wait_until(lambda: len(server.received) == 1)
        for task in reversed(tasks):
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 3
        await server.wait_until(lambda: server.num_open == 0)
        assert server.num_opened == 1


# Connections


async def test_connections_are_kept_alive_through_good_answers_and_plain_errors() -> None:
    answers = [good_answer("a", "b"), plain(500, b'{"error": {"message": "x"}}'), good_answer("c")] * 3

    async with ScriptedServer(lambda received: answers[len(server.received) - 1]) as server:
        async with _client(server.url) as client:
            records = [await client.send(_request(i), 0.0) for i in range(9)]
            assert [record.ok for record in records] == [True, False, True] * 3
            assert client.num_opened == server.num_opened == 1
            assert "busy=0 idle=1" in repr(client)
        assert "busy=0 idle=0" in repr(client)
        await server.wait_until(lambda: server.num_open == 0)


@pytest.mark.parametrize(
    "steps",
    [
        [Step(head()), Step(chunk(text_event("a"))), Step(abort=True)],
        [Step(head(200, "text/event-stream", "connection: close")), *good_answer("a")[1:]],
        [Step(head()), Step(b"zz\r\nnot a chunk\r\n")],
    ],
    ids=["cut", "close", "garbage"],
)
async def test_a_spent_connection_is_not_used_again(steps: list[Step]) -> None:
    answers = [steps, good_answer("a")]
    async with ScriptedServer(lambda received: answers[len(server.received) - 1]) as server:
        async with _client(server.url) as client:
            await client.send(_request(0), 0.0)
            assert (await client.send(_request(1), 0.0)).ok
        assert server.num_opened == 2


async def test_an_idle_connection_is_dropped_before_the_server_drops_it() -> None:
    clock = ManualClock()
    async with (
        ScriptedServer(lambda received: good_answer("a")) as server,
        _client(server.url, clock) as client,
    ):
        for elapsed_s, num_opened in ((0.0, 1), (1.5, 1), (3.0, 2)):
            clock.time_s += elapsed_s
            assert (await client.send(_request(), 0.0)).ok
            assert server.num_opened == num_opened


async def test_a_server_that_closes_idle_connections_costs_no_request() -> None:
    steps = good_answer("a")
    steps[-1] = Step(steps[-1].data, abort=True)
    async with ScriptedServer(lambda received: steps) as server, _client(server.url) as client:
        for _ in range(5):
            assert (await client.send(_request(), 0.0)).ok
            await server.wait_until(lambda: server.num_open == 0)
            for connection in list(client._connections):
                await connection.closed.wait()


async def test_connections_are_bounded_and_waiting_shows_as_lag() -> None:
    gate = asyncio.Event()

    def script(received: Received) -> Sequence[Step]:
        return [Step(wait=gate.wait), *good_answer("a")]

    clock = ManualClock()
    async with ScriptedServer(script) as server, _client(server.url, clock, max_connections=2) as client:
        tasks = [asyncio.create_task(client.send(_request(i), planned_s=100.0)) for i in range(6)]
        await server.wait_until(lambda: len(server.received) == 2)
        clock.time_s += 5.0
        gate.set()
        records = await asyncio.gather(*tasks)
        assert (server.max_open, client.num_opened) == (2, 2)
    assert all(record.ok for record in records)
    assert sorted(record.lag_s for record in records) == [0.0, 0.0, 5.0, 5.0, 5.0, 5.0]


async def test_a_run_with_every_failure_leaves_no_connection() -> None:
    kinds = [
        good_answer("a", "b"),
        plain(500, b"no"),
        [Step(head()), Step(chunk(text_event("a"))), Step(abort=True)],
        [Step(head()), Step(wait=forever)],
        stream(text_event("a"), sse({"error": {"message": "lost"}})),
        [Step(abort=True)],
    ]
    records: list[RequestRecord] = []
    workload = Workload(rate=400.0, prompt_len=Fixed(2), output_len=Fixed(4))
    async with ScriptedServer(lambda received: kinds[len(server.received) % len(kinds)]) as server:
        async with _client(server.url, timeout_s=3.0, max_connections=64) as client:
            await Runner(client, SystemClock(), records.append).run(workload, Extent(num_requests=120))
            assert "busy=0" in repr(client)
        await server.wait_until(lambda: server.num_open == 0)
    counts = {
        label: sum(record.error_label == label for record in records)
        for label in ("", "http 500", "cut stream", "timeout", "error event", "connect")
    }
    assert counts == dict.fromkeys(counts, 20)


# Requests


async def test_the_request_is_what_the_options_say() -> None:
    async with ScriptedServer(lambda received: good_answer("a")) as server:
        async with _client(server.url) as client:
            await client.send(_request(), 0.0)
            await client.send(_request(1, prompt=(5, 6, 7)), 0.0)
        sampled = _client(
            server.url + "/v1/", temperature=0.5, seed=40, ignore_eos=True, api="completions", api_key="k1"
        )
        async with sampled as client:
            await client.send(_request(2), 0.0)
    chat, ids, sampled_text = server.received
    assert (chat.method, chat.path) == ("POST", "/v1/chat/completions")
    assert chat.headers["host"] == f"127.0.0.1:{server.port}"
    assert "authorization" not in chat.headers
    assert chat.body == {
        "model": "demo",
        "max_tokens": 16,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "hello"}],
    }
    assert (ids.path, ids.body["prompt"]) == ("/v1/completions", [5, 6, 7])
    assert (sampled_text.path, sampled_text.body["prompt"]) == ("/v1/completions", "hello")
    assert (sampled_text.body["seed"], sampled_text.body["ignore_eos"]) == (42, True)
    assert sampled_text.headers["authorization"] == "Bearer k1"


@pytest.mark.parametrize(
    ("base_url", "root_url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://api.example.com/v1", "https://api.example.com"),
        ("http://[::1]:9000", "http://[::1]:9000"),
        ("http://host/gateway/v1", "http://host/gateway"),
    ],
)
def test_base_urls_with_and_without_version(base_url: str, root_url: str) -> None:
    endpoint = Endpoint.parse(base_url)
    assert endpoint.root_url == root_url
    assert endpoint.base_url == f"{root_url}/v1"


@pytest.mark.parametrize("base_url", ["", "localhost:8000", "ftp://host", "http://", "http://host:notaport"])
def test_unusable_base_urls_are_refused(base_url: str) -> None:
    with pytest.raises(ConfigError, match="base URL"):
        Endpoint.parse(base_url)


# The first question to the server


def _models(status: int, body: bytes) -> Callable[[Received], Sequence[Step]]:
    def script(received: Received) -> Sequence[Step]:
        return plain(status, body) if received.path == "/v1/models" else plain(200, b'{"transport": "tcp"}')

    return script


def test_the_server_is_asked_for_its_models_and_its_health() -> None:
    with serving(_models(200, b'{"data": [{"id": "a"}, {"id": "b"}]}')) as server:
        info = ask_server(Endpoint.parse(server.url), None)
    assert info.models == ("a", "b")
    assert info.health == {"transport": "tcp"}


@pytest.mark.parametrize(
    ("status", "body", "complaint"),
    [
        (401, b'{"error": {"message": "no key"}}', "answers 401: no key"),
        (200, b"<html>", "no OpenAI model list"),
    ],
)
def test_a_server_of_another_kind_is_told_in_one_line(status: int, body: bytes, complaint: str) -> None:
    with serving(_models(status, body)) as server, pytest.raises(ConfigError, match=complaint) as caught:
        ask_server(Endpoint.parse(server.url), None)
    assert "\n" not in str(caught.value)
