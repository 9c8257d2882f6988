"""Benchmarks of a model in training, divided among its processes.

A benchmark has `scores(model)`, which every process calls and which returns the scores by name, at least on rank 0; and
`rehearse(model)`, which tries the largest batch, so that failures show before training begins. The model is whole on
every process and in evaluation mode.

Once the run has been told to stop, a benchmark evaluates nothing more, but still takes part in all communication. Its
scores are then meaningless or missing.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from litgpt import GPT, Tokenizer
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.batching import BatchSize, Result
from litgpt_moe_ext.evaluation.batching import Item as Input
from litgpt_moe_ext.evaluation.harness.model import GPTModel
from litgpt_moe_ext.evaluation.harness.tasks import load_task_file
from litgpt_moe_ext.evaluation.hellaswag import Answer, Item, as_question, evaluate
from litgpt_moe_ext.evaluation.tokenization import encoder
from litgpt_moe_ext.wording import counted

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from litgpt_moe_ext.training.fabric import TrainingFabric
    from litgpt_moe_ext.training.settings import EvaluateArgs

# lm-eval's own.
_FEWSHOT_SEED = 1234


class _ToldToStop(Exception):  # noqa: N818  (no error)
    pass


def _go_on(fabric: "TrainingFabric") -> None:
    if fabric.stop_requests.received:
        raise _ToldToStop


@dataclass(frozen=True)
class _Interruptible(BatchSize):
    """A batch size whose work `go_on` may end after each batch."""

    go_on: Callable[[], None] = lambda: None

    def run(self, items: Sequence[Input], function: Callable[[Sequence[Input]], Result]) -> Iterator[Result]:
        """See `BatchSize.run`."""
        for result in super().run(items, function):
            yield result
            self.go_on()


class HellaSwag:
    """HellaSwag by one of its rules: `hellaswag/RULE/acc` and `hellaswag/RULE/acc_norm`.

    Args:
        items: The questions.
        args: The rule, and the endings per forward pass.
        tokenizer: The model's tokenizer.
        block_size: Tokens that the model reads at once.
        fabric: The running Fabric.

    Raises:
        SettingsError: If an ending has more tokens than `block_size`.
    """

    def __init__(
        self,
        items: Sequence[Item],
        args: "EvaluateArgs",
        tokenizer: Tokenizer,
        block_size: int,
        fabric: "TrainingFabric",
    ) -> None:
        self._rule, self._batch_size, self._fabric = args.hellaswag_rule, args.batch_size, fabric
        encode = encoder(tokenizer)
        questions = [as_question(item, self._rule, encode) for item in items]
        # Only the ending must fit: a context that is too long loses tokens on the left.
        longest = max(len(request.continuation) for question in questions for request in question.requests)
        if longest > block_size:
            raise SettingsError(
                f"evaluate.hellaswag: an ending has {longest} tokens and the model reads {block_size} at once; "
                "remove the benchmark, or take a longer train.max_seq_length or a tokenizer with longer tokens"
            )
        self._questions = questions[fabric.global_rank :: fabric.world_size]

    def rehearse(self, model: GPT) -> None:
        """Answer one batch of the questions with the longest texts."""
        lengths = [max(len(r.context) + len(r.continuation) for r in question.requests) for question in self._questions]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        questions = [self._questions[i] for i in order[: -(-self._batch_size // 4)]]
        evaluate(model, questions, self._batch_size, lambda done: None)

    def scores(self, model: GPT) -> dict[str, float]:
        """Answer this process's share of the questions; return the scores of all shares."""
        answers: list[Answer] = []
        with contextlib.suppress(_ToldToStop):
            answers = evaluate(model, self._questions, self._batch_size, lambda done: _go_on(self._fabric))
        counts = [sum(answer.acc for answer in answers), sum(answer.acc_norm for answer in answers), len(answers)]
        local = torch.tensor(counts, dtype=torch.int64, device=self._fabric.device)
        acc, acc_norm, asked = cast(Tensor, self._fabric.all_reduce(local, reduce_op="sum")).tolist()
        asked = max(1, asked)
        return {f"hellaswag/{self._rule}/acc": acc / asked, f"hellaswag/{self._rule}/acc_norm": acc_norm / asked}


class TaskFile:
    """A task of lm-eval in a local YAML file: `lm_eval/TASK/METRIC`, without standard errors.

    Args:
        file: The task, with data beside it.
        args: How many documents to evaluate, and the requests per forward pass.
        tokenizer: The model's tokenizer.
        tokenizer_dir: The folder it was read from.
        fabric: The running Fabric.

    Raises:
        SettingsError: If the file or its data is missing, it does not define a task, or the task has fewer documents
            than there are processes.
    """

    def __init__(
        self, file: Path, args: "EvaluateArgs", tokenizer: Tokenizer, tokenizer_dir: Path, fabric: "TrainingFabric"
    ) -> None:
        self._task, self._fabric, self._limit = load_task_file(file), fabric, args.max_items
        self._tokenizer, self._tokenizer_dir, self._batch_size = tokenizer, tokenizer_dir, BatchSize(args.batch_size)
        documents = min(len(self._task.eval_docs), self._limit or len(self._task.eval_docs))
        if documents < fabric.world_size:
            raise SettingsError(
                f"evaluate.tasks: {file} has {counted(documents, 'document')} to ask about, fewer than the "
                f"{fabric.world_size} processes that share them; raise evaluate.max_items, or leave the task out"
            )

    def rehearse(self, model: GPT) -> None:
        """Evaluate one document per process."""
        self._evaluate(model, self._fabric.world_size)

    def scores(self, model: GPT) -> dict[str, float]:
        """Return the scores on rank 0, nothing on the others."""
        results = self._evaluate(model, self._limit)
        if results is None:
            return {}
        found = results["results"][self._task.config.task]
        return {
            f"lm_eval/{self._task.config.task}/{name.removesuffix(',none').replace(',', '/')}": float(value)
            for name, value in found.items()
            if isinstance(value, (int, float)) and "_stderr," not in name and name != "sample_len"
        }

    def _evaluate(self, model: GPT, limit: int | None) -> dict[str, Any] | None:
        from lm_eval.evaluator import evaluate

        # As in lm-eval's `simple_evaluate`, which also seeds the random generators and looks up the environment.
        if self._task.get_config("num_fewshot") is None:
            self._task.set_config(key="num_fewshot", value=0)
        self._task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        shared = _SharedModel(model, self._tokenizer, self._tokenizer_dir, self._batch_size, self._fabric)
        tasks = {self._task.config.task: self._task}
        # lm-eval draws a bar while it builds the requests, on every process and even without a terminal.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(_ToldToStop):
            return evaluate(lm=shared, task_dict=tasks, limit=limit, log_samples=False, bootstrap_iters=0)


class _SharedModel(GPTModel):
    """A model with a copy on every rank.

    lm-eval divides the documents among the ranks and gathers results through `accelerator`. When told to stop, all
    ranks leave lm-eval at the same point, before a metric is computed from missing answers.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, tokenizer_dir: Path, batch_size: BatchSize, fabric: "TrainingFabric"
    ) -> None:
        stoppable = _Interruptible(**asdict(batch_size), go_on=partial(_go_on, fabric))
        super().__init__(model, tokenizer, tokenizer_dir, stoppable)
        self._rank, self._world_size, self._fabric = fabric.global_rank, fabric.world_size, fabric

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        with self._until_all_know():
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        return [(0.0, False)] * len(requests)

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """See `GPTModel.generate_until`."""
        with self._until_all_know():
            return super().generate_until(requests, disable_tqdm)
        return [""] * len(requests)

    @contextlib.contextmanager
    def _until_all_know(self) -> Iterator[None]:
        try:
            yield
        except _ToldToStop:
            if self._world_size == 1:
                raise

    @property
    def accelerator(self) -> "_SharedModel":
        """The object through which lm-eval gathers and waits."""
        return self

    def gather(self, number: Tensor) -> Tensor:
        """Return the numbers of all ranks, (ranks,)."""
        return cast(Tensor, self._fabric.all_gather(number)).view(-1)

    def wait_for_everyone(self) -> None:
        """Wait until every process has answered its requests; leave lm-eval if one was told to stop."""
        if self._fabric.agree_on_interruption():
            raise _ToldToStop
