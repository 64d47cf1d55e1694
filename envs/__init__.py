"""Environments as pure reset and step functions, their renderers and experts, and the vectoriser."""

from rollax.envs.arithmetic import arithmetic
from rollax.envs.cartpole import cartpole
from rollax.envs.countdown import countdown
from rollax.envs.environment import ControlSpec, Environment, Step, Tokens, TokenSpec
from rollax.envs.prompts import PromptBank, PromptState, TokenKinds, prompt_bank, token_kinds, tokenize_bank
from rollax.envs.questions import (
    QUESTIONS,
    Question,
    QuestionSplit,
    alphabetical_order,
    clean_answer,
    differences,
    few_shot_prompt,
    is_correct,
    largest_of_three,
    line_prompt,
    products,
    split_questions,
    sums,
)
from rollax.envs.reasoning_gym import ScoredQuestions, reasoning_gym_questions, scored_questions
from rollax.envs.sorting import sorting
from rollax.envs.tail_forks import ForkTables, expected_success, fork_tables, initial_logits, tail_forks
from rollax.envs.tokens import decode
from rollax.envs.vector import (
    Transition,
    VectorEnvironment,
    VectorState,
    VectorStep,
    episode_statistics,
    vectorize,
)

__all__ = [
    "QUESTIONS",
    "ControlSpec",
    "Environment",
    "ForkTables",
    "PromptBank",
    "PromptState",
    "Question",
    "QuestionSplit",
    "ScoredQuestions",
    "Step",
    "TokenKinds",
    "TokenSpec",
    "Tokens",
    "Transition",
    "VectorEnvironment",
    "VectorState",
    "VectorStep",
    "alphabetical_order",
    "arithmetic",
    "cartpole",
    "clean_answer",
    "countdown",
    "decode",
    "differences",
    "episode_statistics",
    "expected_success",
    "few_shot_prompt",
    "fork_tables",
    "initial_logits",
    "is_correct",
    "largest_of_three",
    "line_prompt",
    "products",
    "prompt_bank",
    "reasoning_gym_questions",
    "scored_questions",
    "sorting",
    "split_questions",
    "sums",
    "tail_forks",
    "token_kinds",
    "tokenize_bank",
    "vectorize",
]
