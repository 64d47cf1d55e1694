"""What every environment promises: the shapes and types of its spec, under jit and vmap, and a state scan can carry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.envs import (
    ControlSpec,
    PromptBank,
    TokenKinds,
    arithmetic,
    cartpole,
    countdown,
    prompt_bank,
    sorting,
    tail_forks,
    vectorize,
)


def tiny_bank():
    bank = PromptBank(np.array([[1, 2], [2, 2]]), np.array([1, 2]), np.array([[1], [2]]), np.array([1, 1]))
    stop, no = np.array([True, False, False]), np.zeros(3, bool)
    return prompt_bank(bank, TokenKinds(stop, no, no, no), ("<end>", "a", "b"), max_action=3)


ENVIRONMENTS = {
    "arithmetic": lambda: arithmetic("+-", level_weights=np.ones(2)),
    "cartpole": cartpole,
    "countdown": lambda: countdown(3),
    "prompts": tiny_bank,
    "sorting": sorting,
    "tail_forks": tail_forks,
}


def types(tree):
    return [(x.shape, str(x.dtype)) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_contract(name):
    environment = ENVIRONMENTS[name]()
    spec = environment.spec
    environments = vectorize(environment, 5)

    @jax.jit
    def run(key):
        state, observation = environments.reset(key)
        action = jax.vmap(environment.expert)(jax.random.split(key, 5), state.env)
        after, step = environments.step(state, action)
        return state, observation, action, after, step

    state, observation, action, after, step = run(jax.random.key(0))
    assert types(state) == types(after) and types(observation) == types(step.observation)
    assert types(observation) == types(step.final_observation)
    assert types((step.reward, step.terminated, step.truncated)) == [((5,), "float32"), ((5,), "bool"), ((5,), "bool")]
    assert np.all(np.asarray(step.reward) == 1)  # the expert's
    assert all(value.shape == (5,) for value in step.info.values())
    assert not np.any(np.asarray(step.terminated & step.truncated))
    if isinstance(spec, ControlSpec):
        assert types(observation) == [((5, *spec.observation_shape), "float32")]
        assert types(action) == [((5,), "int32")] and np.all((action >= 0) & (action < spec.num_actions))
    else:
        assert types(observation) == [((5, spec.max_observation), "int32"), ((5,), "int32")]
        assert types(action) == [((5, spec.max_action), "int32")]
        ids = np.concatenate([np.asarray(observation.ids), np.asarray(action)], axis=1)
        assert ids.min() >= 0 and ids.max() < len(spec.vocab) and 0 <= spec.pad_id < len(spec.vocab)
        assert np.all((observation.length >= 1) & (observation.length <= spec.max_observation))
        assert spec.max_turns == 1 and np.all(np.asarray(step.terminated))
        with pytest.raises(ValueError, match="action must have the shape"):
            jax.eval_shape(environment.step, jax.random.key(0), jax.tree.map(lambda x: x[0], state.env), jnp.zeros(99))
    text = environment.render(jax.tree.map(lambda x: x[0], state.env))
    assert (isinstance(text, str) and text.strip() and text.isprintable()) or "\n" in text


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x == "countdown")) for x in ENVIRONMENTS])
def test_a_key_decides_everything(name):
    environment = ENVIRONMENTS[name]()
    reset = jax.jit(environment.reset)
    first, again = reset(jax.random.key(1)), reset(jax.random.key(1))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), first, again))
    states = [str(reset(jax.random.key(i))[0]) for i in range(8)]
    assert len(set(states)) > 1
