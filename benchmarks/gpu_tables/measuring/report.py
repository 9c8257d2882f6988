"""Tables as Markdown on the screen, and in a file."""

import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_tables.measuring.bench import Bench, described


class Report:
    """Shows tables while they are measured; the file is written anew after every row.

    Args:
        file: Where they are kept.
        environment: What all of them depend on.
        resume: Whether to keep the tables that the file has.
    """

    def __init__(self, file: Path, environment: dict[str, Any], resume: bool) -> None:
        self.file, self._environment = file, environment
        self._tables: list[dict[str, Any]] = []
        if resume and file.is_file():
            self._tables = json.loads(file.read_text(encoding="utf-8"))["tables"]
        facts = "\n".join(f"- {name}: {value}" for name, value in environment.items())
        print(f"# {environment.get('card', 'CPU')}\n\n{facts}")

    @property
    def names(self) -> set[str]:
        """Those of the tables that are there."""
        return {table["name"] for table in self._tables}

    def add(self, name: str, title: str, rows: Iterator[dict[str, Any]], bench: Bench) -> None:
        """Measure a table row by row until it or its time ends; an error ends no more than the table."""
        kept: list[dict[str, Any]] = []
        bench.notes = []
        self._tables.append({"name": name, "title": title, "rows": kept, "notes": bench.notes})
        print(f"\n## {title}\n")
        try:
            for row in rows:
                if not kept:
                    print("| " + " | ".join(row) + " |\n" + "| --- " * len(row) + "|")
                print("| " + " | ".join(_cell(value) for value in row.values()) + " |", flush=True)
                kept.append(row)
                self.save()
                bench.free_memory()
                if bench.budget.is_spent:
                    bench.note("out of time: the rest is left out")
                    break
        except Exception as error:
            traceback.print_exc()
            bench.note(f"the rest is left out: {described(error)}")
        self.save()

    def save(self) -> None:
        new = self.file.with_name(self.file.name + ".new")
        new.write_text(
            json.dumps({"environment": self._environment, "tables": self._tables}, indent=1), encoding="utf-8"
        )
        new.replace(self.file)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
