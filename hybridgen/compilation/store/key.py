"""What an entry was made for: named parts, and the digest that names its directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hybridgen.errors import shown


@dataclass(frozen=True)
class Key:
    """Named parts, all of which must be equal for an entry to be used."""

    parts: Mapping[str, Any]
    """Values that JSON has, by names that people can read."""

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits of the SHA-256 of the parts."""
        text = json.dumps(self.parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def differences(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The parts that differ: (here, there) by name; None where one side has no such part."""
        names = sorted(self.parts.keys() | other.keys())
        pairs = {name: (self.parts.get(name), other.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def describe(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences in words."""
    return "; ".join(
        f"{name}: {_brief(here)} here, {_brief(there)} there" for name, (here, there) in differences.items()
    )


def _brief(value: Any) -> str:
    """A value in a message: hashes are cut, because nobody compares their ends."""
    if isinstance(value, str) and len(value) >= 32 and all(c in "0123456789abcdef" for c in value):
        return value[:12]
    return "absent" if value is None else shown(value)
