"""Finds kernels that other numbers of tokens compile again, and kernels that no call launches.

    python -m gpu_compile.steady        # exit code 1, and their names, if there are any

After a first step with a call's kernels no other step may compile: it would stop all ranks.
"""

from __future__ import annotations

import sys

from gpu_compile.launches import calls, kernel_modules, kernel_names, launched_keys

# One, below and above powers of two, multiples of 16 and not: what triton specialises on.
ROWS = (1, 2, 3, 7, 16, 17, 31, 32, 48, 65, 128)
WARM_UP = 5


def main() -> int:
    """Print a line per call that compiles again and per unlaunched kernel; return the exit code."""
    wrong, launched = [], set()
    for module in kernel_modules():
        for name, call in calls(module).items():
            warm = launched_keys(lambda call=call: call(WARM_UP))
            later = {rows: launched_keys(lambda call=call, rows=rows: call(rows)) for rows in ROWS}
            changed = [rows for rows, keys in later.items() if keys - warm]
            if changed:
                count = len(set().union(warm, *later.values()))
                wrong.append(f"{module} ({name}): {count} compiled, again with {changed} rows")
            launched |= {key.split()[0] for key in warm}
    unlaunched = kernel_names() - launched
    wrong += [f"{kernel}: no call in `variants()` launches it" for kernel in sorted(unlaunched)]
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
