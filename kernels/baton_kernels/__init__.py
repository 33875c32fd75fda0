"""Ops over the paged KV cache: plain torch in `naive`, one file per accelerated op. Knows nothing of Baton."""
