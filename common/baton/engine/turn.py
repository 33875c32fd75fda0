"""Whose turn it is: one number of seconds per sequence, made when it arrives and never changed. Smaller goes first.

    turn_s = arrival + 10 s x priority + predicted seconds of its own prefill

A level of priority is worth ten seconds of waiting, so classes of requests are apart whenever queues are shorter than
that, and a low one is never left out: nobody is overtaken by a request that arrives more than
2 x MAX_PRIORITY_S + its own prefill later. A short prompt overtakes a long one that arrived less than the long one's
duration before it: that costs the long one little and saves the short one much.
"""

from baton.request import Request

SECONDS_PER_LEVEL = 10.0
MAX_PRIORITY_S = 60.0  # further levels count like the last


def turn_s(request: Request, arrival_s: float, prefill_s: float) -> float:
    """`priority` as in vLLM: lower is earlier."""
    priority_s = SECONDS_PER_LEVEL * request.priority
    return arrival_s + max(-MAX_PRIORITY_S, min(MAX_PRIORITY_S, priority_s)) + prefill_s
