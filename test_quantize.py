"""Every test of the kit: the mathematics against slow NumPy, known bugs of others, the program.

No network, no GPU. "Guard N": the bug was found in a public VQ-VAE. SLOW=1 runs the slow ones too.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from PIL import Image

import data
import model
import quantize
import train
from model import VQVAE

IMPORTED = set(sys.modules)  # by the scripts alone
HERE = Path(train.__file__).parent
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 runs it")
# Compiling takes most of the time: runs share a cache, and XLA leaves out what it can. Only jaxlib
# 0.10 is sure to know this flag; another may abort.
if jax.__version__.startswith("0.10."):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
CACHE = tempfile.TemporaryDirectory()
SETTINGS = {"jax_compilation_cache_dir": CACHE.name, "jax_disable_most_optimizations": True,
            "jax_persistent_cache_min_compile_time_secs": 0.1, "jax_platforms": "cpu"}  # fmt: skip
for name, value in SETTINGS.items():
    jax.config.update(name, value)
train.UNIGRAM_IMAGES = 300  # all crops of the photograph take a second
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignores them
signal.signal(signal.SIGHUP, signal.SIG_DFL)
equal, close = np.testing.assert_array_equal, np.testing.assert_allclose
TINY = {"size": 8, "hidden": 8, "residual": 4, "blocks": 0, "slots": 2, "K": 16, "D": 4}


def tiny(likelihood="logistic", **changes):
    """Settings of a very small model."""
    return dataclasses.replace(train.Config(), likelihood=likelihood, **{**TINY, **changes})


def filled(build, scale=None, seed=0):
    """The module of build(), with random parameters: its own would have to be compiled."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        width = scale or math.prod(leaf.shape[:-1]) ** -0.5 * (leaf.ndim > 1)
        mean = "scale" in jax.tree_util.keystr(path)
        return jnp.float32(mean + width * rng.normal(size=leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(build))


def make(config, dtype=jnp.float32):
    """A VQVAE with random weights."""
    net = filled(lambda: VQVAE(config, dtype, nnx.Rngs(0)))
    net.codebook[...] = net.quantizer.start(jax.random.key(0), *net.codebook.shape)
    return net


forward = jax.jit(VQVAE.__call__)
prior_logits = jax.jit(lambda prior, x, e: jnp.moveaxis(prior(x, e), 0, 1).reshape(*x.shape, -1))


def pictures(n=8, seed=0):
    """Random uint8 images [n, 8, 8, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


@functools.cache
def photos(n, size):
    """Crops of the photograph, spread over it: uint8 [n, size, size, 3]."""
    images = data.photo(None, size)[0]
    return images[:: len(images) // n][:n]


def named(tree):
    """The leaves of a pytree by their names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def latents(B=2, h=3, w=2, N=3, D=4, K=7, S=3):
    """A random z_e [B, h, w, N, D] and codebook [S, K, D]."""
    rng = np.random.default_rng(0)
    z_e, codebook = rng.normal(size=(B, h, w, N, D)), rng.normal(size=(S, K, D))
    return jnp.float32(z_e), jnp.float32(codebook)


def slow_lookup(z_e, codebook):
    """The definition, in float64."""
    z_e, e = np.float64(z_e), np.float64(codebook)
    e = e[np.arange(z_e.shape[-2]) % len(e)]  # [N, K, D]
    return ((z_e[..., None, :] - e) ** 2).sum(-1).argmin(-1)


def per_code(x, codes, S, K):
    """The sum of x [B, h, w, N, D] over all that chose a code: float64 [S, K, D]."""
    N = codes.shape[-1]
    book = np.eye(S)[np.arange(N) % S]
    return np.einsum("bhwnk,bhwnd,ns->skd", np.eye(K)[codes], np.float64(x), book)


@pytest.mark.parametrize("sizes", [
    {"S": 1}, {"S": 3, "B": 200}, *({"B": n // 64, "h": 8, "w": 8, "K": n} for n in (256, 512)),
], ids=str)  # fmt: skip
def test_lookup_is_the_nearest_code(sizes, monkeypatch):
    """Also with more positions than the 512 that a CPU takes at once, and with as many as codes."""
    z_e, codebook = latents(**sizes)
    forms, right = [quantize.lookup, quantize.lookup_on_cpu], slow_lookup(z_e, codebook)
    # Of a jnp.sum jaxlib 0.10.2 mixes up the axes where positions are as many as codes.
    for find, more in itertools.product(forms, [{}, train.compiler_options()]):
        options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
        codes = jax.jit(find, compiler_options={**options, **more})(z_e, codebook)
        assert codes.dtype == jnp.int32
        equal(codes, right)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(quantize, "lookup_on_cpu", None)
    equal(quantize.lookup_here(z_e, codebook), right)  # a GPU takes the other


@pytest.mark.parametrize("find", [quantize.lookup, quantize.lookup_on_cpu])
def test_lowest_index_wins_a_tie_and_no_array_of_all_differences(find):
    """Nothing as large as [B, h, w, N, K, D] is made, forward or backward."""
    codebook = jnp.array([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 9.0]])
    z_e = jnp.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])[None, None, :, None]
    equal(find(z_e, codebook[None]).ravel(), [1, 1, 0, 2])
    z_e, codebook = latents(K=64, D=32)
    gradient = jax.grad(lambda z, e: sum(map(jnp.sum, quantize.quantize(z, e, find)[::2])), (0, 1))
    program = str(jax.make_jaxpr(gradient)(z_e, codebook))
    largest = max(math.prod(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", program))
    assert z_e.size <= largest <= max(z_e[..., 0].size * 64, codebook.size) < z_e.size * 64 / 10


@pytest.mark.parametrize("S", [1, 3])
def test_embed_usage_and_an_ema_step_by_hand(S):
    """Appendix A.1 in float64, with the codes of the codebook before the step (guards 3, 6)."""
    z_e, codebook = latents(S=S)
    codes = slow_lookup(z_e, codebook)
    equal(quantize.embed(codes, codebook), np.asarray(codebook)[np.arange(3) % S, codes])
    equal(quantize.usage(codes, S, 7), per_code(np.ones(z_e.shape), codes, S, 7)[..., 0])
    step, e, ema = jax.jit(quantize.ema_update), codebook, quantize.ema_init(codebook)
    count, total, codes = np.ones((S, 7, 1)), np.float64(codebook), codes % 6
    n, m = (per_code(x, codes, S, 7) for x in (np.ones(z_e.shape), z_e))
    for gamma in (0.9, 0.9, 1.5e-38):  # guard 7: the unused code neither flies away nor falls to 0
        ema, e = step(ema, e, z_e, codes, gamma)
        count, total = gamma * count + (1 - gamma) * n[..., :1], gamma * total + (1 - gamma) * m
        close(ema.count, count[..., 0], rtol=1e-5, atol=1e-37)
        close(e, total / count, rtol=1e-5, atol=1e-6)
    counts = quantize.usage(np.zeros((2**24 + 3, 1), np.uint8), 1, 2)  # beyond float32's integers
    assert counts.dtype == jnp.int32 and counts.tolist() == [[2**24 + 3, 0]]


@pytest.mark.parametrize("S", [1, 3])
def test_gradients_and_losses_by_hand(S):
    """Guards 1, 2, 4, 5: what moves which way, and how far; z_q is e, its gradient goes to z_e."""
    z_e, codebook = latents(S=S)
    with pytest.raises(ValueError, match=r"\(7, 4\).* not \[S, K, D\].*codebook\[None"):
        quantize.quantize(z_e, codebook[0])
    codes = slow_lookup(z_e, codebook)
    e = np.asarray(codebook)[np.arange(3) % S, codes]
    upstream = jax.random.normal(jax.random.key(1), z_e.shape)

    def losses(z, e, weights):
        q = quantize.quantize(z, e)
        parts = jnp.vdot(upstream, q.z_q), q.codebook_loss, q.commitment_loss
        return jnp.vdot(weights, jnp.stack(parts)), q

    gradients = jax.jit(jax.value_and_grad(losses, (0, 1), has_aux=True))
    pull = 2 * (e - np.asarray(z_e)) / z_e.size
    for through, book, beta in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0.25)]:
        (_, q), grads = gradients(z_e, codebook, jnp.float32([through, book, beta]))
        close(grads[0], through * upstream - beta * pull, rtol=1e-6, atol=1e-7)
        close(grads[1], book * per_code(pull, codes, S, 7), atol=1e-6)
        equal(q.z_q, e)
        equal(q.codes, codes)
        close([q.codebook_loss, q.commitment_loss], np.mean((z_e - e) ** 2), rtol=1e-5)


@pytest.mark.parametrize("S", [1, 3])
def test_restart_moves_vector_sum_and_count(S):
    """Guard 12: onto outputs of their own slot, where they stay at the next step; others stay."""
    z_e, codebook = latents(S=S, B=8)
    count, dead = jnp.tile(jnp.array([5, 0.2, 4, 4, 4, 0, 9]), (S, 1)), np.array([1, 5])
    ema = quantize.EMA(count, codebook * count[..., None])
    part = 0.3 / (z_e[..., 0].size / (S * 7))  # those used less than .3 times
    after, e = jax.jit(quantize.restart)(jax.random.key(0), ema, codebook, z_e, part)
    equal(after.count, count.at[:, dead].set(1))
    equal(after.total, ema.total.at[:, dead].set(e[:, dead]))
    equal(e, codebook.at[:, dead].set(e[:, dead]))
    draw = jax.jit(quantize.random_outputs, static_argnums=(2, 3))
    assert draw(jax.random.key(0), z_e, S, 999).shape == (S, 999, 4)
    for book, drawn in enumerate(np.asarray(draw(jax.random.key(1), z_e, S, 20))):
        pool = np.asarray(z_e)[..., book::S, :].reshape(-1, 4)
        assert (pool == np.vstack([drawn, e[book, dead]])[:, None]).all(-1).any(-1).all()
        assert len(np.unique(drawn, axis=0)) == 20  # no output twice
    codes = jnp.zeros(z_e.shape[:-1], jnp.int32)  # nobody uses codes 1 and 5
    close(quantize.ema_update(after, e, z_e, codes, 0.99)[1][:, dead], e[:, dead], rtol=1e-5)
    equal(quantize.restart(jax.random.key(2), after, e, z_e, 1.0)[1], e)  # nor does one move twice


def test_perplexity_init_and_kmeans():
    """Guard 13: the limit of a codebook is sqrt(3 / D), not sqrt(3 / K)."""
    counts, p = np.zeros((3, 512)) + [[3.0], [0.0], [0.0]], np.array([0.5, 0.3, 0.2])
    counts[1, 7], counts[2, :3] = 9, 10 * p
    close(quantize.perplexity(counts), [512, 1, np.exp(-(p * np.log(p)).sum())], rtol=1e-4)
    e = np.asarray(quantize.init_codebook(jax.random.key(0), 2, 512, 64))
    assert e.shape == (2, 512, 64) and abs(e).max() <= math.sqrt(3 / 64)
    close((e**2).sum(-1).mean(), 1.0, rtol=0.02)
    rng = np.random.default_rng(0)
    centres = np.float32(rng.normal(size=(8, 2)) * 20)  # it begins with several codes on one
    z_e = jnp.array(centres[rng.integers(0, 8, (4, 8, 8, 1))])
    e = quantize.kmeans(jax.random.key(0), z_e, 1, 8, rounds=15)
    close(np.sort(e[0], 0), np.sort(centres, 0), rtol=1e-4)


def test_rotation_against_its_matrix():
    """z_q is exactly e; the gradient is the transpose of |e| / |z| R, R turning z onto e."""
    back = jax.jit(lambda z, e, upstream: jax.vjp(quantize.rotation, z, e)[1](upstream))
    for D in (2, 64):
        z, e, upstream = np.random.default_rng(0).normal(size=(3, D)) * [[0.3], [2], [1]]
        u, v = z / np.linalg.norm(z), e / np.linalg.norm(e)
        A = np.outer(v, u) - np.outer(u, v)
        matrix = (np.eye(D) + A + A @ A / (1 + u @ v)) * np.linalg.norm(e) / np.linalg.norm(z)
        equal(quantize.rotation(jnp.float32(z), jnp.float32(e)), np.float32(e))
        to_z, to_e = back(*map(jnp.float32, (z, e, upstream)))
        close(to_z, matrix.T @ upstream, atol=1e-4 * np.abs(matrix.T @ upstream).max())
        equal(to_e, 0)  # as with straight-through
    ends = np.float32([(0, 1), (1, 0), (0, 0), (1, -1), (1, 1), (1e-20, 1), (1, 1e-20)])
    z, e = ends.T[..., None] * np.ones(64, np.float32)  # no angle
    equal(quantize.rotation(z, e), e)
    assert np.isfinite(back(z, e, e)).all()


def test_fsq_is_the_nearest_point_of_a_grid():
    """L equally spaced points along each dimension."""
    fsq = quantize.QUANTIZERS["fsq"]
    for L, D in [(2, 4), (3, 3), (5, 2), (16, 1)]:
        grid = fsq.start(None, 2, L**D, D)
        points = list(itertools.product((np.arange(L) + 0.5) / L * 2 - 1, repeat=D))
        close(grid, [points, points], atol=1e-6)
        z_e = np.random.default_rng(0).uniform(-1.3, 1.3, (5, 4, 3, 2, D)).astype(np.float32)
        equal(jax.jit(fsq.search)(z_e, grid), slow_lookup(z_e, grid))
    for K, fits in {7: "1", 16: "1 or 2 or 4", 512: "1 or 3 or 9", 1000: "1 or 3"}.items():
        for D in range(1, 20):
            wrong, good = fsq.wrong_sizes(K, D), str(D) in fits.split(" or ")
            assert wrong == "" if good else wrong.endswith(f"--K {K} give --D {fits}")


@pytest.mark.parametrize("mine, stock", [(model.Down, nnx.Conv), (model.Up, nnx.ConvTranspose)])
def test_strided_layers_are_the_stock_layers(mine, stock):
    """The same weights, results and gradients."""
    layers = [kind(5, 6, (4, 4), 2, dtype=jnp.float32, rngs=nnx.Rngs(0)) for kind in (mine, stock)]
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 5))

    def loss(layer, x):
        layer.bias[...] = jnp.arange(6.0)
        y = layer(x)
        return (y * jnp.sin(jnp.arange(y.size).reshape(y.shape))).sum(), y

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    ((_, y), grads), ((_, expected), wanted) = gradient(layers[0], x), gradient(layers[1], x)
    close(y, expected, atol=1e-5)
    for found, right in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        close(found, right, atol=1e-4)


def test_parameter_counts_and_no_shared_blocks():
    """Window x inputs x outputs + biases, and codebooks. Guard 9. A whole number does as clip."""
    counts = {"notebook": 662_723, "fast": 1_056_214, "full": 1_865_558, "paper": 8_208_768}
    for (preset, layers), shared in itertools.product(counts.items(), [False, True]):
        config = train.check(train.Config(**{**train.PRESETS[preset], "shared": shared, "clip": 9}))
        books, made = (1 if shared else config.slots) * config.K * config.D, []
        jax.eval_shape(lambda c=config, made=made: made.append(VQVAE(c, jnp.float32, nnx.Rngs(0))))
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made)) == layers + books
        for side in (made[0].encoder, made[0].decoder):
            assert side.blocks[-1].conv is not side.blocks[-2].conv


@pytest.mark.parametrize("quantizer", quantize.QUANTIZERS)
def test_ways_through_a_model_agree(quantizer):
    """Under jit as an argument, closed over, and closed over with arrays of NumPy."""
    net, images = make(tiny(quantizer=quantizer)), pictures()
    outputs, z_e, q = forward(net, images)
    means = np.float64(model.logistic(outputs, images, 1.0)[1])

    def ways(net, images, codes):
        encoded = net.encode(images), net.to_codes(images)
        return *encoded, net.from_codes(codes), net.to_images(codes)

    numpy_net, codes = jax.tree.map(np.asarray, net), np.asarray(q.codes, np.uint16)
    closed = [lambda *inputs, net=net: ways(net, *inputs) for net in (net, numpy_net)]
    for way in (functools.partial(jax.jit(ways), net), *map(jax.jit, closed)):
        encoded, found, decoded, shown = way(images, codes)
        close(encoded, z_e, atol=1e-6)
        equal(found, q.codes)
        close(decoded, outputs, atol=1e-5)
        assert shown.dtype == jnp.uint8 and np.abs(shown - means).max() <= 0.501
    for x in (images / 255.0, images[..., :1], images[0], np.int32(images), images[:, :4]):
        for door in (VQVAE.encode, VQVAE.to_codes, VQVAE.__call__):
            with pytest.raises(ValueError, match=r"must be uint8 \[B, 8, 8, 3\], 0 to 255,"):
                door(net, x)
    half = make(tiny(quantizer=quantizer), jnp.bfloat16)  # guard 14: what stays float32
    outputs, z_half, q = forward(half, images)
    arrays = outputs, z_half, q.z_q, q.codebook_loss, q.commitment_loss, *jax.tree.leaves(half)
    assert {x.dtype for x in arrays} == {jnp.dtype("float32")}
    assert 0 < np.abs(z_half - z_e).max() < 0.05
    equal(q.codes, slow_lookup(z_half, half.codebook[...]))  # at full precision


@pytest.mark.parametrize("name, row", model.LIKELIHOODS.items())
def test_likelihoods(name, row):
    """Sums to one, finite far out, and against float64. Guard 10: the scale of pixels."""
    loss = jax.jit(row.loss)
    values = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1).repeat(3, -1)
    outputs = np.r_[-8, 0.3, 8, np.random.default_rng(0).normal(size=row.outputs - 3) * 0.4]
    whole = np.float32(outputs) * np.ones((256, 1, 1, 1), np.float32)
    colours = np.uint8(np.eye(3))  # one alone at a time: a row that mixes them up would show
    nll = sum(np.float64(loss(whole, values * i, 1.0)[0][:, 0, 0]) * i for i in colours)  # [256, 3]
    for far in (30 * whole, -30 * whole, whole * 0 + 30):
        total = jax.value_and_grad(lambda x: loss(x, values, 0.06)[0].sum())(far)
        assert all(np.isfinite(x).all() for x in total)
    if row.is_log_prob:
        close(np.exp(-nll).sum(0), 1.0, rtol=1e-5)
    if name == "categorical":
        logits = outputs.reshape(3, 256).T
        close(nll, np.log(np.exp(logits).sum(0)) - logits, rtol=1e-5)
        nll, shown = loss(whole * 0, values, 1.0)
        close([nll / math.log(2), shown], [nll * 0 + 8, nll * 0 + 127.5], rtol=1e-5)
    if name == "logistic":  # from the tail that does not cancel, at 0, at 255 and between
        mean, scale = 127.5 + 16 * outputs[:3], 16 * np.exp(outputs[3:])
        edges = np.concatenate([[-np.inf], np.arange(255) + 0.5, [np.inf]])[:, None]
        below, above = (1 / (1 + np.exp(sign * (edges - mean) / scale)) for sign in (-1, 1))
        p = np.where(values[:, 0, 0] < mean, np.diff(below, axis=0), -np.diff(above, axis=0))
        close(nll, -np.log(p), rtol=2e-4)
    if name == "gaussian":
        variance = data.Dataset(values, values, "", "test").variance()
        assert variance == pytest.approx((values / 255).var(), rel=1e-6)
        close(loss(whole * 0, values, variance)[0].mean(), 1, rtol=1e-5)


# The start


def test_waterfill_and_assign_to_slots():
    """Against the closed form; a direction goes to the slot with fewest bits that has room."""
    rng = np.random.default_rng(0)
    for bits in (0.5, 8, 90, 600):
        variance = np.sort(np.exp(rng.normal(size=48) * 3))[::-1]
        share = model.waterfill(variance, bits)
        number = np.arange(1, 49)
        levels = np.exp((np.log(variance).cumsum() - 2 * bits * np.log(2)) / number)
        level = levels[np.flatnonzero(variance > levels)[-1]]  # as many as are all above it
        close(variance * 4.0**-share, np.minimum(variance, level), rtol=1e-6)
    for N, D, k in [(3, 4, 12), (3, 4, 7), (4, 1, 9), (1, 5, 3), (10, 8, 48)]:
        share, bits, used = np.sort(rng.exponential(size=k))[::-1], [0.0] * N, [0] * N
        places = model.assign_to_slots(share, N, D)
        for row, s in zip(places, share[: N * D], strict=True):
            slot = min((n for n in range(N) if used[n] < D), key=lambda n: bits[n])
            equal(row, np.eye(N * D)[slot * D + used[slot]])
            bits[slot], used[slot] = bits[slot] + s, used[slot] + 1


@pytest.mark.parametrize("changes", [
    {"size": 32, "slots": 5, "D": 8, "K": 32}, {"likelihood": "categorical", "blocks": 0},
    {"likelihood": "gaussian", "net": "deepmind", "blocks": 2, "shared": True},
], ids=str)  # fmt: skip
def test_the_start_is_the_projection_of_patches(changes, monkeypatch):
    """decode(encode(x)), not quantised, at step 0: computed anew with NumPy. And what it wrote."""
    config = tiny(**{"hidden": model.MIN_HIDDEN, "size": 16, "blocks": 1, **changes})
    row, softmax = model.LIKELIHOODS[config.likelihood], config.likelihood == "categorical"
    if not softmax:  # its width depends on what the codes leave
        monkeypatch.setattr(quantize, "kmeans", lambda key, z, S, K: jnp.zeros((S, K, config.D)))
    images, net, stock = photos(100, config.size), make(config), named(make(config))
    model.pca_start(net, images, jax.random.key(0))
    h, mean = config.size // 4, images.mean((0, 1, 2))
    patches = ((images - mean) / 16).reshape(100, h, 4, h, 4, 3).swapaxes(2, 3).reshape(-1, 48)
    _, singular, vectors = np.linalg.svd(patches, full_matrices=False)
    share = model.waterfill(singular**2 / len(patches), config.slots * math.log2(config.K))
    k = min((share > 0).sum(), config.slots * config.D)
    kept = (patches @ vectors[:k].T @ vectors[:k]).reshape(100, h, h, 4, 4, 3).swapaxes(2, 3)
    expected = kept.reshape(images.shape)[:20] * 16 + mean
    assert np.square(expected - images[:20]).mean() > 1  # directions were left out
    shown = jax.jit(lambda net, x: row.loss(net.decode(net.encode(x)), x, 1.0)[1])(net, images[:20])
    inside = np.abs(expected - 127.5) < (70 if softmax else 999)  # its mean moves near 0 and 255
    expected = np.clip(expected, 0, 255)[inside]
    close(np.asarray(shown)[inside], expected, atol=1 if softmax else 0.02)
    written = {
        "encoder.down": 24, "encoder.down_again": 2 * k, "encoder.to_z": config.slots * config.D,
        "encoder.blocks[0].layers[1]": 2 * k,  # DeepMind's alone
        "decoder.from_z": 2 * k, "decoder.up": 24, "decoder.up_again": row.outputs,
    }  # fmt: skip
    for name, leaf in named(net).items():  # channels that carry nothing keep their stock weights
        if name.endswith(".back.kernel.value"):
            assert not leaf.any()
        elif name.endswith(".kernel.value"):
            moved = (leaf != stock[name]).reshape(-1, leaf.shape[-1]).any(0).nonzero()[0]
            equal(moved, range(written.get(name[1:-13], 0)), err_msg=name)


@pytest.mark.parametrize("changes, black", [
    ({}, False), ({}, True), *(({"K": 512, "D": 9, "quantizer": "fsq"}, b) for b in (False, True)),
], ids=str)  # fmt: skip
def test_the_start_is_far_below_stock_weights(changes, black):
    """And finite where nothing varies: all-black images, a grid of two levels."""
    config = tiny(**{"hidden": model.MIN_HIDDEN, "size": 16, "slots": 4, "K": 32, **changes})
    net, images, bits = make(config), photos(100, 16) * (not black), []
    for _ in range(2):
        outputs = forward(net, images)[0]
        nll = model.LIKELIHOODS[config.likelihood].loss(outputs, images, 1.0)[0]
        bits.append(float(nll.mean()) / math.log(2))
        model.pca_start(net, images, jax.random.key(0))
    assert bits[1] < min(bits[0] - 1, 7.5), bits
    assert all(np.isfinite(leaf).all() for leaf in named(net).values())


@functools.cache
def stepped(**changes):
    """A step from random weights: settings, the states before and after, metrics, the step."""
    config = tiny(**changes)
    net, step = make(config), jax.jit(train.make_train_step(config, 0.06))
    ema = quantize.ema_init(net.codebook[...]) if config.codebook == "ema" else ()
    state = train.TrainState(jnp.int32(0), net, train.make_optimizer(config).init(net), ema)
    return config, state, *step(state, pictures()), step


@pytest.mark.parametrize("case", ["mine gradient", "mine ema", "fsq ema"])
def test_a_step_by_hand(case, monkeypatch):
    """Guards 1, 2, 3, 4, 6. With a row of one's own; every parameter learns."""
    bound, extra = lambda z, e: 0.5 * z + e.mean(), lambda z, e: 3 * jnp.mean(z**2) + jnp.mean(e**2)
    mine, (quantizer, codebook) = quantize.Quantizer(bound=bound, extra_loss=extra), case.split()
    monkeypatch.setitem(quantize.QUANTIZERS, "mine", mine)
    assert train.wrong_together(tiny(quantizer="mine", init="pca", hidden=96))[-1][1]  # its bound
    net = {"net": "deepmind", "blocks": 2} if codebook == "gradient" else {}
    _, state, after, metrics, _ = stepped(quantizer=quantizer, codebook=codebook, **net)
    learns, old, sg = quantizer == "mine", state.model.codebook[...], jax.lax.stop_gradient

    def loss(net):
        z_e, e = net.encoder(pictures() / 255 - 0.5).reshape(8, 2, 2, 2, 4), net.codebook[...]
        z_e = bound(z_e, sg(e)) if learns else jnp.tanh(z_e)  # neither moves the codebook
        codes = quantize.lookup(z_e, e)
        e = quantize.embed(codes, e)
        nll = model.logistic(net.decode(z_e + sg(e - z_e)), pictures(), 1.0)[0].mean()
        mean_extra = learns * extra(z_e, sg(net.codebook[...]))
        total = nll + 0.25 * jnp.mean((z_e - sg(e)) ** 2) + mean_extra
        by_gradient = learns and codebook == "gradient"
        return total + by_gradient * jnp.mean((sg(z_e) - e) ** 2), (z_e, codes, nll)

    (total, (z_e, codes, nll)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.model)
    close(metrics["loss"], total, rtol=1e-5)
    close(metrics["bits_per_dim"], nll / math.log(2) + 8 * 4 / 192, rtol=1e-5)
    close(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    if learns and codebook == "ema":  # to where the codes of the old codebook say
        ema, e = quantize.ema_update(state.ema, old, z_e, codes, 0.99)
        close(after.model.codebook[...], e, atol=1e-6)
        close(after.ema.count, ema.count, rtol=1e-5)
        after.model.codebook[...] = old
    moved = named(jax.tree.map(jnp.subtract, after.model, state.model))
    for name, grad in named(grads).items():
        large = np.abs(grad) > 1e-5  # Adam's first step is the rate, against the gradient
        close(moved[name][large], -2e-4 * np.sign(grad[large]), rtol=0.02, err_msg=name)
        assert large.any() or not moved[name].any() and "codebook" in name, name


def test_learning_rate_and_clip():
    """Adam's first step of a lone parameter is the rate; its average holds the clipped gradient."""
    rising, one = [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], jnp.array([0.6, 0.8])
    for changes, rates in [({}, [1] * 10), ({"steps": 10, "warmup": 4, "decay": 0.5}, rising)]:
        optimizer = train.make_optimizer(tiny(lr=1.0, **changes))
        update, state = jax.jit(optimizer.update), optimizer.init(one)
        for rate in rates:
            step, state = update(one, state)
            close(step, [-rate] * 2, rtol=1e-4)
    for clip, length, norm in [(1e9, 10, 10), (5.0, 10, 5), (5.0, 1, 1)]:
        optimizer = train.make_optimizer(tiny(clip=clip))
        state = optimizer.update(length * one, optimizer.init(one))[1]
        close(optax.tree.get(state, "mu"), 0.1 * norm * one, rtol=1e-5)


@slow
def test_many_steps_in_one_launch_are_the_same_steps():
    """Launches of one step, as on a CPU, and one of three, as on a GPU, against the steps alone."""
    config, start, _, _, step = stepped(flip=True)
    images, index, losses, expected = pictures(20), data.order(0, 20, 8, 0, 3), [], start
    for i in index:
        expected, metrics = step(expected, images[i])
        losses.append(metrics["loss"])
    for count in (1, 3):
        leaves, tree = jax.tree.flatten(jax.tree.map(jnp.copy, start))  # a launch donates its own
        launch, found = train.make_launch(train.make_train_step(config, 0.06), tree), []
        for part in jnp.array(index).reshape(-1, count, 8):
            leaves, metrics = launch(leaves, jnp.array(images), part)
            found.extend(metrics["loss"])
        close(found, losses, rtol=1e-4)
        for found, wanted in zip(leaves, jax.tree.leaves(expected), strict=True):
            close(found, wanted, atol=1e-4)


@pytest.mark.parametrize("likelihood", ["logistic", pytest.param("gaussian", marks=slow)])
def test_evaluation_by_hand_over_every_image(likelihood, monkeypatch):
    """Guards 8, 11, 16: every image, nothing changed; the step, which saw eight, says the same."""
    monkeypatch.setattr(train, "UNIGRAM_IMAGES", 20)
    config, state, _, metrics, _ = stepped(likelihood=likelihood)
    dataset = data.Dataset(pictures(137, 1), pictures(137), "noise", "test")
    first, before = forward(state.model, dataset.train)[2].codes[:20], named(state.model)
    settings = dataclasses.replace(train.PriorConfig(), width=16, layers=0)
    prior = train.new_prior(settings, config, first).model  # untrained, it is the unigram prior
    measured, codes = train.evaluate(state.model, dataset, prior)
    jax.tree.map(equal, before, named(state.model))
    row, (outputs, _, q) = model.LIKELIHOODS[likelihood], forward(state.model, dataset.test)
    nll, mean = map(np.float64, row.loss(outputs, dataset.test, 0.06))
    equal(codes, q.codes)
    entropies, unigram = [], 0.0
    columns = np.reshape(codes, (-1, 2)).T, np.reshape(first, (-1, 2)).T
    for mine, seen in zip(*columns, strict=True):
        share = np.bincount(seen, minlength=16) + 1.0  # of training codes, one added to each
        unigram -= np.log2(share / share.sum())[mine].sum() / 137 / 192
        p = np.bincount(mine, minlength=16) / len(mine)
        entropies.append(-(p[p > 0] * np.log(p[p > 0])).sum())
    mse = ((mean - dataset.test) ** 2).mean() / 255**2
    bits = nll.mean() / math.log(2) if likelihood == "logistic" else np.nan
    for name, right in {
        "code_bits_per_dim": 8 * 4 / 192, "code_bits_per_dim_unigram": unigram,
        "code_bits_per_dim_prior": unigram, "mse": mse, "psnr": 10 * math.log10(1 / mse),
        "nmse": mse / (dataset.train / 255).var(), "perplexity": math.exp(np.mean(entropies)),
        "codes_used": sum(len(np.unique(codes[..., n])) for n in range(2)),
        "bits_per_dim": bits + 8 * 4 / 192, "bits_per_dim_unigram": bits + unigram,
        "bits_per_dim_prior": bits + unigram,
    }.items():  # fmt: skip
        close(np.float64(measured[name]), right, rtol=1e-4, err_msg=name)  # None becomes nan
    right = {"bits_per_dim": nll[:8].mean() / math.log(2) + 8 * 4 / 192, "nmse": nll[:8].mean()}
    close(*np.transpose([(metrics[k], v) for k, v in right.items() if k in metrics]), rtol=1e-5)
    wrong = row._replace(loss=lambda *args: (row.loss(*args)[0].sum(-1), row.loss(*args)[1]))
    monkeypatch.setitem(model.LIKELIHOODS, likelihood, wrong)
    with pytest.raises(SystemExit, match=f"--likelihood {likelihood} gives"):
        jax.eval_shape(train.make_train_step(config, 0.06), state, pictures())
    with pytest.raises(SystemExit, match=f"--likelihood {likelihood} gives"):
        train.evaluate(state.model, dataset)


def test_order_of_the_images():
    """Guard 15: each epoch is a new permutation, nothing is dropped, any step can be asked for."""
    stream = data.order(seed=3, n=50, batch=16, step=0, count=10).ravel()
    epochs = [tuple(stream[i : i + 50]) for i in (0, 50, 100)]
    assert len({*epochs, tuple(data.order(4, 50, 50, 0, 1)[0])}) == 4
    assert all(sorted(epoch) == [*range(50)] for epoch in epochs)
    equal(data.order(3, 50, 16, 7, 2).ravel(), stream[112:144])


# The prior over codes


def small_prior(K, shape, seed=0, layers=2, dtype=jnp.float32, S=None, D=3):
    """A prior with random parameters (its head starts at zero), and a codebook [S, K, D]."""
    config = train.PriorConfig(width=16, layers=layers, head_layers=2, heads=2)
    prior = filled(lambda: model.Prior(config, shape, K, D, dtype, nnx.Rngs(0)), 0.3, seed)
    return prior, jax.random.normal(jax.random.key(seed), (S or shape[-1], K, D))


def test_a_code_sees_only_earlier_codes():
    """Bit for bit; h and w differ, so that a mix-up of rows and columns would show."""
    n, (prior, codebook) = 12, small_prior(5, (2, 3, 2))
    codes = np.random.default_rng(0).integers(0, 5, n)
    changed = np.vstack([codes, (codes + np.eye(n, dtype=int)) % 5])  # code i, in line 1 + i
    logits = prior_logits(prior, changed.reshape(-1, 2, 3, 2), codebook).reshape(n + 1, n, 5)
    equal((logits[1:] == logits[0]).all(-1), np.tril(np.ones((n, n), bool)))  # later codes see it


@pytest.mark.parametrize("S, N, D", [(1, 1, 1), (1, 3, 64), (2, 2, 8)])
def test_sizes_of_codebooks_and_codes_above_255(S, N, D):
    K, codes = 512, np.random.default_rng(0).integers(256, 512, (2, 3, 4, N))
    prior, codebook = small_prior(K, (3, 4, N), S=S, D=D, layers=0)
    codebook = codebook.at[..., 0].set(4.0) if D == 8 else codebook  # a dimension without spread
    three = codes, codes - 256, codes * 0
    logits, lower, zero = (prior_logits(prior, x, codebook) for x in three)
    assert logits.shape == (*codes.shape, K) and logits.dtype == jnp.float32
    assert not np.allclose(lower[:, 0, 1], logits[:, 0, 1])
    if D == 8:
        equal(prior_logits(prior, codes.astype(np.uint16), codebook), logits)
    e, features = model.code_features(codebook, N)
    assert e.shape == (N, K, D) and features.shape == (N, K, D + (D * (D + 1) // 2 if D < 9 else D))
    assert np.abs(features).max() < 1e3 and (D != 8 or np.abs(e[..., 0]).max() < 1e-3)
    inner = np.round(zero[0, 1:, 1:-1, 0].reshape(4, K), 4)
    assert len(np.unique(inner, axis=0)) == 4  # told apart by row and column alone


def test_samples_follow_the_model():
    """All 3^6 fields are listed: they sum to one, and samples have their frequencies."""
    prior, codebook = small_prior(3, (1, 3, 2), seed=3, layers=1)
    every = jnp.array(list(itertools.product(range(3), repeat=6))).reshape(-1, 1, 3, 2)
    p = np.exp(-np.float64(jax.jit(model.Prior.nll)(prior, every, codebook).sum((1, 2, 3))))
    close(p.sum(), 1, atol=1e-5)
    codes = model.sample_codes(prior, codebook, jax.random.key(1), (4000, 1, 3, 2))
    assert codes.dtype == jnp.int32 and codes.shape == (4000, 1, 3, 2)
    drawn = np.bincount(codes.reshape(-1, 6) @ 3 ** np.arange(5, -1, -1), minlength=729) / 4000
    expected = 0.5 * np.sum(np.sqrt(p * (1 - p) / 4000) * (2 / np.pi) ** 0.5)  # of the distance
    assert 0.5 * np.abs(drawn - p).sum() < 1.2 * expected


def test_cold_samples_are_the_likeliest_and_samples_follow_the_key():
    shape = 3, 2, 3, 2
    prior, codebook = small_prior(5, shape[1:], seed=2, layers=1)
    codes = model.sample_codes(prior, codebook, jax.random.key(0), shape, 1e-4)
    logits = prior_logits(prior, codes, codebook)
    equal(codes, logits.argmax(-1))
    a, b = (model.sample_codes(prior, codebook, jax.random.key(s), shape) for s in (1, 2))
    assert (a != b).mean() > 0.3 and len(np.unique(a.reshape(3, -1), axis=0)) == 3
    half = prior_logits(small_prior(5, shape[1:], 2, 1, jnp.bfloat16)[0], codes, codebook)
    assert half.dtype == jnp.float32 and 0 < np.abs(half - logits).max() < 0.3


@slow
def test_learns_structure_and_invents_none():
    """Rows of one code, but for every tenth; then the same codes shuffled."""
    config = dataclasses.replace(train.PriorConfig(), width=32, layers=1, heads=2, lr=1e-2)
    net, rng = make(tiny(size=12, K=8, D=2)), np.random.default_rng(0)
    step = jax.jit(train.make_prior_step(config, net))
    rows, noise = rng.integers(0, 8, (4000, 3, 1, 1)), rng.integers(0, 8, (4000, 3, 3, 2))
    codes = np.where(rng.random(noise.shape) < 0.1, noise, rows)
    for seen, low, high in [(codes, 0, 0.6), (rng.permuted(codes, axis=0), 0.99, 1.03)]:
        state, bits = train.new_prior(config, net.config, seen[200:]), []
        for _ in range(80):
            bits.append(step(state, seen[:200])[1]["code_bits_per_dim_prior"])  # of held-out codes
            state, _ = step(state, seen[200:][rng.choice(3800, 200)])
        assert low < bits[-1] / bits[0] < high


# The program

TINY_FLAGS = shlex.split("""--dataset photo --preset paper --likelihood logistic --hidden 8
    --residual 4 --slots 2 --K 16 --D 4 --blocks 1 --batch 8 --steps 6 --log_every 3""")
PRIOR = shlex.split("--width 8 --layers 1 --heads 2 --batch 8 --steps 6 --log_every 3 --count 4")


def go(*words, draw=False):
    """The program in this process; draw: with its pictures, which take longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **style: None)
        train.main([*map(str, words)])


def refused(*words):
    """The one sentence with which it ends, with exit code 1."""
    with pytest.raises(SystemExit) as end:
        go(*words)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code, end.value.code
    return end.value.code


def run(folder, *words, before=(), env=(), code=0, **streams):
    """The program as a process of its own, in `folder`: what it prints, or its error.

    before: words that come before its command line.
    """
    settings = {name.upper(): str(value) for name, value in SETTINGS.items()}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **streams}
    command = [*before, sys.executable, HERE / "train.py", *map(str, words)]
    env = {**os.environ, "COLUMNS": "80", "TERM": "xterm", **settings, **dict(env)}
    done = subprocess.run(command, check=False, cwd=folder, env=env, **streams)
    assert done.returncode == code and "Traceback" not in str(done.stderr), done.stderr
    return done.stderr if code else done.stdout


def process_at_step_4(act):
    """What comes before the command line of a process that is to `act` after its fourth step."""
    text = """if 1:
        import os, runpy, sys
        sys.argv = sys.argv[2:]
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        import data
        order = data.order
        data.order = lambda *args: (args[3] == 4 and ACT) or order(*args)
        runpy.run_path(sys.argv[0], run_name="__main__")"""
    return sys.executable, "-c", text.replace("ACT", act)


def at_step(patch, act, step=4):
    """Have the next run here call `act()` once, after this step."""
    order, todo = data.order, [act]
    patch.setattr(data, "order", lambda *args: (
        args[3] >= step and todo and todo.pop()(), order(*args))[1])  # fmt: skip


def send(*numbers):
    """A function that sends this process signals."""
    return lambda *args: [os.kill(os.getpid(), number) for number in numbers]


def read(file):
    """The row or the settings in a file; of log.jsonl a list of its lines."""
    text = file.read_text()
    return [*map(json.loads, text.splitlines())] if file.suffix == ".jsonl" else json.loads(text)


def same_run(one, other):
    """Two runs ended alike, bit for bit."""
    jax.tree.map(equal, *[named(train.load(folder)[1]) for folder in (one, other)])
    rows = [read(folder / "result.json") for folder in (one, other)]
    for name in rows[0]:
        if not re.search("command|out|dir|minutes|seconds|ms_per_step|date|unigram", name):
            assert rows[0][name] == rows[1][name], name


def files(folder):
    """All below a folder, with the time of the last change."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run and its prior, left alone, in a folder that was there, but empty; read only."""
    out = tmp_path_factory.mktemp("finished")
    go(*TINY_FLAGS, "--out", out, draw=True)
    go("prior", out, *PRIOR)
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of them, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "copied")


def test_the_program_from_beginning_to_end(finished, tmp_path, capsys):
    """Train, Ctrl-C, resume, eval, prior, sample, as from a shell: ends as a run left alone."""
    made, stop = tmp_path / "runs" / "paper-1", process_at_step_4("os.kill(os.getpid(), 2)")
    error = run(tmp_path, *TINY_FLAGS, before=stop, code=1)
    assert error.startswith("stopped after step 5: ") and error.count("\n") == 1
    assert "python train.py resume runs/paper-1" in error
    assert not {"result.json", "params.msgpack"} & set(os.listdir(made))

    tty = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    seen = run(tmp_path, "resume", "runs/paper-1", before=(sys.executable, "-c", tty))
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen))
    assert max(map(len, lines)) <= 79 and any("6/6" in line for line in lines)
    assert any("measuring" in line and "100%" in line for line in lines)
    same_run(finished, made)

    result, config = read(made / "result.json"), read(made / "config.json")
    assert set(config) == {field.name for field in train.dataclasses.fields(train.Config)}
    assert config == {name: result[name] for name in config} and config["K"] == 16
    assert result["title"] == "photo (not CIFAR-10)" and result["split"] == "test"
    assert result["command"].endswith("train.py resume runs/paper-1")
    assert result["commit"] == train.commit() and result["train_seconds"] > 0
    assert {"device", "versions", "date"} <= set(result)
    assert [line["step"] for line in read(made / "log.jsonl")] == [3, 5, 6]

    (made / "log.jsonl").unlink()  # the model's file has it too
    run(tmp_path, "eval", made)
    again = read(made / "eval.json")
    for name in ("bits_per_dim", "bits_per_dim_unigram", "mse", "perplexity", "codes_used"):
        assert again[name] == pytest.approx(result[name], rel=1e-6), name
    capsys.readouterr()
    go("prior", made, *PRIOR, draw=True)
    printed = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 79 or str(tmp_path) in line for line in printed)
    prior = read(made / "prior" / "result.json")
    assert prior["width"] == 8 and prior["bits_per_dim_prior"] < prior["bits_per_dim"]
    before = files(made)
    for n in (4, 9):
        go("sample", made, f"--count={n}", "--seed=3", draw=True)
    after = files(made)
    assert before == {file: after[file] for file in before}  # nothing is overwritten
    samples = {f"samples-count{n}-seed3-temperature1.png" for n in (4, 9)}
    assert {file.name for file in set(after) - set(before)} == samples
    for name in ("result", "prior/samples", "prior/samples-count9-seed3-temperature1"):
        assert np.asarray(Image.open(made / f"{name}.png")).std() > 1
    assert not list(tmp_path.rglob(".*"))


def test_in_a_thread_beside_another_run(finished, tmp_path, monkeypatch):
    """Another process claimed runs/paper-1 a moment ago; the same seed gives the same numbers."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "runs" / "paper-1" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text("its own")
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(()))  # all folders still look empty
    thread = threading.Thread(target=go, args=TINY_FLAGS)
    thread.start()
    thread.join()
    same_run(finished, tmp_path / "runs" / "paper-2")
    assert config.read_text() == "its own"


@pytest.mark.parametrize("number, prior", [
    (signal.SIGUSR1, False), (signal.SIGTERM, True),
    *[pytest.param(x, False, marks=slow) for x in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)],
])  # fmt: skip
def test_stopped_moved_and_resumed(finished, tmp_path, monkeypatch, number, prior):
    """A signal between two lines of the log saves; the resumed run ends as one left alone."""
    folder, handler = tmp_path / "run", signal.getsignal(number)
    if prior:
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("prior"))
    with monkeypatch.context() as patch:
        at_step(patch, send(number))
        said = refused(*(["prior", folder, *PRIOR] if prior else [*TINY_FLAGS, "--out", folder]))
    assert "stopped after step 5" in said and f"resume {folder}" in said
    assert signal.getsignal(number) is handler
    part = "prior" if prior else "."
    monkeypatch.chdir(folder.rename(tmp_path / "moved") / part)
    go("resume", ".")
    same_run(finished / part, Path())


@pytest.mark.parametrize("when", ["twice", "measuring"])
def test_ended_at_once(finished, tmp_path, monkeypatch, when):
    """Ctrl-C twice waits for no checkpoint. While measuring, it loses nothing."""
    with monkeypatch.context() as patch:
        if when == "twice":
            at_step(patch, send(signal.SIGINT, signal.SIGINT))
        patch.setattr(train, "evaluate", send(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            go(*TINY_FLAGS, "--out", tmp_path)
    assert (tmp_path / "checkpoint.msgpack").exists() == (when == "measuring")
    if when == "measuring":
        go("resume", tmp_path)
        same_run(finished, tmp_path)


@slow
def test_under_nohup_it_outlives_its_terminal(finished, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, send(signal.SIGHUP))
    go(*TINY_FLAGS, "--out", tmp_path)
    signal.signal(signal.SIGHUP, before)
    same_run(finished, tmp_path)


@slow
def test_killed_hard(finished, tmp_path):
    """After a checkpoint, with no chance to say good-bye."""
    flags = [*TINY_FLAGS, "--out", tmp_path / "run", "--checkpoint_minutes=1e-9"]
    run(tmp_path, *flags, before=process_at_step_4("os._exit(9)"), code=9)
    go("resume", tmp_path / "run")
    assert [line["step"] for line in read(tmp_path / "run" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    same_run(finished, tmp_path / "run")


def test_paths_hold_from_anywhere(finished, tmp_path, monkeypatch):
    """Guard: `eval` from another folder would fetch CIFAR-10 into a new one there."""
    random_pictures(tmp_path / "pictures", 24)
    monkeypatch.chdir(tmp_path)
    size = 64 if os.environ.get("SLOW") else 16
    go(*TINY_FLAGS, "--dataset=folder", "--data_dir=pictures", "--out=run", f"--size={size}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    go("eval", "~/run")
    row, again = (read(tmp_path / "run" / f"{name}.json") for name in ("result", "eval"))
    assert again["bits_per_dim"] == row["bits_per_dim"] and row["title"] == "folder pictures"
    assert row["code_bits_per_dim"] == pytest.approx(2 * 4 / (16 * 3))
    assert row["data_dir"] == str(tmp_path / "pictures") and not os.listdir()
    if os.environ.get("SLOW"):
        go("prior", "~/run", *PRIOR)
        go("sample", "~/run", draw=True)
    assert Path(read(finished / "config.json")["data_dir"]).is_absolute()


WRONG = [  # RUN: a finished run with a prior; BARE: without; OPEN: not finished
    ("--K 1", "--K 1 makes no sense"),
    ("--lr nan", "--lr nan"),
    ("--preset nonsense", "--preset"),
    ("--size 30", "multiple of 4"),
    ("--dataset cifar10 --size 64", "cifar10 is 32x32"),
    ("--batch 100000", "2952 images"),
    ("--quantizer fsq --K 512 --D 4", "--K 512 give --D 1 or 3 or 9"),
    ("--init pca --hidden 96 --encoder_hidden 8", "--hidden 96"),
    ("--init RUN --slots 1", "of other settings"),
    ("--init OPEN", "OPEN/params.msgpack is missing"),
    ("--gamma 0.9", "--codebook ema"),
    ("--out RUN", "is taken"),
    ("--steps 6 resume RUN", "resume"),
    ("nonsense RUN", "nonsense"),
    ("eval nowhere", "nowhere/config.json cannot be read"),
    ("resume RUN", "is done"),
    ("prior OPEN", "not finished"),
    ("prior RUN", "is taken"),
    ("prior BARE --width 9 --heads 2", "multiple of --heads"),
    ("eval RUN/prior", "holds a prior"),
    ("sample BARE", "train.py [prior RUN]"),
]


@pytest.mark.parametrize("line, says", WRONG)
def test_wrong_command_lines(line, says, finished, tmp_path, monkeypatch, capsys):
    """One sentence that names what is wrong; nothing is written."""
    for name, gone in {"BARE": ["prior"], "OPEN": ["result.json", "params.msgpack"]}.items():
        shutil.copytree(finished, tmp_path / name, ignore=shutil.ignore_patterns(*gone))
    before = files(tmp_path), files(finished)
    monkeypatch.chdir(tmp_path)
    words = line.replace("RUN", str(finished)).split()
    with pytest.raises(SystemExit) as end:
        go(*(TINY_FLAGS if line[0] == "-" else []), *words)
    text = end.value.code
    if text == 2:  # argparse prints its usage, then the sentence
        text = capsys.readouterr().err.split(": error: ")[1]
    assert says in text and "\n" not in text.strip()
    assert before == (files(tmp_path), files(finished)) and not (tmp_path / "runs").exists()


SPOILED = [
    ("resume", "checkpoint.msgpack", lambda b: b[: len(b) // 2], "checkpoint.msgpack"),
    ("eval", "params.msgpack", lambda b: b"", "params.msgpack"),
    ("resume", "config.json", lambda b: b.replace(b'"K": 16', b'"K": 32'), "other settings"),
    ("eval", "config.json", lambda b: b[:-1], "config.json"),
    ("resume", "config.json", lambda b: b.replace(b'"K"', b'"codes"'), "config.json"),
    ("sample", "config.json", lambda b: b.replace(b'"K": 16', b'"K": "16"'), "config.json"),
]


@pytest.mark.parametrize("verb, name, change, says", SPOILED)
def test_spoiled_files(copied, verb, name, change, says):
    """They are named in one sentence, and left as they are."""
    (copied / name).write_bytes(change((copied / name).read_bytes()))
    if verb == "resume":
        (copied / "result.json").unlink()
    before, said = files(copied), refused(verb, copied)
    assert says in said and str(copied) in said and files(copied) == before


def test_a_loss_that_is_not_a_number(tmp_path):
    """It names the step and a lower rate, and there is no model."""
    flags = [*TINY_FLAGS, "--likelihood=gaussian", "--blocks=0", "--log_every=6"]
    said = refused(*flags, "--lr=1000", "--out", tmp_path / "a")
    assert re.match(r"step [2-6]: the loss", said) and "--lr 3e+02" in said
    assert not list(tmp_path.glob("*/params.msgpack"))


def test_a_run_begins_with_the_weights_of_another(finished, tmp_path):
    """`--init RUN`: at a rate of nearly 0 they stay what they were; a part is refused."""
    flags = [*TINY_FLAGS, "--init", finished]
    go(*flags, "--lr=1e-12", "--out", tmp_path / "a")
    files = (folder / "params.msgpack" for folder in (finished, tmp_path / "a"))
    old, new = (serialization.msgpack_restore(file.read_bytes())["arrays"] for file in files)
    for name in old:
        np.testing.assert_allclose(old[name], new[name], atol=1e-9)
    assert "of other settings" in refused(*flags, "--blocks=0", "--out", tmp_path / "b")


@pytest.mark.parametrize("cut", [0, 1, "images"])
def test_shapes_that_would_broadcast(cut, tmp_path, monkeypatch):
    """Guard: [B, H, W, 1] beside images is a likelihood three times too large."""
    row, grey = train.LIKELIHOODS["logistic"], np.zeros((9, 28, 28, 1), np.uint8)

    def flat(*inputs):
        return [x[..., :1] if i == cut else x for i, x in enumerate(row.loss(*inputs))]

    monkeypatch.setitem(train.LIKELIHOODS, "logistic", row._replace(loss=flat))
    if cut == "images":
        monkeypatch.setitem(data.DATASETS, "photo", lambda *args: (grey, grey, "mine"))
    name = "--dataset photo" if cut == "images" else "--likelihood logistic"
    assert refused(*TINY_FLAGS, "--out", tmp_path).startswith(f"{name} gives ")


NO_STDOUT = "sh", "-c", 'exec "$@" >&- 2>&-', "sh"


@pytest.mark.parametrize("reader", ["full", *(pytest.param(x, marks=slow) for x in ("gone", ""))])
def test_what_a_shell_exports_changes_nothing(finished, tmp_path, reader):
    """JAX's switches, a notebook's backend, a matplotlibrc that turns pictures, GIT_DIR; and a
    stdout that is a full disk, a pipe that nobody reads, or closed.
    """
    (tmp_path / "matplotlibrc").write_text("image.origin: lower\n")
    subprocess.run(["git", "init", "-q", tmp_path / "other"], check=True)
    switches = "JAX_ENABLE_X64", "JAX_DISABLE_JIT", "JAX_DEBUG_NANS", "MPLBACKEND"
    env = dict(zip(switches, ["1", "1", "1", "module://none"], strict=True))
    env |= {"MATPLOTLIBRC": f"{tmp_path}/matplotlibrc", "GIT_DIR": f"{tmp_path}/other/.git"}
    ends = os.pipe()
    os.close(ends[0])
    with open("/dev/full", "w") as full, open(ends[1], "w") as gone:
        streams = {"full": {"stdout": full}, "gone": {"stdout": gone}, "": {}}[reader]
        before = () if reader else NO_STDOUT
        run(tmp_path, *TINY_FLAGS, "--out=run", env=env, before=before, **streams)
    same_run(finished, tmp_path / "run")
    folders = finished, tmp_path / "run"
    pictures = [Image.open(folder / "result.png") for folder in folders]
    np.testing.assert_array_equal(*map(np.asarray, pictures))


def test_no_device(tmp_path):
    """One sentence, and no folder."""
    error = run(tmp_path, *TINY_FLAGS, code=1, env={"JAX_PLATFORMS": "nonsense"})
    assert error.startswith("JAX finds no device") and error.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_the_commit_is_of_these_files(tmp_path, monkeypatch):
    """A + where files differ; "" where git does not have them; never that of GIT_DIR."""
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "train.py").write_text("first")

    def git(line):
        words = ["git", "-c", "user.name=me", "-c", "user.email=me@here", *line.split()]
        return subprocess.check_output(words, cwd=tmp_path, text=True).strip()

    assert train.commit() == ""
    git("init -q"), git("commit -q --allow-empty -m another")
    assert train.commit() == ""  # untracked, inside another repository
    git("add ."), git("commit -qm these")
    head = git("rev-parse HEAD")
    monkeypatch.setenv("GIT_DIR", str(HERE / ".git"))
    assert len(train.commit()) >= 7 and head.startswith(train.commit())
    (tmp_path / "train.py").write_text("second")
    assert train.commit() == head[: len(train.commit()) - 1] + "+"


def test_a_disk_that_takes_nothing(finished, tmp_path, capsys, monkeypatch):
    """Log, checkpoint, model, result and a picture cannot be written: all is printed to the end.

    (With another seed: it gives other numbers.)
    """
    names = ["log.jsonl", "checkpoint.msgpack", "params.msgpack", "result.json", "result.png"]
    at_step(monkeypatch, lambda: [(tmp_path / name).mkdir() for name in names], step=0)
    go(*TINY_FLAGS, "--out", tmp_path, "--seed=1")
    said = capsys.readouterr().out
    assert said.count("failed (IsADirectoryError") == 6
    bits = float(re.search(r" bits_per_dim +(\S+)", said)[1])
    assert 1e-3 < abs(bits - read(finished / "result.json")["bits_per_dim"]) < 2


def load(dataset, folder="unused", size=32, val=False):
    """data.load with these settings."""
    settings = {"data_dir": str(folder), "dataset": dataset, "size": size, "batch": 1}
    return data.load(SimpleNamespace(**settings, val=val))


def random_pictures(folder, n):
    """n pictures of noise, 32x32, as PNG."""
    folder.mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), np.uint8)):
        Image.fromarray(image).save(folder / f"{i:03}.png")


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with batches that torchvision takes for CIFAR-10; there is no network."""
    from torchvision.datasets import CIFAR10

    folder, md5s = tmp_path / "cifar-10-batches-py", []
    folder.mkdir()
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "meta"]):
        content = {"data": np.full((4, 3072), i, np.uint8), "labels": [0] * 4, "names": ["x"]}
        (folder / name).write_bytes(pickle.dumps(content))
        md5s.append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
    monkeypatch.setattr(CIFAR10, "train_list", md5s[:5])
    monkeypatch.setattr(CIFAR10, "test_list", md5s[5:6])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "names", "md5": md5s[6][1]})
    download = "torchvision.datasets.cifar.download_and_extract_archive"
    monkeypatch.setattr(download, lambda *args, **how: Path("/no/network").stat())
    return tmp_path


def holds_cifar(folder):
    dataset = load("cifar10", folder)
    np.testing.assert_array_equal(dataset.train[:, 0, 0, 0], np.arange(5).repeat(4))
    assert dataset.train.shape == (20, 32, 32, 3) and (dataset.test == 5).all()
    assert dataset.title == "CIFAR-10" and len(dataset.test) == 4


def test_cifar10(cifar, monkeypatch):
    """Read once, then from a cache without torch, mended where it is damaged, left out where it
    cannot be written; a damaged batch and no network are one sentence.
    """
    cache, batches = cifar / "cifar10-arrays.npz", cifar / "cifar-10-batches-py"
    for damage in (b"", b"PK\3\4 nothing"):
        cache.write_bytes(damage)
        holds_cifar(cifar)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)  # to import it is an error
        patch.setitem(sys.modules, "torchvision.datasets", None)
        holds_cifar(cifar)
    cache.unlink()
    cache.mkdir()
    holds_cifar(cifar)
    (batches / "data_batch_3").write_bytes(b"different")
    with pytest.raises(SystemExit, match="cannot be fetched: put cifar-10-python.tar.gz there"):
        load("cifar10", cifar)
    assert not {"torch", "torchvision", "matplotlib.pyplot"} & IMPORTED


def test_the_photograph_and_val(monkeypatch):
    """Training and test crops have no pixel in common; --val holds out the last tenth."""
    whole, held = load("photo"), load("photo", val=True)
    np.testing.assert_array_equal(np.concatenate([held.train, held.test]), whole.train)
    assert (len(held.test), whole.split, held.split) == (295, "test", "val")
    columns = np.broadcast_to(np.uint8(np.arange(512)[:, None] // 2), (606, 512, 3))
    monkeypatch.setattr("matplotlib.image.imread", lambda file: columns)
    for size in (32, 64, 160):
        dataset = load("photo", size=size)
        assert dataset.train.shape[1:] == dataset.test.shape[1:] == (size, size, 3)
        assert dataset.train.max() < dataset.test.min()


def test_a_folder_of_pictures(tmp_path):
    """All of the sub-folders in one mixed order, a tenth for the test; else is passed over."""
    for name, n in (("b", 7), ("a", 14), (".thumbnails", 3)):
        random_pictures(tmp_path / name, n)
    for name in ("notes.txt", ".hidden.png", "a/Thumbs.db"):
        (tmp_path / name).write_text("no picture")
    dataset = load("folder", tmp_path)
    wanted = [Image.open(f) for name in "ab" for f in sorted((tmp_path / name).glob("*.png"))]
    wanted, found = ([np.asarray(x).tobytes() for x in images]
                     for images in (wanted, [*dataset.train, *dataset.test]))  # fmt: skip
    assert sorted(found) == sorted(wanted) and found != wanted
    assert len(dataset.test) == 2 and dataset.title == f"folder {tmp_path.name}"
    (tmp_path / "a").rename(tmp_path / "train")
    (tmp_path / "b").rename(tmp_path / "test")
    assert [len(images) for images in load("folder", tmp_path)[:2]] == [14, 7]


def test_pictures_of_all_kinds(tmp_path):
    """The middle is cropped; grey, transparent, palette become RGB; EXIF turns."""
    ramp = np.uint8(7 * np.arange(32)[:, None, None].repeat(3, 2).repeat(32, 1))  # darker above
    wide = Image.fromarray(np.pad(ramp, [(0, 0), (32, 32), (0, 0)]))
    for mode in ("RGB", "L", "RGBA", "LA", "P"):
        how = {"palette": Image.Palette.ADAPTIVE} if mode == "P" else {}
        wide.convert(mode, **how).save(tmp_path / f"{mode}.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(np.rot90(ramp)).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    found = np.concatenate(load("folder", tmp_path)[:2])
    assert len(found) == 6 and abs(np.int32(found) - ramp).max() <= 7


def test_pictures_that_cannot_be_used(tmp_path):
    """They are named in one sentence, and so is a folder without any."""
    with pytest.raises(SystemExit, match=f"no pictures in {tmp_path}"):
        load("folder", tmp_path)
    file = tmp_path / "bad.png"
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(file)  # 16 bits a colour
    for content in (file.read_bytes(), b"no picture", b""):
        file.write_bytes(content)
        with pytest.raises(SystemExit, match=f"{file} cannot be read"):
            load("folder", tmp_path)


@slow
def test_four_devices_do_what_one_does(tmp_path):
    """The batch split over virtual devices: the same losses up to rounding."""
    logs, flags = [], ["--codebook=ema", "--restart=0.5", "--flip", "--K=32"]
    for count in (1, 4):
        devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        run(tmp_path, *TINY_FLAGS, *flags, f"--out={count}", env=devices)
        logs.append(read(tmp_path / str(count) / "log.jsonl"))
    for one, four in zip(*logs, strict=True):
        for name in ("loss", "bits_per_dim", "commitment_loss", "grad_norm", "perplexity"):
            assert four[name] == pytest.approx(one[name], rel=1e-4), (one["step"], name)


@slow
def test_the_step_of_a_gpu_can_be_compiled_for_one(monkeypatch):
    """Exported from here as CUDA would get it: a loop over steps, bfloat16, no option of a CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert train.compiler_options() == {}
    flags = [*TINY_FLAGS, "--dtype=bfloat16", "--codebook=ema", "--restart=0.1", "--flip"]
    config = train.Config(**train.parse(flags)[2])
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: train.new_vqvae(config)))
    launch = train.make_launch(train.make_train_step(config, 0.06), tree)
    shapes = ((20, 32, 32, 3), np.uint8), ((3, 8), np.int32)
    args = [jax.ShapeDtypeStruct(*pair) for pair in shapes]
    exported = jax.export.export(launch, platforms=["cuda"])(leaves, *args)
    text = exported.mlir_module()
    assert exported.platforms == ("cuda",) and "stablehlo.while" in text and "xbf16>" in text
    after = [(x.shape, x.dtype) for x in exported.out_avals[: len(leaves)]]
    assert after == [(x.shape, x.dtype) for x in leaves]
    assert {x.dtype.name for x in leaves} == {"float32", "int32"}


def test_models_on_disk_are_understood(finished):
    """The shipped ones too; inside jit. Guard: a tracer cannot index a NumPy codebook."""
    shipped = HERE.glob("results/*/params.msgpack") if os.environ.get("SLOW") else []
    for folder in [finished, *(file.parent for file in shipped)]:
        config, model = train.load(folder)
        images = np.zeros((2, config.size, config.size, 3), np.uint8)
        shown = jax.jit(lambda codes, model=model: model.to_images(codes))(model.to_codes(images))
        assert shown.shape == images.shape and shown.dtype == np.uint8
