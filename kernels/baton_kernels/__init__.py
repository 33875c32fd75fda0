"""Ops over the paged KV cache: plain torch in `naive`, one file per accelerated op beside it. Knows nothing of Baton."""
