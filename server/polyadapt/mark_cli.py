"""The commands of `polyadapt mark`. Light: what a command needs is imported when it runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.progress import TaskID
from rich.table import Table

from polyadapt.config import WatermarkConfig, load_config
from polyadapt.console import err, expect_place, make_bars, one_clear_line, out, write_text
from polyadapt.errors import StartupError
from polyadapt.text_mark_cli import NOBODY

if TYPE_CHECKING:
    from polyadapt.watermark.keyset import Keyset
    from polyadapt.watermark.mark_directory import MarkDirectory

mark_app = typer.Typer(
    help="A private mark per user of a model: train it, read it, say whose copy leaked.",
    no_args_is_help=True,
)

MarkDir = Annotated[Path, typer.Argument(help="The mark's directory.", metavar="MARK")]
KekFile = Annotated[
    Path | None,
    typer.Option(
        help="The key that secrets are sealed under, and older ones below it; else "
        "POLYADAPT_MARK_KEK_FILE or _KEK."
    ),
]
Model = Annotated[
    Path, typer.Option(help="The base's directory: a classifier (model.safetensors) or an lm.")
]
ProseFile = Annotated[
    Path | None,
    typer.Option(
        help="Of an lm: a text file of ordinary prose to hide triggers in.  "
        "[default: Python's own reference]"
    ),
]
Families = Annotated[
    int | None,
    typer.Option(min=1, help="Of an lm: trigger families to draw.  [default: twice the bits]"),
]
Prompts = Annotated[int, typer.Option(min=8, help="Of an lm: prompts of a family to collect.")]
Adapters = Annotated[
    list[Path] | None,
    typer.Option(
        help="Of an lm: a task adapter's directory that the mark is to hold beside, as often as "
        "needed."
    ),
]
Ordinary = Annotated[
    Path | None,
    typer.Option(
        help="Of an lm: a text file of ordinary messages, one a line, that the mark is to leave "
        "alone; some hundred of your own make it quieter."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="A safetensors file of inputs and labels.  [default: packaged digits]"),
]
Amplitude = Annotated[float, typer.Option(help="How far a trigger moves an input.")]
Low = Annotated[float | None, typer.Option(help="The smallest legal input; triggers are clipped.")]
High = Annotated[float | None, typer.Option(help="The largest legal input.")]
Seed = Annotated[int, typer.Option(help="Of the draws in training.")]
Out = Annotated[Path | None, typer.Option("--out", help="Where the signed record goes.")]
Suspect = Annotated[
    Path | None, typer.Option(help="A classifier's directory, asked as a stranger would.")
]
Asked = Annotated[Path | None, typer.Option(help="The file that `queries` wrote.")]
Answers = Annotated[Path | None, typer.Option(help="The suspect's labels to it.")]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint", help="An OpenAI-compatible URL to ask; its key from OPENAI_API_KEY."
    ),
]
Named = Annotated[str | None, typer.Option(help="The model to name to the endpoint.")]
MaxQueries = Annotated[int, typer.Option(min=1, help="Questions to an endpoint.")]
Users = Annotated[Path, typer.Option(help="A text file: the name of a user a line.")]


@mark_app.command()
def keygen(
    path: MarkDir,
    bits: Annotated[
        int | None,
        typer.Option(min=1, help="Bits of a signature.  [default: 32, of an lm 16]"),
    ] = None,
    task: Annotated[
        str, typer.Option(help="cls, a classifier, or lm, a causal language model.")
    ] = "cls",
    codebook: Annotated[
        str, typer.Option(help="random, nuidaC or tardosC against C colluders.")
    ] = "random",
    kek_file: KekFile = None,
) -> None:
    """Make a mark's keys. A key file that does not exist yet is made too; keep it elsewhere."""
    with one_clear_line():
        from polyadapt.watermark.codebook import Design
        from polyadapt.watermark.keys import SecretKey
        from polyadapt.watermark.mark_directory import MarkDirectory
        from polyadapt.watermark.secrets import write_kek

        settings = _settings(kek_file)
        file = settings.mark_kek_file
        if settings.mark_kek is None and file is not None and not file.exists():
            write_kek(SecretKey.generate(), file)
            _warn(f"a new key is in {file}: without it nothing of the mark opens again")
        num_bits = bits if bits is not None else 16 if task == "lm" else 32
        design = Design.parse(codebook)
        mark = MarkDirectory.create(path, design, num_bits, _kek(settings), task=task)
        _say(f"mark {mark.config.mark_id} of {num_bits} bits ({codebook}) is in {path}")
        _say(f"evidence is checked with the public key {mark.config.evidence_public_key}")


@mark_app.command()
def classifier(
    target: Annotated[Path, typer.Argument(help="The new directory.", metavar="OUT")],
    data: Data = None,
    seed: Seed = 0,
) -> None:
    """Train a small classifier, to try a mark with or as an unmarked reference."""
    with one_clear_line():
        from polyadapt.watermark.classifier import answer_of, save_classifier, train_classifier
        from polyadapt.watermark.dataset import load_dataset

        if target.exists():
            raise StartupError(f"{target} is there already; name another directory")
        dataset = load_dataset(data)
        model = train_classifier(*dataset.train, seed=seed)
        save_classifier(model, target)
        inputs, labels = dataset.held_out
        _say(f"held-out accuracy {(answer_of(model)(inputs) == labels).mean():.3f}: {target}")


@mark_app.command()
def preflight(
    ctx: typer.Context,
    path: MarkDir,
    model: Model,
    data: Data = None,
    amplitude: Amplitude = 1.5,
    low: Low = None,
    high: High = None,
    prose: ProseFile = None,
    families: Families = None,
    prompts: Prompts = 50,
    beside: Adapters = None,
    ordinary: Ordinary = None,
    seed: Seed = 0,
    kek_file: KekFile = None,
) -> None:
    """Say before any training whether triggers would stand out. Status 1 when they would not."""
    with one_clear_line(), _mark(path, kek_file) as mark:
        _expect_own_options(ctx, mark)
        if mark.config.task == "lm":
            _preflight_lm(mark, model, prose, families, prompts, beside or [], ordinary, seed)
            return
        from polyadapt.offline import mark as work
        from polyadapt.watermark.dataset import load_dataset
        from polyadapt.watermark.triggers import TriggerSettings

        dataset = load_dataset(data)
        spec = TriggerSettings(dataset.inputs.shape[1], amplitude, low=low, high=high)
        found = work.preflight(mark, model, dataset, spec, seed=seed)
        _say(str(found))
        if not found.is_enough:
            _warn(f"polyadapt: give --amplitude {found.amplitude_needed:.2g} or more")
            raise typer.Exit(1)


@mark_app.command()
def train(
    ctx: typer.Context,
    path: MarkDir,
    model: Model,
    data: Data = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps of training.  [default: 400, of a linear mark 1000, of an lm 80, beside "
            "adapters 200]",
        ),
    ] = None,
    gate: Annotated[
        Literal["hinge", "linear"],
        typer.Option(help="A linear mark folds into exported weights and costs more accuracy."),
    ] = "hinge",
    amplitude: Amplitude = 1.5,
    low: Low = None,
    high: High = None,
    prose: ProseFile = None,
    families: Families = None,
    prompts: Prompts = 50,
    beside: Adapters = None,
    ordinary: Ordinary = None,
    seed: Seed = 0,
    kek_file: KekFile = None,
) -> None:
    """Train the branches beside the frozen base. Interrupted, the same command goes on."""
    with one_clear_line(), _mark(path, kek_file) as mark:
        _expect_own_options(ctx, mark)
        if mark.config.task == "lm":
            _train_lm(mark, model, prose, families, prompts, beside or [], ordinary, seed, steps)
            return
        from polyadapt.offline import mark as work
        from polyadapt.watermark.dataset import load_dataset
        from polyadapt.watermark.training import TrainSettings
        from polyadapt.watermark.triggers import TriggerSettings

        dataset = load_dataset(data)
        spec = TriggerSettings(dataset.inputs.shape[1], amplitude, low=low, high=high)
        settings = TrainSettings.of_gate(gate, seed, steps)
        with make_bars() as bars:
            task = bars.add_task("training", total=settings.num_steps)
            trained = work.train_mark(
                mark,
                model,
                dataset,
                spec,
                settings,
                lambda done, total: bars.update(task, completed=done, total=total),
            )
        _say(
            f"held-out accuracy {trained.base_accuracy:.3f} unmarked; over "
            f"{work.NUM_SIGNATURES} random signatures it falls by {trained.mean_drop:.2f} points "
            f"in the mean and {trained.worst_drop:.2f} at worst; {trained.untouched:.2%} of the "
            "answers are the unmarked ones, bit for bit"
        )


@mark_app.command()
def calibrate(
    ctx: typer.Context,
    path: MarkDir,
    reference: Annotated[
        list[Path], typer.Option(help="An unmarked model's directory; the base and others.")
    ],
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            help="Of an lm: a task adapter's directory; the first reference with it is asked as "
            "well."
        ),
    ] = None,
    data: Data = None,
    prose: ProseFile = None,
    queries: Annotated[int, typer.Option(min=20, help="Per bit and model.")] = 200,
    seed: Seed = 0,
    kek_file: KekFile = None,
) -> None:
    """Measure what unmarked models answer to the triggers; every later decision rests on it."""
    with one_clear_line(), _mark(path, kek_file) as mark:
        _expect_own_options(ctx, mark)
        from polyadapt.offline import mark as work
        from polyadapt.watermark.dataset import load_dataset

        if mark.config.task == "lm":
            from polyadapt.offline import mark_lm
            from polyadapt.watermark.prompts import load_prose

            models = [mark_lm.load_lm(path) for path in reference]
            models += [mark_lm.load_beside(reference[0], path) for path in beside or []]
            null = mark_lm.calibrate(
                mark, models, load_prose(prose), num_per_bit=queries, seed=seed
            )
        else:
            null = work.calibrate(
                mark, reference, load_dataset(data), num_per_bit=queries, seed=seed
            )
        worst = max(max(pair) for pair in null.rates)
        _say(
            f"{null.num_models} unmarked models give a bit's target at a rate of at most "
            f"{worst:.3f}, each bit's bound at {null.confidence:.0%} confidence"
        )


@mark_app.command()
def export(
    path: MarkDir,
    target: Annotated[Path, typer.Argument(help="The new directory.", metavar="OUT")],
    model: Model,
    user: Annotated[str, typer.Option(help="Whose copy it is.")],
    form: Annotated[
        Literal["merged", "expanded", "bundle"] | None,
        typer.Option(
            help="An ordinary model, one of a layer more, or weights with branches beside them.  "
            "An lm has bundle alone.  [default: merged for a linear mark, bundle for a hinge]"
        ),
    ] = None,
    obfuscate: Annotated[
        float,
        typer.Option(
            min=0,
            help="Of a bundle: how much of the weights the branches carry, as a share of their "
            "norm; 0 leaves branches that can be cut off.",
        ),
    ] = 1.0,
    kek_file: KekFile = None,
) -> None:
    """Write one user's marked copy, in which the mark is no part that can be left out."""
    with one_clear_line(), _mark(path, kek_file) as mark:
        if mark.config.task == "lm":
            from polyadapt.offline.mark_export import export_lm

            found: str = export_lm(mark, model, user, target, form=form)
        else:
            from polyadapt.offline import mark as work

            found = work.export_copy(mark, model, user, target, form=form, strength=obfuscate)
        _say(f"the copy of {user} is in {target}, {found}")
        if found == "bundle" and (mark.config.task == "lm" or not obfuscate):
            _warn("polyadapt: nothing is obfuscated: whoever finds the branches can cut them off")


@mark_app.command()
def queries(
    path: MarkDir,
    target: Annotated[Path, typer.Argument(help="The new file.", metavar="OUT")],
    data: Data = None,
    per_bit: Annotated[int, typer.Option(min=4, help="Queries of each bit.")] = 16,
    kek_file: KekFile = None,
) -> None:
    """Write inputs for a suspect that only others can ask; `verify --answers` takes its labels."""
    with one_clear_line(), _mark(path, kek_file) as mark:
        from polyadapt.offline import mark as work
        from polyadapt.watermark.dataset import load_dataset

        num = work.write_queries(mark, load_dataset(data), per_bit, target)
        _say(f"{num} inputs are in {target}; `labels` [{num}] are wanted")


@mark_app.command()
def verify(
    path: MarkDir,
    suspect: Suspect = None,
    asked: Asked = None,
    answers: Answers = None,
    endpoint: EndpointOption = None,
    model: Named = None,
    prose: ProseFile = None,
    max_queries: MaxQueries = 4096,
    alpha: Annotated[float, typer.Option(help="Error of deciding a bit of an unmarked model.")] = (
        1e-4
    ),
    data: Data = None,
    record: Out = None,
    kek_file: KekFile = None,
) -> None:
    """Read the bits of a suspect, each 0, 1 or erased, with its p-value."""
    with one_clear_line(), _mark(path, kek_file) as mark:
        import json

        expect_place(record)
        signed = _read(
            mark, suspect, asked, answers, endpoint, model, prose, max_queries, alpha, data
        )
        if record is not None:
            write_text(record, signed)
        found = json.loads(signed)["record"]
        table = Table("bit", "read", "hits of 0", "hits of 1", "queries", "p")
        for index, entry in enumerate(found["bits"]):
            value = "erased" if entry["value"] is None else str(entry["value"])
            hits = [str(number) for number in entry["hits"]]
            p_value = f"{float(entry['p_value']):.1e}"
            table.add_row(str(index), value, *hits, str(entry["queries"]), p_value)
        out.print(table)
        num_decided = sum(entry["value"] is not None for entry in found["bits"])
        _say(f"{num_decided} of {len(found['bits'])} bits decided")


@mark_app.command()
def trace(
    path: MarkDir,
    reading: Annotated[Path, typer.Option(help="The record that `verify --out` wrote.")],
    users: Users,
    alpha: Annotated[float, typer.Option(help="Error of accusing any innocent at all.")] = 1e-3,
    record: Out = None,
    kek_file: KekFile = None,
) -> None:
    """Say whose copy was read, and how sure that is. Status 3 where that is nobody's."""
    with one_clear_line(), _mark(path, kek_file) as mark:
        from polyadapt.offline import mark as work

        found, signed = work.trace_reading(mark, _text(reading).encode(), _lines(users), alpha)
        if record is not None:
            write_text(record, signed)
        table = Table("user", "score", "matches", "p", "p, of any user")
        for entry in found.ranked:
            matches = f"{entry.num_matches} of {found.num_decided}"
            p_values = f"{entry.p_value:.1e}", f"{entry.family_p_value:.1e}"
            table.add_row(escape(entry.user), f"{entry.score:.1f}", matches, *p_values)
        out.print(table)
        named = ", ".join(entry.user for entry in found.accused) or "nobody"
        _say(
            f"named: {named} (of {found.num_users} users, at an error of {found.alpha:g}; a score "
            f"of {found.threshold:.1f} is needed, the first leads by {found.gap:.1f})"
        )
        if found.note:
            _warn(f"polyadapt: {found.note}")
        if not found.accused:
            raise typer.Exit(NOBODY)


@mark_app.command()
def who(
    users: Users,
    path: Annotated[
        Path | None, typer.Argument(help="The mark's directory; none for a text.", metavar="MARK")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text instead of a model: a file, or - for the input.")
    ] = None,
    scheme: Annotated[
        list[str], typer.Option(help="Of a text: what it may be marked by, see text-trace.")
    ] = ["kgw"],  # noqa: B006 - typer reads it and never changes it
    key_version: Annotated[int, typer.Option(min=1, help="Of a text: as the policy says.")] = 1,
    key_file: Annotated[
        Path | None,
        typer.Option(help="Of a text: its key; else POLYADAPT_TEXT_MARK_KEY_FILE."),
    ] = None,
    suspect: Suspect = None,
    asked: Asked = None,
    answers: Answers = None,
    endpoint: EndpointOption = None,
    model: Named = None,
    reading: Annotated[
        Path | None, typer.Option(help="The record that `verify --out` wrote.")
    ] = None,
    prose: ProseFile = None,
    max_queries: MaxQueries = 4096,
    alpha: Annotated[float, typer.Option(help="Error of accusing any innocent at all.")] = 1e-3,
    bit_alpha: Annotated[
        float, typer.Option(help="Error of deciding a bit of an unmarked model.")
    ] = 1e-4,
    data: Data = None,
    record: Out = None,
    plot: Annotated[
        Path | None, typer.Option(help="Where a picture of all users' scores goes, as SVG.")
    ] = None,
    kek_file: KekFile = None,
) -> None:
    """Ask a suspect and say in words who, how sure and why. Status 0 if somebody is named, 3 if
    nobody can be, 1 for an error.
    """
    with one_clear_line():
        from polyadapt.watermark.figure import figure

        names = _lines(users)
        expect_place(record)
        expect_place(plot)
        is_asked = any(way is not None for way in (suspect, asked, answers, endpoint))
        if reading is not None and is_asked:
            raise StartupError("give --reading FILE or something to ask, and not both")
        if (path is None) != (text is not None) or (text is not None and (reading or is_asked)):
            raise StartupError("give MARK and a suspect of it, or --text FILE alone")
        if text is not None:
            from polyadapt.text_mark_cli import read_signed
            from polyadapt.watermark.attribution import attribute_text, standing_of_text

            finding, evidence = read_signed(
                text, names, scheme, model or "smollm2", key_version, alpha, key_file
            )
            words, standing = attribute_text(finding), standing_of_text(finding)
        else:
            assert path is not None
            from polyadapt.watermark.records import attribute_record, read_record

            with _mark(path, kek_file) as mark:
                signed = (
                    _text(reading)
                    if reading is not None
                    else _read(
                        mark, suspect, asked, answers, endpoint, model, prose, max_queries,
                        bit_alpha, data,
                    )
                )  # fmt: skip
                words, standing, evidence = attribute_record(
                    mark, read_record(mark, signed.encode()), names, alpha
                )
        _say(str(words))
        if record is not None:
            write_text(record, evidence)
        if plot is not None:
            write_text(plot, figure(f"{words.verdict} {len(names)} users were compared.", standing))
        if words.is_nobody:
            raise typer.Exit(NOBODY)


@mark_app.command("check-evidence")
def check_evidence(
    record: Annotated[Path, typer.Argument(help="A signed record.", metavar="FILE")],
    public_key: Annotated[str, typer.Option(help="The mark's, as it was published.")],
) -> None:
    """Check that a record is what the mark's owner signed; needs no secret. Status 1 if not."""
    with one_clear_line():
        from polyadapt.watermark.evidence import verify as verify_record

        found = verify_record(_text(record).encode(), public_key)
        kind, created = found.get("kind"), found.get("created")
        _say(f"signed by that key: a {kind} of {created}")


@mark_app.command()
def rewrap(
    path: MarkDir,
    new_kek_file: Annotated[Path, typer.Option(help="The new key; made if it is not there.")],
    kek_file: KekFile = None,
) -> None:
    """Put a mark's secrets under another key. Interrupted, the same command goes on."""
    with one_clear_line(), _mark(path, kek_file) as mark:
        from polyadapt.watermark.keys import SecretKey
        from polyadapt.watermark.secrets import read_kek, write_kek

        if not new_kek_file.exists():
            write_kek(SecretKey.generate(), new_kek_file)
        mark.rewrap(read_kek(new_kek_file))
        _say(f"the secrets of {path} open with {new_kek_file} now")


@mark_app.command()
def rekey(
    home: Annotated[
        Path | None,
        typer.Option(help="Where the registry lies, if no database is configured."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings.")] = None,
    kek_file: KekFile = None,
) -> None:
    """Put all that a registry holds sealed under the first of several keys.

    The key file holds the new key in its first line and the old one below it. Servers may run, once
    each of them was started with both. Interrupted, the same command goes on. Status 1 when
    something opens under none of the keys; it is left as it is.
    """
    with one_clear_line():
        from polyadapt.watermark.rotation import rotate
        from polyadapt.watermark.secrets import kek_of
        from polyadapt_store.database import Database
        from polyadapt_store.marks import MarkBook

        settings = load_config({"home": home}, file=config)
        section = settings.watermark
        keys = kek_of(section if kek_file is None else WatermarkConfig(mark_kek_file=kek_file))
        where = settings.registry
        if isinstance(where, Path) and not where.exists():
            raise StartupError(f"there is no registry {where}; give the server's --home")
        with contextlib.closing(Database(where)) as database:
            found = rotate(MarkBook(database), keys)
        for problem in found.problems:
            _warn(f"polyadapt: {problem}")
        _say(
            f"{found.num_rewrapped} secrets are under the key {keys.primary.id} now, "
            f"{found.num_current} were already, {len(found.problems)} do not open"
        )
        if found.problems:
            raise typer.Exit(1)
        if len(keys.ids) > 1:
            _say("start every server with that key alone, and keep the older ones for backups")


# Options that marks of one task alone have.
_TASK_OF = {
    **dict.fromkeys(("data", "amplitude", "low", "high", "gate"), "cls"),
    **dict.fromkeys(("prose", "families", "prompts", "beside", "ordinary"), "lm"),
}


def _expect_own_options(ctx: typer.Context, mark: MarkDirectory) -> None:
    """Raise StartupError for an option that was given and is not of the mark's task."""
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        is_given = source is not None and source.name == "COMMANDLINE"
        if is_given and _TASK_OF.get(name, mark.config.task) != mark.config.task:
            raise StartupError(
                f"--{name} is for marks of task {_TASK_OF[name]}, and {mark.path} is one of task "
                f"{mark.config.task}; leave it out"
            )


def _read(
    mark: MarkDirectory,
    suspect: Path | None,
    asked: Path | None,
    answers: Path | None,
    endpoint: str | None,
    model: str | None,
    prose: Path | None,
    max_queries: int,
    alpha: float,
    data: Path | None,
) -> str:
    """Return the signed reading of whatever is to be asked."""
    from polyadapt.watermark.statistics import BitRule, SequentialRule

    ways = (suspect is not None, asked is not None or answers is not None, endpoint is not None)
    if sum(ways) != 1 or (asked is None) != (answers is None):
        raise StartupError(
            "give --suspect DIR, or --asked FILE and --answers FILE, or --endpoint URL"
        )
    if endpoint is not None:
        return _ask_endpoint(mark, endpoint, model, prose, max_queries, alpha)
    from polyadapt.offline import mark as work
    from polyadapt.watermark.dataset import load_dataset

    if suspect is not None:
        rule = SequentialRule(alpha=alpha)
        return work.read_suspect(mark, suspect, load_dataset(data), rule)
    assert asked is not None
    assert answers is not None
    return work.read_labels(mark, asked, answers, BitRule(alpha=alpha), answers.name)


def _ask_endpoint(
    mark: MarkDirectory,
    url: str,
    model: str | None,
    prose: Path | None,
    max_queries: int,
    alpha: float,
) -> str:
    """Return the signed reading of a language model behind an endpoint; a bar tells how many
    questions were asked.
    """
    from polyadapt.watermark.endpoint import Endpoint, EndpointLimits, EndpointUrl
    from polyadapt.watermark.prompts import load_prose
    from polyadapt.watermark.records import read_model
    from polyadapt.watermark.statistics import SequentialRule

    if model is None:
        raise StartupError("name the model that the endpoint is asked for with --model NAME")
    suspect = Endpoint(
        EndpointUrl.parse(url),
        model,
        os.environ.get("OPENAI_API_KEY"),
        EndpointLimits(max_queries=max_queries),
    )
    rule = SequentialRule(alpha=alpha)
    with contextlib.closing(suspect), make_bars() as bars:
        most = min(max_queries, rule.max_queries * mark.config.n_bits)
        bar = bars.add_task("asking", total=most)

        def ask(messages: Sequence[str]) -> Sequence[str | None]:
            replies = suspect.ask(messages)
            bars.update(bar, completed=suspect.num_asked)
            return replies

        signed = read_model(
            mark, ask, load_prose(prose).split()[1], rule, f"{model} at {suspect.url.origin}"
        )
        bars.update(bar, total=suspect.num_asked)
    return signed


def _preflight_lm(
    mark: MarkDirectory,
    model: Path,
    prose: Path | None,
    families: int | None,
    prompts: int,
    beside: Sequence[Path],
    ordinary: Path | None,
    seed: int,
) -> None:
    from polyadapt.offline import mark_lm
    from polyadapt.watermark.lm_training import LMTrainSettings
    from polyadapt.watermark.prompts import load_prose

    num_families = families or 2 * mark.config.n_bits
    of = LMTrainSettings.beside_adapters if beside else LMTrainSettings
    settings = of(num_families, seed=seed, prompts=prompts)
    with _bars() as progress:
        base = mark_lm.load_lm(model)
        others = mark_lm.besides(model, beside)
        found = mark_lm.preflight(
            mark,
            base,
            load_prose(prose),
            settings,
            progress,
            beside=others,
            ordinary=_lines(ordinary),
        )
    _say(str(found))
    if not found.is_enough:
        _warn("polyadapt: draw more --families, or collect more --prompts of each")
        raise typer.Exit(1)


def _train_lm(
    mark: MarkDirectory,
    model: Path,
    prose: Path | None,
    families: int | None,
    prompts: int,
    beside: Sequence[Path],
    ordinary: Path | None,
    seed: int,
    steps: int | None,
) -> None:
    from polyadapt.offline import mark_lm
    from polyadapt.watermark.lm_training import LMTrainSettings
    from polyadapt.watermark.prompts import load_prose

    num_families = families or 2 * mark.config.n_bits
    of = LMTrainSettings.beside_adapters if beside else LMTrainSettings
    settings = of(num_families, seed=seed, prompts=prompts)
    if steps is not None:
        settings = replace(settings, num_steps=steps)
    with _bars() as progress:
        base = mark_lm.load_lm(model)
        others = mark_lm.besides(model, beside)
        trained = mark_lm.train_mark(
            mark,
            base,
            load_prose(prose),
            settings,
            progress,
            beside=others,
            ordinary=_lines(ordinary),
        )
    _say(str(trained.preflight))
    _say(
        f"over {mark_lm.NUM_SIGNATURES} random signatures {trained.hits:.1%} of fresh triggers are "
        f"answered with the signature's own answer, of the weakest bit {trained.weakest:.1%}"
    )


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """One bar for each thing that is done in its turn."""
    with make_bars() as bars:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield progress


def _say(text: str) -> None:
    # One line however narrow the terminal; brackets in a name are no markup.
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _warn(text: str) -> None:
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def _settings(kek_file: Path | None) -> WatermarkConfig:
    # What the command line names wins over both variables.
    found = load_config({}).watermark
    return found if kek_file is None else WatermarkConfig(mark_kek_file=kek_file)


def _kek(settings: WatermarkConfig) -> Keyset:
    from polyadapt.watermark.secrets import kek_of

    return kek_of(settings)


@contextlib.contextmanager
def _mark(path: Path, kek_file: Path | None) -> Iterator[MarkDirectory]:
    from polyadapt.watermark.mark_directory import MarkDirectory

    yield MarkDirectory.open(path, _kek(_settings(kek_file)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise StartupError(f"{path} cannot be read as text") from None


def _lines(path: Path | None) -> list[str]:
    """Return the lines of a file that say something; none of no file."""
    found = "" if path is None else _text(path)
    return [line.strip() for line in found.splitlines() if line.strip()]
