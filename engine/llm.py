"""The offline API: `LLM(config).generate(prompts)` on every rank.

Builds a rank's part of the model and runs the generation loop. Construction checks what fails
cheaply first: config, launcher, checkpoint header, model, weights, cache. Each failure is raised
with the same text on every rank, before the next collective, in which the others would hang.

    torchrun --nproc-per-node 2 my_job.py      # my_job.py:
        llm = LLM(load_config("tiny_mixtral"))
        for completion in llm.generate(["def main():", [1, 2, 3]]):
            print(completion.text)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from engine.config import CapacityConfig, Config
from engine.config.preflight import check_runnable
from engine.distributed import bootstrap
from engine.distributed.clock import measure_clock_offset
from engine.distributed.collectives import gather_objects
from engine.distributed.errors import RankError, describe_device_error, raise_on_any_rank
from engine.distributed.groups import Topology
from engine.distributed.health.progress import Progress, ProgressReporter
from engine.generation import builder
from engine.generation.control import ControlPlane
from engine.generation.detokenizer import load_eos_token_ids
from engine.generation.graphs.capture import capture_graphs
from engine.generation.graphs.setting import exchange_way, graphs_obstacle
from engine.generation.graphs.steps import GraphSteps
from engine.generation.interrupts import Stopped, StopRequest
from engine.generation.loop import NUM_COLLECTIVES, NUM_TENSOR_COLLECTIVES, GenerationLoop
from engine.generation.memory import agree_kv_blocks
from engine.generation.moe_step import CopiesUse, LayerPhases
from engine.generation.prefix_order import deal_requests
from engine.generation.prompt_encoder import PromptEncoder
from engine.generation.replanner import OnChange, Replanner
from engine.generation.request_source import ListSource, RequestSource, Sink, partition
from engine.generation.tokenizer import load_tokenizer
from engine.generation.totals import OnStep
from engine.models.placement import resolve_placement
from engine.models.policy import in_place_of, resolve_policy
from engine.models.registry import read_config, unread_parts
from engine.models.weight_dtype import agree_dtype, model_dtype
from engine.profiling.decisions import LayerDecision
from engine.profiling.device_clocks import make_clock
from engine.profiling.report import RunReport
from engine.profiling.telemetry import Telemetry
from engine.reporting.measured_run import MeasuredRun
from engine.reporting.open_exporters import (
    check_exporters,
    find_routing_end,
    join_routing_ends,
    open_exporters,
)
from engine.request import Completion, Request, RequestError, SamplingParams
from engine.request.arguments import list_prompts, list_sampling

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class LLM:
    """One rank's engine. Every rank makes one and calls the same methods in the same order.

    Args:
        topology: a running topology; None: join the launcher's, until `close`.
        reporter: receives the progress of loading.

    Raises:
        ValueError: on every rank, when the config, the launch or the checkpoint is wrong.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology | None = None,
        reporter: ProgressReporter | None = None,
    ) -> None:
        self.config = config
        self.report: RunReport | None = None  # of the last run or `generate`
        self._reporter = reporter or ProgressReporter()
        self._owns_topology = topology is None
        if topology is None:
            with bootstrap.broadcast_startup_error():
                check_runnable(config, os.environ)
            topology = bootstrap.start(config)
        self.topology = topology
        try:
            self._load(config, topology)
        except RankError:  # all ranks leave: the settings may be corrected in the same processes
            self.close()
            raise

    def _load(self, config: Config, topology: Topology) -> None:
        """Check the config, build the model and read its weights. Collective over all ranks."""
        if not self._owns_topology:
            self._on_all_ranks(lambda: check_runnable(config, os.environ))
        self._on_all_ranks(lambda: check_exporters(config, topology))
        hf_config = self._on_all_ranks(
            lambda: read_config(Path(config.model.path), config.model.implementation)
        )
        self.policy = self._on_all_ranks(lambda: resolve_policy(config, hf_config, topology))
        if self.policy is not None:
            self.config = config = in_place_of(self.policy, config)
        if topology.world.rank == 0 and (unread := unread_parts(Path(config.model.path))):
            logger.warning("model.path = %r: %s", config.model.path, unread)
        every = builder.profiler_every(config, topology.device)
        self._telemetry = Telemetry(make_clock(topology.device, config.profiler.enabled, every))
        # The checkpoint's tokenizer, None where it has none.
        self.tokenizer: Any = self._on_all_ranks(lambda: load_tokenizer(config.model))
        self.eos_token_ids = self._on_all_ranks(
            lambda: load_eos_token_ids(config.model.path, self.tokenizer)
        )
        placement = self._on_all_ranks(lambda: resolve_placement(config, hf_config, topology))
        own = self._on_all_ranks(
            lambda: model_dtype(config.model.dtype, hf_config, topology.device)
        )
        dtype = agree_dtype(own, config, topology)
        self.model = self._on_all_ranks(
            lambda: builder.build(config, hf_config, topology, dtype, placement, self.policy)
        )
        self.model.set_telemetry(self._telemetry)
        names = self._on_all_ranks(lambda: builder.checkpoint_names(config))
        self.weights_report = builder.load_weights(
            self.model, config, topology, names, self._reporter
        )
        self._on_all_ranks(lambda: self.model.finalize_weights(self._reporter.advance))
        # Why decode steps run without graphs; None: graphs run them.
        self._graphs_obstacle = graphs_obstacle(config, self.model, topology.device, every)
        has_graphs = self._graphs_obstacle is None
        fitting = self._on_all_ranks(
            lambda: builder.plan_cache(
                self.model, config, topology, self.policy, has_graphs=has_graphs
            )
        )
        num_blocks = agree_kv_blocks(fitting, topology.host_world)
        self._runner, self._scheduler = self._on_all_ranks(
            lambda: builder.build_cache(
                self.model, config, topology, num_blocks, has_graphs=has_graphs
            )
        )
        self._graphs = self._on_all_ranks(self._capture) if has_graphs else None
        self._schedules_ahead = builder.schedules_ahead(config, self.model, topology)
        in_tensor_group = NUM_TENSOR_COLLECTIVES if topology.tensor.size > 1 else 0
        stamps = NUM_COLLECTIVES + in_tensor_group + self.model.max_collectives
        stamps = stamps if config.profiler.enabled else 0
        self._clock_offset = offset = measure_clock_offset(topology.control, topology.host)
        every = config.moe.copies.replan
        self.on_replan: OnChange | None = None  # called on the first rank of each replica
        self._replanner = None
        if every != "off" and placement is not None and placement.num_copies:
            self._replanner = Replanner(self.model, topology, every, self._note_replan)
        self._control = ControlPlane(topology.control, stamps, len(self.model.moe_layers), offset)

    def _capture(self) -> GraphSteps:
        """Capture the decode graphs. Collective over EP and TP: every rank must call."""
        copies, most = self._copies_use(), self.config.scheduler.max_sequences
        return capture_graphs(
            self.model,
            self._runner.cache,
            self.topology,
            most,
            use_copies=copies is not None and "decode" in copies.phases,
        )

    @property
    def max_model_len(self) -> int:
        """Maximum length of a sequence, prompt and new tokens together."""
        return self.model.max_model_len

    @property
    def resolved_settings(self) -> dict[str, Any]:
        """Setting -> value on this rank, of the settings that the engine may choose.

        With moe.overlap.chunks = auto its value is a mapping: tokens of a step, from -> chunks.
        """
        num_blocks, shares = self._runner.cache.num_blocks, self._scheduler.prefixes.enabled
        found = builder.resolved_settings(self.model, self.topology, num_blocks, shares)
        obstacle, graphs = self._graphs_obstacle, self._graphs
        found["runtime.graphs"] = f"off: {obstacle}" if graphs is None else graphs.buckets
        found["scheduler.async_scheduling"] = self._schedules_ahead
        if self.config.profiler.enabled:
            found["profiler.every"] = self._telemetry.clock.every
        return found

    def progress(self) -> Progress:
        """Return how far this rank has come; any thread may call it."""
        position = self._telemetry.clock.position()
        if not position.collective:
            return self._reporter.progress  # the first run has not begun
        phase = position.phase.name.lower()
        return Progress(position.step, position.layer, phase, position.collective)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model.vocab_size

    def generate(
        self,
        prompts: str | Iterable[str | Sequence[int]] | Sequence[int],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete prompts; return all completions, in the prompts' order, on every rank.

        With `n` above 1 a completion has the further ones of its prompt under `others`. Prompts are
        partitioned so that data ranks have about the same number of tokens; those that share
        prefixes are ordered by them and kept on one rank where that allows it. A prompt that cannot
        run has a completion with finish_reason "error".

        Args:
            prompts: texts or token ids (lists, or of numpy or torch); the same on every rank. A
                text alone, or the token ids of one prompt, is one prompt.
            sampling: one for all prompts, or one per prompt; None: the config's.

        Raises:
            ValueError: prompts that are no list, sampling that is no SamplingParams, or not as many
            as prompts.

        Collective over all ranks: every rank must call.
        """
        each_prompt = list_prompts(prompts)
        if sampling is None:
            sampling = SamplingParams.from_config(self.config.sampling)
        each = list_sampling(sampling, len(each_prompt))
        requests: list[Request] = []
        failed: list[Completion] = []
        for index, (prompt, params) in enumerate(zip(each_prompt, each, strict=True)):
            try:
                ids = self._encoder.encode(f"prompts[{index}]", prompt)
            except RequestError as error:
                failed.append(Completion.failure(index, str(index), error))
            else:
                text = prompt if isinstance(prompt, str) else None
                requests.append(
                    Request.of_line(index, str(index), [ids], params, prompt_texts=[text])
                )
        done: list[Completion] = []
        topology = self.topology
        scheduler = self.config.scheduler
        if self._scheduler.prefixes.enabled:
            shares = deal_requests(requests, topology.num_data, scheduler.block_size)
        else:
            shares = partition(requests, topology.num_data)
        own = shares[topology.data_rank]
        self.run(ListSource([*(failed if topology.data_rank == 0 else ()), *own]), done.extend)
        gathered = gather_objects(done, topology.host_world)
        return sorted((item for share in gathered for item in share), key=lambda item: item.index)

    def encode(self, prompt: str | Sequence[int]) -> Sequence[int]:
        """Return the token ids of a text; token ids are checked and returned.

        Raises:
            ValueError: a prompt that cannot run: no or no text, a token id that the model does not
                have, a text where the checkpoint has no tokenizer.
        """
        return self._encoder.encode("prompt", prompt)

    @property
    def _encoder(self) -> PromptEncoder:
        return PromptEncoder(self.tokenizer, self.vocab_size, self.max_model_len)

    def run(
        self,
        source: RequestSource,
        sink: Sink,
        on_step: OnStep | None = None,
        stop: Callable[[], StopRequest] = StopRequest,
        on_end: Callable[[], None] = lambda: None,
    ) -> RunReport:
        """Run until the source is exhausted; return the report, complete on every rank.

        Args:
            source: this data rank's queue.
            sink: receives each step's completions, on the leading rank of a tensor group.
            on_step: called after every step.
            stop: polled before every step. When one rank is asked to stop, all ranks finish the
                running requests, or abort them, and raise `Stopped` before the same step if any
                request is left.
            on_end: called when this replica has finished, before measurements of all ranks are
                gathered. It may wait for other replicas, which finish at different times.

        Collective over all ranks: every rank must call.
        """
        routing_end = None
        if self.config.profiler.routing is not None:
            own = self._on_all_ranks(lambda: find_routing_end(self.config, self.topology))
            routing_end = join_routing_ends(gather_objects(own, self.topology.host_world))
        exporters = self._on_all_ranks(
            lambda: open_exporters(
                self.config, self.topology, self.model, self._clock_offset, routing_end
            )
        )
        self._reporter.begin("starting the run")
        capacity, copies = self.config.moe.capacity, self._copies_use()
        phases = () if capacity.policy == "none" else capacity.phases
        layer_phases = None
        if self.policy is not None:
            by_layer = {
                each.layer: self.policy.phases(each.layer) for each in self.model.moe_layers
            }
            low_bit = copies is not None and copies.low_bit
            layer_phases = LayerPhases(by_layer, self.model.num_layers - 1, low_bit)
            phases = layer_phases.all
        with MeasuredRun(
            self.config,
            self.topology,
            self.model,
            self._scheduler,
            self._telemetry,
            exporters,
            self.policy,
        ) as measured:
            loop = GenerationLoop(
                self._runner,
                self._scheduler,
                self._control,
                self.topology,
                self._telemetry,
                measured.step_profiler,
                tokenizer=self.tokenizer,
                eos_token_ids=self.eos_token_ids,
                top_k=self.model.top_k,
                capacity_phases=phases,
                layer_phases=layer_phases,
                copies=copies,
                exchange=exchange_way(self.config, has_graphs=self._graphs is not None),
                graphs=self._graphs,
                replanner=self._replanner,
                asynchronous=self._schedules_ahead,
            )
            try:
                loop.run(source, measured.timed(sink), on_step, stop)
            except Stopped:
                self._finish_replan()
                raise
            self._finish_replan()
        on_end()
        clock_error = (self._clock_offset.error + self._telemetry.clock.error_ns) * 1e-9
        self.report = measured.report(loop.totals, self.resolved_settings, clock_error)
        return self.report

    def _note_replan(self, change: dict[str, Any]) -> None:
        if self.on_replan is not None:
            self.on_replan(change)

    def _finish_replan(self) -> None:
        if self._replanner is not None:
            self._replanner.finish()

    def _copies_use(self) -> CopiesUse | None:
        """Return when copies of experts take rows; None where there are none."""
        placement = self.model.placement
        if placement is None or not placement.num_copies:
            return None
        low_bit = any(each.experts.copy_layouts is not None for each in self.model.moe_layers)
        return CopiesUse(self.config.moe.copies.phases, low_bit)

    def set_capacity(self, capacity: CapacityConfig) -> None:
        """Change moe.capacity between runs; every rank must pass the same settings.

        It holds in all layers, instead of a policy's; the policy's placement stays.

        Raises:
            ValueError: settings that contradict each other, or that this model does not support on
            this many ranks.
        """
        config = replace(self.config, moe=replace(self.config.moe, capacity=capacity, policy=None))
        for layer in self.model.moe_layers:
            layer.set_capacity(capacity)
        self.config, self.policy = config, None
        builder.reserve_rows(self.model, config, self.topology)

    def record_decisions(self) -> list[LayerDecision]:
        """Record capacity's later decisions about this rank's tokens, in the returned list."""
        return self._telemetry.decisions.start()

    def close(self) -> None:
        """Leave the topology that this engine has joined. Safe to call twice."""
        self._graphs = None  # before the groups whose collectives they hold
        if (model := getattr(self, "model", None)) is not None:  # None: it was refused
            model.row_buffers.transports.release()
        if self._owns_topology:
            bootstrap.stop(self.topology)

    def _on_all_ranks(self, make: Callable[[], _T]) -> _T:
        """Run `make` on every rank of all replicas; if it fails on any, raise its error on all."""
        error, made = None, None
        self._reporter.begin("loading the model")
        try:
            made = make()
        except (ValueError, OSError) as problem:
            error = str(problem)
        except (RuntimeError, MemoryError) as problem:
            error = describe_device_error(problem, self.topology.host)
            if error is None:
                raise
        self._reporter.wait()
        raise_on_any_rank(self.topology.host_world, error)
        self._reporter.begin("loading the model")
        assert made is not None or error is None
        return made  # pyright: ignore[reportReturnType]
