"""What the card of an exported model says of its training."""

import yaml

from litgpt_moe_ext.export.card import facts
from litgpt_moe_ext.export.source import Source
from litgpt_moe_ext.model_size import count_parameters
from litgpt_moe_ext.training.checkpoint import hyperparameters
from litgpt_moe_ext.training.checkpoint.progress import Progress
from tests.models import moe_config


def test_parameters_are_those_of_the_run(tmp_path):
    source = Source(tmp_path, moe_config(), {})
    counts = [facts(source, {"train": {"tie_embeddings": tied}})["parameters"] for tied in (True, False)]
    sizes = [count_parameters(moe_config(), tied) for tied in (True, False)]
    assert [count.partition(";")[0] for count in counts] == [
        f"{size.total:,}, of which {size.active:,} are active per token" for size in sizes
    ]
    assert counts[0].endswith("; the output head, one table with the embeddings in training, is written twice")
    assert counts[1] == facts(source, {})["parameters"]


def test_tokens_are_those_of_all_batch_sizes(tmp_path):
    """Eight steps of four sequences, then two of eight after a resume, in micro-batches of two on two processes."""
    settings = {"train": {"global_batch_size": 8, "micro_batch_size": 2, "max_seq_length": 16}}
    (tmp_path / hyperparameters.FILE_NAME).write_text(yaml.safe_dump(settings))
    Progress(attempt=2, step=10, iteration=12, processes=2, saved_at=0.0).write(tmp_path)
    found = facts(Source(tmp_path, moe_config(), {}), settings)
    assert (found["optimizer steps"], found["training tokens"]) == ("10", "768")
