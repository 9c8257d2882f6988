"""The settings of a run: a tree of dataclasses that goes whole from the command line to `run`.

A key of a recipe is a field here, and its docstring is what `--help` and the documentation say. `tree` has the root,
`loop`, `outputs` and `distributed` its groups, `section` what they share. Importing them loads neither torch nor
LitGPT.
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
