"""LoRID's agreement of three LoRAs beside self-consistency, at equal tokens.

Toy arithmetic: d o d o d o d modulo ten, from left to right. A base knows single facts and, less
well, chains; LoRAs of rank 8 and scale 2 on q and v make of it an IR (r1, r2, the answer r3), a KG
(the knowledge is r1) and a DR (r2, then the answer, given the question and KG's r1). Our engine
samples all of them in shared batches at LoRID's temperature 1.5, top-p 0.9, top-k 50.

LoRID (arXiv 2508.13037; Xinhe-Li/LoRID:src/predict.py and src/evaluation): up to 20 iterations,
each an answer of IR and one of KG and DR; it stops when the two sets of all answers so far meet,
and counts as right if any common answer is. Never meeting is wrong. Also with one answer (DR's
where two are common), and with the majority of all answers where they never meet.

Answers are compared in two ways, over the same samples. `number` reads the whole chain, r1 r2 r3,
as the answer: one of a thousand, so that wrong ones seldom agree. `digit` reads r3 alone, one of
ten.

Self-consistency: the majority of n answers of IR, or of KG and DR, the earlier one of equals. Equal
tokens are generated ones: as many answers as fit into the mean of what LoRID spent (n fixed), and
into what it spent on that question (n by question, so that this too spends more on what is hard).
The roles are trained for 250 and for 500 steps.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench.experiments import arithmetic, report, tiny_lm, training, workflow_replay
from bench.experiments.arithmetic import Question
from bench.experiments.data import END, generator
from bench.experiments.methods import lora
from bench.experiments.protocols import Answer, majority, play, within
from bench.experiments.report import Claim, Outcome
from bench.experiments.served import Served
from transformers import LlamaForCausalLM

from bench import plots
from polyadapt.types import AppliedAdapter, SamplingParams

NAME = "agreement"
ROLES = ("IR", "KG", "DR")
READINGS = ("number", "digit")
_GREEDY = ("IR, greedy", "KG and DR, greedy")
_FIXED = "self-consistency of IR, n fixed"
_OF_IR = "self-consistency of IR, n by question"
_OF_DR = "self-consistency of KG and DR, n by question"
Figures = dict[str, float]
Curves = dict[str, list[tuple[float, float]]]  # name -> (mean tokens of a question, accuracy)


@dataclass(frozen=True, slots=True)
class Settings:
    """One run."""

    seeds: tuple[int, ...] = (1, 2)
    width: int = 96
    inner: int = 192
    num_layers: int = 3
    base_steps: int = 450
    base_lr: float = 2e-3
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rank: int = 8
    scale: float = 2.0
    role_steps: tuple[int, ...] = (250, 500)
    lr: float = 3e-3
    rows: int = 32
    num_questions: int = 120
    max_iterations: int = 20
    num_answers: int = 45  # of IR, for self-consistency
    temperature: float = 1.5
    top_p: float = 0.9
    top_k: int = 50


FULL = Settings()
QUICK = Settings(
    seeds=(0,), width=32, inner=32, num_layers=1, base_steps=10, role_steps=(3,), num_questions=4,
    max_iterations=3, num_answers=5,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Samples:
    """The tokens that were said, by question and sample."""

    intuitive: list[list[list[int]]]
    known: list[list[list[int]]]  # KG's; the DR of the same place was given it
    deep: list[list[list[int]]]

    def answers(self, reading: str) -> tuple[list[list[Answer]], list[list[Answer]]]:
        """IR's answers, and KG's and DR's with the tokens of both."""

        def read(known: list[int], said: list[int]) -> Answer:
            number = arithmetic.extract_chain(known, said)
            value = number if reading == "number" else arithmetic.extract(said)
            return Answer(value, len(known) + len(said))

        return (
            [[read([], said) for said in own] for own in self.intuitive],
            [
                [read(known, said) for known, said in zip(*own, strict=True)]
                for own in zip(self.known, self.deep, strict=True)
            ],
        )


def run(settings: Settings, scratch: Path) -> Outcome:
    """Train base and roles, sample, and play both protocols over the samples."""
    base = _train_base(settings)
    model_dir = tiny_lm.save(base, scratch / "base")
    questions = arithmetic.draw_questions(settings.num_questions, generator(0, 2))
    # By (steps of the roles' training, reading), seed by seed.
    runs: dict[tuple[int, str], list[Figures]] = {}
    curves: dict[tuple[int, str], list[Curves]] = {}
    difference, num_different = 0.0, 0
    for num_steps, seed in itertools.product(settings.role_steps, settings.seeds):
        models = {role: _train_role(base, role, settings, num_steps, seed) for role in ROLES}
        name = f"{num_steps}-{seed}"
        with Served(model_dir, scratch / f"store-{name}") as served:
            adapters = {
                role: served.add(lora.write(scratch / f"{role}-{name}", modules))
                for role, (_, modules) in models.items()
            }
            for role, (model, _) in models.items():
                difference = max(difference, _difference(served, model, adapters[role], role))
            greedy = _sample(served, adapters, questions, settings, None)
            samples = _sample(served, adapters, questions, settings, seed)
        for reading in READINGS:
            gold = [_gold(question, reading) for question in questions]
            figures = _figures(greedy, samples, gold, reading, settings)
            runs.setdefault((num_steps, reading), []).append(figures)
            num_different += _replay(samples, reading, settings)
            curve = _curves(samples, gold, reading, settings)
            curves.setdefault((num_steps, reading), []).append(curve)
        print(f"{num_steps} steps, seed {seed} done", file=sys.stderr, flush=True)
    merged = {_name(*key): _merged(of) for key, of in curves.items()}
    return Outcome(
        title="LoRID beside self-consistency at equal tokens",
        claims=_claims(runs, settings, difference, num_different),
        tables=[_table(runs)],
        charts={
            f"{NAME}-{num_steps}.svg": plots.line_chart(
                f"Accuracy over generated tokens a question, roles trained for {num_steps} steps",
                "generated tokens a question (logarithmic)",
                "accuracy",
                merged[_name(num_steps, "number")],
            )
            for num_steps in settings.role_steps
        },
        settings=settings,
        figures={
            "runs": {_name(*key): own for key, own in runs.items()},
            "curves": merged,
            "served, largest difference": difference,
            "workflows, different outcomes": num_different,
        },
    )


def _train_base(settings: Settings) -> LlamaForCausalLM:
    size = tiny_lm.Size(arithmetic.VOCAB_SIZE, settings.width, settings.inner, settings.num_layers)
    model = tiny_lm.new_model(size, 0).train()

    def loss_of(step: int) -> torch.Tensor:
        batch = arithmetic.base_batch(2 * settings.rows, generator(0, 1, step))
        return training.answer_loss(model(input_ids=batch.ids, use_cache=False).logits, batch)

    training.fit(model.parameters(), loss_of, num_steps=settings.base_steps, lr=settings.base_lr)
    return tiny_lm.frozen_copy(model)


def _train_role(
    base: LlamaForCausalLM, role: str, settings: Settings, num_steps: int, seed: int
) -> tuple[LlamaForCausalLM, dict[str, lora.LowRank]]:
    model = tiny_lm.frozen_copy(base)
    number = ROLES.index(role)
    modules = lora.add_lora(
        model, settings.targets, settings.rank, settings.scale * settings.rank,
        generator(seed, 3, number),
    )  # fmt: skip

    def loss_of(step: int) -> torch.Tensor:
        draws = generator(seed, 5, number, step)
        batch = arithmetic.role_batch(arithmetic.draw_questions(settings.rows, draws), role)
        return training.answer_loss(model(input_ids=batch.ids, use_cache=False).logits, batch)

    parameters = [p for module in modules.values() for p in (module.A, module.B)]
    training.fit(parameters, loss_of, num_steps=num_steps, lr=settings.lr)
    return model, modules


def _difference(
    served: Served, model: LlamaForCausalLM, adapter: AppliedAdapter, role: str
) -> float:
    """Of log-probabilities, engine and training code, on some held-out rows; the largest."""
    batch = arithmetic.role_batch(arithmetic.draw_questions(16, generator(0, 6)), role)
    given = served.log_probabilities(batch, [(adapter,)] * len(batch.ids))
    return float((given - training.log_probabilities(model, batch)).abs().max())


def _sample(
    served: Served,
    adapters: Mapping[str, AppliedAdapter],
    questions: Sequence[Question],
    settings: Settings,
    seed: int | None,
) -> Samples:
    """num_answers of IR and max_iterations of KG and DR; without a seed one greedy one of each."""

    def params(*seeds: int) -> SamplingParams:
        if seed is None:
            return SamplingParams(max_tokens=6, temperature=0.0, stop_token_ids=(END,))
        drawn = torch.randint(1 << 62, (), generator=generator(seed, 8, *seeds))
        return SamplingParams(
            max_tokens=6, temperature=settings.temperature, top_p=settings.top_p,
            top_k=settings.top_k, seed=int(drawn), stop_token_ids=(END,),
        )  # fmt: skip

    def ask(role: str, number: int, num_samples: int) -> list[list[list[int]]]:
        return served.sample(
            [arithmetic.prompt(question, role) for question in questions],
            [(adapters[role],)] * len(questions),
            [params(number, i) for i in range(len(questions))],
            num_samples if seed is not None else 1,
        )

    intuitive = ask("IR", 0, settings.num_answers)
    known = ask("KG", 1, settings.max_iterations)
    prompts, sampling = [], []
    for i, (question, samples) in enumerate(zip(questions, known, strict=True)):
        for j, said in enumerate(samples):
            text = [token for token in said if token != END]
            prompts.append(arithmetic.prompt(question, "DR", text))
            sampling.append(params(2, i, j))
    said = served.sample(prompts, [(adapters["DR"],)] * len(prompts), sampling, 1)
    size = len(known[0])
    deep = [[own[0] for own in said[i : i + size]] for i in range(0, len(said), size)]
    return Samples(intuitive, known, deep)


def _gold(question: Question, reading: str) -> str:
    chain = "".join(map(str, arithmetic.results(question)))
    return chain if reading == "number" else chain[-1]


def _figures(
    greedy: Samples, samples: Samples, gold: Sequence[str], reading: str, settings: Settings
) -> Figures:
    intuitive, deep = samples.answers(reading)
    first, second = greedy.answers(reading)
    rounds = zip(intuitive, deep, strict=True)
    played = [play(a, b, settings.max_iterations) for a, b in rounds]
    spent = _mean([p.num_tokens for p in played])
    per_answer = _mean([a.num_tokens for own in intuitive for a in own])
    fixed = max(1, min(int(spent / per_answer), settings.num_answers))
    of_ir, of_dr = (
        [within(own, p.num_tokens) for own, p in zip(answers, played, strict=True)]
        for answers in (intuitive, deep)
    )
    agreed = [(p, wanted) for p, wanted in zip(played, gold, strict=True) if p.common]
    return {
        "IR, greedy": _share([own[0].value for own in first], gold),
        "KG and DR, greedy": _share([own[0].value for own in second], gold),
        "IR, one sample": _sample_share(intuitive, gold),
        "KG and DR, one sample": _sample_share(deep, gold),
        "LoRID, any common answer": _mean(
            [wanted in p.common for p, wanted in zip(played, gold, strict=True)]
        ),
        "LoRID, one answer": _share([p.one for p in played], gold),
        "LoRID, majority where none": _share([p.one or p.fallback for p in played], gold),
        "LoRID, where they agreed": _mean([p.one == wanted for p, wanted in agreed]),
        _FIXED: _majority_share([own[:fixed] for own in intuitive], gold),
        _OF_IR: _majority_share(of_ir, gold),
        _OF_DR: _majority_share(of_dr, gold),
        "mean iterations": _mean([p.num_iterations for p in played]),
        "coverage": len(agreed) / len(played),
        "two common answers, of those that agreed": _mean([len(p.common) == 2 for p, _ in agreed]),
        "tokens, LoRID": spent,
        "tokens, n fixed": _mean([sum(a.num_tokens for a in own[:fixed]) for own in intuitive]),
        "tokens, IR by question": _mean([sum(a.num_tokens for a in own) for own in of_ir]),
        "tokens, DR by question": _mean([sum(a.num_tokens for a in own) for own in of_dr]),
        "n fixed": float(fixed),
    }


def _replay(samples: Samples, reading: str, settings: Settings) -> int:
    """How many outcomes of the server's workflows are not those that are counted here."""
    intuitive, deep = samples.answers(reading)
    most = settings.max_iterations
    played = [play(a, b, most) for a, b in zip(intuitive, deep, strict=True)]
    own = [(p.one or p.fallback, bool(p.common), p.num_iterations) for p in played]
    served = workflow_replay.lorid(intuitive, deep, most)
    found = [(o.answer, o.agreed, o.num_rounds) for o in served]
    majorities = [majority([answer.value for answer in answers]) for answers in intuitive]
    consistent = workflow_replay.self_consistency(intuitive, settings.num_answers)
    return sum(a != b for a, b in zip(own, found, strict=True)) + sum(
        a != b.answer for a, b in zip(majorities, consistent, strict=True)
    )


def _curves(samples: Samples, gold: Sequence[str], reading: str, settings: Settings) -> Curves:
    """LoRID over its limit of iterations, majorities over the number of answers."""
    intuitive, deep = samples.answers(reading)
    found: Curves = {"LoRID": [], "LoRID, fallback": []}
    for most in _steps(settings.max_iterations):
        played = [play(a, b, most) for a, b in zip(intuitive, deep, strict=True)]
        spent = _mean([p.num_tokens for p in played])
        found["LoRID"].append((spent, _share([p.one for p in played], gold)))
        backed = [p.one or p.fallback for p in played]
        found["LoRID, fallback"].append((spent, _share(backed, gold)))
    pooled = [
        [answer for pair in zip(i, d, strict=False) for answer in pair]
        for i, d in zip(intuitive, deep, strict=True)
    ]
    several = {"majority of IR": intuitive, "majority of DR": deep, "majority of both": pooled}
    for name, answers in several.items():
        found[name] = []
        for n in _steps(len(answers[0])):
            spent = _mean([sum(a.num_tokens for a in own[:n]) for own in answers])
            found[name].append((spent, _majority_share([own[:n] for own in answers], gold)))
    return found


def _merged(curves: Sequence[Curves]) -> Curves:
    """Point by point the mean of the seeds."""
    return {
        name: [
            (_mean([own[name][i][0] for own in curves]), _mean([own[name][i][1] for own in curves]))
            for i in range(len(curves[0][name]))
        ]
        for name in curves[0]
    }


def _steps(most: int) -> list[int]:
    """1, 2, 3, 5, 8, ... and the last."""
    found = [1, 2]
    while found[-1] < most:
        found.append(found[-1] + found[-2])
    return sorted({min(n, most) for n in found})


def _share(values: Sequence[str | None], gold: Sequence[str]) -> float:
    return _mean([value == wanted for value, wanted in zip(values, gold, strict=True)])


def _sample_share(answers: Sequence[Sequence[Answer]], gold: Sequence[str]) -> float:
    """Of all samples."""
    pairs = zip(answers, gold, strict=True)
    return _mean([answer.value == wanted for own, wanted in pairs for answer in own])


def _majority_share(answers: Sequence[Sequence[Answer]], gold: Sequence[str]) -> float:
    return _share([majority([answer.value for answer in own]) for own in answers], gold)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _name(num_steps: int, reading: str) -> str:
    return f"{num_steps} steps, {reading}"


def _claims(
    runs: Mapping[tuple[int, str], Sequence[Figures]],
    settings: Settings,
    difference: float,
    num_different: int,
) -> list[Claim]:
    one = "LoRID, one answer"

    def mean(key: tuple[int, str], name: str) -> float:
        return 100 * _mean([own[name] for own in runs[key]])

    def beats(num_steps: int, rival: str, reading: str = "number") -> Claim:
        key = (num_steps, reading)
        gains = [100 * (own[one] - own[rival]) for own in runs[key]]
        return Claim(
            f"roles of {num_steps} steps, answers a {reading}: LoRID (one answer) is more often "
            f"right than {rival}",
            f"{mean(key, one):.1f} and {mean(key, rival):.1f} %; by seed "
            + ", ".join(f"{gain:+.1f}" for gain in gains),
            mean(key, one) > mean(key, rival),
        )

    claims = []
    for num_steps in settings.role_steps:
        greedy = max(_GREEDY, key=lambda name: mean((num_steps, "number"), name))
        claims += [beats(num_steps, rival) for rival in ("IR, one sample", greedy, _OF_IR, _OF_DR)]
        claims.append(beats(num_steps, _OF_IR, "digit"))
    keys = [(num_steps, "number") for num_steps in settings.role_steps]
    flatter = [mean(key, "LoRID, any common answer") - mean(key, one) for key in keys]
    return [
        *claims,
        Claim(
            "the authors' score (any common answer) flatters by less than 1 point",
            ", ".join(f"{points:.2f}" for points in flatter),
            max(flatter) < 1,
        ),
        Claim(
            "served log-probabilities equal the training code's to 1e-3, all roles",
            f"{difference:.1e}",
            difference <= 1e-3,
        ),
        Claim(
            "the server's workflows make the same of the same samples: answer, agreement, rounds",
            f"{num_different} outcomes differ",
            num_different == 0,
        ),
    ]


def _table(runs: Mapping[tuple[int, str], Sequence[Figures]]) -> str:
    names = next(iter(runs.values()))[0]
    rows = [[name, *(_mean([own[name] for own in of]) for of in runs.values())] for name in names]
    return report.table(["mean of the seeds", *(_name(*key) for key in runs)], rows)


if __name__ == "__main__":
    report.main(sys.modules[__name__])
