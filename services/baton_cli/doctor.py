"""`baton doctor`: what a running fleet looks like, and what is wrong with it, in words.

Reads a router's /health and /debug/blocks; changes nothing.
"""

from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

STUCK_S = 60.0  # what has no lease is over, or has failed, long before
STUCK_LEASE_S = 1.0  # past its end; the holder itself gives up earlier
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Finding:
    is_problem: bool
    text: str


def diagnose(health: dict[str, Any], blocks: dict[str, Any]) -> list[Finding]:
    """What a person should know, problems first. A pure function of what the router says."""
    findings = [Finding(True, reason) for reason in health["reasons"]]
    findings += [
        Finding(True, f"{w['id']} does not answer")
        for w in health["workers"]
        if not w["ready"]
        and not any(reason.startswith(f"{w['id']} is not used") for reason in health["reasons"])
    ]
    for worker_id, ledger in blocks["workers"].items():
        findings += _of_worker(worker_id, ledger)
    for pair in health["pairs"]:
        silent = [w for w in (pair["prefill"], pair["decode"]) if "error" in blocks["workers"].get(w, {})]
        why = f": {' and '.join(silent)} does not answer" if silent else ""
        findings.append(Finding(bool(silent), _of_pair(pair) + why))
    return sorted(findings, key=lambda finding: not finding.is_problem)


def _of_pair(pair: dict[str, Any]) -> str:
    rate = f", {pair['bytes_per_s'] / 1e9:.3g} GB/s" if pair["bytes_per_s"] else ""
    troubles = ", ".join(f"{number} {kind}" for kind, number in pair["troubles"].items())
    seen = f" ({troubles} since the router started)" if troubles else ""
    return f"{pair['prefill']} -> {pair['decode']} over {pair['transport'] or 'nothing yet'}{rate}{seen}"


def _of_worker(worker_id: str, ledger: dict[str, Any]) -> list[Finding]:
    if "error" in ledger:
        return [Finding(True, f"{worker_id}: no block ledger: {ledger['error']}")]
    findings = []
    if ledger["num_used"] + ledger["num_free"] != ledger["num_blocks"]:
        sums = f"{ledger['num_used']} used + {ledger['num_free']} free != {ledger['num_blocks']}"
        findings.append(Finding(True, f"{worker_id}: blocks do not add up: {sums}"))
    held = {block for holder in ledger["holders"] for block in holder["block_ids"]}
    if len(held) != ledger["num_used"]:
        findings.append(
            Finding(True, f"{worker_id}: {ledger['num_used']} blocks are used, {len(held)} have a holder")
        )
    for holder in ledger["holders"]:
        if why := _why_stuck(holder):
            blocks = f"{len(holder['block_ids'])} blocks for {holder['held_s']:.0f} s"
            what = f"{holder['request_id']} is stuck: {holder['purpose']} {blocks}, {why}. {holder['note']}"
            findings.append(Finding(True, f"{worker_id}: {what}".rstrip(". ")))
    return findings


def _why_stuck(holder: dict[str, Any]) -> str:
    """Empty: it is not. A hand-over is as old as it likes while its lease is renewed."""
    lease_left_s = holder["lease_left_s"]
    if lease_left_s is not None:
        return f"its lease ended {-lease_left_s:.0f} s ago" if lease_left_s < -STUCK_LEASE_S else ""
    if holder["purpose"] != "running" and holder["held_s"] > STUCK_S:
        return "nobody renews it"
    return ""


def doctor(base_url: str, console: Console) -> int:
    """0: nothing wrong, 1: something is, 2: the router could not be asked."""
    try:
        with httpx.Client(base_url=base_url, timeout=TIMEOUT_S) as client:
            health = client.get("/health").raise_for_status().json()
            blocks = client.get("/debug/blocks").raise_for_status().json()
    except httpx.HTTPError as error:
        console.print(f"baton: {base_url} cannot be asked: {error}", style="red", markup=False)
        return 2
    console.print(_workers_table(health, blocks))
    if holders := _holders_table(blocks):
        console.print(holders)
    findings = diagnose(health, blocks)
    for finding in findings:
        console.print(
            "problem " if finding.is_problem else "ok      ", finding.text, markup=False, soft_wrap=True
        )
    return int(any(finding.is_problem for finding in findings))


def _workers_table(health: dict[str, Any], blocks: dict[str, Any]) -> Table:
    table = Table("worker", "roles", "address", "transport", "used", "free", "cached", "running", "waiting")
    for worker in health["workers"]:
        ledger = blocks["workers"].get(worker["id"], {})
        counts = [str(ledger.get(name, "?")) for name in ("num_used", "num_free", "num_cached")]
        roles, transports = ", ".join(worker["roles"]), ", ".join(worker["transports"])
        table.add_row(
            worker["id"], roles, worker["address"], transports, *counts,
            str(worker["num_running"]), str(worker["num_waiting"]),
        )  # fmt: skip
    return table


def _holders_table(blocks: dict[str, Any]) -> Table | None:
    table = Table("worker", "request", "purpose", "blocks", "since", "lease", "note", title="who holds what")
    for worker_id, ledger in blocks["workers"].items():
        for holder in ledger.get("holders", ()):
            lease = "" if holder["lease_left_s"] is None else f"{holder['lease_left_s']:.1f} s"
            table.add_row(
                worker_id, holder["request_id"], holder["purpose"], str(len(holder["block_ids"])),
                f"{holder['held_s']:.1f} s", lease, holder["note"],
            )  # fmt: skip
    return table if table.row_count else None
