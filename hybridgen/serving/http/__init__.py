"""The HTTP door: a process of its own that speaks OpenAI's protocol and asks a server on its Unix socket."""
