"""Random inputs for as long as wanted; prints every seed that ends badly.

python -m tests.fuzz --minutes 30 --seed 1000
python -m tests.fuzz --only config --seed 17 --cases 1     one case again
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.generators import GENERATORS
from tests.fuzz.runner import Base


def main() -> int:
    """Run cases until the time is up; return 1 if one ended badly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="the first; then one after the other")
    parser.add_argument("--cases", type=int, help="of each generator, at most")
    parser.add_argument("--only", choices=GENERATORS)
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    names = [args.only] if args.only else list(GENERATORS)
    num_bad = num_run = 0
    with tempfile.TemporaryDirectory(prefix="lockstep-fuzz-") as folder:
        base = Base(Path(folder) / "base")
        stop = None if args.cases is None else args.seed + args.cases
        for seed in itertools.count(args.seed):
            if seed == stop or time.monotonic() >= end:
                break
            for name in names:
                num_run += 1
                if problem := base.problem(name, seed, Path(folder) / "case"):
                    num_bad += 1
                    print(f"{name}, seed {seed}: {problem}\n", flush=True)
    print(f"{num_run} cases, {num_bad} ended badly")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
