"""V_0.5 with language models: its budgets, its two ways to run them, what it reads of prompts, and its measures."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax import envs, objectives
from rollax.agents import TransformerConfig, transformer
from rollax.agents.prior_fitted import tabular_head_init
from rollax.experiments import v05_language as language
from rollax.experiments import v05_tasks as tasks
from rollax.experiments.harness.loop import Results
from rollax.experiments.v05_baselines import SLOTS, Numbers, index
from rollax.tests.support import GOLDEN

CONFIG = language.Config(prompts=4, contexts=8, updates=2, chunk=2, eval_prompts=4, eval_samples=2, critic_start=2)


def tiny_task() -> tasks.Task:
    """A transformer that hardly knows sums of one digit, and a value model that reads the first token."""
    env = envs.arithmetic("+", 1, split="all")
    model = transformer(TransformerConfig(len(env.spec.vocab), 16, 1, 2))
    features = lambda state, observation: jax.nn.one_hot(observation.ids[:, 0] % 4, tasks.V0.head.num_features)  # noqa: E731
    head = tabular_head_init(jax.random.key(0), tasks.V0.head)
    start = lambda key: tasks.imitate(key, model.init(key), model, env, 40)  # noqa: E731
    return tasks.Task(env, env, model, start, features, head)


@pytest.fixture(scope="module")
def task():
    return tiny_task()


def test_budgets_lie_between_an_arms_least_and_most_and_follow_the_rule():
    rewards = jnp.where(jax.random.uniform(jax.random.key(0), (64, SLOTS)) < 0.5, 1.0, 0.0)
    prior = jax.random.uniform(jax.random.key(1), (64,), minval=-1.0)
    drawn_of = lambda count: jnp.arange(SLOTS) < count[:, None]  # noqa: E731

    def play(n):
        count = jnp.full(64, 4)
        for _ in range(SLOTS):
            going = language.more(rewards, drawn_of(count), prior, n)
            count = count + (going & (count < SLOTS))
        return np.asarray(count)

    assert (play(language.ARMS["grpo_4"]) == 4).all()
    assert (play(language.ARMS["grpo_16"]) == SLOTS).all()
    wanted = objectives.osla_count(2 * rewards - 1, prior, k_init=4, k_max=SLOTS, cost=1 / 256)
    np.testing.assert_array_equal(play(language.ARMS["osla, v0"]), wanted)
    assert len(set(play(language.ARMS["osla, v0"]))) > 3


def test_prompts_have_numbers_that_ignore_padding():
    ids = jnp.array([[3, 1, 2, 0], [3, 1, 2, 9], [1, 3, 2, 0], [3, 1, 0, 0], [3, 1, 9, 9]])
    length = jnp.array([3, 3, 3, 2, 2])
    numbers = np.asarray(language.prompt_ids(envs.Tokens(ids, length)))
    assert numbers[0] == numbers[1] and numbers[3] == numbers[4]
    assert len(set(numbers)) == 3 and (numbers >= 0).all()


def test_a_random_world_hangs_on_what_the_encoder_says_and_on_nothing_else():
    tokens = jax.random.normal(jax.random.key(0), (256, 3, 12)) * jnp.linspace(3, 0.1, 12)
    world = tasks.random_world(jax.random.key(1), tokens.at[:128].set(tokens[128:]))
    rate = np.asarray(world.rate)
    assert rate.shape == (4 * tasks.FAMILIES, tasks.CHECKPOINTS, 256)
    np.testing.assert_allclose(rate[:, :, :128], rate[:, :, 128:], atol=1e-4)
    assert (np.diff(rate.mean(axis=2), axis=1) > 0).all()  # checkpoints of a family get better
    assert rate.std(axis=2).mean() > 0.1


def test_tokens_of_the_encoder_end_where_the_text_ends(monkeypatch):
    def lengths_of_words(encoder, texts):
        """A tokenizer for an encoder without one."""
        rows = [[1, *map(len, text.split()), 2] for text in texts]
        width = 2 + max(map(len, rows))
        ids = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
        return ids, ids > 0

    monkeypatch.setattr(tasks, "tokenise", lengths_of_words)
    config = language.Config(encoder=str(GOLDEN / "bert_tiny"))
    short, long = "Hello.", "Which number is the largest: 1, 2, 3?"
    states, alone = (np.asarray(tasks.encoded(config, texts)) for texts in ([short, long], [short]))
    assert states.shape == (2, 10, 24) and alone.shape == (1, 3, 24)
    length = alone.shape[1]
    assert not states[0, :-length].any() and (np.abs(states[1]).sum(axis=1) > 0).all()
    np.testing.assert_allclose(states[0, -length:], alone[0], atol=1e-5)


@pytest.mark.slow
def test_rounds_outside_the_program_train_as_rounds_inside(task):
    """The budgets, the reward and the parameters agree; the loss outside is computed of the drawn rows alone."""
    n = jax.tree.map(jnp.asarray, language.ARMS["osla, v0"]._replace(lr=3e-3, cost=1 / 256))
    inside, outside = (language.make_train(CONFIG, task, staged=staged) for staged in (False, True))
    state = jax.jit(inside.init)(jax.random.key(3))
    after, told = jax.jit(inside.advance)(state, n)
    assert outside.staged and not inside.staged
    staged_after, staged_told = outside.advance(jax.tree.map(jnp.copy, state), n)
    for name in ("rollouts", "reward", "tokens", "dead groups"):
        np.testing.assert_allclose(staged_told[name], told[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert 4 < told["rollouts"].mean() < SLOTS
    assert float(after.spent) == pytest.approx(float(told["rollouts"].sum()) * CONFIG.prompts)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, state.params)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, staged_after.params)
    assert max(jax.tree.leaves(apart)) < 0.02 * max(jax.tree.leaves(moved))
    np.testing.assert_array_equal(after.records.prompt, staged_after.records.prompt)
    np.testing.assert_allclose(after.records.rate, staged_after.records.rate, atol=1e-6)
    evaluated = jax.jit(inside.evaluate)(after, n)["reward"], outside.evaluate(staged_after, n)["reward"]
    np.testing.assert_allclose(*evaluated)


@pytest.mark.slow
def test_critics_learn_what_the_policy_earns_and_the_policy_learns_from_them(task):
    config = dataclasses.replace(CONFIG, critic_start=4, passes=1, value_lr=1e-2)
    train = language.make_train(config, task, "critic")
    state = jax.jit(train.init)(jax.random.key(0))
    assert jax.tree.leaves(state.critic)[0].size and np.abs(state.critic["value"]["kernel"]).max() > 0
    advance = jax.jit(train.advance)
    after = {}
    for arm in ("ppo_4", "vapo_4", "vapo_4, alpha 1"):
        after[arm], told = advance(state, jax.tree.map(jnp.asarray, language.APART[arm]._replace(lr=1e-3)))
        assert np.isfinite(told["gradient norm"]).all() and (told["gradient norm"] > 0).all()
        assert (told["rollouts"] == 4).all()
    for one, other in itertools.combinations(after, 2):
        apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), after[one].params, after[other].params)
        assert max(jax.tree.leaves(apart)) > 0, (one, other)


def test_measures_of_rollouts():
    spent, reward = np.array([[0.0, 10, 20, 30]]), np.array([[0.1, 0.3, 0.2, 0.5]])
    twice = np.array([[0.0, 40, 80, 120]])
    results = Results({}, {"a": {"spent": spent, "reward": reward}, "b": {"spent": twice, "reward": reward}}, None, {})
    np.testing.assert_allclose(language.rollouts_to(results, "a", np.array([0.2])), 5)
    np.testing.assert_allclose(language.rollouts_to(results, "a", np.array([0.4])), 25)
    np.testing.assert_allclose(language.rollouts_to(results, "a", np.array([0.05])), 0)
    assert np.isnan(language.rollouts_to(results, "a", np.array([0.6])))
    np.testing.assert_allclose(language.saved("a", "b")(results), 0.75)
    np.testing.assert_allclose(language.gap_at_equal_rollouts("a", "b")(results), 0.5 - 0.25)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "nowhere"], "model: expected transformer, smollm2 or an existing path, got 'nowhere'"),
        (["--task", "sums"], "task: expected one of arithmetic, countdown for --model transformer, got 'sums'"),
        (["--model", "smollm2", "--arms", "ppo_4"], "arms: expected some of"),
        (["--prompts", "65"], "prompts: expected at most contexts=64, got 65"),
        (["--updates", "25"], "chunk: expected a divisor of updates=25, got 10"),
        (["--cost", "0"], "cost: expected above 0, got 0.0"),
    ],
)
def test_bad_options_get_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        language.configs_of(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and said.count("\n") == 1


def test_a_staged_study_is_not_debugged_as_one_program(task):
    from rollax.experiments.harness.command_line import Options, UserError
    from rollax.experiments.harness.loop import compiled, single

    train = language.make_train(CONFIG, task, staged=True)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(train.init, jax.random.key(0))
    )
    program = single(train, "osla, v0", Numbers(index("fused")), 0, shapes)
    with pytest.raises(UserError, match="debug_nans"):
        compiled(program, Options(debug_nans=True))
    assert compiled(program, Options()) == (program.advance, program.evaluate)
