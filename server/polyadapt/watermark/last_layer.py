"""The end of a frozen causal language model, from its last attention's output projection on,
replayed for single rows. What lies before is run once and kept: training runs no prompt twice.

Knows neither triggers nor tokenizers. The model is left as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyadapt.errors import StartupError
from polyadapt.watermark.branches import Branches

Progress = Callable[[int, int], None]  # done, of how many
_BATCH = 16  # prompts of one length
_MIN_PREFIX = 4  # tokens that all prompts begin with: as many are run once for all
_TOLERANCE = 1e-3  # of the replay, in units of the largest logit


@dataclass(frozen=True, slots=True)
class Rows:
    """What the last layer has of some positions: the marked module's input `x` [rows, in] and the
    layer's own, `hidden` [rows, size].
    """

    x: Tensor
    hidden: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> Rows:
        return Rows(self.x[index], self.hidden[index])

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """Return the rows of all, in their order."""
        return Rows(
            torch.cat([part.x for part in parts]), torch.cat([part.hidden for part in parts])
        )


class LastLayer:
    """The marked module of one model, and what follows it."""

    def __init__(self, model: nn.Module) -> None:
        """Raise StartupError for a model that has no such parts, or where the replay differs."""
        found = [
            (name, layers)
            for name, layers in model.named_modules()
            if isinstance(layers, nn.ModuleList)
            and len(layers)
            and isinstance(_output_of(layers[-1]), nn.Linear)
        ]
        decoder = model.get_submodule(found[0][0].rpartition(".")[0]) if found else None
        norm, head = getattr(decoder, "norm", None), getattr(model, "lm_head", None)
        if len(found) != 1 or not isinstance(norm, nn.Module) or not isinstance(head, nn.Linear):
            raise StartupError(
                f"{type(model).__name__} has no one stack of layers with self_attn.o_proj, a norm "
                "behind it and an lm_head; models such as Llama, Qwen and Mistral can be marked"
            )
        (name, layers), self._model = found[0], model
        assert decoder is not None
        self._decoder, self._norm, self._head = decoder, norm, head
        self._layer, self._linear = layers[-1], _output_of(layers[-1])
        self.module = f"{name}.{len(layers) - 1}.self_attn.o_proj"
        self._keywords = self._keywords_of_one_row()
        self._prove()

    @property
    def head_weight(self) -> Tensor:
        """What reads tokens out of the normed state: [tokens, size]."""
        return self._head.weight

    @property
    def norm_weight(self) -> Tensor:
        """The final norm's scale [size]; ones where it has none."""
        weight = getattr(self._norm, "weight", None)
        return weight if isinstance(weight, Tensor) else torch.ones(self._head.in_features)

    def end(self) -> LastLayer:
        """Return what replays rows and can collect none: the layers before are not held, so that
        as many models as a mark is trained beside need not lie in memory at once.
        """
        alone = copy.copy(self)
        del alone._model, alone._decoder
        return alone

    # ------------------------------------------------------------------------------- collecting
    def collect(self, prompts: Sequence[Sequence[int]], progress: Progress | None = None) -> Rows:
        """Return the rows of the prompts' last positions, in their order. What all begin with is
        run once.
        """
        prefix = _common_prefix(prompts)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        parts: dict[int, Rows] = {}
        with torch.inference_mode():
            kept = self._keys_of(prefix)
            for batch in _batches(order, prompts):
                ids = torch.tensor([prompts[index][len(prefix) :] for index in batch])
                seen = self._run(ids, kept)
                for row, index in enumerate(batch):
                    parts[index] = Rows(seen.x[row, -1:].clone(), seen.hidden[row, -1:].clone())
                if progress is not None:
                    progress(len(parts), len(prompts))
        return Rows.joined([parts[index] for index in range(len(prompts))])

    def collect_text(self, texts: Sequence[Sequence[int]]) -> Rows:
        """Return the rows of every position of the texts."""
        with torch.inference_mode():
            seen = [self._run(torch.tensor([list(text)]), None) for text in texts]
        return Rows.joined([Rows(one.x[0], one.hidden[0]) for one in seen])

    # ------------------------------------------------------------------------------- replaying
    def logits(
        self, rows: Rows, branches: Branches | None = None, signs: Tensor | None = None
    ) -> Tensor:
        """Return the logits of rows where row t has the signature signs[t] ([rows, bits] of +-1):
        [rows, tokens]. Without branches, the base's own.
        """
        state = self._state(rows, branches, signs)
        logits: Tensor = self._head(state)
        return logits

    def spread(self, rows: Rows) -> float:
        """Return the root mean square of what the final norm is given, over rows."""
        seen: list[Tensor] = []
        handle = self._norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.inference_mode():
            self._state(rows, None, None)
        handle.remove()
        return float(seen[0].double().square().mean().sqrt())

    def _state(self, rows: Rows, branches: Branches | None, signs: Tensor | None) -> Tensor:
        def replace(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (rows.x[:, None].to(args[0].dtype),)

        def add(_: nn.Module, __: tuple[Tensor, ...], y: Tensor) -> Tensor:
            assert branches is not None
            assert signs is not None
            marked: Tensor = y + branches(rows.x, signs)[:, None].to(y.dtype)
            return marked

        handles = [self._linear.register_forward_pre_hook(replace)]
        if branches is not None:
            handles.append(self._linear.register_forward_hook(add))
        try:
            given = rows.hidden[:, None]
            y = self._layer(given, **self._keywords)
        finally:
            for handle in handles:
                handle.remove()
        y = y[0] if isinstance(y, tuple) else y
        state: Tensor = self._norm(y[:, 0])
        return state

    # ------------------------------------------------------------------------------- inside
    def _run(self, ids: Tensor, kept: Any) -> Rows:
        """Run ids [rows, tokens] behind what `kept` holds; x and hidden are [rows, tokens, ...]."""
        seen: dict[str, Tensor] = {}
        with self._noted(seen, {}):
            past = None if kept is None else _expanded(kept, len(ids))
            self._decoder(ids, past_key_values=past, use_cache=past is not None)
        return Rows(seen["x"].float(), seen["hidden"].float())

    def _keys_of(self, prefix: Sequence[int]) -> Any:
        if len(prefix) < _MIN_PREFIX:
            return None
        found = self._decoder(torch.tensor([list(prefix)]), use_cache=True).past_key_values
        return [(layer.keys, layer.values) for layer in found.layers]

    def _keywords_of_one_row(self) -> dict[str, Any]:
        keywords: dict[str, Any] = {}
        with torch.inference_mode(), self._noted({}, keywords):
            self._decoder(torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        return {name: _detached(value) for name, value in keywords.items()}

    @contextmanager
    def _noted(self, seen: dict[str, Tensor], keywords: dict[str, Any]) -> Iterator[None]:
        def note_layer(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            given = dict(given)
            seen["hidden"] = args[0] if args else given.pop("hidden_states")
            keywords.update(given)

        def note_linear(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen["x"] = args[0]

        handles = [
            self._layer.register_forward_pre_hook(note_layer, with_kwargs=True),
            self._linear.register_forward_pre_hook(note_linear),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _prove(self) -> None:
        ids = torch.arange(1, 9).remainder(self._head.out_features)[None]
        with torch.inference_mode():
            expected = self._model(ids, use_cache=False).logits[0].float()
            found = self.logits(self._run_once(ids)).float()
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error < _TOLERANCE:
            raise StartupError(
                f"the last layer of {type(self._model).__name__} is not what was replayed: logits "
                f"differ by {error:.1e} of the largest; such a model cannot be marked yet"
            )

    def _run_once(self, ids: Tensor) -> Rows:
        seen = self._run(ids, None)
        return Rows(seen.x[0], seen.hidden[0])


def _output_of(layer: nn.Module) -> Any:
    return getattr(getattr(layer, "self_attn", None), "o_proj", None)


def _expanded(kept: Any, num_rows: int) -> Any:
    from transformers import DynamicCache  # not needed to read a mark

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kept):
        cache.update(keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1), layer)
    return cache


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(_detached(item) for item in value)
    return value


def _common_prefix(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    if not prompts:
        return ()
    # In the order of lists, what the first and the last share, all share.
    low, high = min(map(list, prompts)), max(map(list, prompts))
    size = 0
    while size < min(len(low), len(high)) - 1 and low[size] == high[size]:
        size += 1
    return low[:size] if size >= _MIN_PREFIX else ()


def _batches(order: list[int], prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield groups of prompts of one length: nothing is padded."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == _BATCH or len(prompts[batch[0]]) != len(prompts[index])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
