"""For tests that compile kernels in CUDA C++, for which no GPU is needed."""

from __future__ import annotations

import pytest

from hybridgen.device import program


def _is_there() -> bool:
    try:
        program._bindings()
    except program.Unfit:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not _is_there(), reason="needs cuda-bindings and NVRTC (the extra `cuda`)")
