"""The Unix socket: where it is and who may use it, frames, messages, connections, and the server that accepts them."""
