"""The peers' side of objectives.py, run by `peer.py` under the interpreter that has them."""

import tempfile
from importlib.metadata import version
from pathlib import Path


def rlax_functions() -> dict:
    import jax
    import jax.numpy as jnp
    import rlax

    from rollax.experiments.benchmarks.objectives import DISCOUNT, EPSILON, LAM

    def gae(reward, values, ends):
        discount = DISCOUNT * (1.0 - ends)
        one = lambda r, d, v: rlax.truncated_generalized_advantage_estimation(r, d, LAM, v)  # noqa: E731
        return jax.vmap(one, in_axes=1, out_axes=1)(reward, discount, values)

    def returns(reward, ones):
        return jax.vmap(lambda r, d: rlax.discounted_returns(r, d, 0.0))(reward, DISCOUNT * ones)

    def surrogate(log_ratio, advantage):
        return rlax.clipped_surrogate_pg_loss(jnp.exp(log_ratio).ravel(), advantage.ravel(), EPSILON)

    return {"GAE of environments": gae, "discounted returns": returns, "clipped surrogate, gradient": surrogate}


def tunix_functions() -> dict:
    from tunix.rl import algo_core, common

    from rollax.experiments.benchmarks.objectives import DISCOUNT, LAM

    def penalty(log_prob, ref_log_prob, mask):
        return common.aggregate_loss(common.compute_kl_divergence(log_prob, ref_log_prob), mask, "token-mean")

    return {
        "GAE of tokens, whitened": lambda *xs: algo_core.compute_gae_advantages(*xs, DISCOUNT, LAM),
        "GRPO advantages": lambda score: algo_core.compute_advantages(score, 16),
        "Dr. GRPO advantages": lambda score: algo_core.compute_drgrpo_advantages(score, 16),
        "RLOO advantages": lambda score: algo_core.compute_rloo_advantages(score, 16),
        "k3 penalty, gradient": penalty,
        "token mean, gradient": lambda loss, mask: common.aggregate_loss(loss, mask, "token-mean"),
        "sequence mean of token means, gradient": lambda loss, mask: common.aggregate_loss(
            loss, mask, "sequence-mean-token-mean"
        ),
    }


def handlers() -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from rollax.experiments.benchmarks import objectives as ours

    case = {}

    def prepare(name, rows, tokens, calls):
        about = ours.CASES[name]
        function = {"rlax": rlax_functions, "tunix": tunix_functions}[about.peer]()[name]
        batch = ours.arrays(rows, tokens)
        inputs = [jnp.asarray(batch[key]) for key in about.inputs]
        case["run"], seconds, results = ours.prepare(function, about.grad, inputs, calls)
        case["folder"] = case.get("folder") or tempfile.TemporaryDirectory()
        path = Path(case["folder"].name) / "results.npy"
        np.save(path, results)
        return {"compile": seconds, "results": str(path)}

    def versions(peer):
        package = {"tunix": "google-tunix"}.get(peer, peer)
        return {package: version(package), f"jax of {peer}": jax.__version__}

    return {"prepare": prepare, "run": lambda: case["run"](), "versions": versions}
