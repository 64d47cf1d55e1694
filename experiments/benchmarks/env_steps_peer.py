"""gymnax's side of env_steps.py, run by `peer.py` under the interpreter that has it: steps as its README takes them."""

from importlib.metadata import version


def handlers() -> dict:
    import gymnax
    import jax
    import jax.numpy as jnp

    from rollax.experiments.benchmarks.env_steps import random_actions
    from rollax.experiments.benchmarks.timing import compile_timed, seconds_of

    env, params = gymnax.make("CartPole-v1")
    case = {}

    def prepare(num_envs, steps):
        def run(key, state, actions):
            def body(carry, action):
                key, state = carry
                key, step_key = jax.random.split(key)
                observation, state, reward, terminated, truncated, info = jax.vmap(env.step, (0, 0, 0, None))(
                    jax.random.split(step_key, num_envs), state, action, params
                )
                return (key, state), (observation, reward, terminated, truncated, info["final_observation"])

            return jax.lax.scan(body, (key, state), actions)

        key = jax.random.key(0)
        _, state = jax.vmap(env.reset, (0, None))(jax.random.split(key, num_envs), params)
        args = key, state, jnp.asarray(random_actions(steps, num_envs))
        compiled, seconds = compile_timed(run, *args)
        case["run"] = lambda: seconds_of(compiled, *args)
        return {"compile": seconds, "ended": float(compiled(*args)[1][2].mean())}

    return {
        "prepare": prepare,
        "run": lambda: case["run"](),
        "versions": lambda: {"gymnax": version("gymnax"), "jax": jax.__version__},
    }
