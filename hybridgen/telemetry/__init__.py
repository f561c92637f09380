"""What happened, counted: statistics, bytes read, and how long imports took."""
