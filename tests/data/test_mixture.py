"""Mixtures: the schedule of their rows, loaders that resume exactly, and what a mixture refuses."""

import os
import shutil
import signal
from fractions import Fraction
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt.utils import CycleIterator

from litgpt_moe_ext.cli.settings import litgpt_types, parse, read_given
from litgpt_moe_ext.cli.train import main
from litgpt_moe_ext.data import Mixture, PreparedCorpus, PythonStdlib, TextCorpus, TokenShards
from litgpt_moe_ext.data.loader import Order, Replica, TokenLoader
from litgpt_moe_ext.data.mixture.loader import MixedWindows, MixtureLoader, MixtureValidation, Part
from litgpt_moe_ext.data.mixture.schedule import LONGEST_PERIOD, Phases, Schedule, whole_shares
from litgpt_moe_ext.data.mixture.settings import Annealing, RunLength
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from litgpt_moe_ext.data.windows import StreamWindows
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.tokens.padding import PADDING
from litgpt_moe_ext.training.checkpoint.hyperparameters import to_plain
from litgpt_moe_ext.training.checkpoint.resharding import convert_position
from litgpt_moe_ext.training.steps.corpora import CorpusLosses
from tests.data.test_loader import take
from tests.data.test_text_corpus import stories
from tests.runs import ROOT, logged, train
from tests.settings import read_settings
from tests.training.processes import Training, in_ranks
from tests.training.signalling import wait_for_signal

EXAMPLE = [f"--config={ROOT / name}" for name in ("configs/quickstart.yaml", "examples/mixture.yaml")]
SHARES = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any)


def counts_by_row(corpora: np.ndarray, kinds: int) -> np.ndarray:
    """Count, after each row, how many each corpus has had: shape (rows + 1, kinds)."""
    taken = corpora[:, None] == np.arange(kinds)
    return np.concatenate([np.zeros((1, kinds), int), np.cumsum(taken, axis=0)])


@pytest.mark.parametrize(
    ("shares", "order"), [((5, 3, 2, 1), "01020103210"), ((7, 5, 3, 1), "0102101020103210"), ((1, 0, 1), "02")]
)
def test_the_order_stays_that_of_earlier_checkpoints(shares, order):
    """Another one that keeps all shares as well would give a resumed run some rows twice, and others never."""
    assert "".join(map(str, Schedule(shares).look_up(np.arange(sum(shares)))[0])) == order


@settings(max_examples=200)
@given(shares=SHARES, rows=st.integers(1, 400))
def test_shares_are_kept_to_less_than_a_row_at_every_moment(shares, rows):
    schedule = Schedule(shares)
    corpora, before = schedule.look_up(np.arange(rows))
    counts = counts_by_row(corpora, len(shares))
    assert (before == counts[np.arange(rows), corpora]).all()
    assert (schedule.counts(rows) == counts[rows]).all()
    present = sum(map(bool, shares))
    bound = 1 - Fraction(1, 2 * present - 2) if present > 1 else 0
    # Everything times the period, so that nothing is rounded.
    error = np.abs(counts * schedule.period - np.arange(rows + 1)[:, None] * np.array(shares))
    assert int(error.max()) <= bound * schedule.period


@settings(max_examples=100)
@given(first=SHARES, second=SHARES, border=st.integers(0, 120), rows=st.integers(1, 200))
def test_annealing_goes_on_where_the_first_phase_stood(first, second, border, rows):
    kinds = max(len(first), len(second))
    schedules = [Schedule([*shares, *[0] * (kinds - len(shares))]) for shares in (first, second)]
    phases = Phases(*schedules, border)
    corpora, before = phases.look_up(np.arange(rows))
    counts = counts_by_row(corpora, kinds)
    assert (before == counts[np.arange(rows), corpora]).all()
    assert all((phases.counts(row) == counts[row]).all() for row in range(rows + 1))
    assert (corpora[:border] == schedules[0].look_up(np.arange(min(border, rows)))[0]).all()
    assert (corpora[border:] == schedules[1].look_up(np.arange(max(rows - border, 0)))[0]).all()


@settings(max_examples=200)
@given(shares=st.lists(st.fractions(0, 10**6, max_denominator=10**7), min_size=1, max_size=6).filter(any))
def test_whole_shares_are_exact_or_rounded_to_the_longest_period(shares):
    whole = whole_shares(shares)
    assert [share > 0 for share in shares] == [number > 0 for number in whole]
    assert sum(whole) <= LONGEST_PERIOD + len(shares)
    for share, number in zip(shares, whole, strict=True):
        assert abs(Fraction(number, sum(whole)) - share / sum(shares)) <= Fraction(len(shares), LONGEST_PERIOD)


def test_percentages_are_exact():
    assert whole_shares([Fraction("0.7"), Fraction("0.25"), Fraction("0.05")]) == [14, 5, 1]
    assert whole_shares([Fraction("70"), Fraction(0), Fraction("30")]) == [7, 0, 3]


def parts_of(sizes, block_size=4) -> list[Part]:
    """Corpora with these numbers of windows; all ids of corpus i lie between 1000 * i and 1000 * (i + 1)."""
    return [
        Part(
            str(number),
            StreamWindows([np.arange(size * block_size + 1, dtype=np.uint16) + 1000 * number], block_size),
            Order(3, corpus=str(number)),
        )
        for number, size in enumerate(sizes)
    ]


def make(batch_size=2, replica=None, border=20, shares=((3, 1, 0), (1, 1, 2)), sizes=(11, 4, 6)) -> MixtureLoader:
    phases = Phases(Schedule(shares[0]), Schedule(shares[1]), border)
    return MixtureLoader(MixedWindows(parts_of(sizes), phases, "mixture"), batch_size, replica)


def test_every_corpus_gives_the_rows_that_it_gives_alone():
    rows = [row for batch in take(make(), 40) for row in batch]
    for number, part in enumerate(parts_of((11, 4, 6))):
        alone = TokenLoader(part.windows, 1, True, part.order)
        ours = [row for row in rows if row[0] // 1000 == number]
        assert ours == [batch[0] for batch in take(alone, len(ours))]
        assert len(ours) > len(part.windows)


def test_ranks_cut_the_batch_of_a_single_process():
    single = take(make(batch_size=6), 15)
    ranks = [take(make(replica=Replica(rank, 3)), 15) for rank in range(3)]
    assert single == [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("consumed", range(0, 18, 3))
@pytest.mark.parametrize(("batch", "world"), [(2, 1), (1, 2), (3, 2), (6, 1)])
def test_resume_at_every_position_with_any_number_of_processes(consumed, batch, world):
    whole = [row for part in take(make(), 36) for row in part]
    loader = make()
    take(loader, consumed)
    state = convert_position(loader.state_dict(), batch, world)
    ranks = [make(batch_size=batch, replica=Replica(rank, world)) for rank in range(world)]
    for rank in ranks:
        rank.load_state_dict(state)
    batches = [take(rank, 6) for rank in ranks]
    rows = [row for parts in zip(*batches, strict=True) for part in parts for row in part]
    assert rows == whole[2 * consumed :][: len(rows)]
    assert len(rows) == 6 * batch * world


def test_an_epoch_has_as_many_rows_as_all_corpora_together():
    loader = make()
    assert len(loader) == 10
    batches = [list(loader) for _ in range(3)]
    assert [len(epoch) for epoch in batches] == [11, 10, 11]  # of 21 rows, in batches of 2
    assert loader.epoch == 3
    rank = make(replica=Replica(1, 2))
    assert [len(list(rank)) for _ in range(3)] == [6, 5, 5]


def test_what_changes_the_order_is_refused_and_what_is_still_to_come_is_not():
    early, late = make(), make()
    take(early, 10)
    take(late, 11)
    other = {"shares": ((3, 1, 0), (1, 0, 3))}
    make(**other).load_state_dict(early.state_dict())
    with pytest.raises(SettingsError, match=r"resume: .*annealing: \[20, 1, 1, 2\] in the checkpoint"):
        make(**other).load_state_dict(late.state_dict())
    length = make().windows.block_size
    with pytest.raises(SettingsError, match=rf"began after {20 * length} .*from_tokens {20 * length}, and from_frac"):
        make(border=18).load_state_dict(late.state_dict())
    for loader, key in ((make(shares=((2, 1, 0), (1, 1, 2))), "weights"), (make(sizes=(11, 4, 7)), "corpora")):
        with pytest.raises(SettingsError, match=f"resume: .*{key}: "):
            loader.load_state_dict(early.state_dict())


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three folders of text of different lengths, and a tokenizer for them."""
    folder = tmp_path_factory.mktemp("texts")
    for number, count in enumerate((60, 25, 12)):
        (folder / f"{number}").mkdir()
        for index, text in enumerate(stories(count, number)):
            (folder / f"{number}" / f"{index:03}.txt").write_text(text, encoding="utf-8")
    train_bpe(stories(60), BPESettings(290), folder / "tokenizer")
    return folder


def text(texts, number, **changes):
    arguments = {"data_path": texts / "cache", "val_fraction": 0.3, "tokenizer_dir": texts / "tokenizer", **changes}
    return TextCorpus(source_path=texts / str(number), **arguments)


def opened(mixture: Mixture, length=RunLength(50, 4, 10), block_size=16) -> Mixture:  # noqa: B008
    mixture.plan_run(length)
    mixture.connect(batch_size=2, max_seq_length=block_size)
    mixture.prepare_data()
    mixture.setup()
    return mixture


def test_prepared_corpora_in_folders_of_one_name(texts, tmp_path):
    """What tells two corpora apart is what they are made of."""
    for name, number in {"a": 0, "b": 1, "c": 0}.items():
        shutil.copytree(text(texts, number).prepare(verbose=False), tmp_path / name / "corpus")
    a, b, c = (PreparedCorpus(corpus_dir=tmp_path / name / "corpus") for name in "abc")
    assert opened(Mixture({"a": a, "b": b}, {"a": 1, "b": 1})).train_dataloader()
    with pytest.raises(SettingsError, match=r"data.corpora.c: is the same corpus as a; "):
        opened(Mixture({"a": a, "c": c}, {"a": 1, "c": 1}))


def test_another_corpus_in_the_folder_of_one_that_was_read(texts, tmp_path):
    """As in a notebook, where a module has been set up before."""
    folder = tmp_path / "corpus"
    module, ids = PreparedCorpus(corpus_dir=folder), []
    for number in (0, 1):
        shutil.copytree(text(texts, number).prepare(verbose=False), folder)
        module.setup()
        ids.append(module.corpus_id)
        shutil.rmtree(folder)
    assert ids == [text(texts, number).prepare(verbose=False).name for number in (0, 1)]


def test_the_shares_of_a_module_are_those_of_tokens(texts, capsys):
    weights = {"a": 0.6, "b": 0.3, "c": 0.1}
    annealing = Annealing({"a": 1, "b": 1, "c": 2}, from_fraction=0.8)
    mixture = opened(Mixture({name: text(texts, i) for i, name in enumerate("abc")}, weights, annealing))
    loader = mixture.train_dataloader()
    assert "a 60% of" in capsys.readouterr().out
    assert loader.mixture.phases.border == 40 * 4
    assert loader.mixture.phases.counts(160).tolist() == [96, 48, 16]
    assert loader.mixture.phases.counts(200).tolist() == [106, 58, 36]
    list(islice(CycleIterator(loader), 100))
    assert loader.state_dict()["position"] == 100


@pytest.mark.parametrize("packing", ["pad", "best_fit"])
def test_rows_with_padding_count_by_their_tokens(texts, packing):
    corpora = {name: text(texts, i, packing=packing) for i, name in enumerate("ab")}
    mixture = opened(Mixture(corpora, {"a": 0.25, "b": 0.75}), block_size=48)
    assert mixture.pads, "which lets LitGPT weigh tokens"
    loader = mixture.train_dataloader()
    totals, rows = np.zeros(2), 0
    corpus_of = loader.mixture.phases.first
    while rows < 4000:
        batch = next(iter(loader))
        corpora_of_rows, _ = corpus_of.look_up(np.arange(rows, rows + len(batch)))
        np.add.at(totals, corpora_of_rows, (batch[:, 1:] != PADDING).sum(1).numpy())
        rows += len(batch)
    assert totals[1] / totals.sum() == pytest.approx(0.75, abs=0.01)


def test_seed_and_weights_are_the_mixtures_and_shuffling_its_corpora(texts):
    corpora = {"a": text(texts, 0, seed=1), "b": text(texts, 1, shuffle=False)}
    mixture = opened(Mixture(corpora, {"a": 3.0, "b": 1.0}, seed=7))
    made_of = mixture.train_dataloader().state_dict()["fingerprint"]
    assert (made_of["seed"], made_of["shuffle"], made_of["weights"]) == ([7, 7], [True, False], [3, 1])
    assert mixture.val_dataloader().weights == {"a": 3.0, "b": 1.0}


def test_validation_takes_the_corpora_in_turn(texts):
    mixture = opened(Mixture({name: text(texts, i) for i, name in enumerate("abc")}, dict.fromkeys("abc", 1.0)))
    loader = mixture.val_dataloader()
    names = list(loader.names())
    batches = list(loader)
    assert len(names) == len(batches) == len(loader)
    assert names[:3] == ["a", "b", "c"]
    for name, module in mixture.parts.items():
        alone = list(module.val_dataloader())
        ours = [batch for batch, of in zip(batches, names, strict=True) if of == name]
        assert all(torch.equal(one, other) for one, other in zip(ours, alone, strict=True))


def losses_by_corpus(ranks: int) -> dict[str, float]:
    """Validate on what is this rank's part of six batches of known losses and sizes."""
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    mixture = MixtureValidation.__new__(MixtureValidation)
    mixture.weights, mixture.names = {"a": 1, "b": 3}, lambda: iter("abab"[: 4 // ranks] + "a" * 2)
    means, counts = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10, 20, 30, 60])
    ours = slice(2 * rank, 2 * rank + 2) if ranks > 1 else slice(4)
    losses = CorpusLosses(ranks)
    whole = losses.mean(mixture, means[ours], counts[ours])
    metrics = {"val_loss": float(whole)}
    losses.on_log(metrics)
    return metrics


def test_validation_of_what_only_the_annealing_reads():
    """LitGPT's check that validation works sees a few batches; its loss is a number."""
    mixture = SimpleNamespace(weights={"a": 0.0, "b": 0.0, "c": 1.0}, names=lambda: iter("abc"))
    assert CorpusLosses(1).mean(mixture, torch.tensor([1.0, 2.0]), torch.tensor([10, 20])) == 1.5


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_validation_by_corpus_is_a_mean_over_the_tokens_of_all_ranks(ranks):
    found = [losses_by_corpus(1)] if ranks == 1 else in_ranks(losses_by_corpus, 2, 2)
    for metrics in found:
        assert metrics == {
            "val_loss": pytest.approx((2.5 + 3 * 3.5) / 4),
            "val_loss/a": pytest.approx((1 * 10 + 3 * 30) / 40),
            "val_loss/b": pytest.approx((2 * 20 + 4 * 60) / 80),
        }


def test_the_first_tokenizer_encodes_the_others(texts, sources):
    code = PythonStdlib(data_path=texts / "cache", source_path=sources, vocab_size=300, val_fraction=0.2)
    mixture = Mixture({"code": code, "text": text(texts, 1, tokenizer_dir=None)}, {"code": 1, "text": 1})
    mixture.connect(batch_size=2, max_seq_length=16)
    mixture.setup()  # alone, as on ranks that are not the first
    assert mixture.prepare_tokenizer() == code.corpus_path / "tokenizer"
    known = (code.corpus_path / "tokenizer" / "tokenizer.json").read_text()
    assert (mixture.parts["text"].corpus_path / "tokenizer" / "tokenizer.json").read_text() == known


def test_a_tokenizer_with_several_ends_of_text_encodes_the_others(texts, tmp_path):
    """The first one counts, as everywhere."""
    directory = shutil.copytree(texts / "tokenizer", tmp_path / "tokenizer")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    first, second = text(texts, 0, tokenizer_dir=directory), text(texts, 1, tokenizer_dir=None)
    opened(Mixture({"a": first, "b": second}, {"a": 1, "b": 1}))
    assert first.manifest["eos_id"] == second.manifest["eos_id"] == 0


def test_ready_made_shards_and_prepared_corpora(texts, corpus, tmp_path):
    for name in ("train.npy", "val.npy"):
        np.save(tmp_path / name, np.arange(500, dtype="<u2") % 300)
    shards = {"data_path": tmp_path}
    mixture = Mixture({"shards": TokenShards(**shards), "code": PreparedCorpus(corpus)}, {"shards": 1, "code": 1})
    mixture.require_vocabulary(300)
    assert len(next(iter(opened(mixture).train_dataloader()))) == 2
    narrow = Mixture({"code": PreparedCorpus(corpus), "shards": TokenShards(**shards)}, {"shards": 1, "code": 1})
    narrow.require_vocabulary(299)
    with pytest.raises(SettingsError, match=r"has a vocabulary of 300 tokens, more than the model's .* of 299"):
        opened(narrow)
    mixture = Mixture(
        {"code": PreparedCorpus(corpus), "shards": TokenShards(**shards, vocab_size=400)}, {"shards": 1, "code": 1}
    )
    with pytest.raises(SettingsError, match=r"data.corpora.shards: has vocabulary 400 where code has 300; "):
        opened(mixture)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"a": 1, "b": -1}}, r"data.weights.b: -1 must be a number of at least 0; "),
        ({"weights": {"a": 1, "b": NAN}}, r"data.weights.b: nan must be a number"),
        ({"weights": {"a": 1, "b": INF}}, r"data.weights.b: inf must be a number"),
        ({"weights": {"a": 0, "b": 0}}, r"data.weights: .* must not all be 0; "),
        ({"weights": {"a": 1, "b": 0}}, r"data.weights.b: 0 means that this corpus is never read; leave it out"),
        (
            {"weights": {"a": 1, "b": 0}, "annealing": Annealing({"a": 1, "b": 0}, from_step=1)},
            r"data.weights.b: 0 means that this corpus is never read; leave it out",
        ),
        ({"weights": {"a": 1, "b": 1, "c": 1}}, r"data.weights.c: must be one of data.corpora, a, b; "),
        ({"weights": {"a": 1}}, r"data.weights: .* must have a weight for b of data.corpora; "),
        ({"annealing": Annealing({"a": 1, "b": 1})}, r"data.annealing: no beginning must be exactly one of"),
        (
            {"annealing": Annealing({"a": 1, "b": 1}, from_step=1, from_tokens=1)},
            r"data.annealing: from_step, from_tokens must be exactly one of",
        ),
        ({"annealing": Annealing({"a": 1, "b": -2}, from_step=1)}, r"data.annealing.weights.b: -2 must be a number"),
        ({"annealing": Annealing({"a": 1}, from_step=1)}, r"data.annealing.weights: .* must have a weight for b"),
        ({"max_epochs": 0.0}, r"data.max_epochs: 0.0 must be a number above 0"),
        ({"max_epochs": NAN}, r"data.max_epochs: nan must be a number above 0"),
        ({"seed": -1}, r"data.seed: -1 must be an integer of at least 0"),
    ],
)
def test_impossible_settings_are_refused(texts, changes, message):
    arguments = {"corpora": {"a": text(texts, 0), "b": text(texts, 1)}, "weights": {"a": 1, "b": 1}, **changes}
    with pytest.raises(SettingsError, match=message):
        Mixture(**arguments)


def test_a_corpus_may_be_read_in_one_phase_only(texts):
    corpora = {"a": text(texts, 0), "b": text(texts, 1)}
    for first, later in (({"a": 1, "b": 0}, {"a": 1, "b": 1}), ({"a": 1, "b": 1}, {"a": 1, "b": 0})):
        assert Mixture(corpora, first, Annealing(later, from_step=1)).weights == first


@pytest.mark.parametrize(
    ("beginning", "message"),
    [
        ({"from_fraction": 1.0}, r"data.annealing.from_fraction: 1.0 must be a number of at least 0 and below 1"),
        ({"from_step": -1}, r"data.annealing.from_step: -1 must be an integer of at least 0"),
        ({"from_tokens": 0.5}, r"data.annealing.from_tokens: 0.5 must be an integer of at least 0"),
    ],
)
def test_impossible_beginnings_are_refused(beginning, message):
    with pytest.raises(SettingsError, match=message):
        Annealing({"a": 1, "b": 1}, **beginning)


def test_corpora_that_do_not_fit_together_are_refused(texts, tmp_path):
    ones = {"a": 1.0, "b": 1.0}
    with pytest.raises(SettingsError, match=r"data.corpora.b.packing: 'pad' must be 'stream', that of a; "):
        Mixture({"a": text(texts, 0), "b": text(texts, 1, packing="pad")}, ones)
    with pytest.raises(SettingsError, match=r"data.corpora: the name 'a b' must consist of letters"):
        Mixture({"a b": text(texts, 0)}, {"a b": 1})
    with pytest.raises(SettingsError, match=r"data.corpora: \{\} must name at least one corpus"):
        Mixture({}, {})
    with pytest.raises(SettingsError, match=r"data.corpora.b: is the same corpus as a; "):
        opened(Mixture({"a": text(texts, 0), "b": text(texts, 0)}, ones))
    with pytest.raises(SettingsError, match=r"data.corpora.b: has beginning of text 0 where a has None; set prepend"):
        opened(Mixture({"a": text(texts, 0), "b": text(texts, 1, prepend_bos=True)}, ones))
    first = text(texts, 0, data_path=tmp_path / "none")
    own = text(texts, 1, tokenizer_dir=None, bpe=BPESettings(280), data_path=tmp_path / "none")
    with pytest.raises(SettingsError, match=r"data.corpora.b: TextCorpus trains a tokenizer of its own.* leave bpe"):
        opened(Mixture({"a": first, "b": own}, ones))
    code = PythonStdlib(data_path=tmp_path / "none")
    with pytest.raises(SettingsError, match=r"data.corpora.b: PythonStdlib .* put b first, and leave bpe .* of a"):
        opened(Mixture({"a": first, "b": code}, ones))
    with pytest.raises(SettingsError, match=r"data.corpora.b: PythonStdlib .* read the files of one .* TextCorpus"):
        opened(Mixture({"a": code, "b": PythonStdlib(data_path=tmp_path / "none", packages=True)}, ones))
    with pytest.raises(SettingsError, match=r"data.corpora.b.source_path: '.*nowhere' does not exist; set it to"):
        opened(Mixture({"a": first, "b": text(texts, "nowhere")}, ones))
    both = text(texts, 1, bpe=BPESettings(280), data_path=tmp_path / "none")
    with pytest.raises(SettingsError, match=r"data.corpora.b.tokenizer_dir: .* and data.bpe are both set; keep"):
        opened(Mixture({"a": first, "b": both}, ones))
    lost = text(texts, 1, tokenizer_dir=tmp_path / "nowhere", data_path=tmp_path / "none")
    with pytest.raises(SettingsError, match=r"data.corpora.b.tokenizer_dir: .*nowhere"):
        opened(Mixture({"a": first, "b": lost}, ones))
    assert not (tmp_path / "none").exists()  # nothing was encoded
    train_bpe(stories(9), BPESettings(270), tmp_path / "other")
    other = text(texts, 1, tokenizer_dir=tmp_path / "other", data_path=tmp_path / "none")
    with pytest.raises(SettingsError, match=r"data.corpora.b.tokenizer_dir: is not the tokenizer of a, so"):
        opened(Mixture({"a": text(texts, 0), "b": other}, ones))
    assert not (tmp_path / "none").exists()  # nothing was encoded
    prepared = PreparedCorpus(other.prepare(verbose=False))
    with pytest.raises(SettingsError, match=r"data.corpora.b: is not the tokenizer of a, so"):
        opened(Mixture({"a": text(texts, 0), "b": prepared}, ones))


def test_what_only_the_length_of_the_run_tells_is_asked_for(texts):
    corpora = {"a": text(texts, 0), "b": text(texts, 2)}
    weights = {"a": 1.0, "b": 1.0}
    by_step = Mixture(corpora, weights, Annealing({"a": 1, "b": 3}, from_step=10))
    by_step.connect(batch_size=2, max_seq_length=16)
    by_step.setup()
    with pytest.raises(SettingsError, match=r"data.annealing.from_step: 10 needs the length of the run"):
        by_step.train_dataloader()
    assert opened(by_step, RunLength(400, 4, 10)).train_dataloader().mixture.phases.border == 10 * 4
    assert Annealing({}, from_fraction=0.9).first_row(RunLength(25, 4, 10), 16) == 22 * 4
    assert Annealing({}, from_fraction=0.9).first_row(RunLength(3, 4, 10, 25), 16) == 22 * 4  # ends early
    assert Annealing({}, from_fraction=0.29).first_row(RunLength(100, 4, 10), 16) == 29 * 4  # 28.999999999999996 steps
    by_tokens = Mixture(corpora, weights, Annealing({"a": 1, "b": 3}, from_tokens=170))
    by_tokens.connect(batch_size=2, max_seq_length=16)
    by_tokens.setup()
    assert by_tokens.train_dataloader().mixture.phases.border == 11
    assert opened(by_tokens).train_dataloader().mixture.phases.border == 12  # the next whole step
    by_part = opened(Mixture(corpora, weights, Annealing({"a": 1, "b": 3}, from_fraction=0.8)), RunLength(400, 4, 10))
    assert by_part.flags_to_go_on == " --data.annealing.from_fraction null --data.annealing.from_step 320"
    assert not by_tokens.flags_to_go_on
    limited = Mixture(corpora, weights, max_epochs=2)
    limited.connect(batch_size=2, max_seq_length=16)
    limited.setup()
    with pytest.raises(SettingsError, match=r"data.max_epochs: 2 needs the length of the run"):
        limited.train_dataloader()
    with pytest.raises(SettingsError, match=r"data.max_epochs: 2 must be at least [\d.]+, as often as this run"):
        opened(limited, RunLength(400, 4, 10)).train_dataloader()
    with pytest.raises(SettingsError, match=r"eval.max_iters: 1 must be at least 2, one batch per corpus"):
        limited.plan_run(RunLength(400, 4, 1))


def test_a_mixture_says_what_it_reads(texts, capsys):
    corpora = {"a": text(texts, 0), "b": text(texts, 1)}

    def said(length, **annealing):
        mixture = Mixture(corpora, {"a": 3, "b": 1}, Annealing({"a": 1, "b": 3}, **annealing))
        if length is not None:
            mixture.plan_run(length)
        mixture.connect(batch_size=2, max_seq_length=16)
        mixture.setup()
        capsys.readouterr()
        loader = mixture.train_dataloader()
        return loader.mixture, capsys.readouterr().out

    rows, words = said(RunLength(400, 4, 10), from_fraction=0.8)
    read = [f"{rows.phases.counts(1600)[i] / len(part.windows):.2f}" for i, part in enumerate(rows.parts)]
    tokens = [f"{part.windows.targets:,}" for part in rows.parts]
    assert words == (
        f"Mixture: a 75% of {tokens[0]} tokens ({read[0]} epochs), b 25% of {tokens[1]} tokens ({read[1]} epochs); "
        "after step 320 a 25%, b 75%\n"
    )
    assert (
        "; the annealing would begin after the last step of this run" in said(RunLength(400, 4, 10), from_step=400)[1]
    )
    assert said(None, from_tokens=170)[1] == (
        f"Mixture: a 75% of {tokens[0]} tokens, b 25% of {tokens[1]} tokens; from sequence 11 on a 25%, b 75%\n"
    )


def mixed(settings, texts) -> dict:
    """A `data` section: a few Python files and some stories, with an annealing phase in the second half."""
    corpora = {
        "code": {"class_path": "litgpt_moe_ext.data.PythonStdlib", "init_args": dict(settings)},
        "text": {
            "class_path": "litgpt_moe_ext.data.TextCorpus",
            "init_args": {"source_path": str(texts / "0"), "data_path": settings["data_path"], "val_fraction": 0.3},
        },
    }
    init_args = {
        "corpora": corpora,
        "weights": {"code": 0.7, "text": 0.3},
        "annealing": {"from_fraction": 0.5, "weights": {"code": 0.2, "text": 0.8}},
    }
    return {"class_path": "litgpt_moe_ext.data.Mixture", "init_args": init_args}


@pytest.mark.slow
def test_a_finished_run_says_how_to_go_on(recipe, corpus_settings, texts, capsys):
    """A part of a longer run is another step, at which the rows that were read would not be those that are to be."""
    changes = {"data": mixed(corpus_settings, texts), "train": {"max_tokens": 2 * 128}, "eval": {"max_iters": 2}}
    file = str(recipe(**changes))
    assert train("--config", file, "--train.max_steps=1") == 0
    flags = capsys.readouterr().out.splitlines()[-1].removeprefix("To continue: ").split()
    assert flags == ["--resume", "auto", "--train.max_steps", "2"]
    assert train("--config", file, *flags) == 0
    flags = capsys.readouterr().out.splitlines()[-1].removeprefix("To continue: ").split()
    assert train("--config", file, *flags) == 0
    assert "after step 1 code 20%, text 80%" in capsys.readouterr().out
    assert train("--config", file, "--resume=auto", "--train.max_tokens=1024") == 2
    assert "began after 128 tokens in the checkpoint, and would begin after 512 now" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_in_both_phases_goes_on_bit_for_bit(recipe, corpus_settings, texts, tmp_path):
    changes = {
        "data": mixed(corpus_settings, texts),
        "train": {"max_tokens": 16 * 128, "save_interval": 3},
        "eval": {"interval": 5, "max_iters": 4},
    }
    whole = Training("--config", recipe("whole", out_dir=str(tmp_path / "whole"), **changes))
    output, _ = whole.communicate()
    assert whole.returncode == 0, output
    for stop in (5, 13, None):
        callbacks = [] if stop is None else wait_for_signal(stop)
        file = recipe("killed", out_dir=str(tmp_path / "killed"), callbacks=callbacks, **changes)
        training = Training("--config", file, "--resume", "auto")
        for line in training.stdout:
            if line.startswith(f"step {stop}/"):
                os.killpg(training.pid, signal.SIGKILL)
                break
        training.communicate()
        assert training.returncode == (0 if stop is None else -signal.SIGKILL)
    for column in ("loss", "val_loss", "val_loss/code", "val_loss/text", "grad_norm"):
        assert logged(tmp_path / "killed", column) == logged(tmp_path / "whole", column) != {}


def test_the_example_is_a_recipe():
    settings = read_settings([*EXAMPLE, "--data.corpora.code.vocab_size", "512", "--data.weights.prose", "0.5"])
    assert isinstance(settings.data, Mixture)
    assert settings.data.weights == {"code": 0.95, "prose": 0.5}
    assert settings.data.parts["code"].vocab_size == 512
    assert settings.data.annealing.from_fraction == 0.8
    plain = to_plain(settings.data)["init_args"]["corpora"]["prose"]
    assert plain["class_path"] == "litgpt_moe_ext.data.TextCorpus"
    assert plain["init_args"]["pattern"] == "**/*.md"


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("data.corpora.prose.val_fracton", "0.3", "no setting has this name; did you mean data.corpora.prose.val_frac"),
        ("data.corpora.prose.val_fraction", "x", "'x' must be a number"),
        ("data.weights.prose", "-1", "-1.0 must be a number of at least 0; "),
    ],
)
def test_mistakes_inside_a_corpus_are_named(capsys, flag, value, message):
    assert main([*EXAMPLE, f"--{flag}", value]) == 2
    assert f"error: {flag}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "name", "message", "line"),
    [
        ({"separator": ""}, "separator", "'' must have a character", "separator:"),
        ({"bpe": {"vocab_size": 300}, "tokenizer_dir": "."}, "tokenizer_dir", "'.' and data.bpe are", "tokenizer_dir:"),
        ({"bpe": {"vocab_size": 99999}}, "bpe.vocab_size", "99999 means 99999 tokens, more than the", "vocab_size: 9"),
        ({"bpe": {"vocab_size": 300}, "pattern": "*.none"}, "source_path", "'texts' has no files like", "source_path:"),
        ({}, "tokenizer_dir", "there is no tokenizer", "a:"),
    ],
    ids=["made", "tokenizer", "vocabulary", "files", "nothing"],
)
def test_a_corpus_names_its_setting_as_it_was_given(
    recipe, tmp_path, capsys, monkeypatch, settings, name, message, line
):
    """Whenever it looks at it; with the line where it stands, or else that of its corpus."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text\n" * 99)
    init_args = {"source_path": "texts", "data_path": "cache", **settings}
    text = {"class_path": "litgpt_moe_ext.data.TextCorpus", "init_args": init_args}
    mixture = {"corpora": {"a": text}, "weights": {"a": 1}}
    file = recipe(data={"class_path": "litgpt_moe_ext.data.Mixture", "init_args": mixture})
    assert main(["--config", str(file)]) == 2
    number = next(n for n, given in enumerate(file.read_text().splitlines(), 1) if given.strip().startswith(line))
    error = capsys.readouterr().err
    assert error.startswith(f"error: data.corpora.a.{name}: {message}")
    assert error.endswith(f"({file}:{number})\n")


def test_a_corpus_that_names_its_own_setting():
    """The parser leaves what was given as it was, so that the whole name of a setting can be found later."""
    types = litgpt_types()
    recipe = read_given(EXAMPLE, ROOT / "configs" / "quickstart.yaml", types)
    parse(recipe, types)
    assert recipe.whole_name("source_path") == "data.corpora.prose.source_path"
