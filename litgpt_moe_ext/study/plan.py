"""The runs of a study: their arms, places in the grid, and seeds."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUDGET = "train.max_tokens"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        arm: Name of the arm, the variant that is compared.
        point: Its place in the grid, by setting.
        seed: Its seed.
        recipe: The recipe.
        settings: Flags of `run_train.py`, without the seed and `out_dir`.
    """

    arm: str
    point: dict[str, Any]
    seed: int
    recipe: Path
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """Identifies the run: a hash of the recipe's content, the settings and the seed."""
        content = [self.recipe.read_text(encoding="utf-8"), self.settings, self.seed]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """The run in words."""
        return ", ".join((self.label, f"seed {self.seed}"))

    @property
    def label(self) -> str:
        """The run in words, without its seed."""
        return ", ".join((self.arm, *(f"{name.split('.')[-1]} {value}" for name, value in self.point.items())))

    def flags(self, out_dir: Path) -> list[str]:
        """Return its command line for `litgpt-moe train`."""
        given = {**self.settings, "seed": self.seed, "out_dir": str(out_dir), "resume": "auto"}
        flags = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items()]
        return ["--config", str(self.recipe), *flags]


@dataclass(frozen=True)
class Study:
    """The content of a study file.

    Attributes:
        name: Name of the file.
        question: The question that the study answers.
        runs: Every run, all seeds of the smallest budget first.
        compare: The arms `moe` and `dense` to compute the compute multiplier of; empty for none.
        control: The arm that the others are compared with.
        searched: Settings that are searched; empty for none.
    """

    name: str
    question: str
    runs: list[Run]
    compare: dict[str, str] = field(default_factory=dict)
    control: str = ""
    searched: tuple[str, ...] = ()
