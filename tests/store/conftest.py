from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from store_kit import Desk, open_store

from stpd.store.sqlite import SqliteStore


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    async with await open_store(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
async def desk(store: SqliteStore) -> Desk:
    return Desk(store)
