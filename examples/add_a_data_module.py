"""How to add a data module: a corpus of your own, as one class.

This one makes a document of every chapter of Markdown books. It inherits: a tokenizer of your choice, preparation (in
several processes, continued after an interruption, kept under a key of content and settings), a validation share,
packing, exact resume. Name it in a recipe, here on top of the quickstart, and put its folder on the Python path:

    data:
      class_path: add_a_data_module.Chapters
      init_args:
        source_path: books/
        bpe: {vocab_size: 2048}

    PYTHONPATH=examples uv run python run_train.py --config configs/quickstart.yaml --config my_recipe.yaml
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from litgpt_moe_ext.data import DocumentCorpus
from litgpt_moe_ext.data.pipeline.finding import find_files
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.sources import Source
from litgpt_moe_ext.data.reading.documents import documents
from litgpt_moe_ext.data.reading.record import Record, TextFormat


@dataclass(kw_only=True)
class Chapters(DocumentCorpus):
    """Chapters of Markdown books: a document begins at each first-level heading."""

    source_path: Path
    """Folder with the books."""

    def sources(self, hashes: FileHashes) -> list[Source]:
        """Return what to read: here a source per book.

        A source has a name for messages, the side its documents are on (None: a hash of each decides), its bytes, what
        tells its content from any other, and a function that starts reading from the beginning.
        """
        return [
            Source(str(book), None, book.stat().st_size, f"chapters:{hashes.hash(book)}", partial(chapters, book))
            for book in find_files("source_path", self.source_path, "**/*.md")
        ]


def chapters(book: Path) -> Iterator[Record]:
    """Yield the chapters of a book: the text, where it is, and how many bytes are read up to its end."""
    # The package's reader refuses what is not UTF-8 text, with its place, and makes line ends of any style LF.
    (whole,) = documents(book, TextFormat())
    read, start, lines, in_code = 0, 1, [], False
    for number, line in enumerate(whole.text.split("\n"), start=1):
        if line.startswith("# ") and lines and not in_code:
            yield Record("\n".join([*lines, ""]), f"line {start}", read)
            start, lines = number, []
        in_code ^= line.startswith("```")
        lines.append(line)
        read += len(line.encode()) + 1
    yield Record("\n".join(lines), f"line {start}", whole.position)
