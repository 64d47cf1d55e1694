"""Token log-probabilities from hidden states and an output head, memory-lean."""

from rollax.kernels.linear_log_prob.api import linear_log_prob

__all__ = ["linear_log_prob"]
