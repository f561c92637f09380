"""How a model is loaded and run: `EngineConfig`, whose fields stand by concern in the files here."""

from hybridgen.config.engine import EQUAL_BITS_ROWS, EngineConfig
from hybridgen.config.modes import GraphOwner, Mode
from hybridgen.config.resolved import ResolvedConfig
from hybridgen.config.settings import bar_disabled, parse_bytes, setting, switch

__all__ = [
    "EQUAL_BITS_ROWS",
    "EngineConfig",
    "GraphOwner",
    "Mode",
    "ResolvedConfig",
    "bar_disabled",
    "parse_bytes",
    "setting",
    "switch",
]
