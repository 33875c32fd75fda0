"""Every message survives the wire unchanged, and bytes that are no message are refused by name."""

import dataclasses
import enum
import typing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton import codec
from baton import messages as m
from baton.errors import BY_CODE, BatonError, InternalError, InvalidRequest, Overloaded
from baton.request import (
    FinishReason,
    PromptLogprobs,
    Request,
    RequestId,
    SamplingParams,
    TokenLogprobs,
    WorkerId,
)
from baton.v1 import decode_pb2, prefill_pb2, request_pb2, router_pb2, status_pb2

MESSAGES = sorted(codec.PROTOS, key=lambda cls: cls.__name__)
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

REQUEST = Request(RequestId("r1"), (1, 2, 3), SamplingParams(max_tokens=4, seed=7), eos_token_ids=(0,))
LOAD = m.Load(num_running=2, decode_step_s=0.02)
STEP = m.Step((7, 9), (0, 5), (1, 2), (11, 12, 13), ((9, FinishReason.STOP),), LOAD)
TICKET = m.Ticket(7, RequestId("r1"), 3, WorkerId("d0"), "tcp", "10.0.0.1:7", "f", 16, 32, 10.0)


def messages_of(cls: type) -> st.SearchStrategy[Any]:
    if cls is m.Step:
        return steps()
    if cls is PromptLogprobs:
        return st.tuples(st.integers(0, 5), st.integers(0, 3)).flatmap(prompt_logprobs)
    if cls is m.RouterGenerateCall:
        return st.one_of(
            _of_fields(cls, prompt=st.none()), _of_fields(cls, prompt_token_ids=st.just(()))
        ).filter(lambda call: (call.prompt is None) == bool(call.prompt_token_ids))
    return _of_fields(cls)


def _of_fields(cls: type, **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    descriptors = codec.PROTOS[cls].DESCRIPTOR.fields_by_name
    values = {
        field.name: _values_of(hints[field.name], descriptors[field.name])
        for field in dataclasses.fields(cls)
        if field.name not in given
    }
    return st.builds(cls, **values, **given)


def _values_of(hint: Any, descriptor: Any) -> st.SearchStrategy[Any]:
    hint = getattr(hint, "__supertype__", hint)
    if type(None) in typing.get_args(hint):
        return st.none() | _values_of(typing.get_args(hint)[0], descriptor)
    if typing.get_origin(hint) is tuple:
        return st.lists(_values_of(typing.get_args(hint)[0], descriptor), max_size=5).map(tuple)
    if dataclasses.is_dataclass(hint):
        return messages_of(typing.cast(type, hint))
    if issubclass(hint, enum.Enum):
        return st.sampled_from(list(hint))
    if hint is int:
        bits, lowest = 32 if descriptor.cpp_type in (1, 3) else 64, 0
        if descriptor.type == descriptor.TYPE_SINT32:
            bits, lowest = 31, -(2**31)
        return st.integers(lowest, 2**bits - 1)
    if hint is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    return {str: st.text(), bool: st.booleans(), bytes: st.binary()}[hint]


def prompt_logprobs(size: tuple[int, int]) -> st.SearchStrategy[PromptLogprobs]:
    num, num_top = size
    logprob = st.floats(-9999, 0, width=32)
    uint32 = st.integers(0, 2**32 - 1)
    columns = ((logprob, num), (uint32, num), (uint32, num * num_top), (logprob, num * num_top))
    return st.builds(PromptLogprobs, *(st.tuples(*[value] * length) for value, length in columns))


@st.composite
def steps(draw: st.DrawFn) -> m.Step:
    uint32 = st.integers(0, 2**32 - 1)
    rows = draw(st.lists(st.tuples(uint32, uint32, st.lists(uint32, max_size=4)), max_size=300))
    finished = draw(st.lists(st.tuples(uint32, st.sampled_from(FinishReason)), max_size=4))
    with_logprobs = [i for i in range(len(rows)) if i % 7 == 3] if draw(st.booleans()) else []
    num_logprobs = sum(len(rows[i][2]) for i in with_logprobs)
    each = TokenLogprobs(draw(st.floats(-1e6, 0)), (5, 2**32 - 1), (-0.5, -9999.0))
    cached = draw(st.lists(st.tuples(uint32, uint32), max_size=3))
    of_prompts = draw(st.lists(st.tuples(uint32, prompt_logprobs((2, 1))), max_size=2))
    return m.Step(
        handles=tuple(handle for handle, _, _ in rows),
        first_index=tuple(first for _, first, _ in rows),
        num_tokens=tuple(len(tokens) for _, _, tokens in rows),
        token_ids=tuple(token for _, _, tokens in rows for token in tokens),
        finished=tuple(finished),
        load=draw(messages_of(m.Load)),
        logprob_rows=tuple(with_logprobs),
        logprobs=(each,) * num_logprobs,
        prompt_logprob_handles=tuple(handle for handle, _ in of_prompts),
        prompt_logprobs=tuple(said for _, said in of_prompts),
        cached_handles=tuple(handle for handle, _ in cached),
        num_cached_tokens=tuple(num for _, num in cached),
    )


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_round_trip(cls: type) -> None:
    @relaxed
    @given(messages_of(cls))
    def check(message: Any) -> None:
        assert codec.decode(cls, codec.encode(message)) == message

    check()


@relaxed
@given(st.data())
def test_session_messages_come_back_as_what_they_were(data: st.DataObject) -> None:
    for union in (m.SessionUp, m.SessionDown):
        cls = data.draw(st.sampled_from(typing.get_args(union)))
        message = data.draw(messages_of(cls))
        assert codec.decode(union, codec.encode(message)) == message


EXPECTED: list[Any] = [*MESSAGES, m.SessionUp, m.SessionDown]


@pytest.mark.parametrize("expected", EXPECTED, ids=lambda cls: getattr(cls, "__name__", str(cls)))
def test_any_bytes_decode_or_are_refused(expected: Any) -> None:
    @relaxed
    @given(st.binary(max_size=200))
    def check(data: bytes) -> None:
        _decode_or_refuse(expected, data)

    check()


@relaxed
@given(st.data())
def test_damaged_messages_decode_or_are_refused(data: st.DataObject) -> None:
    cls = data.draw(st.sampled_from(MESSAGES))
    encoded = bytearray(codec.encode(data.draw(messages_of(cls))))
    for _ in range(data.draw(st.integers(1, 3))):
        if encoded:
            encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(encoded)))
    _decode_or_refuse(cls, bytes(encoded))
    _decode_or_refuse(cls, bytes(encoded[:cut]))


def _decode_or_refuse(expected: Any, data: bytes) -> None:
    try:
        message = codec.decode(expected, data)
    except InvalidRequest:
        return
    assert isinstance(message, expected)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (m.Cancel(-1), "handle"),
        (m.Cancel(2**64), "handle"),
        (m.PrefillCall(dataclasses.replace(REQUEST, prompt_token_ids=(1, 2**32)), TICKET, 1.0),
         "request.prompt_token_ids"),
        (m.GenerateCall(dataclasses.replace(REQUEST, sampling=SamplingParams(temperature=float("nan"))), 1.0),
         "request.sampling.temperature"),
        (m.GenerateCall(dataclasses.replace(REQUEST, sampling=SamplingParams(temperature=10**400)), 1.0),
         "request.sampling.temperature"),
        (m.GenerateCall(REQUEST, float("inf")), "deadline_s"),
        (m.CancelCall(RequestId("half a pair: \ud800")), "request_id"),
        (m.Step((2**64,), (0,), (1,), (1,), (), LOAD), "handles"),
        (m.Step((1,), (0,), (1,), (1,), (), m.Load(num_running=-1)), "load.num_running"),
    ],
)  # fmt: skip
def test_values_that_no_field_holds_are_refused_by_name(message: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec.encode(message)
    assert caught.value.param == param
    assert caught.value.message.startswith(param)


def _step_pb(**changed: Any) -> decode_pb2.SessionResponse:
    columns = {"handles": [1, 2], "first_index": [0, 0], "num_tokens": [1, 1], "token_ids": [5, 6]} | changed
    return decode_pb2.SessionResponse(step=columns)


@pytest.mark.parametrize(
    ("expected", "pb", "param"),
    [
        (m.SessionUp, decode_pb2.SessionRequest(), "message"),
        (m.SessionDown, decode_pb2.SessionResponse(), "message"),
        (m.GenerateChunk, decode_pb2.DecodeGenerateResponse(), "chunk"),
        (m.WorkerStatus, status_pb2.StatusGetResponse(), "status"),
        (m.WorkerStatus, status_pb2.StatusGetResponse(status={}), "record"),
        (m.WorkerStatus, status_pb2.StatusGetResponse(status={"record": {"roles": [1, 9]}}), "record.roles"),
        (m.WorkerStatus, status_pb2.StatusGetResponse(status={"record": {"roles": [0]}}), "record.roles"),
        (m.GenerateChunk, decode_pb2.DecodeGenerateResponse(chunk={"finish_reason": 77}), "finish_reason"),
        (m.PrefillCall, prefill_pb2.PrefillRequest(request={}), "ticket"),
        (m.PrefillCall, prefill_pb2.PrefillRequest(ticket={}), "request"),
        (m.GenerateCall, decode_pb2.DecodeGenerateRequest(request={}), "deadline_s"),
        (m.RouterGenerateCall, router_pb2.RouterGenerateRequest(prompt="a"), "deadline_s"),
        (m.RouterGenerateCall, router_pb2.RouterGenerateRequest(deadline_s=1), "prompt"),
        (m.RouterGenerateCall,
         router_pb2.RouterGenerateRequest(deadline_s=1, prompt="a", prompt_token_ids=[1]), "prompt"),
        (m.SessionDown, _step_pb(first_index=[0]), "handles"),
        (m.SessionDown, _step_pb(num_tokens=[1, 2]), "token_ids"),
        (m.SessionDown, _step_pb(finished_handles=[1]), "finished_handles"),
        (m.SessionDown, _step_pb(finished_handles=[1], finished_reasons=[0]), "finished_reasons"),
        (m.SessionDown, _step_pb(cached_handles=[1]), "cached_handles"),
        (m.SessionDown, _step_pb(prompt_logprob_handles=[1]), "prompt_logprob_handles"),
        (m.SessionDown, _step_pb(prompt_logprob_handles=[1], prompt_logprobs=[{"ranks": [1]}]),
         "prompt_logprobs.ranks"),
        (m.GenerateChunk, decode_pb2.DecodeGenerateResponse(
            chunk={"prompt_logprobs": {"logprobs": [-1, -1], "ranks": [1, 1], "top_token_ids": [1],
                   "top_logprobs": [-1]}}), "prompt_logprobs.top_token_ids"),
        (m.GenerateChunk, decode_pb2.DecodeGenerateResponse(
            chunk={"prompt_logprobs": {"logprobs": [float("-inf")], "ranks": [1]}}), "prompt_logprobs.logprobs"),
        (m.SessionDown, _step_pb(load={"decode_step_s": float("nan")}), "load.decode_step_s"),
    ],
)  # fmt: skip
def test_bad_fields_from_outside_are_refused_by_name(expected: Any, pb: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec.decode(expected, pb.SerializeToString())
    assert caught.value.param == param


def test_the_columns_that_those_cases_damage_are_fine_by_themselves() -> None:
    assert codec.decode(m.SessionDown, _step_pb().SerializeToString()).token_ids == (5, 6)


def test_a_step_of_the_release_before_has_no_cached_tokens() -> None:
    assert codec.decode(m.SessionDown, _step_pb().SerializeToString()).cached_handles == ()


def test_absent_fields_take_the_defaults_of_the_dataclass() -> None:
    call = router_pb2.RouterGenerateRequest(model="demo", prompt="hi", deadline_s=5)
    assert codec.decode(m.RouterGenerateCall, call.SerializeToString()) == m.RouterGenerateCall(
        model="demo", prompt="hi", prompt_token_ids=(), sampling=SamplingParams(), deadline_s=5.0
    )
    some = request_pb2.SamplingParams(temperature=0)
    assert codec.decode(SamplingParams, some.SerializeToString()) == SamplingParams(temperature=0.0)


def test_answers_shared_by_two_calls_read_the_same_in_both_protos() -> None:
    chunk = codec.encode(m.GenerateChunk(3, (1, 2), FinishReason.LENGTH, "ab"))
    assert router_pb2.RouterGenerateResponse.FromString(chunk).chunk.text == "ab"
    assert decode_pb2.DecodeGenerateResponse.FromString(chunk).chunk.token_ids == [1, 2]
    record = m.WorkerRecord(WorkerId("w"), "i", (m.Role.DECODE,), "h:1", (), "demo", "f", 16, 8, 2048, 64)
    status = codec.encode(m.WorkerStatus(record, 5, added=(b"\0" * 16,)))
    assert status_pb2.StatusWatchResponse.FromString(status).status.num_used_blocks == 5
    assert status_pb2.StatusGetResponse.FromString(status).status.added == [b"\0" * 16]
    assert status_pb2.StatusWatchRequest.FromString(codec.encode(m.StatusCall(blocks=True))).blocks


@relaxed
@given(
    st.sampled_from(sorted(BY_CODE)),
    st.text(max_size=codec.MAX_ERROR_CHARS),
    st.none() | st.text(),
    st.none() | st.floats(allow_nan=False),
)
def test_errors_survive(code: str, message: str, param: str | None, retry_after_s: float | None) -> None:
    error = BY_CODE[code](message, param=param, retry_after_s=retry_after_s)
    back = codec.decode_error(codec.encode_error(error))
    assert (type(back), back.message, back.param, back.retry_after_s) == (
        type(error), message, param, retry_after_s
    )  # fmt: skip


def test_errors_are_cut_and_cleaned_to_fit_a_trailer() -> None:
    back = codec.decode_error(codec.encode_error(Overloaded("ü" * 5000 + "\ud800")))
    assert len(back.message) == codec.MAX_ERROR_CHARS
    assert codec.decode_error(codec.encode_error(BatonError("\ud800"))).message == "?"


@relaxed
@given(st.binary(max_size=60))
def test_any_bytes_read_as_some_error(data: bytes) -> None:
    assert isinstance(codec.decode_error(data), BatonError)
    assert isinstance(codec.decode_error(b"\xff"), InternalError)


@pytest.mark.parametrize(
    ("rows", "num", "param"),
    [((2,), 0, "step.logprob_rows"), ((1,), 1, "step.logprobs"), ((0, 1), 4, "step.logprobs")],
    ids=str,
)
def test_logprobs_that_do_not_fit_their_rows_are_refused(rows: tuple[int, ...], num: int, param: str) -> None:
    pb = decode_pb2.SessionResponse.FromString(codec.encode(STEP))
    pb.step.logprob_rows.extend(rows)
    pb.step.logprobs.extend([request_pb2.TokenLogprobs(logprob=-1.0)] * num)
    with pytest.raises(InvalidRequest) as caught:
        codec.decode(m.SessionDown, pb.SerializeToString())
    assert caught.value.param in (param, param.removeprefix("step."))
