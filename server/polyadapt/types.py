"""The types that cross every border: requests, events, adapter identities, the base's description.

Plain frozen data. Knows no tensors, no HTTP and no storage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]
Tier = Literal["device", "host", "store"]
SiteKind = Literal["linear", "embedding", "norm", "experts"]
RequestKind = Literal["text", "embed"]
MarkScheme = Literal["kgw", "synthid", "gumbel"]

MAX_ADAPTERS = 4  # of one request

# What a request may say to an adapter: a word, a whole number, a number, yes or no, some words.
OptionValue = str | int | float | bool | tuple[str, ...]
Options = tuple[tuple[str, OptionValue], ...]  # by name, each name once, sorted by name


# --------------------------------------------------------------------------- adapters
@dataclass(frozen=True, slots=True)
class AdapterId:
    """What a name resolved to. Caches are keyed by `digest`, never by name or version."""

    name: str
    version: int
    digest: str  # "sha256:<64 hex>" over the adapter's files
    tenant: str = ""  # whose name it is; others' of the same name and bytes are used by themselves


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """One adapter of one request. `scale` 0 equals the base exactly; `rank` chooses how many
    components of a nested adapter are used, None: all; `options` are what else it lets a request
    choose. Mandatory: the caller's policy names it.
    """

    adapter: AdapterId
    scale: float = 1.0
    rank: int | None = None
    options: Options = ()
    is_mandatory: bool = False


@dataclass(frozen=True, slots=True)
class WhenCold:
    """What becomes of a request whose adapters are not on the device.

    They are waited for, wait_ms from the request's arrival on (None: as long as it takes). Then it
    is served with `instead`, () being the base alone; None: it fails.
    """

    wait_ms: float | None = None
    instead: tuple[AppliedAdapter, ...] | None = None


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """What a request was really served with; `tier` is where its weights lay when it was
    admitted.
    """

    adapter: AdapterId
    tier: Tier
    load_ms: float
    is_mandatory: bool = False
    is_approximate: bool = False  # as the request asked for: not what the adapter itself computes


# --------------------------------------------------------------------------- the base model
@dataclass(frozen=True, slots=True)
class SiteSpec:
    """One place of the base model that an adapter can change.

    kind `linear`: y [rows, out] = W x [rows, in] (+ bias); `embedding`: in = vocabulary size, out
    = width; `norm`: y = weight * normalised x (+ bias) over the last `width` = in = out elements,
    once a row or, of query and key, once a head; `experts`: one of the two weights of routed
    experts, a parameter and no module: expert e's y = W[e] x, with in and out of one expert. An
    adapter's A and B lie there expert after expert: component e * r + i of num_experts * r is
    expert e's i-th.
    """

    path: str  # module path in the base, e.g. "model.layers.0.self_attn.q_proj"
    kind: SiteKind
    in_features: int
    out_features: int
    has_bias: bool
    num_experts: int = 0  # 0 unless kind is `experts`


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """An MLP of the base, proved to compute y = down(act(gate x) * up x), or down(act(up x)).

    inputs: the sites of gate and up; or one, of up alone or of a linear whose first half is gate
    and whose second is up. activations: every name that transformers has for act.
    """

    path: str  # of the module
    inputs: tuple[int, ...]
    down: int
    is_gated: bool
    activations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """All that validation needs to know of the resident base model, without its weights."""

    name: str
    digest: str  # "sha256:..." over the config and the weight files
    architecture: str  # e.g. "LlamaForCausalLM"
    vocab_size: int
    max_model_len: int  # longest prompt plus output, in tokens
    is_tied: bool  # input embedding and lm_head share one weight
    embedding_path: str
    head_path: str
    sites: tuple[SiteSpec, ...]  # the index is the site id
    mlps: tuple[MlpSpec, ...] = ()


# --------------------------------------------------------------------------- requests
@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Order: penalties, logit_bias, min_tokens, the text mark of
    scheme kgw, temperature, top_k, top_p, min_p, any other text mark.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # 64-bit; token i of sequence j is a pure function of (seed, j, i) and the logits
    stop_token_ids: tuple[int, ...] = ()  # end the sequence; the eos ids are added by the engine
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None  # None: no logprobs; k: the chosen token and the k likeliest
    num_prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class MarkSettings:
    """How texts are marked, and so how they are read; see watermark/text.py for what each says."""

    scheme: MarkScheme
    context_width: int  # tokens before one that decide what is favoured there
    ratio: float = 0.25  # kgw: the green share of the vocabulary
    bias: float = 2.0  # kgw: what is added to a green token's logit
    depth: int = 12  # synthid: rounds of a tournament
    is_lefthash: bool = False  # kgw: green lists as transformers makes them
    key_version: int = 1  # of the users' keys


@dataclass(frozen=True, slots=True)
class TextMark:
    """What one request's tokens are marked with: the key is its user's alone, and secret."""

    settings: MarkSettings
    key: tuple[int, int] = field(repr=False)  # signed 64-bit words


@dataclass(frozen=True, slots=True)
class Request:
    """One unit of work for the engine: `n` sequences sampled from one prompt, or, of kind `embed`,
    the prompt's embedding: then nothing is sampled, and `n` is 1.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapters: tuple[AppliedAdapter, ...] = ()
    n: int = 1
    timeout_s: float | None = None
    cache_salt: tuple[str, ...] = ()  # only requests with an equal one share cached prefixes
    priority: int = 0  # lower is served earlier; never changes the output
    speculative_tokens: int | None = None  # drafts a step verifies; 0 = off, None: the engine's own
    when_cold: WhenCold = WhenCold()
    kind: RequestKind = "text"
    traceparent: str | None = None  # W3C's, of a request that is traced: it wants a Timeline
    text_mark: TextMark | None = None


# --------------------------------------------------------------------------- events
@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token under the raw model distribution, and the likeliest
    others.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timeline:
    """The engine's part of a traced request so far, in unix seconds by its own clock.

    first_step is the step of its first rows, last_step the one that it ended in. loads: digest,
    begin and end of each way to the device that it was the first to find over.
    """

    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    ended: float | None = None
    first_step: int = 0
    last_step: int = 0
    loads: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted: its adapters are on the device and leased.

    num_cached_tokens of its prompt were not computed: their keys and values were there.
    """

    request_id: str
    served: tuple[ServedAdapter, ...] = ()
    num_cached_tokens: int = 0
    timeline: Timeline | None = None


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Logprobs of the prompt's tokens 1.. (the first has none); only when asked for."""

    request_id: str
    index: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of sequence `index`; the last one of a sequence carries its finish reason.

    A stop token (eos or stop_token_ids) is reported like any token, with finish_reason "stop" and
    `stop_token_id` set; whoever builds text leaves it out.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a request of kind `embed` is for: the mean over its prompt's tokens of the final hidden
    states, those behind the last norm that the head reads; float32 [width].
    """

    request_id: str
    vector: tuple[float, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Every sequence of the request has ended, or it was cancelled by its caller."""

    request_id: str
    is_cancelled: bool = False
    timeline: Timeline | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error; `code` is one of errors.py, `param` the field to blame."""

    request_id: str
    code: str
    message: str
    param: str | None = None
    timeline: Timeline | None = None


Event = Started | PromptScored | Tokens | Embedded | Finished | Failed


# --------------------------------------------------------------------------- the engine's state
@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself once, when it is ready."""

    base: BaseSpec
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    num_pages: int
    page_size: int  # tokens per KV page
    max_num_seqs: int
    max_waiting: int
    adapter_bytes: int  # device memory for adapters
    strategy: str  # the kernel that serves the adapter operation, with its reason
    max_adapters: int = 4096  # on the device, whatever their size


@dataclass(frozen=True, slots=True)
class Residency:
    """Where one adapter's weights are."""

    digest: str
    tier: Tier
    is_pinned: bool = False
    num_leases: int = 0
    last_used: float = 0.0  # unix seconds
    nbytes: int = 0  # of one copy
    engines: tuple[tuple[str, Tier], ...] = ()  # of several engines, where it is on each


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot between two steps. Counts only grow: from an engine itself while it lives, from an
    EngineClient over the lives of its engines.
    """

    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_used_pages: int = 0
    num_cached_pages: int = 0  # owned by nobody, kept for whoever has the same prefix
    num_pages: int = 0
    adapter_bytes_used: int = 0
    waiting_digests: tuple[str, ...] = ()  # adapters that queued requests wait for
    counters: dict[str, int] = field(default_factory=dict)  # event -> how often
    steps_by_adapters: dict[int, int] = field(default_factory=dict)  # distinct adapters -> steps
    steps_by_rows: dict[int, int] = field(default_factory=dict)  # k: at least 2^(k-1), below 2^k
    # By stage (read, pack, copy) what adapters took on their ways to the device, as a Distribution
    # with the bounds distribution.LOAD_SECONDS.
    load_seconds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    # Of the busiest adapters that route their rows, by digest, since they came to the device: rows,
    # counted at every module, and then each expert's part of the weight.
    routing: dict[str, tuple[float, ...]] = field(default_factory=dict)
