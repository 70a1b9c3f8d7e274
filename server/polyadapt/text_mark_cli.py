"""The commands of `polyadapt mark` about texts. Light: what one needs is imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from polyadapt.config import WatermarkConfig, load_config
from polyadapt.console import err, one_clear_line, out, write_text
from polyadapt.errors import StartupError

if TYPE_CHECKING:
    from polyadapt.types import MarkSettings
    from polyadapt.watermark.keys import SecretKey
    from polyadapt.watermark.text_reading import TextFinding

KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file", help="The key that texts are marked with; else POLYADAPT_TEXT_MARK_KEY_FILE."
    ),
]
TextFile = Annotated[Path, typer.Argument(help="A file of UTF-8.", metavar="TEXT")]
Model = Annotated[str, typer.Option(help="Whose tokenizer: a directory, a hub id or smollm2.")]
Scheme = Annotated[
    list[str],
    typer.Option(
        help="What the text may be marked by: kgw[:WIDTH[:RATIO]], synthid[:WIDTH[:DEPTH]] or "
        "gumbel[:WIDTH]; several are tried, and counted."
    ),
]
KeyVersion = Annotated[int, typer.Option(min=1, help="As the policy says.")]
Alpha = Annotated[float, typer.Option(help="Chance of naming any innocent at all.")]
NOBODY = 3  # status of the commands that name somebody, where nobody can be named
_NUM_SHOWN = 10  # of the users, best first
Out = Annotated[Path | None, typer.Option("--out", help="Where the signed record goes.")]


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("text-keygen")(text_keygen)
    app.command("text-detect")(text_detect)
    app.command("text-trace")(text_trace)


def text_keygen(
    path: Annotated[Path, typer.Argument(help="The new file; keep a copy.", metavar="FILE")],
) -> None:
    """Make the key that texts are marked with; without it no text is read again."""
    with one_clear_line():
        from polyadapt.watermark.keys import SecretKey
        from polyadapt.watermark.secrets import write_kek
        from polyadapt.watermark.text_reading import signer_of

        key = SecretKey.generate()
        write_kek(key, path)
        _say(f"the key {key.id} is in {path}: start servers with POLYADAPT_TEXT_MARK_KEY_FILE")
        _say(f"findings are checked with the public key {signer_of(key).public_key}")


def text_detect(
    path: TextFile,
    user: Annotated[str, typer.Option(help="An API key's id.")],
    scheme: Scheme = ["kgw"],  # noqa: B006 - typer reads it and never changes it
    model: Model = "smollm2",
    key_version: KeyVersion = 1,
    alpha: Alpha = 1e-3,
    record: Out = None,
    key_file: KeyFile = None,
) -> None:
    """Say whether one user's key marked a text. Status 3 if not."""
    with one_clear_line():
        _show(_read(path, [user], scheme, model, key_version, alpha, record, key_file))


def text_trace(
    path: TextFile,
    users: Annotated[Path, typer.Option(help="A text file: an API key's id a line.")],
    scheme: Scheme = ["kgw"],  # noqa: B006 - typer reads it and never changes it
    model: Model = "smollm2",
    key_version: KeyVersion = 1,
    alpha: Alpha = 1e-3,
    record: Out = None,
    key_file: KeyFile = None,
) -> None:
    """Say which of all users' keys marked a text. Status 3 where none did."""
    with one_clear_line():
        names = [line.strip() for line in _text(users).splitlines() if line.strip()]
        _show(_read(path, names, scheme, model, key_version, alpha, record, key_file))


def parse_scheme(text: str, key_version: int) -> MarkSettings:
    """Return the settings of kgw[:WIDTH[:RATIO]], synthid[:WIDTH[:DEPTH]] or gumbel[:WIDTH];
    raises StartupError.
    """
    from polyadapt.types import MarkSettings

    name, *rest = text.split(":")
    try:
        width = int(rest[0]) if rest else {"kgw": 2}.get(name, 4)
        if name == "kgw" and len(rest) <= 2:
            ratio = float(rest[1]) if len(rest) > 1 else 0.25
            return MarkSettings("kgw", width, ratio=ratio, key_version=key_version)
        if name == "synthid" and len(rest) <= 2:
            depth = int(rest[1]) if len(rest) > 1 else 12
            return MarkSettings("synthid", width, depth=depth, key_version=key_version)
        if name == "gumbel" and len(rest) <= 1:
            return MarkSettings("gumbel", width, key_version=key_version)
    except ValueError:
        pass
    raise StartupError(
        f"--scheme {text!r} is none of kgw[:WIDTH[:RATIO]], synthid[:WIDTH[:DEPTH]], gumbel[:WIDTH]"
    )


def _read(
    path: Path,
    users: Sequence[str],
    schemes: Sequence[str],
    model: str,
    key_version: int,
    alpha: float,
    record: Path | None,
    key_file: Path | None,
) -> TextFinding:
    found, signed = read_signed(path, users, schemes, model, key_version, alpha, key_file)
    if record is not None:
        write_text(record, signed)
    return replace(found, ranked=found.ranked[: max(_NUM_SHOWN, len(found.accused))])


def read_signed(
    path: Path,
    users: Sequence[str],
    schemes: Sequence[str],
    model: str,
    key_version: int,
    alpha: float,
    key_file: Path | None,
) -> tuple[TextFinding, str]:
    """Return what is found of a text, with every user ranked, and its signed record, which has the
    first of them. The path - is standard input.
    """
    from polyadapt.models.fetch import resolve_model
    from polyadapt.tasks.tokenizer import Tokenizer
    from polyadapt.watermark.text_reading import read_text, sign_finding

    config = load_config({})
    master = _master(config.watermark, key_file)
    text = _text(path)
    directory = resolve_model(model, config.home)
    tokens = Tokenizer.load(directory).encode(text, add_special_tokens=False)
    settings = [parse_scheme(scheme, key_version) for scheme in schemes]
    found = read_text(master, settings, users, tokens, alpha=alpha, num_shown=len(users))
    shown = replace(found, ranked=found.ranked[: max(_NUM_SHOWN, len(found.accused))])
    return found, sign_finding(master, shown, text, f"the tokenizer of {directory.name}")


def _master(config: WatermarkConfig, key_file: Path | None) -> SecretKey:
    from polyadapt.watermark.secrets import read_kek, text_master_of

    found = text_master_of(config) if key_file is None else read_kek(key_file)
    if found is None:
        raise StartupError(
            "no key to read texts with; give --key-file FILE, or set POLYADAPT_TEXT_MARK_KEY_FILE"
        )
    return found


def _show(found: TextFinding) -> None:
    table = Table("user", "scheme", "scored", "score", "expected", "z", "p", "p, of any user")
    for one in found.ranked:
        reading = one.reading
        numbers = f"{reading.score:.0f}", f"{reading.expected:.0f}", f"{reading.z:.1f}"
        p_values = f"{one.p_value:.1e}", f"{one.family_p_value:.1e}"
        scored = str(reading.num_scored)
        table.add_row(escape(one.user), one.settings.scheme, scored, *numbers, *p_values)
    out.print(table)
    named = ", ".join(one.user for one in found.accused) or "nobody"
    _say(
        f"named: {named} (of {found.num_users} users, {found.num_tokens} tokens, at an error of "
        f"{found.alpha:g})"
    )
    if found.is_nobody:
        err.print(
            "polyadapt: nobody can be named at this error; that is not that nobody wrote it",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(NOBODY)


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _text(path: Path) -> str:
    try:
        if path == Path("-"):
            return sys.stdin.read()
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise StartupError(f"{path} cannot be read as text") from None
