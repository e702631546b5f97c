"""Every test of the kit: the mathematics against slow NumPy, known bugs of others, the program.

    python -m pytest

No network, no GPU. "Guard" in a test's name or docstring: the bug was found in a public VQ-VAE.
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data
import model
import quantize
import train

HERE = Path(__file__).parent
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 runs it: tens of seconds")
# Runs of one configuration share their compiled programs: half the time of the tests.
CACHE = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
TINY = {"hidden": 8, "residual": 4, "slots": 2, "K": 16, "D": 4, "batch": 8,
        "likelihood": "logistic"}  # fmt: skip
TINY_FLAGS = [f"--{name}={value}" for name, value in TINY.items()]


def field(seed=0, B=2, h=3, w=2, N=3, D=4, K=7, S=3):
    """A random z_e [B, h, w, N, D] and codebook [S, K, D]."""
    rng = np.random.default_rng(seed)
    z_e = rng.normal(size=(B, h, w, N, D)).astype(np.float32)
    return jnp.array(z_e), jnp.array(rng.normal(size=(S, K, D)).astype(np.float32))


def slow_lookup(z_e, codebook):
    """The definition, one latent at a time, in float64."""
    z_e, codebook = np.float64(z_e), np.float64(codebook)
    codes = np.zeros(z_e.shape[:-1], int)
    for where in np.ndindex(codes.shape):
        e = codebook[where[-1] % len(codebook)]
        distances = [np.sqrt(((z_e[where] - code) ** 2).sum()) for code in e]
        codes[where] = distances.index(min(distances))
    return codes


def tiny(preset="paper", **changes):
    """Config and network of a very small model; the notebook's likelihood stays gaussian."""
    if preset == "notebook":
        changes = {"likelihood": "gaussian", **changes}
    config = train.configure({"preset": preset, **TINY, **changes})
    return config, train.build(config)


def pictures(n=8, seed=0):
    """Random uint8 images [n, 32, 32, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


# Quantiser


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("S", [1, 3])
def test_lookup_is_the_nearest_code(S, jit):
    z_e, codebook = field(S=S)
    lookup = jax.jit(quantize.lookup) if jit else quantize.lookup
    codes = lookup(z_e, codebook)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, slow_lookup(z_e, codebook))


def test_nearest_takes_one_vector():
    z_e, codebook = field()
    code = quantize.nearest(z_e[0, 0, 0, 0], codebook[0])
    assert code.shape == () and code == slow_lookup(z_e, codebook)[0, 0, 0, 0]
    assert code == jnp.argmin(((codebook[0] - z_e[0, 0, 0, 0]) ** 2).sum(-1))


def test_lowest_index_wins_a_tie():
    codebook = jnp.array([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 9.0]])
    assert quantize.nearest(jnp.zeros(2), codebook) == 1
    assert quantize.nearest(jnp.array([1.0, 0.0]), codebook) == 1
    assert quantize.lookup(jnp.zeros((1, 1, 1, 1, 2)), codebook[None]).item() == 1


@pytest.mark.parametrize("B", [5, 700])
def test_both_lifts_agree(monkeypatch, B):
    """The CPU goes slot by slot, 2048 vectors at a time, other backends take all at once."""
    z_e, codebook = field(B=B)
    assert B < 100 or z_e[..., 0, 0].size > 2048 and z_e[..., 0, 0].size % 2048
    here = quantize.lookup(z_e, codebook)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(quantize.lookup(z_e, codebook), here)


@pytest.mark.parametrize("options", [dict, train.compiler_options])
def test_codes_are_right_where_positions_are_as_many_as_codes(options):
    """jaxlib 0.10.2 mixes up the axes of such a square when the products are a jnp.sum."""
    z_e, codebook = field(B=4, h=8, w=8, K=256, D=6)
    codes = jax.jit(quantize.lookup, compiler_options=options())(z_e, codebook)
    z, e = np.float64(z_e).reshape(256, -1, 1, 6), np.float64(codebook)
    right = ((z - e) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(codes.reshape(256, -1), right)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_no_array_of_all_differences(backend, monkeypatch):
    """Nothing as large as [B, h, w, N, K, D] is made, forward or backward."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    z_e, codebook = field(K=64, D=32)
    largest = 0

    def visit(jaxpr):
        nonlocal largest
        for equation in jaxpr.eqns:
            largest = max([largest, *(math.prod(v.aval.shape) for v in equation.outvars)])
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    def total(z, e):
        return sum(jnp.sum(x) for x in quantize.quantize(z, e) if x.dtype == z.dtype)

    visit(jax.make_jaxpr(jax.grad(total, (0, 1)))(z_e, codebook).jaxpr)
    assert 0 < largest <= max(z_e[..., 0].size * 64, codebook.size) < z_e.size * 64 / 10


def test_embed_and_usage():
    z_e, codebook = field()
    codes = slow_lookup(z_e, codebook)
    e = quantize.embed(jnp.array(codes), codebook)
    counts = np.zeros((3, 7))
    for where in np.ndindex(codes.shape):
        np.testing.assert_array_equal(e[where], codebook[where[-1], codes[where]])
        counts[where[-1], codes[where]] += 1
    np.testing.assert_array_equal(quantize.usage(codes, 3, 7), counts)
    np.testing.assert_array_equal(quantize.usage(codes, 1, 7), counts.sum(0, keepdims=True))


def test_straight_through():
    """Guard 4: the decoder's gradient reaches the encoder unchanged, and z_q is exactly e."""
    z_e, codebook = field()
    upstream = jax.random.normal(jax.random.key(1), z_e.shape)
    z_q, codes = quantize.quantize(z_e, codebook)[:2]
    np.testing.assert_array_equal(z_q, quantize.embed(codes, codebook))
    into = jax.grad(lambda z, e: jnp.vdot(upstream, quantize.quantize(z, e).z_q), (0, 1))
    to_encoder, to_codebook = into(z_e, codebook)
    np.testing.assert_array_equal(to_encoder, upstream)
    np.testing.assert_array_equal(to_codebook, 0)


@pytest.mark.parametrize("S", [1, 3])
def test_losses_and_their_gradients_by_hand(S):
    """Guards 1, 2, 5: which loss moves what, in which direction, and how far."""
    z_e, codebook = field(S=S)
    codes = slow_lookup(z_e, codebook)
    e = np.stack([np.asarray(codebook)[n % S][codes[..., n]] for n in range(3)], -2)
    q = quantize.quantize(z_e, codebook)
    for loss in (q.codebook_loss, q.commitment_loss):
        np.testing.assert_allclose(loss, np.mean((np.asarray(z_e) - e) ** 2), rtol=1e-5)

    pull = 2 * (e - np.asarray(z_e)) / z_e.size
    of_codebook = np.zeros(codebook.shape)
    for where in np.ndindex(codes.shape):
        of_codebook[where[-1] % S, codes[where]] += pull[where]
    for beta in (0.0, 0.25, 2.0):

        def loss(z, e, beta=beta):
            q = quantize.quantize(z, e)
            return q.codebook_loss + beta * q.commitment_loss

        to_encoder, to_codebook = jax.grad(loss, (0, 1))(z_e, codebook)
        np.testing.assert_allclose(to_codebook, of_codebook, atol=1e-6)
        np.testing.assert_allclose(to_encoder, -beta * pull, atol=1e-6)


def test_ema_step_by_hand():
    """Appendix A.1 in float64, with the codes of the codebook before the step (guard 6)."""
    z_e, codebook = field(K=5)
    codes = slow_lookup(z_e, codebook)
    start = quantize.EMA(jnp.full((3, 5), 2.0), codebook * 2 + 0.5)
    ema, after = quantize.ema_update(start, codebook, z_e, jnp.array(codes), 0.9)
    for n in range(3):
        for k in range(5):
            mine = np.float64(z_e)[..., n, :][codes[..., n] == k]
            count = 0.9 * 2 + 0.1 * len(mine)
            total = 0.9 * np.float64(start.total[n, k]) + 0.1 * mine.sum(0)
            np.testing.assert_allclose(ema.count[n, k], count, rtol=1e-6)
            np.testing.assert_allclose(ema.total[n, k], total, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(after[n, k], total / count, rtol=1e-5, atol=1e-6)


def test_unused_codes_stay():
    """Guard 7: they neither fly away nor fall to zero, even when their count underflows."""
    codebook = jnp.array([[[1.0, 2.0], [50.0, -60.0]]])
    z_e, ema, e = jnp.ones((1, 2, 2, 1, 2)), quantize.ema_init(codebook), codebook
    step = jax.jit(lambda ema, e: quantize.ema_update(ema, e, z_e, quantize.lookup(z_e, e), 0.9))
    for _ in range(1500):
        ema, e = step(ema, e)
    np.testing.assert_allclose(e[0, 1], codebook[0, 1], rtol=1e-4)
    np.testing.assert_allclose(e[0, 0], 1.0, rtol=1e-4)
    assert ema.count[0, 1] < 1e-30


def test_restart_moves_vector_sum_and_count():
    """Guard 12: a restarted code stays where it was put at the next step; live ones do not move."""
    z_e, codebook = field(N=1, S=1, K=3, B=8)
    ema = quantize.EMA(jnp.array([[5.0, 0.001, 4.0]]), codebook * jnp.array([5, 0.001, 4])[:, None])
    after, e = quantize.restart(jax.random.key(0), ema, codebook, z_e, 0.05)
    np.testing.assert_array_equal(e[0, jnp.array([0, 2])], codebook[0, jnp.array([0, 2])])
    outputs = np.asarray(z_e).reshape(-1, 4)
    assert (np.asarray(e[0, 1]) == outputs).all(-1).any()
    np.testing.assert_array_equal(after.total[0, 1], e[0, 1])
    assert (
        after.count[0, 1] == 1 and (after.count[0, jnp.array([0, 2])] == ema.count[0, [0, 2]]).all()
    )
    elsewhere = jnp.zeros((8, 3, 2, 1), jnp.int32)  # nobody uses code 1
    _, later = quantize.ema_update(after, e, z_e, elsewhere, 0.99)
    np.testing.assert_allclose(later[0, 1], e[0, 1], rtol=1e-5)


@pytest.mark.parametrize("S", [1, 3])
def test_draw_takes_outputs_of_the_right_slot(S):
    z_e, _ = field(B=8)
    drawn = quantize.draw(jax.random.key(0), z_e, S, 20)
    assert drawn.shape == (S, 20, 4)
    for s in range(S):
        pool = np.asarray(z_e if S == 1 else z_e[..., s, :]).reshape(-1, 4)
        assert all((pool == row).all(-1).any() for row in np.asarray(drawn[s]))
        assert len(np.unique(np.asarray(drawn[s]), axis=0)) == 20  # no output twice
    assert quantize.draw(jax.random.key(0), z_e, S, 999).shape == (S, 999, 4)


def test_perplexity():
    np.testing.assert_allclose(quantize.perplexity(jnp.full((2, 512), 3.0)), 512, rtol=1e-4)
    np.testing.assert_allclose(quantize.perplexity(jnp.array([0.0, 7.0, 0.0])), 1, rtol=1e-6)
    p = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(
        quantize.perplexity(jnp.array([5.0, 3, 2])), np.exp(-(p * np.log(p)).sum()), rtol=1e-5
    )


def test_codebook_scale():
    """Guard 13: the limit is sqrt(3 / D), not sqrt(3 / K)."""
    e = np.asarray(quantize.init_codebook(jax.random.key(0), 2, 512, 64))
    assert e.shape == (2, 512, 64) and abs(e).max() <= math.sqrt(3 / 64)
    np.testing.assert_allclose((e**2).sum(-1).mean(), 1.0, rtol=0.02)


# Networks


@pytest.mark.parametrize("ours, stock", [(model.Down, nn.Conv), (model.Up, nn.ConvTranspose)])
def test_rewritten_layers_equal_stock_layers(ours, stock):
    """Values and the gradients of input, kernel and bias."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 6, 5))
    ours, stock = ours(7, jnp.float32), stock(7, (4, 4), (2, 2))
    params = ours.init(jax.random.key(1), x)
    params = jax.tree.map(lambda p: p + 0.1, params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, stock.init(jax.random.key(1), x)
    )
    y = stock.apply(params, x)
    upstream = jax.random.normal(jax.random.key(2), y.shape)
    np.testing.assert_allclose(ours.apply(params, x), y, atol=1e-4)
    grads = [
        jax.grad(lambda p, x, f=f: jnp.vdot(upstream, f.apply(p, x)), (0, 1))(params, x)
        for f in (ours, stock)
    ]
    for mine, theirs in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-3)


RESULTS = [
    json.loads(line)
    for name in ("results", "ablations")
    for line in (Path(__file__).parent / "results" / f"{name}.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("row", RESULTS, ids=lambda row: row["command"])
def test_the_command_of_a_result_still_means_what_was_run(row):
    """Presets and the lines that ablations edit have not changed under the numbers shown."""
    edit, _, command = row["command"].rpartition(" && ")
    line = edit.split("/")[1].replace("^", "\n") if edit else ""
    assert line in Path(model.__file__).read_text()
    overrides, *_ = train.parse(command.removeprefix("python train.py").split())
    config = train.configure(overrides)
    for name in ("preset", "likelihood", "steps", "batch", "seed"):
        assert row[name] == getattr(config, name)
    assert row["split"] == ("val" if config.val else "test")


def test_an_unknown_compiler_option_is_left_out(monkeypatch):
    """The options of one jaxlib must not stop the kit under another."""
    monkeypatch.setattr(train, "XLA_OPTIONS", {"xla_cpu_no_such_thing": "1"})
    assert train.compiler_options() == {}


def count(preset, **changes):
    """Parameters of a preset, without making them."""
    config = train.configure({"preset": preset, **changes})
    shapes = jax.eval_shape(train.build(config).init, jax.random.key(0), pictures(1))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_parameter_counts():
    """Every layer of both presets, counted by hand: window x inputs x outputs + biases."""
    conv = lambda window, inputs, outputs: window**2 * inputs * outputs + outputs
    block = conv(3, 128, 32) + conv(1, 32, 128)
    encoder = conv(4, 3, 64) + conv(4, 64, 128) + conv(3, 128, 128) + 2 * block + conv(1, 128, 64)
    decoder = conv(3, 64, 128) + 2 * block + conv(4, 128, 64) + conv(4, 64, 3)
    assert count("notebook") == encoder + decoder + 512 * 64
    block = conv(3, 256, 256) + conv(1, 256, 256)
    encoder = conv(4, 3, 256) + conv(4, 256, 256) + 2 * block + conv(1, 256, 640)
    decoder = conv(1, 640, 256) + 2 * block + conv(4, 256, 256) + conv(4, 256, 768)
    assert count("paper") == encoder + decoder + 10 * 512 * 64
    assert count("paper", shared=True) == encoder + decoder + 512 * 64


def test_flops_against_a_count_by_hand():
    """DeepMind's example: its convolutions and distances, forward and twice that backward."""
    config = train.configure({"preset": "notebook"})

    def conv(side, window, inputs, outputs):
        return 2 * side**2 * window**2 * inputs * outputs

    block = conv(8, 3, 128, 32) + conv(8, 1, 32, 128)
    encoder = conv(16, 4, 3, 64) + conv(8, 4, 64, 128) + conv(8, 3, 128, 128) + conv(8, 1, 128, 64)
    decoder = conv(8, 3, 64, 128) + conv(8, 4, 128, 64) + conv(16, 4, 64, 3)
    count = 3 * (encoder + decoder + 4 * block) + 2 * 64 * 512 * 64
    net = train.build(config)
    state = jax.eval_shape(lambda: train.init_state(config, net, None))
    images = jax.ShapeDtypeStruct((100, 32, 32, 3), np.uint8)
    steps = train.make_train_steps(train.make_train_step(config, net, 1.0))
    lowered = steps.lower(state, images, jax.ShapeDtypeStruct((1, 32), np.int32))
    assert lowered.cost_analysis()["flops"] == pytest.approx(32 * count, rel=0.1)


def test_no_shared_blocks_and_every_parameter_learns():
    """Guards 4 and 9: two blocks are two sets of weights; each parameter gets a gradient."""
    for preset in ("paper", "notebook", "fast"):
        config, net = tiny(preset)
        images = pictures()
        params = train.init_state(config, net, images).params
        first, second = (
            params["decoder"][f"Residual_{i}"]["Conv_0"]["kernel"] for i in range(2)
        )
        assert not np.array_equal(first, second)
        params = jax.tree.map(lambda p: jnp.where(p.any(), p, 0.01), params)  # zero at the start

        def loss(params, net=net, images=images):
            outputs, _, q = net.apply({"params": params}, images)
            return (outputs**2).mean() + q.codebook_loss + q.commitment_loss

        for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
            fixed = path[-1].key in ("overlap", "mean", "basis", "weight")  # fitted once
            assert (np.abs(grad).max() == 0) == fixed, path


def test_encode_and_decode_agree_with_the_forward_pass():
    config, net = tiny()
    images = pictures()
    variables = {"params": train.init_state(config, net, images).params}
    outputs, z_e, q = net.apply(variables, images)
    assert z_e.shape == (8, 8, 8, 2, 4) and outputs.shape == (8, 32, 32, 6)
    codes = net.apply(variables, images, method="to_codes")
    np.testing.assert_array_equal(codes, q.codes)
    again = net.apply(variables, codes, method="from_codes")
    np.testing.assert_allclose(again, outputs, atol=1e-5)


def test_quantiser_stays_float32():
    """Guard 14: with bfloat16 activations, latents, codebook and losses are float32."""
    config, net = tiny(dtype="bfloat16")
    params = train.init_state(config, net, pictures()).params
    outputs, z_e, q = net.apply({"params": params}, pictures())
    assert outputs.dtype == jnp.bfloat16
    assert {z_e.dtype, q.z_q.dtype, q.codebook_loss.dtype, q.commitment_loss.dtype} == {
        jnp.dtype("float32")
    }
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


# Likelihoods


def every_value(name, channel):
    """-log p of each value of one colour, the others fixed: outputs at a pixel, nll [256]."""
    rng = np.random.default_rng(channel)
    outputs = rng.normal(size=(1, 1, 1, model.LIKELIHOODS[name][0])).astype(np.float32) * 0.4
    images = np.full((256, 1, 1, 3), 100, np.uint8)
    images[..., channel] = np.arange(256)[:, None, None]
    nll, _ = model.LIKELIHOODS[name][1](np.repeat(outputs, 256, 0), images, 1.0)
    return np.float64(outputs[0, 0, 0]), np.float64(nll)[:, 0, 0, channel]


@pytest.mark.parametrize("channel", range(3))
@pytest.mark.parametrize("name", [n for n, row in model.LIKELIHOODS.items() if row[2]])
def test_likelihood_sums_to_one(name, channel):
    """Over the 256 values of each colour, given the colours before it."""
    np.testing.assert_allclose(np.exp(-every_value(name, channel)[1]).sum(), 1.0, rtol=1e-5)


def test_later_colours_do_not_move_earlier_ones():
    """`colours` is p(r) p(g | r) p(b | r, g), or it would not be a probability."""
    outputs = np.random.default_rng(0).normal(size=(1, 1, 1, 9)).astype(np.float32)

    def at(*rgb):
        return model.colours(outputs, np.uint8(rgb).reshape(1, 1, 1, 3), 1.0)[0][0, 0, 0]

    assert at(9, 9, 9)[0] == at(9, 200, 77)[0] and at(9, 9, 9)[1] == at(9, 9, 77)[1]
    assert at(9, 9, 9)[1] != at(8, 9, 9)[1] and at(9, 9, 9)[2] != at(9, 8, 9)[2]


@pytest.mark.parametrize("channel", range(3))
def test_categorical_against_float64(channel):
    outputs, nll = every_value("categorical", channel)
    logits = outputs.reshape(3, 256)[channel]
    np.testing.assert_allclose(nll, np.log(np.exp(logits).sum()) - logits, rtol=1e-5)


@pytest.mark.parametrize("name", ["logistic", "colours"])
@pytest.mark.parametrize("channel", range(3))
def test_logistics_against_float64(name, channel):
    """At 0, at 255 and between; under `colours` the errors of the fixed colours move the mean."""
    outputs, nll = every_value(name, channel)
    means = 127.5 + 16 * outputs[:3]
    mean, scale = means[channel], 16 * np.exp(outputs[3 + channel])
    if name == "colours":
        slopes = {0: [], 1: outputs[6:7], 2: outputs[7:9]}[channel]
        mean += sum(slope * (100 - means[c]) for c, slope in enumerate(slopes))
    below = lambda x: 1 / (1 + np.exp(-(x - mean) / scale))
    above = lambda x: 1 / (1 + np.exp((x - mean) / scale))
    for x in range(256):  # from the tail that does not cancel
        if x < mean:
            p = (1 if x == 255 else below(x + 0.5)) - (0 if x == 0 else below(x - 0.5))
        else:
            p = (1 if x == 0 else above(x - 0.5)) - (0 if x == 255 else above(x + 0.5))
        np.testing.assert_allclose(nll[x], -np.log(p), rtol=2e-4)


@pytest.mark.parametrize("name", list(model.LIKELIHOODS))
def test_likelihood_of_extreme_outputs_is_finite(name):
    outputs = np.full((1, 32, 32, model.LIKELIHOODS[name][0]), 30.0, np.float32)
    for sign in (1, -1):
        f = lambda o: model.LIKELIHOODS[name][1](o, pictures(1), 0.06)[0].sum()
        value, grad = jax.value_and_grad(f)(sign * outputs)
        assert np.isfinite(value) and np.isfinite(grad).all()


def test_uniform_logits_are_8_bits():
    images = pictures()
    nll, _ = model.categorical(jnp.zeros((8, 32, 32, 768)), images, 1.0)
    assert float(nll.mean()) / math.log(2) == pytest.approx(8, abs=1e-6)


def test_normalised_mse_of_the_mean_is_one():
    """Guard 10: pixels and variance are on one scale."""
    dataset = data.Dataset(pictures(), pictures(), "noise", "test")
    pixels = dataset.train / 255.0
    assert dataset.variance() == pytest.approx(pixels.var(), rel=1e-6)
    outputs = jnp.full((8, 32, 32, 3), pixels.mean() - 0.5)
    nmse, _ = model.gaussian(outputs, dataset.train, dataset.variance())
    assert float(nmse.mean()) == pytest.approx(1, rel=1e-5)


# The data-dependent start


def test_waterfill():
    """Shares are those of the definition, sum to the bits, and weak dimensions get none."""
    power = np.array([100.0, 25.0, 4.0, 0.01])
    share = model.waterfill(power, 6.0)
    assert share.sum() == pytest.approx(6, abs=1e-6) and share[3] == 0
    np.testing.assert_allclose(np.diff(share[:3]), 0.5 * np.log2([25 / 100, 4 / 25]), atol=1e-6)


@pytest.mark.parametrize("S", [1, 5])
def test_the_trellis_search_finds_the_best_sequence(S):
    """Against every sequence of codes, each with the books that the definition gives it."""
    N, K = 5, 4
    z_e, codebook = field(B=2, h=1, w=2, N=N, D=2, K=2 * K, S=S)
    rows = np.asarray(quantize.trellis_lookup(z_e, codebook))
    z_e, e = np.float64(z_e), np.broadcast_to(np.float64(codebook), (N, 2 * K, 2))
    for where in np.ndindex(z_e.shape[:3]):
        first = ((z_e[where][0] - e[0, :K]) ** 2).sum(-1).argmin()
        found = {}
        for later in np.ndindex((K,) * (N - 1)):
            codes, book = (first, *later), [0] * N
            upper = [0] + [code >= K // 2 for code in later]
            for n in range(2, N):
                earlier = [book[n - i] if n - i > 0 else 0 for i in (2, 3)]
                book[n] = upper[n - 1] ^ earlier[0] ^ earlier[1]
            sequence = tuple(code + K * b for code, b in zip(codes, book, strict=True))
            found[sequence] = ((z_e[where] - e[np.arange(N), list(sequence)]) ** 2).sum()
        assert tuple(rows[where]) == min(found, key=found.get)
    np.testing.assert_array_equal(quantize.trellis_rows(rows % K, K), rows)


def test_the_trellis_beats_nearest_codes_at_the_same_rate():
    """Gaussian vectors, each quantiser with k-means of its own: 0.7 dB at length 4, K 512."""
    z_e = jax.random.normal(jax.random.key(0), (1000, 1, 1, 12, 3))
    error = {}
    for name, (search, copies, _) in quantize.QUANTIZERS.items():
        e = quantize.kmeans(jax.random.key(1), z_e, 12, copies * 32, search)
        assert e.shape == (12, copies * 32, 3)
        error[name] = quantize.quantize(z_e, e, search).commitment_loss
    assert error["trellis"] < 0.93 * error["nearest"]


def test_kmeans_finds_clusters():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1, 8, 2)) * 20
    z_e = centres[0][rng.integers(0, 8, (4, 8, 8, 1))] + 0.01 * rng.normal(size=(4, 8, 8, 1, 2))
    e = quantize.kmeans(jax.random.key(0), jnp.float32(z_e), 1, 8)
    found = np.sqrt(((np.asarray(e)[0][:, None] - centres[0]) ** 2).sum(-1)).min(0)
    assert (found < 0.1).sum() >= 6  # k-means may put two codes into one cluster


def test_blocks_and_back():
    x = np.arange(2 * 32 * 32 * 3.0).reshape(2, 32, 32, 3)
    blocks = model.to_blocks(x, 4)
    np.testing.assert_array_equal(blocks[1, 2, 3].reshape(4, 4, 3), x[1, 8:12, 12:16])
    np.testing.assert_array_equal(model.from_blocks(blocks, 4), x)


def fitted_transform(N, bits):
    """Encoder and decoder of a transform fitted to photos, their parameters, a codebook, images."""
    images = data.load("photo", "unused", val=False).train[::10]
    x = (images - np.float32(127.5)) / np.float32(model.GREY)
    overlap = model.fit_overlap(x)
    blocks = np.asarray(model.to_blocks(model.both_ways(x, overlap), model.BLOCK)).reshape(-1, 192)
    D, colour = 6, np.float32([[1.2, -0.6, -0.2], [-0.6, 1.5, -0.6], [-0.2, -0.6, 1.2]])
    params = model.fit_transform(blocks, bits, N - 1, D, colour)
    codebook = jax.random.normal(jax.random.key(0), (N, 32, D))
    codebook = codebook.at[0, :, model.BANDS :].set(0)
    sizes = (8, 4, 0, jnp.float32)
    nets = model.TransformEncoder(N * D, *sizes), model.TransformDecoder(6, *sizes)
    decoder = nets[1].init(jax.random.key(1), jnp.zeros((1, 4, 4, N * D)))["params"]
    encoder = {**params[0], "overlap": overlap}
    decoder = {**decoder, **params[1], "overlap": np.linalg.inv(overlap)}
    return nets, (encoder, decoder), codebook, blocks, images / 255 - 0.5


def test_the_transform_has_an_inverse():
    """Where every coefficient is kept and only the gains are rounded, the decoder undoes all."""
    nets, params, codebook, _, x = fitted_transform(N=50, bits=1600)
    z = nets[0].apply({"params": params[0]}, x[:20], codebook[:1])
    assert z.shape == (20, 4, 4, 300)
    gain, z = np.split(z, [6], -1)
    assert gain[..., :4].std((0, 1, 2)).min() > 0.1 and not gain[..., 4:].any()
    codes = quantize.lookup(gain[..., None, :], codebook[:1])
    rounded = quantize.embed(codes, codebook[:1])[..., 0, :]
    assert len(np.unique(codes)) > 3
    outputs = nets[1].apply({"params": params[1]}, np.concatenate([rounded, z], -1))
    np.testing.assert_allclose(outputs[..., :3], x[:20] * 255 / model.GREY, atol=0.02)


def test_the_transform_against_numpy():
    """Band by band: coefficients over the rounded strength of the band in this block."""
    nets, params, codebook, blocks, x = fitted_transform(N=40, bits=360)
    latents = nets[0].apply({"params": params[0]}, x[:1], codebook[:1])[0, 1, 2]
    mean, basis, weight = (np.float64(params[0][name]) for name in ("mean", "basis", "weight"))
    z = (blocks[6] - mean) @ basis  # block 6 is in row 1, column 2
    gain = 0.5 * np.log(z**2 @ weight + model.FLOOR)
    np.testing.assert_allclose(latents[:4], gain, rtol=1e-3, atol=1e-3)
    code = np.square(np.asarray(codebook)[0, :, :4] - gain).sum(-1).argmin()
    for band in range(model.BANDS):
        members = np.flatnonzero(weight[:, band])
        assert len(members)
        divided = z[members] / math.exp(codebook[0, code, band])
        np.testing.assert_allclose(latents[6:][members], divided, rtol=1e-3, atol=1e-3)


def test_the_overlap_makes_blocks_cheaper():
    """Of smooth lines: log det of the blocks and the inverse's spread, against no overlap."""
    place = np.arange(32)
    covariance = 0.95 ** np.abs(place[:, None] - place)
    root = np.linalg.cholesky(covariance)
    noise = np.random.default_rng(0).normal(size=(4000, 32, 32))
    images = np.einsum("ij,njk,lk->nil", root, noise, root)[..., None] * np.ones(3)
    F = np.float64(model.fit_overlap(images))
    outside = np.ones((32, 32), bool)
    for i in range(0, 32, model.BLOCK):
        outside[i : i + model.BLOCK, i : i + model.BLOCK] = False  # what no overlap would leave
    assert np.abs(F[outside]).max() > 0.1
    assert not F[:4, 4:].any() and (F[:4, :4] == np.eye(4)).all()  # the image's edge is no border

    def cost(F):
        blocks = F @ covariance @ F.T
        places = [slice(i, i + model.BLOCK) for i in range(0, 32, model.BLOCK)]
        bits = sum(np.linalg.slogdet(blocks[p, p])[1] for p in places) / 32
        return bits + np.log((np.linalg.inv(F) ** 2).sum() / 32)

    assert cost(F) < cost(np.eye(32)) - 0.1  # 0.127 at best, by gradient descent in float64


def test_colours_are_scaled_until_their_errors_are_alike():
    """Smooth chroma under a noisy luma gets a larger scale; white noise is left alone."""
    rng = np.random.default_rng(0)
    white = rng.normal(size=(2000, 192))
    np.testing.assert_allclose(model.colour_scale(white, 200), np.eye(3), atol=0.1)
    luma = rng.normal(size=(2000, 64, 1)) * np.ones(3)
    chroma = rng.normal(size=(2000, 1, 3))  # the same in all pixels of a block
    blocks = (luma + chroma).reshape(2000, 192) + 0.01 * white
    scale = model.colour_scale(blocks, 200)
    towards = [np.linalg.norm(np.array(axis) @ scale) for axis in ([1, 1, 1], [1, -1, 0])]
    assert towards[1] / 2**0.5 > 3 * towards[0] / 3**0.5


@slow
@pytest.mark.parametrize("likelihood", ["logistic", "colours"])
def test_the_start_is_a_quantiser_of_blocks(likelihood):
    """Step 0 is far below a stock start of as many latents."""
    dataset = data.load("photo", "unused", val=False)
    images, bits = dataset.train[::20], {}
    held = data.Dataset(images, dataset.test[:100], "photo", "test")
    for net_name, init in (("transform", "pca"), ("paper", "random")):
        config, net = tiny("fast", init=init, net=net_name, likelihood=likelihood, slots=4, K=32)
        state = train.init_state(config, net, images)
        bits[init] = train.evaluate(config, net, state.params, held)[0]["bits_per_dim"]
    assert bits["pca"] < bits["random"] - 1


# One step, and measuring


@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_the_codebook_trains(codebook):
    """Guards 2, 3, 6: it moves, and under EMA to where codes of the old codebook say."""
    config, net = tiny("notebook", codebook=codebook, slots=1)
    images = pictures()
    state = train.init_state(config, net, images)
    after, _ = jax.jit(train.make_train_step(config, net, 0.06))(state, images)
    assert not np.allclose(after.params["codebook"], state.params["codebook"])
    if codebook == "ema":
        z_e = net.apply({"params": state.params}, images, method="encode")
        codes = quantize.lookup(z_e, state.params["codebook"])
        _, e = quantize.ema_update(state.ema, state.params["codebook"], z_e, codes, config.gamma)
        np.testing.assert_allclose(after.params["codebook"], e, atol=1e-5)


def test_learning_rate_rises_and_falls():
    """Adam's first step of a lone parameter is the learning rate; constant without flags."""

    def rates(**changes):
        optimizer = train.make_optimizer(train.configure({"preset": "paper", "lr": 1.0, **changes}))
        state, seen = optimizer.init(jnp.float32(0)), []
        for _ in range(10):
            update, state = optimizer.update(jnp.float32(1), state)
            seen.append(-float(update))
        return seen

    np.testing.assert_allclose(rates(), 1.0, rtol=1e-4)
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    np.testing.assert_allclose(rates(steps=10, warmup=4, decay=0.5), expected, rtol=1e-4)


def test_beta_reaches_only_the_encoder():
    """Guard 1, in the whole loss: the codebook's gradient step does not depend on beta."""
    after = []
    for beta in (0.1, 2.0):
        config, net = tiny(beta=beta)
        state = train.init_state(config, net, pictures())
        after.append(jax.jit(train.make_train_step(config, net, 0.06))(state, pictures())[0].params)
    np.testing.assert_array_equal(after[0]["codebook"], after[1]["codebook"])
    decoders = [params["decoder"]["Up_1"]["kernel"] for params in after]
    encoders = [params["encoder"]["Down_0"]["kernel"] for params in after]
    np.testing.assert_array_equal(*decoders)
    assert not np.array_equal(*encoders)


@slow
def test_many_steps_in_one_launch_are_the_same_steps(monkeypatch):
    """The scan of a GPU and the unrolled steps of a CPU against one step at a time."""
    config, net = tiny(flip=True)
    images, index = pictures(20), data.order(0, 20, 8, 0, 3)
    step = train.make_train_step(config, net, 0.06)
    expected = train.init_state(config, net, images[:8])
    losses = []
    for i in index:
        expected, metrics = jax.jit(step)(expected, images[i])
        losses.append(metrics["loss"])
    for backend in ("cpu", "gpu"):
        state = train.init_state(config, net, images[:8])
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda backend=backend: backend)
            state, metrics = train.make_train_steps(step)(
                state, jnp.array(images), jnp.array(index)
            )
        np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-4)
        for mine, theirs in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_train_and_test_metrics_are_one_metric():
    """Guard 11: the same images and parameters give the same figure in training and in a test."""
    for likelihood, name in (("gaussian", "nmse"), ("logistic", "bits_per_dim")):
        config, net = tiny(likelihood=likelihood)
        dataset = data.Dataset(pictures(), pictures(), "noise", "test")
        state = train.init_state(config, net, dataset.train)
        step = jax.jit(train.make_train_step(config, net, dataset.variance()))
        _, metrics = step(state, dataset.train)
        measured, _, _ = train.evaluate(config, net, state.params, dataset)
        assert measured[name] == pytest.approx(float(metrics[name]), rel=1e-5)


def test_evaluation_by_hand_over_every_image():
    """Guards 8 and 16: 137 images in batches of 100, nothing dropped, nothing changed."""
    config, net = tiny(likelihood="logistic")
    dataset = data.Dataset(pictures(30, 1), pictures(137), "noise", "test")
    params = train.init_state(config, net, dataset.train[:8]).params
    before = jax.tree.map(np.array, params)
    measured, counts, (shown, _) = train.evaluate(config, net, params, dataset)
    jax.tree.map(np.testing.assert_array_equal, before, params)

    outputs, _, q = net.apply({"params": params}, dataset.test)
    nll, mean = map(np.float64, model.logistic(outputs, dataset.test, 1.0))
    assert counts.sum() == 137 * 64 * 2
    bits = nll.sum() / math.log(2) / 137 + 128 * math.log2(16)
    assert measured["bits_per_dim"] == pytest.approx(bits / 3072, rel=1e-5)
    mse = ((mean - dataset.test) ** 2).mean() / 255**2
    assert measured["mse"] == pytest.approx(mse, rel=1e-5)
    assert measured["psnr"] == pytest.approx(10 * math.log10(1 / mse), rel=1e-5)
    assert measured["nmse"] == pytest.approx(mse / (dataset.train / 255).var(), rel=1e-5)
    np.testing.assert_allclose(shown, mean[: train.SHOWN], atol=1e-3)

    code_bits = 0.0  # the unigram prior: frequencies of the training codes, one added to each
    trained = np.asarray(net.apply({"params": params}, dataset.train, method="to_codes"))
    entropies = []
    for n in range(2):
        frequency = np.bincount(trained[..., n].ravel(), minlength=16) + 1.0
        frequency /= frequency.sum()
        code_bits -= np.log2(frequency[np.asarray(q.codes)[..., n]]).sum()
        p = np.bincount(np.asarray(q.codes)[..., n].ravel(), minlength=16) / (137 * 64)
        entropies.append(-(p[p > 0] * np.log(p[p > 0])).sum())
    unigram = (nll.sum() / math.log(2) + code_bits) / 137 / 3072
    assert measured["bits_per_dim_unigram"] == pytest.approx(unigram, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(np.mean(entropies)), rel=1e-4)
    assert measured["codes_used"] == sum(len(np.unique(q.codes[..., n])) for n in range(2))


def test_bits_per_dim_of_a_model_that_knows_nothing():
    """Zero logits cost 8 bits/dim, and the codes 64 N log2 K / 3072 more."""
    config, net = tiny(likelihood="categorical")
    dataset = data.Dataset(pictures(), pictures(), "noise", "test")
    params = jax.tree.map(jnp.zeros_like, train.init_state(config, net, dataset.train).params)
    measured, _, _ = train.evaluate(config, net, params, dataset)
    assert measured["bits_per_dim"] == pytest.approx(8 + 128 * 4 / 3072, abs=1e-5)
    assert train.code_bits(train.Config()) == 1.875


# Data


def test_order_of_the_images():
    """Guard 15: each epoch is a new permutation, nothing is dropped, any step can be asked for."""
    stream = data.order(seed=3, n=50, batch=16, step=0, count=10).reshape(-1)
    epochs = [stream[i : i + 50] for i in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    np.testing.assert_array_equal(data.order(3, 50, 16, 7, 2).reshape(-1), stream[112:144])
    assert not np.array_equal(stream[:50], data.order(4, 50, 50, 0, 1)[0])


def test_photo_regions_do_not_overlap():
    dataset = data.load("photo", "unused", val=False)
    assert dataset.train.shape[1:] == (32, 32, 3) and dataset.train.dtype == np.uint8
    assert "not CIFAR-10" in dataset.name and len(dataset.test) % train.EVAL_BATCH
    train_set = {image.tobytes() for image in dataset.train}
    assert not any(image.tobytes() in train_set for image in dataset.test)


def test_held_out_images(monkeypatch):
    both = np.arange(50000), np.arange(10000)
    monkeypatch.setitem(data.DATASETS, "cifar10", ("CIFAR-10", lambda folder: both))
    held = data.load("cifar10", "unused", val=True)
    assert held.split == "val" and list(held.test) == list(range(45000, 50000))
    assert len(held.train) == 45000
    assert data.load("cifar10", "unused", val=False).split == "test"


# The program


def start(tmp_path, *flags, out="run"):
    """Exit code of the real command line on the photograph, in this process."""
    common = ["--dataset=photo", "--preset=paper", *TINY_FLAGS, f"--out={tmp_path / out}"]
    return train.main([*common, "--steps=6", "--log_every=3", *flags])


def read_log(run):
    """log.jsonl without its times."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    clocks = ("seconds", "ms_per_step", "mfu")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def read_result(run):
    """result.json without its times and the command."""
    row = json.loads((run / "result.json").read_text())
    timed = ("train_seconds", "compile_seconds", "ms_per_step", "images_per_second", "command",
             "peak_memory_mib")  # fmt: skip
    return {k: v for k, v in row.items() if k not in timed}


def read_params(run):
    """Parameters of a run's newest checkpoint."""
    return jax.tree.leaves(train.load(run)[2])


def equal(one, other):
    """Two runs ended alike, bit for bit."""
    assert read_result(one) == read_result(other)
    assert read_log(one) == read_log(other)
    for mine, theirs in zip(read_params(one), read_params(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps that was left alone; read only."""
    folder = tmp_path_factory.mktemp("finished")
    assert start(folder) == 0
    return folder / "run"


def test_a_run_writes_all_it_promises(finished):
    row = json.loads((finished / "result.json").read_text())
    promised = """command preset dataset split likelihood steps batch seed train_seconds
        compile_seconds ms_per_step images_per_second bits_per_dim bits_per_dim_unigram mse nmse
        psnr perplexity codes_used device versions date"""
    assert set(promised.split()) <= set(row)
    assert row["dataset"] == "photo (not CIFAR-10)" and row["steps"] == 6 and row["seed"] == 0
    assert all(
        math.isfinite(row[name]) for name in ("bits_per_dim", "bits_per_dim_unigram", "psnr")
    )
    assert row["train_seconds"] >= 0 and row["compile_seconds"] > 0
    assert [line["step"] for line in read_log(finished)] == [3, 6]
    for name in ("reconstructions", "curves", "codes"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert train.Config(**json.loads((finished / "config.json").read_text())).K == 16
    assert not list(finished.glob("*.part"))


@slow
def test_a_gaussian_has_no_bits(tmp_path, capsys):
    assert start(tmp_path, "--likelihood=gaussian", "--codebook=ema", "--restart=0.1",
                 "--init=data", "--shared", "--flip", "--val") == 0  # fmt: skip
    row = read_result(tmp_path / "run")
    assert (
        row["split"] == "val"
        and row["bits_per_dim"] is None
        and row["bits_per_dim_unigram"] is None
        and row["nmse"] > 0
    )
    assert "This is not CIFAR-10" in capsys.readouterr().out


def test_same_seed_same_numbers(finished, tmp_path):
    assert start(tmp_path) == 0
    equal(finished, tmp_path / "run")
    assert start(tmp_path, "--seed=1", out="other") == 0
    assert read_log(finished)[0]["loss"] != read_log(tmp_path / "other")[0]["loss"]


def test_eval_gives_the_same_metrics(finished, capsys):
    before = (finished / "result.json").read_bytes()
    (finished / "codes.png").unlink()
    assert train.main(["--eval", str(finished)]) == 0
    again = json.loads((finished / "eval.json").read_text())
    assert again == {name: read_result(finished)[name] for name in again}
    assert (finished / "codes.png").exists() and (finished / "result.json").read_bytes() == before


def test_a_loaded_run_codes_and_decodes(finished):
    _, net, params = train.load(finished)
    codes = net.apply({"params": params}, pictures(3), method="to_codes")
    outputs = net.apply({"params": params}, codes, method="from_codes")
    assert codes.shape == (3, 8, 8, 2) and outputs.shape == (3, 32, 32, 6)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_resumed(finished, tmp_path, monkeypatch, capsys, number, code):
    """A signal at step 4, between two log lines, saves; the resumed run ends as if left alone."""
    with monkeypatch.context() as patch:

        @contextlib.contextmanager
        def stop(config, step):
            yield lambda step, line: os.kill(os.getpid(), number) if step == 4 else None

        patch.setattr(train, "display", stop)
        assert start(tmp_path) == code
    run = tmp_path / "run"
    assert f"--resume {run}" in capsys.readouterr().err and not (run / "result.json").exists()
    assert train.main(["--resume", str(run), "--lr=1"]) == 2
    assert train.main(["--resume", str(run)]) == 0
    equal(finished, run)
    assert train.main(["--resume", str(run)]) == 2
    assert f"--eval {run}" in capsys.readouterr().err


def test_damaged_checkpoint(finished, tmp_path, capsys):
    """It is named, the one before is offered and works, nothing is deleted."""
    assert start(tmp_path, "--checkpoint_minutes=1e-9") == 0
    run = tmp_path / "run"
    newest, older = train.checkpoints(run)
    (run / "result.json").unlink()
    whole = newest.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole[:500] + b"x" + whole[501:]):
        newest.write_bytes(damage)
        assert train.main(["--resume", str(run)]) == 1
        message = capsys.readouterr().err
        assert str(newest) in message and f"--resume {older}" in message
        assert newest.read_bytes() == damage
    assert train.main(["--resume", str(older)]) == 0
    equal(finished, run)


def test_checkpoint_of_another_run(finished, tmp_path, capsys):
    """One that was made with other settings is named, not read."""
    assert start(tmp_path, "--steps=7") == 0
    run = tmp_path / "run"
    (run / "result.json").unlink()
    strange = run / "checkpoint-000000009.msgpack"
    strange.write_bytes(train.checkpoints(finished)[0].read_bytes())
    assert train.main(["--resume", str(run)]) == 1
    message = capsys.readouterr().err
    assert str(strange) in message and "belongs to another run" in message and "--resume" in message
    assert strange.exists()


def test_log_cut_short(finished, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 3}\n{"step": 6}\n{"step": 9, "lo')
    assert train.read_log(tmp_path) == [{"step": 3}, {"step": 6}]
    assert train.open_log(tmp_path, 3) == [{"step": 3}]
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 3}\n'


def test_out_of_memory(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(train, "make_train_steps", full)
    assert start(tmp_path) == 1
    assert "--batch 8 is too much memory: try 4" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(tmp_path, capsys):
    assert (
        start(tmp_path, "--lr=1000", "--steps=60", "--log_every=20", "--likelihood=gaussian") == 1
    )
    message = capsys.readouterr().err
    assert "step " in message and "loss" in message and "1000" in message and "--lr" in message


def test_full_disk(finished, tmp_path, monkeypatch, capsys):
    """Pictures, log and checkpoints that cannot be written do not end the run."""
    atomic = train.atomic

    def full(path):
        if path.suffix in (".png", ".msgpack"):
            raise OSError(28, "No space left on device", str(path))
        return atomic(path)

    monkeypatch.setattr(train, "atomic", full)
    assert start(tmp_path) == 0
    message = capsys.readouterr().err
    assert "the pictures (No space left on device)" in message and "the checkpoint (" in message
    assert read_result(tmp_path / "run") == read_result(finished)


def test_two_runs_never_share_a_folder(finished, tmp_path, capsys):
    assert start(finished.parent) == 2
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    with train.claim(tmp_path / "run", fresh=False):
        (tmp_path / "run" / "config.json").write_bytes((finished / "config.json").read_bytes())
        assert train.main(["--resume", str(tmp_path / "run")]) == 2
    assert "another run" in capsys.readouterr().err


WRONG = """
--no_such_flag 1|unrecognized
--K|expected one argument
--K 1|at least 2
--K 0|at least 2
--K -5|at least 2
--K 1.5|invalid int
--K many|invalid int
--K nan|invalid int
--K 10000000000|at most
--K=|invalid int
--D 0|at least 1
--D 1e3|invalid int
--slots 0|at least 1
--slots 100000|at most
--hidden 1|at least 2
--hidden -128|at least 2
--residual 0|at least 1
--batch 0|at least 1
--batch -1|at least 1
--batch 100000|training images
--steps 0|at least 1
--steps -10|at least 1
--steps 1e5|invalid int
--lr 0|above 0
--lr=-1e-4|above 0
--lr nan|finite
--lr inf|finite
--lr 1e300|at most
--lr fast|invalid float
--lr=|invalid float
--beta -1|at least 0
--beta nan|finite
--codebook ema --gamma 1|below 1
--codebook ema --gamma=-0.1|at least 0
--gamma 0.9 --codebook gradient|--codebook ema
--restart 0.1 --codebook gradient|--codebook ema
--codebook ema --restart -1|at least 0
--codebook emma|invalid choice
--preset papre|invalid choice
--preset=|invalid choice
--dataset mnist|invalid choice
--likelihood normal|invalid choice
--init kmeans|invalid choice
--dtype float16|invalid choice
--net resnet|invalid choice
--blocks -1|at least 0
--preset paper --init pca|--net transform
--preset paper --net transform|--init pca
--preset fast --shared|a codebook for each slot
--preset fast --D 3|--D 4
--quantizer trellis --K 511|even
--distributed|needs --out
--distributed here --out elsewhere|HOST:PORT,COUNT,INDEX
--distributed here,2,x --out elsewhere|HOST:PORT,COUNT,INDEX
--preset notebook --quantizer trellis|--slots 2
--preset fast --likelihood categorical|--likelihood logistic
--preset fast --likelihood gaussian|--likelihood logistic
--seed -1|at least 0
--seed 99999999999|at most
--log_every 0|at least 1
--checkpoint_minutes 0|above 0
--data_dir=|names no folder
--stepz 5|unrecognized
--step 5|unrecognized
--flip yes|unrecognized
--resume=|one run folder
--resume nowhere|no run folder
--eval nowhere|no run folder
--resume a --eval b|one run folder
--eval a --lr 1|only --data_dir
--out /dev/null/run|cannot write
train|unrecognized
""".strip().splitlines()


@pytest.mark.parametrize("row", WRONG)
def test_wrong_command_lines(row, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line that says what is wrong, nothing written."""
    monkeypatch.chdir(tmp_path)
    flags, says = row.split("|")
    dataset = [] if "--eval" in flags else ["--dataset=photo"]
    assert train.main([*dataset, *flags.split(" ")]) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1 and message.startswith("train.py: ")
    assert not list(tmp_path.rglob("*.png"))


def test_the_real_process(tmp_path):
    """A shell sees the same: one line and code 2; --help names every flag."""
    program = [sys.executable, str(HERE / "train.py")]
    wrong = subprocess.run(
        [*program, "--K", "1"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "K" in wrong.stderr
    helped = subprocess.run(
        [*program, "--help"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert helped.returncode == 0
    assert all(f"--{f.name}" in helped.stdout for f in train.dataclasses.fields(train.Config))
    assert not list(tmp_path.iterdir())


def test_every_field_is_read():
    """A flag that nothing reads is a lie; one read in many places is hard to change."""
    source = (HERE / "train.py").read_text()
    for f in train.dataclasses.fields(train.Config):
        assert f"config.{f.name}" in source or f'"{f.name}"' in source, f.name
    for name, diff in train.PRESETS.items():
        assert train.configure({"preset": name}) and set(diff) <= set(vars(train.Config()))


# CIFAR-10 on disk and on the network


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """A folder as torchvision wants it, of the right shape with other pixels, and its md5 list."""
    folder = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    for i, name in enumerate(names):
        content = {"label_names": ["x"] * 10}
        if "meta" not in name:
            content = {"data": np.full((10000, 3072), i, np.uint8), "labels": [0] * 10000}
        (folder / name).write_bytes(pickle.dumps(content))
    return folder, [[n, hashlib.md5((folder / n).read_bytes()).hexdigest()] for n in names]


@pytest.fixture
def cifar(batches, tmp_path, monkeypatch):
    """A copy of those batches that torchvision takes for CIFAR-10; no server answers."""
    from torchvision.datasets import CIFAR10

    folder, md5s = batches
    monkeypatch.setattr(CIFAR10, "train_list", md5s[:5])
    monkeypatch.setattr(CIFAR10, "test_list", md5s[5:6])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5s[6][1]})
    serve(monkeypatch, "http://127.0.0.1:9/")
    for name, _ in md5s:
        (tmp_path / folder.name).mkdir(exist_ok=True)
        os.link(folder / name, tmp_path / folder.name / name)
    return tmp_path


def serve(monkeypatch, url):
    """Make `url` the only place to fetch the tarball from."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(data, "MIRRORS", ())
    monkeypatch.setattr(data, "TIMEOUT", 0.5)
    monkeypatch.setattr(CIFAR10, "url", url + CIFAR10.filename)


def refuse(folder, capsys):
    """The one line that the program prints about a data folder it cannot use; code 1, no cache."""
    with tempfile.TemporaryDirectory() as out:
        assert train.main([f"--data_dir={folder}", f"--out={out}"]) == 1
    message = capsys.readouterr().err.split("%\n")[-1]  # after torchvision's progress
    assert message.startswith("train.py: ") and message.count("\n") == 1
    assert not list(folder.glob(".cifar10.npz*")) and not list(folder.glob("tmp*"))
    return message


def test_batches_are_read_once_and_cached(cifar, monkeypatch):
    train_images, test_images = data.cifar10(cifar)
    assert train_images.shape == (50000, 32, 32, 3) and test_images.shape == (10000, 32, 32, 3)
    assert list(train_images[::10000, 0, 0, 0]) == [0, 1, 2, 3, 4] and (test_images == 5).all()
    monkeypatch.setattr(data, "read_batches", None)  # the second start does not go there
    for first, second in zip((train_images, test_images), data.cifar10(cifar), strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_cached_start_imports_no_torch(cifar):
    data.cifar10(cifar)
    code = f"import data, sys; data.load('cifar10', {str(cifar)!r}, False)"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, check=False
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("fault", ["truncated", "altered", "empty", "missing", "evil"])
def test_faulty_batches(cifar, capsys, fault):
    """The file is named and nothing is unpickled or deleted."""
    file = cifar / "cifar-10-batches-py" / "data_batch_3"
    whole = file.read_bytes()
    file.unlink()
    content = {
        "truncated": whole[:-1000],
        "altered": whole[:5000] + b"?" + whole[5001:],
        "empty": b"",
        "evil": pickle.dumps(Evil(cifar / "executed")),
    }
    if fault != "missing":
        file.write_bytes(content[fault])
    message = refuse(cifar, capsys)
    assert str(file) in message and ("missing" if fault == "missing" else "wrong md5") in message
    assert not (cifar / "executed").exists() and not (cifar / "cifar10.npz").exists()
    assert len(list(file.parent.iterdir())) == (6 if fault == "missing" else 7)


class Evil:
    """A pickle that writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("fault", ["garbage", "empty", "truncated", "shape", "pickle", "other"])
def test_faulty_cache(tmp_path, capsys, fault):
    cache = tmp_path / "cifar10.npz"
    small = np.zeros((3, 32, 32, 3), np.uint8)
    arrays = {"train": small, "test": small}
    if fault == "pickle":
        arrays["train"] = np.array([Evil(tmp_path / "executed")], object)
    np.savez(cache, **({"train": small} if fault == "other" else arrays))
    whole = cache.read_bytes()
    cache.write_bytes(
        {"garbage": b"PK nonsense", "empty": b"", "truncated": whole[:900]}.get(fault, whole)
    )
    before = cache.read_bytes()
    assert str(cache) in refuse(tmp_path, capsys)
    assert cache.read_bytes() == before and not (tmp_path / "executed").exists()


def test_tarball_with_a_wrong_md5(tmp_path, capsys):
    tarball = tmp_path / "cifar-10-python.tar.gz"
    tarball.write_bytes(b"not a tarball")
    assert f"{tarball} is damaged" in refuse(tmp_path, capsys)
    assert tarball.read_bytes() == b"not a tarball"


def test_tarball_is_unpacked(cifar, monkeypatch):
    """Half an archive never stands where a whole one is expected."""
    from torchvision.datasets import CIFAR10

    tarball = cifar / CIFAR10.filename
    with tarfile.open(tarball, "w:gz", compresslevel=1) as archive:
        archive.add(cifar / CIFAR10.base_folder, CIFAR10.base_folder)
    shutil.rmtree(cifar / CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(tarball.read_bytes()).hexdigest())
    assert data.cifar10(cifar)[0].shape == (50000, 32, 32, 3) and tarball.exists()


def test_data_folder_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "file").write_text("here")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "cannot use the data folder" in refuse(folder, capsys)


def test_no_network(tmp_path, monkeypatch, capsys):
    serve(monkeypatch, "http://127.0.0.1:9/")
    message = refuse(tmp_path / "new", capsys)
    assert "could not be downloaded" in message and "--dataset photo" in message


@pytest.mark.parametrize("answer", ["error page", "silence", "cut short"])
def test_bad_servers(tmp_path, monkeypatch, capsys, answer):
    """A server that sends a page, nothing, or half: one sentence, and no file is left behind."""

    def handle(connection):
        connection.recv(1000)
        if answer == "error page":
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\noops")
        if answer == "cut short":
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 4000000\r\n\r\n" + b"x" * 9000)
        if answer == "silence":
            time.sleep(3)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    handle(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        serve(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}/")
        assert "could not be downloaded" in refuse(tmp_path / "new", capsys)
    assert not list((tmp_path / "new").iterdir())




@slow
@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_eight_devices_do_what_one_does(tmp_path, preset):
    """The batch split over 8 virtual devices: the same losses up to rounding."""
    flags = ["--dataset=photo", f"--preset={preset}", *TINY_FLAGS, "--steps=4", "--log_every=1"]
    if preset == "fast":
        flags += ["--K=32", "--slots=4", "--flip"]
    logs = []
    for count in (1, 8):
        out = tmp_path / str(count)
        devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        done = subprocess.run(
            [sys.executable, str(HERE / "train.py"), *flags, f"--out={out}"],
            capture_output=True, text=True, env={**os.environ, **devices}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert read_result(out)["devices"] == count
        logs.append(read_log(out))
    for one, eight in zip(*logs, strict=True):
        for name in ("loss", "bits_per_dim", "commitment_loss", "grad_norm"):
            assert eight[name] == pytest.approx(one[name], rel=1e-3), (one["step"], name)


@slow
def test_two_processes_do_what_one_does(tmp_path):
    """--distributed: the batch split over two; both stop at a signal to one; both go on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    program = [sys.executable, str(HERE / "train.py")]
    flags = ["--dataset=photo", "--preset=notebook", *TINY_FLAGS, "--slots=1", "--log_every=5"]
    long = [*flags, "--steps=150", f"--out={tmp_path / 'both'}"]

    def both(*arguments):
        return [
            subprocess.Popen([*program, *arguments, f"--distributed={address},2,{i}"], stderr=-1)
            for i in range(2)
        ]

    subprocess.run([*program, *flags, "--steps=150", f"--out={tmp_path / 'one'}"], check=True)
    pair = both(*long)
    while not (tmp_path / "both-1" / "log.jsonl").exists() or not read_log(tmp_path / "both-1"):
        time.sleep(0.1)
    pair[1].terminate()
    errors = [process.communicate()[1].decode() for process in pair]
    assert [process.returncode for process in pair] == [143, 143], errors
    pair = both(f"--resume={tmp_path / 'both'}")
    errors = [process.communicate()[1].decode() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], errors
    one, first, second = (read_log(tmp_path / name) for name in ("one", "both", "both-1"))
    for lines in zip(one[:5], first, second, strict=False):
        for name in ("loss", "bits_per_dim", "grad_norm"):
            values = [line[name] for line in lines]
            assert values[1] == values[2] == pytest.approx(values[0], rel=1e-3), name
    assert len(first) == len(second) == 30
    assert read_result(tmp_path / "both")["devices"] == 2


@slow
def test_killed_ten_times(tmp_path):
    """SIGKILL at ten random moments, also amid a write: the end is that of a run left alone."""
    flags = ["--dataset=photo", "--preset=paper", *TINY_FLAGS, "--steps=400", "--log_every=50"]
    program = [sys.executable, str(HERE / "train.py")]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    subprocess.run([*program, *flags, f"--out={alone}"], check=True, capture_output=True)
    often = [*flags, "--checkpoint_minutes=1e-9"]  # at every step, so that kills fall into writes
    rng, kills = np.random.default_rng(0), 0
    while kills < 10:
        go_on = train.checkpoints(killed) if killed.exists() else []
        command = [f"--resume={killed}"] if go_on else [*often, f"--out={killed}"]
        if not go_on:
            shutil.rmtree(killed, ignore_errors=True)
        process = subprocess.Popen([*program, *command], stdout=-3, stderr=-3)
        before = train.checkpoints(killed)
        while process.poll() is None and train.checkpoints(killed) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.wait()
        kills += 1
        assert not (killed / "result.json").exists(), "too fast to be killed: give it more steps"
    subprocess.run([*program, f"--resume={killed}"], check=True, capture_output=True)
    equal(alone, killed)
