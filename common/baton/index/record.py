"""A WorkerRecord as JSON, the form in which it lies in Redis. Whoever can write to Redis can write anything,
so a record is believed only as far as its types and ranges hold."""

from dataclasses import astuple

from pydantic import TypeAdapter

from baton.messages import WorkerRecord

MAX_RECORD_BYTES = 64 * 1024
_MAX_NUMBER = 1e18  # also refuses NaN and infinity, which JSON parsers let through

_ADAPTER = TypeAdapter(WorkerRecord)


def encode_record(record: WorkerRecord) -> bytes:
    return _ADAPTER.dump_json(record)


def decode_record(raw: bytes) -> WorkerRecord:
    """Raises ValueError for anything but a record. Unknown fields are ignored: a newer version may have
    written it."""
    if len(raw) > MAX_RECORD_BYTES:
        raise ValueError(f"a worker record of {len(raw)} bytes")
    record = _ADAPTER.validate_json(raw, strict=True)
    sizes = (record.num_blocks, record.max_model_len, record.kv_block_bytes)
    if not all(0 <= number <= _MAX_NUMBER for number in (*astuple(record.load), *sizes)):
        raise ValueError("a worker record with a number out of range")
    if not 1 <= record.block_size <= _MAX_NUMBER:
        raise ValueError("a worker record with a block size below 1")
    return record
