"""Models and how they act: language models, pretrained weights, generation, rollouts."""

from rollax.agents.generation import Generation, Sampling, generate
from rollax.agents.language_model import LanguageModel, repeat_rows, restrict_vocabulary
from rollax.agents.pretrained import Pretrained, load_pretrained, save_pretrained
from rollax.agents.rollout import (
    Policy,
    Sequential,
    Trajectory,
    demonstrate,
    language_policy,
    play,
    reactive,
    rollout,
    score,
    sequential_sampler,
)
from rollax.agents.sharding import batch_sharding, make_mesh, named_shardings, state_shardings
from rollax.agents.tabular import tabular
from rollax.agents.transformer import TransformerConfig, transformer

__all__ = [
    "Generation",
    "LanguageModel",
    "Policy",
    "Pretrained",
    "Sampling",
    "Sequential",
    "Trajectory",
    "TransformerConfig",
    "batch_sharding",
    "demonstrate",
    "generate",
    "language_policy",
    "load_pretrained",
    "make_mesh",
    "named_shardings",
    "play",
    "reactive",
    "repeat_rows",
    "restrict_vocabulary",
    "rollout",
    "save_pretrained",
    "score",
    "sequential_sampler",
    "state_shardings",
    "tabular",
    "transformer",
]
