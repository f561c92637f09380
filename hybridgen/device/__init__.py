"""What the rooms share of a device: its facts, launches, captures, memory that the host maps, and its errors."""
