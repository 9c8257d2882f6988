"""`litgpt-moe study`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import NonNegativeInt, PositiveFloat, PositiveInt
from litgpt_moe_ext.wording import counted, in_shell

if TYPE_CHECKING:
    from litgpt_moe_ext.study import plan
    from litgpt_moe_ext.study.launch import Outcome
    from litgpt_moe_ext.study.place import Places


@dataclass(frozen=True)
class Study:
    """Train a grid of settings over seeds and write what came out as one page, with the raw numbers beside it.

    Called again, an interrupted or killed study continues where it was; finished runs are reused as long as their
    settings stay the same. Exits with status 1 if runs are missing in the end. Ctrl-C, SIGTERM
    and SIGUSR1 let the runs save and end, and exit with status 130, 143 and 138.

    Attributes:
        study: A study (YAML file), like those in studies/.
        scale: A file that makes every run larger, like those in studies/scale/.
        out_dir: Where the runs, report.html and results.csv go. Default: a folder in out/studies/
            named after the study and the scale.
        jobs: Runs at a time. Default: one on every GPU, or on every core of a machine without. Small
            models leave most of a GPU idle; with more jobs than GPUs they share them, and seconds are not
            comparable.
        device_minutes: Stop after so many minutes; the next call continues.
        only: Train only the run with this number, from 0, and write no page.
        report: Train nothing; write the page from finished runs.
        slurm: Write a SLURM array script to this file instead of training.
    """

    study: Path
    scale: Path | None = None
    out_dir: Path | None = None
    jobs: PositiveInt | None = None
    device_minutes: PositiveFloat | None = None
    only: NonNegativeInt | None = None
    report: bool = False
    slurm: Path | None = None

    def run(self) -> int:
        """Train what is missing and write the page."""
        from litgpt_moe_ext.cli.paths import check_path
        from litgpt_moe_ext.study.file import load_study
        from litgpt_moe_ext.study.launch import check, is_finished, unfinished

        self._refuse_two_ways()
        study = load_study(self.study, self.scale)
        out_dir = self.out_dir or Path("out/studies") / study.name
        check_path("out_dir", out_dir)
        runs_dir = out_dir / "runs"
        if self.only is None and not self.report:
            check(run for run in study.runs if not is_finished(runs_dir, run))
        if self.slurm is not None:
            return self._write_script(self.slurm, len(study.runs))
        if self.only is not None:
            outcome = self._train(_only(study.runs, self.only), runs_dir)
            return 128 + outcome.signal if outcome.signal else int(bool(outcome.problems))
        if not self.report and (signal := self._train(study.runs, runs_dir).signal):
            return 128 + signal
        finished = [run for run in study.runs if is_finished(runs_dir, run)]
        missing = unfinished((run for run in study.runs if run not in finished), runs_dir)
        if self.report and missing:  # after a training it has been said
            print(*missing, sep="\n")
        if finished:
            _write_page(study, finished, missing, out_dir, self._command())
        goes_on = f"; `{self._command()}` goes on" if missing else ""
        print(f"{len(finished)} of {counted(len(study.runs), 'run')} finished{goes_on}")
        return int(bool(missing))

    def _refuse_two_ways(self) -> None:
        ways = {"only": self.only is not None, "report": self.report, "slurm": self.slurm is not None}
        if sum(ways.values()) > 1:
            first, second, *_ = (name for name, given in ways.items() if given)
            raise SettingsError(f"{first}: must not be given beside {second}; leave one of them out")

    def _command(self) -> str:
        options = {"--scale": self.scale, "--out_dir": self.out_dir}
        given = [word for name, value in options.items() if value for word in (name, str(value))]
        return in_shell("litgpt-moe", "study", self.study, *given)

    def _train(self, runs: "list[plan.Run]", runs_dir: Path) -> "Outcome":
        from litgpt_moe_ext.study.launch import train

        seconds = None if self.device_minutes is None else 60 * self.device_minutes
        outcome = train(runs, runs_dir, self._places(), seconds)
        print(*outcome.problems, sep="\n", end="\n" if outcome.problems else "")
        return outcome

    def _write_script(self, file: Path, runs: int) -> int:
        from litgpt_moe_ext.cli.output import write_text
        from litgpt_moe_ext.study.launch import slurm_script

        gpus = self._places().gpus
        write_text(file, slurm_script(self._command(), runs, min(gpus, 1)))
        print(f"Wrote {file}, {counted(runs, 'run')}; afterwards `{self._command()} --report` writes the page")
        if not gpus:
            command = in_shell("sbatch", "--gres=gpu:1", file)
            print(f"This machine has no GPU, so its tasks ask for none; `{command}` does")
        return 0

    def _places(self) -> "Places":
        import torch

        from litgpt_moe_ext.machine import count_cores
        from litgpt_moe_ext.study.place import Places

        gpus = torch.cuda.device_count()
        return Places(self.jobs or gpus or count_cores(), gpus)


def _only(runs: "list[plan.Run]", number: int) -> "list[plan.Run]":
    if number >= len(runs):
        raise SettingsError(f"only: {number} must be below {len(runs)}, the number of runs")
    return [runs[number]]


def _write_page(
    study: "plan.Study", finished: "list[plan.Run]", missing: list[str], out_dir: Path, command: str
) -> None:
    from litgpt_moe_ext.cli.output import print_table, write_text
    from litgpt_moe_ext.study.report.compare import grouped
    from litgpt_moe_ext.study.report.page import COLUMNS, rows, study_page, verdicts
    from litgpt_moe_ext.study.results import csv_text, read_results

    results = read_results(finished, out_dir / "runs")
    write_text(out_dir / "results.csv", csv_text(results))
    write_text(out_dir / "report.html", study_page(study, results, missing, command))
    # The page has the other columns; a terminal would break them within words.
    shown = [COLUMNS.index(name) for name in ("arm", "seeds", "validation loss", COLUMNS[5])]
    cells = [[row[i] for i in shown] for row in rows(study, grouped(results))]
    print_table(study.question or study.name, [COLUMNS[i] for i in shown], cells)
    print(*verdicts(study, results), sep="\n")
    print(f"Wrote {out_dir / 'report.html'} and results.csv beside it")
