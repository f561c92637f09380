"""What is known about a GPU with its driver, whatever the entry: JSON documents by name."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from hybridgen.compilation.store.entry import checked_name
from hybridgen.compilation.store.files import UnusableError, read_json, sha256, write_json

logger = logging.getLogger(__name__)


class DeviceDocuments:
    """The documents about one device."""

    def __init__(self, root: Path, device: str) -> None:
        """
        Args:
            root: the store's directory.
            device: the GPU's name and driver, or `cpu`.
        """
        self.device = device
        self._root = root

    def read(self, name: str) -> dict[str, Any] | None:
        """A document; None where there is none.

        Raises:
            ValueError: the name is none.
        """
        path = self._path(name)
        try:
            document = read_json(path, str(path))
        except UnusableError as error:
            if os.path.lexists(path):
                logger.warning("the compile cache's %s is not used: %s", path, error)
            return None
        return document.get("document") if document.get("device") == self.device else None

    def write(self, name: str, document: dict[str, Any]) -> None:
        """Keep a JSON document. Nothing where the store cannot be written.

        Raises:
            ValueError: the name is none.
        """
        path = self._path(name)
        try:
            for directory in (path.parent.parent, path.parent):
                directory.mkdir(mode=0o700, exist_ok=True)
            write_json(path, {"device": self.device, "document": document})
        except OSError as error:
            logger.warning("the compile cache does not keep %s: %s", name, error)

    def _path(self, name: str) -> Path:
        return self._root / "devices" / sha256(self.device.encode())[:16] / f"{checked_name(name)}.json"
