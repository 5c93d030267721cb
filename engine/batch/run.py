"""The batch job: JSONL in, JSONL out, exactly one record an id however often the job is killed.

`launch/infer.py` calls `run_batch` on every rank. From input to output:

    1. open     rank 0 indexes the input (batch_input.py), decides whether to start, resume or
                refuse (batch_manifest.py) and reads what the ledger has (ledger.py)
    2. pull     each data rank takes tickets from one counter in the store, reads that line and
                parses it (batch_lines.py): a request, or an error record
    3. run      the engine finishes requests and hands them to `write`, which makes them durable
    4. merge    rank 0 writes the output in input order and removes the ledger

A job stopped at any moment, by a signal or a crash of any rank, goes on from its ledger when the
same command is run again, on any number of ranks.
"""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from engine.batch.atomic_files import write_text
from engine.batch.file_job import FileJob
from engine.batch.input_index import WorkQueue
from engine.batch.input_shards import Slice
from engine.batch.line_parser import LineParser
from engine.batch.manifest import JobError, beside
from engine.batch.on_rank_0 import describe, on_rank_0
from engine.batch.progress import ProgressBar
from engine.batch.prompt_job import PromptJob
from engine.config import Config
from engine.config.loader import to_yaml
from engine.distributed.collectives import broadcast_object, gather_objects
from engine.distributed.groups import Topology
from engine.distributed.health.progress import ProgressReporter
from engine.distributed.health.watchdog import Watchdog, is_connection_error
from engine.distributed.store_barrier import meet
from engine.generation.interrupts import Interrupts, Stopped, StopRequest
from engine.profiling.report import RunReport, StepReport
from engine.reporting.summary import Summary, make_console, print_summary
from engine.request import Completion


class JobFailed(RuntimeError):
    """The job broke off while it ran, here or on another rank; what is in the ledger stays done.

    Without a text where another rank has told it.
    """

    exit_code = 1


@dataclass(slots=True)
class _Tally:
    """What one rank finished in this run."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def count(self, completions: list[Completion]) -> None:
        self.requests += len(completions)
        self.prompt_tokens += sum(item.prompt_tokens for item in completions)
        self.generated_tokens += sum(item.completion_tokens for item in completions)


def run_batch(
    config: Config,
    topology: Topology,
    input: Path | None = None,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    part: Slice | None = None,
) -> None:
    """Run a job to its end; without an input, the built-in prompts.

    part: the slice of the input to run; the last slice to finish merges all.

    Raises JobError for what the user must change, JobFailed when a rank fails on the way, Stopped
    on SIGTERM and SIGINT. Collective over all ranks.
    """
    if input is not None and output is None:
        raise JobError("--input needs --output: name the JSONL file for the results")
    if part is not None and input is None:
        raise JobError(f"--slice {part} needs --input: name the JSONL file to take it from")
    console = make_console(quiet=topology.world.rank != 0)
    activity = ProgressReporter()
    if input is not None and output is not None:
        job: FileJob | PromptJob = FileJob(config, topology, input, output, part, activity)
    else:
        job = PromptJob(topology, console, output, activity)
    # A store can outlive a run that is started anew: its keys must not be taken for this run's.
    key = broadcast_object(f"batch/{uuid.uuid4().hex}", topology.world)
    watchdog = Watchdog(
        topology.store,
        key,
        rank=topology.world.rank,
        hosts=gather_objects(topology.host, topology.world),
        timeout_s=config.runtime.timeout_s,
        holder=topology.store_holder,
        advice="what has finished is kept; the same command goes on from here",
        activity=activity,
    )
    with (
        Interrupts(config.runtime.drain_s) as interrupts,
        watchdog,
        _shared_failure(topology, key, watchdog, interrupts),
    ):
        if done := job.open(key, overwrite=overwrite):
            console.print(done, highlight=False, soft_wrap=True)
            return
        tally, run = _Tally(), None
        if len(job.lines):
            run = _generate(job, config, topology, key, tally, interrupts, watchdog, activity)
        activity.begin("closing its part of the ledger")
        job.close()
        activity.wait()
        tallies = gather_objects(astuple(tally), topology.world)  # every rank has closed
        summary, done = None, ""

        def finish() -> None:
            nonlocal summary, done
            errors = job.merge()
            summary = Summary(
                total=job.num_total,
                resumed=job.num_resumed,
                errors=errors,
                requests=sum(counts[0] for counts in tallies),
                prompt_tokens=sum(counts[1] for counts in tallies),
                generated_tokens=sum(counts[2] for counts in tallies),
                run=run,
                capacity=config.moe.capacity,
            )
            if job.output is not None:
                write_text(beside(job.output, "config.yaml"), to_yaml(config))
                write_text(beside(job.output, "report.json"), summary.to_json())
            done = job.seal(errors)

        activity.begin("merging the output")
        on_rank_0(topology, f"{key}/finish", finish, JobFailed, activity)
        if summary is not None:
            print_summary(console, summary)
        if done:
            console.print(done, highlight=False, soft_wrap=True)


def _generate(
    job: FileJob | PromptJob,
    config: Config,
    topology: Topology,
    key: str,
    tally: _Tally,
    interrupts: Interrupts,
    watchdog: Watchdog,
    activity: ProgressReporter,
) -> RunReport:
    """Load the model and run every pending line through it."""
    activity.begin("loading the model")
    from engine.llm import LLM  # the model code, which a job that is refused never needs

    llm = LLM(config, topology, activity)
    parse = LineParser(
        sampling=config.sampling,
        tokenizer=llm.tokenizer,
        vocab_size=llm.vocab_size,
        max_model_len=llm.max_model_len,
    )
    store, progress = topology.store, None
    queue = WorkQueue(job.lines, parse, store, f"{key}/ticket", topology.num_data)
    if topology.world.rank == 0:
        progress = ProgressBar(
            make_console(stderr=True),
            job.num_total,
            job.num_resumed,
            lambda: store.add(f"{key}/done", 0),
        )

    def write(completions: list[Completion]) -> None:
        job.write(completions)
        tally.count(completions)
        store.add(f"{key}/done", len(completions))

    def on_step(report: StepReport) -> None:
        if progress is not None:
            progress.update(report)

    def still_wanted() -> None:
        """Raise where another replica has left, which would keep this one waiting."""
        if store.check([f"{key}/failed"]):
            interrupts.check()
            raise RuntimeError("another replica has left")

    def on_end() -> None:
        meet(store, f"{key}/ended", topology.world.size, still_wanted)

    told = False

    def stop() -> StopRequest:
        nonlocal told
        request = interrupts.request
        if request.signal and not (request.now or told) and progress is not None:
            told = True
            progress.note(
                f"{signal.Signals(request.signal).name}: no new requests; those that run have "
                f"{config.runtime.drain_s:g} s to finish"
            )
        return request

    lockstep = watchdog.running(llm.progress, topology.expert.ranks)
    with interrupts.deferred(), progress or nullcontext(), lockstep:
        try:
            report = llm.run(queue, write, on_step, stop, on_end)
            interrupts.finished()
            return report
        except ValueError as error:
            # What a user can get wrong was found before: this one needs its traceback.
            raise RuntimeError("the engine failed") from error


@contextmanager
def _shared_failure(
    topology: Topology, key: str, watchdog: Watchdog, interrupts: Interrupts
) -> Iterator[None]:
    """Tell the other ranks why this one leaves, so that none of them blames the connection, and
    find out who is missing where it was the connection that broke.
    """
    store, rank = topology.store, topology.world.rank

    def told() -> str:
        """Why another rank has left, "" where none has said so."""
        with suppress(RuntimeError):  # the store may be gone, with the rank that held it
            if store.check([f"{key}/failed"]):
                failed_rank, why = json.loads(store.get(f"{key}/failed"))
                return f"rank {failed_rank} left: {why}"
        return ""

    def explain(error: BaseException) -> None:
        # The launcher may already be ending all ranks because of the one that is gone.
        with suppress(Stopped), interrupts.deferred():
            watchdog.explain(error)

    try:
        yield
    except (ValueError, JobFailed):
        raise  # the same on every rank
    except (OSError, Stopped) as error:
        cause = error.__cause__
        if isinstance(error, Stopped) and is_connection_error(cause) and not told():
            explain(cause or error)
        why = describe(error) if isinstance(error, OSError) else f"stopped by {error}"
        with suppress(RuntimeError):  # as above
            store.set(f"{key}/failed", json.dumps([rank, why]))
        watchdog.fail(error)
        if isinstance(error, OSError):
            raise JobFailed(why) from error
        raise
    except Exception as error:
        if why := told():
            with suppress(RuntimeError):  # as above
                why = why if store.add(f"{key}/told", 1) == 1 else ""
            raise JobFailed(why) from error
        if is_connection_error(error):
            explain(error)
        else:
            watchdog.fail(error)
        raise
