"""How the HTTP door is opened, checked before anything is loaded."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from hybridgen.errors import ConfigError, shown

EXTRA = "the HTTP door needs the packages starlette, uvicorn and prometheus-client; pip install 'hybridgen[http]'"
DEFAULT = "127.0.0.1:8000"


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Where and how the door listens.

    Raises:
        ConfigError: a value cannot be used.
    """

    listen: str = DEFAULT
    """`HOST:PORT`, `:PORT` or `PORT`, on 127.0.0.1 where no host is given; port 0: any free one."""
    api_key_file: Path | None = None
    """A key in each line; needed on hosts that others reach."""
    origins: tuple[str, ...] = ()
    """Pages of these may call from a browser."""
    page: bool = True
    """Whether `/` shows a page."""
    name: str | None = None
    """What the model is called; None: as the server calls it, without directories."""
    chat_template: Path | None = None
    """A file with a template, used in place of the tokenizer's."""
    default_tokens: int = 4096
    """Generated at most where a chat does not say how many."""

    def __post_init__(self) -> None:
        host, _ = self.address()
        if not self.api_key_file and not _is_here(host):
            raise ConfigError(
                f"listening on {host} lets others in: give --api-key-file with a key in each line, or listen on "
                "127.0.0.1"
            )
        if self.default_tokens < 1:
            raise ConfigError(f"default_tokens={self.default_tokens}; give 1 or more")

    def address(self) -> tuple[str, int]:
        """Host and port.

        Raises:
            ConfigError: they cannot be read.
        """
        host, _, port = self.listen.rpartition(":")
        if not port.isdecimal() or int(port) >= 2**16:
            raise ConfigError(f"{shown(self.listen)} is no address to listen on; give HOST:PORT, as in {DEFAULT}")
        return host.strip("[]") or "127.0.0.1", int(port)

    def keys(self) -> list[str]:
        """The keys of the file.

        Raises:
            ConfigError: it cannot be read, or holds none.
        """
        if self.api_key_file is None:
            return []
        try:
            lines = self.api_key_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the file of API keys cannot be read: {error}") from None
        keys = [line.strip() for line in lines if line.strip()]
        for number, line in enumerate(lines, 1):
            if len(line.split()) > 1:  # each word would open the door
                raise ConfigError(
                    f"line {number} of {self.api_key_file} has a space; write one key in each line, alone"
                )
        if not keys:
            raise ConfigError(f"{self.api_key_file} holds no API key; write one in each line")
        return keys

    def template(self) -> str | None:
        """The chat template of the file.

        Raises:
            ConfigError: it cannot be read.
        """
        if self.chat_template is None:
            return None
        try:
            template = self.chat_template.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the chat template cannot be read: {error}") from None
        if not template.strip():
            raise ConfigError(f"the chat template {self.chat_template} is empty; give another, or leave it out")
        return template


def _is_here(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def public_name(model: str) -> str:
    """A model's name without directories of this machine; a hub id stays as it is."""
    return Path(model).name if model.startswith(("/", "~", ".")) or Path(model).exists() else model
