"""One user's copy of a marked causal language model, for where the server is not: an adapter of
that user's branches alone, for the base as it is.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file

from polyadapt.adapters.registry import mark_adapter_config
from polyadapt.errors import InvalidRequest
from polyadapt.models.load import model_digest
from polyadapt.watermark.branches import chosen
from polyadapt.watermark.mark_directory import MarkDirectory
from polyadapt.watermark.tensor_files import expect_empty, load_branches
from polyadapt_store.manifest import CONFIG_NAME, WEIGHTS_NAME

ADAPTER_DIR = "adapter"


def export_lm(
    mark: MarkDirectory, base_dir: Path, user: str, out: Path, *, form: str | None
) -> Literal["bundle"]:
    """Write `adapter` below `out` and return the form, the only one there is: a language model's
    branches are hinges, which are no matrix, and turned round they would have the weights carry
    more than half precision can take away again (bench.mark_lm_copy).

    The other value's branches are not in it. Whatever positions the server applies the branches to,
    a copy has them at all. Raises StartupError for another base than theirs, InvalidRequest for
    another form.
    """
    if form not in (None, "bundle"):
        raise InvalidRequest(
            f"a language model's mark has no form {form}: its hinges are not linear and cannot be "
            "folded into the weights; give the form bundle",
            param="form",
        )
    expect_empty(out)
    own = chosen(load_branches(mark, model_digest(base_dir)), mark.codebook.row(user))
    directory = out / ADAPTER_DIR
    directory.mkdir(parents=True)
    tensors = {f"{mark.module}.{name}": tensor.contiguous() for name, tensor in own.items()}
    save_file(tensors, directory / WEIGHTS_NAME)
    # Of encoding presence and with every bit 1, which is what it does where nobody says otherwise.
    config = asdict(mark.config)
    kept = ("format_version", "n_bits", "rank_per_bit", "gate", "task", "base_model_hash")
    written = {name: config[name] for name in kept}
    written |= {"encoding": "presence", "obfuscation": None, "target_modules": [mark.module]}
    text = json.dumps(mark_adapter_config(written), indent=2)
    (directory / CONFIG_NAME).write_text(f"{text}\n")
    return "bundle"
