"""No pair carries traffic before it has given the right answer to a golden prompt."""

from baton.clock import VirtualClock
from baton.engine.batch import BatchRow
from baton.messages import Role
from baton.request import Request, RequestId, SamplingParams, TokenLogprobs
from baton_loadtest.simulate import (
    FakeModelRunner,
    FleetConfig,
    SimulatedFleet,
    expected_tokens,
    running_fleet,
)
from baton_router.canary import difference
from baton_router.generation import Tokens

CONFIG = FleetConfig(num_prefill=1, num_decode=1)


def answer(*tokens: int, logprob: float | None = None) -> list[Tokens]:
    said = () if logprob is None else (TokenLogprobs(logprob),)
    return [Tokens(index, (token,), None, said) for index, token in enumerate(tokens)]


def test_what_counts_as_the_same_answer() -> None:
    assert difference(answer(1, 2, 3), answer(1, 2, 3)) == ""
    assert "token 1 is 9 through the pair and 2 alone" in difference(answer(1, 9, 3), answer(1, 2, 3))
    assert "3 tokens" in difference(answer(1, 2, 3), answer(1, 2))
    assert "log probability" in difference(answer(1, logprob=-0.1), answer(1, logprob=-2.0))
    assert difference(answer(1, 2, logprob=-0.70), answer(1, 3, logprob=-0.69)) == ""


def request(name: str) -> Request:
    prompt = tuple(range(1, 90))
    return Request(RequestId(name), prompt, SamplingParams(max_tokens=8, temperature=0.0))


def right() -> list[int]:
    return expected_tokens(request("").prompt_token_ids, 8, CONFIG.layout)


def num(fleet: SimulatedFleet, kind: str) -> int:
    return sum(f" {kind} " in line for line in fleet.events.lines)


def test_a_prefill_worker_that_computes_something_else_under_the_same_name_never_carries_a_request() -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            assert num(fleet, "pair.proven") == 1
            bad = await fleet.start(Role.PREFILL)
            runner = bad.runner
            assert isinstance(runner, FakeModelRunner)
            write = runner._write

            def write_other_weights(row: BatchRow, layers: range) -> None:
                write(row._replace(token_ids=tuple(token ^ 1 for token in row.token_ids)), layers)

            runner._write = write_other_weights  # type: ignore[method-assign]
            await clock.sleep(2.0)
            assert num(fleet, "pair.refused") == 1
            [(pair, why)] = fleet.fleet.unproven_pairs().items()
            assert pair == (bad.record.worker_id, "decode-2")
            assert "through the pair" in why
            for number in range(20):
                assert await fleet.ask(request(f"r{number}")) == right()
            assert not any(
                f'"prefill": "{bad.record.worker_id}"' in x for x in fleet.events.lines if "placed" in x
            )

    clock.run(main())


def test_a_pair_that_was_refused_is_tried_again_and_an_old_proof_is_renewed() -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            fleet.kv_network.partition("kv://prefill-1", "kv://decode-2")
            await clock.sleep(CONFIG.router.canary_interval_s + 60)
            assert num(fleet, "pair.refused") >= 1
            assert fleet.fleet.pairs() == []
            assert await fleet.ask(request("alone")) == right()
            fleet.kv_network.heal("kv://prefill-1", "kv://decode-2")
            await clock.sleep(60)
            assert len(fleet.fleet.pairs()) == 1
            assert fleet.fleet.unproven_pairs() == {}

    clock.run(main())


def test_a_new_incarnation_has_proven_nothing() -> None:
    clock = VirtualClock()

    async def main() -> None:
        async with running_fleet(CONFIG, clock) as fleet:
            before = num(fleet, "pair.proven")
            await fleet.kill(next(w for w in fleet.workers if w.startswith("decode")))
            await fleet.start(Role.DECODE)
            await fleet.ready()
            assert num(fleet, "pair.proven") == before + 1
            assert await fleet.ask(request("again")) == right()

    clock.run(main())
