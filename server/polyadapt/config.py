"""Every setting, read once: command line > POLYADAPT_... variables > YAML file > defaults.

Frozen and nested, so that each part is handed only its own section. Knows no torch and no HTTP.
Field names are unique over all sections: `--max-num-seqs`, `POLYADAPT_MAX_NUM_SEQS` and the key
`engine: {max_num_seqs: ...}` of the file are one setting. Unknown or unparsable means StartupError.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml  # type: ignore[import-untyped]
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from polyadapt.errors import StartupError

ENV_PREFIX = "POLYADAPT_"
# Read by the test-suite, never by the server: a server started by a test inherits them.
_ENV_IGNORED_PREFIX = "POLYADAPT_TEST_"
# Read by the kernels' build (ops/native/build.py), in whatever process loads them.
_ENV_ELSEWHERE = frozenset({"POLYADAPT_NATIVE"})

Dtype = Literal["auto", "float32", "bfloat16"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ServerConfig(_Section):
    """The edge: where it listens, who may call it, and how it ends."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0: any free port
    internal_port: int | None = Field(None, ge=0, le=65535)  # metrics and drain without a key
    api_key: SecretStr | None = None  # the operator's admin key, beside the registry's
    allow_anonymous: bool = False  # serve other machines without a key
    allowed_hosts: tuple[str, ...] = ()  # Host names for a keyless server, beside loopback
    adapter_roots: tuple[Path, ...] = ()  # folders that /v1/load_lora_adapter may read
    heartbeat_s: float = Field(15.0, gt=0)  # comment lines on silent streams
    auto_threshold: float = Field(0.37, ge=-1.0, le=1.0)  # least score at which `auto` chooses
    drain_notice_s: float = Field(0.0, ge=0)  # not ready, yet serving, before that
    drain_grace_s: float = Field(30.0, ge=0)  # how long running streams may take at SIGTERM
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"  # json: one object a line
    # An OTLP receiver's address before /v1/traces; None: no tracing.
    otlp_endpoint: str | None = Field(None, pattern=r"^https?://[^\s/]+")
    trace_ratio: float = Field(1.0, ge=0.0, le=1.0)  # traced, of requests without a decision

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: Any) -> Any:
        return _split(value, ",")

    @field_validator("adapter_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: Any) -> Any:
        return _split(value, os.pathsep)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address that the server binds."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class EngineConfig(_Section):
    """The engine process: the model, its device and the budgets of time and memory."""

    model: str = Field("smollm2", min_length=1)  # a transformers directory, a hub id, or "smollm2"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$")
    dtype: Dtype = "auto"
    max_model_len: int | None = Field(None, ge=2)  # None: the model's, capped by the KV memory
    max_num_seqs: int = Field(64, ge=1, le=4096)  # rows of one step
    max_num_batched_tokens: int = Field(512, ge=1, le=1 << 20)  # tokens of one step
    max_heavy_adapters: int = Field(8, ge=1, le=4096)  # of one step, that hold dense matrices
    max_waiting: int = Field(1024, ge=1)  # queued requests; more are refused with 429
    memory_bytes: ByteSize | None = None  # KV pages and adapters together; None: each its own
    kv_cache_bytes: ByteSize | None = None  # None: chosen from the free memory
    page_size: int | None = Field(None, ge=1, le=256)  # tokens per KV page; None: the device's
    prefix_cache: bool = True  # keep full KV pages for requests that begin alike
    max_adapter_bytes: ByteSize | None = None  # device memory for adapters; None: chosen
    host_adapter_bytes: ByteSize = ByteSize(1 << 30)  # host copies of adapters
    packed_cache_bytes: ByteSize = ByteSize(4 << 30)  # disk for adapters in loadable form; 0: off
    triton: bool = False  # Triton kernels serve the adapters' product; never run on a device yet
    exact: bool = False  # answers bit-identical whatever else is in the batch, or no start
    speculative_tokens: int = Field(0, ge=0, le=16)  # drafts of a sequence and step; 0: off
    num_threads: int | None = Field(None, ge=1, le=1024)  # None: the engine chooses
    step_timeout_s: float = Field(120.0, gt=0)  # a step that takes longer means a hung engine


class FleetConfig(_Section):
    """Several engines behind one edge, each with the base model and adapters of its own."""

    devices: tuple[str, ...] = ()  # an engine on each, instead of one on `device`
    engines: int = Field(1, ge=1, le=64)  # on `device cpu`, which they share

    @field_validator("devices", mode="before")
    @classmethod
    def _split_devices(cls, value: Any) -> Any:
        return _split(value, ",")

    @field_validator("devices", mode="after")
    @classmethod
    def _check_devices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for device in value:
            if not re.fullmatch(r"cpu|cuda:[0-9]{1,2}", device):
                raise ValueError(f"{device!r} is not of the form cpu or cuda:N")
        if len(set(value)) != len(value):
            raise ValueError("one device is named twice; give each one once")
        return value


class RayConfig(_Section):
    """What `polyadapt serve-ray` asks of a Ray cluster; `serve` reads none of it."""

    ray_address: str = "auto"  # of the cluster; auto: the one of this machine
    ingress_replicas: int = Field(1, ge=1)  # of the web application, which need no device
    # Ray's custom resources that a node of theirs must have, such as {edge: 0.1}.
    ingress_resources: dict[str, float] = Field(default_factory=dict)
    min_engines: int = Field(1, ge=1)  # engine replicas, each with its own device
    max_engines: int = Field(1, ge=1)  # beyond min_engines they come and go with the load
    engine_gpus: float = Field(1.0, ge=0)  # for each engine; 0 with device cpu
    engine_cpus: float = Field(1.0, ge=0)  # likewise, in Ray's books
    engines_per_node: int | None = Field(None, ge=1, le=100)  # None: as its devices allow
    queued_tokens: int = Field(8192, ge=1)  # sent and not computed, that one engine shall have
    upscale_delay_s: float = Field(30.0, ge=0)  # how long more engines must be wanted
    downscale_delay_s: float = Field(600.0, ge=0)  # how long fewer
    statement_s: float = Field(1.0, gt=0)  # between two statements of an engine

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max_engines < self.min_engines:
            raise ValueError(
                f"max_engines is {self.max_engines}, below min_engines {self.min_engines}"
            )
        return self


class StoreConfig(_Section):
    """The adapter store; paths that are None lie under the home."""

    store_dir: Path | None = None  # adapters' bytes by digest
    database_url: SecretStr | None = None  # of the registry; None: SQLite in store_dir
    blob_url: str | None = None  # where adapters' bytes are kept; None: in store_dir
    blob_cache_bytes: ByteSize = ByteSize(16 << 30)  # of them on this machine's disk
    allowed_sources: tuple[str, ...] = ()  # URIs below which adapters may be fetched

    @field_validator("allowed_sources", mode="before")
    @classmethod
    def _split_sources(cls, value: Any) -> Any:
        return _split(value, " ")


class LimitsConfig(_Section):
    """What one caller may ask for; every bound is checked before memory is taken."""

    max_body_bytes: ByteSize = ByteSize(8 << 20)  # a JSON body
    max_upload_bytes: ByteSize = ByteSize(1 << 30)  # one adapter, all files together
    max_upload_files: int = Field(64, ge=1)  # files of one adapter
    max_prompt_bytes: ByteSize = ByteSize(4 << 20)  # text of one prompt, before it is tokenised
    max_messages: int = Field(2048, ge=1)  # of one conversation
    max_prompts: int = Field(32, ge=1)  # prompts of one /v1/completions call
    max_n: int = Field(128, ge=1, le=128)  # sequences of one request
    min_priority: int = Field(-100, ge=-100, le=0)  # 0: nobody may ask to be served earlier
    max_concurrent_uploads: int = Field(4, ge=1)  # the next ones wait
    request_timeout_s: float | None = Field(None, gt=0)  # None: a request may run until it ends


class WatermarkConfig(_Section):
    """The key that marks' secrets are sealed under (KEK), and the one that texts are marked with,
    each from one of two places; and whom the server may ask for a mark.
    """

    # 32 random bytes in base64; while it is changed several, newest first, white space between them
    mark_kek: SecretStr | None = None
    mark_kek_file: Path | None = None  # a file that holds them
    text_mark_key: SecretStr | None = None  # 32 random bytes in base64: another key, and only one
    text_mark_key_file: Path | None = None
    verify_endpoints: tuple[
        str, ...
    ] = ()  # origins, https://HOST[:PORT]; whoever is listed is asked
    max_readings: int = Field(2, ge=1, le=64)  # of endpoints, at once

    @field_validator("verify_endpoints", mode="before")
    @classmethod
    def _split_endpoints(cls, value: Any) -> Any:
        return _split(value, ",")


class Config(BaseSettings):
    """All settings of one server."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    home: Path = Field(default_factory=lambda: default_home(os.environ))
    adapters: dict[str, Path] = Field(default_factory=dict)  # name -> PEFT directory
    demo: bool = False  # register the packaged demo adapters at start
    prefix_pools: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # of tenants; else none
    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()
    fleet: FleetConfig = FleetConfig()
    ray: RayConfig = RayConfig()
    store: StoreConfig = StoreConfig()
    limits: LimitsConfig = LimitsConfig()
    watermark: WatermarkConfig = WatermarkConfig()

    @field_validator("home", mode="after")
    @classmethod
    def _expand_home(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("adapters", mode="before")
    @classmethod
    def _parse_adapters(cls, value: Any) -> Any:
        items = _split(value, ",")
        if not isinstance(items, list | tuple):
            return items
        pairs = [str(item).partition("=") for item in items]
        wrong = [
            str(item)
            for item, (name, _, path) in zip(items, pairs, strict=True)
            if not (name and path)
        ]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not of the form NAME=DIR")
        names = [name for name, _, _ in pairs]
        if len(set(names)) != len(names):
            raise ValueError("one adapter name is given twice")
        return {name: path for name, _, path in pairs}

    @field_validator("prefix_pools", mode="before")
    @classmethod
    def _parse_pools(cls, value: Any) -> Any:
        items = _split(value, ",")
        if not isinstance(items, list | tuple):
            return items
        pools: dict[str, list[str]] = {}
        for item in items:
            name, _, tenants = str(item).partition("=")
            if not name or not tenants or name in pools:
                raise ValueError(f"{item!r} is not of the form POOL=TENANT+TENANT, each pool once")
            pools[name] = tenants.split("+")
        return pools

    @field_validator("prefix_pools", mode="after")
    @classmethod
    def _check_pools(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        tenants = [tenant for pool in value.values() for tenant in pool]
        if not all(value) or not all(tenants):
            raise ValueError("a pool or a tenant has an empty name")
        twice = next((tenant for tenant in tenants if tenants.count(tenant) > 1), None)
        if twice is not None:
            raise ValueError(f"tenant {twice!r} is named twice; a tenant is in one pool")
        return value

    @model_validator(mode="after")
    def _check_fleet(self) -> Self:
        fleet, device = self.fleet, self.engine.device
        if fleet.devices and device != "auto":
            raise ValueError(f"devices and device {device} contradict each other; leave device out")
        if fleet.engines > 1 and (fleet.devices or device != "cpu"):
            raise ValueError(
                "several engines share a device only with --device cpu; for several CUDA devices "
                "give --devices cuda:0,cuda:1"
            )
        return self

    def engine_configs(self) -> dict[str, EngineConfig]:
        """Return each engine's settings by its name; one engine is named after its device.

        Budgets are those of a device: engines that share one get equal parts, of the memory and, if
        their number was not given, of the threads. The host's part is divided wherever they run.
        """
        engine, count = self.engine, self.fleet.engines
        host_bytes = int(engine.host_adapter_bytes)
        if self.fleet.devices:
            return {
                device: engine.model_copy(
                    update={
                        "device": device,
                        "host_adapter_bytes": ByteSize(host_bytes // len(self.fleet.devices)),
                    }
                )
                for device in self.fleet.devices
            }
        if count == 1:
            return {engine.device: engine}
        shared = ("memory_bytes", "kv_cache_bytes", "max_adapter_bytes", "host_adapter_bytes")
        parts = {
            name: ByteSize(int(value) // count)
            for name in shared
            if (value := getattr(engine, name)) is not None
        }
        threads = engine.num_threads or max((os.cpu_count() or 1) // count, 1)
        part = engine.model_copy(update={**parts, "num_threads": threads})
        return {f"{engine.device}/{number}": part for number in range(count)}

    @property
    def models_dir(self) -> Path:
        """Where fetched base models lie."""
        return self.home / "models"

    @property
    def store_dir(self) -> Path:
        """Where the adapters' bytes lie."""
        return self.store.store_dir or self.home / "store"

    @property
    def registry(self) -> Path | str:
        """What Database opens: the registry's URL, or its file."""
        url = self.store.database_url
        return self.store_dir / "registry.sqlite" if url is None else url.get_secret_value()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from the caller alone; `load_config` adds the environment and the file."""
        return (init_settings,)


def default_home(environ: Mapping[str, str]) -> Path:
    """Return where models, store and registry lie: POLYADAPT_HOME, XDG_CACHE_HOME or ~/.cache."""
    if own := environ.get("POLYADAPT_HOME"):
        return Path(own).expanduser().absolute()
    if cache := environ.get("XDG_CACHE_HOME"):
        return Path(cache).expanduser().absolute() / "polyadapt"
    return Path.home() / ".cache" / "polyadapt"


def load_config(
    cli: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Config:
    """Return the settings of a server from flat `cli` names, the environment and a YAML file.

    `cli` maps leaf field names ("port", "max_num_seqs", "adapters") to values; None is not given.
    `file` is the YAML file; without it POLYADAPT_CONFIG names one. Raises StartupError with one
    line that names the setting and where it came from.
    """
    variables: Mapping[str, str] = os.environ if environ is None else environ
    env_values = {
        key[len(ENV_PREFIX) :].lower(): value
        for key, value in variables.items()
        if key.startswith(ENV_PREFIX)
        and not key.startswith(_ENV_IGNORED_PREFIX)
        and key not in _ENV_ELSEWHERE
    }
    env_file = env_values.pop("config", None)
    file = file or (Path(env_file) if env_file else None)
    unknown = sorted(set(env_values) - set(_SECTION_OF))
    if unknown:
        raise StartupError(
            f"unknown environment variable {ENV_PREFIX}{unknown[0].upper()}; "
            "remove it or correct its name"
        )
    given = {name: value for name, value in (cli or {}).items() if value is not None}
    env_values = {name: value for name, value in env_values.items() if value != ""}

    sources = {
        "file": _read_yaml(file) if file else {},
        "environment": _nested(env_values),
        "command line": _nested(given),
    }

    class _Loaded(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (
                _Values(settings_cls, sources["command line"]),
                _Values(settings_cls, sources["environment"]),
                _Values(settings_cls, sources["file"]),
                _Values(settings_cls, {"home": default_home(variables)}),
            )

    try:
        loaded = _Loaded()
    except ValidationError as error:
        raise StartupError(_explain(error, sources)) from None
    # A plain Config, so that equality and repr do not depend on how it was read.
    return Config(**{name: getattr(loaded, name) for name in Config.model_fields})


class _Values(PydanticBaseSettingsSource):
    """A source that is a nested dict already; the first one given wins."""

    def __init__(self, settings_cls: type[BaseSettings], values: dict[str, Any]) -> None:
        super().__init__(settings_cls)
        self._given = values

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._given.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._given


def _sections() -> dict[str, str | None]:
    """Return leaf field name -> the section that holds it (None: the top)."""
    found: dict[str, str | None] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        is_section = isinstance(section, type) and issubclass(section, _Section)
        leaves = list(section.model_fields) if is_section else [name]  # type: ignore[union-attr]
        for leaf in leaves:
            assert leaf not in found, f"setting {leaf} exists twice"
            found[leaf] = name if is_section else None
    return found


_SECTION_OF = _sections()


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        if name not in _SECTION_OF:
            raise StartupError(f"unknown setting {name!r}")
        section = _SECTION_OF[name]
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"cannot read the config file {file}: {error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise StartupError(f"the config file {file} is not YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise StartupError(f"the config file {file} holds no mapping of settings")
    top = {name: value for name, value in values.items() if name in Config.model_fields}
    for name, value in values.items():
        if name in top and _SECTION_OF.get(name, name) is not None and value is None:
            top[name] = {}  # an empty section, `engine:` with nothing under it
    flat = {name: value for name, value in values.items() if name not in top}
    unknown = sorted(str(name) for name in flat if name not in _SECTION_OF)
    if unknown:
        raise StartupError(f"unknown setting {unknown[0]!r} in the config file {file}")
    for section, leaves in _nested(flat).items():
        top[section] = {**top.get(section, {}), **leaves}
    return top


def _explain(error: ValidationError, sources: Mapping[str, dict[str, Any]]) -> str:
    """Return one line on the first problem: the setting, its origin, what was expected."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    origin = "defaults"
    for name in ("command line", "environment", "file"):
        value: Any = sources[name]
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            origin = name
            break
    if first["type"] == "extra_forbidden":
        return f"unknown setting {'.'.join(path)} ({origin})"
    secrets = {"api_key", "database_url", "mark_kek", "text_mark_key"}
    shown = "" if secrets & set(path) else f", not {first['input']!r}"
    expected = first["msg"].removeprefix("Value error, ")
    return f"bad setting {'.'.join(path)} ({origin}): {expected}{shown}"


def _split(value: Any, separator: str) -> Any:
    if isinstance(value, str):
        return [part.strip() for part in value.split(separator) if part.strip()]
    return value
