"""Ranks start sooner: transformers imports scikit-learn where it is installed, for a decoding that no test uses."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

WITHOUT_SKLEARN = """
import sys
if "sparring.stages.worker" in sys.orig_argv:
    sys.modules["sklearn"] = None
"""


@pytest.fixture(autouse=True, scope="module")
def without_sklearn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(WITHOUT_SKLEARN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield
