"""The command line of an installed Lockstep.

    lockstep infer --config tiny_mixtral
    torchrun --nproc-per-node 8 -m lockstep infer --config mixtral_ep8 \\
        --input requests.jsonl --output completions.jsonl
    torchrun --nproc-per-node 8 --no-python lockstep infer ...      # the same
    mpirun -np 8 lockstep infer ...

Every rank runs this; `lockstep infer --help` explains the arguments.
"""

from lockstep.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit()
