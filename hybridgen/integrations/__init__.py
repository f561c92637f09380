"""What other libraries call: one file for each of them, imported by whoever has it installed."""
