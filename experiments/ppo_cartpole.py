"""PPO balances CartPole: the classic test of a loop (arXiv 1707.06347), hundreds of runs in one program.

The same objectives and harness as the language-model studies, with an ordinary policy in a vectorised environment:
rollout, advantages and updates of all seeds are one jitted `vmap`.

    python experiments/ppo_cartpole.py
    python experiments/ppo_cartpole.py --seeds 64 --clip 0.1

Results come to runs/ppo_cartpole/NAME/: report.md, results.json, curves.png, metrics.jsonl.
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
from rollax.experiments.harness.claims import Claim, judge
from rollax.experiments.harness.figures import Panel, save_panels
from rollax.experiments.harness.loop import Results, final, run_chunks
from rollax.experiments.harness.report import VERDICT_HEAD, markdown, show, verdict_lines
from rollax.experiments.harness.run import RunFolder, interruptible, one_line_errors, parse, use_compilation_cache


@dataclass(frozen=True)
class Config:
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
    runs: str = "runs"
    """Where run folders go."""
    name: str = ""
    """Of the run folder; the time when empty."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
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


class Train(NamedTuple):
    """`init(key) -> State`; `advance(state, numbers) -> (state, metrics [updates])`; `evaluate(state, numbers)`."""

    init: Callable
    advance: Callable
    evaluate: Callable


def make_train(config: Config) -> Train:
    env = envs.cartpole()
    vector = envs.vectorize(env, config.num_envs)
    (observations,), actions = env.spec.observation_shape, env.spec.num_actions
    graph = nnx.graphdef(nnx.eval_shape(lambda: ActorCritic(observations, actions, config.width, rngs=nnx.Rngs(0))))
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.scale_by_adam(eps=1e-5))

    def apply(params, observation):
        return nnx.merge(graph, params)(observation)

    def act(params, key, observation):
        logits, value = apply(params, observation)
        action = jax.random.categorical(key, logits)
        return action, (jax.nn.log_softmax(logits)[action], value)

    def act_greedily(params, key, observation):
        return jnp.argmax(apply(params, observation)[0]), ()

    unroll = vector.unroll(act, config.steps)
    longest = vector.unroll(act_greedily, env.spec.max_steps)

    def init(key):
        key, model_key, env_key = jax.random.split(key, 3)
        params = nnx.state(ActorCritic(observations, actions, config.width, rngs=nnx.Rngs(model_key)))
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
        metrics["tokens"] = jnp.int32(config.num_envs * config.steps)
        return State(params, opt_state, env_state, observation, state.key, state.step + 1), metrics

    def advance(state, numbers):
        return jax.lax.scan(lambda s, _: update(s, numbers), state, length=min(config.chunk, config.updates))

    def evaluate(state, numbers):
        """The return of the greedy policy, from fresh starts: one episode of every environment."""
        _, _, seen = longest(state.params, *vector.reset(jax.random.fold_in(state.key, 2**20)))
        first = jnp.cumsum(seen.step.done, axis=0) - seen.step.done == 0
        return {"reward": jnp.sum(first * seen.step.reward, axis=0).mean()}

    return Train(init, advance, evaluate)


CLAIMS = [
    Claim(
        "C1",
        "PPO solves CartPole: the greedy policy balances for at least 475 of 500 steps",
        lambda results: final(results, "ppo", "reward"),
        bound=475.0,
        unit="steps",
    )
]


def run(config: Config, folder: RunFolder) -> Results:
    """All seeds in one vmap."""
    train = make_train(config)
    numbers = Numbers(*(jnp.float32(getattr(config, field)) for field in Numbers._fields))
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seed, config.seed + config.seeds))
    state = jax.jit(jax.vmap(train.init))(keys)
    row = lambda tree: jax.tree.map(lambda x: x[None], tree)  # noqa: E731
    over_seeds = lambda f: jax.vmap(f, in_axes=(0, None))  # noqa: E731

    def advance(state, numbers):
        state, metrics = over_seeds(train.advance)(state, numbers)
        return state, row(metrics)

    def evaluate(state, numbers):
        return row(over_seeds(train.evaluate)(state, numbers))

    return run_chunks("ppo_cartpole", ["ppo"], config.updates, folder, advance, evaluate, state, numbers)


def main(argv: list[str] | None = None) -> None:
    use_compilation_cache()
    config = parse(Config(), __doc__, argv)
    with one_line_errors():
        folder = RunFolder(config.runs, "ppo_cartpole", config.name, config)
    with interruptible(folder):
        results = run(config, folder)
    judged = [judge(claim, results) for claim in CLAIMS]
    updates = np.arange(1, config.updates + 1)
    panels = [
        Panel("return of finished episodes", updates, {"ppo": results.train["ppo"]["reward"]}),
        Panel("return of the greedy policy", results.evaluated_at, {"ppo": results.held_out["ppo"]["reward"]}),
        Panel("entropy (nats)", updates, {"ppo": results.train["ppo"]["entropy"]}),
    ]
    save_panels(folder.path / "curves.png", panels)
    folder.write_json("results.json", {"claims": [v.as_dict() for v in judged], "seconds": results.seconds})
    table = markdown(VERDICT_HEAD, verdict_lines(judged))
    folder.write_text("report.md", f"# PPO on CartPole\n\n![curves](curves.png)\n\n{table}\n")
    show(f"{config.seeds} seeds", VERDICT_HEAD, verdict_lines(judged))
    print(f"report: {folder.path / 'report.md'}")


if __name__ == "__main__":
    main()
