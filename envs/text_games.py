"""Text games as token environments: any Gymnasium environment of texts, and games that TextWorld generates offline.

TextWorld is arXiv 1806.11532, Gymnasium's interface arXiv 2407.17032. The games run in Python, see `envs.host`, and the
tokenizer is an argument. The packages are optional: `pip install 'rollax[games]'` (jericho, a part of TextWorld, comes
as source and wants gcc and make).
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rollax.envs.environment import Step, Tokens, TokenSpec
from rollax.envs.host import HostEnvironment

COMMANDS, POLICY = "admissible_commands", "policy_commands"  # TextWorld's names in `info`
# What `textworld_games` hands on of each step besides `gymnasium_text`'s own.
TEXTWORLD_NUMBERS = ("score", "won", "lost", "progress")


class Games(NamedTuple):
    """N games that are being played.

    Attributes:
      games: objects with Gymnasium's `reset` and `step`.
      turn: int32 `[N]`, commands given so far.
      info: what each game said last besides its observation, a dict.
    """

    games: tuple[Any, ...]
    turn: np.ndarray
    info: tuple[dict[str, Any], ...]


def plain_text(observation: Any, info: dict[str, Any]) -> str:
    """The observation, which must be a text.

    Raises:
      ValueError: it is something else.
    """
    del info
    if not isinstance(observation, str):
        raise ValueError(f"observation: expected a text (or a `describe` that makes one), got {observation!r}")
    return observation


def with_commands(observation: Any, info: dict[str, Any]) -> str:
    """The observation, and under it a line of the commands that are possible, where the game names them."""
    text = plain_text(observation, info)
    commands = info.get(COMMANDS)
    return f"{text}\nYou can: {', '.join(commands)}" if commands else text


def first_line(reply: str) -> str:
    """The command in a reply: its first line that is not blank."""
    return next((line.strip() for line in reply.splitlines() if line.strip()), "")


def gymnasium_text(
    make: str | Callable[[], Any],
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[list[int]], str],
    spec: TokenSpec,
    *,
    opening: Sequence[int] = (),
    closing: Sequence[int] = (),
    describe: Callable[[Any, dict[str, Any]], str] = plain_text,
    parse: Callable[[str], str] = first_line,
    numbers: Sequence[str] = (),
) -> HostEnvironment:
    """Gymnasium environments whose actions are texts, N at once.

    The rows that begin alike have equal keys, and so equal seeds: they share what the game draws by itself.

    Args:
      make: an id for `gymnasium.make`, or `make() -> env`, an object with `reset(seed=int) -> (observation, info)` and
        `step(text) -> (observation, reward, terminated, truncated, info)`.
      encode: `encode(text) -> ids`, of a text that somebody else wrote: control tokens that it spells must stay text.
      decode: `decode(ids) -> text`, of a reply without its stop token.
      spec: `max_turns` commands at most, then the episode is truncated; with fewer `max_action` tokens a long command
        is cut.
      opening, closing: ids around each observation, such as a chat template's; they are never cut.
      describe: `describe(observation, info) -> text`; `with_commands` shows the possible commands.
      parse: `parse(reply) -> command`.
      numbers: of the games' `info`; they come as float32, 0 where a game does not say.

    Returns:
      The environments. Info: `numbers`, and float32 `observation_cut`, 1 where an observation was too long and lost its
      end, `admissible`, 0 where the game names its possible commands ("admissible_commands") and this was none of them,
      else 1, and `num_commands`, how many there are next; object array "admissible_commands", these commands, a tuple
      of texts a row (after a reset they are in the state's `info`). The expert says the first of the game's
      "policy_commands", where it has such.

    Raises:
      ImportError: `make` is an id and Gymnasium is not installed.
      ValueError: no room between `opening` and `closing`; later, a command or observation that does not fit.
    """
    room = spec.max_observation - len(opening) - len(closing)
    if room < 1:
        raise ValueError(
            f"spec.max_observation must be above {len(opening) + len(closing)}, the tokens of opening and closing, "
            f"got {spec.max_observation}"
        )
    make = by_id(make) if isinstance(make, str) else make
    stops = np.asarray(spec.stop_ids, np.int32)
    free: list[Any] = []  # games of episodes that are over, for the next reset

    def write(texts):
        """Tokens of N texts, and how many were too long; None is silence."""
        ids, length = np.full((len(texts), spec.max_observation), spec.pad_id, np.int32), np.zeros(len(texts), np.int32)
        cut = np.zeros(len(texts), np.float32)
        for i, text in enumerate(texts):
            if text is not None:
                said = list(encode(text))
                row = [*opening, *said[:room], *closing]
                ids[i, : len(row)], length[i], cut[i] = row, len(row), len(said) > room
        return Tokens(ids, length), cut

    def reset(keys):
        seeds = np.asarray(jax.vmap(jax.random.bits)(keys)) >> 1  # 31 bits
        games = tuple(free.pop() if free else make() for _ in seeds)
        begun = [game.reset(seed=int(seed)) for game, seed in zip(games, seeds, strict=True)]
        observation, _ = write([describe(*one) for one in begun])
        return Games(games, np.zeros(len(games), np.int32), tuple(info for _, info in begun)), observation

    def step(keys, state, action, alive):
        del keys  # a game draws from what it was seeded with
        action, rows = np.asarray(action), len(state.games)
        if action.shape != (rows, spec.max_action):
            raise ValueError(f"action must have the shape {(rows, spec.max_action)}, got {action.shape}")
        texts, info = [None] * rows, list(state.info)
        reward, terminated, truncated = np.zeros(rows, np.float32), np.zeros(rows, bool), np.zeros(rows, bool)
        told = {name: np.zeros(rows, np.float32) for name in (*numbers, "admissible", "num_commands")}
        commands = np.empty(rows, object)
        commands[:] = [()] * rows
        for i in np.flatnonzero(alive):
            command = parse(decode(until_stop(action[i], stops)))
            possible = info[i].get(COMMANDS)
            observation, reward[i], terminated[i], truncated[i], info[i] = state.games[i].step(command)
            commands[i] = tuple(info[i].get(COMMANDS) or ())
            told["admissible"][i] = not possible or command in possible
            told["num_commands"][i] = len(commands[i])
            for name in numbers:
                told[name][i] = info[i].get(name) or 0.0
            truncated[i] = not terminated[i] and (truncated[i] or state.turn[i] + 1 >= spec.max_turns)
            if not (terminated[i] or truncated[i]):
                texts[i] = describe(observation, info[i])
        observation, cut = write(texts)
        told |= {"observation_cut": cut, COMMANDS: commands}
        return Games(state.games, state.turn + alive, tuple(info)), Step(
            observation, reward, terminated, truncated, told
        )

    def expert(keys, state):
        del keys
        action = np.full((len(state.games), spec.max_action), spec.pad_id, np.int32)
        for i, info in enumerate(state.info):
            plan = info.get(POLICY)
            ids = [*(encode(plan[0]) if plan else ()), *spec.stop_ids[:1]]
            if len(ids) > spec.max_action:
                raise ValueError(f"spec.max_action must be at least {len(ids)} for {plan[0]!r}, got {spec.max_action}")
            action[i, : len(ids)] = ids
        return action

    return HostEnvironment(reset, step, spec, expert, release=lambda state: free.extend(state.games))


def until_stop(action: np.ndarray, stops: np.ndarray) -> list[int]:
    """The ids `[A]` of a turn before its first stop id."""
    is_stop = np.isin(action, stops)
    return action[: np.argmax(is_stop)].tolist() if is_stop.any() else action.tolist()


def by_id(name: str) -> Callable[[], Any]:
    """`make() -> env` of a registered Gymnasium environment."""
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError("gymnasium is missing: pip install 'rollax[games]'") from error
    return lambda: gymnasium.make(name)


def textworld() -> Any:
    """The package, or an error that says how to get it."""
    try:
        import textworld
    except ImportError as error:
        raise ImportError("textworld is missing: pip install 'rollax[games]'") from error
    return textworld


def make_textworld_games(
    folder: str | Path, num_games: int, *, seed: int = 0, rooms: int = 2, objects: int = 4, quest_length: int = 3
) -> tuple[Path, ...]:
    """Generates games as `tw-make custom` does, offline; some seconds each, and none for a game that is there already.

    Args:
      folder: where they go; made if it is not there.
      num_games: how many, of the seeds `seed`, `seed + 1`, ...
      rooms, objects: of the world.
      quest_length: commands that win the game, at the least.

    Returns:
      The files `*.z8`; beside each is a `.json` that is needed too.

    Raises:
      ImportError: TextWorld is not installed.
      ValueError: a number below 1.
    """
    sizes = {"num_games": num_games, "rooms": rooms, "objects": objects, "quest_length": quest_length}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    package, files = textworld(), []
    for number in range(seed, seed + num_games):
        options = package.GameOptions()
        options.nb_rooms, options.nb_objects, options.quest_length = rooms, objects, quest_length
        options.seeds = number
        options.path = str(Path(folder) / f"rooms{rooms}-objects{objects}-quest{quest_length}-seed{number}.z8")
        files.append(Path(package.make(options)[0]))
    return tuple(files)


def textworld_games(
    files: Sequence[str | Path],
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[list[int]], str],
    spec: TokenSpec,
    **options: Any,
) -> HostEnvironment:
    """Games of TextWorld, N at once; an episode's key says which of the files it plays.

    Args:
      files: as `make_textworld_games` returns them.
      encode, decode, spec, **options: as for `gymnasium_text`.

    Returns:
      The environments, as of `gymnasium_text`. Reward: points of the step over the game's largest score, so that a game
      that is won returns 1. Info also has `TEXTWORLD_NUMBERS`: `score` so far, `won`, `lost`, and `progress`, +1 where
      the command brought the end of the quest nearer and -1 where farther. The expert follows a winning policy.

    Raises:
      ImportError: TextWorld is not installed.
      ValueError: no files, or one that is not there.
    """
    package = textworld()
    files = tuple(str(file) for file in files)
    if not files or not all(Path(file).is_file() for file in files):
        raise ValueError(f"files: expected files of games, got {files}")
    options = {"numbers": TEXTWORLD_NUMBERS} | options
    return gymnasium_text(lambda: TextWorldGame(package, files), encode, decode, spec, **options)


class TextWorldGame:
    """One of several files of TextWorld behind Gymnasium's interface; the seed of a reset says which."""

    def __init__(self, package: Any, files: tuple[str, ...]):
        wanted = (COMMANDS, POLICY, "score", "max_score", "won", "lost", "intermediate_reward")
        self.package, self.files, self.wanted = package, files, package.EnvInfos(**dict.fromkeys(wanted, True))
        self.game, self.file, self.score = None, None, 0

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        file = self.files[seed % len(self.files)]
        if file != self.file:
            with warnings.catch_warnings():
                # jericho does not know generated games, from which TextWorld itself reads the score.
                warnings.filterwarnings("ignore", message="Game .* is not fully supported")
                self.game, self.file = self.package.start(file, self.wanted), file
        self.game.seed(seed)
        state, self.score = self.game.reset(), 0
        return clean_feedback(state.feedback), info_of(state)

    def step(self, command: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        state, score, done = self.game.step(command)
        reward, self.score = (score - self.score) / max(state.max_score, 1), score
        return clean_feedback(state.feedback), reward, done, False, info_of(state)


def info_of(state: Any) -> dict[str, Any]:
    """What is handed on of TextWorld's state, under its names but for `progress`."""
    names = (COMMANDS, POLICY, "score", "won", "lost")
    return {**{name: state[name] for name in names}, "progress": state["intermediate_reward"]}


def clean_feedback(feedback: str) -> str:
    """What TextWorld's interpreter prints without the banner, the prompt and its status line, and blank lines."""
    lines = (" ".join(line.split()) for line in feedback.split("\n>")[0].splitlines())
    return "\n".join(line for line in lines if any(map(str.isalnum, line)))
