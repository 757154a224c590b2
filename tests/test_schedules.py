"""The learning rate of a stage: against numbers worked by hand, and against the curves that transformers has under the same names."""

import pytest
import torch
from transformers import get_scheduler

from runner import schedules


@pytest.mark.parametrize(
    "schedule, warmup, expected",  # at steps 0, 1, 2, 4, 6, 10 of 10; final share 0.1
    [
        ("constant", 2, [1, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", 2, [0.5, 1, 1, 1, 1, 1]),
        # Progress after the warm-up: 0, 0.25, 0.5, 1
        ("linear", 2, [0.5, 1, 1, 0.1 + 0.9 * 0.75, 0.55, 0.1]),
        ("cosine", 2, [0.5, 1, 1, 0.1 + 0.9 * 0.853553, 0.55, 0.1]),  # (1 + cos 45 degrees) / 2
        ("linear", 0.2, [0.5, 1, 1, 0.1 + 0.9 * 0.75, 0.55, 0.1]),
        ("linear", 0, [1, 0.91, 0.82, 0.64, 0.46, 0.1]),
    ],
)
def test_learning_rate(schedule, warmup, expected):
    found = [schedules.lr_share(step, 10, schedule, warmup, 0.1) for step in (0, 1, 2, 4, 6, 10)]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_warmup_as_long_as_the_run_ends_at_the_peak():
    assert [schedules.lr_share(s, 4, "cosine", 4, 0.0) for s in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_a_name_means_the_curve_that_it_means_elsewhere(name):
    """After the warm-up, whose first step transformers takes at a rate of 0."""
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warm = {} if name == "constant" else {"num_warmup_steps": 3, "num_training_steps": 10}
    scheduler = get_scheduler(name, theirs, **warm)
    for step in range(10):
        if step >= 3:
            assert schedules.lr_share(step, 10, name, 3, 0.0) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-6)
        theirs.step()
        scheduler.step()
