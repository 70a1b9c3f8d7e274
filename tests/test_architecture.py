"""The house's shape: imports point down only, what is torch-free stays so, no unsafe call is used.

Read from the source by AST, and proven by importing in a fresh interpreter.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVER = ROOT / "server" / "polyadapt"
STORE = ROOT / "adapters_store" / "polyadapt_store"

# From the top to the bottom; a module may import its own layer and lower ones. The leaves that
# everyone may use come last. `demo` is packaged data with its list.
LAYERS = (
    (
        "polyadapt.__main__",
        "polyadapt.cli",
        "polyadapt.mark_cli",
        "polyadapt.text_mark_cli",
        "polyadapt.console",
    ),
    ("polyadapt.offline",),
    ("polyadapt.ray_serve",),
    ("polyadapt.serve",),
    ("polyadapt.app",),
    ("polyadapt.api",),
    ("polyadapt.tasks",),
    ("polyadapt.engine",),
    ("polyadapt.adapters",),
    ("polyadapt.models",),
    ("polyadapt.ops",),
    ("polyadapt.watermark",),
    ("polyadapt_store",),
    (
        "polyadapt.types",
        "polyadapt.errors",
        "polyadapt.config",
        "polyadapt.demo",
        "polyadapt.distribution",
        "polyadapt.logs",
    ),
)

# Modules of these may not bring torch into the process, whoever imports them.
TORCH_FREE = (
    "polyadapt",
    "polyadapt.types",
    "polyadapt.errors",
    "polyadapt.config",
    "polyadapt.demo",
    "polyadapt.distribution",
    "polyadapt.logs",
    "polyadapt.cli",
    "polyadapt.console",
    "polyadapt.mark_cli",
    "polyadapt.text_mark_cli",
    "polyadapt.__main__",
    "polyadapt.serve",
    "polyadapt.app",
    "polyadapt.api",
    "polyadapt.tasks",
    "polyadapt.adapters.adapter",
    "polyadapt.adapters.families",
    "polyadapt.adapters.gates",
    "polyadapt.adapters.registry",
    "polyadapt.adapters.validator",
    "polyadapt.engine.client",
    "polyadapt.engine.fleet",
    "polyadapt.engine.process",
    "polyadapt.engine.remaining",
    "polyadapt.engine.request",
    "polyadapt.engine.routing",
    "polyadapt.engine.scheduler",
    "polyadapt.engine.stats",
    "polyadapt.models.fetch",
    "polyadapt.ray_serve.board",
    "polyadapt.ray_serve.fleet",
    "polyadapt.ray_serve.scaling",
    "polyadapt.ray_serve.settings",
    "polyadapt.watermark.codebook",
    "polyadapt.watermark.dataset",
    "polyadapt.watermark.endpoint",
    "polyadapt.watermark.evidence",
    "polyadapt.watermark.keys",
    "polyadapt.watermark.keyset",
    "polyadapt.watermark.mark_directory",
    "polyadapt.watermark.preflight",
    "polyadapt.watermark.prf",
    "polyadapt.watermark.prompts",
    "polyadapt.watermark.queries",
    "polyadapt.watermark.reading",
    "polyadapt.watermark.records",
    "polyadapt.watermark.rotation",
    "polyadapt.watermark.rows",
    "polyadapt.watermark.secrets",
    "polyadapt.watermark.statistics",
    "polyadapt.watermark.text",
    "polyadapt.watermark.text_reading",
    "polyadapt.watermark.trace",
    "polyadapt.watermark.triggers",
    "polyadapt.watermark.veto",
    "polyadapt_store",
)

# Standard library and pydantic only, besides each other (config reads YAML).
LEAVES = {
    "types": set(),
    "errors": set(),
    "config": {"pydantic", "pydantic_settings", "yaml"},
    "distribution": set(),
    "logs": set(),
}

# Scripts that another program runs and nobody imports.
SCRIPTS = {"polyadapt.__main__", "polyadapt_store.migrations.env"}

# Attribute chains and names that may not appear: they run what a stranger wrote, or break streams.
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "np.load"}
# Opens pickles for `polyadapt convert`, as bare tensors; no server imports it, as layers go.
READS_PICKLES = "polyadapt.offline.pickled"
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_NAMES = {"BaseHTTPMiddleware"}


def module_of(path: Path) -> str:
    package = SERVER.parent if path.is_relative_to(SERVER) else STORE.parent
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_of(path): path for root in (SERVER, STORE) for path in sorted(root.rglob("*.py"))}


def imports_of(module: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every module that is imported anywhere in the file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name in SOURCES else node.module), node.lineno


def layer_of(module: str) -> int | None:
    if module in ("polyadapt", "polyadapt._version"):
        return len(LAYERS)
    for index, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return index
    return None


def is_torch_free(module: str) -> bool:
    exact = {"polyadapt", "polyadapt.adapters"}
    return any(
        module == name or (name not in exact and module.startswith(name + "."))
        for name in TORCH_FREE
    )


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down_only(module):
    own = layer_of(module)
    assert own is not None, f"{module} belongs to no layer; add it to LAYERS"
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    for imported, line in imports_of(module, tree):
        if imported.partition(".")[0] not in ("polyadapt", "polyadapt_store"):
            continue
        other = layer_of(imported)
        assert other is not None, f"{module}:{line} imports {imported}, which is in no layer"
        assert other >= own, f"{module}:{line} imports {imported} from a layer above"


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_unsafe_is_used(module):
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    for imported, line in imports_of(module, tree):
        assert imported.partition(".")[0] not in FORBIDDEN_MODULES, f"{module}:{line} {imported}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_bare = called == "torch.load" and given.get("weights_only") == "True"
            assert called not in FORBIDDEN_CALLS or (is_bare and module == READS_PICKLES), (
                f"{module}:{node.lineno} calls {called}"
            )
            assert not any(
                keyword.arg == "weights_only" and ast.unparse(keyword.value) == "False"
                for keyword in node.keywords
            ), f"{module}:{node.lineno} loads a pickle"
        name = getattr(node, "id", getattr(node, "attr", getattr(node, "name", None)))
        assert name not in FORBIDDEN_NAMES, f"{module}:{getattr(node, 'lineno', '?')} uses {name}"


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_import_the_standard_library_and_pydantic_only(name):
    module = f"polyadapt.{name}"
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    for imported, line in imports_of(module, tree):
        top = imported.partition(".")[0]
        is_allowed = top in sys.stdlib_module_names or top in LEAVES[name]
        is_leaf = imported in {f"polyadapt.{leaf}" for leaf in LEAVES}
        assert is_allowed or is_leaf, f"{module}:{line} imports {imported}"


def test_torch_free_modules_bring_no_torch_into_the_process():
    """One interpreter imports them one by one, so that the first guilty one is named."""
    modules = [module for module in SOURCES if is_torch_free(module) and module not in SCRIPTS]
    assert len(modules) > 20
    program = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
    heavy = {{"torch", "transformers", "peft"}} & set(sys.modules)
    if heavy:
        sys.exit(f"{{module}} imports {{sorted(heavy)}}")
"""
    assert_runs(sys.executable, "-W", "error", "-c", program)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["model", "--help"], ["mark", "--help"]]
)
def test_the_command_line_help_imports_no_torch(arguments):
    program = f"""
import sys
sys.argv = ["polyadapt", *{arguments!r}]
from polyadapt.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert not {{"torch", "transformers"}} & set(sys.modules), "the help imports torch"
"""
    output = assert_runs(sys.executable, "-c", program)
    assert "Usage" in output


def test_a_violation_would_be_seen():
    """The checks read what they claim to: imports inside functions and of names count too."""
    tree = ast.parse(
        "def late():\n    from polyadapt.engine import client\n    import polyadapt.api\n"
    )
    found = {name for name, _ in imports_of("polyadapt.models.x", tree)}
    assert found == {"polyadapt.engine.client", "polyadapt.api"}
    assert layer_of("polyadapt.api") < layer_of("polyadapt.models.load")
    assert layer_of("polyadapt.unknown") is None
    with pytest.raises(AssertionError, match="ended with"):
        assert_runs(sys.executable, "-c", "import torch, sys; sys.exit('torch' in sys.modules)")


def assert_runs(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout
