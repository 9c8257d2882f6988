"""The example of a data module: its documents, and a training run from them."""

from litgpt_moe_ext.cli.train import main
from tests.data.test_text_corpus import stories, texts_in
from tests.runs import ROOT, logged


def test_chapters(recipe, tmp_path, monkeypatch):
    written = [f"# Chapter {number}\n\n{text}\n" for number, text in enumerate(stories(60))]
    (tmp_path / "books").mkdir()
    for book in range(3):
        (tmp_path / "books" / f"{book}.md").write_text("".join(written[20 * book : 20 * book + 20]), encoding="utf-8")
    monkeypatch.syspath_prepend(ROOT / "examples")
    settings = {
        "source_path": str(tmp_path / "books"),
        "data_path": str(tmp_path / "cache"),
        "bpe": {"vocab_size": 300, "special_tokens": ["</s>"]},
        "val_fraction": 0.3,
    }
    file = recipe(data={"class_path": "add_a_data_module.Chapters", "init_args": settings})
    assert main(["--config", str(file), "--train.max_steps", "4"]) == 0
    losses = [float(loss) for loss in logged(tmp_path / "out", "loss").values()]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    (corpus,) = (path.parent for path in (tmp_path / "cache").glob("*/manifest.json"))
    assert sorted(texts_in(corpus, "train") + texts_in(corpus, "val")) == sorted(written)
