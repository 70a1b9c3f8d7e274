"""PVeRA as PEFT writes it: VeRA whose A and d have twice the rows, for means and for variances.

What is served is the mean, as in PEFT unless it samples.

Format and rules: huggingface/peft:src/peft/tuners/pvera/{config,model,layer}.py, version 0.21.2.
Paper: arXiv 2512.07703.
"""

from __future__ import annotations

from typing import ClassVar

from polyadapt.adapters.families.vera import Vera
from polyadapt.adapters.peft_family import TensorForm


class Pvera(Vera):
    """The family `pvera`."""

    name = "pvera"
    peft_types = frozenset({"PVERA"})
    summary = "low rank: as VeRA, with the half of A that holds the means"
    forms: ClassVar = {
        "b": TensorForm("pvera_lambda_b", ("out",)),
        "d": TensorForm("pvera_lambda_d", ("rank",)),
    }
    shared_forms: ClassVar = {
        "A": TensorForm("pvera_A", ("rank", "largest in")),
        "B": TensorForm("pvera_B", ("largest out", "rank")),
    }
    training_keys = frozenset({"pvera_dropout", "d_initial", "init_weights", "generator_seed"})
    refused_keys: ClassVar = {
        "sample_at_inference": "it draws at random for every token; set it to false for the mean"
    }
    halves: ClassVar = 2
