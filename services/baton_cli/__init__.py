"""The `baton` command: composes processes and owns no logic."""
