"""The convolution's options; its values are in the golden tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.kernels.ttt import depthwise_conv3d

SHAPE = (2, 5, 3, 4, 3)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], SHAPE), jax.random.normal(keys[1], (3, 3, 3, SHAPE[-1]))


def test_zero_padding_is_the_library_convolution(inputs):
    x, kernel = inputs
    expected = jax.lax.conv_general_dilated(
        x,
        kernel[:, :, :, None],
        (1, 1, 1),
        "SAME",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        feature_group_count=SHAPE[-1],
    )
    np.testing.assert_allclose(depthwise_conv3d(x, kernel, pad="zero"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("temporal", "tap"), [("centered", 1), ("causal", 2)])
def test_identity_kernel(inputs, temporal, tap):
    identity = jnp.zeros((3, 3, 3, SHAPE[-1])).at[tap, 1, 1].set(1)
    np.testing.assert_array_equal(depthwise_conv3d(inputs[0], identity, temporal=temporal), inputs[0])


def test_causal_sees_no_later_frame(inputs):
    x, kernel = inputs
    out = depthwise_conv3d(x, kernel, temporal="causal")
    other = depthwise_conv3d(x.at[:, 3:].add(1), kernel, temporal="causal")
    np.testing.assert_array_equal(out[:, :3], other[:, :3])
    assert not np.allclose(out[:, 3], other[:, 3])


def test_bfloat16_accumulates_in_float32(inputs):
    """The sum is rounded once: within half a unit in the last place of the one in float32."""
    narrow = [x.astype(jnp.bfloat16) for x in inputs]
    out, exact = depthwise_conv3d(*narrow), depthwise_conv3d(*(x.astype(jnp.float32) for x in narrow))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2.0**-8, atol=1e-6)


def test_no_frames_no_output(inputs):
    none = inputs[0][:, :0]
    out = depthwise_conv3d(none, inputs[1].astype(jnp.bfloat16))
    assert out.shape == none.shape and out.dtype == jnp.float32


@pytest.mark.parametrize("temporal", ["centered", "causal"])
def test_pieces_with_halo_make_the_whole(inputs, temporal):
    x, kernel = inputs
    whole = depthwise_conv3d(x, kernel, temporal=temporal)
    for cut in (2, 3):
        if temporal == "centered":
            halos = (None, x[:, cut : cut + 1]), (x[:, cut - 1 : cut], None)
        else:
            halos = None, (x[:, cut - 2 : cut], None)
        pieces = [
            depthwise_conv3d(part, kernel, temporal=temporal, halo=halo)
            for part, halo in zip((x[:, :cut], x[:, cut:]), halos, strict=True)
        ]
        np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros(SHAPE[1:])}, r"x must be \[B, T, h, w, C\]"),
        ({"kernel": jnp.zeros((3, 3, 3, 4))}, r"kernel must be \[3, 3, 3, 3\], got \(3, 3, 3, 4\)"),
        ({"pad": "wrap"}, 'pad must be "edge" or "zero", got \'wrap\''),
        ({"temporal": "future"}, 'temporal must be "centered" or "causal", got \'future\''),
        ({"halo": (jnp.zeros((2, 2, 3, 4, 3)), None)}, r"halo before must be \[2, 1, 3, 4, 3\]"),
    ],
)
def test_bad_arguments(inputs, change, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv3d(**{"x": inputs[0], "kernel": inputs[1]} | change)
