"""Small synthetic corpora; every test is offline and works in its own temporary folder."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest


def _write_sources(folder: Path, count: int = 40, salt: int = 0) -> Path:
    """Writes `count` different Python files of a few hundred bytes, some in sub-folders, and returns `folder`."""
    rng = random.Random(salt)
    words = [
        f"{a}_{b}" for a in ("read", "write", "open", "close", "parse") for b in ("file", "line", "token", "stream")
    ]
    for index in range(count):
        lines = [f'"""Module {index} of salt {salt}: naïve café ✓."""', ""]
        for _ in range(12):
            name, other = rng.choice(words), rng.choice(words)
            lines.append(
                f"def {name}_{rng.randrange(100)}(value):\n    return {other}(value) + {rng.randrange(1000)}\n"
            )
        path = folder / f"package{index % 3}" / f"module{index:02}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("\n".join(lines).encode())
    return folder


@pytest.fixture(scope="session")
def write_sources() -> Callable[..., Path]:
    """``write_sources(folder, count=40, salt=0)`` writes a corpus into `folder`."""
    return _write_sources


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 Python files that no test may change."""
    return _write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Path:
    """A finished corpus of `sources` (vocabulary 300, a fifth validates) that no test may change."""
    from litgpt_moe_ext.data.corpora.python_stdlib import PythonStdlib

    settings = {"vocab_size": 300, "val_fraction": 0.2}
    return PythonStdlib(data_path=tmp_path_factory.mktemp("cache"), source_path=sources, **settings).prepare()
