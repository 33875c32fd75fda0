"""The decode role: receives KV blocks and streams tokens."""
