"""What is compared and what comes out of it, as plain values; nothing here needs torch to be imported."""
