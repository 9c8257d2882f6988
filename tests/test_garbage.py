"""Thresholds of Python's garbage collector come back."""

import gc

from litgpt_moe_ext.garbage import collect_rarely, settled


def test_rarely_in_a_start_as_usual_in_a_run():
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    with collect_rarely():
        assert gc.get_threshold()[0] > 10 * usual[0]
        with settled():
            assert gc.get_threshold() == usual
            assert gc.get_freeze_count() > frozen
        assert gc.get_threshold()[0] > 10 * usual[0]
    assert gc.get_threshold() == usual
    # Python 3.12 starts with some hundred frozen objects of its own; afterwards they are ordinary ones.
    assert gc.get_freeze_count() <= frozen
