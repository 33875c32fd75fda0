"""Metrics of hand-overs by the worker at the other end. Each end counts for itself; quarantines are the router's."""

from prometheus_client import CollectorRegistry, Counter

from baton.transfer.report import TransferReport

MAX_PEERS = 64  # with a label of their own: workers come and go, and each leaves its series behind
OTHERS = "other"


class PairMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._peers: set[str] = set()
        labels = ["direction", "peer"]
        self._transfers = Counter(
            "baton_pair_transfers", "KV hand-overs; outcome: ok, failed, cancelled, expired.", [*labels, "outcome"],
            registry=registry,
        )  # fmt: skip
        self._bytes = Counter("baton_pair_bytes", "KV bytes acknowledged.", labels, registry=registry)
        self._pieces = Counter("baton_pair_pieces", "Pieces acknowledged.", labels, registry=registry)
        self._seconds = Counter("baton_pair_seconds", "First piece to last.", labels, registry=registry)
        self._wire_seconds = Counter(
            "baton_pair_wire_seconds", "While at least one piece was on the wire. Bytes by it: the wire's speed.",
            labels, registry=registry,
        )  # fmt: skip
        self._exposed_seconds = Counter(
            "baton_pair_exposed_seconds", "End of the prompt's computation to last acknowledgement.", labels,
            registry=registry,
        )  # fmt: skip
        self._mismatches = Counter(
            "baton_pair_digest_mismatches",
            "Pieces that did not match their digest.",
            labels,
            registry=registry,
        )

    def observe(self, report: TransferReport) -> None:
        labels = report.direction, self._label(report.peer)
        self._transfers.labels(*labels, report.outcome).inc()
        self._bytes.labels(*labels).inc(report.num_bytes)
        self._pieces.labels(*labels).inc(report.num_pieces)
        self._seconds.labels(*labels).inc(report.seconds)
        self._mismatches.labels(*labels).inc(report.num_mismatches)
        if report.direction == "sent":
            self._wire_seconds.labels(*labels).inc(report.wire_s)
            self._exposed_seconds.labels(*labels).inc(report.exposed_s or 0.0)

    def _label(self, peer: str) -> str:
        if peer not in self._peers and len(self._peers) == MAX_PEERS:
            return OTHERS
        self._peers.add(peer)
        return peer
