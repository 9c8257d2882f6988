"""Runs as they are read from csv logs."""

import os
import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.inspect.runs.figures import curves_figure
from litgpt_moe_ext.inspect.runs.logs import RunLog, distinct_names, load_run
from litgpt_moe_ext.pictures import style
from litgpt_moe_ext.pictures.expert_load import load_over_steps_figure, thinned
from litgpt_moe_ext.pictures.style import dots_of, line_of, png
from litgpt_moe_ext.training.checkpoint.earlier import set_aside

HEADER = (
    "iter,step,iter_time,loss,total_tokens,val_loss,moe/max_vio,grad_norm,moe_load_01/expert_00,moe_load_01/expert_01"
)


def write_log(directory, version, lines):
    folder = directory / "logs" / "csv" / f"version_{version}"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join([HEADER, *lines]) + "\n")


@pytest.fixture
def resumed(tmp_path):
    directory = tmp_path / "a" / "run"
    write_log(directory, 0, ["2,1,0.5,3.0,100,,0.2,1.0,1.2,0.8", ",1,,,,2.9,,,,", "4,2,0.5,2.5,200,,0.1,1.0,1.1,0.9"])
    write_log(directory, 10, ["6,3,0.25,1.5,300,,0.0,2.0,1.0,1.0"])
    write_log(directory, 2, ["4,2,0.5,2.0,200,,0.1,1.0,0.6,1.4"])
    return directory


def test_parts_of_a_resumed_run_are_put_together(resumed):
    run = load_run(resumed)
    tokens, loss = run.series("loss")
    assert tokens.tolist() == [100, 200, 300]
    assert loss.tolist() == [3.0, 2.0, 1.5], "the repeated step counts once, as the later part has it"
    assert [values.tolist() for values in run.series("val_loss")] == [[100], [2.9]]
    assert [values.tolist() for values in run.tokens_per_second()] == [[100, 200, 300], [100, 100, 200]]
    steps, layers = run.expert_load()
    assert steps.tolist() == [1, 2, 3]
    assert list(layers) == [1]
    assert np.array_equal(layers[1], [[1.2, 0.6, 1.0], [0.8, 1.4, 1.0]])
    assert len(run.series("nothing")[1]) == 0


def test_the_wide_table_of_a_run(tmp_path):
    """It has everything in one place; a row is a step, with the validation that followed it."""
    (tmp_path / "metrics-wide.csv").write_text(
        "step,total_tokens,loss,val_loss,tokens_per_second\n1,100,3.0,,50\n2,200,2.5,2.9,60\n"
    )
    run = load_run(tmp_path)
    assert [values.tolist() for values in run.tokens_per_second()] == [[100, 200], [50, 60]]
    assert [values.tolist() for values in run.series("loss")] == [[100, 200], [3.0, 2.5]]
    assert [values.tolist() for values in run.series("val_loss")] == [[200], [2.9]]


def test_a_loss_that_is_no_number_is_not_taken_for_none(tmp_path):
    text = "step,total_tokens,loss,val_loss\n1,100,3.0,2.9\n2,200,nan,nan\n3,nan,2.0,\n"
    (tmp_path / "metrics-wide.csv").write_text(text)
    run = load_run(tmp_path)
    assert [values.tolist() for values in run.series("val_loss")] == [[100, 200], [2.9, np.inf]]
    assert run.series("loss")[1].tolist() == [3.0, np.inf]


def test_a_new_run_in_the_same_place_is_a_run_of_its_own(tmp_path):
    """Its first line may come later than some of the earlier run's."""
    directory = tmp_path / "run"
    write_log(directory, 0, ["2,1,0.5,3.0,100,,,,,", "4,2,0.5,2.5,200,,,,,"])
    assert set_aside(directory) == tmp_path / "run-earlier-1"
    write_log(directory, 0, ["4,2,0.5,9.0,200,,,,,"])
    assert load_run(directory).series("loss")[1].tolist() == [9.0]
    assert load_run(tmp_path / "run-earlier-1").series("loss")[1].tolist() == [3.0, 2.5]


def test_command_draws(resumed, tmp_path, capsys, monkeypatch):
    drawn, draw = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *args, **options: drawn.append(draw(*args, **options)))
    other = tmp_path / "b" / "run"
    write_log(other, 0, ["1,1,0.5,3.5,100,,,,,"])
    assert distinct_names([resumed, other]) == ["a/run", "b/run"]
    out = tmp_path / "out"
    assert main(["compare-runs", str(resumed), str(other), f"--out_dir={out}"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "load-0.png", "report.html"]
    assert "a/run" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert len(drawn) == 2, "each picture is drawn once, for its file and for the page"
    for name in ("load-1.png", "load-mine.png"):  # of an earlier call with more runs, and of somebody else
        (out / name).touch()
    assert main(["compare-runs", str(resumed), f"--out_dir={out}"]) == 0
    assert sorted(path.name for path in out.glob("load*")) == ["load-0.png", "load-mine.png"]


def test_figures_show_the_numbers(resumed):
    run = load_run(resumed)
    loss_panel = curves_figure([run]).axes[0]
    assert loss_panel.lines[0].get_ydata().tolist() == [3.0, 2.0, 1.5]
    (image,) = load_over_steps_figure(run.name, *run.expert_load()).axes[0].images
    assert np.allclose(image.get_array(), np.log2([[1.2, 0.6, 1.0], [0.8, 1.4, 1.0]]))
    assert image.get_extent() == [0.5, 3.5, 1.5, -0.5]


def test_columns_stand_at_their_steps():
    """Also where a resume has changed how often a line is logged."""
    steps = [10, 20, 30, 40, 140, 240]
    image = load_over_steps_figure("run", steps, {0: np.array([[1.0, 1.0, 1.0, 1.0, 4.0, 4.0]])}).axes[0].images[0]
    row, (left, right, *_) = np.asarray(image.get_array())[0], image.get_extent()
    first = left + (right - left) * np.argmax(row > 1) / len(row)
    assert first == pytest.approx(90, abs=1), "half-way from 40 to 140"
    even = load_over_steps_figure("run", [10, 20, 30, 35], {0: np.ones((1, 4))}).axes[0].images[0]
    assert even.get_array().shape == (1, 4), "half a column at the end moves nothing"


def test_columns_are_thinned_by_their_means():
    values = np.arange(14.0).reshape(2, 7)
    assert thinned(values, 7) is not values
    assert np.array_equal(thinned(values, 10), values)
    assert thinned(values, 3).tolist() == [[0.5, 2.5, 5.0], [7.5, 9.5, 12.0]]
    assert thinned(values, 1).tolist() == [[3.0], [10.0]]


def test_a_directory_without_logs_is_named(tmp_path, capsys):
    assert main(["compare-runs", str(tmp_path)]) == 2
    assert "logger_name: csv" in capsys.readouterr().err


def test_a_log_that_ends_before_its_first_line_is_said(tmp_path, capsys):
    for text in ("", "step,total_tokens,loss\n", "step,val_loss\n1,2.0\n"):
        (tmp_path / "metrics-wide.csv").write_text(text)
        assert main(["compare-runs", str(tmp_path)]) == 2
        assert "must have logged a line with total_tokens; train for at least" in capsys.readouterr().err


def test_logs_that_others_have_changed(tmp_path, resumed, capsys):
    write_log(resumed, "copy", ["8,4,0.5,9.0,400,,,,,"])
    assert load_run(resumed).series("loss")[1].tolist() == [3.0, 2.0, 1.5]
    file = tmp_path / "metrics-wide.csv"
    file.write_text("step,total_tokens,loss\n1,100,3.0\n2,200,2.5,2.9,7\n")
    assert load_run(tmp_path).series("loss")[1].tolist() == [3.0, 2.5]
    file.write_bytes(bytes(range(256)))
    assert main(["compare-runs", str(tmp_path), f"--out_dir={tmp_path / 'out'}"]) == 2
    assert "metrics-wide.csv cannot be read ('utf-8' codec can't decode" in capsys.readouterr().err


def test_names_of_any_kind_are_seen_whole(tmp_path):
    """Dollar signs begin no formula, four long names have a line each, and a title has as many lines as it takes."""
    values = {"total_tokens": np.array([1.0, 2.0]), "loss": np.array([3.0, 2.0])}
    names = [f"an-experiment-with-many-settings-in-its-name-$_$-{number}" for number in range(4)] + ["x" * 300]
    curves = curves_figure([RunLog(name, values) for name in (*names, os.fsdecode(b"\xff"))])
    load = load_over_steps_figure(names[0], [1, 2], {0: np.ones((4, 2))})
    for figure, texts in ((curves, curves.legends[0].get_texts()), (load, load.texts)):
        png(figure)
        assert all(0 <= end <= figure.bbox.width for text in texts for end in text.get_window_extent().intervalx)
    assert [text.get_text() for text in curves.legends[0].get_texts()[:4]] == names[:4]


def make_font(path, family, characters):
    """Write a font in which every character is a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 500), (500, 500), (500, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"uni{ord(character):04X}" for character in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(dict(zip(map(ord, characters), names[1:], strict=True)))
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_names_are_drawn_in_any_font_that_is_installed(tmp_path, monkeypatch):
    """Chinese, Japanese and Korean ones too, of which matplotlib's own font has no character."""
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))
    make_font(tmp_path / "font.ttf", "Noto Sans CJK SC", "漢字")
    fontManager.addfont(tmp_path / "font.ttf")
    monkeypatch.setitem(style.STYLE, "font.family", style.font_families())
    figure = curves_figure([RunLog("漢字 run", {"total_tokens": np.array([1.0]), "loss": np.array([3.0])})])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a character that no font has
        png(figure)


def test_a_log_without_steps_has_no_load_over_them(tmp_path):
    (tmp_path / "metrics-wide.csv").write_text("total_tokens,loss,moe_load_00/expert_00\n10,3.0,1.0\n")
    assert load_run(tmp_path).expert_load()[1] == {}


def test_forty_curves_and_their_dots_can_be_told_apart():
    for drawn in (line_of, dots_of):
        assert len({tuple(drawn(number).values()) for number in range(40)}) == 40
