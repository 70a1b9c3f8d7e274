"""What the engine is put together from: refusals that must come before a request does."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyadapt.config import EngineConfig
from polyadapt.engine.build import build_engine
from polyadapt.errors import StartupError


def test_a_device_without_an_adapter_product_is_refused_at_start(tmp_path: Path):
    config = EngineConfig(device="cuda:0")
    with pytest.raises(StartupError, match="--device cuda:0 is not served yet"):
        build_engine(config, tmp_path, tmp_path / "blobs", lambda: None, name="m")
