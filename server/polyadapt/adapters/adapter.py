"""What a family makes of a checkpoint: a plan (torch-free), then one Delta per site.

Knows no family, no file format and no device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from polyadapt.ops import cells
from polyadapt.types import BaseSpec, OptionValue
from polyadapt_store.checkpoint import Checkpoint, TensorInfo
from polyadapt_store.manifest import FileForm

if TYPE_CHECKING:
    import torch

OptionKind = Literal["flag", "count", "number", "word", "words", "bits"]

_LISTED_WORDS = 16  # in a message

# Options of every adapter whose experts a probe weighs.
TOP_K, PROBE_SCALE, FROZEN_AFTER = "top_k", "global_scaling_weight", "frozen_after"
MAX_PROBE_SCALE = 1e3


@dataclass(frozen=True, slots=True)
class TensorRead:
    """One tensor that `read` will take: its key, the site it serves and the part it plays there."""

    key: str
    site_id: int
    role: str


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that a request may choose of an adapter beside its scale and rank.

    kind `flag`: yes or no; `count`: a whole number, `number`: any, both from `least` to `most`;
    `word`: one of `words`; `words`: some of them, none or all, in whatever order. `default` stands
    where a request says nothing, and to give it is to say nothing; None: no value means that.
    `components` stand beside `words`: word i is the components from components[i][0] to before
    components[i][1] of every module, and those of the words that a request leaves out weigh 0.
    kind `bits`: a 0 or a 1 for each of `components`, which then weigh `least` or `most`. Such bits
    tell who asks: the server's policy chooses them and has to, no request may, and no message
    shows them.
    """

    name: str
    kind: OptionKind
    summary: str  # for people: what is chosen
    default: OptionValue | None = None
    words: tuple[str, ...] = ()
    least: float = 0.0  # finite, like `most`
    most: float = 0.0
    components: tuple[tuple[int, int], ...] = ()

    @property
    def expected(self) -> str:
        """Its values, for people."""
        if self.kind == "flag":
            return "true or false"
        if self.kind in ("word", "words"):
            listed = ", ".join(map(repr, self.words[:_LISTED_WORDS]))
            more = len(self.words) - _LISTED_WORDS
            listed += f" and {more} more" if more > 0 else ""
            is_list = self.kind == "words"
            return f"a list of some of {listed}, each once" if is_list else f"one of {listed}"
        if self.kind == "bits":
            num = len(self.components)
            return (
                f"{num} bits as {num} characters 0 and 1, or in {-(-num // 4)} hexadecimal digits"
            )
        whole = "a whole number" if self.kind == "count" else "a number"
        return f"{whole} from {self.least:g} to {self.most:g}"


@dataclass(frozen=True, slots=True)
class Probe:
    """A network that weighs an adapter's experts token by token, from the base's final hidden
    states: those of a first pass over the same tokens, in which every weight is `resting`.

    z = W[n] f(.. f(W[1] h + b[1]) ..) + b[n], sizes[i - 1] to sizes[i], f being relu or nothing; z
    is [modules, num_experts], module after module, of one module where all have the same weights.
    w = softmax(z / temperature) over a module's experts, or z itself; of those the top_k largest,
    of equal ones the first, the others 0; where has_top_softmax is set, softmax over those that are
    not 0; and all of it times `scale`.
    """

    sizes: tuple[int, ...]
    num_experts: int
    has_bias: bool = True
    has_relu: bool = True
    has_softmax: bool = True
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    has_top_softmax: bool = False
    scale: float = 1.0
    resting: float = 0.0

    @property
    def width(self) -> int:
        """How many weights a token gets."""
        return self.sizes[-1]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of W[1], b[1], W[2], ..., as they lie one behind the other."""
        layers = (((num_out, num_in), (num_out,)) for num_in, num_out in pairwise(self.sizes))
        return tuple(shape for pair in layers for shape in pair[: 1 + self.has_bias])

    @property
    def num_elements(self) -> int:
        """Of all of them."""
        return sum(map(math.prod, self.shapes))

    @property
    def options(self) -> tuple[Option, ...]:
        """What a request may choose of it."""
        top_k = Option(
            TOP_K, "count", "how many experts a token keeps at a module, the weightiest",
            default=self.top_k or self.num_experts, least=1, most=self.num_experts,
        )  # fmt: skip
        scale = Option(
            PROBE_SCALE, "number", "what all experts are multiplied by",
            default=float(self.scale), least=-MAX_PROBE_SCALE, most=MAX_PROBE_SCALE,
        )  # fmt: skip
        frozen_after = Option(
            FROZEN_AFTER, "count",
            "the weights stay what they are after so many generated tokens, which is approximate "
            "and spares the first pass from there on",
            most=1 << 31,
        )  # fmt: skip
        # Where all weigh the same in the first pass, nothing tells which are the top ones.
        return (scale, frozen_after) if self.resting else (top_k, scale, frozen_after)


@dataclass(frozen=True, slots=True)
class Traits:
    """What the engine has to know of an adapter beside its numbers."""

    is_scalable: bool = True  # whether a request may scale it by anything but 0 and 1
    # The base's keys and values are its own, at any scale and in every layer, so that their cached
    # pages are shared. `keeps_keys_and_values` proves it for a family that only adds at its sites.
    is_kv_neutral: bool = False
    # Parameters of the base that the adapter replaces or multiplies, such as "lm_head.weight": two
    # adapters of one request may not name the same.
    replaced: tuple[str, ...] = ()
    # It scales outputs of the base, so that another adapter's part may only be added behind it.
    is_scaling: bool = False
    # It acts from the last occurrence of these tokens in the prompt on, and where they do not
    # occur not at all; empty: everywhere.
    invocation: tuple[int, ...] = ()
    # It acts on one row alone: the prompt's last, whose logits the first token is chosen from.
    is_for_first_token: bool = False
    # The first b of its so many components are an adapter of their own, for every b from the
    # smallest on, times nested_rank / b; 0: they are not.
    nested_rank: int = 0
    min_nested_rank: int = 1
    options: tuple[Option, ...] = ()  # what else a request may choose, each by a name of its own
    # A request's scale multiplies A and B alike, so that its square is what acts.
    is_scale_squared: bool = False
    # A token takes as much of a step's budget of tokens as so many of the base: what has experts of
    # its own for a whole MLP computes that once for each that it chooses.
    token_cost: int = 1
    probe: Probe | None = None  # what weighs its experts, where a first pass does


ORDINARY = Traits()


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What an adapter is, known from its config and tensor headers alone."""

    family: str
    rank: int  # the largest of any site, of experts that of one expert
    target_modules: tuple[str, ...]  # distinct last path components, sorted
    # Device elements, see ops/cells.py: at most so many, where a family drops what the numbers, and
    # no header, show to be zero; else exactly.
    num_elements: int
    reads: tuple[TensorRead, ...]
    notes: tuple[str, ...] = ()  # config keys that were read and have no effect when serving
    traits: Traits = ORDINARY


@dataclass(frozen=True, slots=True)
class Delta:
    """What one adapter does at one site, every constant scale already inside.

    experts    y[e] = W[e] x + B[e] A[e] x, where A[e] are num_experts-th parts of A's rows, in
               order, and B[e] of B's columns
    linear     v = W T(x) + b, exchanged by `swap`;  y = (1 + out_scale) v + bias + B A x + dense x
    embedding  y = (1 + out_scale) W[id] + bias + B A[:, id] + dense[id]
    norm       y = weight * normalised x + b + bias, `weight` being what the model itself keeps: of
               Gemma the difference to one. A bias where the base has none needs a weight beside it
    Where there is a `routing`, B A x becomes B (w * A x), w being what it makes of the row
    (ops/cells.py: Routing); of a whole MLP's experts (Router.EXPERTS) A and B are those of each
    expert, end to end.
    Shapes: a [rank, in], b [out, rank], rank may be 0; router [scores, in], router_bias [rank];
    bias, out_scale and weight [out]; transform [in / g, g, g]: block n of x times matrix n; swap
    [2, out] with `group` g: v becomes (1 + swap[0]) v + swap[1] v', where v' exchanges the halves
    of every g columns; dense [out, in], for an embedding [in, out]. For an embedding `in` is the
    vocabulary. All float32 and contiguous, on the host; None: absent.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None
    transform: torch.Tensor | None = None
    swap: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    group: int = 0  # of `swap`
    routing: cells.Routing | None = None
    router: torch.Tensor | None = None
    router_bias: torch.Tensor | None = None

    @property
    def tails(self) -> tuple[tuple[int, torch.Tensor], ...]:
        """What follows A and B in the cell, with the bit of each."""
        given = (
            (cells.BIAS, self.bias),
            (cells.OUT_SCALE, self.out_scale),
            (cells.ROUTER_BIAS, self.router_bias),
            (cells.TRANSFORM, self.transform),
            (cells.SWAP, self.swap),
            (cells.DENSE, self.dense),
            (cells.WEIGHT, self.weight),
        )
        return tuple((bit, tensor) for bit, tensor in given if tensor is not None)

    @property
    def parts(self) -> int:
        """The cell's `parts`; see ops/cells.py."""
        group = self.group if self.transform is None else self.transform.shape[-1]
        return sum(bit for bit, _ in self.tails) | group << cells.GROUP_SHIFT

    @property
    def code(self) -> int:
        """The cell's `routing`; see ops/cells.py."""
        return 0 if self.routing is None else self.routing.code


# Last components of the paths of linears, as transformers' decoders name them. A layer computes
# its keys and values from its own input by these:
_KEY_AND_VALUE = (
    frozenset({"k_proj", "v_proj"}),
    frozenset({"qkv_proj"}),
    frozenset({"query_key_value"}),
    frozenset({"c_attn"}),
    frozenset({"Wqkv"}),
)
# and neither key nor value depends on the same layer's results of these.
_BESIDE_OR_BEHIND = frozenset(
    {"q_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
    | {"c_fc", "c_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"}
)
_STACKS = frozenset({"layers", "h"})
_FINAL_NORMS = frozenset({"norm", "ln_f", "final_layernorm", "final_layer_norm"})


def keeps_keys_and_values(site_ids: Iterable[int], base: BaseSpec) -> bool:
    """Whether additions at these sites provably leave every layer's keys and values as the base's.

    True only for sites behind the last layer's k and v: its queries, its attention's output, its
    MLP, the final norm, the head. The base must be one stack of numbered layers, each run once and
    in order of its number, whose last one names its k and v; everything unknown is False.
    """
    placed = [layer_of(site.path) for site in base.sites]
    stacks = {layer[0] for layer in placed if layer is not None}
    if len(stacks) != 1:
        return False
    (stack,) = stacks
    last = max(layer[1] for layer in placed if layer is not None)
    names = {
        site.path.rpartition(".")[2]
        for site, layer in zip(base.sites, placed, strict=True)
        if layer is not None and layer[1] == last
    }
    if not any(required <= names for required in _KEY_AND_VALUE):
        return False
    parent = stack.rpartition(".")[0]

    def is_behind(site_id: int) -> bool:
        path, layer = base.sites[site_id].path, placed[site_id]
        owner, _, name = path.rpartition(".")
        if layer is not None:
            return layer[1] == last and name in _BESIDE_OR_BEHIND
        return path == base.head_path or (owner == parent and name in _FINAL_NORMS)

    return all(map(is_behind, site_ids))


def layer_of(path: str) -> tuple[str, int] | None:
    """Return the path of the stack that a module lies in, and the number of its layer; or None."""
    parts = path.split(".")
    for at, (part, number) in enumerate(pairwise(parts)):
        if part in _STACKS and number.isdecimal():
            return ".".join(parts[: at + 1]), int(number)
    return None


class BaseWeights(Protocol):
    """Row-by-row access to the resident base, for families whose checkpoints refer to it."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the base is served in."""

    def weight(self, site_id: int) -> torch.Tensor:
        """The site's weight [out, in] (embedding: [vocabulary, width]; norm: [width], as the model
        keeps it) as a view or copy, any dtype.
        """

    def bias(self, site_id: int) -> torch.Tensor | None:
        """The site's base bias [out], or None."""


class Family(Protocol):
    """One kind of adapter. A new one is one file beside the others and one test."""

    name: ClassVar[str]
    peft_types: ClassVar[frozenset[str]]  # its spellings in `peft_type`
    summary: ClassVar[str]  # how it is served, for people
    # Whether a request may scale it, by itself: "yes", "no", or "yes, except ..." for people.
    scaling: ClassVar[str]
    overrides: ClassVar[int]  # bits of cells.OVERRIDES that its own cells may have
    files: ClassVar[tuple[FileForm, ...]]  # each a set of files that one adapter consists of

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether this family reads adapters with this config: what adapter_config.json says and,
        under its path, each further JSON file, such as config["0/adapter_config.json"].
        """

    def plan(
        self, config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: BaseSpec
    ) -> AdapterPlan:
        """Check the config and every tensor's name, shape and dtype; raises AdapterRejected with
        all problems. Names of tensors in other files than adapter_model.safetensors begin with
        their file, such as "0/adapter_model.safetensors/"; see manifest.weight_files.
        """

    def read(
        self,
        config: Mapping[str, Any],
        checkpoint: Checkpoint,
        base: BaseSpec,
        weights: BaseWeights,
    ) -> dict[int, Delta]:
        """Return site id -> Delta; takes every tensor of the checkpoint but the probe's; raises
        AdapterRejected.
        """

    def read_probe(
        self, config: Mapping[str, Any], checkpoint: Checkpoint, base: BaseSpec
    ) -> tuple[torch.Tensor, ...]:
        """Return the tensors that `traits.probe` describes, in the order of its `shapes`, float32;
        () without one. Called before `read`, and takes no tensor that `read` takes.
        """
