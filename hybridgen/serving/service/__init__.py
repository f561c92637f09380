"""What runs requests: a queue of requests with events out. It knows nothing of sockets and of how messages look."""
