"""How many CPU cores a process may use: the machine's count is not it in a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparring.parallel import num_usable_cpus, single


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        (None, 8),
        ("max 100000", 8),
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("6400000 100000", 8),
        ("nonsense", 8),
    ],
)
def test_affinity_and_quota_bound_the_cores(
    quota: str | None, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(single, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert num_usable_cpus() == cpus
