"""mistral.rs by its Python Runner, which mistralrs_driver.py serves over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.peer_servers.base import (
    BASE,
    Launch,
    Setup,
    call,
    is_installed,
    make_venv,
    mark_installed,
    readable_by_older,
)

PACKAGE = "mistralrs==0.9.5"
_DRIVER = Path(__file__).with_name("mistralrs_driver.py")


class MistralRs:
    """The peer."""

    name = "mistralrs"

    def __init__(self) -> None:
        self.about = f"{PACKAGE}, Python Runner, prefix cache off, prompts of as many words"

    def install(self, root: Path) -> None:
        """Install the wheel (26 MB) into an environment of its own."""
        if not is_installed(root, PACKAGE):
            log = root / "install.log"
            python = make_venv(root, log)
            call([str(python), "-m", "pip", "install", PACKAGE], log)
            mark_installed(root, PACKAGE)

    def prepare(self, setup: Setup) -> None:
        """Its reader needs rope_theta at the top level of config.json."""
        readable_by_older(setup.model, setup.scratch / "model")

    def launch(self, setup: Setup, port: int, *, has_adapters: bool) -> Launch:
        """Serve the plain model, or the model with its runtime for adapters."""
        argv = [str(setup.root / "venv" / "bin" / "python"), str(_DRIVER), "--port", str(port)]
        argv += ["--model", str(setup.scratch / "model"), "--dtype", setup.dtype]
        argv += ["--max-seqs", str(setup.max_streams)]
        if has_adapters:
            argv += ["--max-rank", str(setup.max_rank)]
            argv += ["--adapters", *map(str, setup.adapters.values())]
        threads = str(setup.threads)
        return Launch(argv, environ={"RAYON_NUM_THREADS": threads, "OMP_NUM_THREADS": threads})

    def register(self, setup: Setup, url: str) -> None:
        """Nothing to do: the driver loads the adapters at its start."""

    def body(self, setup: Setup, adapter: str | None, *, has_adapters: bool) -> dict[str, Any]:
        """Name the adapter as the model."""
        return {"model": adapter or BASE}
