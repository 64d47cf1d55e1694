"""Helpers of tasks for pretrained models."""

import numpy as np

from rollax.experiments.harness.language_task import shared_length


def test_what_all_prompts_share():
    assert shared_length([np.array([1, 2, 3, 4]), np.array([1, 2, 5])]) == 2
    assert shared_length([np.array([1, 2]), np.array([1, 2, 5])]) == 1  # every row keeps one of its own
