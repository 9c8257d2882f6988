"""The example of a data module: its documents, and a training run from them."""

from pathlib import Path

from litgpt_moe_ext.cli.train import main
from tests.data.test_text_corpus import stories, texts_in
from tests.docs.pages import recipe_of
from tests.runs import ROOT, logged, refused


def test_chapters(recipe, tmp_path, monkeypatch):
    # A comment in a block of code is no heading.
    written = [f"# Chapter {number}\n\n```bash\n# {number}\n```\n{text}\n" for number, text in enumerate(stories(60))]
    (tmp_path / "books").mkdir()
    for book in range(3):
        text = "".join(written[20 * book : 20 * book + 20])
        (tmp_path / "books" / f"{book}.md").write_text(text, encoding="utf-8", newline="\r\n" if book == 1 else "\n")
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(recipe_of("add_a_data_module"), encoding="utf-8")
    bpe = ["--data.bpe.vocab_size=300", '--data.bpe.special_tokens=["</s>"]']
    settings = ["--data.data_path=cache", "--data.val_fraction=0.3", *bpe]
    assert main(["--config", str(recipe()), "--config", "mine.yaml", "--train.max_steps=4", *settings]) == 0
    losses = [float(loss) for loss in logged(tmp_path / "out", "loss").values()]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    (corpus,) = (path.parent for path in (tmp_path / "cache").glob("*/manifest.json"))
    assert sorted(texts_in(corpus, "train") + texts_in(corpus, "val")) == sorted(written)


def test_a_book_that_is_not_utf_8(recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.md").write_bytes(b"# Caf\xe9\n")
    monkeypatch.syspath_prepend(ROOT / "examples")
    settings = {
        "source_path": str(tmp_path / "books"),
        "data_path": str(tmp_path / "cache"),
        "bpe": {"vocab_size": 300},
    }
    file = recipe(data={"class_path": "add_a_data_module.Chapters", "init_args": settings})
    assert refused(capsys, "--config", file).startswith(f"error: {tmp_path / 'books' / 'a.md'} is not UTF-8 at byte 5")
