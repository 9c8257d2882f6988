"""A mkdocs hook that adds the measured results, kept beside their benchmarks, as a page of the reference."""

from pathlib import Path

from mkdocs.structure.files import File, Files

_BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def on_files(files: Files, config: dict) -> Files:
    """Add `benchmarks/RESULTS.md` and its pictures to the pages."""
    # The file links to pages of the site by their path in the repository: ../docs/how-to/study.md.
    results = (_BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8").replace("](../docs/", "](../")
    files.append(File.generated(config, "reference/results.md", content=results))
    for picture in _BENCHMARKS.rglob("*.png"):
        place = f"reference/{picture.relative_to(_BENCHMARKS).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    return files
