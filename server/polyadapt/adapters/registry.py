"""The families that this server knows, and which one reads a given adapter. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyadapt.adapters.adapter import Family
from polyadapt.adapters.families.adalora import AdaLora
from polyadapt.adapters.families.arrow import Arrow
from polyadapt.adapters.families.b_lora import BLora
from polyadapt.adapters.families.beft import Beft
from polyadapt.adapters.families.block_lora import BlockLora
from polyadapt.adapters.families.boft import Boft
from polyadapt.adapters.families.c3a import C3a
from polyadapt.adapters.families.deft import Deft
from polyadapt.adapters.families.delora import Delora
from polyadapt.adapters.families.dv_lora import DvLora
from polyadapt.adapters.families.dylora import DyLora
from polyadapt.adapters.families.fourierft import FourierFt
from polyadapt.adapters.families.gralora import Gralora
from polyadapt.adapters.families.gs_lora import GsLora
from polyadapt.adapters.families.hira import Hira
from polyadapt.adapters.families.hra import Hra
from polyadapt.adapters.families.ia3 import Ia3
from polyadapt.adapters.families.ln_tuning import LnTuning
from polyadapt.adapters.families.loha import Loha
from polyadapt.adapters.families.lokr import Lokr
from polyadapt.adapters.families.lora import Lora
from polyadapt.adapters.families.loramoe import LoraMoe
from polyadapt.adapters.families.markboard import MarkBoard, adapter_config
from polyadapt.adapters.families.miss import Miss
from polyadapt.adapters.families.mixlora import MixLora
from polyadapt.adapters.families.mola import Mola
from polyadapt.adapters.families.oft import Oft
from polyadapt.adapters.families.pvera import Pvera
from polyadapt.adapters.families.randlora import Randlora
from polyadapt.adapters.families.road import Road
from polyadapt.adapters.families.shira import Shira
from polyadapt.adapters.families.smora import Smora
from polyadapt.adapters.families.sora import Sora
from polyadapt.adapters.families.trainable_tokens import TrainableTokens
from polyadapt.adapters.families.vblora import Vblora
from polyadapt.adapters.families.vera import Vera
from polyadapt.adapters.families.waveft import WaveFt
from polyadapt.adapters.families.xlora import XLora
from polyadapt.errors import AdapterRejected, Problem
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import CONFIG_NAME, CONFIG_SUFFIX, FileForm, is_read, list_names
from polyadapt_store.strict_json import (
    StrictJsonError,
    parse_object,
    shown,
    without_trailing_commas,
)

FAMILIES: tuple[Family, ...] = (
    Lora(),
    AdaLora(),
    Arrow(),
    BLora(),
    Beft(),
    BlockLora(),
    Boft(),
    C3a(),
    Deft(),
    Delora(),
    DvLora(),
    DyLora(),
    FourierFt(),
    Gralora(),
    GsLora(),
    Hira(),
    Hra(),
    Ia3(),
    LnTuning(),
    Loha(),
    Lokr(),
    LoraMoe(),
    MarkBoard(),
    Miss(),
    MixLora(),
    Mola(),
    Oft(),
    Pvera(),
    Randlora(),
    Road(),
    Shira(),
    Smora(),
    Sora(),
    TrainableTokens(),
    Vblora(),
    Vera(),
    WaveFt(),
    XLora(),
)

# Every set of files that some family reads.
FILES: tuple[FileForm, ...] = tuple(
    dict.fromkeys(form for family in FAMILIES for form in family.files)
)

# PEFT's other types: why each is refused. huggingface/peft:src/peft/utils/peft_types.py, 0.21.2.
UNSERVED: Mapping[str, str] = {
    "PROMPT_TUNING": "it puts virtual tokens of its own before the prompt instead of changing "
    "modules",
    "MULTITASK_PROMPT_TUNING": "it puts virtual tokens before the prompt, made for one task of "
    "several",
    "P_TUNING": "it puts virtual tokens of its own before the prompt, made by a network",
    "CPT": "it puts trained changes of an example's tokens before the prompt",
    "PREFIX_TUNING": "it brings keys and values of its own instead of changing modules",
    "CARTRIDGE": "it brings a cache of keys and values instead of changing modules",
    "ADAPTION_PROMPT": "it adds an attention over learned prompts to the upper layers",
    "SHADOW": "it runs a second network beside the layers and feeds its state into them",
    "POLY": "it mixes skills by a task id that no request carries",
    "LILY": "its router averages over all tokens of a batch, so a result depends on who else is in "
    "it",
    "ADAMSS": "it clusters rows of the base anew when it loads, and stores no cluster",
    "FROD": "it replaces W by a product in a basis that many modules share, recomputed from all of "
    "them",
    "OSF": "it replaces most singular components of W, which is no smaller than another base model",
    "SUPERTUNING": "its elements of W may be chosen by the size of the base's at load; not served "
    "yet",
    "GLORA": "it multiplies and adds to W and its bias, each module in its own way; not served yet",
    "PEANUT": "a small network over the columns of W makes its factors; not served yet",
    "PSOFT": "its factors come from a decomposition of W, whose signs depend on the solver",
    "TINYLORA": "its factors come from a decomposition of W and from projections of a seed; not "
    "served yet",
    "UNILORA": "its factors are picked from one shared vector by places that a seed makes; not "
    "served yet",
}


def mark_adapter_config(bundle_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the adapter that serves a mark's bundle."""
    return adapter_config(bundle_config)


def open_adapter(
    directory: Path, limits: StoreLimits | None = None
) -> tuple[Family, dict[str, Any]]:
    """Return the family of the adapter in `directory` and its config: see Family.claims.

    Raises AdapterRejected with what is wrong, OSError for a file that cannot be read.
    """
    config = read_configs(directory, limits)
    family = family_of(config)
    files = (name for name in list_names(directory) if is_read(name, FILES))
    foreign = {name for name in files if not is_read(name, family.files)}
    return family, {key: value for key, value in config.items() if key not in foreign}


def read_configs(directory: Path, limits: StoreLimits | None = None) -> dict[str, Any]:
    """Return what the adapter_config.json of the directory says and, under its path, each further
    JSON file that some family reads; raises like open_adapter, with the problems of all files.
    """
    config: dict[str, Any] = {}
    files: dict[str, Any] = {}
    problems: list[Problem] = []
    for name in sorted(list_names(directory)):
        if not name.endswith(CONFIG_SUFFIX) or not is_read(name, FILES):
            continue
        try:
            if name == CONFIG_NAME:
                config = read_config(directory / name, limits)
            else:
                text = _read_text(directory / name, name, limits)
                files[name] = _parse(without_trailing_commas(text), name, limits)
        except AdapterRejected as error:
            problems += error.problems
    for key in sorted(files.keys() & config.keys()):
        message = f"{CONFIG_NAME} holds the key {shown(key)}, which is the path of another file"
        problems.append(Problem("duplicate_key", message, CONFIG_NAME))
    if problems:
        raise AdapterRejected(problems)
    return config | files


def read_config(path: Path, limits: StoreLimits | None = None) -> dict[str, Any]:
    """Return the adapter_config.json at `path`; raises AdapterRejected if it is no config
    we read.
    """
    return _parse(_read_text(path, path.name, limits), path.name, limits)


def family_of(config: Mapping[str, Any], families: Sequence[Family] = FAMILIES) -> Family:
    """Return the one family that claims the config; raises AdapterRejected if none or
    several do.
    """
    claiming = [family for family in families if family.claims(config)]
    if len(claiming) == 1:
        return claiming[0]
    if claiming:
        names = ", ".join(sorted(family.name for family in claiming))
        raise AdapterRejected(
            [Problem("ambiguous_family", f"several families claim this adapter: {names}")]
        )
    kind = config.get("peft_type")
    given = (
        "adapter_config.json has no peft_type" if kind is None else f"peft_type is {shown(kind)}"
    )
    known = ", ".join(sorted(family.name for family in families))
    reason = UNSERVED.get(kind) if isinstance(kind, str) else None
    reason = "which no family of this server reads" if reason is None else f"not served: {reason}"
    raise AdapterRejected(
        [
            Problem(
                "unsupported_family",
                f"{given}, {reason}; families that are served: {known}",
                "peft_type",
            )
        ]
    )


def _read_text(path: Path, name: str, limits: StoreLimits | None) -> bytes:
    max_bytes = (limits or StoreLimits()).config_bytes
    with path.open("rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        message = f"{name} is larger than {max_bytes} bytes"
        raise AdapterRejected([Problem("config_too_large", message, name)])
    return text


def _parse(text: bytes, name: str, limits: StoreLimits | None) -> dict[str, Any]:
    try:
        return parse_object(text, where=name, max_depth=(limits or StoreLimits()).json_depth)
    except StrictJsonError as error:
        raise AdapterRejected([error.problem]) from None
