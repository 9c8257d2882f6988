"""Exports of checkpoints at the end of a run (`checkpoint.export`)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.training.checkpoint.progress import BEST, FINAL
from litgpt_moe_ext.training.logs import EXPORTS_FOLDER
from litgpt_moe_ext.wording import in_shell

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config
    from litgpt_moe_ext.training.phases.launch import Launched
    from litgpt_moe_ext.training.phases.plan import Plan


def check_exports(plan: Plan) -> None:
    """Raise SettingsError if this model cannot be exported to a format in `checkpoint.export`."""
    from litgpt_moe_ext.export.formats import check_exportable

    for name in plan.settings.checkpoint.export_formats:
        try:
            check_exportable(cast("Config", plan.config), name)
        except SettingsError as error:
            reason = str(error).removeprefix(f"format: {name}: ")
            raise SettingsError(f"checkpoint.export: {name}: {reason}") from error


def export_checkpoints(launched: Launched) -> None:
    """Export `best` and `final`; a failure is only printed, and the run still counts as a success."""
    plan, fabric = launched.plan, launched.fabric
    if not fabric.is_global_zero:
        return
    for checkpoint in (plan.out_dir / BEST, plan.out_dir / FINAL):
        for name in plan.settings.checkpoint.export_formats:
            if checkpoint.is_dir():
                fabric.print(_export(checkpoint, plan.out_dir / EXPORTS_FOLDER / f"{checkpoint.name}-{name}", name))


def _export(checkpoint: Path, out_dir: Path, name: str) -> str:
    from litgpt_moe_ext.export.formats import export

    try:
        # Remove the export of an earlier end of this run.
        shutil.rmtree(out_dir, ignore_errors=True)
        return export(checkpoint, out_dir, name)[-1]
    except Exception as error:  # in any case the checkpoint exists
        reason = one_line(error) or type(error).__name__
        command = in_shell("litgpt-moe", "export", checkpoint, out_dir, "--format", name)
        return f"Warning: {checkpoint} was not exported ({reason}). To repeat: {command}"
