"""The batch job: JSONL in, JSONL out, exactly one record per id however often the job is killed.

`run_batch` runs on every rank. From input to output:

    1. open     rank 0 indexes the input (`input/index.py`), decides whether to start, resume or
                refuse (`manifest.py`) and reads which records the ledger has (`ledger.py`)
    2. take     each data rank takes work-queue indices from one counter in the store, or where
                lines share prefixes its own ones (`dealt_queue.py`), reads that line and parses it
                (`line_parser.py`): a request, or an error record
    3. run      the engine finishes requests and passes them to `write`, which makes them durable
    4. merge    rank 0 writes the output in input order and removes the ledger

A job stopped at any moment, by a signal or a crash of any rank, resumes from its ledger when the
same command is run again, on any number of ranks.
"""

from __future__ import annotations

import json
import signal
import traceback
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from engine.batch.atomic_files import write_text
from engine.batch.dealt_queue import DealtQueue
from engine.batch.file_job import FileJob
from engine.batch.input.shards import InputShard
from engine.batch.line_parser import LineParser
from engine.batch.manifest import JobError, sibling_path
from engine.batch.on_rank_0 import describe, on_rank_0
from engine.batch.progress import ProgressBar
from engine.batch.prompt_job import PromptJob
from engine.batch.retry_rounds import RetryRequest
from engine.batch.work_queue import WorkQueue
from engine.config import CapacityConfig, Config
from engine.config.loader import to_yaml
from engine.distributed.collectives import broadcast_object, gather_objects
from engine.distributed.error_file import record_error
from engine.distributed.errors import RankError
from engine.distributed.groups import Topology
from engine.distributed.health.progress import ProgressReporter
from engine.distributed.health.watchdog import Watchdog, is_connection_error
from engine.distributed.store_barrier import barrier
from engine.generation.builder import import_libraries
from engine.generation.interrupts import Interrupts, Stopped, StopRequest
from engine.profiling.report import RunReport, StepReport
from engine.reporting.summary import Summary, describe_shared, make_console, print_summary
from engine.request import Completion, usage_of


class JobFailed(RuntimeError):
    """The job failed while it ran, here or on another rank; what is in the ledger stays done.

    Without a text where another rank has printed it.
    """

    exit_code = 1


class EveryLineFailed(RuntimeError):
    """The job is done, and every record of its output is an error; the same on every rank."""

    exit_code = 3


@dataclass(slots=True)
class _Counts:
    """What one rank finished in this run."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    user_keys: Counter[str] = field(default_factory=Counter)  # lines per key that is no setting

    def add(self, completions: list[Completion]) -> None:
        self.requests += len(completions)
        for item in completions:
            usage = usage_of(item.choices)
            self.prompt_tokens += usage["prompt_tokens"]
            self.generated_tokens += usage["completion_tokens"]
            self.cached_tokens += usage["cached_tokens"]


def run_batch(
    config: Config,
    topology: Topology,
    input_path: Path | Sequence[Path] | None = None,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    retry_errors: bool = False,
    shard: InputShard | None = None,
) -> None:
    """Run a job to its end. Collective over all ranks.

    Args:
        config: equal on every rank.
        topology: of the run.
        input_path: JSONL requests, as `FileJob` takes them; None: the built-in prompts.
        output: JSONL records; None, without an input: they are only printed.
        overwrite: replace what exists at the output.
        retry_errors: run the lines of its error records again; not with `overwrite`.
        shard: the shard of the input to run; the last one to finish merges all.

    Raises:
        JobError: something the user must change, the same on every rank.
        JobFailed: a rank failed.
        Stopped: SIGTERM or SIGINT.
        EveryLineFailed: every record of the output, which is complete, is an error.
    """
    num_errors, num_total, errors_in = _run(
        config,
        topology,
        input_path,
        output,
        overwrite=overwrite,
        retry_errors=retry_errors,
        shard=shard,
    )
    if num_errors and num_errors == num_total:
        where = "" if errors_in is None else f"; their messages are in {errors_in}"
        raise EveryLineFailed(
            f"every line failed: {num_errors} of {num_total} records are errors{where}"
        )


def _run(
    config: Config,
    topology: Topology,
    input_path: Path | Sequence[Path] | None,
    output: Path | None,
    *,
    overwrite: bool,
    retry_errors: bool,
    shard: InputShard | None,
) -> tuple[int, int, Path | None]:
    """Run the job of `run_batch`; return how many records are errors, of how many, and where."""
    if input_path is not None and output is None:
        raise JobError("--input needs --output: name the JSONL file for the results")
    if shard is not None and input_path is None:
        raise JobError(f"--slice {shard} needs --input: name the JSONL file to take it from")
    console = make_console(quiet=topology.world.rank != 0)
    reporter = ProgressReporter()
    if input_path is not None and output is not None:
        retry = RetryRequest.of_process() if retry_errors else None
        job: FileJob | PromptJob = FileJob(
            config, topology, input_path, output, shard, reporter, retry
        )
    else:
        job = PromptJob(topology, console, output, reporter)
    # Before the watchdog, and before the ranks wait for each other here.
    import_libraries(config, topology.device)
    # A store can outlive a run: the keys of an earlier one must not be taken for this one's.
    key = broadcast_object(f"batch/{uuid.uuid4().hex}", topology.host_world)
    watchdog = Watchdog(
        topology.store,
        key,
        rank=topology.world.rank,
        hosts=gather_objects(topology.host, topology.host_world),
        timeout_s=config.runtime.timeout_s,
        store_rank=topology.store_rank,
        advice="what has finished is kept; run the same command again to resume",
        reporter=reporter,
    )
    with (
        Interrupts(config.runtime.drain_s) as interrupts,
        watchdog,
        _shared_failure(topology, key, watchdog, interrupts),
    ):
        if done := job.open(key, overwrite=overwrite):
            console.print(done, highlight=False, soft_wrap=True)
            return job.num_errors, job.num_total, job.errors_in()
        counts, run, capacity = _Counts(), None, config.moe.capacity
        if len(job.lines):
            run, capacity = _generate(
                job, config, topology, key, counts, interrupts, watchdog, reporter
            )
        reporter.begin("closing its ledger shard")
        job.close()
        reporter.wait()
        all_counts = gather_objects(counts, topology.host_world)  # every rank has closed
        summary, done = None, ""

        def finish() -> int:
            nonlocal summary, done
            errors = job.merge()
            summary = Summary(
                total=job.num_total,
                resumed=job.num_resumed,
                retried=job.num_retried,
                errors=errors,
                requests=sum(each.requests for each in all_counts),
                prompt_tokens=sum(each.prompt_tokens for each in all_counts),
                generated_tokens=sum(each.generated_tokens for each in all_counts),
                cached_tokens=sum(each.cached_tokens for each in all_counts),
                user_keys=dict(sum((each.user_keys for each in all_counts), Counter())),
                run=run,
                capacity=capacity,
                shared_prefixes=job.shared_prefixes,
                error_file=job.error_file,
            )
            if job.output is not None:
                write_text(sibling_path(job.output, "config.yaml"), to_yaml(config))
                write_text(sibling_path(job.output, "report.json"), summary.to_json())
            done = job.finalize(errors)
            return errors

        reporter.begin("merging the output")
        num_errors = on_rank_0(topology, f"{key}/finish", finish, JobFailed, reporter)
        if summary is not None:
            print_summary(console, summary)
        if done:
            console.print(done, highlight=False, soft_wrap=True)
        return num_errors, job.num_total, job.errors_in()


def _generate(
    job: FileJob | PromptJob,
    config: Config,
    topology: Topology,
    key: str,
    counts: _Counts,
    interrupts: Interrupts,
    watchdog: Watchdog,
    reporter: ProgressReporter,
) -> tuple[RunReport, CapacityConfig]:
    """Load the model, run every pending line through it, and add what finished to `counts`.

    Returns the report and the capacity settings: with moe.policy those of the first layer that it
    limits.
    """
    reporter.begin("loading the model")
    from engine.llm import LLM  # the model code, which a job that is refused never needs

    llm = LLM(config, topology, reporter)
    if isinstance(job, FileJob):
        job.use_tokenizer(llm.tokenizer)
        if topology.world.rank == 0:
            llm.on_replan = job.note_placement
    parse = LineParser(
        sampling=config.sampling,
        tokenizer=llm.tokenizer,
        vocab_size=llm.vocab_size,
        max_model_len=llm.max_model_len,
    )
    store, progress_bar = topology.store, None
    if job.dealt is None:
        queue = WorkQueue(job.lines, parse, store, f"{key}/queue", topology.num_data)
    else:
        data_rank = topology.data_rank
        queue = DealtQueue(job.lines, parse, store, f"{key}/queue", job.dealt, data_rank)
    if topology.world.rank == 0:
        progress_bar = ProgressBar(
            make_console(stderr=True),
            job.num_total,
            job.num_resumed,
            lambda: store.add(f"{key}/done", 0),
        )
        if job.shared_prefixes is not None:
            progress_bar.note(describe_shared(job.shared_prefixes))

    def write(completions: list[Completion]) -> None:
        job.write(completions)
        counts.add(completions)
        store.add(f"{key}/done", len(completions))

    def on_step(report: StepReport) -> None:
        if progress_bar is not None:
            progress_bar.update(report)

    def check_replicas() -> None:
        """Raise where another replica has exited: this one would wait for it in vain."""
        if store.check([f"{key}/failed"]):
            interrupts.check()
            raise RuntimeError("another replica has exited")

    def on_end() -> None:
        barrier(store, f"{key}/ended", topology.world.size, check_replicas)

    is_noted = False

    def stop() -> StopRequest:
        nonlocal is_noted
        request = interrupts.request
        if request.signal and not (request.now or is_noted) and progress_bar is not None:
            is_noted = True
            progress_bar.note(
                f"{signal.Signals(request.signal).name}: no new requests; running ones have "
                f"{config.runtime.drain_s:g} s to finish"
            )
        return request

    lockstep = watchdog.running(llm.progress, topology.expert.ranks)
    with interrupts.deferred(), progress_bar or nullcontext(), lockstep:
        try:
            report = llm.run(queue, write, on_step, stop, on_end)
            interrupts.finished()
            counts.user_keys = parse.user_keys.lines
            return report, llm.config.moe.capacity
        except RankError:  # an address or a folder that could be opened before the model was loaded
            raise
        except ValueError as error:
            # Other user errors were found before: this one is a defect and needs its traceback.
            raise RuntimeError("the engine failed") from error


@contextmanager
def _shared_failure(
    topology: Topology, key: str, watchdog: Watchdog, interrupts: Interrupts
) -> Iterator[None]:
    """Publish why this rank exits, so that no other rank reports the broken connection instead, and
    diagnose which rank is unreachable where the connection itself broke.
    """
    store, rank = topology.store, topology.world.rank

    def published_failure() -> str:
        """Return why another rank has exited, "" where none has published it."""
        with suppress(RuntimeError):  # the store may be unreachable, with the rank that holds it
            if store.check([f"{key}/failed"]):
                failed_rank, why = json.loads(store.get(f"{key}/failed"))
                return f"rank {failed_rank} exited: {why}"
        return ""

    def explain(error: BaseException) -> None:
        # The launcher may already be ending all ranks because of the one that exited.
        with suppress(Stopped), interrupts.deferred():
            watchdog.explain(error)

    try:
        yield
    except (ValueError, JobFailed):
        raise  # the same on every rank
    except (OSError, Stopped) as error:
        cause = error.__cause__
        if isinstance(error, Stopped) and is_connection_error(cause) and not published_failure():
            explain(cause or error)
        why = describe(error) if isinstance(error, OSError) else f"stopped by {error}"
        record_error(f"rank {rank}: {why}")
        with suppress(RuntimeError):  # as above
            store.set(f"{key}/failed", json.dumps([rank, why]))
        watchdog.fail(error)
        if isinstance(error, OSError):
            raise JobFailed(why) from error
        raise
    except Exception as error:
        if why := published_failure():
            record_error(why, follows=True)
            with suppress(RuntimeError):  # as above
                why = why if store.add(f"{key}/reported", 1) == 1 else ""
            raise JobFailed(why) from error
        if is_connection_error(error):
            explain(error)
        else:
            record_error(traceback.format_exc())  # before the others know: they may end this rank
            watchdog.fail(error)
        raise
