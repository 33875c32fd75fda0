"""Hugging Face modelling code with Baton's paged attention plugged in."""
