"""Environments as pure reset and step functions, their renderers and experts, and the vectoriser."""

from rollax.envs.arithmetic import arithmetic
from rollax.envs.cartpole import cartpole
from rollax.envs.countdown import countdown
from rollax.envs.environment import ControlSpec, Environment, Step, Tokens, TokenSpec
from rollax.envs.hidden_clusters import HiddenFacts, draw_facts, draw_lesson, task_embeddings
from rollax.envs.host import HostEnvironment, on_host
from rollax.envs.household import HouseholdWorld, household, household_world
from rollax.envs.household_rooms import RoomsTask, RoomsWorld, alfworld_household, rooms_world
from rollax.envs.minesweeper import minesweeper
from rollax.envs.persona_chat import persona_chat, pretraining_example
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
from rollax.envs.scripts import ScriptedEpisode, scripted_episode
from rollax.envs.shop import ShopWorld, shop, shop_world
from rollax.envs.sokoban import SokobanLevel, sokoban, sokoban_from_text, sokoban_level, solve_sokoban
from rollax.envs.sorting import sorting
from rollax.envs.tail_forks import ForkTables, expected_success, fork_tables, initial_logits, tail_forks
from rollax.envs.text_games import Games, gymnasium_text, make_textworld_games, textworld_games, with_commands
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
    "Games",
    "HiddenFacts",
    "HostEnvironment",
    "HouseholdWorld",
    "PromptBank",
    "PromptState",
    "Question",
    "QuestionSplit",
    "RoomsTask",
    "RoomsWorld",
    "ScoredQuestions",
    "ScriptedEpisode",
    "ShopWorld",
    "SokobanLevel",
    "Step",
    "TokenKinds",
    "TokenSpec",
    "Tokens",
    "Transition",
    "VectorEnvironment",
    "VectorState",
    "VectorStep",
    "alfworld_household",
    "alphabetical_order",
    "arithmetic",
    "cartpole",
    "clean_answer",
    "countdown",
    "decode",
    "differences",
    "draw_facts",
    "draw_lesson",
    "episode_statistics",
    "expected_success",
    "few_shot_prompt",
    "fork_tables",
    "gymnasium_text",
    "household",
    "household_world",
    "initial_logits",
    "is_correct",
    "largest_of_three",
    "line_prompt",
    "make_textworld_games",
    "minesweeper",
    "on_host",
    "persona_chat",
    "pretraining_example",
    "products",
    "prompt_bank",
    "reasoning_gym_questions",
    "rooms_world",
    "scored_questions",
    "scripted_episode",
    "shop",
    "shop_world",
    "sokoban",
    "sokoban_from_text",
    "sokoban_level",
    "solve_sokoban",
    "sorting",
    "split_questions",
    "sums",
    "tail_forks",
    "task_embeddings",
    "textworld_games",
    "token_kinds",
    "tokenize_bank",
    "vectorize",
    "with_commands",
]
