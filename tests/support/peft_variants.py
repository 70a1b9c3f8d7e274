"""The frame of a family's test: PEFT's configs by name, each with the model it is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from tests.support.family_suite import make_checkpoint
from tests.support.peft_adapters import tiny_gpt2, tiny_llama, tiny_phi3
from transformers import PreTrainedModel

BASES: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tied=True),
    "biased": lambda: tiny_llama(has_biases=True),  # for what PEFT does not do to Conv1D
    "gpt2": tiny_gpt2,
    "phi3": tiny_phi3,
}
Variants = Mapping[str, tuple[str, dict[str, Any]]]  # name -> (base, options of the config)


class Maker:
    """Has PEFT write the checkpoint of a variant; `std` is that of what training adds."""

    def __init__(
        self,
        config: type[PeftConfig],
        variants: Variants,
        *,
        std: float = 0.2,
        bases: Mapping[str, Callable[[], PreTrainedModel]] = BASES,
        **defaults: Any,
    ) -> None:
        """defaults: options of every variant that does not give its own."""
        self._config = config
        self._variants = variants
        self._std = std
        self._bases = bases
        self._defaults = defaults

    def __call__(self, name: str, tmp_path: Path, seed: int = 1) -> tuple[PreTrainedModel, Path]:
        """The base, and the directory of an adapter for it."""
        base_name, options = self._variants[name]
        base = self._bases[base_name]()
        config = self._config(**self._defaults | options)
        return base, make_checkpoint(base, config, tmp_path / name, seed=seed, std=self._std)
