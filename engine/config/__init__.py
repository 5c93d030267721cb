"""Settings: schema, validation, YAML loading."""

from engine.config.schema import (
    CONTIGUOUS,
    CapacityConfig,
    Config,
    CopiesConfig,
    DispatchConfig,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    OverlapConfig,
    ParallelConfig,
    ProfilerConfig,
    RequestPhase,
    RuntimeConfig,
    SamplingConfig,
    SchedulerConfig,
)
