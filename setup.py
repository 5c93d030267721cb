"""What Lockstep is, what it needs, and its compiled CPU kernels.

Install torch first, then this with `pip install -e . --no-build-isolation`, so that the kernels are
compiled against that torch (`make setup` does both). Without torch or a C++ compiler at build time,
or with LOCKSTEP_NATIVE=0, the package installs all the same and runs on torch's own operators.

`engine/ops` is a symbolic link to kernels/, which has no `__init__.py`: a top-level package named
`kernels` would shadow another project's. The finder below follows the link, so a wheel holds
`engine/ops` as a plain folder.

An installation has two packages: `engine`, and `lockstep` (launch/lockstep), which offers the same
under the project's name. In a wheel `lockstep/configs` holds the configs and the checkpoints
trained for this project (21 MB), so that `lockstep infer --config tiny_mixtral` runs.
"""

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


class BuildKernels(build_ext):
    """Compiles the sources of the kernels side by side, one a core; setuptools takes turns."""

    def build_extension(self, ext: Any) -> None:
        """Compile and link one extension."""
        compiler: Any = self.compiler

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            _, objects, extra, defines, build = compiler._setup_compile(
                options.get("output_dir"),
                options.get("macros"),
                options.get("include_dirs"),
                sources,
                options.get("depends"),
                options.get("extra_postargs"),
            )
            flags = compiler._get_cc_args(defines, options.get("debug", False), None)

            def compile_one(target: str) -> None:
                compiler._compile(target, *build[target], flags, extra, defines)

            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                list(pool.map(compile_one, build))
            return objects

        compiler.compile = compile_all
        super().build_extension(ext)


def native_kernels() -> list:
    """What kernels/build.py can compile here; nothing when LOCKSTEP_NATIVE=0."""
    if os.environ.get("LOCKSTEP_NATIVE") == "0":
        return []
    # By path: engine.ops.build cannot be imported before the package is installed.
    spec = importlib.util.spec_from_file_location("build_kernels", ROOT / "engine/ops/build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build.ext_modules()


setup(
    name="lockstep-moe",
    version="0.1.0",
    description="Expert-parallel MoE inference that knows, and caps, its slowest rank",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_namespace_packages(
            include=["engine", "engine.*"], exclude=["engine.ops.csrc", "*.__pycache__"]
        ),
        "lockstep",
        "lockstep.configs",
    ],
    package_dir={"lockstep": "launch/lockstep", "lockstep.configs": "configs"},
    package_data={
        "engine.ops": ["csrc/*"],  # a source distribution can compile them
        "lockstep.configs": ["*.yaml", "devices/*.yaml", "checkpoints/*.jsonl", "checkpoints/*/*"],
    },
    entry_points={"console_scripts": ["lockstep = lockstep.cli:run_and_exit"]},
    install_requires=[
        "torch>=2.8,<2.16",
        "numpy>=1.26,<3",
        # Written by tools and tests. The engine reads the format with code of its own
        # (engine/weights/safetensors_header.py says why); transformers needs the package too.
        "safetensors>=0.5,<1",
        "transformers>=5.23,<6",  # config.json and tokenizers; the reference in tests/models
        # A tokenizer.model without a tokenizer.json is converted with these two.
        "sentencepiece>=0.2,<1",
        "protobuf>=5,<8",
        "PyYAML>=6.0.1,<7",
        "orjson>=3.10,<4",  # records of the batch job
        "zstandard>=0.22,<1; python_version < '3.14'",  # .zst inputs; later in the standard library
        "pydantic>=2.8,<3",  # the tables of a request's fields: engine/batch/requests
        "rich>=13.7,<16",
        "prometheus-client>=0.20,<1",
        # The design requires these three of every installation, so that each is there and tested
        # with it; `import engine` and a run on one rank load none of them.
        "deepspeed>=0.18,<0.20",  # its launcher; its comms logger: profiler.deepspeed_comms
        "megatron-core>=0.16,<0.20",  # capacity in Megatron's own MoE layers: engine/interop
        "mpi4py>=4.0,<5",  # ranks started by mpirun: engine/distributed/discovery.py
    ],
    extras_require={
        # CUDA 12 and CUDA 13 are two sets: their NCCL packages overwrite each other's files. Wheels
        # alone: neither compiles anything.
        "cuda": ["torch>=2.8,<2.11", "nvidia-nccl-cu12", "triton>=3.4,<3.10"],
        "cuda13": ["torch>=2.11,<2.16", "nvidia-nccl-cu13", "triton>=3.4,<3.10"],
        # Transformer Engine beside them; its torch extension is compiled at install, against the
        # installed torch and CUDA headers (the Makefile sets what that needs).
        "te": ["torch>=2.8,<2.11", "transformer-engine[pytorch,core_cu12]>=2.9,<2.20"],
        "te13": ["torch>=2.11,<2.16", "transformer-engine[pytorch,core_cu13]>=2.18,<2.21"],
        # Task scores: tools/evaluate.py, engine/interop/lm_eval.py. accelerate: the harness's own
        # model on transformers, with which tests compare the scores.
        "eval": ["lm-eval>=0.4.13,<0.5", "accelerate>=1.1,<2"],
        "dev": [
            "setuptools>=77",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",  # make test-cluster
            "hypothesis>=6.100,<7",
            "compressed-tensors>=0.20,<0.21",  # what tests compare its format with
            "openai>=3.50,<4",  # its types read what batch jobs write in OpenAI's form
            # The CUDA kernels in Triton's interpreter, and compiled for GPUs that are not there.
            "triton>=3.4,<3.10; platform_system == 'Linux'",
            "matplotlib>=3.9,<4",  # the figures of tools/capacity_report.py
            "mkdocs-material>=9.5,<10",  # make docs
            "ruff==0.17.6",  # its formatting is checked, and changes between versions
            "pyright[nodejs]==1.1.414",
        ],
    },
    ext_modules=native_kernels(),
    cmdclass={"build_ext": BuildKernels},
)
