"""A language model acts in a text game that runs in Python, outside of any program, and learns there by GRPO.

TextWorld (arXiv 1806.11532) generates the games offline; any Gymnasium environment of texts is played by its id. A
small transformer whose tokens are the games' words imitates a noisy player first; a pretrained model plays as it is.
This is a smoke study: it shows that the whole loop works, and claims nothing.

    python experiments/text_game.py
    python experiments/text_game.py --model smollm2 --updates 0 --prompts 2 --group 1

Needs `pip install 'rollax[games]'`. The curve comes to runs/text_game/results.json, the games to runs/text_game/games.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax import objectives
from rollax.agents import (
    LanguageModel,
    Sampling,
    Trajectory,
    TransformerConfig,
    host_demonstrate,
    host_sampler,
    load_pretrained,
    restrict_vocabulary,
    score,
    transformer,
)
from rollax.envs import HostEnvironment, TokenSpec
from rollax.envs.text_games import (
    COMMANDS,
    POLICY,
    TEXTWORLD_NUMBERS,
    TextWorldGame,
    by_id,
    gymnasium_text,
    make_textworld_games,
    textworld,
    with_commands,
)
from rollax.experiments.harness.command_line import one_line_errors, parse
from rollax.experiments.harness.supervised import fit

SYSTEM = "You play a text game. Answer with one of the commands that you can give, and nothing else."


@dataclasses.dataclass(frozen=True)
class Config:
    """The study."""

    model: str = "transformer"
    """transformer, smollm2, or the path of a Hugging Face directory or GGUF file with a chat template."""
    game: str = ""
    """Id of a Gymnasium environment of texts; games of TextWorld when empty."""
    games: int = 2
    """TextWorld: how many are generated."""
    game_seed: int = 0
    """TextWorld: of the first game."""
    rooms: int = 2
    """TextWorld: of a game."""
    objects: int = 3
    """TextWorld: of a game."""
    quest_length: int = 2
    """TextWorld: commands that win."""
    turns: int = 4
    """Commands of an episode, at most."""
    prompts: int = 4
    """Starts of a rollout."""
    group: int = 4
    """Episodes of each."""
    updates: int = 10
    """Rollouts with a gradient step each; with 0 the model plays once."""
    warm_start: int = 60
    """Small transformer: supervised steps on episodes of the noisy player."""
    noise: float = 0.5
    """Small transformer: how often that player says any possible command instead of the best."""
    demonstrations: int = 32
    """Small transformer: episodes of that player."""
    batch: int = 8
    """Small transformer: episodes of a supervised step."""
    lr: float = 0.0
    """Adam's learning rate in GRPO; 5e-4 for the small transformer and 1e-6 for a pretrained one when 0."""
    temperature: float = 1.0
    """Of the sampler."""
    max_observation: int = 160
    """Tokens of an observation; what is longer loses its end."""
    max_action: int = 12
    """Tokens of a command."""
    width: int = 64
    """Of the small transformer of two layers."""
    seed: int = 0
    """Of everything but the games."""
    out: str = "runs/text_game"
    """Folder of the results."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        at_least_one = (
            "games rooms objects quest_length turns prompts group demonstrations batch max_observation max_action width"
        )
        for field in at_least_one.split():
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        for field in ("updates", "warm_start", "lr"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}: expected at least 0, got {getattr(self, field)}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise: expected 0 to 1, got {self.noise}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected above 0, got {self.temperature}")


class Player(NamedTuple):
    """A model and the games as it reads them.

    Attributes:
      read: `read(ids) -> text`, for people.
      prefix: ids that every episode begins with, or None.
    """

    model: LanguageModel
    params: Any
    env: HostEnvironment
    read: Callable[[Sequence[int]], str]
    prefix: jax.Array | None
    lr: float


# --- The games --------------------------------------------------------------------------------------------------------


def games_of(config: Config) -> tuple[Callable[[], Any], tuple[str, ...]]:
    """`make() -> game` with Gymnasium's interface, and the numbers of its info that are kept."""
    if config.game:
        return by_id(config.game), ()
    folder = Path(config.out) / "games"
    sizes = dict(rooms=config.rooms, objects=config.objects, quest_length=config.quest_length)
    files = make_textworld_games(folder, config.games, seed=config.game_seed, **sizes)
    package = textworld()
    return lambda: TextWorldGame(package, tuple(map(str, files))), TEXTWORLD_NUMBERS


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+|[^\w\s]", text)


def explore(make: Callable[[], Any], starts: int, turns: int, seed: int) -> set[str]:
    """Words of the games' texts and commands on some walks, half by a winning plan where there is one."""
    rng, game, seen = np.random.default_rng(seed), make(), set()
    for start in range(starts):
        observation, info = game.reset(seed=start)
        for _ in range(turns):
            seen |= set(words(with_commands(observation, info)))
            commands, plan = list(info.get(COMMANDS) or ()), list(info.get(POLICY) or ())[:1]
            if not commands + plan:
                break
            command = plan[0] if plan and rng.random() < 0.5 else rng.choice(commands or plan)
            observation, _, terminated, truncated, info = game.step(str(command))
            if terminated or truncated:
                break
    return seen


# --- The two kinds of model -------------------------------------------------------------------------------------------


def small_player(config: Config, make: Callable[[], Any], numbers: Sequence[str]) -> Player:
    """A transformer from scratch whose tokens are the games' words, started on a noisy player's episodes."""
    seen = explore(make, 16 * config.games, config.turns, config.seed)
    vocab = ("<pad>", "<stop>", "<unknown>", ">", *sorted(seen - {">"}))
    ids = {word: i for i, word in enumerate(vocab)}
    spec = TokenSpec(vocab, config.max_observation, config.max_action, config.turns, stop_ids=(1,), pad_id=0)

    def encode(text):
        return [ids.get(word, 2) for word in words(text)]

    def read(tokens):
        return " ".join(vocab[i] for i in tokens)

    env = gymnasium_text(make, encode, read, spec, closing=(3,), describe=with_commands, numbers=numbers)
    model = transformer(TransformerConfig(len(vocab), config.width, num_layers=2, num_heads=4))
    init_key, play_key, fit_key = jax.random.split(jax.random.key(config.seed), 3)
    params, rng = model.init(init_key), np.random.default_rng(config.seed)

    def noisy(keys, state):
        action = env.expert(keys, state)
        for row, info in zip(action, state.info, strict=True):
            if info.get(COMMANDS) and rng.random() < config.noise:
                said = [*encode(rng.choice(info[COMMANDS])), *spec.stop_ids]
                row[:] = [*said, *[spec.pad_id] * (len(row) - len(said))]
        return action

    if config.warm_start:
        shown = host_demonstrate(play_key, env, noisy, config.demonstrations)
        params = imitate(fit_key, model, params, env, shown, steps=config.warm_start, batch=config.batch)
    return Player(model, params, env, read, None, config.lr or 5e-4)


def imitate(key, model: LanguageModel, params, env: HostEnvironment, shown: Trajectory, *, steps: int, batch: int):
    """Parameters after supervised steps on the commands of random episodes of those that are shown."""

    def loss(params, key):
        some = jax.random.choice(key, len(shown.reward), (batch,))
        part = jax.tree.map(lambda x: x[some], shown)
        log_prob, _ = score(model, params, part, env)
        return objectives.aggregate(-log_prob, part.mask, "token_mean")

    return jax.jit(lambda params: fit(key, params, loss, steps=steps, optimizer=optax.adamw(2e-3)))(params)


def pretrained_player(config: Config, make: Callable[[], Any], numbers: Sequence[str]) -> Player:
    """A chat model; each observation is a user's message, each command the assistant's.

    Raises:
      ValueError: no tokenizer, no chat template, or one that does not set each message between the same tokens, with a
        stop token behind the assistant's.
    """
    loaded = load_pretrained(config.model)
    tokenizer = loaded.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError(f"model: expected a tokenizer with a chat template, got none with {config.model}")
    # The template, cut where the contents stand: what comes before, between two turns, and after an observation.
    said = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\ue000"}]
    parts = tokenizer.render_chat([*said, {"role": "assistant", "content": "\ue001"}, said[1]]).split("\ue000")
    reply = parts[1].split("\ue001") if len(parts) == 3 else []
    if len(reply) != 2:
        raise ValueError("model: expected a chat template that shows each message once")
    stop = next((token for token in map(int, loaded.stop_ids) if reply[1].startswith(tokenizer.decode([token]))), None)
    if stop is None:
        raise ValueError(f"model: expected a stop token after the assistant's words, got {reply[1]!r}")
    between = tokenizer.encode(reply[1])[1:]  # the stop token itself is the policy's
    first = tokenizer.encode(parts[0])
    shared = len(first) - len(between)
    if first[shared:] != between:
        raise ValueError("model: expected a chat template whose user messages all begin alike")
    vocab = tokenizer.tokens()
    spec = TokenSpec(
        vocab, config.max_observation, config.max_action, config.turns, tuple(loaded.stop_ids), loaded.pad_id or 0
    )
    env = gymnasium_text(
        make,
        lambda text: tokenizer.encode(text, allow_special=False),
        lambda ids: tokenizer.decode(ids, skip_special=True),
        spec,
        opening=between,
        closing=tokenizer.encode(reply[0]),
        describe=with_commands,
        numbers=numbers,
    )
    prefix = jnp.asarray(first[:shared], jnp.int32) if shared else None
    model = restrict_vocabulary(loaded.model, len(vocab))
    return Player(model, loaded.params, env, tokenizer.decode, prefix, config.lr or 1e-6)


# --- The loop ---------------------------------------------------------------------------------------------------------


def grpo_step(player: Player, optimizer, config: Config) -> Callable:
    """`step(params, opt_state, trajectory) -> (params, opt_state)`: one step on a fresh rollout."""
    group = np.arange(config.prompts * config.group) // config.group

    def loss(params, trajectory, advantage):
        log_prob, _ = score(
            player.model,
            params,
            trajectory,
            player.env,
            group_size=config.group,
            temperature=config.temperature,
            prefix=player.prefix,
        )
        log_ratio = log_prob - trajectory.full_log_prob
        per_token = objectives.clipped_surrogate(log_ratio, advantage[:, None], *objectives.clip_bounds(0.2))
        return objectives.aggregate(per_token, trajectory.mask, "token_mean")

    @jax.jit
    def step(params, opt_state, trajectory):
        reward = trajectory.reward.sum(axis=1)
        advantage = objectives.grpo_advantages(reward, group, num_groups=config.prompts)
        updates, opt_state = optimizer.update(jax.grad(loss)(params, trajectory, advantage), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def measure(trajectory: Trajectory) -> dict[str, float]:
    """Means over episodes: points, share that terminated, commands, and the share of these that were possible."""
    rows, turns = trajectory.reward.shape
    played = np.asarray(trajectory.mask).reshape(rows, turns, -1).any(axis=2)
    return {
        "score": float(trajectory.reward.sum(axis=1).mean()),
        "finished": float(trajectory.terminated.mean()),
        "commands": float(played.sum(axis=1).mean()),
        "possible": float(np.asarray(trajectory.info["admissible"])[played].mean()),
    }


def transcript(trajectory: Trajectory, player: Player, row: int) -> str:
    """One episode as text: observations, and the model's own words behind `>>>`."""
    tokens, positions, own, turn = (
        np.asarray(x[row]) for x in (trajectory.tokens, trajectory.positions, trajectory.mask, trajectory.turn)
    )
    lines = []
    for t in range(player.env.spec.max_turns):
        here = (positions >= 0) & (turn == t)
        if here.any():
            lines += [player.read(tokens[here & ~own].tolist()), ">>> " + player.read(tokens[here & own].tolist())]
    return "\n".join(lines)


def run(config: Config, make: Callable[[], Any], numbers: Sequence[str] = ()) -> tuple[list[dict[str, float]], str]:
    """Plays and learns: metrics of each rollout, and a transcript of an episode of the last."""
    player = (small_player if config.model == "transformer" else pretrained_player)(config, make, numbers)
    sample = host_sampler(
        player.model,
        player.env,
        num_prompts=config.prompts,
        group_size=config.group,
        sampling=Sampling(temperature=config.temperature),
        prefix=player.prefix,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(player.lr, b2=0.99))
    params, step, curve = player.params, grpo_step(player, optimizer, config), []
    opt_state = optimizer.init(params) if config.updates else None
    for update in range(config.updates + 1):
        began = time.perf_counter()
        trajectory = sample(jax.random.fold_in(jax.random.key(config.seed), update), params)
        row = {"update": update, **measure(trajectory)}
        if update < config.updates:
            params, opt_state = jax.block_until_ready(step(params, opt_state, trajectory))
        curve.append(row | {"seconds": time.perf_counter() - began})
        print("  ".join(f"{name} {value:.3g}" for name, value in curve[-1].items()), flush=True)
    best = int(np.argmax(trajectory.reward.sum(axis=1)))
    return curve, transcript(trajectory, player, best)


def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    with one_line_errors():
        curve, episode = run(config, *games_of(config))
    print(episode)
    results = {"config": dataclasses.asdict(config), "curve": curve, "episode": episode}
    Path(config.out).mkdir(parents=True, exist_ok=True)
    (Path(config.out) / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
