"""Imports run one way, and start-up loads nothing heavy.

launch -> llm, batch -> scheduler, runner -> models -> moe, layers -> ops; config is a leaf, and
distributed uses no more than it and ops; profiling is called by all and imports none of them.
interop serves other frameworks' models, and nothing imports it. A module that no table names
belongs to the application: it may import everything below it, and nothing below may import it.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# unit: the units that it may import, besides itself
ALLOWED = {
    "config": set(),
    "ops": set(),
    "profiling": set(),
    "request": set(),
    "distributed": {"config", "ops"},
    "weights": {"distributed"},
    "layers": {"config", "distributed", "ops", "profiling", "weights"},
    "moe": {"config", "distributed", "layers", "ops", "profiling"},
    "models": {"config", "distributed", "layers", "moe", "ops", "profiling", "weights"},
    "interop": {"config", "distributed", "moe", "ops", "profiling"},
    "scheduler": {"config", "ops", "request"},
}
UNIT_OF_MODULE = {
    **dict.fromkeys(("config_check", "config_io", "config_world", "preflight"), "config"),
    **dict.fromkeys(("safetensors_file", "weight_reader"), "weights"),
    **dict.fromkeys(("sequence", "kv_cache", "sampler", "detokenizer"), "scheduler"),
}
APPLICATION = "application"


def module_files() -> dict[str, Path]:
    files = (file for file in (ROOT / "engine").rglob("*.py") if "ops" not in file.parts)
    modules = {name_of(file.relative_to(ROOT)): file for file in files}
    kernels = (ROOT / "kernels").glob("*.py")
    return {**modules, **{f"engine.ops.{file.stem}": file for file in kernels}}


def name_of(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


MODULES = module_files()


def imports_of(file: Path) -> Iterator[str]:
    """Every module of the engine that a file imports, inside functions and type checks too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write it from engine"
            # In `from engine.ops import native` the name is a module, in others it stands in one.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in names]
        else:
            continue
        yield from (name for name in names if name.startswith(("engine.", "kernels")))


def unit_of(module: str) -> str:
    head = [*module.split("."), ""][1]
    return UNIT_OF_MODULE.get(head, head if head in ALLOWED else APPLICATION)


def test_the_table_knows_the_units_that_exist():
    found = {unit_of(module) for module in MODULES}
    assert set(ALLOWED) <= found, f"units without a module: {set(ALLOWED) - found}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module):
    unit = unit_of(module)
    for imported in imports_of(MODULES[module]):
        assert not imported.startswith("kernels"), f"{module}: import {imported} as engine.ops"
        if unit != "interop":
            assert unit_of(imported) != "interop", f"{module} imports {imported}"
        if unit != APPLICATION:
            assert unit_of(imported) in ALLOWED[unit] | {unit}, f"{module} imports {imported}"


def test_no_engine_modules_import_each_other_in_a_circle():
    graph = {module: set(imports_of(file)) - {module} for module, file in MODULES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(MODULES) <= set(order)


def test_only_batch_and_scripts_stand_on_llm_and_only_scripts_on_batch():
    for module, file in MODULES.items():
        head = module.partition(".")[2]
        for imported in imports_of(file):
            if imported == "engine.batch.run":
                assert head.startswith("cli"), f"{module} imports {imported}"
            if imported == "engine.llm":
                assert head.startswith(("batch", "cli", "serve")), f"{module} imports {imported}"


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


HEAVY = {"deepspeed", "megatron", "transformer_engine", "mpi4py"}


def test_import_engine_loads_nothing_heavy():
    loaded = modules_after("import engine")
    assert "engine" in loaded
    assert not loaded & (HEAVY | {"transformers", "torch"})


def test_start_up_loads_no_package_that_only_some_runs_need():
    assert not modules_after("import engine.batch.run, engine.llm") & HEAVY


def test_interop_loads_no_framework_before_it_is_asked_to():
    assert not modules_after("import engine.interop.megatron") & HEAVY


def test_no_module_outside_interop_loads_a_heavy_package_when_imported():
    names = [
        name for name in MODULES if not name.startswith(("engine.interop", "engine.ops.build"))
    ]
    imports = "\n".join(f"importlib.import_module({name!r})" for name in names)
    assert not modules_after(f"import importlib\n{imports}") & HEAVY
