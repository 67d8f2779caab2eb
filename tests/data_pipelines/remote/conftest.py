"""A served dataset, and the settings to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.config import RemoteConfig
from tests.data_pipelines.remote.servers import Nginx, running_nginx


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Nginx]:
    """nginx in front of `tmp_path`."""
    with running_nginx(tmp_path, tmp_path / "nginx") as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def remote(cache: Path) -> Callable[..., RemoteConfig]:
    """Settings with quick retries that allow the loopback address."""

    def make(**settings: Any) -> RemoteConfig:
        given = {
            "cache_dir": str(cache),
            "retry_seconds": 0.02,
            "timeout_seconds": 20.0,
            "allow_private_addresses": True,
        }
        return RemoteConfig(**(given | settings))

    return make
