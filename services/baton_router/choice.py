"""Where a request goes, as this router sees the fleet now; and what it learns from the answers.

`placement` decides by what is gathered here: who is ready, what each holds of the prompt, who may fetch from whom. The
prefix index is a hint: a ticket, or a fetch, says what is really there.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

from baton.errors import InternalError, Unavailable
from baton.kv.block import BlockHash, block_hashes, root_hash
from baton.messages import Fetched, FetchOutcome, Role, Ticket, WorkerRecord
from baton.request import Request, WorkerId
from baton_router.fleet import Fleet
from baton_router.placement import Placement, place
from baton_router.workers import Link


class Chains:
    """The block hashes of one prompt, made once for each kind of worker: placement and the ticket both ask."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._hashes: dict[tuple[str, int], list[BlockHash]] = {}

    @property
    def may_be_held(self) -> bool:
        """What the model says of a prompt is known of computed tokens only: then no worker uses what it holds."""
        return self.request.sampling.prompt_logprobs is None

    def hashes(self, fingerprint: str, block_size: int) -> list[BlockHash]:
        kind = (fingerprint, block_size)
        if kind not in self._hashes:
            root = root_hash(fingerprint, block_size, self.request.cache_salt)
            self._hashes[kind] = block_hashes(root, self.request.prompt_token_ids, block_size)
        return self._hashes[kind]


class Choice:
    def __init__(self, fleet: Fleet, rng: random.Random) -> None:
        self._fleet = fleet
        self._rng = rng

    @contextmanager
    def placed(self, chains: Chains) -> Iterator[Placement]:
        """Inside, others are placed with this request in mind. Raises Unavailable when nobody could serve it."""
        placement = self._place(chains)
        request_id = chains.request.request_id
        prompts = self._fleet.link(placement.prefill or placement.decode).prompts
        with prompts.holding(request_id, placement.num_new_tokens):
            if placement.prefill is None:
                prompts.sent(request_id)
            yield placement

    def _place(self, chains: Chains) -> Placement:
        request = chains.request
        links = self._fleet.ready()
        decodes = [link for link in links if Role.DECODE in link.record.roles]
        prefills = [link for link in links if Role.PREFILL in link.record.roles]
        if not decodes:
            raise Unavailable("no decode worker is ready", retry_after_s=1.0)
        held = self._held_blocks(chains, decodes + prefills) if chains.may_be_held else {}
        placement = place(
            request.num_prompt_tokens,
            request.sampling.max_tokens,
            [link.candidate(held.get(link.record.worker_id, 0)) for link in prefills],
            [link.candidate(held.get(link.record.worker_id, 0)) for link in decodes],
            self._rng,
            self._fleet.canary.is_proven,
            request.sampling.n,
            self._fleet.prefix_paths.can_fetch,
        )
        if placement is None:
            raise InternalError("placement found no decode worker among the ready ones")
        return placement

    def confirm_ticket(self, chains: Chains, ticket: Ticket) -> None:
        """The ticket says what is really held; a worker never counts the block of the last prompt token."""
        if chains.may_be_held:
            self._confirm(chains, ticket, ticket.num_cached_tokens)

    def note_fetched(self, chains: Chains, prefill: WorkerId, fetched: Fetched) -> None:
        """The owner may hold less than it was said to; a way that failed is not taken again for a while."""
        self._fleet.prefix_paths.note(prefill, fetched)
        owner = self._fleet.mirror.record(fetched.source_id)
        if owner is not None and fetched.outcome is FetchOutcome.EVICTED:
            self._confirm(chains, owner, fetched.num_held_tokens)

    def _confirm(self, chains: Chains, holder: Ticket | WorkerRecord, num_tokens: int) -> None:
        num_blocks = (chains.request.num_prompt_tokens - 1) // holder.block_size
        hashes = chains.hashes(holder.fingerprint, holder.block_size)[:num_blocks]
        self._fleet.mirror.confirm(holder.worker_id, hashes, num_tokens // holder.block_size)

    def _held_blocks(self, chains: Chains, links: list[Link]) -> dict[WorkerId, int]:
        """Leading blocks of the prompt that each worker is said to hold. Workers of another fingerprint hash to other
        names, so each kind is looked up by its own."""
        held: dict[WorkerId, int] = {}
        matches: dict[tuple[str, int], dict[WorkerId, int]] = {}
        for link in links:
            kind = (link.record.fingerprint, link.record.block_size)
            if kind not in matches:
                matches[kind] = self._fleet.mirror.match(chains.hashes(*kind))
            held[link.record.worker_id] = matches[kind].get(link.record.worker_id, 0)
        return held
