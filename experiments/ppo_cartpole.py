"""PPO balances CartPole: the classic test of a loop (arXiv 1707.06347), hundreds of runs in one program.

The same objectives and harness as the language-model studies, with an ordinary policy in a vectorised environment:
rollout, advantages and updates of all seeds are one jitted `vmap`.

    python experiments/ppo_cartpole.py
    python experiments/ppo_cartpole.py --seeds 64 --clip 0.1

Results come to runs/ppo_cartpole/NAME/: report.html, results.json, figures, metrics, checkpoints.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rollax import envs, objectives
from rollax.agents import play, reactive
from rollax.envs.cartpole import CartPoleState
from rollax.experiments.harness.claims import Claim
from rollax.experiments.harness.command_line import Options, parse
from rollax.experiments.harness.figures import Panel
from rollax.experiments.harness.loop import Results, Train, final, late
from rollax.experiments.harness.report import Episode
from rollax.experiments.harness.study import Build, Study, main


@dataclass(frozen=True)
class Config(Options):
    """The study."""

    seeds: int = 10
    """Seeds in one vmap."""
    seed: int = 0
    """The first seed."""
    updates: int = 240
    """Rollouts, each followed by `passes` times `mini_batches` gradient steps."""
    num_envs: int = 64
    """Environments of a run."""
    steps: int = 32
    """Steps of each environment in a rollout."""
    passes: int = 4
    """Passes over each rollout."""
    mini_batches: int = 4
    """Gradient steps of a pass."""
    width: int = 64
    """Hidden units of each of the two layers."""
    lr: float = 2.5e-3
    """Adam's learning rate, falling linearly to zero."""
    clip: float = 0.2
    """Clip range of the ratio."""
    discount: float = 0.99
    """Of rewards, per step."""
    lam: float = 0.95
    """GAE's mixing of horizons."""
    entropy: float = 0.01
    """Weight of the entropy bonus."""
    value: float = 0.5
    """Weight of the value loss."""
    chunk: int = 24
    """Updates between evaluations."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        super().check()
        for field in ("seeds", "updates", "num_envs", "steps", "passes", "mini_batches", "width", "chunk"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        for field in ("lr", "clip", "entropy", "value"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}: expected at least 0, got {getattr(self, field)}")
        if self.num_envs * self.steps % self.mini_batches:
            samples = self.num_envs * self.steps
            raise ValueError(f"mini_batches: expected a divisor of {samples} samples, got {self.mini_batches}")
        if self.updates % min(self.chunk, self.updates):
            raise ValueError(f"chunk: expected a divisor of updates={self.updates}, got {self.chunk}")


class Numbers(NamedTuple):
    """What a sweep may vary, all traced."""

    lr: jax.Array
    clip: jax.Array
    discount: jax.Array
    lam: jax.Array
    entropy: jax.Array
    value: jax.Array


class ActorCritic(nnx.Module):
    """Two tanh networks, one for the action logits `[K]` and one for the value `[]`, of an observation `[D]`."""

    def __init__(self, observation: int, actions: int, width: int, *, rngs: nnx.Rngs):
        def network(out, scale):
            sizes, scales = (observation, width, width, out), (2**0.5, 2**0.5, scale)
            init = nnx.initializers.orthogonal
            layers = zip(sizes[:-1], sizes[1:], scales, strict=True)
            return nnx.List([nnx.Linear(a, b, kernel_init=init(s), rngs=rngs) for a, b, s in layers])

        self.actor, self.critic = network(actions, 0.01), network(1, 1.0)

    def __call__(self, observation):
        def through(layers):
            hidden = observation
            for layer in layers[:-1]:
                hidden = jnp.tanh(layer(hidden))
            return layers[-1](hidden)

        return through(self.actor), through(self.critic)[..., 0]


class State(NamedTuple):
    """All that training carries."""

    params: Any
    opt_state: Any
    env: envs.VectorState
    observation: jax.Array
    key: jax.Array
    step: jax.Array


def network(config: Config) -> Callable:
    """`apply(params, observation) -> (logits, value)`, a pure function."""
    spec = envs.cartpole().spec
    build = lambda: ActorCritic(*spec.observation_shape, spec.num_actions, config.width, rngs=nnx.Rngs(0))  # noqa: E731
    graph = nnx.graphdef(nnx.eval_shape(build))
    return lambda params, observation: nnx.merge(graph, params)(observation)


def greedy(apply: Callable, params: Any):
    """The policy that takes the likeliest action."""
    return reactive(lambda key, observation: (jnp.argmax(apply(params, observation)[0]), ()))


def make_train(config: Config) -> Train:
    """The functions of one run."""
    env = envs.cartpole()
    vector = envs.vectorize(env, config.num_envs)
    (observations,), actions = env.spec.observation_shape, env.spec.num_actions
    apply = network(config)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.scale_by_adam(eps=1e-5))

    def act(params, key, observation):
        logits, value = apply(params, observation)
        action = jax.random.categorical(key, logits)
        return action, (jax.nn.log_softmax(logits)[action], value)

    unroll = vector.unroll(act, config.steps)

    def init(key):
        key, model_key, env_key = jax.random.split(key, 3)
        model = ActorCritic(observations, actions, config.width, rngs=nnx.Rngs(model_key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return State(params, optimizer.init(params), *vector.reset(env_key), key, jnp.int32(0))

    def loss(params, batch, numbers):
        observation, action, old_log_prob, advantage, target = batch
        logits, value = apply(params, observation)
        log_probs = jax.nn.log_softmax(logits)
        log_prob = jnp.take_along_axis(log_probs, action[:, None], axis=-1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1).mean()
        bounds = objectives.clip_bounds(numbers.clip)
        policy_loss = objectives.clipped_surrogate(log_prob - old_log_prob, advantage, *bounds).mean()
        value_loss = 0.5 * jnp.square(value - target).mean()
        return policy_loss + numbers.value * value_loss - numbers.entropy * entropy, entropy

    def update(state, numbers):
        env_state, observation, seen = unroll(state.params, state.env, state.observation)
        log_prob, value = seen.extras
        # A time limit is no failure: bootstrap on what the cut-off episode had reached.
        _, next_value = apply(state.params, seen.step.final_observation)
        advantage, target = objectives.gae_time_major(
            seen.step.reward,
            value,
            next_value,
            seen.step.terminated,
            seen.step.truncated,
            numbers.discount,
            numbers.lam,
        )
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        batch = (seen.observation, seen.action, log_prob, advantage, target)
        batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        lr = numbers.lr * (1 - state.step / config.updates)
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), config.passes)
        order = jax.vmap(lambda key: jax.random.permutation(key, config.num_envs * config.steps))(keys)

        def step(carry, rows):
            params, opt_state = carry
            grads, entropy = jax.grad(loss, has_aux=True)(params, jax.tree.map(lambda x: x[rows], batch), numbers)
            steps, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, jax.tree.map(lambda s: -lr * s, steps)), opt_state), entropy

        carry = (state.params, state.opt_state)
        (params, opt_state), entropy = jax.lax.scan(step, carry, order.reshape(config.passes * config.mini_batches, -1))
        metrics = envs.episode_statistics(seen.step)
        metrics |= {"reward": metrics.pop("episode_return"), "entropy": entropy.mean()}
        metrics["env_steps"] = jnp.int32(config.num_envs * config.steps)
        return State(params, opt_state, env_state, observation, state.key, state.step + 1), metrics

    def advance(state, numbers):
        return jax.lax.scan(lambda s, _: update(s, numbers), state, length=min(config.chunk, config.updates))

    def evaluate(state, numbers):
        """The return of the greedy policy: one episode of every environment."""
        key = jax.random.fold_in(state.key, 2**20)
        episodes = play(key, env, greedy(apply, state.params), num_starts=config.num_envs, num_steps=env.spec.max_steps)
        return {"reward": episodes.reward.sum(axis=1).mean()}

    return Train(init, advance, evaluate)


def build(config: Config) -> Build:
    numbers = Numbers(*(float(getattr(config, field)) for field in Numbers._fields))

    def episodes(state_of) -> list[Episode]:
        """The greedy policy of the first seed, every tenth step."""
        env, policy = envs.cartpole(), greedy(network(config), state_of("ppo").params)
        watch = jax.jit(lambda key: play(key, env, policy, num_starts=1, num_steps=env.spec.max_steps))
        played = jax.device_get(watch(jax.random.key(config.seed)))
        physics, length = played.record[0][0], int(played.mask.sum())  # what is observed is the state
        frames = [env.render(CartPoleState(physics[t], np.int32(t))) for t in range(0, length, 10)]
        return [Episode("the greedy policy, every tenth step", frames, float(played.reward.sum()))]

    return Build(make_train(config), {"ppo": numbers}, episodes)


CLAIMS = [
    Claim(
        "C1",
        "PPO solves CartPole: the greedy policy balances for at least 475 of 500 steps",
        lambda results: final(results, "ppo", "reward"),
        bound=475.0,
        unit="steps",
        needs=("ppo",),
    )
]


def finished(results: Results, row: str) -> np.ndarray:
    """Return of the episodes that finished in the last sixth of the updates, `[seeds]`; few do once all are long."""
    reward = results.train[row]["reward"]
    return np.nanmean(reward[:, -max(1, reward.shape[1] // 6) :], axis=1)


def panels(results: Results) -> list[Panel]:
    train, held_out = results.train["ppo"], results.held_out["ppo"]
    updates = np.arange(1, results.evaluated_at[-1] + 1)
    return [
        Panel("return of finished episodes", updates, {"ppo": train["reward"]}),
        Panel("return of the greedy policy", results.evaluated_at, {"ppo": held_out["reward"]}),
        Panel("entropy (nats)", updates, {"ppo": train["entropy"]}),
    ]


STUDY = Study(
    name="ppo_cartpole",
    title="PPO on CartPole (arXiv 1707.06347)",
    configs=lambda argv: {"ppo": parse(Config(), __doc__, argv)},
    build=build,
    claims=CLAIMS,
    columns={"greedy return": final, "return": finished, "entropy": lambda r, row: late(r, row, "entropy")},
    panels=panels,
    traced=Numbers._fields,
    smoke=("--seeds", "2", "--updates", "12", "--chunk", "4"),
)

if __name__ == "__main__":
    main(STUDY)
