"""Ops at a step's two ends: the copy of its metadata, and the advance of its rows."""
