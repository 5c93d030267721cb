"""Imports run one way, and start-up loads nothing heavy.

A unit is a folder of engine/, or a module directly in it. A unit imports units of lower
floors only. Nothing imports interop, which serves other frameworks' models, and other programs
with this engine.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the top. Units of one floor do not import each other.
FLOORS = (
    {"batch", "interop", "simulate"},
    {"llm", "doctor", "model_check"},
    {"reporting"},
    {"generation"},
    {"models"},
    {"moe"},
    {"layers"},
    {"weights"},
    {"distributed", "request"},
    {"profiling", "config", "ops"},
)
FLOOR_OF = {unit: number for number, floor in enumerate(FLOORS) for unit in floor}
# Inside a unit: a folder, and what it does not import.
INSIDE = {"moe.dispatch": "moe.capacity", "distributed": "distributed.health"}


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
            # In `from engine.ops import native` the name is a module, in others it is in one.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("engine", "kernels"))


def unit_of(module: str) -> str:
    return module.split(".")[1]


def folder_of(module: str) -> str:
    """The folder below engine/, of a package itself its own: moe.capacity."""
    inner = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    return inner.partition(".")[2]


UNITS = sorted(module for module in MODULES if module != "engine")


def test_every_unit_has_a_floor_and_every_floor_its_units():
    assert {unit_of(module) for module in UNITS} == set(FLOOR_OF)


@pytest.mark.parametrize("module", UNITS)
def test_imports_run_one_way(module):
    unit, folder = unit_of(module), folder_of(module)
    for imported in imports_of(MODULES[module]):
        assert not imported.startswith("kernels"), f"{module}: import {imported} as engine.ops"
        if imported == "engine":  # for where its files are; `engine` itself imports nothing
            assert module == "engine.ops.native", f"{module}: import from the module that has it"
            continue
        below = FLOOR_OF[unit] < FLOOR_OF[unit_of(imported)]
        assert below or unit == unit_of(imported), f"{module} imports {imported}"
        if unit != "interop":
            assert unit_of(imported) != "interop", f"{module} imports {imported}"
        if folder in INSIDE:
            assert folder_of(imported) != INSIDE[folder], f"{module} imports {imported}"


def test_no_engine_modules_import_each_other_in_a_circle():
    # `engine` loads what it offers when it is asked for: no module waits for it.
    graph = {m: set(imports_of(file)) - {m, "engine"} for m, file in MODULES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(MODULES) <= set(order)


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


HEAVY = {"deepspeed", "megatron", "transformer_engine", "mpi4py"}


def test_import_engine_loads_nothing_heavy():
    loaded = modules_after("import engine")
    assert "engine" in loaded
    assert not loaded & (HEAVY | {"transformers", "torch", "numpy", "yaml"})
    modules_after("import engine; assert not [m for m in sys.modules if m.startswith('engine.')]")


def test_what_engine_offers_is_what_its_modules_have_and_is_loaded_when_asked_for():
    loaded = modules_after("from engine import Completion, SamplingParams, load_config")
    assert not loaded & (HEAVY | {"transformers", "torch"})
    import engine
    from engine.config.loader import load_config
    from engine.llm import LLM
    from engine.request import Completion, SamplingParams

    assert engine.__all__ == ["LLM", "Completion", "SamplingParams", "load_config"]
    offered = [getattr(engine, name) for name in engine.__all__]
    assert offered == [LLM, Completion, SamplingParams, load_config]
    assert set(engine.__all__) <= set(dir(engine))
    with pytest.raises(AttributeError, match="'engine' has no attribute 'Llm'"):
        engine.Llm  # noqa: B018


def test_the_command_line_is_parsed_before_anything_slow_is_loaded():
    """torchrun's agent may die while a rank imports torch, and --help answers at once."""
    loaded = modules_after(
        'sys.path.insert(0, "launch"); import lockstep.cli; lockstep.cli.command_parser()'
    )
    assert not loaded & (HEAVY | {"transformers", "torch", "numpy"})


def test_start_up_loads_no_package_that_only_some_runs_need():
    assert not modules_after("import engine.batch.run, engine.llm") & HEAVY


def test_interop_loads_no_framework_before_it_is_asked_to():
    assert not modules_after("import engine.interop.megatron") & HEAVY
    assert "transformers" not in modules_after("import engine.interop.transformers_ep")


def test_no_module_outside_interop_loads_a_heavy_package_when_imported():
    names = [
        name for name in MODULES if not name.startswith(("engine.interop", "engine.ops.build"))
    ]
    imports = "\n".join(f"importlib.import_module({name!r})" for name in names)
    assert not modules_after(f"import importlib\n{imports}") & HEAVY
