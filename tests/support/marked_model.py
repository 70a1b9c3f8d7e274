"""The default model serving users under the committed mark of bench.mark_lm_beside, each beside a
demo adapter of its choice, over HTTP; and its owner, who asks as a stranger would.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tests.support.servers import RunningServer, running_server
from typer.testing import CliRunner

from polyadapt.cli import app
from polyadapt.models.load import model_digest
from polyadapt.watermark.codebook import Design
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.mark_directory import BRANCHES_NAME, BUNDLE_FILES, MarkDirectory
from polyadapt.watermark.prompts import PromptTriggers
from polyadapt.watermark.reading import bound_null_rates
from polyadapt.watermark.secrets import write_kek

FILE = Path(__file__).parents[1] / "demo" / "data" / "mark-beside.safetensors"
MODULE = "model.layers.29.self_attn.o_proj"  # the last layer's, as the bench has it
OPERATOR = "sk-operator-" + "m" * 24
# Of so many prompts a bit the bench found no answer of the mark in the base.
NUM_UNANSWERED = 104


def committed_mark() -> tuple[dict[str, np.ndarray], PromptTriggers]:
    """Return the branches as Branches.pair_tensors has them, and the triggers, of the first mark
    that bench.mark_lm_beside made.
    """
    with safe_open(FILE, "np") as file:
        said = json.loads(file.metadata()["triggers"])
        branches = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    answers = tuple((zero, one) for zero, one in said["answers"])
    return branches, PromptTriggers(tuple(said["phrases"]), answers)


def write_mark(directory: Path, model: Path, kek: SecretKey) -> MarkDirectory:
    """Make the directory that `polyadapt mark train` and `calibrate` would have left, with a new
    key and so with other signatures each time.
    """
    branches, triggers = committed_mark()
    num_bits = triggers.num_bits
    mark = MarkDirectory.create(directory, Design.parse("random"), num_bits, kek, task="lm")
    named = {f"{MODULE}.{name}": tensor for name, tensor in branches.items()}
    save_file(named, directory / BRANCHES_NAME)
    # Reading goes by the words; which tokens they begin with matters to training alone.
    targets = np.arange(2 * num_bits).reshape(num_bits, 2)
    mark.trained(model_digest(model), MODULE, triggers, targets)
    none = np.zeros((num_bits, 2), np.int64)
    mark.calibrated(bound_null_rates([none], NUM_UNANSWERED, 0.99))
    return mark


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `polyadapt mark who --endpoint` ended with."""

    status: int
    output: str
    bits: list[int | None]
    num_queries: int
    named: list[str]  # ids of keys


@dataclass
class MarkedModel:
    """The server, its mark, and its users' keys by name."""

    server: RunningServer
    mark: MarkDirectory
    kek_file: Path
    secrets: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)

    def call(self, method: str, path: str, **options: Any) -> Any:
        """Ask as the operator; returns the reply's JSON, raises httpx.HTTPStatusError."""
        headers = {"authorization": f"Bearer {OPERATOR}"}
        reply = httpx.request(
            method, f"{self.server.url}{path}", headers=headers, timeout=300, **options
        )
        return reply.raise_for_status().json()

    def add_user(self, name: str) -> list[int]:
        """Make a key and issue its signature; returns the bits."""
        key = self.call("POST", "/v1/keys", json={"scopes": ["infer"]})
        self.secrets[name], self.ids[name] = key["secret"], key["id"]
        issued = self.call("PUT", f"/v1/watermarks/mark/users/{key['id']}")
        return [int(bit) for bit in issued["signature"]]

    def require(self) -> None:
        """Have every request of the tenant served through its user's branches."""
        policy = {"tenant": "default", "required": True}
        self.call("PUT", "/v1/watermarks/mark/policy", json=policy)

    def who(self, model: str, user: str, others: Sequence[str], folder: Path) -> Verdict:
        """Ask the server's `model` with the user's key whose copy it is, among all users and
        `others`.
        """
        users, record = folder / "users", folder / "evidence.json"
        users.write_text("\n".join([*self.ids.values(), *others]))
        arguments = (
            "who", self.mark.path, "--endpoint", f"{self.server.url}/v1", "--model", model,
            "--users", users, "--out", record, "--kek-file", self.kek_file,
        )  # fmt: skip
        done = CliRunner().invoke(
            app, ["mark", *map(str, arguments)], env={"OPENAI_API_KEY": self.secrets[user]}
        )
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        found = json.loads(record.read_text())["record"]
        return Verdict(
            done.exit_code,
            done.output,
            [entry["value"] for entry in found["reading"]["bits"]],
            found["reading"]["asked"]["queries"],
            found["words"]["who"],
        )


@contextlib.contextmanager
def marked_model(root: Path, model: Path) -> Iterator[MarkedModel]:
    """Serve the model with the demo adapters and the mark, which is not required yet."""
    kek = SecretKey.generate()
    root.mkdir(parents=True, exist_ok=True)
    write_kek(kek, root / "kek")
    mark = write_mark(root / "mark", model, kek)
    config = root / "config.yaml"
    settings = {
        "server": {"api_key": OPERATOR},
        "watermark": {"mark_kek_file": str(root / "kek")},
    }
    config.write_text(json.dumps(settings))
    with running_server(root / "home", model, "--demo", "--config", str(config)) as server:
        found = MarkedModel(server, mark, root / "kek")
        files = [("files", (name, (mark.path / name).read_bytes())) for name in BUNDLE_FILES]
        found.call("POST", "/v1/watermarks", data={"name": "mark"}, files=files)
        yield found
