"""Which sequences an engine takes. A worker's role is such a policy, and nothing else: the scheduler is the same."""

import enum
from collections.abc import Collection
from dataclasses import dataclass

from baton.errors import InvalidRequest
from baton.messages import Role


class Kind(enum.Enum):
    """What a sequence asks of the engine."""

    LOCAL = "be computed here from beginning to end"
    PREFILL_ONLY = "be computed up to the first token, for a hand-over"
    REMOTE = "be decoded here from KV that another worker computes"


@dataclass(frozen=True)
class AdmissionPolicy:
    name: str
    kinds: frozenset[Kind]

    def check(self, kind: Kind) -> None:
        """Raises InvalidRequest."""
        if kind not in self.kinds:
            raise InvalidRequest(f"a {self.name} worker takes no request to {kind.value}")


PREFILL = AdmissionPolicy("prefill", frozenset({Kind.PREFILL_ONLY}))
# Prompts too: its own where a hand-over does not pay, and those it had to preempt.
DECODE = AdmissionPolicy("decode", frozenset({Kind.REMOTE, Kind.LOCAL}))
MIXED = AdmissionPolicy("mixed", frozenset(Kind))


def policy_for(roles: Collection[Role]) -> AdmissionPolicy:
    if set(roles) == {Role.PREFILL}:
        return PREFILL
    return DECODE if set(roles) == {Role.DECODE} else MIXED
