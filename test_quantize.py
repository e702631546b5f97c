"""Every test of the kit: the mathematics against slow NumPy, known bugs of others, the program.

    python -m pytest

No network, no GPU. "Guard" in a test's name or docstring: the bug was found in a public VQ-VAE.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import pty
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from pathlib import Path
from unittest import mock

import flax
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
PROGRAM = [sys.executable, str(HERE / "train.py")]
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 runs it: tens of seconds")
# Runs of one configuration share their compiled programs: half the time of the tests.
CACHE = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
# Compiling takes most of the time here. Some tests optimise as the program does. Without its fusion
# emitters jaxlib 0.10 takes a fifth less; another may not know that flag, and would abort.
if jax.__version__.startswith("0.10."):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_disable_most_optimizations", True)
UNIGRAM_IMAGES = train.UNIGRAM_IMAGES  # as the program has it
TINY = {"hidden": 8, "residual": 4, "slots": 2, "K": 16, "D": 4, "batch": 8, "blocks": 1,
        "likelihood": "logistic"}  # fmt: skip
TINY_FLAGS = [f"--{name}={value}" for name, value in TINY.items()]
ROOMY = {**TINY, "hidden": model.ROOM, "init": "pca"}  # the least that a patch quantiser asks for


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C does what it does in a terminal, also in tests that a shell runs on the side."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module", autouse=True)
def few_images_to_encode():
    """A run encodes them for its unigram prior; all crops of the photograph take a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "UNIGRAM_IMAGES", 300)
        yield


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
    if preset == "fast":
        changes = {"init": "random", **changes}
    config = train.configure({"preset": preset, **TINY, **changes})
    return config, train.build(config)


def pictures(n=8, seed=0):
    """Random uint8 images [n, 32, 32, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def apply(net, params, *inputs, **how):
    """net.apply in one program: run one by one, its operations would be compiled one by one."""
    return jax.jit(functools.partial(net.apply, **how))({"params": params}, *inputs)


def photos(n):
    """Crops of the photograph, spread over it: uint8 [n, 32, 32, 3]."""
    images = data.load("photo", "unused", val=False).train
    return images[:: len(images) // n][:n]


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
    """The CPU goes slot by slot, 512 vectors at a time, other backends take all at once."""
    z_e, codebook = field(B=B)
    assert B < 100 or z_e[..., 0, 0].size > 512 and z_e[..., 0, 0].size % 512
    here = quantize.lookup(z_e, codebook)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(quantize.lookup(z_e, codebook), here)


@pytest.fixture
def optimised():
    """Compile as the program does."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("options", [dict, train.compiler_options])
def test_codes_are_right_where_positions_are_as_many_as_codes(options, optimised):
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
    """Guard: the decoder's gradient reaches the encoder unchanged, and z_q is exactly e."""
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
    """Appendix A.1 in float64, with the codes of the codebook before the step (a guard)."""
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
    """Guard: they neither fly away nor fall to zero, even when their count underflows."""
    codebook = jnp.array([[[1.0, 2.0], [50.0, -60.0]]])
    z_e, ema, e = jnp.ones((1, 2, 2, 1, 2)), quantize.ema_init(codebook), codebook
    step = jax.jit(lambda ema, e: quantize.ema_update(ema, e, z_e, quantize.lookup(z_e, e), 0.9))
    for _ in range(1500):
        ema, e = step(ema, e)
    np.testing.assert_allclose(e[0, 1], codebook[0, 1], rtol=1e-4)
    np.testing.assert_allclose(e[0, 0], 1.0, rtol=1e-4)
    assert ema.count[0, 1] < 1e-30


def test_restart_moves_vector_sum_and_count():
    """Guard: a restarted code stays where it was put at the next step; live ones do not move."""
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
    """Guard: the limit is sqrt(3 / D), not sqrt(3 / K)."""
    e = np.asarray(quantize.init_codebook(jax.random.key(0), 2, 512, 64))
    assert e.shape == (2, 512, 64) and abs(e).max() <= math.sqrt(3 / 64)
    np.testing.assert_allclose((e**2).sum(-1).mean(), 1.0, rtol=0.02)


def test_kmeans_finds_clusters():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1, 8, 2)) * 20
    z_e = centres[0][rng.integers(0, 8, (4, 8, 8, 1))] + 0.01 * rng.normal(size=(4, 8, 8, 1, 2))
    e = quantize.kmeans(jax.random.key(0), jnp.float32(z_e), 1, 8)
    found = np.sqrt(((np.asarray(e)[0][:, None] - centres[0]) ** 2).sum(-1)).min(0)
    assert (found < 0.1).sum() >= 6  # k-means may put two codes into one cluster


def turn(z, e):
    """The matrix that turns the direction of z onto that of e, in the plane of both, in float64."""
    u = z / np.linalg.norm(z)
    v = e - (e @ u) * u
    v = v / np.linalg.norm(v)
    cos, sin = e @ u / np.linalg.norm(e), e @ v / np.linalg.norm(e)
    in_plane = (cos - 1) * (np.outer(u, u) + np.outer(v, v))
    return np.eye(len(z)) + in_plane + sin * (np.outer(v, u) - np.outer(u, v))


def test_rotation_against_its_matrix():
    """z_q is exactly e; the gradient is the transpose of |e| / |z| R, R turning z onto e."""
    rng = np.random.default_rng(0)
    for D in (2, 5, 64):
        z, e, upstream = rng.normal(size=(3, D)) * [[0.3], [2], [1]]
        matrix = np.linalg.norm(e) / np.linalg.norm(z) * turn(z, e)
        np.testing.assert_allclose(matrix @ z, e, rtol=1e-6)
        args = jnp.float32(z), jnp.float32(e)
        np.testing.assert_array_equal(quantize.rotation(*args), args[1])
        by_both = jax.grad(lambda z, e, u=upstream: u @ quantize.rotation(z, e), (0, 1))
        grads = jax.jit(by_both)(*args)
        scale = 1e-4 * np.abs(matrix.T @ upstream).max()
        np.testing.assert_allclose(grads[0], matrix.T @ upstream, atol=scale)
        np.testing.assert_array_equal(grads[1], 0)  # as with straight-through


@pytest.mark.parametrize("z, e", [(0, 1), (1, 0), (0, 0), (1, -1), (1, 1), (1e-20, 1), (1, 1e-20)])
def test_rotation_has_no_angle_and_stays_finite(z, e):
    z, e = jnp.full(3, z, jnp.float32), jnp.full(3, e, jnp.float32)
    grad = jax.grad(lambda z: quantize.rotation(z, e).sum())
    np.testing.assert_array_equal(quantize.rotation(z, e), e)
    assert np.isfinite(grad(z)).all() and np.isfinite(jax.jit(grad)(z)).all()


@pytest.mark.parametrize("L, D", [(2, 4), (3, 3), (5, 2), (16, 1)])
def test_fsq_is_the_nearest_point_of_a_grid(L, D):
    """L equally spaced points along each dimension, and rounding finds the nearest of them."""
    K = L**D
    grid = quantize.fsq_grid(None, 2, K, D)
    middles = (np.arange(L) + 0.5) / L * 2 - 1
    points = list(itertools.product(middles, repeat=D))
    np.testing.assert_allclose(grid, np.stack([points, points]), atol=1e-6)
    z_e = np.random.default_rng(0).uniform(-1.3, 1.3, (5, 4, 3, 2, D)).astype(np.float32)
    np.testing.assert_array_equal(quantize.fsq_search(z_e, grid), slow_lookup(z_e, grid))
    ends = jnp.float32([-1, 1, -np.inf, np.inf])[:, None, None, None, None] * jnp.ones(D)
    codes = quantize.fsq_search(ends, grid).ravel()
    np.testing.assert_array_equal(codes, [0, K - 1, 0, K - 1])


@pytest.mark.parametrize("K", [7, 8, 16, 81, 512, 1000, 4096, 65536])
def test_fsq_names_the_lengths_that_fit(K):
    fits = [D for D in range(1, 17) if any(L**D == K for L in range(2, K + 1))]
    for D in range(1, 17):
        wrong = quantize.fsq_refuses(K, D)
        assert wrong == "" if D in fits else wrong.endswith(f"--D {' or '.join(map(str, fits))}")
    with pytest.raises(train.Stop, match=f"--quantizer fsq .*--K {K} give --D {fits[0]}"):
        tiny(quantizer="fsq", K=K, D=100)


@slow
@pytest.mark.parametrize("preset", ["fast", "paper"])  # by EMA with restarts, and by gradient
def test_fsq_trains_all_but_its_codebook(preset):
    config, net = tiny(preset, quantizer="fsq", lr=1e-2, blocks=0)
    assert config.codebook == ("ema" if preset == "fast" else "gradient")
    images = pictures()
    state = train.init_state(config, net, images)
    grid = np.array(state.params["codebook"])
    step = jax.jit(train.make_train_step(config, net, 0.06))
    after, losses = state, []
    for _ in range(10):
        after, metrics = step(after, images)
        losses.append(float(metrics["loss"]))
    np.testing.assert_array_equal(after.params["codebook"], grid)
    assert losses[-1] < losses[0]
    for name in ("encoder", "decoder"):
        kernels = [s.params[name]["Conv_0"]["kernel"] for s in (state, after)]
        assert not np.allclose(*kernels)
    loud = jax.tree.map(lambda p: 50 * p, after.params)  # tanh bounds even these
    z_e = apply(net, loud, images, method="encode")
    assert 0.9 < np.abs(z_e).max() <= 1

    def loss(params):
        return (net.apply({"params": params}, images)[0] ** 2).mean()

    grads = jax.jit(jax.grad(loss))(state.params)
    assert np.abs(grads["encoder"]["Down_0"]["kernel"]).max() > 0
    assert not np.any(grads["codebook"])


@slow
def test_the_rotation_trick_trains(monkeypatch):
    """`--gradient rotation` is the function above, and the loss falls with it."""
    used = []

    def rotation(z_e, e):
        used.append(z_e.shape)
        return quantize.rotation(z_e, e)

    assert quantize.GRADIENTS["rotation"] is quantize.rotation
    monkeypatch.setitem(quantize.GRADIENTS, "rotation", rotation)
    changes = {"codebook": "ema", "init": "data", "lr": 3e-3, "blocks": 0}
    config, net = tiny("notebook", gradient="rotation", **changes)
    images, losses = photos(8), []
    state = train.init_state(config, net, images)
    step = jax.jit(train.make_train_step(config, net, 0.06))
    for _ in range(40):
        state, metrics = step(state, images)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0] and np.isfinite(losses).all()
    assert (8, 8, 8, 2, 4) in used


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


def shown_results():
    """The rows of results/*.jsonl that name a command of this program."""
    files = sorted((HERE / "results").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines() if line.strip()]
    rows = [row for row in map(json.loads, lines) if "train.py" in row.get("command", "")]
    return list({row["command"] + str(row.get("device")): row for row in rows}.values())


@pytest.mark.parametrize("row", shown_results(), ids=lambda row: row["command"])
def test_the_command_of_a_result_still_means_what_was_run(row, monkeypatch):
    """Presets and the lines that ablations edit have not changed under the numbers shown."""
    *edits, command = row["command"].split(" && ")
    for edit in edits:
        words = [word for word in shlex.split(edit) if word != "-i"]
        if words[0] == "sed":
            after = subprocess.run(words, capture_output=True, text=True, cwd=HERE, check=True)
            assert after.stdout != (HERE / words[-1]).read_text(), edit
    verb, _, flags = train.parse(shlex.split(command.split("train.py", 1)[1]))
    if verb == "train":
        backend = "cpu" if "core" in row.get("device", "cores") else "gpu"
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        config = train.configure(flags)
        for name in set(row) & set(train.NAMES) - {"dataset"}:
            assert row[name] == getattr(config, name), name
        if "split" in row:
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
    """Every layer of each preset, counted by hand: window x inputs x outputs + biases."""

    def conv(window, inputs, outputs):
        return window**2 * inputs * outputs + outputs

    block = conv(3, 128, 32) + conv(1, 32, 128)
    encoder = conv(4, 3, 64) + conv(4, 64, 128) + conv(3, 128, 128) + 2 * block + conv(1, 128, 64)
    decoder = conv(3, 64, 128) + 2 * block + conv(4, 128, 64) + conv(4, 64, 3)
    assert count("notebook") == encoder + decoder + 512 * 64
    encoder = conv(4, 3, 128) + conv(4, 128, 128) + 2 * block + conv(1, 128, 80)
    decoder = conv(1, 80, 128) + 2 * block + conv(4, 128, 128) + conv(4, 128, 6)
    assert count("fast") == encoder + decoder + 10 * 512 * 8
    block = conv(3, 256, 256) + conv(1, 256, 256)
    encoder = conv(4, 3, 256) + conv(4, 256, 256) + 2 * block + conv(1, 256, 640)
    decoder = conv(1, 640, 256) + 2 * block + conv(4, 256, 256) + conv(4, 256, 768)
    assert count("paper") == encoder + decoder + 10 * 512 * 64
    assert count("paper", shared=True) == encoder + decoder + 512 * 64


@pytest.mark.parametrize("preset", ["notebook", pytest.param("paper", marks=slow)])
def test_no_shared_blocks_and_every_parameter_learns(preset):
    """Guards 4 and 9: two blocks are two sets of weights; each parameter gets a gradient."""
    config, net = tiny(preset, blocks=2)
    images = pictures()
    params = train.init_state(config, net, images).params
    first, second = (params["decoder"][f"Residual_{i}"]["Conv_0"]["kernel"] for i in range(2))
    assert not np.array_equal(first, second)
    params = jax.tree.map(lambda p: jnp.where(p.any(), p, 0.01), params)  # zero at the start

    def loss(params):
        outputs, _, q = net.apply({"params": params}, images)
        return (outputs**2).mean() + q.codebook_loss + q.commitment_loss

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.abs(grad).max() > 0, path


def test_encode_and_decode_agree_with_the_forward_pass():
    for quantizer in quantize.QUANTIZERS:
        config, net = tiny(quantizer=quantizer, blocks=0)
        images = pictures()
        params = train.init_state(config, net, images).params
        outputs, z_e, q = apply(net, params, images)
        assert z_e.shape == (8, 8, 8, 2, 4) and outputs.shape == (8, 32, 32, 6)
        codes = apply(net, params, images, method="to_codes")
        np.testing.assert_array_equal(codes, q.codes)
        again = apply(net, params, codes, method="from_codes")
        np.testing.assert_allclose(again, outputs, atol=1e-5)


def test_quantiser_stays_float32():
    """Guard: with bfloat16 activations, latents, codebook, outputs and losses are float32."""
    config, net = tiny(dtype="bfloat16")
    params = train.init_state(config, net, pictures()).params
    outputs, z_e, q = apply(net, params, pictures())
    assert {
        outputs.dtype,
        z_e.dtype,
        q.z_q.dtype,
        q.codebook_loss.dtype,
        q.commitment_loss.dtype,
    } == {jnp.dtype("float32")}
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


# Likelihoods


def every_value(name, channel):
    """-log p of each value of one colour, the others fixed: outputs at a pixel, nll [256]."""
    rng = np.random.default_rng(channel)
    outputs = rng.normal(size=(1, 1, 1, model.LIKELIHOODS[name].outputs)).astype(np.float32) * 0.4
    images = np.full((256, 1, 1, 3), 100, np.uint8)
    images[..., channel] = np.arange(256)[:, None, None]
    nll, _ = model.LIKELIHOODS[name].loss(np.repeat(outputs, 256, 0), images, 1.0)
    return np.float64(outputs[0, 0, 0]), np.float64(nll)[:, 0, 0, channel]


@pytest.mark.parametrize("channel", range(3))
@pytest.mark.parametrize("name", [n for n, row in model.LIKELIHOODS.items() if row.exact])
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

    def below(x):
        return 1 / (1 + np.exp(-(x - mean) / scale))

    def above(x):
        return 1 / (1 + np.exp((x - mean) / scale))

    for x in range(256):  # from the tail that does not cancel
        if x < mean:
            p = (1 if x == 255 else below(x + 0.5)) - (0 if x == 0 else below(x - 0.5))
        else:
            p = (1 if x == 0 else above(x - 0.5)) - (0 if x == 255 else above(x + 0.5))
        np.testing.assert_allclose(nll[x], -np.log(p), rtol=2e-4)


@pytest.mark.parametrize("name", list(model.LIKELIHOODS))
def test_likelihood_of_extreme_outputs_is_finite(name):
    outputs = np.full((1, 32, 32, model.LIKELIHOODS[name].outputs), 30.0, np.float32)

    def total(outputs):
        return model.LIKELIHOODS[name].loss(outputs, pictures(1), 0.06)[0].sum()

    for sign in (1, -1):
        value, grad = jax.value_and_grad(total)(sign * outputs)
        assert np.isfinite(value) and np.isfinite(grad).all()


def test_uniform_logits_are_8_bits():
    images = pictures()
    nll, _ = model.categorical(jnp.zeros((8, 32, 32, 768)), images, 1.0)
    assert float(nll.mean()) / math.log(2) == pytest.approx(8, abs=1e-6)


def test_normalised_mse_of_the_mean_is_one():
    """Guard: pixels and variance are on one scale."""
    dataset = data.Dataset(pictures(), pictures(), "noise", "test")
    pixels = dataset.train / 255.0
    assert dataset.variance() == pytest.approx(pixels.var(), rel=1e-6)
    outputs = jnp.full((8, 32, 32, 3), pixels.mean() - 0.5)
    nmse, _ = model.gaussian(outputs, dataset.train, dataset.variance())
    assert float(nmse.mean()) == pytest.approx(1, rel=1e-5)


# The start as a quantiser of patches


def test_waterfill():
    """Shares are those of the definition, sum to the bits, and weak dimensions get none."""
    power = np.array([100.0, 25.0, 4.0, 0.01])
    share = model.waterfill(power, 6.0)
    assert share.sum() == pytest.approx(6, abs=1e-6) and share[3] == 0
    np.testing.assert_allclose(np.diff(share[:3]), 0.5 * np.log2([25 / 100, 4 / 25]), atol=1e-6)


def water_level(power, bits):
    """The error that reverse water-filling leaves in each direction that gets bits, and these.

    By its closed form: the k strongest share the bits, k as large as all of them can be above.
    """
    power = np.sort(power)[::-1]
    for k in range(len(power), 0, -1):
        level = np.exp(np.mean(np.log(power[:k])) - 2 * bits * np.log(2) / k)
        if power[k - 1] > level:
            return level, k
    raise AssertionError("no direction deserves a bit")


def test_waterfill_against_its_closed_form():
    rng = np.random.default_rng(0)
    for bits in (0.5, 8, 90, 600):
        power = np.exp(rng.normal(size=48) * 3)
        level, k = water_level(power, bits)
        share = model.waterfill(power, bits)
        assert (share > 0).sum() == k
        left = power * 4.0**-share
        np.testing.assert_allclose(left, np.minimum(power, level), rtol=1e-6)


def test_blocks_are_windows_of_the_image():
    x = np.arange(2 * 32 * 32 * 3.0).reshape(2, 32, 32, 3)
    for size in (2, 4):
        blocks = model.to_blocks(x, size)
        window = x[1, 2 * size : 3 * size, 3 * size : 4 * size]
        np.testing.assert_array_equal(blocks[1, 2, 3].reshape(size, size, 3), window)


def test_by_blocks_against_loops():
    """Row (4 y + x) 3 + c of a patch is colour c of pixel y % 2, x % 2 of block y // 2, x // 2."""
    rows = np.random.default_rng(0).normal(size=(48, 5))
    blocks = model.by_blocks(rows).reshape(2, 2, 4, 3, 5)
    for y, x, c in np.ndindex(4, 4, 3):
        mine = blocks[y // 2, x // 2, 2 * (y % 2) + x % 2, c]
        np.testing.assert_array_equal(mine, rows[(4 * y + x) * 3 + c])


@pytest.mark.parametrize("t", [2, 4])
def test_wire_against_loops(t):
    """Windows of t x t pixels in, or out, of the first channels; the others keep their weights."""
    rng = np.random.default_rng(0)
    x, block = rng.normal(size=(1, 8, 8, 5)), rng.normal(size=(t, t, 3, 2))
    for transposed in (False, True):
        layer = (model.Up if transposed else model.Down)(6, jnp.float32)
        stock = jax.tree.map(np.array, layer.init(jax.random.key(0), x)["params"])
        wired = jax.tree.map(np.array, stock)
        model.wire(wired, block, 7.0, transposed)
        np.testing.assert_array_equal(wired["kernel"][..., 2:], stock["kernel"][..., 2:])
        np.testing.assert_array_equal(wired["bias"][2:], stock["bias"][2:])
        y = np.asarray(layer.apply({"params": wired}, x))[0, ..., :2]
        expected, edge = np.full(y.shape, 7.0), (t - 2) // 2
        for i, j, a, b in np.ndindex(*(8, 8) if transposed else (4, 4), t, t):
            near, far = (i, j), (2 * i + a - edge, 2 * j + b - edge)
            into = far if transposed else near
            if min(far) >= 0 and max(far) < (16 if transposed else 8):
                pixel = x[0][near if transposed else far][:3]
                expected[into] += pixel @ block[a, b]
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("N, D, k", [(3, 4, 12), (3, 4, 7), (4, 1, 9), (1, 5, 3), (10, 8, 48)])
def test_deal_gives_each_direction_one_place(N, D, k):
    """The next direction goes to the slot with the fewest bits so far that has room."""
    share = np.sort(np.random.default_rng(0).exponential(size=k))[::-1]
    dealt = model.deal(share, N, D)
    assert dealt.shape == (min(k, N * D), N * D) and set(np.unique(dealt)) <= {0, 1}
    assert (dealt.sum(1) == 1).all() and dealt.sum(0).max() == 1
    bits, places = [0.0] * N, [0] * N
    for row, s in zip(dealt, share, strict=False):
        slot = min((n for n in range(N) if places[n] < D), key=lambda n: bits[n])
        assert row[slot * D + places[slot]] == 1
        bits[slot] += s
        places[slot] += 1


def photo_patches(n=200):
    """4x4 patches of photographs less their mean colour, in units of GREY: float64 [m, 48]."""
    images = np.float64(photos(n))
    centred = (images - images.mean((0, 1, 2))) / model.GREY
    return centred.reshape(n, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)


def test_principal_directions():
    """Of the singular value decomposition, as many as get bits, and what they leave is white."""
    patches, bits = photo_patches(), 12
    analysis, synthesis, share = model.principal(patches, bits, False)
    _, singular, vectors = np.linalg.svd(patches, full_matrices=False)
    power = singular**2 / len(patches)
    level, k = water_level(power, bits)
    assert 1 < k < 48 and analysis.shape == (48, k) and synthesis.shape == (k, 48)
    np.testing.assert_allclose(analysis @ synthesis, vectors[:k].T @ vectors[:k], atol=1e-6)
    np.testing.assert_allclose(share, 0.5 * np.log2(power[:k] / level), atol=1e-5)
    analysis, synthesis, share = model.principal(patches, bits, True)
    np.testing.assert_allclose(synthesis @ analysis, np.eye(len(share)), atol=1e-6)
    spread = analysis.T @ (patches.T @ patches) @ analysis
    assert np.abs(spread - np.diag(np.diag(spread))).max() < 1e-6 * spread.max()  # uncorrelated


def test_colours_are_scaled_until_their_errors_are_alike():
    """Smooth chroma under a noisy luma gets a larger scale; white noise is left alone."""
    rng = np.random.default_rng(0)
    white = rng.normal(size=(8000, 48))

    def scale(patches):
        return model.colour_scale(patches.T @ patches / len(patches), 50)

    np.testing.assert_allclose(scale(white), np.eye(3), atol=0.1)
    luma = rng.normal(size=(8000, 16, 1)) * np.ones(3)
    chroma = rng.normal(size=(8000, 1, 3))  # the same in all pixels of a patch
    patches = (luma + chroma).reshape(-1, 48) + 0.01 * white
    towards = [np.linalg.norm(np.array(axis) @ scale(patches)) for axis in ([1, 1, 1], [1, -1, 0])]
    assert towards[1] / 2**0.5 > 3 * towards[0] / 3**0.5
    assert np.linalg.det(scale(patches)) == pytest.approx(1)
    colour = np.kron(np.eye(16), scale(patches))
    power = colour.T @ (patches.T @ patches / len(patches)) @ colour
    variance, vectors = np.linalg.eigh(power)
    left = (vectors * np.minimum(variance, water_level(variance, 50)[0])) @ vectors.T
    error = np.einsum("iaib->ab", left.reshape(16, 3, 16, 3))
    np.testing.assert_allclose(error / error[0, 0], np.eye(3), atol=0.05)


def projected(config, images):
    """What the patch quantiser keeps of `images` before it quantises: grey levels, float64.

    Patches less the mean colour, projected onto the strongest directions that get bits and places.
    """
    mean = np.float64(images).mean((0, 1, 2))
    patches = np.float64(images) - mean
    patches = patches.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)
    bits, colour = config.slots * math.log2(config.K), np.eye(3)
    power = patches.T @ patches / len(patches) / model.GREY**2
    if config.likelihood == "colours":
        colour = model.colour_scale(power, bits)
    scale = np.kron(np.eye(16), colour)
    _, singular, vectors = np.linalg.svd(patches @ scale, full_matrices=False)
    variance = singular**2 / len(patches) / model.GREY**2
    k = min(water_level(variance, bits)[1], config.slots * config.D)
    kept = patches @ scale @ vectors[:k].T @ vectors[:k] @ np.linalg.inv(scale)
    kept = kept.reshape(-1, 8, 8, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 32, 32, 3)
    return kept + mean


def begin(net, config, images, kmeans=None):
    """Stock parameters (of any values), and those of the start made from them."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), images[:1])["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return np.float32(rng.normal(size=leaf.shape) * (path[-1].key != "bias"))

    stock = jax.tree_util.tree_map_with_path(draw, shapes)
    codebook = quantize.QUANTIZERS[config.quantizer].start
    stock["codebook"] = codebook(jax.random.key(0), *shapes["codebook"].shape)
    with pytest.MonkeyPatch.context() as patch:
        if kmeans:
            patch.setattr(quantize, "kmeans", kmeans)
        return stock, model.pca_start(config, stock, images, jax.random.key(0))


def no_kmeans(key, z_e, S, K):
    """Codes for tests of what does not depend on them."""
    return jnp.zeros((S, K, z_e.shape[-1]))


def unquantised(net, params, likelihood, images):
    """decode(encode(x)), nothing quantised between, in grey levels."""

    @jax.jit
    def through(params, images):
        z_e = net.apply({"params": params}, images, method="encode")
        outputs = net.apply({"params": params}, z_e, method="decode")
        return model.LIKELIHOODS[likelihood].loss(outputs, images, 1.0)[1]

    return np.asarray(through(params, images))


@pytest.mark.parametrize("shape", [
    {}, {"shared": True}, {"slots": 1, "D": 2}, {"slots": 5, "D": 8, "K": 32},
    {"likelihood": "colours"}, {"likelihood": "gaussian", "net": "deepmind"},
    {"likelihood": "categorical"}, {"net": "deepmind", "blocks": 2}, {"blocks": 0},
], ids=str)  # fmt: skip
def test_the_start_is_the_projection_of_patches(shape):
    """Before anything is quantised, at step 0, computed anew with NumPy."""
    config, net = tiny("fast", **{**ROOMY, **shape})
    images = photos(100)
    softmax = config.likelihood == "categorical"  # its width depends on what the codes leave
    _, params = begin(net, config, images, None if softmax else no_kmeans)
    found = unquantised(net, params, config.likelihood, images[:20])
    expected = projected(config, images)[:20]
    if softmax:  # near 0 and 255 it is cut off, and its mean moves
        inside = np.abs(expected - 127.5) < 70
        assert inside.mean() > 0.3
        np.testing.assert_allclose(found[inside], expected[inside], atol=1)
    else:
        np.testing.assert_allclose(found, np.clip(expected, 0, 255), atol=0.02)
    assert np.square(expected - images[:20]).mean() > 1  # directions were left out


@pytest.mark.parametrize("net_name", ["paper", "deepmind"])
def test_the_start_changes_only_weights_that_it_needs(net_name):
    """Names and shapes of the stock network; channels that carry nothing keep its weights."""
    config, net = tiny("fast", **{**ROOMY, "net": net_name, "blocks": 2})
    images = photos(100)
    stock, params = begin(net, config, images, no_kmeans)
    shapes = [jax.tree.map(lambda p: (p.shape, p.dtype), tree) for tree in (stock, params)]
    assert shapes[0] == shapes[1]
    changed = {}
    for side in ("encoder", "decoder"):
        flat = [flax.traverse_util.flatten_dict(tree[side]) for tree in (stock, params)]
        for path in flat[0]:
            one, other = (np.asarray(tree[path]) for tree in flat)
            moved = (one != other).any(tuple(range(one.ndim - 1))).nonzero()[0]
            if path[-1] == "kernel":
                changed["/".join((side, *path[:-1]))] = list(moved)
    _, k = water_level(np.linalg.eigvalsh(photo_power(images)), 8)
    deepmind = net_name == "deepmind"
    blocks = [f"{side}/Residual_{i}" for side in ("encoder", "decoder") for i in (0, 1)]
    zero = {f"{name}/Conv_1": 96 for name in blocks}
    first = {f"{name}/Conv_0": 0 for name in blocks}
    expected = {
        **zero, **first, "encoder/Down_0": 24, "encoder/Down_1": 2 * k,
        **({"encoder/Conv_0": 2 * k, "encoder/Conv_1": 8} if deepmind else {"encoder/Conv_0": 8}),
        "decoder/Conv_0": 2 * k, "decoder/Up_0": 30, "decoder/Up_1": 6,
    }  # fmt: skip
    assert changed == {name: list(range(n)) for name, n in expected.items()}
    for name in zero:
        side, block, layer = name.split("/")
        assert not np.any(params[side][block][layer]["kernel"])


def photo_power(images):
    """Covariance of 4x4 patches of images, in units of GREY, around the mean colour: [48, 48]."""
    patches = (images - images.mean((0, 1, 2))) / model.GREY
    patches = patches.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)
    return patches.T @ patches / len(patches)


@pytest.mark.parametrize("shared", [False, True])
def test_the_start_has_codebooks_of_means(shared):
    """Each code is about the mean of the outputs that it is nearest to; none is unused."""
    config, net = tiny("fast", **ROOMY, shared=shared)
    images = photos(100)
    _, params = begin(net, config, images)
    assert params["codebook"].shape == (1 if shared else 2, 16, 4)
    z_e = np.asarray(apply(net, params, images, method="encode"))
    codes = slow_lookup(z_e[:10], params["codebook"])
    fast = np.asarray(quantize.lookup(z_e, params["codebook"]))
    np.testing.assert_array_equal(fast[:10], codes)
    error = (z_e - quantize.embed(fast, params["codebook"])) ** 2
    means = []
    for slots in ([0, 1],) if shared else ([0], [1]):
        z, code = z_e[..., slots, :].reshape(-1, 4), fast[..., slots].ravel()
        means.append([z[code == k].mean(0) for k in range(16)])
    after = (z_e - quantize.embed(fast, jnp.array(means))) ** 2  # a round of k-means more
    assert np.isfinite(after).all() and error.mean() < 1.1 * after.mean()


@slow
@pytest.mark.parametrize("likelihood", ["logistic", "colours", "categorical"])
def test_the_start_is_far_below_a_stock_start(likelihood):
    images, bits = photos(300), {}
    held = data.Dataset(images, images[:100], "photo", "test")
    for init in ("pca", "random"):
        sizes = {"slots": 4, "K": 32, "blocks": 0}
        changes = {**ROOMY, **sizes, "init": init, "likelihood": likelihood}
        config, net = tiny("fast", **changes)
        params = train.init_state(config, net, images).params
        bits[init] = train.evaluate(config, net, params, held)[0]["bits_per_dim"]
    assert bits["pca"] < bits["random"] - 1.5 and bits["pca"] < 6.5, bits


@slow
def test_the_start_in_bfloat16_stays_close():
    images, shown = photos(100), {}
    for dtype in ("float32", "bfloat16"):
        config, net = tiny("fast", **ROOMY, dtype=dtype)
        _, params = begin(net, config, images, no_kmeans)
        shown[dtype] = unquantised(net, params, "logistic", images[:20])
        outputs = jax.jit(net.apply)({"params": params}, images[:20])[0]
        nll = model.logistic(outputs, images[:20], 1.0)[0]
        assert np.isfinite(nll).all()
    away = np.abs(shown["bfloat16"] - shown["float32"])
    assert 0 < away.mean() < 1 and away.max() < 10  # grey levels


@slow
def test_the_softmax_of_the_start_says_the_same_in_bfloat16():
    """Its logits are linear in the mean and reach hundreds: rounded, they cost a quarter bit."""
    images, nll = photos(300), {}
    config, net = tiny(
        "fast", **{**ROOMY, "likelihood": "categorical", "slots": 8, "K": 64, "D": 8}
    )
    _, params = begin(net, config, images)
    for dtype in ("float32", "bfloat16"):
        half = net.clone(dtype=jnp.dtype(dtype))
        outputs = jax.jit(half.apply)({"params": params}, images[:50])[0]
        nll[dtype] = model.categorical(outputs, images[:50], 1.0)[0].mean() / math.log(2)
    assert 0 < abs(nll["bfloat16"] - nll["float32"]) < 0.02, nll


@slow
def test_the_start_on_a_grid_uses_it():
    """Under fsq the coefficients are scaled to the grid that cannot move."""
    config, net = tiny("fast", **{**ROOMY, "quantizer": "fsq", "K": 81})
    images = photos(100)
    _, params = begin(net, config, images)
    np.testing.assert_array_equal(params["codebook"], quantize.fsq_grid(None, 2, 81, 4))
    outputs, z_e, _ = apply(net, params, images)
    assert 0.3 < np.asarray(z_e)[..., 0, 0].std() < 0.6
    shown = model.logistic(outputs, images, 1.0)[1]
    blank = np.square(images - images.mean((0, 1, 2))).mean()
    assert np.square(shown - images).mean() < 0.4 * blank


def test_what_a_start_refuses(monkeypatch):
    with pytest.raises(train.Stop, match=r"^\(2, '--init pca needs --hidden 96 or more, not 95"):
        tiny("fast", **{**ROOMY, "hidden": 95})
    silent = model.LIKELIHOODS["logistic"]._replace(start=None)
    monkeypatch.setitem(model.LIKELIHOODS, "logistic", silent)
    with pytest.raises(train.Stop, match="--likelihood logistic has no start"):
        tiny("fast", **ROOMY)
    tiny("fast", **{**ROOMY, "init": "random"})
    monkeypatch.setitem(model.NETS, "mine", (nn.Module, model.Decoder))
    with pytest.raises(train.Stop, match="--net mine has no start: give --init random"):
        tiny("fast", **{**ROOMY, "net": "mine", "likelihood": "colours"})


class Half(model.Network):
    """An encoder to 16 x 16 positions."""

    features: int

    @nn.compact
    def __call__(self, x):
        return model.Down(self.features, self.dtype)(x)


def test_a_net_of_ones_own_has_8x8_positions(monkeypatch):
    """That is what bits/dim charges for."""
    monkeypatch.setitem(model.NETS, "mine", (Half, model.Decoder))
    config, net = tiny(net="mine")
    with pytest.raises(TypeError, match="reshape"):
        train.init_state(config, net, pictures())


@slow
def test_a_likelihood_may_sum_over_colours(monkeypatch):
    """The log and the evaluation divide by the same number."""
    config, net = tiny(likelihood="logistic")
    images, losses = pictures(), []

    def summed(outputs, images, variance):
        nll, shown = model.logistic(outputs, images, variance)
        return nll.sum(-1), shown

    state = train.init_state(config, net, images)
    for loss in (model.logistic, summed):
        row = model.LIKELIHOODS["logistic"]._replace(loss=loss)
        monkeypatch.setitem(model.LIKELIHOODS, "logistic", row)
        step = jax.jit(train.make_train_step(config, net, 0.06))
        losses.append(float(step(state, images)[1]["bits_per_dim"]))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_the_start_bounds_each_vector_by_itself(monkeypatch):
    """`bound` gets [..., N, D] there as it does in the network."""

    def unit(z):
        return z / jnp.linalg.norm(z, axis=-1, keepdims=True)

    monkeypatch.setitem(quantize.QUANTIZERS, "unit", quantize.Quantizer(bound=unit))
    config, net = tiny("fast", **ROOMY, quantizer="unit")
    outputs = []

    def caught(key, z_e, S, K):
        outputs.append(z_e)
        return no_kmeans(key, z_e, S, K)

    begin(net, config, photos(20), caught)
    np.testing.assert_allclose(jnp.linalg.norm(outputs[0], axis=-1), 1, rtol=1e-5)


# One step, and measuring


@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_the_codebook_trains(codebook):
    """Guards 2, 3, 6: it moves, and under EMA to where codes of the old codebook say."""
    config, net = tiny("notebook", codebook=codebook, slots=1, blocks=0)
    images = pictures()
    state = train.init_state(config, net, images)
    after, _ = jax.jit(train.make_train_step(config, net, 0.06))(state, images)
    assert not np.allclose(after.params["codebook"], state.params["codebook"])
    if codebook == "ema":
        z_e = apply(net, state.params, images, method="encode")
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
    """Guard, in the whole loss: the codebook's gradient step does not depend on beta."""
    after = []
    for beta in (0.1, 2.0):
        config, net = tiny(beta=beta, blocks=0)
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


def test_the_unigram_prior_counts_the_first_training_images(monkeypatch):
    """Only of so many: the codes of 50,000 would take as long as a tenth of the training."""
    assert UNIGRAM_IMAGES == 10_000
    monkeypatch.setattr(train, "UNIGRAM_IMAGES", 5)
    config, net = tiny()
    dataset = data.Dataset(pictures(30, 1), pictures(10), "noise", "test")
    params = train.init_state(config, net, dataset.train[:8]).params
    measured, codes = train.evaluate(config, net, params, dataset)
    trained = train.images_to_codes(net, params, dataset.train[:5])
    assert trained.shape == (5, 8, 8, 2) and trained.dtype == np.uint16
    bits = measured["bits_per_dim"] - train.code_bits(config)
    bits += train.unigram_bits(config, trained, codes)
    assert measured["bits_per_dim_unigram"] == pytest.approx(bits, rel=1e-6)


GPU_STEPS = {
    "paper": {"likelihood": "categorical", "codebook": "gradient"},
    "fast": {"likelihood": "logistic", "codebook": "ema", "restart": 1.0, "flip": True},
}


@pytest.mark.parametrize("preset", GPU_STEPS)
def test_the_step_of_a_gpu_can_be_compiled_for_one(preset, monkeypatch):
    """Exported from here as CUDA would get it: a loop over steps, bfloat16, no option of a CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert train.compiler_options() == {}
    config, net = tiny(preset, **GPU_STEPS[preset])
    assert net.dtype == jnp.bfloat16
    state = jax.eval_shape(lambda: train.init_state(config, net, None))
    steps = train.make_train_steps(train.make_train_step(config, net, 0.06))
    shapes = (20, 32, 32, 3), (3, 8)
    args = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, (np.uint8, np.int32), strict=True)]
    exported = jax.export.export(steps, platforms=["cuda"])(state, *args)
    text = exported.mlir_module()
    assert exported.platforms == ("cuda",) and "stablehlo.while" in text and "xbf16>" in text
    after = jax.tree.unflatten(exported.out_tree.children()[0], exported.out_avals[: len(
        jax.tree.leaves(state))])  # fmt: skip
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert all(p.dtype == np.float32 for p in jax.tree.leaves(after.params))


@pytest.mark.parametrize(
    "likelihood, name",
    [("logistic", "bits_per_dim"), pytest.param("gaussian", "nmse", marks=slow)],
)
def test_train_and_test_metrics_are_one_metric(likelihood, name):
    """Guard: the same images and parameters give the same figure in training and in a test."""
    config, net = tiny(likelihood=likelihood, blocks=0)
    dataset = data.Dataset(pictures(), pictures(), "noise", "test")
    state = train.init_state(config, net, dataset.train)
    step = jax.jit(train.make_train_step(config, net, dataset.variance()))
    _, metrics = step(state, dataset.train)
    measured, _ = train.evaluate(config, net, state.params, dataset)
    assert measured[name] == pytest.approx(float(metrics[name]), rel=1e-5)


def test_evaluation_by_hand_over_every_image():
    """Guards: 137 images in batches of 100, nothing dropped, nothing changed."""
    config, net = tiny(blocks=0)
    dataset = data.Dataset(pictures(30, 1), pictures(137), "noise", "test")
    params = train.init_state(config, net, dataset.train[:8]).params
    before = jax.tree.map(np.array, params)
    measured, codes = train.evaluate(config, net, params, dataset)
    jax.tree.map(np.testing.assert_array_equal, before, params)

    outputs, _, q = apply(net, params, dataset.test)
    nll, mean = map(np.float64, model.logistic(outputs, dataset.test, 1.0))
    np.testing.assert_array_equal(codes, q.codes)
    assert codes.shape == (137, 8, 8, 2)
    bits = nll.sum() / math.log(2) / 137 + 128 * math.log2(16)
    assert measured["bits_per_dim"] == pytest.approx(bits / 3072, rel=1e-5)
    mse = ((mean - dataset.test) ** 2).mean() / 255**2
    assert measured["mse"] == pytest.approx(mse, rel=1e-5)
    assert measured["psnr"] == pytest.approx(10 * math.log10(1 / mse), rel=1e-5)
    assert measured["nmse"] == pytest.approx(mse / (dataset.train / 255).var(), rel=1e-5)

    code_bits = 0.0  # the unigram prior: frequencies of the training codes, one added to each
    trained = np.asarray(apply(net, params, dataset.train, method="to_codes"))
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
    config, net = tiny(likelihood="categorical", blocks=0)
    dataset = data.Dataset(pictures(), pictures(), "noise", "test")
    params = jax.tree.map(jnp.zeros_like, train.init_state(config, net, dataset.train).params)
    measured, _ = train.evaluate(config, net, params, dataset)
    assert measured["bits_per_dim"] == pytest.approx(8 + 128 * 4 / 3072, abs=1e-5)
    assert train.code_bits(train.Config()) == 1.875


# Data


def test_order_of_the_images():
    """Guard: each epoch is a new permutation, nothing is dropped, any step can be asked for."""
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
    both = pictures(50), pictures(10)
    monkeypatch.setitem(data.DATASETS, "cifar10", ("CIFAR-10", lambda folder: both))
    held = data.load("cifar10", "unused", val=True)
    assert held.split == "val" and len(held.train) == 45
    np.testing.assert_array_equal(held.test, both[0][45:])
    assert data.load("cifar10", "unused", val=False).split == "test"


# Pictures


def drawn(axis):
    """The picture that an axis shows."""
    return np.asarray(axis.images[0].get_array())


@pytest.mark.parametrize("n, columns", [(5, 2), (6, 3), (1, 1), (3, 5)])
def test_draw_images_puts_each_in_its_place(n, columns):
    axis, images = train.new_figure(3, 3, "title").subplots(), pictures(n)
    train.draw_images(axis, images, columns, "label")
    picture = drawn(axis)
    assert picture.shape == (math.ceil(n / columns) * 34, columns * 34, 3)
    for i in range(n):
        y, x = 34 * (i // columns) + 1, 34 * (i % columns) + 1
        np.testing.assert_array_equal(picture[y : y + 32, x : x + 32], images[i])
        picture[y : y + 32, x : x + 32] = 255
    assert (picture == 255).all()  # the gaps and the places left over


def test_error_row_is_the_true_error():
    images = pictures(5)
    images = 10 + images // 2
    shown = images + np.uint8([3, 250, 0])  # 3, -6, 0: a mean of 3 grey levels everywhere
    shown[1, 4, 5] += np.uint8([0, 0, 60])
    axes = train.reconstruction_figure(images, shown, "title").axes
    np.testing.assert_array_equal(drawn(axes[0])[1:33, 35:67], images[1])
    np.testing.assert_array_equal(drawn(axes[1])[1:33, 1:33], shown[0])
    error = drawn(axes[2])
    assert error[1 + 4, 34 + 1 + 5] == pytest.approx(23)
    assert np.ma.median(np.ma.masked_invalid(error)) == pytest.approx(3)
    assert axes[2].images[0].get_clim() == pytest.approx((0, 3))  # one bad pixel: beyond the end
    perfect = train.reconstruction_figure(images, images, "title")
    perfect.draw_without_rendering()
    assert perfect.axes[2].images[0].get_clim()[1] > 0


def test_grey_levels_are_rounded_and_bounded(monkeypatch):
    levels = np.array([-3.0, 0.4, 0.6, 254.6, 300])
    monkeypatch.setattr(train, "in_batches", lambda *args: levels)
    shown = train.codes_to_images(None, None, None, [])
    assert shown.dtype == np.uint8 and list(shown) == [0, 0, 1, 255, 255]


def test_equal_codes_have_equal_colours_and_others_other():
    for K in (1, 2, 8, 100, 512, 1000, 65536):
        colours = train.code_map(np.arange(K).reshape(1, 1, K), K)[0, 0, ::4]
        assert len(np.unique(colours, axis=0)) == K
        assert not (colours == 255).all(-1).any()  # white is the gap
    codes = np.random.default_rng(0).integers(0, 512, (2, 4, 8))
    shown = train.code_map(codes, 512)
    assert shown.shape == (2, 16, 32, 3) and shown.dtype == np.uint8
    colours = train.code_map(np.arange(512).reshape(1, 1, 512), 512)[0, 0, ::4]
    np.testing.assert_array_equal(shown, colours[codes].repeat(4, 1).repeat(4, 2))


def test_codes_figure_sorts_the_use_and_counts_the_unused():
    images, codes = pictures(5), np.random.default_rng(0).integers(0, 4, (5, 8, 8, 10))
    counts = np.array([[6.0, 0.0, 3.0, 1.0]] * 10)
    axes = train.codes_figure(images, codes, counts, "title").axes
    lines = axes[-1].lines
    assert len(axes) == 1 + 4 + 1 and len(lines) == 10 + 1
    np.testing.assert_allclose(lines[0].get_ydata(), [0.6, 0.3, 0.1, 0])
    assert lines[0].get_label() == "codebook 0: 25.0% unused"
    assert lines[-1].get_ydata()[0] == 0.25
    np.testing.assert_array_equal(drawn(axes[0])[1:33, 1:33], images[0])
    for s in range(4):
        first = train.code_map(codes[..., s], 4)[0]
        np.testing.assert_array_equal(drawn(axes[1 + s])[1:33, 1:33], first)
    shared = train.codes_figure(images, codes[..., :1], counts[:1], "title")
    shared.draw_without_rendering()
    assert len(shared.axes) == 3


@pytest.mark.parametrize("key", ["nmse", "bits_per_dim"])
def test_curves_show_the_end_of_long_and_of_short_logs(key):
    log = [{"step": i, "seconds": i, key: 5 + 1e4 * 0.5**i, "perplexity": 9.0} for i in range(200)]
    for lines in (log, log[:1], []):
        figure = train.curves_figure(lines, key, 5.0, 4.5, "title")
        figure.draw_without_rendering()
        assert len(figure.axes) == (2 if lines else 1)
    axis = train.curves_figure(log, key, 5.0, 4.5, "title").axes[0]
    low, high = axis.get_ylim()
    assert 0 < low < 4.5 and 5 < high < 6  # the first lines, 10000 and less, leave the panel
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), [line[key] for line in log])
    assert [line.get_label() for line in axis.lines[1:]] == ["measured: 5", "published: 4.5"]
    alone = train.curves_figure(log, key, 5.0, None, "title").axes[0]
    assert [line.get_label() for line in alone.lines] == ["training", "measured: 5"]


@pytest.mark.parametrize("n, m", [(1, 1), (5, 3), (64, 8), (1, 100)])
def test_samples_of_any_number(n, m):
    learned, unigram = pictures(n), pictures(m, seed=1)
    figure = train.samples_figure({"learned": learned, "unigram": unigram}, "title")
    np.testing.assert_array_equal(drawn(figure.axes[0])[1:33, 1:33], learned[0])
    columns = drawn(figure.axes[1]).shape[1] // 34
    y, x = 34 * ((m - 1) // columns) + 1, 34 * ((m - 1) % columns) + 1
    np.testing.assert_array_equal(drawn(figure.axes[1])[y : y + 32, x : x + 32], unigram[-1])
    assert len(train.samples_figure({"learned": learned}, "title").axes) == 1


# The prior over codes


def small_prior(K, shape, S=None, D=3, seed=0, dtype=jnp.float32, **changes):
    """A prior with random parameters (its head starts at zero), and a codebook [S, K, D]."""
    changes = {"width": 16, "layers": 2, "heads": 2, **changes}
    prior = model.Prior(train.configure({"preset": "prior", **changes}), dtype)
    codebook = jax.random.normal(jax.random.key(seed + 1), (S or shape[-1], K, D))
    codes, rng = jnp.zeros((1, *shape), jnp.int32), np.random.default_rng(seed)
    shapes = jax.eval_shape(prior.init, jax.random.key(0), codes, codebook)["params"]

    def draw(path, leaf):
        return np.float32((path[-1].key == "scale") + 0.3 * rng.normal(size=leaf.shape))

    return prior, jax.tree_util.tree_map_with_path(draw, shapes), codebook


@functools.partial(jax.jit, static_argnums=0)
def prior_logits(prior, params, codes, codebook):
    """Logits as training and measuring compute them."""
    return prior.apply({"params": params}, codes, codebook)


def nll_of_fields(prior, params, codebook, codes):
    """-log p of whole fields, in nats: [B]."""
    return model.softmax_nll(prior_logits(prior, params, codes, codebook), codes).sum((1, 2, 3))


def prior_learner(codebook, codes):
    """The kit's own start and optimiser: mean nll of held-out codes before and after 80 steps."""
    small = {"width": 32, "layers": 1, "heads": 2, "lr": 1e-2, "warmup": 0, "decay": 0.0}
    config = train.configure({"preset": "prior", **small})
    prior, optimizer = train.build(config), train.make_optimizer(config)
    held, codes = codes[-200:], codes[:-200]
    state = train.init_prior(config, prior, codebook, codes)

    def loss(params, codes):
        logits = prior.apply({"params": params}, codes, codebook)
        return model.softmax_nll(logits, codes).mean()

    @jax.jit
    def step(params, opt, codes):
        value, gradient = jax.value_and_grad(loss)(params, codes)
        updates, opt = optimizer.update(gradient, opt)
        return jax.tree.map(jnp.add, params, updates), opt, value

    params, opt, rng = state.params, state.opt, np.random.default_rng(0)
    before = float(step(params, opt, held)[2])
    for _ in range(80):
        params, opt, _ = step(params, opt, codes[rng.choice(len(codes), 200)])
    return before, float(step(params, opt, held)[2])


@pytest.mark.parametrize("shape", [(2, 3, 2), pytest.param((3, 2, 1), marks=slow)])
def test_a_code_sees_only_earlier_codes(shape):
    """Bit for bit; h and w differ, so that a mix-up of rows and columns would show."""
    K, (h, w, N) = 5, shape
    prior, params, codebook = small_prior(K, shape)
    codes = jax.random.randint(jax.random.key(0), (1, *shape), 0, K)
    before = np.asarray(prior_logits(prior, params, codes, codebook)).reshape(-1, K)
    for i in range(h * w * N):
        changed = codes.reshape(-1).at[i].set((codes.reshape(-1)[i] + 1) % K).reshape(codes.shape)
        after = np.asarray(prior_logits(prior, params, changed, codebook)).reshape(-1, K)
        same = (after == before).all(-1)
        assert same[: i + 1].all(), i
        assert not same[i + 1 :].any(), i  # every later code sees it


def test_probabilities_of_all_fields_sum_to_one():
    prior, params, codebook = small_prior(3, (1, 2, 2))
    every = jnp.array(list(itertools.product(range(3), repeat=4))).reshape(81, 1, 2, 2)
    total = np.exp(-nll_of_fields(prior, params, codebook, every)).sum()
    assert total == pytest.approx(1, abs=1e-5)


def test_positions_are_told_apart_by_row_and_column():
    prior, params, codebook = small_prior(4, (3, 4, 1), layers=0)
    codes = jnp.zeros((1, 3, 4, 1), int)
    logits = np.asarray(prior_logits(prior, params, codes, codebook))[0, :, :, 0]
    inner = logits[1:, 1:-1].reshape(-1, 4)  # all see zeros only
    assert len(np.unique(inner.round(4), axis=0)) == len(inner)


@pytest.mark.parametrize(
    ("S", "N", "D"),
    [pytest.param(1, 1, 1, marks=slow), (1, 3, 64), pytest.param(2, 2, 8, marks=slow)],
)
def test_sizes_of_codebooks(S, N, D):
    prior, params, codebook = small_prior(7, (2, 2, N), S=S, D=D)
    codes = jax.random.randint(jax.random.key(0), (2, 2, 2, N), 0, 7)
    logits = prior_logits(prior, params, codes, codebook)
    assert logits.shape == (2, 2, 2, N, 7) and logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    e, features = model.code_features(codebook, N)
    assert e.shape == (N, 7, D) and features.shape == (N, 7, D + (D * (D + 1) // 2 if D < 9 else D))


@pytest.mark.parametrize(
    "dtype", [pytest.param(t, marks=slow) for t in (np.uint8, np.int32)] + [np.uint16]
)
def test_codes_above_255_and_dtypes_of_codes(dtype):
    K = 256 if dtype == np.uint8 else 512
    prior, params, codebook = small_prior(K, (1, 2, 2))
    codes = np.array([K - 1, 3, K - 2, 1]).reshape(1, 1, 2, 2)
    logits = prior_logits(prior, params, codes, codebook)
    again = prior_logits(prior, params, codes.astype(dtype), codebook)
    np.testing.assert_array_equal(again, logits)
    other = prior_logits(prior, params, codes % 256 - (K == 256), codebook)
    assert not np.allclose(other[0, 0, 1], logits[0, 0, 1])


def test_a_constant_dimension_of_the_codebook_is_no_feature():
    codebook = jax.random.normal(jax.random.key(0), (2, 9, 3)).at[..., 1].set(4.0)
    e, features = model.code_features(codebook, 2)
    assert np.isfinite(features).all() and np.abs(e[..., 1]).max() < 1e-3


def test_the_untrained_prior_is_the_unigram_prior():
    """Of the codes that it is made from, with one added to each count; in bits as evaluated."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (50, 8, 8, 2)) ** 2 % 5
    config = train.configure({"preset": "prior", "width": 16, "heads": 2})
    prior, codebook = train.build(config), jnp.array(rng.normal(size=(2, 5, 3)))
    params = train.init_prior(config, prior, codebook, codes).params
    nll = model.softmax_nll(prior_logits(prior, params, codes, codebook), codes)
    vqvae = train.configure({"preset": "paper", "slots": 2, "K": 5})
    bits = train.unigram_bits(vqvae, codes, codes)
    assert float(nll.sum()) / math.log(2) / 50 / 3072 == pytest.approx(bits, rel=1e-5)


def test_samples_follow_the_model():
    """Mean nll of samples = entropy of the model, here known exactly: all 3^6 fields are listed."""
    prior, params, codebook = small_prior(3, (1, 3, 2), seed=3)
    every = jnp.array(list(itertools.product(range(3), repeat=6))).reshape(-1, 1, 3, 2)
    of_all = np.asarray(nll_of_fields(prior, params, codebook, every), np.float64)
    codes = model.sample_codes(prior, params, codebook, jax.random.key(1), (4000, 1, 3, 2))
    assert codes.dtype == jnp.int32 and codes.shape == (4000, 1, 3, 2)
    index = np.asarray(codes).reshape(-1, 6) @ 3 ** np.arange(5, -1, -1)
    p, drawn = np.exp(-of_all), np.bincount(index, minlength=729) / 4000
    spread = np.sqrt(np.sum(p * of_all**2) - np.sum(p * of_all) ** 2)
    assert of_all[index].mean() == pytest.approx(np.sum(p * of_all), abs=4 * spread / 4000**0.5)
    expected = 0.5 * np.sum(np.sqrt(p * (1 - p) / 4000) * (2 / np.pi) ** 0.5)  # of the distance
    assert 0.5 * np.abs(drawn - p).sum() < 1.2 * expected


def test_cold_samples_are_the_likeliest_code_at_each_step():
    shape = (2, 3, 2)
    prior, params, codebook = small_prior(5, shape, seed=2)
    steps = []
    key = jax.random.key(0)
    show = lambda done, words: steps.append(done)
    codes = model.sample_codes(prior, params, codebook, key, (2, *shape), 1e-4, show)
    logits = prior_logits(prior, params, codes, codebook)
    np.testing.assert_array_equal(codes, logits.argmax(-1))
    assert steps == [1, 2, 3, 4, 5, 6]


@slow
def test_samples_follow_the_key():
    shape = (4, 2, 2, 2)
    prior, params, codebook = small_prior(8, shape[1:])
    a, b, c = (
        model.sample_codes(prior, params, codebook, jax.random.key(s), shape) for s in (1, 1, 2)
    )
    assert (a == b).all() and (a != c).mean() > 0.3
    assert len(np.unique(a.reshape(-1, 8), axis=0)) == 4  # fields of one call differ too


@slow
def test_learns_structure_and_invents_none():
    """Codes that copy the left neighbour or the slot before, nine times in ten; then shuffled."""
    K, rng = 8, np.random.default_rng(0)
    codes = rng.integers(0, K, (4000, 3, 3, 2))
    for column, slot in itertools.product(range(3), range(2)):
        copied = codes[:, :, column, 0] if slot else codes[:, :, column - 1, 0]
        if slot or column:
            new = rng.random((4000, 3)) < 0.1
            codes[:, :, column, slot] = np.where(new, codes[:, :, column, slot], copied)
    codebook = jax.random.normal(jax.random.key(0), (2, K, 2))
    before, after = prior_learner(codebook, codes)
    assert after < 0.6 * before
    before, after = prior_learner(codebook, rng.permutation(codes.reshape(-1)).reshape(codes.shape))
    assert before - 0.01 < after < before + 0.05


@slow
def test_half_precision_agrees():
    prior, params, codebook = small_prior(5, (2, 2, 2))
    codes = jax.random.randint(jax.random.key(0), (3, 2, 2, 2), 0, 5)
    half = prior_logits(prior.clone(dtype=jnp.bfloat16), params, codes, codebook)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, prior_logits(prior, params, codes, codebook), atol=0.3)
    model.sample_codes(
        prior.clone(dtype=jnp.bfloat16), params, codebook, jax.random.key(0), codes.shape
    )


SMALL_PRIOR = ["--width=16", "--layers=1", "--heads=2", "--batch=8", "--log_every=3", "--count=4"]
SMALL_PRIOR += ["--steps=6"]


def test_the_prior_of_a_run(finished, tmp_path, capsys):
    """--prior and --sample on a finished run: rows, grids, the three priors; flags that do not
    belong are refused.
    """
    run = shutil.copytree(finished, tmp_path / "one")
    assert train.main([f"--prior={run}", *SMALL_PRIOR]) == 0
    row = json.loads((run / "prior" / "result.json").read_text())
    bits = [row[f"bits_per_dim_{name}"] for name in ("uniform", "unigram", "prior")]
    code_bits = [row[f"code_bits_per_dim_{name}"] for name in ("uniform", "unigram", "prior")]
    np.testing.assert_allclose(np.diff(bits), np.diff(code_bits), atol=1e-6)
    vqvae = read_result(run)
    before = [vqvae["bits_per_dim"], vqvae["bits_per_dim_unigram"]]
    assert bits[:2] == pytest.approx(before, abs=1e-6)
    assert (run / "prior" / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert "width" in json.loads((run / "prior" / "config.json").read_text())

    assert train.main([f"--sample={run}", "--count=5", "--seed=3", "--temperature=0.5"]) == 0
    assert len(list((run / "prior").glob("samples-*.png"))) == 1
    capsys.readouterr()
    for command, says in (
        ([f"--prior={run}"], "not empty"),
        ([f"--prior={run}", "--K=5"], "--K does not go with --prior"),
        (["--width=8"], "belongs to --prior"),
        ([f"--sample={finished}"], "has no prior yet"),
        ([f"--sample={run}", "--steps=5"], "does not go with --sample"),
        ([f"--prior={run}", "--width=10", "--heads=4"], "multiple of --heads"),
    ):
        assert train.main(command) == 2
        message = capsys.readouterr().err
        assert says in message and message.count("\n") == 1


def test_a_prior_is_of_a_finished_vqvae(copied, capsys):
    """One of a run that goes on would be read with codes and a decoder that it does not know."""
    (copied / "result.json").unlink()
    for verb in ("prior", "sample"):
        assert train.main([f"--{verb}={copied}"]) == 2
        assert f"not finished: go on with --resume {copied}" in capsys.readouterr().err
    (copied / "prior").mkdir()
    (copied / "prior" / "config.json").write_text('{"preset": "prior"}')
    for verb in ("prior", "sample"):
        assert train.main([f"--{verb}={copied / 'prior'}"]) == 2
        assert f"holds a prior: name the run that it is of, {copied}." in capsys.readouterr().err


@slow
def test_a_resumed_prior_ends_as_one_left_alone(finished, tmp_path):
    runs = [shutil.copytree(finished, tmp_path / name) for name in ("one", "two")]
    assert train.main([f"--prior={runs[0]}", *SMALL_PRIOR]) == 0
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, send(signal.SIGTERM), 3)
        assert train.main([f"--prior={runs[1]}", *SMALL_PRIOR]) == 143
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **style: None)
        assert train.main([f"--resume={runs[1] / 'prior'}"]) == 0
    ends = [train.load(run / "prior")[2].state.params for run in runs]
    jax.tree.map(np.testing.assert_array_equal, *ends)


# The program


def start(tmp_path, *flags, out="run", draw=False):
    """Exit code of the real command line on the photograph, in this process.

    draw: write the pictures too, which takes longer than all else.
    """
    common = ["--dataset=photo", "--preset=paper", *TINY_FLAGS, f"--out={tmp_path / out}"]
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **style: None)
        return train.main([*common, "--steps=6", "--log_every=3", *flags])


def at_step(monkeypatch, act, step=4, text="training"):
    """Have the next run call `act()` when its bar called `text` shows this step or a later one."""
    bar, todo = train.bar, [act]

    @contextlib.contextmanager
    def watched(said, total, done):
        with bar(said, total, done) as show:

            def see(done, words):
                show(done, words)
                if todo and said.startswith(text) and done >= step:
                    todo.pop()()

            yield see

    monkeypatch.setattr(train, "bar", watched)


def send(number):
    """A function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def read_log(run):
    """log.jsonl without its times."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    clocks = "seconds", "ms_per_step"
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def read_result(run):
    """result.json without what two equal runs may differ in: when, how long, from which files."""
    row = json.loads((run / "result.json").read_text())
    timed = "train_seconds", "compile_seconds", "ms_per_step", "peak_memory_mib", "date"
    return {k: v for k, v in row.items() if k not in (*timed, "command", "commit")}


def read_params(run):
    """Parameters of a run's newest checkpoint."""
    return jax.tree.leaves(train.load(run)[2].state.params)


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
    assert start(folder, draw=True) == 0
    return folder / "run"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that run, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "copied")


def test_a_run_writes_all_it_promises(finished):
    row = json.loads((finished / "result.json").read_text())
    promised = """command commit preset steps batch seed train_seconds compile_seconds ms_per_step
        bits_per_dim bits_per_dim_unigram mse nmse psnr perplexity perplexity_per_codebook
        codes_used peak_memory_mib device versions date"""
    assert set(promised.split()) <= set(row)
    assert row["steps"] == 6 and row["seed"] == 0 and row["batch"] == 8
    assert all(
        math.isfinite(row[name]) for name in ("bits_per_dim", "bits_per_dim_unigram", "psnr")
    )
    assert row["train_seconds"] >= 0 and row["compile_seconds"] > 0
    assert [line["step"] for line in read_log(finished)] == [3, 6]
    for name in ("reconstructions", "curves", "codes"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert train.read_config(finished).K == 16
    assert set(json.loads((finished / "config.json").read_text())).isdisjoint(train.OF_PRIOR)
    assert not list(finished.glob("*.part")) and not list(finished.glob(".*"))


def test_the_command_of_a_row_is_the_run(finished):
    """Written out so that it gives the same configuration again, after --resume too."""
    command = json.loads((finished / "result.json").read_text())["command"]
    program, *words = shlex.split(command)
    assert program == "python" and words[0] == "train.py"
    verb, _, flags = train.parse(words[1:])
    again = train.dataclasses.replace(train.configure(flags), out="")
    assert verb == "train"
    assert again == train.dataclasses.replace(train.read_config(finished), out="")


def test_the_commit_of_a_result(tmp_path, monkeypatch):
    """That of the code, wherever it is called from, a + after it where files differ; or none."""
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@here"]
    file = tmp_path / "train.py"
    file.write_text("first")
    monkeypatch.setattr(train, "__file__", str(file))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert train.commit() == ""
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()
    assert len(train.commit()) >= 7 and head.startswith(train.commit())
    file.write_text("second")
    assert train.commit()[-1] == "+" and head.startswith(train.commit()[:-1])
    monkeypatch.setenv("PATH", "")
    assert train.commit() == ""


def test_the_commit_is_of_the_code_that_ran(copied, monkeypatch):
    """Not of what lies there when the run ends."""
    commits = ["begun"]
    monkeypatch.setattr(train, "commit", lambda: commits[-1])
    at_step(monkeypatch, lambda: commits.append("later"), 1, "measuring")
    assert train.main([f"--eval={copied}"]) == 0 and commits[-1] == "later"
    assert json.loads((copied / "eval.json").read_text())["commit"] == "begun"


def test_what_a_run_prints(tmp_path, capsys):
    """Preset and device first; where it goes; lines of 80 columns; no carriage return in a file."""
    assert start(tmp_path) == 0
    text = capsys.readouterr().out
    first, *lines = text.splitlines()
    assert "preset paper" in first and train.hardware() in first and "\r" not in text
    assert str(tmp_path / "run") in text and "published: nothing, not being CIFAR-10" in text
    assert any(line.startswith("6/6 ") and "bits/dim" in line for line in lines)
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert train.ABOUT["paper"] in lines[0] and lines[1].startswith("published: ")


def test_a_run_is_compared_only_with_what_it_measures():
    def text(**flags):
        return train.goal(train.Config(**flags))

    assert text()[:2] == text(likelihood="logistic")[:2] == ("bits_per_dim", 4.67)
    assert text(likelihood="gaussian", slots=1)[:2] == ("nmse", 0.056)
    others = {"likelihood": "gaussian"}, {"likelihood": "logistic", "slots": 1}
    for flags in ({"likelihood": "colours"}, {"dataset": "photo"}, *others):
        assert text(**flags)[1] is None and text(**flags)[2].startswith("nothing")


@slow
def test_a_gaussian_has_no_bits(tmp_path, capsys):
    assert start(tmp_path, "--likelihood=gaussian", "--codebook=ema", "--restart=0.1",
                 "--init=data", "--shared", "--flip", "--val", draw=True) == 0  # fmt: skip
    row = read_result(tmp_path / "run")
    assert row["bits_per_dim"] is None and row["bits_per_dim_unigram"] is None and row["nmse"] > 0
    assert "not being CIFAR-10" in capsys.readouterr().out


def test_same_seed_same_numbers(finished, tmp_path):
    assert start(tmp_path) == 0
    equal(finished, tmp_path / "run")
    assert start(tmp_path, "--seed=1", out="other") == 0
    assert read_log(finished)[0]["loss"] != read_log(tmp_path / "other")[0]["loss"]


def test_eval_gives_the_same_metrics(finished, copied):
    (copied / "codes.png").unlink()
    assert train.main(["--eval", str(copied)]) == 0
    again = json.loads((copied / "eval.json").read_text())
    row = json.loads((finished / "result.json").read_text())
    names = [name for name in again if name in read_result(finished)]
    assert "bits_per_dim" in names and {n: again[n] for n in names} == {n: row[n] for n in names}
    assert (copied / "codes.png").exists()
    assert (copied / "result.json").read_bytes() == (finished / "result.json").read_bytes()


def test_a_row_of_a_run_that_goes_on(finished):
    """--eval before the end: steps, and their time, are those that were done."""
    config, _, progress = train.load(finished)
    part = progress._replace(state=progress.state._replace(step=jnp.int32(3)), seconds=6.0)
    row = train.result_row(config, "", part, {})
    assert row["steps"] == 3 and row["ms_per_step"] == 2000.0


def test_a_loaded_run_codes_and_decodes(finished, monkeypatch):
    config, net, progress = train.load(finished)
    params = progress.state.params
    codes = apply(net, params, pictures(3), method="to_codes")
    outputs = apply(net, params, codes, method="from_codes")
    assert codes.shape == (3, 8, 8, 2) and outputs.shape == (3, 32, 32, 6)
    monkeypatch.setattr(train, "EVAL_BATCH", 2)  # many are decoded in parts
    means = np.clip(127.5 + model.GREY * outputs[..., :3], 0, 255)
    shown = train.codes_to_images(config, net, params, codes)
    assert shown.dtype == np.uint8 and np.abs(shown - means).max() < 0.51


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=slow),
        pytest.param(signal.SIGHUP, 129, marks=slow),
    ],
)
def test_stopped_and_resumed(finished, tmp_path, monkeypatch, capsys, number, code):
    """A signal at step 4, between two log lines, saves; the resumed run ends as if left alone."""
    with monkeypatch.context() as patch:
        at_step(patch, send(number))
        assert start(tmp_path) == code
    run = tmp_path / "run"
    said = capsys.readouterr().err
    assert f"--resume {run}" in said and said.count("\n") == 1
    assert not (run / "result.json").exists()
    kept = int(train.load(run)[2].state.step)
    assert kept in (4, 5) and f"stopped after step {kept};" in said
    assert train.main(["--resume", str(run), "--lr=1"]) == 2
    assert train.main(["--resume", str(run)]) == 0
    equal(finished, run)
    assert train.main(["--resume", str(run)]) == 2
    assert f"--eval {run}" in capsys.readouterr().err


@slow
def test_a_run_under_nohup_outlives_its_terminal(finished, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, send(signal.SIGHUP))
        assert start(tmp_path) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    equal(finished, tmp_path / "run")


def test_the_second_signal_stops_at_once(tmp_path, monkeypatch, capsys):
    """Ctrl-C twice: nobody waits for a checkpoint that does not get written."""

    waited = []

    def save(*args):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        waited.append(args)

    monkeypatch.setattr(train, "save_checkpoint", save)
    at_step(monkeypatch, send(signal.SIGINT))
    assert start(tmp_path) == 130 and not waited
    assert "stopped after" not in capsys.readouterr().err


@slow
def test_stopped_while_measuring(finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C after the last step loses nothing: --resume measures and writes the result."""
    with monkeypatch.context() as patch:
        at_step(patch, send(signal.SIGINT), 1, "measuring")
        assert start(tmp_path) == 130
    run, said = tmp_path / "run", capsys.readouterr().err
    assert f"--resume {run}" in said and said.count("\n") == 1
    assert not (run / "result.json").exists()
    assert train.main(["--resume", str(run)]) == 0
    equal(finished, run)


@slow
def test_another_thread_can_run_it(finished, tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(start(tmp_path)))
    thread.start()
    thread.join()
    assert codes == [0]
    equal(finished, tmp_path / "run")


@slow
def test_a_run_leaves_its_process_as_it_was(tmp_path):
    """Signal handlers, streams, environment, JAX's and matplotlib's settings, current folder."""
    import matplotlib

    def look():
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        settings = dict(jax.config.values), matplotlib.rcParams.copy(), dict(os.environ)
        process = sys.stdout, sys.stderr, sys.excepthook, os.getcwd(), threading.active_count()
        return handlers, *settings, process, np.geterr(), socket.getdefaulttimeout()

    start(tmp_path, "--lr=1000", "--steps=60", "--likelihood=gaussian", out="warm")
    before = look()
    assert start(tmp_path, draw=True) == 0
    assert look() == before
    assert "matplotlib.pyplot" not in sys.modules


def test_damaged_checkpoint(finished, tmp_path, capsys):
    """It is named, the run goes on from the one before, nothing is deleted."""
    assert start(tmp_path, "--checkpoint_minutes=1e-9", "--log_every=3") == 0
    run = tmp_path / "run"
    newest, _ = train.checkpoints(run)
    whole = newest.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole[:500] + b"x" + whole[501:]):
        newest.write_bytes(damage)
        _, _, progress = train.load(run)
        message = capsys.readouterr().err
        assert f"{newest} is damaged" in message and message.count("\n") == 1
        assert int(progress.state.step) == 5 and newest.read_bytes() == damage
    (run / "result.json").unlink()
    assert train.main(["--resume", str(run)]) == 0
    equal(finished, run)
    (run / "result.json").unlink()
    for file in train.checkpoints(run):
        file.write_bytes(b"nothing")
    assert train.main(["--resume", str(run)]) == 1
    message = capsys.readouterr().err
    assert "no checkpoint" in message and "--out" in message
    assert [file.read_bytes() for file in train.checkpoints(run)] == [b"nothing"] * 2


@slow
def test_checkpoint_of_another_run(finished, tmp_path, capsys):
    """One that was made with other settings is named, not read."""
    assert start(tmp_path, "--steps=7") == 0
    run = tmp_path / "run"
    strange = run / "checkpoint-000000009.msgpack"
    strange.write_bytes(train.checkpoints(finished)[0].read_bytes())
    capsys.readouterr()
    assert int(train.load(run)[2].state.step) == 7
    message = capsys.readouterr().err
    assert f"{strange} belongs to another run" in message and message.count("\n") == 1
    train.checkpoints(run)[1].unlink()
    with pytest.raises(train.Stop, match="no checkpoint"):
        train.load(run)
    assert strange.exists()


def test_checkpoint_whose_arrays_do_not_fit(copied, capsys):
    """Of the same settings, but an edited network: one sentence, not a traceback."""
    config, _, progress = train.load(copied)
    params = dict(progress.state.params)
    params["codebook"] = np.zeros((2, 99, 4), np.float32)
    for wrong in (params, {"codebook": params["codebook"]}):
        state = progress.state._replace(params=wrong)
        for file in train.checkpoints(copied):
            file.unlink()
        train.save_checkpoint(copied, progress._replace(state=state), config)
        for verb in ("resume", "eval"):
            assert train.main([f"--{verb}", str(copied)]) in (1, 2)
            message = capsys.readouterr().err
            assert str(copied) in message and message.count("\n") <= 2


def test_a_run_without_a_checkpoint(finished, copied, capsys):
    """--eval says so, --resume begins; also where the disk was full and only the row is there."""
    for file in train.checkpoints(copied):
        file.unlink()
    assert train.main(["--eval", str(copied)]) in (1, 2)
    assert "no checkpoint" in capsys.readouterr().err and not (copied / "eval.json").exists()
    assert train.main(["--resume", str(copied)]) == 0
    equal(finished, copied)


def test_out_of_memory(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(train, "make_train_steps", full)
    assert start(tmp_path) == 1
    assert "--batch 8 is too much memory: start anew with --batch 4" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(tmp_path, capsys):
    assert (
        start(tmp_path, "--lr=1000", "--steps=60", "--log_every=20", "--likelihood=gaussian") == 1
    )
    message = capsys.readouterr().err
    assert "step 2: " in message and "loss" in message and "as --lr 3e+02" in message
    assert not (tmp_path / "run" / "result.json").exists()


def test_full_disk(finished, tmp_path, monkeypatch, capsys):
    """Pictures, log and checkpoints that cannot be written do not end the run."""
    replace = os.replace

    def full(part, path):
        if Path(path).suffix in (".png", ".msgpack"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return replace(part, path)

    monkeypatch.setattr(os, "replace", full)
    assert start(tmp_path, draw=True) == 0
    message = capsys.readouterr().err
    assert "could not write the checkpoint (No space left on device)" in message
    for name in ("reconstructions", "curves", "codes"):
        assert f"{name}.png (OSError(28, 'No space left" in message
    assert message.count("\n") == 4 and not list((tmp_path / "run").glob(".*"))
    assert read_result(tmp_path / "run") == read_result(finished)


def test_an_error_of_the_system_is_one_sentence(monkeypatch, capsys):
    for error, says in (
        (OSError(errno.ENOSPC, "No space left on device"), "train.py: No space left"),
        (OSError(errno.ENOSPC, "No space left on device", "a.png"), "train.py: a.png: No space"),
        (OSError("no reason"), "train.py: no reason"),
    ):
        monkeypatch.setattr(train, "run", mock.Mock(side_effect=error))
        assert train.main([]) == 1
        assert capsys.readouterr().err.startswith(says)


@pytest.mark.parametrize(
    "error", [MemoryError(), pytest.param(ValueError("no such backend"), marks=slow)]
)
def test_a_picture_that_fails_loses_nothing(finished, tmp_path, monkeypatch, capsys, error):
    """The result is written before it, the other pictures after it; the exit code is 0."""
    seen = []

    def fail(*args):
        seen.append((tmp_path / "run" / "result.json").exists())
        raise error

    monkeypatch.setattr(train, "reconstruction_figure", fail)
    monkeypatch.setattr(train, "new_figure", fail)
    assert start(tmp_path) == 0
    assert seen == [True] * 3 and "reconstructions.png" in capsys.readouterr().err
    equal(finished, tmp_path / "run")


def test_two_runs_never_share_a_folder(finished, tmp_path, capsys):
    assert start(finished.parent) == 2
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("not a run")
    assert start(tmp_path) == 2
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_folders_claimed_at_once(tmp_path, monkeypatch):
    """Twenty at a time: each a number of its own, or under one name one of them."""
    monkeypatch.chdir(tmp_path)
    gate, got = threading.Barrier(20), []

    def take(**changes):
        config, _ = tiny(**changes)
        gate.wait()
        try:
            got.append(str(train.claim(config)))
        except train.Stop as stop:
            got.append(stop.args)

    def all_at_once(**changes):
        got.clear()
        threads = [threading.Thread(target=take, kwargs=changes) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return list(got)

    numbered = all_at_once()
    assert sorted(numbered) == sorted(f"runs/paper-{i}" for i in range(1, 21))
    named = all_at_once(out="mine")
    assert named.count("mine") == 1
    losers = [answer for answer in named if answer != "mine"]
    assert all(code == 2 and "mine is not empty" in text for code, text in losers)


@slow
def test_two_processes_started_at_once(tmp_path):
    flags = ["--dataset=photo", "--preset=paper", *TINY_FLAGS, "--steps=6"]
    for out in ([], ["--out=mine"]):
        pair = [spawn([*flags, *out], tmp_path) for _ in range(2)]
        errors = [process.communicate()[1] for process in pair]
        codes = [process.returncode for process in pair]
        if out:
            assert sorted(codes) == [0, 2], errors
            assert sum(text.count("\n") for text in errors) == 1 and "not empty" in "".join(errors)
        else:
            assert codes == [0, 0], errors
    folders = "runs/paper-1", "runs/paper-2", "mine"
    assert all((tmp_path / name / "result.json").exists() for name in folders)


@slow
def test_a_file_system_without_locks(finished, tmp_path, monkeypatch):
    import fcntl

    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert start(tmp_path) == 0
    equal(finished, tmp_path / "run")


@slow
def test_a_bad_data_folder_leaves_nothing(tmp_path, monkeypatch, capsys):
    """The same command works once the data are there."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:

        def missing(folder):
            raise data.Stop(1, f"{folder} is not there.")

        patch.setitem(data.DATASETS, "photo", ("photo", missing))
        assert start(tmp_path) == 1
        assert "is not there." in capsys.readouterr().err
        (tmp_path / "file").write_text("")
        for folder in (tmp_path / "file", "/dev/null/data"):
            assert train.main([f"--data_dir={folder}", f"--out={out}"]) == 1
            assert "data folder" in capsys.readouterr().err
    assert not out.exists()
    assert start(tmp_path) == 0


CONFIGS = {
    "an unknown key": ({"chanels": 8}, "chanels"),
    "a wrong type": ({"K": "many"}, "--K"),
    "a wrong number": ({"K": 16.5}, "--K"),
    "a list": ({"K": [16]}, "--K"),
    "nothing": ({"steps": None}, "--steps"),
    "a number for a switch": ({"flip": 1}, "--flip"),
    "a switch for a number": ({"lr": True}, "--lr"),
    "out of range": ({"beta": -1}, "--beta"),
    "not finite": ({"lr": math.nan}, "--lr"),
    "an unknown choice": ({"net": "transform"}, "--net"),
    "what does not go together": ({"init": "pca"}, "--hidden 96"),
    "a verb": ({"eval": "there"}, "eval"),
    "help": ({"help": True}, "help"),
    "missing keys": ("{}", "config.json"),
    "text": ("K = 16", "config.json"),
    "half of it": ('{"K": 1', "config.json"),
    "no dict": ("[]", "config.json"),
    "bytes": (b"\xff\xfe\x00", "config.json"),
    "no file": (None, "config.json"),
}


@pytest.mark.parametrize("verb", ["resume", "eval", "prior", "sample"])
@pytest.mark.parametrize("fault", CONFIGS)
def test_config_of_another_version(finished, tmp_path, capsys, fault, verb):
    """One sentence that names the file and the key; code 2; nothing else changes."""
    change, key = CONFIGS[fault]
    run = tmp_path / "run"
    below = run / "prior" if verb == "sample" else run
    for folder in {run, below}:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_bytes((finished / "config.json").read_bytes())
    (run / "result.json").write_text("{}")
    file = below / "config.json"
    if change is None:
        file.unlink()
    elif isinstance(change, dict):
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    else:
        file.write_bytes(change if isinstance(change, bytes) else change.encode())
    before = sorted(tmp_path.rglob("*"))
    assert train.main([f"--{verb}", str(run)]) == 2
    message = capsys.readouterr().err
    if verb == "sample" and fault == "no file":
        key = "no prior yet"
    assert key in message and message.count("\n") == 1 and message.startswith("train.py: ")
    assert str(file.parent if verb != "sample" else run) in message
    assert sorted(tmp_path.rglob("*")) == before


WRONG = """
--no_such_flag 1|unrecognized
--K|expected one argument
--K 1|--K 1 makes no sense: it goes from 2
--K 0|goes from 2
--K -5|goes from 2
--K 1.5|invalid int
--K many|invalid int
--K nan|invalid int
--K 10000000000|to 65536
--K=|invalid int
--D 0|goes from 1
--D 1e3|invalid int
--slots 0|goes from 1
--slots 100000|to 1024
--hidden 1|goes from 2
--hidden -128|goes from 2
--residual 0|goes from 1
--batch 0|goes from 1
--batch -1|goes from 1
--batch 100000|more than 2952 images
--steps 0|goes from 1
--steps -10|goes from 1
--steps 1e5|invalid int
--lr 0|--lr 0.0 makes no sense
--lr=-1e-4|--lr -0.0001 makes no sense
--lr nan|--lr nan makes no sense
--lr inf|--lr inf makes no sense
--lr 1e300|to 1000
--lr fast|invalid float
--lr=|invalid float
--beta -1|goes from 0
--beta nan|--beta nan makes no sense
--codebook ema --gamma 1|--gamma 1.0 makes no sense
--codebook ema --gamma=-0.1|goes from 0
--codebook gradient --gamma 0.9|--codebook ema
--codebook gradient --restart 0.1|--codebook ema
--preset fast --init random --quantizer fsq --D 3 --restart 0.1|learns by EMA
--codebook ema --restart -1|goes from 0
--codebook ema --restart 1.5|to 1.0
--codebook emma|invalid choice
--preset papre|invalid choice
--preset=|invalid choice
--preset prior|--prior runs/fast-1
--dataset mnist|invalid choice
--likelihood normal|invalid choice
--init kmeans|invalid choice
--dtype float16|invalid choice
--net resnet|invalid choice
--quantizer lfq|invalid choice
--gradient none|invalid choice
--blocks -1|goes from 0
--preset paper --init pca --hidden 64|--hidden 96
--preset fast --hidden 95|--hidden 96
--quantizer fsq|--K 512 give --D 1 or 3 or 9
--quantizer fsq --D 3 --init data|--init data is of no use
--preset paper --quantizer fsq --K 1000 --D 4|--D 1 or 3
--width 64|does not go with a VQ-VAE
--temperature 0.9|does not go with a VQ-VAE
--seed -1|goes from 0
--seed 99999999999|to 2147483647
--log_every 0|goes from 1
--checkpoint_minutes 0|--checkpoint_minutes 0.0 makes no sense
--data_dir=|names no folder
--stepz 5|unrecognized
--step 5|unrecognized
--flip yes|unrecognized
--resume=|one run folder
--resume nowhere|no run folder
--eval nowhere|no run folder
--prior nowhere|no run folder
--sample nowhere|no run folder
--resume a --eval b|one run folder
--eval a --lr 1|--lr does not go with --eval
--resume a --steps 9|--steps does not go with --resume
--prior a --K 9|--K does not go with --prior
--prior a --out b|--out does not go with --prior
--sample a --lr 1|--lr does not go with --sample
--out /dev/null/run|cannot write
train|unrecognized
""".strip().splitlines()


@pytest.mark.parametrize("row", WRONG)
def test_wrong_command_lines(row, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line that says what is wrong, nothing written."""
    monkeypatch.chdir(tmp_path)
    flags, says = row.split("|")
    verbs = "--eval", "--resume", "--prior", "--sample"
    dataset = [] if flags.startswith(verbs) else ["--dataset=photo"]
    assert train.main([*dataset, *flags.split(" ")]) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1 and message.startswith("train.py: ")
    assert not list(tmp_path.iterdir())


def test_every_field_is_read():
    """A flag that nothing reads is a lie; one read in many places is hard to change."""
    source = "".join((HERE / f"{name}.py").read_text() for name in ("train", "model"))
    for f in train.dataclasses.fields(train.Config):
        read = f"config.{f.name}", f'"{f.name}"', f"c.{f.name}"
        assert any(words in source for words in read), f.name
    for name, diff in train.PRESETS.items():
        assert train.configure({"preset": name}) and set(diff) <= set(vars(train.Config()))


# The program as a shell sees it


def spawn(flags, folder, before=(), **changes):
    """The program as a process of its own in `folder`, with its output as text.

    before: words of the command line that come before it.
    """
    env = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": CACHE.name,
        "COLUMNS": "80",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        **changes.pop("env", {}),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **changes}
    return subprocess.Popen([*before, *PROGRAM, *flags], cwd=folder, env=env, **pipes)  # fmt: skip


TINY_RUN = ["--dataset=photo", "--preset=paper", *TINY_FLAGS, "--steps=6", "--log_every=3"]


def test_the_real_process(tmp_path):
    """A shell sees one line and code 2 for what is wrong; --help names every flag."""
    cases = {
        "wrong": (["--K", "1"], {}),
        "nonsense": (TINY_RUN, {"JAX_PLATFORMS": "nonsense"}),
        "cuda": (TINY_RUN, {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}),
        "help": (["--help"], {}),
    }
    running = {name: spawn(flags, tmp_path, env=env) for name, (flags, env) in cases.items()}
    said = {name: process.communicate() for name, process in running.items()}
    helped = running.pop("help")
    assert helped.returncode == 0
    for f in train.dataclasses.fields(train.Config):
        assert f"--{f.name}" in said["help"][0]
    for name, process in running.items():
        error = said[name][1]
        assert process.returncode == 2 and error.count("\n") == 1, error
        assert error.startswith("train.py: ") and said[name][0] == ""
        assert ("--K" if name == "wrong" else "JAX_PLATFORMS") in error
    assert not list(tmp_path.iterdir())


@slow
@pytest.mark.parametrize("reader", ["full", "gone", "no"])
def test_nobody_reads_what_it_prints(tmp_path, reader):
    """A reader that has gone, a full disk behind stdout, no stdout: the run ends as it should.

    And a backend of matplotlib that is not here stops nothing.
    """
    env = {"MPLBACKEND": "module://no_such_module"}  # as a notebook hands it down
    closed = "sh", "-c", 'exec "$@" >&- 2>&-', "sh"
    read, write = os.pipe()
    os.close(read)
    flags = [*TINY_RUN, "--out=run"]
    with open("/dev/full", "w") as full, open(write, "w") as gone:
        streams = {"full": {"stdout": full}, "gone": {"stdout": gone}, "no": {"before": closed}}
        process = spawn(flags, tmp_path, env=env, **streams[reader])
    error = process.communicate()[1]
    assert process.returncode == 0 and not error, error
    assert (tmp_path / "run" / "result.json").exists()
    assert len(list((tmp_path / "run").glob("*.png"))) == 3


def test_the_time_left_leaves_out_what_was_compiled(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    with train.bar("training", 100, 40) as show:
        for seconds, step, words in ((5, 40, "compiling"), (65, 40, ""), (95, 55, "")):
            clock[0] = seconds
            show(step, words)
    assert capsys.readouterr().out.split("\n")[:-1] == [
        "training",
        "40/100    compiling",
        "40/100    training",
        "55/100  0:01:30 left  training",
    ]


@slow
def test_the_bar_on_a_terminal_of_80_columns(tmp_path):
    """Step, bar, time left and the numbers on one line, drawn over itself, cut nowhere."""
    main, terminal = pty.openpty()
    flags = [*TINY_RUN, "--log_every=2", "--out=run"]
    subprocess.run(["stty", "cols", "80", "rows", "24"], stdin=terminal, check=True)
    process = spawn(flags, tmp_path, stdout=terminal, env={"TERM": "xterm"})
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # how the end of a terminal reads
        while some := os.read(main, 4096):
            seen += some
    os.close(main)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    lines = seen.decode().replace("\r\n", "\n").split("\n")
    frames = [frame.rstrip() for line in lines for frame in line.split("\r")]
    assert max(map(len, (frame for frame in frames if str(tmp_path) not in frame))) <= 80
    training = [frame for frame in frames if frame.startswith(("2/6 ", "6/6 "))]
    assert len(training) >= 2
    assert training[-1].startswith("6/6 [############] 0:00:00 left  ")
    assert "bits/dim" in training[-1] and training[-1].endswith("perplexity")
    assert "[####        ]" in training[0] and " left " in training[0]
    drawn_over = next(line for line in lines if "6/6" in line)
    assert drawn_over.count("\r") >= 3  # one line of the terminal


# CIFAR-10 on disk and on the network

FEW = 400  # images in one of the batches that stand for the official ones of 10,000


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """A folder as torchvision wants it, with fewer images and other pixels, and its md5 list."""
    folder = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    for i, name in enumerate(names):
        content = {"label_names": ["x"] * 10}
        if "meta" not in name:
            content = {"data": np.full((FEW, 3072), i, np.uint8), "labels": [0] * FEW}
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
    monkeypatch.setattr(data, "CRC32", fake_crc32())
    serve(monkeypatch, "http://127.0.0.1:9/")
    for name, _ in md5s:
        (tmp_path / folder.name).mkdir(exist_ok=True)
        os.link(folder / name, tmp_path / folder.name / name)
    return tmp_path


def fake_crc32():
    """data.CRC32 of the images in `batches`."""
    train_images = np.repeat(np.arange(5, dtype=np.uint8), FEW * 3072)
    return zlib.crc32(train_images), zlib.crc32(np.full(FEW * 3072, 5, np.uint8))


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
    assert not list(folder.glob(".cifar*")) and not list(folder.glob("tmp*"))
    return message


def test_batches_are_read_once_and_cached(cifar, monkeypatch):
    train_images, test_images = data.cifar10(cifar)
    assert train_images.shape == (5 * FEW, 32, 32, 3) and test_images.shape == (FEW, 32, 32, 3)
    assert list(train_images[::FEW, 0, 0, 0]) == [0, 1, 2, 3, 4] and (test_images == 5).all()
    monkeypatch.setattr(data, "read_batches", None)  # the second start does not go there
    for first, second in zip((train_images, test_images), data.cifar10(cifar), strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_cached_start_imports_no_torch(cifar):
    data.cifar10(cifar)
    code = f"import data, sys; data.CRC32 = {fake_crc32()}; "
    code += f"data.load('cifar10', {str(cifar)!r}, False)"
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
    assert data.cifar10(cifar)[0].shape == (5 * FEW, 32, 32, 3) and tarball.exists()


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


def images_of(folder):
    """CIFAR-10 of `folder` is that of `batches`."""
    train_images, test_images = data.cifar10(folder)
    assert list(train_images[::FEW, 0, 0, 0]) == [0, 1, 2, 3, 4] and (test_images == 5).all()


def pack(folder, monkeypatch):
    """Put the tarball of the batches into `folder` in their place; returns its path."""
    from torchvision.datasets import CIFAR10

    tarball = folder / CIFAR10.filename
    with tarfile.open(tarball, "w:gz", compresslevel=1) as archive:
        archive.add(folder / CIFAR10.base_folder, CIFAR10.base_folder)
    shutil.rmtree(folder / CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(tarball.read_bytes()).hexdigest())
    return tarball


def read_only(folder, monkeypatch):
    """Let nothing be made below `folder`, for root too: as in a container that mounts it so."""

    def wrap(function):
        def call(path, *args, **keys):
            if Path(os.fsdecode(path)).is_relative_to(folder):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return function(path, *args, **keys)

        return call

    real = open

    def opened(path, mode="r", *args, **keys):
        return (wrap(real) if set(mode) & set("wax+") else real)(path, mode, *args, **keys)

    monkeypatch.setattr(os, "mkdir", wrap(os.mkdir))
    monkeypatch.setattr("builtins.open", opened)


@pytest.mark.parametrize("source", ["batches", "tarball"])
def test_a_read_only_data_folder(cifar, monkeypatch, capsys, source):
    """One line says that there is no cache; a tarball is unpacked elsewhere."""
    if source == "tarball":
        pack(cifar, monkeypatch)
    before = sorted(cifar.rglob("*"))
    read_only(cifar, monkeypatch)
    images_of(cifar)
    printed = capsys.readouterr()
    assert printed.out.count("no cache written") == 1 and not printed.err
    assert sorted(cifar.rglob("*")) == before


@pytest.mark.parametrize("below", ["", "new"])
def test_a_read_only_folder_without_data(tmp_path, monkeypatch, capsys, below):
    """Said before 170 MB are fetched for a folder that cannot take them."""
    serve(monkeypatch, "http://127.0.0.1:9/")
    out = tempfile.TemporaryDirectory()
    read_only(tmp_path, monkeypatch)
    with out:
        assert train.main([f"--data_dir={tmp_path / below}", f"--out={out.name}"]) == 1
    printed = capsys.readouterr()
    assert "Read-only" in printed.err and "--data_dir" in printed.err
    assert printed.err.count("\n") == 1 and "fetching" not in printed.out


def test_a_full_disk_takes_no_cache(cifar, monkeypatch, capsys):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    images_of(cifar)
    assert "No space left" in "".join(capsys.readouterr()) and len(list(cifar.iterdir())) == 1


@pytest.mark.parametrize("source", ["batches", "tarball", "network"])
def test_runs_started_together(cifar, monkeypatch, source):
    """Each gets whole images, whatever the others write; one cache is left and nothing else.

    They share a process number, as runs in two containers may.
    """
    tarball = None if source == "batches" else pack(cifar, monkeypatch)
    if source == "network":
        serve(monkeypatch, f"file://{tarball.rename(cifar / 'served')}#")
    meeting, failed = threading.Barrier(4), []
    replace = os.replace

    def wait(*paths):
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(5)  # all have written before the first renames
        replace(*paths)

    def run():
        try:
            images_of(cifar)
        except BaseException as error:  # noqa: B036, BLE001
            failed.append(error)

    monkeypatch.setattr(os, "replace", wait)
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    images_of(cifar)
    left = {"cifar10.npz", "cifar-10-batches-py", "cifar-10-python.tar.gz", "served"}
    assert {p.name for p in cifar.iterdir()} <= left


def spoil(cache, fault):
    """Give an .npz a fault that a disk, a program or a person makes."""
    whole = cache.read_bytes()
    if fault == "flipped":
        cache.write_bytes(whole[:1_000_000] + bytes([whole[1_000_000] ^ 1]) + whole[1_000_001:])
    if fault == "truncated":
        cache.write_bytes(whole[:-1000])
    if fault == "empty":
        cache.write_bytes(b"")
    if fault == "other images":
        images = np.zeros((5 * FEW, 32, 32, 3), np.uint8)
        np.savez(cache, train=images, test=images[:FEW])
    if fault == "other shape":
        np.savez(cache, train=np.zeros((5 * FEW, 3072), np.uint8), test=pictures())
    if fault == "pickle":
        np.savez(cache, train=np.array([pictures], object), test=pictures())
    if fault == "a folder":
        cache.unlink()
        cache.mkdir()


FAULTS = ["flipped", "empty", "other images", "other shape", "pickle", "a folder"]


@pytest.mark.parametrize("fault", ["truncated", "unreadable", *FAULTS])
def test_a_faulty_cache_is_made_anew(cifar, monkeypatch, capsys, fault):
    """Where the batches are there it is only a cache; one line says so."""
    images_of(cifar)
    spoil(cifar / "cifar10.npz", fault)
    with monkeypatch.context() as patch:
        if fault == "unreadable":  # nothing is, for root
            error = PermissionError(errno.EACCES, "Permission denied")
            patch.setattr(np, "load", lambda *args, **keys: (_ for _ in ()).throw(error))
        capsys.readouterr()
        images_of(cifar)
    lines = [x for x in capsys.readouterr().out.splitlines() if "cannot be used" in x]
    assert len(lines) == 1 and str(cifar / "cifar10.npz") in lines[0]
    if fault != "a folder":
        monkeypatch.setattr(data, "read_batches", None)  # the next start does not go there
        images_of(cifar)


@pytest.mark.parametrize("fault", ["truncated", *FAULTS])
def test_a_faulty_cache_alone_is_an_error(cifar, capsys, fault):
    cache = cifar / "cifar10.npz"
    images_of(cifar)
    shutil.rmtree(cifar / "cifar-10-batches-py")
    spoil(cache, fault)
    assert str(cache) in refuse(cifar, capsys) and cache.exists()


@slow
def test_no_flipped_bit_of_a_cache_passes(tmp_path, monkeypatch):
    """Whatever a damaged file makes zipfile and NumPy raise, it is never a set of images."""
    both = pictures(3), pictures(2)
    monkeypatch.setattr(data, "CRC32", tuple(map(zlib.crc32, both)), raising=False)
    np.savez(tmp_path / "whole.npz", train=both[0], test=both[1])
    whole, cache = (tmp_path / "whole.npz").read_bytes(), tmp_path / "cifar10.npz"
    ends = [*range(300), *range(9000, len(whole) - 6144), *range(len(whole) - 400, len(whole))]
    for i in ends:
        cache.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        try:
            found = data.cifar10(tmp_path)
        except data.Stop:
            continue
        for images, right in zip(found, both, strict=True):  # a bit that means nothing
            np.testing.assert_array_equal(images, right)


def test_the_folder_of_the_batches_will_do(cifar, monkeypatch):
    images_of(cifar / "cifar-10-batches-py")
    assert (cifar / "cifar10.npz").exists()  # where the next start finds it, by either name
    monkeypatch.setattr(data, "read_batches", None)
    monkeypatch.chdir(cifar / "cifar-10-batches-py")
    images_of(Path("."))
    images_of(cifar)


def test_tilde_is_the_home(cifar, monkeypatch):
    monkeypatch.setenv("HOME", str(cifar.parent))
    assert len(data.load("cifar10", f"~/{cifar.name}", False).train) == 5 * FEW
    assert (cifar / "cifar10.npz").exists()


def test_a_cache_has_the_mode_that_umask_gives(cifar):
    """Others in a shared folder can read it."""
    before = os.umask(0o022)
    try:
        images_of(cifar)
    finally:
        os.umask(before)
    assert (cifar / "cifar10.npz").stat().st_mode & 0o777 == 0o644


def test_what_takes_seconds_is_said_first(cifar, monkeypatch, capsys):
    """And a reader who went away, as in `| head`, does not end it."""
    pack(cifar, monkeypatch)
    images_of(cifar)
    printed = capsys.readouterr().out
    assert printed.startswith(f"reading CIFAR-10 from {cifar}\nunpacking ")
    (cifar / "cifar10.npz").unlink()
    with (
        contextlib.suppress(OSError),
        open("/dev/full", "w") as gone,
        contextlib.redirect_stdout(gone),
    ):
        images_of(cifar)
    assert (cifar / "cifar10.npz").exists()


def test_a_download(cifar, monkeypatch, capfd):
    """The second server has it. Progress is whole lines; the tarball and the cache are kept."""
    tarball = pack(cifar, monkeypatch)
    serve(monkeypatch, f"file://{tarball.rename(cifar / 'served')}#")
    monkeypatch.setattr(data, "MIRRORS", ("https://127.0.0.1:9/x",))
    images_of(cifar / "new")
    printed = capfd.readouterr()
    assert printed.out.count("fetching") == 2 and "  no: " in printed.out
    assert "\r" not in printed.out and not printed.err and " of 170 MB" in printed.out
    names = [tarball.name, "cifar10.npz"]
    assert sorted(p.name for p in (cifar / "new").iterdir()) == names


REDIRECT = b"HTTP/1.0 302 Found\r\nLocation: ftp:///\r\n\r\n"
FORBIDDEN = b"HTTP/1.0 403 Forbidden\r\n\r\n"


@pytest.mark.parametrize("answer", [b"nonsense\r\n\r\n", b"", FORBIDDEN, REDIRECT])
def test_a_proxy_in_the_way(tmp_path, monkeypatch, capsys, answer):
    """What proxies say instead of a file ends in one sentence; nothing global is left changed."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connection = server.accept()[0]
                    connection.recv(1000)
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=accept, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "")
        serve(monkeypatch, "http://cifar.invalid/")
        assert "could not be downloaded" in refuse(tmp_path / "new", capsys)
    assert not list((tmp_path / "new").iterdir()) and socket.getdefaulttimeout() is None


@pytest.mark.parametrize("proxy", ["http://nowhere:port", "127.0.0.1:9", "http://["])
def test_a_proxy_that_cannot_be(tmp_path, monkeypatch, capsys, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    serve(monkeypatch, "http://cifar.invalid/")
    assert "could not be downloaded" in refuse(tmp_path / "new", capsys)


def test_the_global_timeout_is_left_alone(tmp_path, monkeypatch):
    """The host program's other connections do not change while a download goes on."""
    seen = []
    monkeypatch.setattr(data, "say", lambda text: seen.append(socket.getdefaulttimeout()))
    serve(monkeypatch, "http://127.0.0.1:9/")
    with pytest.raises(data.Stop):
        data.cifar10(tmp_path)
    assert seen and not any(seen)


MINE = {
    "float32 [8, 32, 32, 3] (pixels in [0, 1]: multiply by 255": pictures() / np.float32(255),
    "uint8 [8, 3, 32, 32]": pictures().transpose(0, 3, 1, 2),
    "uint8 [8, 28, 28, 1]": np.zeros((8, 28, 28, 1), np.uint8),
    "uint8 [32, 32, 3]": pictures()[0],
    "uint8 [0, 32, 32, 3]": pictures(0),
    "int64 [8, 32, 32, 3]": pictures().astype(np.int64),
    "uint8 []": np.array(3, np.uint8),
    "list": pictures().tolist(),
    "ArrayImpl": jnp.asarray(pictures()),
}


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("found", MINE)
def test_images_of_ones_own_that_cannot_be_trained_on(tmp_path, monkeypatch, found, part):
    """One sentence names the data set, what it is and what it should be."""
    both = [pictures(), pictures()]
    both[part] = MINE[found]
    monkeypatch.setitem(data.DATASETS, "mine", ("mine", lambda folder: tuple(both)))
    with pytest.raises(data.Stop) as raised:
        data.load("mine", tmp_path, False)
    message = str(raised.value)
    assert "mine" in message and found in message and "uint8 [n, 32, 32, 3]" in message
    assert "\n" not in message and len(message) < 200


def test_images_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(data.DATASETS, "mine", ("mine", lambda folder: (pictures(20), pictures(3))))
    held = data.load("mine", tmp_path, val=True)
    assert (len(held.train), len(held.test), held.split) == (18, 2, "val")
    monkeypatch.setitem(data.DATASETS, "mine", ("mine", lambda folder: (pictures(9), pictures(3))))
    assert len(data.load("mine", tmp_path, val=False).test) == 3
    with pytest.raises(data.Stop, match="--val.* mine .*9 images"):
        data.load("mine", tmp_path, val=True)


BROKEN = {
    "missing": "raise ModuleNotFoundError(\"No module named 'torchvision'\")",
    "for another torch": "raise RuntimeError('operator torchvision::nms\\ndoes not exist')",
    "without its libraries": "raise OSError('libcudart.so.12: cannot open shared object file')",
}


@slow
@pytest.mark.parametrize("fault", BROKEN)
def test_no_torchvision(cifar, tmp_path, fault):
    """One sentence says what to type and what goes without; a cache does."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torchvision.py").write_text(BROKEN[fault])
    code = f"import data; data.CRC32 = {fake_crc32()}\n"
    code += "try: print(len(data.load('cifar10', {!r}, False).test))\n"
    code += "except data.Stop as error: print(error.args[1])"

    def program(folder):
        paths = os.pathsep.join([str(tmp_path / "broken"), str(HERE)])
        command = [sys.executable, "-c", code.format(str(folder))]
        env = {**os.environ, "PYTHONPATH": paths}
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    images_of(cifar)
    assert program(cifar).stdout == f"{FEW}\n"
    (cifar / "cifar10.npz").unlink()
    printed = program(cifar)
    message = printed.stdout.splitlines()[-1]
    assert "pip install" in message and "torchvision" in message and not printed.stderr
    assert "--dataset photo" in message and "cifar10.npz" in message


def test_importing_data_does_nothing_else(tmp_path):
    code = "import data, sys; print({'torch', 'torchvision', 'matplotlib'} & set(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert done.stdout == "set()\n" and not done.stderr and not list(tmp_path.iterdir())


@slow
def test_the_photograph_leaves_matplotlib_as_it_is():
    code = "import data, sys; data.load('photo', '', False); "
    code += "print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, check=False
    )
    assert done.stdout == "False\n", done.stderr


# Slow


@slow
@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_eight_devices_do_what_one_does(tmp_path, preset):
    """The batch split over 8 virtual devices: the same losses up to rounding."""
    flags = ["--dataset=photo", f"--preset={preset}", *TINY_FLAGS, "--steps=4", "--log_every=1"]
    flags += [f"--hidden={model.ROOM}", "--K=32", "--slots=4"] if preset == "fast" else []
    logs = []
    for count in (1, 8):
        out = tmp_path / str(count)
        devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        process = spawn([*flags, f"--out={out}"], tmp_path, env=devices)
        _, error = process.communicate()
        assert process.returncode == 0, error
        logs.append(read_log(out))
    for one, eight in zip(*logs, strict=True):
        for name in ("loss", "bits_per_dim", "commitment_loss", "grad_norm"):
            assert eight[name] == pytest.approx(one[name], rel=1e-3), (one["step"], name)


@slow
def test_killed_ten_times(tmp_path):
    """SIGKILL at ten random moments, also amid a write: the end is that of a run left alone."""
    flags = ["--dataset=photo", "--preset=paper", *TINY_FLAGS, "--steps=400", "--log_every=50"]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    subprocess.run([*PROGRAM, *flags, f"--out={alone}"], check=True, capture_output=True)
    often = [*flags, "--checkpoint_minutes=1e-9"]  # at every step, so that kills fall into writes
    rng, kills = np.random.default_rng(0), 0
    while kills < 10:
        go_on = train.checkpoints(killed) if killed.exists() else []
        command = [f"--resume={killed}"] if go_on else [*often, f"--out={killed}"]
        if not go_on:
            shutil.rmtree(killed, ignore_errors=True)
        process = subprocess.Popen([*PROGRAM, *command], stdout=-3, stderr=-3)
        before = train.checkpoints(killed)
        while process.poll() is None and train.checkpoints(killed) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.wait()
        kills += 1
        assert not (killed / "result.json").exists(), "too fast to be killed: give it more steps"
    subprocess.run([*PROGRAM, f"--resume={killed}"], check=True, capture_output=True)
    equal(alone, killed)
