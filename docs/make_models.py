"""Writes the table of model types in `models.md`: what the tests compare, and why the others do not run.

`python docs/make_models.py` asks the installed transformers for its types and the engine's own checks for their
reasons; with `--check` it writes nothing and ends with status 1 where the page is not up to date. What runs are the
types of `tests/families.py` and `tests/multimodal.py`, each of which a test compares token for token.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))

import families  # noqa: E402
import multimodal  # noqa: E402

from hybridgen.errors import UnsupportedModelError  # noqa: E402
from hybridgen.loading.multimodal import whole_class  # noqa: E402
from hybridgen.loading.support import unsupported_reason  # noqa: E402
from hybridgen.models.probe import probe_config  # noqa: E402
from hybridgen.models.text_part import is_multimodal, without_encoders  # noqa: E402

PAGE = DOCS / "models.md"
BEGIN, END = "<!-- model types -->\n", "<!-- end of model types -->"
RUNS = {
    "every mode, the whole matrix": families.FAMILIES,
    "every mode, the whole matrix in the long sweep": families.MORE_FAMILIES,
    "the text part, mode `eager`; every mode, the whole matrix in the long sweep": [
        name for name in multimodal.WHOLES if not multimodal.is_absent(name)
    ],
}
"""What is compared, and the types."""
_MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
_INSTEAD = re.compile(r"; (run it with transformers' own generate\(\)|choose a causal decoder|save its text model .*)$")
_CONTEXT = 4096


def model_types() -> list[str]:
    """All types that generate text, and those of the tests."""
    names = [getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {}) for kind in _MAPPINGS]
    return sorted({name for each in (*names, *RUNS.values()) for name in each})


def reason(name: str) -> str:
    """Why a type does not run, or is not known to, from its default config."""
    if name not in CONFIG_MAPPING:
        return f"not in transformers {transformers.__version__}"
    try:
        config = CONFIG_MAPPING[name]()
    except Exception:  # a config class checks what it likes
        return "not looked at: its config has no defaults"
    found = unsupported_reason(config)
    if found is None:
        found = probed(config)
    if found is None:
        return "the checks let it in; not compared"
    found = _INSTEAD.sub("", found)
    found = re.sub(r"\b\w+(For[A-Z]\w+|LMHeadModel)\b", "its class", found)
    found = re.sub(r"\braises (\w+):.*", r"raises \1", found)
    found = re.sub(r"'[^']*'|because of [\w.]+: ", "", re.sub(r" \([^()]*(\([^()]*\)[^()]*)*\)", "", found))
    return " ".join(found.split())


def probed(config: PreTrainedConfig) -> str | None:
    """What the probe says; None if it lets the type in."""
    whole = whole_class(config) if is_multimodal(config) else None
    try:
        probe_config(config, _CONTEXT, None if whole is None else without_encoders(whole))
    except UnsupportedModelError as error:
        lacking = re.search(r"requires the (\w+) library", str(error))
        if lacking is not None:
            return f"not looked at: it needs the library {lacking[1]}, which was not installed"
        if "cannot be built" in str(error):
            return "not looked at: no model of its default config can be built"
        return str(error)
    return None


def table() -> str:
    """The types by what becomes of them."""
    tested = {name for names in RUNS.values() for name in names}
    rows = [("runs: " + how, sorted(names)) for how, names in RUNS.items()]
    others: dict[str, list[str]] = defaultdict(list)
    for name in model_types():
        if name not in tested:
            others[reason(name)].append(name)
    rows += sorted(others.items(), key=lambda row: (row[0].startswith(("not ", "the checks")), -len(row[1]), row[0]))
    shown = [f"| {how} | {len(names)} | {', '.join(f'`{name}`' for name in names)} |" for how, names in rows]
    head = f"| what becomes of it (transformers {transformers.__version__}) | | model types |"
    return "\n".join(["", head, "|---|---|---|", *shown, "", ""])


def page(text: str) -> str:
    """The page with its table as it should be."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


def main() -> int:
    """Write or check the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    text = PAGE.read_text()
    wanted = page(text)
    if not check:
        PAGE.write_text(wanted)
    if wanted != text:
        sys.stdout.write(f"{'not up to date' if check else 'written'}: {PAGE.name}\n")
    return int(check and wanted != text)


if __name__ == "__main__":
    sys.exit(main())
