"""Validations between steps whose passes are captured: the same losses as without graphs."""

import pytest
import torch
from torch import nn

from litgpt_moe_ext.tokens import padding
from tests.training.steps.graphs.passes import Recordings, Reruns
from tests.training.steps.graphs.test_graphed_loss import BROKEN_OFF, GROUPED, RoomForIds, Training, batches


@pytest.fixture(autouse=True)
def _no_padding(monkeypatch):
    monkeypatch.setattr(padding, "_accepted", False)


def validate(training, data):
    """Return the losses of a validation."""
    training.model.eval()
    loss = getattr(training.loss, "validated", training.loss)
    with torch.no_grad():
        losses = [loss(batch[:, :-1], batch[:, 1:]) for batch in data]
    training.model.train()
    return losses


def losses_of(graphs, data, before_validation=lambda model: None, **options):
    """Validate before the first step and after each; return the losses and the training."""
    training = Training(graphs, GROUPED, **options)
    losses = validate(training, data)
    for batch in batches(6):
        training.step([batch])
        before_validation(training.model)
        losses += validate(training, data)
    return losses, training


def assert_validates_alike(data, *args, **options):
    losses, graphed = losses_of(True, data, *args, **options)
    expected, _ = losses_of(False, data, *args)
    assert len({loss.item() for loss in expected}) == len(expected)
    assert losses == expected
    assert graphed.said == ["CUDA graphs: on, from this step"]
    return graphed


def test_equals_the_loss_itself():
    """Of operators that run again, on weights that change from step to step."""
    graphed = assert_validates_alike(batches(4), make_capture=Recordings)
    assert graphed.loss._graphs.validation._captured is not None


def test_is_captured_once():
    """With the second batch after the passes; a last one of another shape goes without, and takes no graph away."""
    graphed = assert_validates_alike([*batches(3), *batches(1, rows=1)])
    assert [capture.validations for capture in graphed.captures] == [1]


def test_shapes_that_alternate_are_not_captured():
    mixed = [batch for pair in zip(batches(2), batches(2, rows=1), strict=True) for batch in pair]
    graphed = assert_validates_alike(mixed)
    assert [capture.validations for capture in graphed.captures] == [0]


def test_is_captured_again_where_weights_have_moved():
    """As by a callback that validates others."""

    def move(model):
        steps[model] = steps.get(model, 0) + 1
        if steps[model] == 5:
            model.lm_head.weight.data = model.lm_head.weight.data.clone() * 1.5

    steps = {}
    graphed = assert_validates_alike(batches(4), move)
    # In the next step the passes are captured again too.
    assert [capture.validations for capture in graphed.captures] == [2, 1]


def test_is_captured_again_with_more_room(monkeypatch):
    room = RoomForIds()
    monkeypatch.setattr(
        Training, "plain_loss", lambda self, ids, targets, plain=Training.plain_loss: (
            room.require(ids), plain(self, ids, targets)
        )[1],
    )  # fmt: skip
    small = [batch.clamp(max=31) for batch in batches(3)]
    small[0][:, 0] = 31
    graphed = assert_validates_alike([*small, *batches(3)], dynamic_sizes=room)
    assert [capture.validations for capture in graphed.captures] == [2]
    assert [sizes for _, sizes in room.reserved] == [(3,), (1,), (3,)]


@pytest.mark.parametrize("kind", ["broken off", "differs", "hook"])
def test_goes_without_where_it_cannot_be_captured(kind):
    """The passes stay graphs."""

    class Fails(Reruns):
        def forward(self, loss, ids, targets):
            if kind == "broken off":
                raise BROKEN_OFF
            replay = super().forward(loss, ids, targets)
            return replay._replace(run=lambda: (replay.run(), replay.result.mul_(1.1)))

    def hook(model):
        if kind == "hook" and not model.lm_head._forward_hooks:
            model.lm_head.register_forward_hook(lambda *_: None)

    losses, graphed = losses_of(True, batches(4), hook, make_capture=Fails if kind != "hook" else Reruns, careful=False)
    assert losses == losses_of(False, batches(4))[0]
    on, line = graphed.said
    assert on == "CUDA graphs: on, from this step"
    reason = {
        "broken off": "capturing failed: not permitted",
        "differs": "replayed, the loss is ",
        "hook": "a hook on lm_head would not run in every pass",
    }[kind]
    assert line.startswith(f"CUDA graphs: not for validation ({reason}")
    assert graphed.loss._graphs is not None


def test_a_validation_without_text(monkeypatch):
    """Whose loss is NaN, which is no difference."""

    def plain_loss(self, ids, targets):
        targets = targets if self.model.training else torch.full_like(targets, -100)
        return nn.functional.cross_entropy(self.model(ids).flatten(0, 1), targets.flatten())

    monkeypatch.setattr(Training, "plain_loss", plain_loss)
    losses, graphed = losses_of(True, batches(4))
    assert all(loss.isnan() for loss in losses)
    assert [capture.validations for capture in graphed.captures] == [1]
    assert len(graphed.said) == 1
