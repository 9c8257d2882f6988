"""The settings of a run: a tree of dataclasses, passed as a whole from the command line to `run`.

Every key of a recipe is a field here, and `--help` and the documentation show the field's docstring. The root is in
`tree`, its groups are in `loop`, `outputs` and `distributed`, and their base class is in `section`. Importing them
loads neither torch nor LitGPT.
"""

from litgpt_moe_ext.training.settings.distributed import DistributedArgs, StrategyName
from litgpt_moe_ext.training.settings.loop import (
    AnomalyArgs,
    EmaArgs,
    EvalArgs,
    LogArgs,
    ParameterGroupArgs,
    ScheduleArgs,
    ScheduleName,
    TrainArgs,
)
from litgpt_moe_ext.training.settings.outputs import CheckpointArgs, EvaluateArgs, SampleArgs
from litgpt_moe_ext.training.settings.section import Row, Section, field_table
from litgpt_moe_ext.training.settings.tree import Settings

__all__ = [
    "AnomalyArgs",
    "CheckpointArgs",
    "DistributedArgs",
    "EmaArgs",
    "EvalArgs",
    "EvaluateArgs",
    "LogArgs",
    "ParameterGroupArgs",
    "Row",
    "SampleArgs",
    "ScheduleArgs",
    "ScheduleName",
    "Section",
    "Settings",
    "StrategyName",
    "TrainArgs",
    "field_table",
]
