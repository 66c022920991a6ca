"""Everything that a tuning run can be told: checked values, presets, files and options.

A leaf: what is set here is used by every stage, and nothing here knows a stage.
"""

from pvrt_tune.settings.recipe import (
    EFFORTS,
    AllocationSettings,
    FinetuneSettings,
    FitSettings,
    PVSettings,
    Recipe,
    StrategyName,
    TrainSettings,
    TuneJob,
)

__all__ = [
    "EFFORTS",
    "AllocationSettings",
    "FinetuneSettings",
    "FitSettings",
    "PVSettings",
    "Recipe",
    "StrategyName",
    "TrainSettings",
    "TuneJob",
]
