"""One mark on disk: what may be read, the branches, and the sealed secrets. Knows no training.

config.json           what the mark is; nothing secret
branches.safetensors  per module "<module>.mark_A", ".mark_tau", ".mark_B"; see Branches
triggers.enc          sealed: the key that codes, triggers, targets and signatures come from, the
                      targets (of a language model: its phrases and answers as well), and what
                      unmarked models answer
*.queries.enc         sealed: which bit each query of a written file asks for
checkpoint.safetensors  while a training is under way
rows.safetensors        of a language model: what its preflight and training run the base on, not
                        sealed, until the training ends
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyadapt.errors import InvalidRequest, SecretsUnavailable, StartupError
from polyadapt.watermark.codebook import Codebook, Design
from polyadapt.watermark.evidence import Signer
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.prompts import PromptTriggers
from polyadapt.watermark.reading import NullRates
from polyadapt.watermark.secrets import Kek, kek_id_of, rewrap, seal, unseal, write_file
from polyadapt.watermark.triggers import TriggerFamilies, TriggerSettings
from polyadapt_store.strict_json import StrictJsonError, parse_object

CONFIG_NAME = "config.json"
BRANCHES_NAME = "branches.safetensors"
SECRETS_NAME = "triggers.enc"
BUNDLE_FILES = (CONFIG_NAME, BRANCHES_NAME, SECRETS_NAME)  # what a server takes
CHECKPOINT_NAME = "checkpoint.safetensors"
ROWS_NAME = "rows.safetensors"
FORMAT_VERSION = 1
QUERIES_SUFFIX = ".queries.enc"
SECRETS_PURPOSE = "mark"  # what SECRETS_NAME is sealed for
_QUERIES = "queries"
_MAX_BYTES = 16 << 20
# What a mark may be of, and where its branches act: a classifier has one row, a language model's
# branches act on the row of the answer's first token.
POSITIONS = {"cls": "all", "lm": "first_answer"}


@dataclass(frozen=True, slots=True)
class MarkConfig:
    """What config.json says. The base's hash and the modules are known once it is trained."""

    mark_id: str
    n_bits: int
    codebook: Mapping[str, Any]  # kind, length, key_version, bias_commitment
    evidence_public_key: str
    task: str = "cls"
    positions: str = "all"
    encoding: str = "pair"
    gate: str = "hinge"
    rank_per_bit: int = 1
    obfuscation: None = None
    base_model_hash: str | None = None
    target_modules: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class MarkSecrets:
    """What is sealed. `triggers` (of a classifier) or `prompts` (of a language model) and `targets`
    are known once it is trained, `null` once it is calibrated.
    """

    key: SecretKey
    triggers: TriggerSettings | None = None
    prompts: PromptTriggers | None = None
    targets: tuple[tuple[int, int], ...] | None = field(default=None, repr=False)
    null: NullRates | None = field(default=None, repr=False)


class MarkDirectory:
    """Owns the files of one mark; the KEK is kept to write the secrets again."""

    def __init__(self, path: Path, config: MarkConfig, secrets: MarkSecrets, kek: Kek) -> None:
        self.path, self.config, self.secrets = path, config, secrets
        self._kek = kek

    @classmethod
    def create(
        cls, path: Path, design: Design, num_bits: int, kek: Kek, *, task: str = "cls"
    ) -> MarkDirectory:
        """Make a mark with a new key; raises StartupError if there is one, InvalidRequest."""
        if task not in POSITIONS:
            raise InvalidRequest(
                f"the task is {task!r}, expected {' or '.join(POSITIONS)}: a classifier or a "
                "causal language model",
                param="task",
            )
        if (path / CONFIG_NAME).exists() or (path / SECRETS_NAME).exists():
            raise StartupError(f"{path} holds a mark already; name another directory")
        key = SecretKey.generate()
        codebook = Codebook(key, design, num_bits)
        config = MarkConfig(
            mark_id=key.id,
            n_bits=num_bits,
            codebook={
                "kind": str(design),
                "length": num_bits,
                "key_version": codebook.key_version,
                "bias_commitment": codebook.commitment,
            },
            evidence_public_key=Signer(key).public_key,
            task=task,
            positions=POSITIONS[task],
        )
        mark = cls(path, config, MarkSecrets(key), kek)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(f"{path} cannot be made: {error.strerror}") from None
        mark.save(config, mark.secrets)
        return mark

    @classmethod
    def open(cls, path: Path, kek: Kek) -> MarkDirectory:
        """Read a mark; raises StartupError, SecretsUnavailable, and InvalidRequest where the sealed
        key is not the one that the config was written for.
        """
        return cls.of(path, _read(path / CONFIG_NAME), _read(path / SECRETS_NAME), kek)

    @classmethod
    def of(cls, path: Path, config_text: bytes, sealed: bytes, kek: Kek) -> MarkDirectory:
        """Return the mark of two files' contents; `path` names it in errors. Raises like `open`."""
        config = parse_config(config_text, path / CONFIG_NAME)
        secrets = _secrets_of(unseal(sealed, kek, SECRETS_PURPOSE))
        mark = cls(path, config, secrets, kek)
        if secrets.key.id != config.mark_id:
            raise StartupError(
                f"{path / SECRETS_NAME} is of mark {secrets.key.id}, {CONFIG_NAME} of mark "
                f"{config.mark_id}; restore the files of one mark"
            )
        mark.codebook.check(config.codebook["bias_commitment"])
        return mark

    def save(self, config: MarkConfig, secrets: MarkSecrets) -> None:
        """Write both; each file is replaced at once, the secrets first."""
        data = _secrets_to_bytes(secrets)
        write_file(self.path / SECRETS_NAME, seal(data, self._kek, SECRETS_PURPOSE))
        text = json.dumps(asdict(config), indent=2, sort_keys=True) + "\n"
        write_file(self.path / CONFIG_NAME, text.encode())
        self.config, self.secrets = config, secrets

    def rewrap(self, new: SecretKey) -> None:
        """Put every secret under another KEK; interrupted, it is to be run again with the same two.

        The mark's own comes last, as it is what `open` needs the old KEK for.
        """
        own = self.path / SECRETS_NAME
        others = sorted(self.path.glob(f"*{QUERIES_SUFFIX}"))
        for file, purpose in [*((file, _QUERIES) for file in others), (own, SECRETS_PURPOSE)]:
            sealed = _read(file)
            if kek_id_of(sealed, purpose) != new.id:
                write_file(file, rewrap(sealed, self._kek, new, purpose))
        self._kek = new

    def keep_queries(self, name: str, bits: NDArray[np.intp]) -> None:
        """Seal which bit each query of a file asks for, under the file's name here."""
        payload = json.dumps(bits.tolist()).encode()
        write_file(self.path / f"{name}{QUERIES_SUFFIX}", seal(payload, self._kek, _QUERIES))

    def find_queries(self, name: str) -> NDArray[np.intp]:
        """Return what `keep_queries` sealed; raises StartupError where this mark asked no such."""
        file = self.path / f"{name}{QUERIES_SUFFIX}"
        if not file.is_file():
            raise StartupError(
                "the file of queries is not one that this mark wrote, or it was changed; give "
                "the one that `polyadapt mark queries` made"
            )
        return np.array(json.loads(unseal(_read(file), self._kek, _QUERIES)), dtype=np.intp)

    def trained(
        self,
        base_model_hash: str,
        module: str,
        triggers: TriggerSettings | PromptTriggers,
        targets: NDArray[np.int64],
        gate: str = "hinge",
    ) -> None:
        """Note what was trained; an earlier calibration does not hold any more. `targets` [bits, 2]
        are labels, of a language model token ids.
        """
        is_lm = isinstance(triggers, PromptTriggers)
        self.require("lm" if is_lm else "cls")
        pairs = tuple((int(zero), int(one)) for zero, one in targets)
        self.save(
            replace(
                self.config,
                base_model_hash=base_model_hash,
                target_modules=(module,),
                gate=gate,
            ),
            MarkSecrets(
                self.secrets.key,
                triggers if isinstance(triggers, TriggerSettings) else None,
                triggers if isinstance(triggers, PromptTriggers) else None,
                pairs,
            ),
        )

    def require(self, task: str) -> None:
        """Raise StartupError unless the mark is one of this task."""
        if self.config.task != task:
            raise StartupError(
                f"{self.path} is a mark of task {self.config.task!r}, and this is for {task!r}; "
                "make another with `polyadapt mark keygen --task`"
            )

    def calibrated(self, null: NullRates) -> None:
        """Note what unmarked models answer."""
        self.save(self.config, replace(self.secrets, null=null))

    @property
    def codebook(self) -> Codebook:
        """The code of this mark."""
        named = self.config.codebook
        return Codebook(
            self.secrets.key,
            Design.parse(named["kind"]),
            self.config.n_bits,
            key_version=named["key_version"],
        )

    @property
    def module(self) -> str:
        """The marked module; raises StartupError before training."""
        if not self.config.target_modules:
            raise self._not_yet("trained", "train")
        return self.config.target_modules[0]

    @property
    def families(self) -> TriggerFamilies:
        """The triggers of a classifier's mark; raises StartupError before training."""
        self.require("cls")
        if self.secrets.triggers is None:
            raise self._not_yet("trained", "train")
        return TriggerFamilies(self.secrets.key, self.config.n_bits, self.secrets.triggers)

    @property
    def prompts(self) -> PromptTriggers:
        """The triggers of a language model's mark; raises StartupError before training."""
        self.require("lm")
        if self.secrets.prompts is None:
            raise self._not_yet("trained", "train")
        return self.secrets.prompts

    @property
    def targets(self) -> NDArray[np.int64]:
        """The labels or token ids that 0 and 1 ask for: [bits, 2]; raises StartupError before
        training.
        """
        if self.secrets.targets is None:
            raise self._not_yet("trained", "train")
        return np.array(self.secrets.targets, dtype=np.int64)

    @property
    def null(self) -> NullRates:
        """What unmarked models answer; raises StartupError before calibration."""
        if self.secrets.null is None:
            raise self._not_yet("calibrated", "calibrate")
        return self.secrets.null

    def _not_yet(self, state: str, command: str) -> StartupError:
        return StartupError(f"{self.path} is not {state}; run `polyadapt mark {command}` first")


def read_config(path: Path) -> MarkConfig:
    """Return what config.json of the directory says; raises StartupError."""
    return parse_config(_read(path / CONFIG_NAME), path / CONFIG_NAME)


def parse_config(text: bytes, file: Path) -> MarkConfig:
    """Return what a config says; `file` names it in errors. Raises StartupError."""
    try:
        fields = parse_object(text, where=str(file), max_depth=4)
    except StrictJsonError as error:
        raise StartupError(str(error)) from None
    known = set(MarkConfig.__dataclass_fields__)
    # Marks of classifiers that were made before there were others do not name their positions.
    fields = {"positions": POSITIONS["cls"], **fields}
    if set(fields) != known:
        differing = sorted(set(fields) ^ known)
        raise StartupError(f"{file} lacks or does not know {', '.join(differing)}")
    _expect_types(fields, file)
    if fields["task"] not in POSITIONS:
        raise StartupError(
            f"{file} says task {fields['task']!r}, expected {' or '.join(map(repr, POSITIONS))}"
        )
    for name, expected in (
        ("format_version", FORMAT_VERSION),
        ("positions", POSITIONS[fields["task"]]),
        ("encoding", "pair"),
        ("rank_per_bit", 1),
        ("obfuscation", None),
    ):
        if fields[name] != expected:
            raise StartupError(f"{file} says {name} {fields[name]!r}, expected {expected!r}")
    if fields["gate"] not in ("hinge", "linear"):
        raise StartupError(f"{file} says gate {fields['gate']!r}, expected hinge or linear")
    codebook = fields["codebook"]
    if codebook["length"] != fields["n_bits"]:
        raise StartupError(f"{file} has no codebook of {fields['n_bits']} bits")
    return MarkConfig(**{**fields, "target_modules": tuple(fields["target_modules"])})


def _expect_types(fields: Mapping[str, Any], file: Path) -> None:
    """Raise StartupError unless every field is of its JSON type; a bundle comes from anywhere."""
    codebook, modules = fields["codebook"], fields["target_modules"]
    if not isinstance(codebook, dict) or not set(_CODEBOOK_TYPES) <= set(codebook):
        raise StartupError(f"{file} has no codebook with {', '.join(_CODEBOOK_TYPES)}")
    if not isinstance(modules, list) or not all(type(module) is str for module in modules):
        raise StartupError(f"{file} says target_modules {modules!r}, expected a list of names")
    for named, types in ((fields, _TYPES), (codebook, _CODEBOOK_TYPES)):
        for name, expected in types.items():
            if type(named[name]) is not expected:  # isinstance would take true for 1
                raise StartupError(
                    f"{file} says {name} {named[name]!r}, expected "
                    f"{'a whole number' if expected is int else 'text'}"
                )


_TYPES = {
    "mark_id": str,
    "n_bits": int,
    "evidence_public_key": str,
    "task": str,
    "gate": str,
    "rank_per_bit": int,
    "format_version": int,
}
_CODEBOOK_TYPES = {"kind": str, "length": int, "key_version": int, "bias_commitment": str}


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise StartupError(f"{file} has more than {_MAX_BYTES} bytes; it is no file of a mark")
        return file.read_bytes()
    except OSError as error:
        raise StartupError(f"{file} cannot be read: {error.strerror}") from None


def _secrets_to_bytes(secrets: MarkSecrets) -> bytes:
    fields = {
        "key": secrets.key.to_text(),
        "triggers": None if secrets.triggers is None else secrets.triggers.to_data(),
        "prompts": None if secrets.prompts is None else asdict(secrets.prompts),
        "targets": secrets.targets,
        "null": None if secrets.null is None else asdict(secrets.null),
    }
    return json.dumps(fields).encode()


def _secrets_of(payload: bytes) -> MarkSecrets:
    try:
        fields = json.loads(payload)
        null, prompts = fields["null"], fields.get("prompts")
        return MarkSecrets(
            SecretKey.from_text(fields["key"]),
            None if fields["triggers"] is None else TriggerSettings(**fields["triggers"]),
            None
            if prompts is None
            else PromptTriggers(
                tuple(prompts["phrases"]), tuple((a, b) for a, b in prompts["answers"])
            ),
            None if fields["targets"] is None else tuple((a, b) for a, b in fields["targets"]),
            None
            if null is None
            else NullRates(**{**null, "rates": tuple((a, b) for a, b in null["rates"])}),
        )
    except (ValueError, TypeError, KeyError):
        # What is wrong stays unsaid: the message must not show what was sealed.
        raise SecretsUnavailable(
            "the sealed mark opens and is not of this release's form; it was written by another"
        ) from None
