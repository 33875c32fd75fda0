"""Load generation and its report."""
