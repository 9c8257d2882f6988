"""Measured blocks on the disk."""

import pytest
import torch

pytest.importorskip("triton")

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.moe.kernels.triton.tiling import tile_choice, tuned_tiles
from litgpt_moe_ext.moe.kernels.triton.tiling.tiles import RowsWork, Tile, WeightsWork, card_for
from litgpt_moe_ext.moe.kernels.triton.tiling.tuned_tiles import TunedTiles
from litgpt_moe_ext.training.callbacks.kernel_report import experts_line
from tests.fake_cuda import RECIPES
from tests.models import moe_config

ROWS = RowsWork("half", 8, 4096, 256, 128, 2, True, False, False)
WEIGHTS = WeightsWork("half", 8, 4096, 256, 128, 2, True, False, False, True)  # the same numbers
TUNED = TunedTiles({ROWS: Tile(64, 64, 64, 4, 2)}, {WEIGHTS: Tile(32, 64, 128, 8, 3)})


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card, whose file is in the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 3060 (12 GB)")
    monkeypatch.setattr(tile_choice, "capability_of", lambda _: (8, 6))
    monkeypatch.setattr(tile_choice, "processors_of", lambda _: 28)
    monkeypatch.setattr(tile_choice, "_TUNED", {})
    return torch.device("cuda", 0)


def keep_all(tuned, card):
    """Keep blocks of several products, and return the card's file."""
    for work, tile in [*tuned.rows.items(), *tuned.weights.items()]:
        file = tuned_tiles.keep(work, tile, card)
    return file


def test_runs_take_what_was_measured(card):
    """For exactly that product; others have the tables' blocks."""
    file = keep_all(TUNED, card)
    assert file.name.startswith("tiles-NVIDIA-GeForce-RTX-3060-12-GB-")
    assert tile_choice.rows_tile(ROWS, card) == Tile(64, 64, 64, 4, 2)
    assert tile_choice.weights_tile(WEIGHTS, card) == Tile(32, 64, 128, 8, 3)
    tables = card_for((8, 6)).tiles["half"]
    other = ROWS._replace(scatter=True)
    assert tile_choice.rows_tile(other, card) == tables.for_rows(other, 28)
    for gradient in (WEIGHTS._replace(add=True), WEIGHTS._replace(float32=False)):
        assert tile_choice.weights_tile(gradient, card) == tables.for_weights(gradient, 28)


def test_what_is_measured_later_is_kept_beside_it(card):
    other = ROWS._replace(n_row=8192)
    keep_all(TUNED, card)
    keep_all(TunedTiles({other: Tile(16, 64, 64, 4, 2), ROWS: Tile(128, 64, 64, 4, 2)}, {}), card)
    assert tuned_tiles.read(card) == TunedTiles(
        {ROWS: Tile(128, 64, 64, 4, 2), other: Tile(16, 64, 64, 4, 2)}, TUNED.weights
    )


def test_the_tables_block_is_back_where_it_is_as_fast_now(card):
    keep_all(TUNED, card)
    tuned_tiles.keep(ROWS, None, card)
    assert tuned_tiles.read(card) == TunedTiles({}, TUNED.weights)


def test_no_file_for_what_the_tables_have(card):
    assert not tuned_tiles.keep(ROWS, None, card).exists()


def test_another_version_of_triton_is_another_file(card, monkeypatch):
    """Which may need more shared memory for the same block."""
    keep_all(TUNED, card)
    monkeypatch.setattr("triton.__version__", "99.0")
    assert tuned_tiles.read(card) == TunedTiles({}, {})


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rows": []}', '{"rows": [{"work": {}, "tile": {}}], "weights": []}', "\x00"]
)
def test_a_damaged_file_is_named(card, text):
    file = keep_all(TUNED, card)
    file.write_text(text)
    with pytest.raises(SettingsError, match=r"tiles-NVIDIA.*\.json must hold the blocks.*delete it"):
        tuned_tiles.read(card)


def test_the_run_says_what_was_measured(card, monkeypatch):
    config = moe_config(expert_backend="triton", n_embd=128, moe_intermediate_size=128)
    monkeypatch.setattr("litgpt_moe_ext.moe.experts.Experts.backend_for", lambda *_: "triton")
    monkeypatch.setattr(torch, "empty", lambda *size, **_: torch.zeros(*size))
    with torch.device("meta"):
        from litgpt import GPT

        model = GPT(config)
    assert experts_line(model, card, False) == "experts: triton for torch.float32 on cuda (forced)"
    keep_all(TUNED, card)
    tuned_tiles.keep(ROWS._replace(n_row=32768), Tile(64, 64, 64, 4, 2), card)
    line = experts_line(model, card, False)
    assert line == "experts: triton for torch.float32 on cuda (forced, blocks measured for 2,048 and 16,384 tokens)"


@pytest.mark.parametrize(
    ("name", "message"),
    [("quickstart.yaml", "tune: needs a GPU"), ("nanogpt-tinystories.yaml", "must have experts of this package")],
)
def test_nothing_to_measure(monkeypatch, capsys, name, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = next(file for file in RECIPES if file.name == name)
    assert main(["tune", str(recipe)]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def experts_by(monkeypatch):
    """Have a card there on which another backend computes the experts."""

    def computes(backend):
        here = torch.device("cpu"), torch.float32, torch.autocast("cpu", enabled=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr("litgpt_moe_ext.inspect.doctor.run_here.computing", lambda _: here)
        monkeypatch.setattr("litgpt_moe_ext.moe.experts.Experts.backend_for", lambda *_: backend)

    return computes


def test_other_backends_have_no_blocks(experts_by, capsys):
    """As torch's product has none, which is the choice on Blackwell for data centres."""
    experts_by("grouped_mm")
    assert main(["tune", str(next(file for file in RECIPES if file.name == "quickstart.yaml"))]) == 2
    assert "has its experts computed by grouped_mm here" in capsys.readouterr().err


def test_no_room_for_what_is_measured(card, experts_by, monkeypatch, tmp_path, capsys):
    """Said before anything is."""
    experts_by("triton")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("litgpt_moe_ext.inspect.tuning.products_of", lambda *_: pytest.fail("measured"))
    assert main(["tune", str(next(file for file in RECIPES if file.name == "quickstart.yaml"))]) == 2
    assert "XDG_CACHE_HOME: " in (error := capsys.readouterr().err)
    assert f"cannot be made, because '{tmp_path / 'file'}' is a file" in error
