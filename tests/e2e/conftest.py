"""One server with the default model and the demo adapters, shared by the whole folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.support.servers import RunningServer, running_server


@pytest.fixture(scope="session")
def server(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """What `make serve` runs, on a free port and with a home of its own."""
    home = tmp_path_factory.mktemp("home")
    with running_server(home, smollm2_dir, "--demo") as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """The official client, unchanged."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def base(client: openai.OpenAI) -> str:
    """The base model's id: the entry that has no parent."""
    (name,) = [m.id for m in client.models.list() if getattr(m, "parent", None) is None]
    return name
