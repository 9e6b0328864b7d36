"""Every report in this folder has its figures."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def with_figures(figures: None) -> None: ...
