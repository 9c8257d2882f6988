"""HellaSwag (arXiv:1905.07830) from a local `hellaswag_val.jsonl`, by either of its two common rules.

A model chooses the ending of a text that it finds likeliest. `acc` compares sums of log-probabilities, `acc_norm`
means. Results by the two rules differ by several points, so name the rule with every number:

- `build-nanogpt`: the text `ctx` as it is, then a space and the ending; context and ending are encoded separately;
  acc_norm is the mean per token.
- `lm-eval`: the label of the activity, a colon, and `ctx_a` with the capitalised `ctx_b`, all cleaned of the marks of
  WikiHow; context and ending are encoded together; acc_norm is the mean per character of the ending.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from litgpt import GPT

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.scoring import Continuation, score_continuations
from litgpt_moe_ext.wording import quoted

Rule = Literal["build-nanogpt", "lm-eval"]
_FIELDS = {"ind": int, "activity_label": str, "ctx_a": str, "ctx_b": str, "ctx": str, "endings": list}
_N_ENDING = 4


class Item(NamedTuple):
    """One question.

    Attributes:
        fields: The question's fields in the file.
        label: Number of the right ending.
        where: File and line, for errors.
    """

    fields: dict[str, Any]
    label: int
    where: str = "HellaSwag"


class Question(NamedTuple):
    """A question by one of the rules: what to score for each ending, and the ending's length as the rule defines it."""

    item: Item
    requests: list[Continuation]
    lengths: list[int]


@dataclass(frozen=True)
class Answer:
    """A model's answer to one question.

    Attributes:
        ind: Number of the question in the file.
        label: Number of the right ending.
        sums: Log-probability of each ending in nats.
        means: The same, divided by the rule's length of each ending.
    """

    ind: int
    label: int
    sums: tuple[float, ...]
    means: tuple[float, ...]

    @property
    def acc(self) -> bool:
        """Whether the likeliest ending is right."""
        return _first_best(self.sums) == self.label

    @property
    def acc_norm(self) -> bool:
        """Whether the ending with the highest mean is right."""
        return _first_best(self.means) == self.label


def load_items(path: Path, limit: int | None = None) -> list[Item]:
    """Read questions.

    Args:
        path: A file with one JSON object per line: ind, activity_label, ctx_a, ctx_b, ctx, endings, label.
        limit: Maximum number of questions, or None.

    Raises:
        SettingsError: If there is no such file, or a line of it does not hold a question; the message names it.
    """
    if not path.is_file():
        raise SettingsError(f"file: {quoted(path)} must be a file; give HellaSwag's hellaswag_val.jsonl")
    items: list[Item] = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(items) >= limit:
                break
            if line.strip():
                items.append(_parse(line, f"{path}, line {number}"))
    if not items:
        raise SettingsError(f"file: {quoted(path)} holds no questions; give HellaSwag's hellaswag_val.jsonl")
    return items


def as_question(item: Item, rule: Rule, encode: Callable[[str], list[int]]) -> Question:
    """Prepare a question by a rule.

    Args:
        item: The question.
        rule: The rule.
        encode: Turns text into token ids, without special tokens.

    Raises:
        SettingsError: If context or ending have no tokens.
    """
    fields = item.fields
    if rule == "build-nanogpt":
        context = encode(fields["ctx"])
        requests = [Continuation(context, encode(f" {ending}")) for ending in fields["endings"]]
        _check_tokens(item, requests, "ctx")
        return Question(item, requests, [len(request.continuation) for request in requests])
    text = _cleaned(f"{fields['activity_label']}: {fields['ctx_a']} {fields['ctx_b'].capitalize()}")
    endings = [_cleaned(ending) for ending in fields["endings"]]
    requests = [_encoded_together(text, f" {ending}", encode) for ending in endings]
    _check_tokens(item, requests, "activity_label, ctx_a and ctx_b")
    return Question(item, requests, [len(ending) for ending in endings])


def evaluate(
    model: GPT, questions: Sequence[Question], batch_size: int, advance: Callable[[int], None]
) -> list[Answer]:
    """Let a model answer questions.

    Args:
        model: A `litgpt.GPT` in evaluation mode.
        questions: The questions.
        batch_size: Endings per forward pass.
        advance: Called with the number of endings done after each forward pass.
    """
    requests = [request for question in questions for request in question.requests]
    scores = score_continuations(model, requests, batch_size, advance)
    answers = []
    for i, (item, _, lengths) in enumerate(questions):
        sums = tuple(scores[_N_ENDING * i : _N_ENDING * (i + 1)])
        # An ending may be empty after cleaning; it then loses, as in lm-eval.
        means = tuple(s / n if n else -math.inf for s, n in zip(sums, lengths, strict=True))
        answers.append(Answer(item.fields["ind"], item.label, sums, means))
    return answers


def _parse(line: bytes, where: str) -> Item:
    try:
        fields = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()  # fails at half of a surrogate pair, written as an escape
    except (ValueError, RecursionError) as error:  # ValueError: also at an integer of thousands of digits
        raise SettingsError(f"file: {where} must be JSON; {error}") from error
    for name, kind in _FIELDS.items():
        if not isinstance(fields, dict) or not isinstance(fields.get(name), kind):
            raise SettingsError(f"file: {where} lacks {name!r} ({kind.__name__}); give HellaSwag's validation file")
    if not all(isinstance(ending, str) for ending in fields["endings"]):
        raise SettingsError(f"file: {where} has an ending that is not text; give HellaSwag's validation file")
    label = str(fields.get("label", ""))
    if len(fields["endings"]) != _N_ENDING or label not in ("0", "1", "2", "3"):
        raise SettingsError(
            f"file: {where} has {len(fields['endings'])} endings and label {fields.get('label')!r}; it must have "
            "4, and a label from 0 to 3 (the test file has none)"
        )
    return Item(fields, int(label), where)


def _check_tokens(item: Item, requests: Sequence[Continuation], context: str) -> None:
    for number, request in enumerate(requests):
        if not request.context:
            raise SettingsError(f"file: {item.where}: {context} must hold text; remove question {item.fields['ind']}")
        if not request.continuation:
            raise SettingsError(
                f"file: {item.where}: ending {number} must hold text; remove question {item.fields['ind']}"
            )


def _cleaned(text: str) -> str:
    # As in lm-eval: WikiHow's titles become sentences, other marks in brackets are removed.
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _encoded_together(context: str, continuation: str, encode: Callable[[str], list[int]]) -> Continuation:
    # Blanks at the end of the context belong to the continuation, as in lm-eval.
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    first = encode(context)
    return Continuation(first, encode(context + continuation)[len(first) :])


def _first_best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
