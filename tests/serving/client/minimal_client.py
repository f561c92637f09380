"""A client in forty lines of the standard library, written from docs/serving.md alone."""

import json
import socket
import struct
import sys


class Minimal:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.file, self.id = self.socket.makefile("rb"), 0
        self.send({"type": "hello", "version": 1})
        self.hello = self.receive()

    def send(self, message):
        body = json.dumps(message).encode()
        self.socket.sendall(struct.pack(">I", len(body)) + body)

    def receive(self):
        (length,) = struct.unpack(">I", self.file.read(4))
        message = json.loads(self.file.read(length))
        if message["type"] == "error":
            raise RuntimeError(f"{message['code']}: {message['message']}")
        return message

    def stream(self, prompt, **sampling):
        self.id += 1
        self.send({"type": "request", "id": self.id, "prompts": [prompt], "sampling": sampling, "stream": True})
        while True:
            message = self.receive()
            yield message["text"]
            if message.get("last"):
                return


if __name__ == "__main__":
    for text in Minimal(sys.argv[1]).stream(sys.argv[2], max_new_tokens=20):
        sys.stdout.write(text)
