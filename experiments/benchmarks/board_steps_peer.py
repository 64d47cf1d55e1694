"""jumanji's side of board_steps.py, run by `peer.py` under the interpreter that has it: its own auto-reset, vmapped."""

from importlib.metadata import version


def handlers() -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jumanji.environments import Minesweeper, Sokoban
    from jumanji.environments.logic.minesweeper.generator import UniformSamplingGenerator
    from jumanji.environments.routing.sokoban.generator import HuggingFaceDeepMindGenerator
    from jumanji.wrappers import AutoResetWrapper

    from rollax.experiments.benchmarks.board_steps import HORIZON, MINES, SIDE, bank, random_actions
    from rollax.experiments.benchmarks.timing import compile_timed, seconds_of

    class Bank(HuggingFaceDeepMindGenerator):
        """Draws as the generator of its data set does, from our bank: walls 1, targets 2; the player 3, boxes 4."""

        def __init__(self, levels):
            ours = jax.tree.map(np.asarray, bank(levels))
            wall = ours.cells == 6
            at_agent = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) == ours.agent[:, None, None]
            fixed = np.where(wall, 1, np.where(ours.cells & 1, 2, 0))
            variable = np.where(at_agent, 3, np.where(~wall & (ours.cells >= 2), 4, 0))
            self._fixed_grids, self._variable_grids = jnp.asarray(fixed, jnp.uint8), jnp.asarray(variable, jnp.uint8)

    case = {}

    def prepare(game, num_envs, steps, levels):
        if game == "sokoban":
            env = Sokoban(generator=Bank(levels), time_limit=HORIZON)
        else:
            env = Minesweeper(generator=UniformSamplingGenerator(SIDE, SIDE, MINES))
        env = AutoResetWrapper(env, next_obs_in_extras=True)

        def run(state, actions):
            def body(state, action):
                if game == "minesweeper":
                    action = jnp.stack(jnp.divmod(action, SIDE), axis=-1)
                state, step = jax.vmap(env.step)(state, action)
                return state, (step.observation, step.reward, step.last(), step.extras["next_obs"])

            return jax.lax.scan(body, state, actions)

        state, _ = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), num_envs))
        args = state, jnp.asarray(random_actions(game, steps, num_envs))
        compiled, seconds = compile_timed(run, *args)
        case["run"] = lambda: seconds_of(compiled, *args)
        return {"compile": seconds, "ended": float(compiled(*args)[1][2].mean())}

    return {
        "prepare": prepare,
        "run": lambda: case["run"](),
        "versions": lambda: {"jumanji": version("jumanji"), "jax": jax.__version__},
    }
