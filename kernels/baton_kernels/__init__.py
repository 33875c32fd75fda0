"""Ops over the paged KV cache. Plain torch in `naive`, one file per accelerated op beside it; knows nothing of Baton."""
