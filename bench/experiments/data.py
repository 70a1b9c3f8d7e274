"""The toy data: batches of token ids drawn from a generator, with the tokens that are answers.

Every task has sequences of one length, so that no row needs padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

PAD, START, END, SEPARATOR = range(4)
NUM_SPECIALS = 4


@dataclass(frozen=True, slots=True)
class Batch:
    """ids int64 [rows, length]; is_answer bool [rows, length]: tokens that a model has to predict
    from those before them, never the first; kinds int64 [rows]: a row's task, domain or class.
    """

    ids: torch.Tensor
    is_answer: torch.Tensor
    kinds: torch.Tensor

    def of_kind(self, kind: int) -> torch.Tensor:
        """Which rows are of this kind, bool [rows]."""
        return self.kinds == kind


def repeated(batch: Batch, times: int) -> Batch:
    """All rows, so many times one after the other."""
    return Batch(
        batch.ids.repeat(times, 1), batch.is_answer.repeat(times, 1), batch.kinds.repeat(times)
    )


def generator(*seeds: int) -> torch.Generator:
    """A generator of its own for every tuple of small seeds, such as (run, purpose, step)."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % (1 << 62)
    return torch.Generator().manual_seed(mixed)


@dataclass(frozen=True, slots=True)
class SequenceTasks:
    """START task s_1 .. s_n SEPARATOR t_1 .. t_n: t is s, in its order or reversed, under the
    task's own permutation of the symbols.

    maps int64 [tasks, symbols], is_reversed bool [tasks]. Task k's token is NUM_SPECIALS + k, the
    symbols' tokens follow all tasks'.
    """

    maps: torch.Tensor
    is_reversed: torch.Tensor
    length: int = 8

    @classmethod
    def make(cls, num_base: int, num_new: int, num_symbols: int, seed: int) -> SequenceTasks:
        """num_base tasks for a base model and num_new for its adapters, each half of them reversed.

        Of the base's, the first two do not change the symbols.
        """
        draws = generator(seed, 77)
        pairs = [torch.randperm(num_symbols, generator=draws) for _ in range(num_new + num_base)]
        maps = [pairs[k // 2] for k in range(num_base)] + [
            pairs[num_base + k // 2] for k in range(num_new)
        ]
        maps[:2] = [torch.arange(num_symbols)] * 2
        is_reversed = torch.arange(num_base + num_new) % 2 == 1
        return cls(torch.stack(maps), is_reversed)

    @property
    def vocab_size(self) -> int:
        """Specials, tasks and symbols."""
        return NUM_SPECIALS + self.maps.shape[0] + self.maps.shape[1]

    def draw(self, num_rows: int, tasks: Sequence[int], draws: torch.Generator) -> Batch:
        """Rows of these tasks in turn."""
        num_tasks, num_symbols = self.maps.shape
        kinds = torch.tensor(tasks).repeat(-(-num_rows // len(tasks)))[:num_rows]
        source = torch.randint(num_symbols, (num_rows, self.length), generator=draws)
        turned = torch.where(self.is_reversed[kinds][:, None], source.flip(1), source)
        target = self.maps[kinds].gather(1, turned)
        first = NUM_SPECIALS + num_tasks
        ones = torch.ones(num_rows, 1, dtype=torch.int64)
        ids = torch.cat(
            [
                START * ones,
                NUM_SPECIALS + kinds[:, None],
                first + source,
                SEPARATOR * ones,
                first + target,
            ],
            1,
        )
        is_answer = torch.zeros(ids.shape, dtype=torch.bool)
        is_answer[:, -self.length :] = True
        return Batch(ids, is_answer, kinds)


@dataclass(frozen=True, slots=True)
class Dialects:
    """START x_1 .. x_n from one Markov chain per domain; every x but the first is an answer.

    transitions float [domains, symbols, symbols], rows sum to one.
    """

    transitions: torch.Tensor
    length: int = 47

    @classmethod
    def make(cls, num_domains: int, num_symbols: int, seed: int) -> Dialects:
        """Each symbol is followed by three others of the domain's own, 0.6, 0.25 and 0.1 of the
        time, else by any.
        """
        draws = generator(seed, 78)
        table = torch.full((num_domains, num_symbols, num_symbols), 0.05 / num_symbols)
        for domain in range(num_domains):
            for symbol in range(num_symbols):
                successors = torch.randperm(num_symbols, generator=draws)[:3]
                table[domain, symbol, successors] += torch.tensor([0.6, 0.25, 0.1])
        return cls(table)

    @property
    def vocab_size(self) -> int:
        """Specials and symbols."""
        return NUM_SPECIALS + self.transitions.shape[1]

    def draw(
        self,
        num_rows: int,
        domains: Sequence[int],
        draws: torch.Generator,
        then: Callable[[int], int] | None = None,
    ) -> Batch:
        """Rows of these domains in turn; `then` names the domain of a row's second half."""
        kinds = torch.tensor(domains).repeat(-(-num_rows // len(domains)))[:num_rows]
        later = kinds if then is None else torch.tensor([then(k) for k in kinds.tolist()])
        symbols = [torch.randint(self.transitions.shape[1], (num_rows,), generator=draws)]
        for position in range(1, self.length):
            now = kinds if position < self.length // 2 else later
            chances = self.transitions[now, symbols[-1]]
            symbols.append(torch.multinomial(chances, 1, generator=draws)[:, 0])
        ones = torch.ones(num_rows, 1, dtype=torch.int64)
        ids = torch.cat([START * ones, NUM_SPECIALS + torch.stack(symbols, 1)], 1)
        is_answer = torch.ones(ids.shape, dtype=torch.bool)
        is_answer[:, :2] = False
        return Batch(ids, is_answer, kinds)


@dataclass(frozen=True, slots=True)
class NoisyClasses:
    """START x_1 .. x_n SEPARATOR class: x is the class's own word with noise in its symbols.

    words int64 [classes, n]. Class c's token is NUM_SPECIALS + c, the symbols' follow.
    """

    words: torch.Tensor
    num_symbols: int
    noise: float  # share of symbols that are replaced by any

    @classmethod
    def make(
        cls, num_classes: int, num_symbols: int, length: int, noise: float, seed: int
    ) -> NoisyClasses:
        """Random words."""
        words = torch.randint(num_symbols, (num_classes, length), generator=generator(seed, 79))
        return cls(words, num_symbols, noise)

    @property
    def vocab_size(self) -> int:
        """Specials, classes and symbols."""
        return NUM_SPECIALS + self.words.shape[0] + self.num_symbols

    def draw(self, num_rows: int, classes: Sequence[int], draws: torch.Generator) -> Batch:
        """Rows of these classes in turn."""
        kinds = torch.tensor(classes).repeat(-(-num_rows // len(classes)))[:num_rows]
        words = self.words[kinds]
        noise = torch.randint(self.num_symbols, words.shape, generator=draws)
        is_noise = torch.rand(words.shape, generator=draws) < self.noise
        first = NUM_SPECIALS + self.words.shape[0]
        ones = torch.ones(num_rows, 1, dtype=torch.int64)
        ids = torch.cat(
            [
                START * ones,
                first + torch.where(is_noise, noise, words),
                SEPARATOR * ones,
                NUM_SPECIALS + kinds[:, None],
            ],
            1,
        )
        is_answer = torch.zeros(ids.shape, dtype=torch.bool)
        is_answer[:, -1] = True
        return Batch(ids, is_answer, kinds)
