"""Trains, measures and samples a VQ-VAE (van den Oord et al. 2017) on CIFAR-10.

    python train.py                      preset `fast` on a CPU, `full` on a GPU
    python train.py --preset paper       section 4.1's setting, not yet run to its end
    python train.py resume runs/fast-1   go on with a run that was stopped
    python train.py eval runs/fast-1     measure a finished run again
    python train.py prior runs/fast-1    train a prior over its codes, and draw samples
    python train.py sample runs/fast-1   draw more samples

The loss is eq. 3 of the paper (quantize.py has its terms):

    -log p(x | z_q) + |sg[z_e] - e|^2 + beta |z_e - sg[e]|^2

its first term a mean over an image's colour values (in nats), the others over the elements of z_e.
With `--codebook ema` (`fast`, `full`, `notebook`) running averages stand in for the second term.
What `fast`, `full` and `notebook` cost and gave is in README.md. The way to the gradient is main,
run_vqvae, train (a CPU launches one step at a time, a GPU up to 100), train_step, loss_fn.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import data
import quantize
from data import atomic, bar, say
from model import LIKELIHOODS, MIN_HIDDEN, NETS, VQVAE, Prior, pca_start, sample_codes

# How many training images the unigram prior counts, how many are measured at once, how many shown.
UNIGRAM_IMAGES, EVAL_BATCH, PICTURES = 10_000, 100, 16
SHOWN = ["bits_per_dim", "nmse", "code_bits_per_dim_prior", "perplexity"]  # of a line of the log

# The step


class TrainState(NamedTuple):
    """All that a step changes. Random numbers come from the seed and `step`."""

    step: jax.Array
    model: nnx.Module  # VQVAE or Prior
    opt: Any
    ema: Any  # quantize.EMA, or () where there is none


def make_train_step(config, variance):
    """The update of a VQ-VAE: `state, metrics = train_step(state, images)`; metrics are scalars.

    images uint8 [B, H, W, 3]; variance: of the training pixels in [0, 1].
    """
    optimizer, is_log_prob = make_optimizer(config), LIKELIHOODS[config.likelihood].is_log_prob
    learns = quantize.QUANTIZERS[config.quantizer].learns

    def loss_fn(model, images):
        outputs, z_e, q = model(images)
        nll = per_value_loss(config, outputs, images, variance)[0].mean()  # first term of eq. 3
        loss = nll + config.beta * q.commitment_loss + q.extra_loss
        if learns and config.codebook == "gradient":  # else ema_update, below, stands in for it
            loss = loss + q.codebook_loss
        return loss, (nll, z_e, q)

    def train_step(state, images):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if config.flip:  # restart draws from the same key, so from the mirrors' bits: harmless
            mirror = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
            images = jnp.where(mirror, images[:, :, ::-1], images)
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (nll, z_e, q)), grads = gradient(state.model, images)
        updates, opt = optimizer.update(grads, state.opt, state.model)
        model, ema = optax.apply_updates(state.model, updates), state.ema
        if learns and config.codebook == "ema":  # gamma rises to 1 as lr falls to 0 (not in A.1)
            gamma = 1 - (1 - config.gamma) * decay_factor(config, state.step)
            ema, codebook = quantize.ema_update(ema, model.codebook[...], z_e, q.codes, gamma)
            if config.restart:
                ema, codebook = quantize.restart(key, ema, codebook, z_e, config.restart)
            model.codebook[...] = codebook
        bits = nll / math.log(2) + uniform_bits(config, q.codes)
        counts = quantize.usage(q.codes, *model.codebook.shape[:2])
        return TrainState(state.step + 1, model, opt, ema), {
            # nmse: here the means are not clipped to 0..255; the reconstruction of evaluate is.
            **({"bits_per_dim": bits} if is_log_prob else {"nmse": nll}),
            "perplexity": jnp.exp(jnp.log(quantize.perplexity(counts)).mean()),  # as in evaluate
            "commitment_loss": q.commitment_loss,  # the codebook loss is the same number
            "loss": loss, "grad_norm": optax.tree.norm(grads),
        }

    return train_step


def per_value_loss(config, outputs, images, variance):
    """The likelihood's loss of each colour value and its reconstruction, both [B, H, W, 3]."""
    loss, recon = LIKELIHOODS[config.likelihood].loss(outputs, images, variance)
    if not loss.shape == recon.shape == images.shape:  # else a mean would silently broadcast
        found = f"{loss.shape} and {recon.shape}, not twice {images.shape}"
        raise SystemExit(f"--likelihood {config.likelihood} gives {found}")
    return loss, recon


def uniform_bits(config, codes):
    """What codes [B, h, w, N] cost under the uniform prior, in bits/dim: h w N log2 K / (H W 3)."""
    return codes[0].size * math.log2(config.K) / dims(config)


def field(config):
    """Shape of an image's codes for a prior, (h, w, N); 4 is the stride of every net in NETS."""
    return config.size // 4, config.size // 4, config.slots


def dims(config):
    """Colour values of an image, by which bits/dim divides."""
    return 3 * config.size**2


def make_optimizer(config):
    """Adam. Its rate rises over the first steps and falls to 0 over the last; clipped gradients."""

    def schedule(step):
        rise = (step + 1) / max(1, config.warmup)
        return config.lr * jnp.minimum(rise, decay_factor(config, step))

    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(schedule))


def decay_factor(config, step):
    """The factor of lr and of 1 - gamma: 1, then over the last `decay` of the run down to 0."""
    return jnp.minimum(1.0, (config.steps - step) / max(1, config.decay * config.steps))


# The loop


def train(config, train_step, begin, examples, out):
    """Train to the last step -> model, log; from the checkpoint in folder `out` if there is one.

    begin(first examples) makes the TrainState before step 1; begin() one of equal shapes, to read a
    checkpoint into. A step gets `batch` of examples [n, ...]. A signal to stop saves and ends the
    program.
    """
    if (out / "checkpoint.msgpack").exists():
        state, log = read_arrays(out / "checkpoint.msgpack", begin)
    else:
        say("preparing the start")
        most = max(config.batch, 4000 * 3072 // max(3072, examples[0].size))  # 4,000 of 32 x 32
        state, log = begin(examples[data.permutation(config.seed, len(examples), 0)[:most]]), []
    whole, split = placements(config)
    leaves, tree = jax.tree.flatten(state)  # Python takes milliseconds a step over whole modules
    examples, leaves = jax.device_put((examples, leaves), whole)
    launch, compiled, waiting = make_launch(train_step, tree), {}, []
    step, clock, saved = int(state.step), time.monotonic(), time.monotonic()
    longest = 1 if jax.default_backend() == "cpu" else 100  # steps a launch; a signal waits for it
    with stop_signals() as caught:
        while step < config.steps:
            count = min(longest, config.log_every - step % config.log_every, config.steps - step)
            index = data.order(config.seed, len(examples), config.batch, step, count)
            index = jax.device_put(index, split)
            if count not in compiled:
                begun = time.monotonic()
                compiled[count] = launch.lower(leaves, examples, index).compile()
                clock += time.monotonic() - begun  # compiling does not count
            leaves, metrics = compiled[count](leaves, examples, index)
            waiting.append(metrics)
            step += count

            stopping = bool(caught)  # read once: a later one is seen in the next round
            due = time.monotonic() > saved + 60 * config.checkpoint_minutes
            if step % config.log_every and step < config.steps and not due and not stopping:
                continue
            log.append(log_line(config, step, jax.device_get(waiting), log, clock))
            survive((out / "log.jsonl").write_text, "\n".join(map(json.dumps, log)) + "\n")
            state = jax.tree.unflatten(tree, leaves)
            if due or stopping or step == config.steps:
                survive(write_arrays, out / "checkpoint.msgpack", state, log)
                saved = time.monotonic()
            if stopping:
                raise SystemExit(f"stopped after step {step:,}: {go_on(out)}")
            waiting, clock = [], time.monotonic()
    survive(write_arrays, out / "params.msgpack", state.model, log)  # with it a run is finished
    return state.model, log


def make_launch(train_step, tree):
    """Many steps in one launch: leaves, examples [n, ...], index [count, batch] -> leaves, metrics.

    The leaves are those of a TrainState of structure `tree`; each metric is [count]. The examples
    live on the device, so a launch needs only indices, and gathers all its batches at once. Many
    steps are a scan. One alone, as on a CPU, is no loop (`unroll` 0; 1 or True would keep one), in
    which XLA's convolutions are many times slower there.
    """

    def launch(leaves, examples, index):
        state, unroll = jax.tree.unflatten(tree, leaves), int(len(index) > 1)
        state, metrics = jax.lax.scan(train_step, state, examples[index], unroll=unroll)
        return jax.tree.leaves(state), metrics

    return jax.jit(launch, donate_argnums=0, compiler_options=compiler_options())


def compiler_options():
    """What to tell XLA on a CPU; nothing on other devices, or where it does not know it.

    YNNPACK gets only the sums. By default it gets matmuls and convolutions too, and a step of the
    paper's net takes nearly half as long again. Level 1 compiles a quarter faster.
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    options["xla_backend_optimization_level"] = 1
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if jax.default_backend() == "cpu":
            jax.jit(lambda: 0, compiler_options=options)()
            return options
    return {}


def placements(config):
    """How arrays lie on the devices: whole on each, or [count, batch] split over the batch."""
    devices = jax.devices()[: math.gcd(config.batch, jax.device_count())]
    mesh = jax.sharding.Mesh(devices, "batch")
    return jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P(None, "batch"))


def log_line(config, step, metrics, log, clock):
    """The next line of the log, printed: means since the last one; ends the program at a NaN."""
    before = log[-1] if log else {"step": 0, "seconds": 0.0}
    values = {name: np.concatenate([m[name] for m in metrics]) for name in metrics[0]}
    finite = np.isfinite([*values.values()]).all(0)  # [steps]
    if not finite.all():
        at, cure = before["step"] + 1 + finite.argmin(), f"--lr {config.lr / 3:.1g}"
        raise SystemExit(f"step {at}: the loss is not a number: try {cure}, or another --init")
    line, took = {name: float(v.mean()) for name, v in values.items()}, time.monotonic() - clock
    ms = 1e3 * took / (step - before["step"])
    shown = "  ".join(f"{key.replace('_', ' ')} {line[key]:.4g}" for key in SHOWN if key in line)
    say(f"{step:,}/{config.steps:,}  {shown}  {ms * (config.steps - step) / 6e4:.1f} minutes left")
    return {"step": step, **line, "ms_per_step": ms, "seconds": before["seconds"] + took}


@contextlib.contextmanager
def stop_signals():
    """Yields a list that the first signal to stop is put into; a second one ends at once."""
    caught = []
    with contextlib.ExitStack() as handlers:

        def note(number, frame):
            caught.append(number)
            handlers.close()  # puts the old ones back

        with contextlib.suppress(ValueError):  # Python allows it in the main thread alone
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup a run goes on
                    handlers.callback(signal.signal, number, signal.signal(number, note))
        yield caught


# Measuring


def evaluate(model, dataset, prior=None):
    """Metrics of a VQVAE over every image of `dataset.test`, and their codes [n, h, w, N].

    bits/dim = [-sum log2 p(x_i | z_q) + cost of the codes] / dims, for three priors over the codes:
    uniform (h w N log2 K bits, the paper's bound); unigram, each slot's frequencies among the first
    UNIGRAM_IMAGES of training; and `prior`, if given. Without a probability bits_per_dim is None.
    """
    config, variance = model.config, dataset.variance()

    def measure_batch(model, images):
        outputs, _, q = model(images)
        nll, recon = per_value_loss(config, outputs, images, variance)
        return nll.sum((1, 2, 3)), jnp.square((recon - images) / 255).sum((1, 2, 3)), q.codes

    def cost(prior, codes):  # nats
        return prior.nll(codes, model.codebook[...]).sum((1, 2, 3))

    nll, error, codes = in_batches(measure_batch, model, dataset.test, "measuring images")
    nll, mse = (sums.mean(dtype=np.float64) / dims(config) for sums in (nll, error))
    training = in_batches(VQVAE.to_codes, model, dataset.train[:UNIGRAM_IMAGES], "encoding images")
    costs = {"": uniform_bits(config, codes), "_unigram": unigram_bits(config, training, codes)}
    if prior is not None:
        nats = in_batches(cost, prior, codes, "measuring the prior").mean(dtype=np.float64)
        costs["_prior"] = float(nats) / math.log(2) / dims(config)
    likely = LIKELIHOODS[config.likelihood].is_log_prob
    counts = np.asarray(quantize.usage(codes, *model.codebook.shape[:2]))  # [S, K]
    perplexities = np.asarray(quantize.perplexity(counts))
    return {
        **{f"bits_per_dim{k}": nll / math.log(2) + v if likely else None for k, v in costs.items()},
        **{f"code_bits_per_dim{k}": v for k, v in costs.items()},
        "mse": mse, "nmse": mse / variance, "psnr": -10 * math.log10(mse) if mse else None,
        "perplexity": math.exp(np.log(perplexities).mean()),  # of the mean entropy
        "perplexity_per_codebook": [round(float(p), 1) for p in perplexities],
        "codes_used": int((counts > 0).sum()),
    }, codes


def unigram_bits(config, training, codes):
    """Bits/dim of `codes` [n, h, w, N] by each slot's frequencies in the codes `training` alone.

    One is added to every count: no code is impossible.
    """
    prior = 1.0 + np.float64(quantize.usage(training, config.slots, config.K))  # [N, K]
    bits = -np.log2(prior / prior.sum(1, keepdims=True))
    return float(bits[np.arange(config.slots), codes].sum()) / len(codes) / dims(config)


def in_batches(function, model, examples, text):
    """function(model, examples) in pieces, joined: [n, ...]. text: what the bar says.

    A piece has EVAL_BATCH images of 32 x 32 (or fields of codes), and fewer if they are larger.
    """
    function = jax.jit(function, compiler_options=compiler_options())
    together = max(1, EVAL_BATCH * 3072 // max(3072, examples[0].size))
    pieces = bar(text, np.array_split(examples, math.ceil(len(examples) / together)))
    parts = [jax.device_get(function(model, piece)) for piece in pieces]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


# A VQ-VAE's run


def run_vqvae(config, out=None):
    """Train, measure and show a VQ-VAE: a new run, or the one in the folder `out`."""
    dataset, revision = data.load(config), commit()  # now: the files may change while it runs
    names = (f"runs/{config.preset}-{n}" for n in itertools.count(1))
    out = out or new_folder(config, [config.out] if config.out else names)
    train_step = make_train_step(config, dataset.variance())
    model, log = train(config, train_step, functools.partial(new_vqvae, config), dataset.train, out)
    report(config, model, dataset, log, revision, out / "result.json")


def new_vqvae(config, images=None):
    """TrainState before step 1; images uint8 [n, H, W, 3] are those of the first steps."""
    model, init = build(config), "random" if images is None else config.init
    key = jax.random.fold_in(jax.random.key(config.seed, impl="rbg"), 1)
    if init == "data":
        z_e = jax.jit(VQVAE.encode)(model, images[: config.batch])
        model.codebook[...] = quantize.random_outputs(key, z_e, *model.codebook.shape[:2])
    elif init == "pca":
        pca_start(model, images, key)
    elif init != "random":  # a finished run, of equal sizes
        model = read_arrays(Path(init) / "params.msgpack", lambda: model)[0]
    ema = quantize.ema_init(model.codebook[...]) if config.codebook == "ema" else ()
    return TrainState(jnp.int32(0), model, jax.jit(make_optimizer(config).init)(model), ema)


def build(config, vqvae=None):
    """The network of the settings, with stock weights: a VQVAE, or a Prior for the Config vqvae."""
    key = jax.random.key(config.seed, impl="rbg")  # the default one takes seconds more to compile
    sizes = [] if vqvae is None else [field(vqvae), vqvae.K, vqvae.D]
    kind, dtype = Prior if sizes else VQVAE, jnp.dtype(config.dtype)
    return jax.jit(lambda: kind(config, *sizes, dtype, nnx.Rngs(key)))()


def report(config, model, dataset, log, revision, file, prior=None):
    """Measure a VQ-VAE (and a prior), write the row into `file`, and draw beside it.

    config and log: of the run that the row is for.
    """
    metrics, codes = evaluate(model, dataset, prior)
    key = next(key for key in SHOWN if key in log[-1])  # what was trained for
    metrics["published"] = PUBLISHED.get((model.config.dataset, key, model.config.slots))
    survive(write_result, file, config, dataset, log, revision, metrics)
    title = f"{dataset.title}, {dataset.split} images: {key.replace('_', ' ')} {metrics[key]:.4g}"
    rows = reconstruction_rows(model, dataset.test[:PICTURES], codes[:PICTURES])
    survive(draw, file.with_suffix(".png"), rows, len(rows["original"]), title)
    say(f"metrics, log and pictures are in {file.parent}")


# The run of a prior over the codes of a VQ-VAE


def run_prior(config, run, out=None):
    """Train a prior on the codes of the run in the folder `run`, measure it, draw samples."""
    (vqvae, model), revision = load(run), commit()  # vqvae: its Config
    dataset = data.load(dataclasses.replace(vqvae, data_dir=config.data_dir, batch=config.batch))
    out = out or new_folder(config, [run / "prior"])
    mirrored = [dataset.train[:, :, ::-1]] if vqvae.flip else []
    # No more than the run will see.
    images = np.concatenate([dataset.train, *mirrored])[: config.steps * config.batch]
    codes = in_batches(VQVAE.to_codes, model, images, f"encoding {len(images):,} images")
    begin = functools.partial(new_prior, config, vqvae)
    prior, log = train(config, make_prior_step(config, model), begin, codes, out)
    report(config, model, dataset, log, revision, out / "result.json", prior)
    # Beside its samples, each slot drawn by its own frequency among 512 training images.
    rng, few = np.random.default_rng(0), codes[:512].reshape(-1, vqvae.slots)
    alone = [rng.choice(few[:, n], (8, *field(vqvae)[:2])) for n in range(vqvae.slots)]
    parts = {"learned prior": sample_images(config, prior, model)}
    parts["unigram prior"] = in_batches(VQVAE.to_images, model, np.stack(alone, -1), "decoding")
    title = f"{dataset.title}, preset {vqvae.preset}, temperature {config.temperature:g}"
    survive(draw, out / "samples.png", parts, 8, title)


def new_prior(config, vqvae, codes=None):
    """TrainState of a prior before step 1: the unigram prior of `codes` [n, h, w, N]."""
    model = build(config, vqvae)
    if codes is not None:
        model.bias[...] = jnp.log(1.0 + quantize.usage(codes, vqvae.slots, vqvae.K))  # [N, K]
    return TrainState(jnp.int32(0), model, jax.jit(make_optimizer(config).init)(model), ())


def make_prior_step(config, model):
    """The update of a prior: `state, metrics = train_step(state, codes)`, codes [B, h, w, N]."""
    optimizer, codebook = make_optimizer(config), model.codebook[...]

    def loss_fn(prior, codes):
        return prior.nll(codes, codebook).mean()  # nats a code

    def train_step(state, codes):
        loss, grads = jax.value_and_grad(loss_fn)(state.model, codes)
        updates, opt = optimizer.update(grads, state.opt, state.model)
        prior = optax.apply_updates(state.model, updates)
        bits = loss / math.log(2) * codes[0].size / dims(model.config)
        metrics = {"code_bits_per_dim_prior": bits, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, prior, opt, ()), metrics

    return train_step


def sample_images(config, prior, model):
    """Images of codes drawn from a prior, by its settings: uint8 [count, H, W, 3]."""
    key, shape = jax.random.key(config.seed), (config.count, *field(model.config))
    track = functools.partial(bar, "sampling")
    codes = sample_codes(prior, model.codebook[...], key, shape, config.temperature, track)
    return in_batches(VQVAE.to_images, model, codes, "decoding images")


# Settings


def flag(default, text, low=0, high=10**9, choices=()):
    """A setting: its default, its help, and the values it may have."""
    metadata = {"help": text, "range": (low, high), "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Run:
    """What every run has. One field, one flag."""

    lr: float = flag(2e-4, "Adam's learning rate", 1e-12, 1e3)
    warmup: int = flag(0, "steps over which lr rises from 0")
    decay: float = flag(0.0, "part of the run, at its end, where lr and 1 - gamma fall to 0", 0, 1)
    clip: float = flag(1e9, "largest norm of the gradient (1e9: any)", 1e-12)
    batch: int = flag(128, "images a step", 1)
    steps: int = flag(250_000, "length of the run", 1)
    seed: int = flag(0, "of weights, order of images, mirrors, samples", 0, 2**31 - 1)
    dtype: str = flag("float32", "of activations", choices=["float32", "bfloat16"])
    data_dir: str = flag("data", "folder with CIFAR-10, or to fetch it into; or of pictures")
    log_every: int = flag(100, "steps between two lines of the log", 1)
    checkpoint_minutes: float = flag(5.0, "between two checkpoints", 1e-12)


# What each preset has other than the defaults, which are those of `paper`.
FAST = {
    "hidden": 128, "residual": 96, "D": 8, "likelihood": "logistic", "init": "pca",
    "codebook": "ema", "restart": 0.125, "beta": 40.0, "lr": 7e-4, "clip": 10.0, "warmup": 100,
    "decay": 0.7, "batch": 16, "steps": 14_000, "flip": True,
}  # fmt: skip
PRESETS = {
    "fast": FAST,
    # The paper's encoder is as wide as its decoder; most channels of such a one stayed at 0 here.
    "full": {**FAST, "hidden": 256, "encoder_hidden": 128, "residual": 64, "beta": 80.0,
        "lr": 3e-4, "steps": 150_000},
    "paper": {},
    "notebook": {
        "net": "deepmind", "slots": 1, "hidden": 128, "residual": 32, "likelihood": "gaussian",
        "codebook": "ema", "lr": 3e-4, "batch": 32, "steps": 10_000,
    },
    "prior": {"lr": 1e-3, "warmup": 100, "decay": 0.9, "batch": 8, "steps": 5_600},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(Run):
    """A run that trains a VQ-VAE. The defaults are the preset `paper`."""

    preset: str = flag("paper", "set of defaults", choices=[p for p in PRESETS if p != "prior"])
    out: str = flag("", "folder of the run, else runs/PRESET-1, -2, ...")
    dataset: str = flag("cifar10", "images to train on", choices=[*data.DATASETS])
    size: int = flag(32, "height and width of an image, a multiple of 4", 4, 1024)
    val: bool = flag(False, "hold out a tenth of training to measure on (so must an --init RUN)")
    flip: bool = flag(False, "mirror half of the training images")
    net: str = flag("paper", "section 4.1's networks or DeepMind's example's", choices=[*NETS])
    hidden: int = flag(256, "channels of the networks", 2, 8192)
    encoder_hidden: int = flag(0, "channels of the encoder; 0: as many as --hidden", 0, 8192)
    residual: int = flag(256, "channels inside a residual block", 1, 8192)
    blocks: int = flag(2, "residual blocks on each side", 0, 100)
    slots: int = flag(10, "N, latents at each position of the field", 1, 1024)
    K: int = flag(512, "codes in a codebook", 2, 65536)
    D: int = flag(64, "numbers in a code", 1, 4096)
    shared: bool = flag(False, "one codebook for all slots instead of one each")
    likelihood: str = flag("categorical", "p(x | z_q)", choices=[*LIKELIHOODS])
    init: str = flag("random", "random; data: codes drawn from z_e; pca: patches; RUN: its weights")
    quantizer: str = flag("vq", "how z_e becomes codes", choices=[*quantize.QUANTIZERS])
    gradient: str = flag("straight-through", "from z_q to z_e", choices=[*quantize.GRADIENTS])
    codebook: str = flag("gradient", "learns by its loss or EMA", choices=["gradient", "ema"])
    gamma: float = flag(0.99, "EMA: weight of the past", 0, 1 - 1e-9)
    restart: float = flag(0.0, "EMA: codes used below min(.5, this part of the mean) move", 0, 1)
    beta: float = flag(0.25, "weight of the commitment loss")


@dataclasses.dataclass(frozen=True)
class PriorConfig(Run):
    """A run that trains a prior over the codes of a VQ-VAE."""

    width: int = flag(256, "channels of the transformer", 2, 8192)
    layers: int = flag(2, "blocks of the transformer", 0, 100)
    heads: int = flag(4, "attention heads", 1, 1024)
    head_layers: int = flag(1, "layers of the head that each slot has for itself", 0, 100)
    temperature: float = flag(1.0, "of the samples: below 1 likelier and more alike", 1e-12, 100)
    count: int = flag(64, "samples in a grid", 1, 10_000)


# What a run of each gave on the test set, for its first lines; README.md has the rows.
GAVE = {"fast": "4.83 bits/dim", "full": "4.609 bits/dim", "notebook": "nmse .056"}
# Data set, metric, slots -> published: the paper's (10 slots), DeepMind's notebook's (1 slot).
PUBLISHED = {("cifar10", "bits_per_dim", 10): 4.67, ("cifar10", "nmse", 1): 0.056}


def check(config):
    """The same settings; ends the program, naming the flag, where they make no sense."""
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        low, high = f.metadata["range"]
        wanted = f"one of {', '.join(choices)}" if choices else f"{low:g} to {high:g}"
        fits = value in choices if choices else f.type is str or low <= value <= high  # not nan
        if type(value) not in (f.type, int) or not fits:  # 1 is a float, too
            raise SystemExit(f"--{f.name} {value} makes no sense: it must be {wanted}")
    for text, is_wrong in wrong_together(config):
        if is_wrong:
            raise SystemExit(text)
    return config


def wrong_together(c):
    """(sentence, whether it is true) for settings `c` that do not go together."""
    if isinstance(c, PriorConfig):
        return [("--width must be a multiple of --heads", c.width % c.heads)]
    quantizer, ema = quantize.QUANTIZERS[c.quantizer], c.codebook == "ema"
    narrowest = min(c.hidden, c.encoder_hidden or c.hidden)
    has_start = NETS[c.net][2] and LIKELIHOODS[c.likelihood].start and narrowest >= MIN_HIDDEN
    if quantizer.learns and quantizer.bound is not quantize.QUANTIZERS["vq"].bound:
        has_start = False  # its codebook would be made for a z_e that the stock codebook bounds
    needs_ema = "--restart and --gamma need --codebook ema: else give --restart 0 and no --gamma"
    needs = f"--init pca needs --hidden {MIN_HIDDEN} or more (--encoder_hidden, too), and a net,"
    needs += " likelihood and bound that fit: else give --init random"
    return [
        (quantizer.wrong_sizes(c.K, c.D), quantizer.wrong_sizes(c.K, c.D)),
        ("--size must be a multiple of 4", c.size % 4),
        ("--init data needs a codebook that learns", c.init == "data" and not quantizer.learns),
        (needs_ema, not ema and (c.restart or c.gamma != Config.gamma)),
        ("--encoder_hidden must be 0 (as many as --hidden) or 2 or more", c.encoder_hidden == 1),
        (needs, c.init == "pca" and not has_start),
    ]


# The run folder


def new_folder(config, names):
    """The first of `names` that is new or empty, now with config.json: nobody can make it twice."""
    for out in map(Path, names):
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not any(out.iterdir()):
                with open(out / "config.json", "x") as file:
                    json.dump(vars(config), file, indent=1)
                say(f"the run is in {out}")
                return out
        except FileExistsError:
            continue
        except OSError as error:
            raise SystemExit(f"{error!r}: name another --out, or copy the run") from None
    raise SystemExit(f"{out} is taken: {go_on(out)}, or move it away")


def go_on(out):
    """The command that continues a run, in words."""
    return f"go on with python train.py resume {shlex.quote(str(out))}"


def read_config(run):
    """The settings in a run folder, a Config or a PriorConfig; one sentence for anything else."""
    file = Path(run) / "config.json"
    try:
        saved = json.loads(file.read_text())
        return check((PriorConfig if "heads" in saved else Config)(**saved))
    except (TypeError, SystemExit) as error:
        raise SystemExit(f"{file} is not of this version of the kit: {error}") from None
    except (OSError, ValueError):
        raise SystemExit(f"{file} cannot be read: python train.py [prior RUN] makes it") from None


def load(run):
    """A finished run again: its settings and its model, a VQVAE or (of RUN/prior) a Prior."""
    config, file = read_config(run), Path(run) / "params.msgpack"
    if not file.exists():
        raise SystemExit(f"the run in {run} is not finished: {go_on(run)}")
    vqvae = read_config(file.absolute().parents[1]) if isinstance(config, PriorConfig) else None
    return config, read_arrays(file, lambda: build(config, vqvae))[0]


def write_arrays(file, tree, log):
    """The arrays of a pytree by name, and a log, in one file: whole or not at all."""
    content = {"arrays": jax.device_get(by_name(tree)), "log": log}
    with atomic(file) as out:
        out.write(flax.serialization.msgpack_serialize(content))


def read_arrays(file, make):
    """What write_arrays wrote: a pytree of the shapes that make() has, and the log."""
    like = jax.eval_shape(make)
    try:
        content, wanted = flax.serialization.msgpack_restore(file.read_bytes()), by_name(like)
        found = content["arrays"]
        shapes = [{k: (x.shape, x.dtype) for k, x in xs.items()} for xs in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError("arrays of other settings")
    except Exception as error:  # noqa: BLE001 (msgpack has a dozen kinds)
        raise SystemExit(f"{file} is missing, damaged, or of another run: {error!r}") from None
    return jax.tree.structure(like).unflatten(jnp.asarray(found[k]) for k in wanted), content["log"]


def by_name(tree):
    """The leaves of a pytree: {".model.encoder.down.kernel.value": array, ...}."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def survive(write, *inputs):
    """Do what only writes a file; where it fails, say so, and the run goes on."""
    try:
        write(*inputs)
    except Exception as error:  # noqa: BLE001 (matplotlib has its own)
        say(f"{getattr(write, '__name__', write)} failed ({error!r}); the rest goes on")


# Pictures


def draw(file, parts, columns, title):
    """Save parts, name -> images uint8 [n, H, W, 3], as grids one under the other.

    Without pyplot, whose global state belongs to whoever calls us.
    """
    from matplotlib.figure import Figure  # takes a second

    rows = [math.ceil(len(images) / columns) for images in parts.values()]
    size = 0.8 * columns, 0.6 + 0.79 * sum(rows) + 0.3 * len(rows)  # inches
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=12, wrap=True)
    axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axis, (name, images) in zip(axes, parts.items(), strict=True):
        border = [(0, -len(images) % columns), (1, 1), (1, 1), (0, 0)]
        padded = np.pad(images, border, constant_values=255)
        lines = [np.hstack(padded[i : i + columns]) for i in range(0, len(padded), columns)]
        axis.imshow(np.vstack(lines), interpolation="nearest", origin="upper")
        axis.set_title(name, fontsize=10)
        axis.axis("off")
    with atomic(file) as png:
        figure.savefig(png, format="png", dpi=150)


def reconstruction_rows(model, images, codes):
    """What to draw of images uint8 [n, H, W, 3] and their codes [n, h, w, N].

    The error is |reconstruction - image|, a mean over the colours; white is its 99.5 % quantile.
    """
    shown = in_batches(VQVAE.to_images, model, codes, "decoding images")
    error = np.abs(np.float32(shown) - images).mean(-1, keepdims=True)
    top = max(1.0, np.quantile(error, 0.995))
    grey = np.uint8(255 * np.minimum(1, error / top)).repeat(3, -1)
    colours = np.random.default_rng(0).integers(0, 230, (codes.max() + 1, 3), np.uint8)
    maps = colours[codes[..., 0]].repeat(4, 1).repeat(4, 2)  # codes have no order, nor have these
    parts = {"original": images, "reconstruction": shown, "codes of slot 0": maps}
    return {**parts, f"error (white: {top:.1f} grey levels)": grey}


# The row of a result


def write_result(file, config, dataset, log, revision, metrics):
    """One row, printed and written: what ran, by which commit, where, how long, what it gave."""
    numbers = {key: v for key, v in metrics.items() if isinstance(v, float | int)}
    say("\n".join(f"  {key:26} {value:.6g}" for key, value in numbers.items()))
    seconds = log[-1]["seconds"]
    row = {
        "command": shlex.join(["python", *sys.argv]), "commit": revision, **vars(config),
        "title": dataset.title, "split": dataset.split, "date": time.strftime("%Y-%m-%d"),
        "train_seconds": seconds, "ms_per_step": 1e3 * seconds / log[-1]["step"], **metrics,
        "device": hardware(), "memory": jax.local_devices()[0].memory_stats(),
        "versions": {m.__name__: m.__version__ for m in (jax, flax, optax, np)},
    }
    with atomic(file) as out:
        out.write(json.dumps(row, indent=1).encode() + b"\n")


def hardware():
    """The device in words: "2 cores of AMD EPYC", "1 NVIDIA H200"."""
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} {jax.devices()[0].device_kind}"
    name, cores = os.uname().machine, os.cpu_count()
    with contextlib.suppress(OSError, IndexError, AttributeError):  # Linux has these two
        cores = len(os.sched_getaffinity(0))
        name = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    return f"{cores} core{'s' * (cores > 1)} of {name}"


def commit():
    """The commit of this code, a + where files differ from it; "" where git does not know them."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = "git ls-files --error-unmatch train.py && git describe --always --dirty=+"
    how = {"cwd": Path(__file__).parent, "env": env, "capture_output": True, "text": True}
    done = subprocess.run(command, shell=True, check=False, **how)
    return "" if done.returncode else done.stdout.split()[-1]


# The command line

VERBS = {  # verb -> what it does, and its flags; `prior` has all of a PriorConfig
    "resume": ("go on with a run that was stopped", ["data_dir"]),
    "eval": ("measure a finished run again", ["data_dir"]),
    "prior": ("train a prior over the codes of a finished run, and draw samples", None),
    "sample": ("draw samples from the prior of a run", ["count", "seed", "temperature"]),
}


def parse(argv):
    """The command line -> verb (of VERBS, or ""), the run that it names, and the flags given."""
    verb = argv[0] if argv and argv[0] in VERBS else ""
    text, names = VERBS.get(verb, ("Train (fast; on a GPU full) or " + ", ".join(VERBS), None))
    usage = f"python train.py {verb or '[VERB]'} {'RUN ' if verb else ''}[--flag VALUE ...]"
    parser = argparse.ArgumentParser(usage=usage, description=text, allow_abbrev=False)
    if verb:
        parser.add_argument("run", metavar="RUN", type=lambda run: Path(run).expanduser())
    fields = dataclasses.fields(PriorConfig if verb else Config)
    for f in (f for f in fields if not names or f.name in names):
        typed = {"type": f.type, "choices": f.metadata["choices"] or None}
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else typed
        changed = [f"{name}: {diff[f.name]}" for name, diff in PRESETS.items() if f.name in diff]
        text = f"{f.metadata['help']} (default: {', '.join([str(f.default) or '-', *changed])})"
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **kind)
    flags = vars(parser.parse_args(argv[1:] if verb else argv))
    flags = flags if verb else {"data_dir": Config.data_dir, **flags}
    for name in {"data_dir", "out"} & set(flags):  # absolute: a run may go on from elsewhere
        flags[name] = str(Path(flags[name]).expanduser().absolute())
    return verb, flags.pop("run", None), flags


def main(argv):
    """The whole program; ends with one sentence where it cannot go on."""
    verb, run, flags = parse(argv)
    try:
        device = hardware()
    except (RuntimeError, AssertionError):
        raise SystemExit("JAX finds no device: unset JAX_PLATFORMS, or set it to cpu") from None
    if not verb:
        preset = flags.get("preset", "fast" if jax.default_backend() == "cpu" else "full")
        config = check(Config(**{"preset": preset, **PRESETS[preset], **flags}))
        say(f"preset {preset}: {config.steps:,} steps of {config.batch} images on {device}"[:79])
        say(f"CIFAR-10 with this preset gave: {GAVE.get(preset, 'not measured yet')}")
        if config.init not in ("random", "data", "pca"):  # ends now where that run will not do
            read_arrays(Path(config.init) / "params.msgpack", lambda: build(config))
        return run_vqvae(config)
    config = read_config(run)
    prior = isinstance(config, PriorConfig)
    if verb == "resume":
        if (run / "result.json").exists() and (run / "params.msgpack").exists():
            raise SystemExit(f"{run} is done: python train.py eval {run.parent if prior else run}")
        config = dataclasses.replace(config, **flags)
        return run_prior(config, run.absolute().parent, run) if prior else run_vqvae(config, run)
    if prior:
        raise SystemExit(f"{run} holds a prior: name the run that it is of, {run.parent}")
    if verb == "prior":
        flags = {**PRESETS["prior"], "data_dir": config.data_dir, **flags}
        return run_prior(check(PriorConfig(**flags)), run)
    return (draw_samples if verb == "sample" else evaluate_run)(run, flags)


def evaluate_run(run, flags):
    """The verb `eval`: eval.json and eval.png of a finished run, its prior included."""
    config, model = load(run)
    prior = load(run / "prior")[1] if (run / "prior" / "params.msgpack").exists() else None
    config = dataclasses.replace(config, **flags)
    dataset, log = data.load(config), read_arrays(run / "params.msgpack", lambda: model)[1]
    report(config, model, dataset, log, commit(), run / "eval.json", prior)


def draw_samples(run, flags):
    """The verb `sample`: a grid of samples, in a file named by what was asked for."""
    (_, model), (config, prior) = load(run), load(run / "prior")
    config = check(dataclasses.replace(config, **flags))
    words = f"count{config.count}-seed{config.seed}-temperature{config.temperature:g}"
    file, images = run / "prior" / f"samples-{words}.png", sample_images(config, prior, model)
    say(f"drawing {config.count} samples in {file}")
    survive(draw, file, {words: images}, math.ceil(math.sqrt(config.count)), "samples")


PINNED = {"enable_x64": False, "disable_jit": False, "debug_nans": False, "debug_infs": False,
          "default_prng_impl": "threefry2x32", "threefry_partitionable": True}  # fmt: skip


def pin():
    """Set aside these six, which a shell may export and which change a run's numbers, or end it."""
    for name, value in PINNED.items():
        if jax.config.values[f"jax_{name}"] != value:
            say(f"JAX_{name.upper()} is set aside in this program")
            jax.config.update(f"jax_{name}", value)


def keep_memory():
    """Have malloc keep what is freed, in this program alone: XLA frees its buffers at every step,
    and having the kernel clear them anew takes up to a seventh of a step on a CPU.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        keep = [(-4, 0), (-1, 2**31 - 1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD: nothing goes back
        if any(Path(word).name == "prior" for word in sys.argv[1:3]):  # a third of a prior's step
            keep.append((-8, 1))  # M_ARENA_MAX; a VQ-VAE's step it makes slower
        for option in keep:
            ctypes.CDLL("libc.so.6").mallopt(*option)


if __name__ == "__main__":
    keep_memory()
    pin()
    # Ctrl-C outside of training ends at once: Python would wait for XLA. The code shows the cursor.
    signal.signal(signal.SIGINT, lambda *_: say("\n\033[?25hstopped; see resume") or os._exit(1))
    main(sys.argv[1:])
