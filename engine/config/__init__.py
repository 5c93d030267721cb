"""Settings: schema, validation, YAML loading."""

from engine.config.schema import (
    CapacityConfig,
    Config,
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
