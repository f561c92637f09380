"""One generator process for each GPU of this machine, behind an object that looks like an engine."""
