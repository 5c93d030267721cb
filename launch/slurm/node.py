"""torchrun on one node of a Slurm job: leaves SIGTERM to the ranks and exits with their code.

    srun --nodes 2 --ntasks-per-node 1 python launch/slurm/node.py --nnodes 2 --nproc-per-node 8 \\
        --master-addr HEAD --master-port 20000 launch/infer.py --config ...

Slurm signals every process of a step. torchrun would signal its ranks once more, which ends them at
once where the first signal lets them finish what is running. It also exits with 1 in every case,
where infer.sbatch must distinguish unfinished work (143) from a wrong setting (2) and from a job
whose every line failed (3).
"""

import os
import signal
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, main


def run(argv: list[str]) -> int:
    """Run torchrun with `argv`; return 0 or the exit code of the rank that failed first."""
    # 0 on the first node, the head: node ranks are fixed, not assigned by order of arrival.
    argv = ["--node-rank", os.environ["SLURM_NODEID"], *argv]
    # Older releases of torch lack the option. There the ranks stop at once; what is done is kept.
    if "--signals-to-handle" in get_args_parser().format_help():
        signal.signal(signal.SIGTERM, lambda signum, frame: None)
        argv = ["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *argv]
    try:
        main(argv)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
