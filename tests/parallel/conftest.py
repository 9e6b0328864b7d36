from __future__ import annotations

from collections.abc import Iterator

import pytest
from forked_ranks import forked_process

from sparring.parallel.processes import guarded_process
from sparring.stages import launch


@pytest.fixture(autouse=True, scope="package")
def ranks_are_forks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "guarded_process", forked_process)
        yield


@pytest.fixture
def as_users_start_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are interpreters of their own, which end when the process that started them is killed."""
    monkeypatch.setattr(launch, "guarded_process", guarded_process)
