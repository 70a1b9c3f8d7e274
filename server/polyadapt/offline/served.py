"""One adapter in an engine of this process, for commands that ask before anything is uploaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from polyadapt.adapters.registry import FILES
from polyadapt.config import EngineConfig
from polyadapt.engine.build import build_engine
from polyadapt.engine.engine import Engine
from polyadapt.engine.in_process import InProcessEngine
from polyadapt.errors import by_code
from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    Failed,
    Options,
    PromptScored,
    Request,
    SamplingParams,
    TokenLogprob,
    Tokens,
)
from polyadapt_store.blobs import BlobStore, list_files
from polyadapt_store.manifest import digest_of, is_read, list_names


class ServedModel:
    """An engine over one model, as the server builds it, in float32. `engine` is set once it
    started.
    """

    def __init__(self, config: EngineConfig, model_dir: Path, blob_root: Path) -> None:
        # One request, which an adapter may need two passes for.
        self._config = config.model_copy(
            update={"dtype": "float32", "max_num_seqs": 2, "prefix_cache": False}
        )
        self._model_dir = model_dir
        self._blobs = BlobStore(blob_root)
        self._blob_root = blob_root
        self._client = InProcessEngine(self._build)
        self.engine: Engine

    async def start(self) -> None:
        """Load the model; raises StartupError."""
        await self._client.start()

    async def stop(self) -> None:
        """End the engine's thread."""
        await self._client.stop()

    def put(self, directory: Path) -> AdapterId:
        """Store an adapter's files and return its identity."""
        staged = self._blobs.new_staging()
        for name in sorted(list_names(directory)):
            if is_read(name, FILES):
                (staged / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(directory / name, staged / name)
        digest = digest_of(list_files(staged))
        self._blobs.put(staged, digest)
        return AdapterId(directory.name, 1, digest)

    async def score(
        self,
        adapter: AdapterId,
        rank: int | None,
        token_ids: list[int],
        num_top: int,
        signed: Options = (),
    ) -> list[TokenLogprob]:
        """Return what the adapter at a rank (None: all of it) says after each token: of the next
        token, and of the num_top likeliest. The last entry is what follows the whole prompt.
        signed: options that only a policy may choose. Raises what the engine answers.
        """
        request = Request(
            f"inspect-{rank}",
            tuple(token_ids),
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                ignore_eos=True,
                num_logprobs=num_top,
                num_prompt_logprobs=num_top,
            ),
            (AppliedAdapter(adapter, rank=rank, options=signed, is_mandatory=bool(signed)),),
        )
        scores: list[TokenLogprob] = []
        async for event in self._client.submit(request):
            if isinstance(event, Failed):
                raise by_code(event.code, event.message)
            if isinstance(event, PromptScored | Tokens):
                scores += event.logprobs
        return scores

    def _build(self, wake: Callable[[], None]) -> Engine:
        self.engine = build_engine(
            self._config, self._model_dir, self._blob_root, wake, name=self._config.model
        )
        return self.engine
