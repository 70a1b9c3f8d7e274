"""X-LoRA's scalings by domain.

The domains are dialects: each symbol is followed by three others of the domain's own. A base
learns twelve dialects a little; four of them have a LoRA each (rank 4, scale 2, all linears),
trained on nothing else. X-LoRA's classifier (one linear layer, a scaling per module) is then
trained on all four at once, with base and experts frozen.

Measured on held-out texts: the mean scaling of each expert in each domain, over modules and over
positions from the eighth on; the loss beside that of the base, of each expert alone, of all experts
at 1 / 4 (a uniform merge), and of each domain's own expert; and texts that change the domain half
way.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench.experiments import report, tiny_lm, training
from bench.experiments.data import Batch, Dialects, generator
from bench.experiments.methods import lora, xlora
from bench.experiments.methods.xlora import XLora
from bench.experiments.report import Claim, Outcome
from bench.experiments.served import Adapters, Comparison, Served, compare, parity
from transformers import LlamaForCausalLM

from bench import plots

NAME = "scalings"
_SEED = 0  # of the dialects and the base


@dataclass(frozen=True, slots=True)
class Settings:
    """One run."""

    seeds: tuple[int, ...] = (1, 2, 3)
    num_base_domains: int = 8  # of which there is no expert; the base learns all
    num_domains: int = 4
    num_symbols: int = 24
    length: int = 47
    rank: int = 4
    scale: float = 2.0
    base_steps: int = 600
    expert_steps: int = 200
    classifier_steps: int = 400
    rows: int = 32
    test_rows: int = 256
    first: int = 8  # the position from which on scalings count
    lr: float = 3e-3
    classifier_lr: float = 2e-2


FULL = Settings()
QUICK = Settings(
    seeds=(0,), length=12, base_steps=20, expert_steps=5, classifier_steps=5, test_rows=8, first=2
)


@dataclass(frozen=True, slots=True)
class Found:
    """One seed's figures; losses in nats."""

    shares: list[list[float]]  # [domain][expert]
    over_positions: list[float]  # the own expert's scaling at each position
    switched: tuple[float, float]  # the second domain's expert, before and behind the switch
    losses: dict[str, float]
    switched_losses: dict[str, float]


def run(settings: Settings, scratch: Path) -> Outcome:
    """Train base, experts and classifier; score them."""
    total = settings.num_base_domains + settings.num_domains
    dialects = Dialects.make(total, settings.num_symbols, _SEED)
    dialects = Dialects(dialects.transitions, settings.length)
    base = _train_base(dialects, settings)
    found = []
    served: dict[str, Comparison] = {}
    shown: list[list[float]] = []
    routing_difference = 0.0
    for seed in settings.seeds:
        experts = [_train_expert(base, dialects, d, settings, seed) for d in _domains(settings)]
        model = _train_classifier(base, [own for _, own in experts], dialects, settings, seed)
        found.append(_measure(base, [m for m, _ in experts], model, dialects, settings))
        if seed == settings.seeds[0]:
            served, shown, routing_difference = _serve(
                base, experts, model, dialects, settings, scratch
            )
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    num = settings.num_domains
    shares = [[_mean([f.shares[d][e] for f in found]) for e in range(num)] for d in range(num)]
    return Outcome(
        title="X-LoRA's scalings by domain",
        claims=[
            *_claims(found, shares, settings),
            Claim(
                "the engine, asked as `inspect --routing` asks it, weighs as the training code "
                "does: mean scalings by domain equal to 1e-3, first seed",
                f"{routing_difference:.1e}",
                routing_difference <= 1e-3,
            ),
            parity(served),
        ],
        tables=[_shares_table(shown), _table(found)],
        charts={
            f"{NAME}.svg": plots.heat_map(
                "Mean scaling of each expert in each domain",
                "expert",
                "",
                [str(e) for e in range(num)],
                {f"domain {d}": row for d, row in enumerate(shares)},
            ),
            f"{NAME}-positions.svg": plots.line_chart(
                "Scaling of the domain's own expert over the text",
                "tokens read (logarithmic)",
                "scaling",
                {
                    f"seed {seed}": list(enumerate(f.over_positions, 1))
                    for seed, f in zip(settings.seeds, found, strict=True)
                },
            ),
        },
        settings=settings,
        figures={
            "shares": shares,
            "shares, as served": shown,
            "shares, largest difference": routing_difference,
            "served": {name: asdict(own) for name, own in served.items()},
            "seeds": [
                {
                    "shares": f.shares,
                    "losses": f.losses,
                    "losses of texts that switch": f.switched_losses,
                    "second expert before and behind the switch": f.switched,
                    "over positions": f.over_positions,
                }
                for f in found
            ],
        },
    )


def _domains(settings: Settings) -> range:
    """The experts' domains, behind the base's."""
    return range(settings.num_base_domains, settings.num_base_domains + settings.num_domains)


def _train_base(dialects: Dialects, settings: Settings) -> LlamaForCausalLM:
    size = tiny_lm.Size(dialects.vocab_size)
    model = tiny_lm.new_model(size, _SEED).train()

    def loss_of(step: int) -> torch.Tensor:
        draws = generator(_SEED, 1, step)
        batch = dialects.draw(settings.rows, range(len(dialects.transitions)), draws)
        return training.answer_loss(model(input_ids=batch.ids, use_cache=False).logits, batch)

    training.fit(model.parameters(), loss_of, num_steps=settings.base_steps, lr=settings.lr)
    return tiny_lm.frozen_copy(model)


def _train_expert(
    base: LlamaForCausalLM, dialects: Dialects, domain: int, settings: Settings, seed: int
) -> tuple[LlamaForCausalLM, dict[str, lora.LowRank]]:
    model = tiny_lm.frozen_copy(base)
    modules = lora.add_lora(
        model, tiny_lm.LINEARS, settings.rank, settings.scale * settings.rank,
        generator(seed, 3, domain),
    )  # fmt: skip

    def loss_of(step: int) -> torch.Tensor:
        batch = dialects.draw(settings.rows, [domain], generator(seed, 4, domain, step))
        return training.answer_loss(model(input_ids=batch.ids, use_cache=False).logits, batch)

    parameters = [p for module in modules.values() for p in (module.A, module.B)]
    training.fit(parameters, loss_of, num_steps=settings.expert_steps, lr=settings.lr)
    return model, modules


def _train_classifier(
    base: LlamaForCausalLM,
    experts: list[dict[str, lora.LowRank]],
    dialects: Dialects,
    settings: Settings,
    seed: int,
) -> XLora:
    model = XLora(tiny_lm.frozen_copy(base), experts, generator(seed, 6))

    def loss_of(step: int) -> torch.Tensor:
        batch = dialects.draw(settings.rows, _domains(settings), generator(seed, 7, step))
        return training.answer_loss(model(input_ids=batch.ids).logits, batch)

    training.fit(
        [model.weight, model.bias],
        loss_of,
        num_steps=settings.classifier_steps,
        lr=settings.classifier_lr,
    )
    return model


@torch.no_grad()
def _measure(
    base: LlamaForCausalLM,
    experts: list[LlamaForCausalLM],
    model: XLora,
    dialects: Dialects,
    settings: Settings,
) -> Found:
    domains = _domains(settings)
    plain = dialects.draw(settings.test_rows, domains, generator(_SEED, 2))
    first = settings.num_base_domains

    def following(domain: int) -> int:
        return first + (domain - first + 1) % settings.num_domains

    switching = dialects.draw(settings.test_rows, domains, generator(_SEED, 8), then=following)
    own = plain.kinds - first
    weights = model.weigh(plain.ids).mean(2)  # [rows, length, experts], mean of the modules
    shares = [
        weights[plain.kinds == domain][:, settings.first :].mean((0, 1)).tolist()
        for domain in domains
    ]
    of_own = weights.gather(2, own[:, None, None].expand(-1, weights.shape[1], 1))[..., 0]
    later = (switching.kinds - first + 1) % settings.num_domains
    turned = model.weigh(switching.ids).mean(2)
    turned = turned.gather(2, later[:, None, None].expand(-1, turned.shape[1], 1))[..., 0]
    half = settings.length // 2
    # From the middle of the second half on, so that the change has been seen.
    switched = (
        float(turned[:, half // 2 : half].mean()),
        float(turned[:, half + half // 2 :].mean()),
    )
    return Found(
        shares,
        of_own[:, 1:].mean(0).tolist(),
        switched,
        _losses(base, experts, model, plain, first, settings),
        _losses(base, experts, model, switching, first, settings),
    )


def _serve(
    base: LlamaForCausalLM,
    experts: list[tuple[LlamaForCausalLM, dict[str, lora.LowRank]]],
    model: XLora,
    dialects: Dialects,
    settings: Settings,
    scratch: Path,
) -> tuple[dict[str, Comparison], list[list[float]], float]:
    """The base, the first expert alone and X-LoRA in one mixed batch; and the engine's own mean
    scalings [domain][expert], over all modules and tokens, with their largest difference from the
    training code's.
    """
    num_rows = min(48, settings.test_rows)
    batch = dialects.draw(num_rows, _domains(settings), generator(_SEED, 9))
    alone, modules = experts[0]
    with Served(tiny_lm.save(base, scratch / "base"), scratch) as served:
        lone = served.add(lora.write(scratch / "expert", modules))
        mixed = served.add(xlora.write(scratch / "xlora", model, [own for _, own in experts]))
        arms: dict[str, tuple[Adapters, torch.Tensor]] = {
            "base": ((), training.log_probabilities(base, batch)),
            "first expert": ((lone,), training.log_probabilities(alone, batch)),
            "x-lora": ((mixed,), training.log_probabilities(model, batch)),
        }
        found = compare(served, batch, arms)
        shown, difference = [], 0.0
        for domain in _domains(settings):
            rows = batch.of_kind(domain)
            own = Batch(batch.ids[rows], batch.is_answer[rows], batch.kinds[rows])
            weights = served.routing(own, (mixed,))
            assert weights.keys() == set(model.paths), "every module has its scalings"
            mean = torch.stack([of.mean(0) for of in weights.values()]).mean(0)
            wanted = model.weigh(own.ids).detach().mean((0, 1, 2))
            difference = max(difference, float((mean - wanted).abs().max()))
            shown.append(mean.tolist())
    return found, shown, difference


def _losses(
    base: LlamaForCausalLM,
    experts: list[LlamaForCausalLM],
    model: XLora,
    batch: Batch,
    first: int,
    settings: Settings,
) -> dict[str, float]:
    """Of the base, of X-LoRA, of a uniform merge, of the best and the own expert alone."""
    tables = [training.log_probabilities(expert, batch) for expert in experts]
    own = torch.stack([tables[k][row] for row, k in enumerate((batch.kinds - first).tolist())])
    num = settings.num_domains
    even = torch.full((*batch.ids.shape, len(model.paths), num), 1 / num)

    def uniform(input_ids: torch.Tensor, use_cache: bool) -> object:
        return model(input_ids=input_ids, use_cache=use_cache, scalings=even)

    return {
        "base": training.score(training.log_probabilities(base, batch), batch).loss,
        "best expert alone": min(training.score(table, batch).loss for table in tables),
        "uniform merge": training.score(training.log_probabilities(uniform, batch), batch).loss,
        "x-lora": training.score(training.log_probabilities(model, batch), batch).loss,
        "each row's own expert": training.score(own, batch).loss,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _claims(found: list[Found], shares: list[list[float]], settings: Settings) -> list[Claim]:
    num = settings.num_domains
    right = [sum(row.index(max(row)) == d for d, row in enumerate(f.shares)) for f in found]
    diagonal = _mean([shares[d][d] for d in range(num)])
    losses = _mean_losses([f.losses for f in found])
    turned = _mean_losses([f.switched_losses for f in found])
    before, behind = (_mean([f.switched[i] for f in found]) for i in (0, 1))
    rivals = ("best expert alone", "uniform merge")
    return [
        Claim(
            "in every domain the expert of that domain has the largest scaling, for every seed",
            ", ".join(f"{count} of {num}" for count in right),
            all(count == num for count in right),
        ),
        Claim(
            f"and its mean scaling is at least twice the even {1 / num:.2f}",
            f"{diagonal:.3f}",
            diagonal >= 2 / num,
        ),
        Claim(
            "on all domains together X-LoRA's loss is lower than that of any one expert and of the "
            "uniform merge",
            ", ".join(f"{name} {losses[name]:.3f}" for name in ("x-lora", *rivals)),
            all(losses["x-lora"] < losses[name] for name in rivals),
        ),
        Claim(
            "when a text changes its domain the scaling follows: the second domain's expert more "
            "than doubles",
            f"{before:.3f} before, {behind:.3f} behind",
            behind > 2 * before,
        ),
        Claim(
            "on such texts it is better than the first domain's own expert",
            f"{turned['x-lora']:.3f} and {turned[_OWN]:.3f}",
            turned["x-lora"] < turned[_OWN],
        ),
    ]


_OWN = "each row's own expert"


def _mean_losses(losses: list[dict[str, float]]) -> dict[str, float]:
    return {name: _mean([own[name] for own in losses]) for name in losses[0]}


def _shares_table(shown: list[list[float]]) -> str:
    """Of the first seed, as the engine weighed."""
    names = [f"expert {e}" for e in range(len(shown))]
    rows = [[f"domain {d}", *row] for d, row in enumerate(shown)]
    return report.table(["mean scaling, served", *names], rows)


def _table(found: list[Found]) -> str:
    plain = _mean_losses([f.losses for f in found])
    switched = _mean_losses([f.switched_losses for f in found])
    rows = [[name, plain[name], switched[name]] for name in plain]
    return report.table(["loss, nats", "one domain", "changing half way"], rows)


if __name__ == "__main__":
    report.main(sys.modules[__name__])
