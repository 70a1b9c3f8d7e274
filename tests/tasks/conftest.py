"""The default model's tokenizer, ours and transformers', loaded once; and an event loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polyadapt.tasks.tokenizer import Tokenizer


@pytest.fixture
def anyio_backend() -> str:
    """Run async tests on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def real(smollm2_dir: Path) -> Tokenizer:
    """Our tokenizer of the default model."""
    return Tokenizer.load(smollm2_dir)


@pytest.fixture(scope="session")
def theirs(smollm2_dir: Path) -> Any:
    """transformers' tokenizer of the default model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir)
