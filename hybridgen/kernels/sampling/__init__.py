"""Ops that choose a token for each row."""
