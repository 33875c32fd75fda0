"""Paged KV cache: blocks, their hashes, the pool, per-request tables and the tensors behind them."""
