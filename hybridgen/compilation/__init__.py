"""Compiled layers, what is kept of them between processes, and the store that keeps it."""
