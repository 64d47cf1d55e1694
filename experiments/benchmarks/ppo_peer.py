"""rejax's side of ppo.py, run by `peer.py` under the interpreter that has it."""

from importlib.metadata import version


def handlers() -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import rejax
    from rejax.evaluate import evaluate

    from rollax.experiments.benchmarks.ppo import COMPILES, seed_keys
    from rollax.experiments.benchmarks.timing import compile_timed, seconds_of

    case = {}

    def prepare(seeds, updates, num_envs, steps, passes, mini_batches, width, lr, clip, discount, lam, entropy, value):
        total = updates * num_envs * steps
        algorithm = rejax.PPO.create(
            env="CartPole-v1",
            total_timesteps=total,
            eval_freq=total,
            skip_initial_evaluation=True,
            num_envs=num_envs,
            num_steps=steps,
            num_epochs=passes,
            num_minibatches=mini_batches,
            learning_rate=optax.linear_schedule(lr, 0.0, updates * passes * mini_batches),
            max_grad_norm=0.5,
            gamma=discount,
            gae_lambda=lam,
            clip_eps=clip,
            ent_coef=entropy,
            vf_coef=value,
            agent_kwargs={"activation": "tanh", "hidden_layer_sizes": (width, width)},
        )
        algorithm = algorithm.replace(eval_callback=lambda algorithm, state, rng: ())  # training alone is timed
        keys = seed_keys(seeds)
        whole = jax.vmap(lambda key: algorithm.train(rng=key)[0])
        compiled, seconds = compile_timed(whole, keys, repeats=COMPILES)

        def evaluation(state, key):
            def act(observation, rng):
                logits = lambda actor, x: actor._action_dist(x).logits  # noqa: E731
                scores = algorithm.actor.apply(state.actor_ts.params, observation[None], method=logits)
                return jnp.argmax(scores[0])

            return evaluate(act, key, algorithm.env, algorithm.env_params, num_envs, 500)[1].mean()

        state = compiled(keys)
        # What a vmap returns has classes of its own, which are no arguments of another jit: closed over, they are fine.
        returns = [
            evaluation(jax.tree.map(lambda x, i=i: x[i], state), jax.random.key(2**20 + i)) for i in range(seeds)
        ]
        case["run"] = lambda: seconds_of(compiled, keys)
        return {"compile": seconds, "returns": np.asarray(returns).tolist()}

    return {
        "prepare": prepare,
        "run": lambda: case["run"](),
        "versions": lambda: {"rejax": version("rejax"), "gymnax": version("gymnax"), "jax": jax.__version__},
    }
