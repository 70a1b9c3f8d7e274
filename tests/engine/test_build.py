"""What the engine is put together from: refusals that must come before a request does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyadapt.config import EngineConfig
from polyadapt.engine.build import build_engine
from polyadapt.errors import StartupError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_at_start(tmp_path: Path):
    config = EngineConfig(device="cuda:0")
    with pytest.raises(StartupError, match=r"finds no CUDA device.*use --device cpu"):
        build_engine(config, tmp_path, tmp_path / "blobs", lambda: None, name="m")
