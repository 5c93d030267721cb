"""setup.py, Makefile and .ci: what is installed, from where, and that the pins agree."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
SOURCES += ("engine", "kernels", "launch", "configs")


@pytest.fixture(scope="module")
def declared() -> dict:
    """The arguments that setup.py gives to setuptools, without building anything."""
    arguments = {}
    real_setup, real_folder = setuptools.setup, os.getcwd()
    setuptools.setup = lambda **given: arguments.update(given)
    os.environ["LOCKSTEP_NATIVE"] = "0"
    try:
        os.chdir(ROOT)
        code = compile((ROOT / "setup.py").read_text(), "setup.py", "exec")
        exec(code, {"__file__": str(ROOT / "setup.py"), "__name__": "__main__"})
    finally:
        setuptools.setup = real_setup
        os.chdir(real_folder)
        del os.environ["LOCKSTEP_NATIVE"]
    return arguments


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[set[str], Path]:
    """The file names in a source distribution, and a wheel that was built from it."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    # Native kernels take minutes to compile and are another test's subject.
    environ = {**os.environ, "LOCKSTEP_NATIVE": "0"}

    def run(where: Path, *arguments: str) -> None:
        command = [sys.executable, "setup.py", "-q", *arguments, "--dist-dir", str(folder)]
        result = subprocess.run(command, cwd=where, env=environ, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    run(source, "sdist")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        sdist = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(unpacked, "bdist_wheel")
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The bin folder of a new environment: the wheel, and the dependencies of this Python."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    paths = subprocess.check_output([python, "-c", SITE], text=True).strip()
    # A path that a .pth file names has its own .pth files ignored, so no checkout is found.
    dependencies = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (Path(paths) / "dependencies.pth").write_text("\n".join(dependencies))
    install = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*install, "--ignore-installed", str(built[1])], check=True)
    return python.parent


def test_kernels_is_no_package_and_engine_ops_links_to_it():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "engine" / "ops") == "../kernels"


def test_the_wheel_holds_every_module_and_nothing_else_at_the_top(built):
    wheel = set(zipfile.ZipFile(built[1]).namelist())
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "engine").rglob("*.py")}
    modules |= {f"engine/ops/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    assert modules <= wheel
    tops = {name.partition("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "engine",
        "lockstep",
    }


def test_the_wheel_holds_what_the_bundled_configs_need(built):
    wheel = set(zipfile.ZipFile(built[1]).namelist())
    configs = [file.name for file in (ROOT / "configs").glob("*.yaml")]
    assert configs and {f"lockstep/configs/{name}" for name in configs} <= wheel
    for model in (ROOT / "configs" / "checkpoints").glob("*/config.json"):
        held = f"lockstep/configs/checkpoints/{model.parent.name}"
        assert {f"{held}/{name}" for name in ("config.json", "model.safetensors")} <= wheel
    assert not [name for name in wheel if "/eval/" in name], "data that only tools read"


def run_installed(where: Path, *command: str | Path) -> str:
    """What a command prints, run outside of the checkout."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = list(map(str, command))
    done = subprocess.run(words, cwd=where, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_offers_both_names_and_loads_nothing_for_it(installed, tmp_path):
    code = (
        "import sys, engine, lockstep\n"
        "assert 'torch' not in sys.modules\n"
        "from lockstep import LLM, Completion, SamplingParams, load_config\n"
        "assert LLM is engine.LLM and load_config is engine.load_config\n"
        "assert load_config('tiny_mixtral').model.path.endswith('checkpoints/tiny_mixtral')\n"
        "assert dir(lockstep) and lockstep.__all__ == engine.__all__\n"
        "print(engine.__file__, lockstep.__file__)"
    )
    files = run_installed(tmp_path, installed / "python", "-c", code).split()
    assert [Path(file).is_relative_to(installed.parent) for file in files] == [True, True]


@pytest.mark.slow
def test_the_help_of_an_installed_wheel_explains_set_and_names_the_configuration(
    installed, tmp_path
):
    assert "infer" in run_installed(tmp_path, installed / "lockstep", "--help")
    text = " ".join(run_installed(tmp_path, installed / "lockstep", "infer", "--help").split())
    assert "usage: lockstep infer" in text
    assert "--set KEY=VALUE change one setting of the config" in text
    assert "docs/configuration.md" in text


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        ("lockstep",),
        ("python", "-m", "lockstep"),
        pytest.param(("python", *TORCHRUN, "-m", "lockstep"), marks=pytest.mark.long),
        ("python", *TORCHRUN, "--no-python", "lockstep"),
    ],
    ids=["script", "module", "torchrun -m", "torchrun --no-python"],
)
def test_an_installed_wheel_completes_a_file_of_requests(installed, tmp_path, monkeypatch, start):
    monkeypatch.setenv("PATH", f"{installed}:{os.environ['PATH']}")
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"id": "a", "prompt": "def main():", "max_tokens": 2}\n')
    files = ["--input", requests, "--output", tmp_path / "out.jsonl"]
    config = ["--config", "tiny_mixtral", "--set", "runtime.device=cpu"]
    run_installed(tmp_path, installed / start[0], *start[1:], "infer", *config, *files)
    (record,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert record["id"] == "a" and record["finish_reason"] == "length"


def test_the_source_distribution_can_compile_the_kernels(built):
    sdist, _ = built
    sources = {f"engine/ops/csrc/{file.name}" for file in (ROOT / "kernels" / "csrc").iterdir()}
    assert sources and sources <= sdist
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= sdist
    # What build.py names must lie there too: an sdist has no kernels/, only engine/ops.
    spec = importlib.util.spec_from_file_location("build_kernels", ROOT / "engine/ops/build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    for extension in build.ext_modules():
        assert {*extension.sources, *extension.depends} <= sdist


def test_transformers_can_be_imported_with_the_kernels_folder_on_the_path():
    # A top-level package named kernels would be taken for another project's.
    code = "import sys; sys.path.insert(0, ''); from transformers import AutoConfig"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines]
    return {requirement.name.lower(): requirement for requirement in parsed}


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    return requirements([line for line in lines if line and not line.startswith("#")])


def test_the_core_is_installed_in_versions_that_setup_allows(declared):
    core = requirements(declared["install_requires"])
    assert core
    for name, requirement in core.items():
        assert requirement.specifier.contains(version(name)), f"{name} {version(name)}"
        assert "<" in str(requirement.specifier), f"{name} has no upper bound"


def test_the_constraints_pin_exact_versions_within_the_ranges_of_setup(declared):
    ranges = requirements(declared["install_requires"] + declared["extras_require"]["dev"])
    pins = constraints()
    assert "torch" not in pins, "torch is chosen by LOCKSTEP_TORCH"
    assert set(ranges) - {"torch"} <= set(pins)
    for name, pin in pins.items():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", name
        if name in ranges:
            assert ranges[name].specifier.contains(specifier.version), name


def test_the_cuda_extras_never_mix_two_versions_of_nccl(declared):
    extras = {name: requirements(lines) for name, lines in declared["extras_require"].items()}
    assert set(extras) >= {"cuda", "cuda13", "te", "te13", "dev"}
    assert "nvidia-nccl-cu12" in extras["cuda"] and "nvidia-nccl-cu13" not in extras["cuda"]
    assert "nvidia-nccl-cu13" in extras["cuda13"] and "nvidia-nccl-cu12" not in extras["cuda13"]
    assert extras["te"]["transformer-engine"].extras == {"pytorch", "core_cu12"}
    assert extras["te13"]["transformer-engine"].extras == {"pytorch", "core_cu13"}
    core = requirements(declared["install_requires"])["torch"].specifier
    for extra, torch_version in (("cuda", "2.10.0"), ("cuda13", "2.13.0")):
        both = core & extras[extra]["torch"].specifier
        assert both.contains(torch_version), f"{extra} and the core agree on no torch"
    for extra, beside in (("te", "cuda"), ("te13", "cuda13")):
        assert extras[extra]["torch"].specifier == extras[beside]["torch"].specifier


def test_the_cuda_extras_compile_nothing(declared):
    for extra in ("cuda", "cuda13"):
        assert set(requirements(declared["extras_require"][extra])) <= {
            "torch", "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
        }  # fmt: skip


def commands_of_make(*settings: str, target: str = "setup") -> str:
    """What make would run to set up, with an environment in a folder that is not there."""
    command = ["make", "--always-make", "--dry-run", target, "VENV=/nowhere/venv", *settings]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_another_torch_is_installed_without_the_pin_of_triton():
    pinned = commands_of_make()
    assert "-c .ci/constraints.txt" in pinned and "/nowhere/venv/constraints.txt" not in pinned
    other = commands_of_make("LOCKSTEP_TORCH=torch>=2.8,<2.11", "LOCKSTEP_EXTRAS=dev,cuda")
    assert "grep -v '^triton==' .ci/constraints.txt >/nowhere/venv/constraints.txt" in other
    assert other.count("-c /nowhere/venv/constraints.txt") == 2


def test_make_sets_what_compiling_transformer_engine_needs_only_where_it_is_asked_for(tmp_path):
    headers = tmp_path / "lib/python3.12/site-packages/nvidia/cudnn/include"
    headers.mkdir(parents=True)
    for extras, compiles in (("dev,cuda,te", True), ("te13", True), ("dev,cuda13", False)):
        shown = commands_of_make(
            f"LOCKSTEP_EXTRAS={extras}", f"VENV={tmp_path}", target="install-package"
        )
        for setting in (
            "NVTE_BUILD_USE_NVIDIA_WHEELS=1", "NVTE_PYTORCH_FORCE_BUILD=TRUE", str(headers),
        ):  # fmt: skip
            assert (setting in shown) == compiles, extras


def test_make_installs_a_torch_that_setup_allows(declared):
    makefile = (ROOT / "Makefile").read_text()
    (chosen,) = re.findall(r"^PINNED_TORCH := torch==(\S+)$", makefile, re.MULTILINE)
    assert requirements(declared["install_requires"])["torch"].specifier.contains(chosen)


def test_the_ci_script_is_executable_and_valid_bash():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
