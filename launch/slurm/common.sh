# shellcheck shell=bash
# Functions of the batch scripts of this folder. Each sources this file once $LOCKSTEP is known.
#
# How a job ends, by the exit code of its ranks:
#     0     done
#     143   stopped by SIGTERM with work left: the job goes back to the queue and resumes from its
#           ledger, at most MAX_REQUEUES times
#     2     the command, config or files are wrong: the job fails
#     3     the output is complete and every record of it is an error: the job fails
#     else  the job fails, or goes back to the queue while it has been there fewer than
#           MAX_ERROR_REQUEUES times
# A job that Slurm itself requeues (preempted, a node lost) or that is cancelled is left to Slurm.

PYTHON=${PYTHON:-python}
CONTAINER=${CONTAINER:-}
MAX_REQUEUES=${MAX_REQUEUES:-10}
MAX_ERROR_REQUEUES=${MAX_ERROR_REQUEUES:-0}

# Of an array only this task: to Slurm the SLURM_JOB_ID of its last task is the whole array.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
restarts=${SLURM_RESTART_COUNT:-0}

# Below Linux's ephemeral ports; another one after a requeue, as processes left over from the run
# before may hold the first.
export MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 37 + restarts) % 12000))}
if [[ -z ${MASTER_ADDR:-} ]]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # A node's name in Slurm need not resolve; its address does.
    getent hosts "$MASTER_ADDR" >/dev/null ||
        MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
fi
export MASTER_ADDR
# May be set by a launcher around sbatch; they are not this job's.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE

job_state() {
    scontrol --oneliner show job "$job" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p'
}

# The trap on SIGTERM, which `--signal=B:TERM@120` sends to this shell alone, some time before the
# end. The ranks are signalled through Slurm: srun would kill them on a TERM.
pass_on_term() {
    interrupted=1
    # On scancel and on preemption Slurm signals the ranks too, and once is enough.
    [[ $(job_state) == RUNNING ]] || return 0
    echo "job $job: SIGTERM: the ranks finish what is running and leave the rest to the next run" >&2
    scancel --signal=TERM "$job" || true # its steps, without this shell
}

# requeue LIMIT WHY: requeue the job, unless it was requeued LIMIT times or is not to run again.
# Returns where the job is not requeued.
requeue() {
    ((restarts < $1)) && [[ $(job_state) == RUNNING ]] || return 0
    echo "job $job: $2: requeued, restart $((restarts + 1))" >&2
    ! scontrol requeue "$job" || exit 0 # fails for a job that was submitted with --no-requeue
}

# announce RANKS_PER_NODE
announce() {
    echo "$SLURM_JOB_NUM_NODES nodes x $1 ranks, rendezvous at $MASTER_ADDR:$MASTER_PORT"
}

# run_step SRUN_ARGUMENT...: run the job's step to its end, also through signals; requeue or exit.
run_step() {
    local step code interrupted
    trap pass_on_term TERM
    # When a rank has exited the others diagnose which and why, and exit by themselves; after --wait
    # seconds Slurm ends them. Not --kill-on-bad-exit: its SIGTERM would make an error of one rank
    # look like the unfinished work of another. No CPU binding: the engine divides a host's cores
    # among its ranks.
    srun --kill-on-bad-exit=0 --wait=60 --cpu-bind=none "$@" &
    step=$!
    while :; do
        code=0 interrupted=
        wait "$step" || code=$?
        [[ -n $interrupted ]] || break # else the signal ended the wait
    done
    case $code in
    0 | 2 | 3) ;;
    143) requeue "$MAX_REQUEUES" "unfinished" ;;
    *) requeue "$MAX_ERROR_REQUEUES" "exit code $code" ;;
    esac
    exit "$code"
}

# run_torchrun ARGUMENT...: one torchrun per node, RANKS_PER_NODE ranks each, for launch/infer.py.
run_torchrun() {
    announce "$RANKS_PER_NODE"
    # $CONTAINER and $PYTHON are several words on purpose.
    # shellcheck disable=SC2086
    run_step --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        $CONTAINER $PYTHON "$LOCKSTEP/launch/slurm/node.py" \
        --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" \
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
        "$LOCKSTEP/launch/infer.py" "$@"
}
