"""Settings: schema, validation, YAML loading."""

from engine.config.attention import AttentionConfig
from engine.config.moe import (
    CONTIGUOUS,
    CapacityConfig,
    CopiesConfig,
    DispatchConfig,
    ExpertsConfig,
    MoEConfig,
    OverlapConfig,
    RequestPhase,
)
from engine.config.profiler import ProfilerConfig
from engine.config.runtime import RuntimeConfig, SchedulerConfig
from engine.config.sampling import SamplingConfig
from engine.config.schema import Config, ModelConfig, ParallelConfig
