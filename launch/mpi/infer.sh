#!/bin/bash
# Batch inference under MPI (Open MPI or MPICH): one rank per GPU; mpi4py finds the other ranks.
#
#   RANKS=16 HOSTFILE=hosts launch/mpi/infer.sh \
#       --config mixtral_ep8.yaml --input requests.jsonl --output completions.jsonl
#
# What follows the script goes to launch/infer.py. MPI starts the ranks and provides the rendezvous
# address; tensors are sent over NCCL or gloo. Rank 0 chooses the rendezvous port; where its address
# is not the one that the other hosts reach it by, set MASTER_ADDR (and pass it on:
# MPIRUN_FLAGS="-x MASTER_ADDR").

set -euo pipefail

RANKS=${RANKS:-2}
HOSTFILE=${HOSTFILE:-}
MPIRUN=${MPIRUN:-mpirun}
MPIRUN_FLAGS=${MPIRUN_FLAGS:-} # site flags, e.g. "-x NCCL_SOCKET_IFNAME" or "--oversubscribe"
PYTHON=${PYTHON:-python}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Unbound: the engine divides a host's cores among its ranks itself, and one core each would starve
# the threads that feed a GPU. MPIRUN_FLAGS is several words on purpose.
# shellcheck disable=SC2086
exec "$MPIRUN" -n "$RANKS" ${HOSTFILE:+--hostfile "$HOSTFILE"} -bind-to none $MPIRUN_FLAGS \
    "$PYTHON" "$root/launch/infer.py" "$@"
