"""Trains, measures and shows a VQ-VAE: the step, the loop, evaluation, a prior, the command line.

    python train.py                      `fast` on a CPU; on a GPU `paper` with the start of `fast`
    python train.py --preset paper       the paper's setting, where stated; published: 4.67 bits/dim
    python train.py --preset notebook    DeepMind's example; published: normalised MSE .056
    python train.py --prior runs/fast-1  a prior over that run's codes, and samples

What each costs and gives is in README.md, measured. The loss is eq. 3 of the paper (quantize.py):

    -log p(x | z_q) + |sg[z_e] - e|^2 + beta |z_e - sg[e]|^2

its first term a mean over the 3072 colour values (in nats), the others over the elements of z_e.
With `--codebook ema` (`fast`, `notebook`) a running average takes the place of the second term.
Order of the file: configuration, the step, the loop, measuring, the prior, pictures, what a run
leaves on disk, what it prints, the command line.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import data
import model
import quantize
from data import Stop, atomic, say

SHOWN = 16  # test images in the pictures
START_IMAGES = 4000  # what `--init pca` looks at
UNIGRAM_IMAGES = 10_000  # training images whose codes the unigram prior counts
EVAL_BATCH = 100
VALUES = 32 * 32 * 3  # colour values of an image, by which bits/dim divides


# Configuration


def flag(default, text, choices=None, low=None, high=None):
    """A field of Config: its default, its help, and the values that make sense."""
    checks = {"help": text, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=checks)


TINY = 1e-12  # stands for "above zero"
DTYPES, INITS = ["auto", "float32", "bfloat16"], ["random", "data", "pca"]

# What each preset has other than the defaults of Config, which are those of `paper`.
PRESETS = {
    "paper": {},
    "fast": {
        "hidden": 128, "residual": 32, "D": 8, "likelihood": "logistic", "init": "pca",
        "codebook": "ema", "restart": 0.25, "beta": 40.0, "lr": 6e-4, "warmup": 100, "decay": 0.7,
        "batch": 16, "steps": 14_000, "flip": True,
    },
    "notebook": {
        "net": "deepmind", "slots": 1, "hidden": 128, "residual": 32, "likelihood": "gaussian",
        "codebook": "ema", "lr": 3e-4, "batch": 32, "steps": 10_000,
    },
    "prior": {"lr": 1e-3, "warmup": 100, "decay": 0.9, "batch": 32, "steps": 1_400},
}  # fmt: skip

# What a preset gave, as it stands, and after how long.
ABOUT = {
    "paper": "nothing yet; it needs a GPU",
    "fast": "4.86 bits/dim after 16 minutes of training on 2 shared, slow cores",
    "notebook": "normalised MSE .056 after 11 minutes on 2 cores",
    "prior": ".33 bits/dim below a unigram prior, on `fast`, after 25 minutes on 1 slow core",
}

# Published numbers by what is measured: at how many slots, the number, its source.
PUBLISHED = {
    "bits_per_dim": (10, 4.67, "the paper, arXiv 1711.00937"),
    "nmse": (1, 0.056, "DeepMind's notebook, training batches"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One field, one flag. Defaults: those of `paper`; README.md says which the paper states."""

    # Of every run:
    preset: str = flag("", "set of defaults (without: fast; on a GPU paper --init pca)", [*PRESETS])
    data_dir: str = flag("data", "folder with CIFAR-10, or to fetch it into")
    lr: float = flag(2e-4, "Adam's learning rate", None, TINY, 1e3)
    warmup: int = flag(0, "steps over which lr rises from 0", None, 0, 10**9)
    decay: float = flag(0.0, "last part of the run, 0 to 1, in which lr falls to 0", None, 0.0, 1.0)
    batch: int = flag(128, "images a step", None, 1, 10**9)
    steps: int = flag(250_000, "length of the run", None, 1, 10**9)
    seed: int = flag(0, "of weights, order of images, mirrors, samples", None, 0, 2**31 - 1)
    dtype: str = flag("auto", "of activations; auto: bfloat16 on a GPU, float32 on a CPU", DTYPES)
    out: str = flag("", "folder of the run (default: runs/PRESET-1, -2, ...)")
    log_every: int = flag(100, "steps between two lines of the log", None, 1, 10**9)
    checkpoint_minutes: float = flag(5.0, "between two checkpoints", None, TINY, 1e6)
    # Of a VQ-VAE:
    dataset: str = flag("cifar10", "images to train on", [*data.DATASETS])
    val: bool = flag(False, "measure on the last tenth of the training images, held out")
    flip: bool = flag(False, "mirror half of the training images")
    net: str = flag("paper", "section 4.1's networks or DeepMind's example's", [*model.NETS])
    hidden: int = flag(256, "channels of the networks", None, 2, 8192)
    residual: int = flag(256, "channels inside a residual block", None, 1, 8192)
    blocks: int = flag(2, "residual blocks on each side", None, 0, 100)
    slots: int = flag(10, "N, latents at each of the 8x8 positions", None, 1, 1024)
    K: int = flag(512, "codes in a codebook", None, 2, 65536)
    D: int = flag(64, "length of a code", None, 1, 4096)
    shared: bool = flag(False, "one codebook for all slots instead of one each")
    likelihood: str = flag("categorical", "p(x | z_q)", [*model.LIKELIHOODS])
    init: str = flag("random", "data: codes are encoder outputs; pca: a patch quantiser", INITS)
    quantizer: str = flag("vq", "how z_e becomes codes", [*quantize.QUANTIZERS])
    gradient: str = flag("straight-through", "how it passes the argmin", [*quantize.GRADIENTS])
    codebook: str = flag("gradient", "how the codebook learns", ["gradient", "ema"])
    gamma: float = flag(0.99, "EMA: weight of the past", None, 0.0, 1 - 1e-9)
    restart: float = flag(0.0, "EMA: move codes used less often a batch (0: none)", None, 0.0, 1.0)
    beta: float = flag(0.25, "weight of the commitment loss", None, 0.0, 1e6)
    # Of a prior:
    width: int = flag(256, "prior: channels of its transformer", None, 2, 8192)
    layers: int = flag(2, "prior: blocks of its transformer", None, 0, 100)
    heads: int = flag(8, "prior: attention heads", None, 1, 1024)
    temperature: float = flag(1.0, "prior: of its samples", None, TINY, 100.0)
    count: int = flag(64, "prior: samples in a grid", None, 1, 10_000)


NAMES = [f.name for f in dataclasses.fields(Config)]
OF_PRIOR = NAMES[NAMES.index("width") :]
OF_VQVAE = NAMES[NAMES.index("dataset") : NAMES.index("width")]


def configure(flags):
    """Config from a preset and what the command line changes; raises Stop for nonsense."""
    if "preset" not in flags:
        on_gpu = {"preset": "paper", "init": "pca"}
        flags = {**({"preset": "fast"} if jax.default_backend() == "cpu" else on_gpu), **flags}
    config = Config(**{**PRESETS[flags["preset"]], **flags})
    ema = config.codebook == "ema" and quantize.QUANTIZERS[config.quantizer].learns
    for name in ("gamma", "restart"):
        if name in flags and not ema:
            raise Stop(2, f"--{name} needs a codebook that learns by EMA: add --codebook ema.")
    return check(config)


def check(config):
    """The same Config; raises Stop, naming the flag, for values that make no sense together."""
    for f in dataclasses.fields(Config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        if low is not None and not low <= value <= high:  # nan is not, either
            raise Stop(2, f"--{f.name} {value} makes no sense: it goes from {low} to {high}.")
    if config.init == "data" and not quantize.QUANTIZERS[config.quantizer].learns:
        raise Stop(2, f"--init data is of no use to --quantizer {config.quantizer}: leave it out.")
    if wrong := quantize.QUANTIZERS[config.quantizer].refuses(config.K, config.D):
        raise Stop(2, f"--quantizer {wrong}.")
    if config.init == "pca" and config.hidden < model.ROOM:
        raise Stop(2, f"--init pca needs --hidden {model.ROOM} or more, not {config.hidden}.")
    if config.init == "pca" and not model.LIKELIHOODS[config.likelihood].start:
        raise Stop(2, f"--likelihood {config.likelihood} has no start: give --init random.")
    if config.init == "pca" and model.NETS[config.net] != model.NETS["paper"]:
        raise Stop(2, f"--net {config.net} has no start: give --init random.")
    if config.width % config.heads:
        raise Stop(2, f"--width {config.width} must be a multiple of --heads {config.heads}.")
    if not config.data_dir:
        raise Stop(2, '--data_dir "" names no folder: give one, such as --data_dir data.')
    return config


def build(config):
    """The network that a configuration describes: model.VQVAE, or model.Prior."""
    cpu = jax.default_backend() == "cpu"
    dtype = {"auto": "float32" if cpu else "bfloat16"}.get(config.dtype, config.dtype)
    kind = model.Prior if config.preset == "prior" else model.VQVAE
    return kind(config, dtype=jnp.dtype(dtype))


# The step


class TrainState(NamedTuple):
    """All that a step changes. Random numbers come from the seed and `step`."""

    step: jax.Array
    params: Any
    opt: Any
    ema: Any  # quantize.EMA, or () where the codebook learns by gradient


class Task(NamedTuple):
    """What the loop trains: a VQ-VAE on images, or a prior on their codes."""

    examples: Any  # [n, ...]; a batch of them goes to each step
    init: Callable  # () -> TrainState before step 1
    train_step: Callable  # state, batch -> state, metrics
    measure: Callable  # params, log -> metrics, {file name: function that makes the figure}


def vqvae_task(config):
    """The Task of training a VQ-VAE; loads the images."""
    dataset, net = data.load(config.dataset, config.data_dir, config.val), build(config)
    first = data.permutation(config.seed, len(dataset.train), 0)[: max(config.batch, START_IMAGES)]
    init = functools.partial(init_state, config, net, dataset.train[first])
    train_step = make_train_step(config, net, dataset.variance())
    measure = functools.partial(measure_vqvae, config, net, dataset)
    return Task(dataset.train, init, train_step, measure)


def init_state(config, net, images):
    """TrainState before step 1; images uint8 [n, 32, 32, 3] are those of the first steps.

    None for the images leaves out what depends on the data, for a state of the same shapes.
    """
    key = jax.random.key(config.seed, impl="rbg")  # the default one takes seconds more to compile
    params = jax.jit(net.init)(key, np.zeros((1, 32, 32, 3), np.uint8))["params"]
    start, key = "random" if images is None else config.init, jax.random.fold_in(key, 1)
    if start == "data":
        first = images[: config.batch]
        z_e = jax.jit(lambda p, x: net.apply({"params": p}, x, method="encode"))(params, first)
        params["codebook"] = quantize.draw(key, z_e, *params["codebook"].shape[:2])
    if start == "pca":
        params = model.pca_start(config, params, images, key)
    ema = quantize.ema_init(params["codebook"]) if config.codebook == "ema" else ()
    return TrainState(jnp.int32(0), params, jax.jit(make_optimizer(config).init)(params), ema)


def fall(config, step):
    """The factor of lr and of 1 - gamma: 1, then over the last `decay` of the run down to 0."""
    return jnp.minimum(1.0, (config.steps - step) / max(1, config.decay * config.steps))


def make_optimizer(config):
    """Adam. Its learning rate rises over the first steps and falls to 0 over the last ones."""

    def schedule(step):
        rise = (step + 1) / max(1, config.warmup)
        return config.lr * jnp.minimum(rise, fall(config, step))

    return optax.adam(schedule)


def make_train_step(config, net, variance):
    """The update: `state, metrics = train_step(state, images)`, images uint8 [B, 32, 32, 3].

    The metrics are scalars; a run stops at the first that is not finite.
    """
    likelihood = model.LIKELIHOODS[config.likelihood]
    learns = quantize.QUANTIZERS[config.quantizer].learns

    def loss_fn(params, images):
        outputs, z_e, q = net.apply({"params": params}, images)
        reconstruction = likelihood.loss(outputs, images, variance)[0].sum() / images.size
        loss = reconstruction + config.beta * q.commitment_loss
        if learns and config.codebook == "gradient":  # an EMA replaces this term
            loss = loss + q.codebook_loss
        return loss, (reconstruction, z_e, q)

    def train_step(state, images):
        # One key for mirrors and restarts: these need not be independent.
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if config.flip:
            mirror = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
            images = jnp.where(mirror, images[:, :, ::-1], images)
        after, (reconstruction, z_e, q), metrics = adam_step(config, loss_fn, state, images)
        codebook = after.params["codebook"]  # [S, K, D]
        if learns and config.codebook == "ema":  # the codebook's own gradient was zero
            gamma = 1 - (1 - config.gamma) * fall(config, state.step)
            ema, e = quantize.ema_update(state.ema, codebook, z_e, q.codes, gamma)
            if config.restart:
                ema, e = quantize.restart(key, ema, e, z_e, config.restart)
            after = after._replace(params={**after.params, "codebook": e}, ema=ema)
        bits = reconstruction / math.log(2) + code_bits(config)
        counts = quantize.usage(q.codes, *codebook.shape[:2])
        return after, {
            **metrics,
            **({"bits_per_dim": bits} if likelihood.exact else {"nmse": reconstruction}),
            "codebook_loss": q.codebook_loss,  # the same number as the next, another gradient
            "commitment_loss": q.commitment_loss,
            "perplexity": quantize.perplexity(counts).mean(),
        }

    return train_step


def adam_step(config, loss_fn, state, *inputs):
    """One step of Adam down loss_fn(params, *inputs) -> loss, aux: the next state, aux, metrics."""
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *inputs)
    updates, opt = make_optimizer(config).update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt, state.ema), aux, metrics


def code_bits(config):
    """What the latents cost under the uniform prior, in bits/dim: 64 N log2(K) / 3072."""
    return 64 * config.slots * math.log2(config.K) / VALUES


# The loop


class Progress(NamedTuple):
    """What a checkpoint holds: the state, the log, the metrics since its last line, the clock."""

    state: TrainState
    log: list  # of dicts, the lines of log.jsonl
    pending: dict  # name -> float32 [steps since the last line]
    seconds: float
    compile_seconds: float


def train(config, task, progress, out):
    """The loop: from `progress` to the last step, or to a signal. Returns the last Progress."""
    whole, split = placements(config)
    examples, state = jax.device_put((task.examples, progress.state), whole)
    train_steps, compiled = make_train_steps(task.train_step), {}
    launch = 1 if jax.default_backend() == "cpu" else 100  # steps; a signal waits for them
    step, saved, waiting = int(state.step), time.monotonic(), []
    with signals() as caught, bar("training", config.steps, step) as show:
        clock = time.perf_counter()
        while step < config.steps:
            to_log = config.log_every - step % config.log_every
            count = min(launch, to_log, config.steps - step)
            order = data.order(config.seed, len(task.examples), config.batch, step, count)
            index = jax.device_put(order, split)
            if count not in compiled:
                show(step, "compiling the step")
                start = time.perf_counter()
                compiled[count] = train_steps.lower(state, examples, index).compile()
                took = time.perf_counter() - start
                progress = progress._replace(compile_seconds=progress.compile_seconds + took)
                clock += took  # off the clock
                show(step, "")
            state, metrics = compiled[count](state, examples, index)
            waiting.append(metrics)
            step += count
            stopping = bool(caught)  # read once: a signal after this line waits for the next step

            logs = step % config.log_every == 0 or step == config.steps
            due = time.monotonic() - saved > 60 * config.checkpoint_minutes
            if logs or due or stopping:
                progress, waiting = collect(progress, state, waiting, clock), []
                check_finite(config, progress.pending, step)
                progress = write_log(out, step, progress) if logs else progress
                if due or stopping or step == config.steps:
                    survive(lambda p=progress: save_checkpoint(out, p, config), "the checkpoint")
                    saved = time.monotonic()
                clock = time.perf_counter()
            show(step, describe(progress.log[-1]) if progress.log else "")
            if stopping:
                break
    if caught:
        raise Stop(128 + caught[0], f"stopped after step {step:,}; go on: --resume {out}")
    return progress


def make_train_steps(train_step):
    """Many steps in one launch: state, examples [n, ...], index [count, batch] -> state, metrics.

    Each metric is [count]. The examples live on the device, so a launch needs only indices. A GPU
    scans. A CPU unrolls (one step a launch): in a loop XLA's convolutions are many times slower.
    """

    def train_steps(state, examples, index):
        unroll = 0 if jax.default_backend() == "cpu" else 1  # 0: no loop is left
        return jax.lax.scan(lambda s, i: train_step(s, examples[i]), state, index, unroll=unroll)

    return jax.jit(train_steps, donate_argnums=0, compiler_options=compiler_options())


# On a CPU YNNPACK gets only the sums. By default it gets matmuls and convolutions too, and a step
# of the paper's net takes nearly half as long again.
XLA_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_backend_optimization_level": 1,  # compiles a quarter faster; the step is no slower
}


def compiler_options():
    """XLA_OPTIONS; none on other devices, or where this jaxlib does not know them."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if jax.default_backend() == "cpu":
            jax.jit(lambda: 0, compiler_options=XLA_OPTIONS)()
            return XLA_OPTIONS
    return {}


def placements(config):
    """How arrays lie on the devices: whole on each, or [count, batch] split over the batch."""
    devices = jax.devices()[: math.gcd(config.batch, jax.device_count())]
    mesh = jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "batch"))


def collect(progress, state, waiting, clock):
    """Progress with the metrics of the last launches, for which it waits, and their seconds."""
    parts = [part for part in (progress.pending, *jax.device_get(waiting)) if part]
    pending = jax.tree.map(lambda *values: np.concatenate(values), *parts)
    seconds = progress.seconds + time.perf_counter() - clock
    return progress._replace(state=state, pending=pending, seconds=seconds)


def check_finite(config, pending, step):
    """Raise Stop with the step and the terms that are no longer finite numbers."""
    bad = np.array([~np.isfinite(values) for values in pending.values()])  # [terms, steps]
    if bad.any():
        first = bad.any(0).argmax()
        names = ", ".join(np.array([*pending])[bad[:, first]])
        text = f"step {step - bad.shape[1] + first + 1}: {names} is no longer a finite number:"
        raise Stop(1, f"{text} start anew with a lower rate, such as --lr {config.lr / 3:.1g}.")


def write_log(out, step, progress):
    """Progress with one more line in its log, the means since the last one; and log.jsonl."""
    before = progress.log[-1] if progress.log else {"step": 0, "seconds": 0.0}
    ms = 1e3 * (progress.seconds - before["seconds"]) / (step - before["step"])
    line = {name: float(np.mean(values)) for name, values in progress.pending.items()}
    line = {"step": step, **line, "ms_per_step": ms, "seconds": progress.seconds}
    log = [*progress.log, line]
    lines = "".join(json.dumps(line) + "\n" for line in log)
    survive(lambda: (out / "log.jsonl").write_text(lines), "the log")
    return progress._replace(log=log, pending={})


@contextlib.contextmanager
def signals():
    """Yields a list that the first signal to stop is put into; a second one stops at once."""
    caught = []
    with contextlib.ExitStack() as handlers:

        def note(number, frame):
            caught.append(number)
            handlers.close()  # puts the old ones back

        with contextlib.suppress(ValueError):  # Python allows it in the main thread alone
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup a run goes on
                    handlers.callback(signal.signal, number, signal.signal(number, note))
        yield caught


# Measuring


def evaluate(config, net, params, dataset):
    """Metrics over every image of `dataset.test`, and their codes [n, h, w, N].

    bits/dim = [-sum log2 p(x_i | z_q) + 64 N log2 K] / 3072, None where there is no likelihood.
    """
    likelihood, variance = model.LIKELIHOODS[config.likelihood], dataset.variance()

    def measure(params, images):
        outputs, _, q = net.apply({"params": params}, images)
        nll, shown = likelihood.loss(outputs, images, variance)
        error = jnp.square(shown / 255 - images / 255.0).sum((1, 2, 3))
        return nll.reshape(len(nll), -1).sum(1), error, q.codes

    text = f"measuring on {len(dataset.test):,} images"
    nll, error, codes = in_batches(measure, params, dataset.test, text)
    nll, mse = (sums.mean(dtype=np.float64) / VALUES for sums in (nll, error))
    counts = np.asarray(quantize.usage(codes, *params["codebook"].shape[:2]))  # [S, K]
    perplexities = np.asarray(quantize.perplexity(counts))
    metrics = {
        "bits_per_dim": None,
        "bits_per_dim_unigram": None,
        "mse": mse,
        "nmse": mse / variance,
        "psnr": -10 * math.log10(mse) if mse else None,
        "perplexity": math.exp(np.log(perplexities).mean()),  # of the mean entropy
        "perplexity_per_codebook": [round(float(p), 1) for p in perplexities],
        "codes_used": int((counts > 0).sum()),
    }
    if likelihood.exact:
        training = images_to_codes(net, params, dataset.train[:UNIGRAM_IMAGES])
        metrics["bits_per_dim"] = nll / math.log(2) + code_bits(config)
        metrics["bits_per_dim_unigram"] = nll / math.log(2) + unigram_bits(config, training, codes)
    return metrics, codes


def images_to_codes(net, params, images):
    """The codes of images uint8 [n, 32, 32, 3]: uint16 [n, 8, 8, N]."""

    def to_codes(params, images):
        return net.apply({"params": params}, images, method="to_codes").astype(np.uint16)

    return in_batches(to_codes, params, images, f"encoding {len(images):,} images")


def unigram_bits(config, training, codes):
    """Bits/dim of `codes` [n, h, w, N] by each slot's frequencies in the codes `training` alone.

    One is added to every count: no code is impossible.
    """
    prior = 1.0 + np.float64(quantize.usage(training, config.slots, config.K))  # [N, K]
    bits = -np.log2(prior / prior.sum(1, keepdims=True))
    return bits[np.arange(config.slots), codes].sum() / len(codes) / VALUES


def in_batches(function, params, examples, text):
    """function(params, examples), its arrays [n, ...], compiled for pieces of EVAL_BATCH; a bar."""
    function, parts = jax.jit(function), []
    with bar(text, len(examples), 0) as show:
        for start in range(0, len(examples), EVAL_BATCH):
            parts.append(jax.device_get(function(params, examples[start : start + EVAL_BATCH])))
            show(min(start + EVAL_BATCH, len(examples)), "")
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def goal(config):
    """What a VQ-VAE is measured by, the published number (None where none compares), and a text."""
    key = "bits_per_dim" if model.LIKELIHOODS[config.likelihood].exact else "nmse"
    if config.dataset != "cifar10":
        return key, None, "nothing, not being CIFAR-10"
    if model.LIKELIHOODS[config.likelihood].conditioned:
        return key, None, "nothing with a pixel's colours conditioned on one another"
    slots, number, source = PUBLISHED[key]
    if config.slots != slots:
        return key, None, f"nothing with {config.slots} slots"
    return key, number, f"{number:g} {LABELS[key]} ({source})"


def measure_vqvae(config, net, dataset, params, log):
    """Task.measure of a VQ-VAE: metrics on the test images, and its pictures."""
    metrics, codes = evaluate(config, net, params, dataset)
    shown = codes_to_images(config, net, params, codes[:SHOWN])
    key, published, _ = goal(config)
    counts = np.asarray(quantize.usage(codes, *params["codebook"].shape[:2]))
    images, rmse = dataset.test[:SHOWN], 255 * math.sqrt(metrics["mse"])
    title = f"{dataset.name}, {dataset.split} images: {metrics[key]:.4g} {LABELS[key]}, "
    about = f"{title}RMSE {rmse:.1f} grey levels"
    used = f"{title}perplexity {metrics['perplexity']:.0f} of {config.K}"
    run = f"{dataset.name}, preset {config.preset}, seed {config.seed}"
    return metrics, {
        "reconstructions.png": lambda: reconstruction_figure(images, shown, about),
        "curves.png": lambda: curves_figure(log, key, metrics[key], published, run),
        "codes.png": lambda: codes_figure(images[:8], codes[:8], counts, used),
    }


# The prior over the codes of a run


def prior_task(config, run):
    """The Task of training a prior on the codes of the VQ-VAE in the folder `run`."""
    vqvae, net, progress = load(run)
    params = progress.state.params
    dataset = data.load(vqvae.dataset, config.data_dir, vqvae.val)
    mirrored = [dataset.train[:, :, ::-1]] if vqvae.flip else []
    codes = images_to_codes(net, params, np.concatenate([dataset.train, *mirrored]))  # [n, 8, 8, N]
    prior, codebook = build(config), params["codebook"]

    def loss_fn(params, codes):
        logits = prior.apply({"params": params}, codes, codebook)
        return model.softmax_nll(logits, codes).mean(), None

    def train_step(state, codes):
        after, _, metrics = adam_step(config, loss_fn, state, codes)
        bits = metrics["loss"] / math.log(2) * codes[0].size / VALUES
        return after, {**metrics, "code_bits_per_dim": bits}

    init = functools.partial(init_prior, config, prior, codebook, codes[:UNIGRAM_IMAGES])
    measure = functools.partial(measure_prior, config, (vqvae, net, params), dataset, codes)
    return Task(codes, init, train_step, measure)


def init_prior(config, prior, codebook, codes):
    """TrainState of a prior before step 1: the unigram prior of `codes` [n, h, w, N]."""
    key = jax.random.key(config.seed, impl="rbg")  # as in init_state
    params = jax.jit(prior.init)(key, codes[:1], codebook)["params"]
    counts = 1.0 + quantize.usage(codes, codes.shape[-1], codebook.shape[1])  # [N, K]
    params["slots"]["bias"] = jnp.log(counts / counts.sum(1, keepdims=True))
    return TrainState(jnp.int32(0), params, jax.jit(make_optimizer(config).init)(params), ())


def measure_prior(config, vqvae, dataset, codes, prior_params, log):
    """Task.measure of a prior: bits/dim of the run's test images under three priors, samples.

    config and prior_params: of the prior; vqvae: Config, network and parameters of the VQ-VAE;
    codes [n, h, w, N]: those that the prior was trained on.
    """
    vqvae_config, net, params = vqvae
    prior, codebook = build(config), params["codebook"]
    metrics, tested = evaluate(vqvae_config, net, params, dataset)

    def cost(prior_params, codes):
        logits = prior.apply({"params": prior_params}, codes, codebook)
        return model.softmax_nll(logits, codes).sum((1, 2, 3)) / math.log(2)

    costs = in_batches(cost, prior_params, tested, "measuring the prior")  # bits [n]
    bits = {
        "uniform": code_bits(vqvae_config),
        "unigram": unigram_bits(vqvae_config, codes[:UNIGRAM_IMAGES], tested),
        "prior": costs.mean(dtype=np.float64) / VALUES,
    }
    found = {f"code_bits_per_dim_{name}": value for name, value in bits.items()}
    if metrics["bits_per_dim"]:
        rest = metrics["bits_per_dim"] - bits["uniform"]
        found |= {f"bits_per_dim_{name}": rest + value for name, value in bits.items()}

    def samples():
        columns = [codes[:512, ..., n].ravel() for n in range(vqvae_config.slots)]
        alone = [np.random.default_rng(n).choice(c, (8, 8, 8)) for n, c in enumerate(columns)]
        alone = codes_to_images(vqvae_config, net, params, np.stack(alone, -1))
        title = f"{dataset.name}, preset {vqvae_config.preset}, temperature {config.temperature:g}"
        learned = sample_images(config, prior_params, vqvae)
        return samples_figure({"learned prior": learned, "unigram prior": alone}, title)

    title = f"prior: {bits['unigram'] - bits['prior']:.3f} bits/dim below a unigram prior"
    return found, {
        "curves.png": lambda: curves_figure(log, "code_bits_per_dim", bits["prior"], None, title),
        "samples.png": samples,
    }


def sample_images(config, prior_params, vqvae):
    """Images of codes drawn from a prior: uint8 [config.count, 32, 32, 3].

    config and prior_params: of the prior; vqvae: Config, network and parameters of the VQ-VAE.
    """
    vqvae_config, net, params = vqvae
    prior, codebook, key = build(config), params["codebook"], jax.random.key(config.seed)
    shape = config.count, 8, 8, vqvae_config.slots
    with bar(f"sampling {config.count} images", 64, 0) as show:
        how = key, shape, config.temperature, show
        codes = model.sample_codes(prior, prior_params, codebook, *how)
    return codes_to_images(vqvae_config, net, params, codes)


def codes_to_images(config, net, params, codes):
    """Pictures of codes [n, 8, 8, N], means of the likelihood: uint8 [n, 32, 32, 3]."""

    def means(params, codes):
        outputs = net.apply({"params": params}, codes, method="from_codes")
        blank = jnp.zeros((len(codes), 32, 32, 3), jnp.uint8)  # the means need no images
        return model.LIKELIHOODS[config.likelihood].loss(outputs, blank, 1.0)[1]

    levels = in_batches(means, params, codes, f"decoding {len(codes):,} images")
    return np.uint8(np.clip(levels, 0, 255).round())


def sample_again(run, flags):
    """--sample: a new grid from the prior of a run, without training."""
    finished(run)
    if not (run / "prior" / "config.json").exists():
        raise Stop(2, f"{run} has no prior yet: train one with --prior {run}.")
    config, _, prior = load(run / "prior")
    vqvae, net, progress = load(run)
    config = check(dataclasses.replace(config, **flags))
    images = sample_images(config, prior.state.params, (vqvae, net, progress.state.params))
    words = f"seed {config.seed}, temperature {config.temperature:g}"
    file = run / "prior" / f"samples-{words}.png".replace(", ", "-").replace(" ", "-")
    with atomic(file) as png:
        samples_figure({"learned prior": images}, words).savefig(png, dpi=150)
    say(f"{config.count} samples are in {file}")


# Pictures. They touch none of matplotlib's global state: this also runs inside other programs.

LABELS = {
    "bits_per_dim": "bits/dim",
    "nmse": "normalised MSE",
    "code_bits_per_dim": "bits/dim of codes",
    "perplexity": "perplexity of a batch",
    "commitment_loss": "commitment loss",
}


def new_figure(width, height, title):
    """An empty figure, sizes in inches."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=12, wrap=True)
    return figure


def draw_images(axis, images, columns, label, **style):
    """Images [n, H, W, C] as a labelled grid, row by row; returns what imshow does."""
    gap = 255 if images.dtype == np.uint8 else np.nan
    border = [(0, -len(images) % columns), (1, 1), (1, 1), (0, 0)]
    padded = np.pad(images, border, constant_values=gap)
    rows = [np.hstack(padded[i : i + columns]) for i in range(0, len(padded), columns)]
    axis.set(xticks=[], yticks=[], anchor="W")
    axis.set_ylabel(label, rotation=0, ha="right", va="center")
    axis.spines[:].set_visible(False)
    return axis.imshow(np.vstack(rows), interpolation="nearest", **style)


def reconstruction_figure(images, shown, title):
    """images, their reconstructions `shown`, both uint8 [n, 32, 32, 3], and the error.

    The error is |shown - image|, a mean over the colours. Its scale ends at the 99.5 % quantile.
    """
    n, error = len(images), np.abs(np.float32(shown) - images).mean(-1, keepdims=True)
    figure = new_figure(12, 3.2, title)
    axes = figure.subplots(3, 1)
    draw_images(axes[0], images, n, "original")
    draw_images(axes[1], shown, n, "reconstruction")
    top = max(np.quantile(error, 0.995), 1e-3)
    drawn = draw_images(axes[2], error, n, "error", cmap="magma", vmin=0, vmax=top)
    figure.colorbar(drawn, ax=axes[2], label="grey levels", extend="max", aspect=8, pad=0.01)
    return figure


def curves_figure(log, key, measured, published, title):
    """log[:][key] over steps, beside it perplexity and commitment loss where the log has them.

    measured is a point at the end; published, if it is not None, a dashed line. The first fifth of
    the log, often far above the rest, may leave a panel.
    """
    figure = new_figure(12, 4, title)
    keys = [key, *(k for k in ("perplexity", "commitment_loss") if log and k in log[-1])]
    axes = figure.subplots(1, len(keys), squeeze=False)[0]
    for axis, name in zip(axes, keys, strict=True):
        values = [line[name] for line in log]
        axis.plot([line["step"] for line in log], values, label="training")
        axis.set(xlabel="step", ylabel=LABELS[name])
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
        marks = [m for m in (measured, published) if m is not None] if name == key else []
        seen = [*values[len(values) // 5 :], *marks]
        room = 0.05 * (max(seen) - min(seen)) + 1e-3 * max(seen) if seen else 1.0
        axis.set_ylim(min(seen, default=0) - room, max(seen, default=0) + room)
    step, seconds = (log[-1]["step"], log[-1]["seconds"]) if log else (0, 0)
    axes[0].set_xlabel(f"step ({seconds / 60:.1f} minutes of training in all)")
    axes[0].plot(step, measured, "o", color="C3", label=f"measured: {measured:.4g}")
    if published is not None:
        axes[0].axhline(published, color="0.3", ls="--", label=f"published: {published:g}")
    axes[0].legend()
    return figure


def codes_figure(images, codes, counts, title):
    """images uint8 [n, 32, 32, 3] over the maps of their codes [n, 8, 8, N], four slots at most.

    Below, how often each code is used over the whole test set: counts [S, K], a line a codebook.
    """
    (S, K), slots = counts.shape, min(codes.shape[-1], 4)
    figure = new_figure(9, 1.1 * slots + 5, title)
    above, below = figure.subfigures(2, 1, height_ratios=[1.1 * slots + 1.6, 3.4])
    axes = above.subplots(1 + slots, 1)
    draw_images(axes[0], images, len(images), "image")
    for s in range(slots):
        draw_images(axes[1 + s], code_map(codes[..., s], K), len(images), f"codes,\nslot {s}")
    axes[-1].set_xlabel("in each row, the same colour is the same code (colours have no order)")
    axis = below.subplots()
    for s in range(S):
        shares = np.sort(counts[s] / counts[s].sum())[::-1]  # unused ones: off the log scale
        label = f"codebook {s}: {(counts[s] == 0).mean():.1%} unused"
        axis.plot(np.arange(1, K + 1), shares, lw=1, label=label)
    axis.axhline(1 / K, color="0.3", ls=":", label=f"uniform: 1/{K}")
    axis.set(yscale="log", xlabel="codes, most used first", ylabel="share of the positions")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return figure


def code_map(codes, K):
    """Codes [n, h, w] -> uint8 [n, 4 h, 4 w, 3]: K colours without an order, as codes are names."""
    side = max(2, math.ceil(K ** (1 / 3)))
    lattice = np.indices((side, side, side)).reshape(3, -1).T * (230 // (side - 1))  # no white
    colours = np.random.default_rng(0).permutation(lattice)[:K]
    return np.uint8(colours)[codes].repeat(4, 1).repeat(4, 2)


def samples_figure(parts, title):
    """Name of a prior -> its samples uint8 [n, 32, 32, 3], one grid under the other."""
    columns = math.ceil(math.sqrt(max(map(len, parts.values()))))
    rows = [math.ceil(len(images) / columns) for images in parts.values()]
    figure = new_figure(7, 1.2 + 6.8 * sum(rows) / columns, title)
    axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axis, (name, images) in zip(axes, parts.items(), strict=True):
        draw_images(axis, images, columns, "")
        axis.set_title(name, fontsize=10)
    return figure


# What a run leaves on disk


def survive(write, what):
    """Do a write; when the disk refuses, say so and let the run go on."""
    try:
        write()
    except OSError as error:
        say(f"could not write {what} ({error.strerror}); the run goes on.", True)


def settings(config):
    """The fields that a run has: a VQ-VAE none of the prior's, a prior none of a VQ-VAE's."""
    alien = OF_VQVAE if config.preset == "prior" else OF_PRIOR
    return {name: value for name, value in vars(config).items() if name not in alien}


def as_flag(name, value):
    """A field of Config, as it is on a command line."""
    no = "" if value else "no-"
    return f"--{no}{name}" if type(value) is bool else f"--{name}={value}"


def read_config(out):
    """The Config of a run folder; raises Stop, naming file and key, for anything else."""
    path = out / "config.json"
    try:
        saved = {"preset": "", **json.loads(path.read_text())}
        if alien := set(saved) - set(NAMES):
            raise Stop(2, f"this one has no setting {', '.join(alien)}.")
        flags = [as_flag(*pair) for pair in saved.items()]
        return check(Config(**vars(make_parser().parse_args(flags))))
    except (OSError, ValueError, TypeError):
        raise Stop(2, f"{out} is no run folder: it has no readable config.json.") from None
    except Stop as error:
        raise Stop(2, f"{path} is not of this version of the kit: {error.args[1]}") from None


def finished(run):
    """The Config of the finished VQ-VAE in a run folder; raises Stop for anything else."""
    config = read_config(run)
    if config.preset == "prior":
        raise Stop(2, f"{run} holds a prior: name the run that it is of, {run.parent}.")
    if not (run / "result.json").exists():
        raise Stop(2, f"the run in {run} is not finished: go on with --resume {run}.")
    return config


def fingerprint(config):
    """The settings that make two runs the same run, as text."""
    return json.dumps(settings(config) | {"data_dir": "", "out": ""})


def checkpoint_file(out, step):
    """Where the checkpoint of a step lies in a run folder."""
    return out / f"checkpoint-{step:09d}.msgpack"


def checkpoints(out):
    """The checkpoints of a run folder, newest first."""
    return sorted(out.glob("checkpoint-*.msgpack"), reverse=True)


def save_checkpoint(out, progress, config):
    """Write checkpoint-STEP.msgpack and keep the one before it; the file opens with its sha256."""
    state = flax.serialization.to_state_dict(jax.device_get(progress.state))
    content = {**progress._asdict(), "state": state, "config": fingerprint(config)}
    payload = flax.serialization.msgpack_serialize(content)
    with atomic(checkpoint_file(out, int(progress.state.step))) as file:
        file.write(hashlib.sha256(payload).digest() + payload)
    for old in checkpoints(out)[2:]:
        old.unlink()


def load_checkpoint(out, like, config):
    """Progress from the newest good checkpoint of a run folder.

    like: a TrainState of the same shapes. Names a damaged file, or one of other settings, and takes
    the one before it; deletes nothing. Raises Stop when none of them is good.
    """
    for file in checkpoints(out):
        content, wrong = file.read_bytes(), "is damaged"
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            wrong = f"belongs to another run than {out / 'config.json'}, or to other code"
            saved = flax.serialization.msgpack_restore(content[32:])
            if saved.pop("config") == fingerprint(config):
                with contextlib.suppress(ValueError, KeyError):
                    state = flax.serialization.from_state_dict(like, saved.pop("state"))
                    if jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, like):
                        return Progress(state=state, **saved)
        say(f"{file} {wrong}; looking for the one before it.", True)
    if checkpoints(out):
        text = f"no checkpoint in {out} is good: move it away, or name another --out,"
        raise Stop(1, f"{text} and start anew.")
    raise Stop(1, f"{out} has no checkpoint yet: go on with --resume {out}.")


def load(run):
    """A run folder again: its Config, network, and Progress of the newest checkpoint."""
    run = Path(run)
    config = read_config(run)
    net = build(config)
    init = functools.partial(init_state, config, net, None)
    if config.preset == "prior":
        vqvae, _, progress = load(run.parent)
        field, codebook = np.zeros((1, 8, 8, vqvae.slots), int), progress.state.params["codebook"]
        init = functools.partial(init_prior, config, net, codebook, field)
    return config, net, load_checkpoint(run, jax.eval_shape(init), config)


def refuse_taken(out):
    """Raises Stop for a run folder that somebody else's files are in."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Stop(2, f"{out} is not empty: go on with --resume {out}, or move it away.")


def claim(config):
    """Make the folder of a new run. Its config.json is made first, and nobody can make it twice.

    So no lock is needed, which some file systems do not have.
    """
    for n in itertools.count(1):
        out = Path(config.out or f"runs/{config.preset}-{n}")
        try:
            refuse_taken(out)
            out.mkdir(parents=True, exist_ok=True)
            with open(out / "config.json", "x") as file:
                json.dump(settings(config), file, indent=1)
            return out
        except (Stop, FileExistsError):
            if config.out:
                raise Stop(2, f"{out} is not empty: another run took it; move it away.") from None
        except OSError as error:
            text = f"cannot write to {out} ({error.strerror}): name another folder with --out."
            raise Stop(2, text) from None


# What it prints


@contextlib.contextmanager
def bar(text, total, done):
    """Yields show(done, words): a bar on a terminal; elsewhere a line at new words or every 10 s.

    80 columns hold what is done, the bar, the time left and 36 letters.
    """
    terminal = sys.stdout and not sys.stdout.closed and sys.stdout.isatty()
    begun = spoke = time.monotonic()
    first, said = done, ""

    def show(done, words):
        nonlocal begun, spoke, said
        now = time.monotonic()
        begun = now if done == first else begun  # the time to compile says nothing of what is left
        if words in ("", said) and now - spoke < (0.2 if terminal else 10):
            return
        left = (now - begun) / max(1, done - first) * (total - done)
        left = f"{datetime.timedelta(seconds=round(left))} left" if done > first else ""
        drawn = f"[{'#' * (12 * done // total):12}]" if terminal else ""
        line = f"{done:,}/{total:,} {drawn} {left}  {words or text}"
        say(f"{line:79}\r" if terminal else line, end="" if terminal else "\n")
        spoke, said = now, words

    say(text)
    yield show
    if terminal:
        say("")


def describe(line):
    """What a line of the log says, in the 36 letters that 80 columns leave beside the bar."""
    words = [f"{line[k]:.4g} {LABELS[k]}" for k in LABELS if k in line and k != "commitment_loss"]
    return ", ".join(words).removesuffix(" of a batch")


def hardware():
    """The device in words: "2 cores of AMD EPYC", "1 NVIDIA H200"."""
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} {jax.devices()[0].device_kind}"
    name = os.uname().machine
    with contextlib.suppress(OSError, IndexError):
        name = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    affinity = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count()))
    cores = len(affinity(0))
    return f"{cores} core{'s' * (cores > 1)} of {name}"


def peak_memory():
    """Largest memory in MiB so far: of the GPU, or of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB elsewhere
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return round(stats.get("peak_bytes_in_use", resident) / 2**20)


def commit():
    """The commit of this code, with a + where files differ from it; "" outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    with contextlib.suppress(OSError):
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def result_row(config, revision, progress, metrics):
    """The row for result.json: what was run, by which commit, where, how long, what it gave."""
    step = int(progress.state.step)  # less than config.steps where --eval comes before the end
    # `out` and `data_dir` are of this machine, not of the run.
    usual = vars(Config(**PRESETS[config.preset], out=config.out, data_dir=config.data_dir))
    changed = {name: v for name, v in settings(config).items() if v != usual[name]}
    if config.preset == "prior":
        changed = {"prior": Path(config.out).parent} | changed
        del changed["preset"]
    return {
        "command": " ".join(["python train.py", *(as_flag(*pair) for pair in changed.items())]),
        "commit": revision,
        **{name: getattr(config, name) for name in ("preset", "batch", "seed")},
        "steps": step,
        "train_seconds": round(progress.seconds, 1),
        "compile_seconds": round(progress.compile_seconds, 1),
        "ms_per_step": round(1e3 * progress.seconds / step, 3),
        **metrics,
        "peak_memory_mib": peak_memory(),
        "device": hardware(),
        "versions": {m.__name__: m.__version__ for m in (jax, flax, optax, np)},
        "date": datetime.date.today().isoformat(),
    }


# The command line

FOR_PRIOR = [name for name in NAMES if name not in [*OF_VQVAE, "preset", "out"]]
# verb -> what it does, and the flags that go beside it; without a verb all but those of a prior.
VERBS = {
    "resume": ("continue this run", ["data_dir"]),
    "eval": ("measure this run again", ["data_dir"]),
    "prior": ("train a prior over the codes of this run", FOR_PRIOR),
    "sample": ("draw samples from the prior of this run", ["seed", "temperature", "count"]),
}


def make_parser():
    """The flags: one for each field of Config, and the verbs. Raises Stop."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise Stop(2, f"{message}; python train.py --help lists the flags.")

    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for f in dataclasses.fields(Config):
        typed = {"type": f.type, "choices": f.metadata["choices"]}
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else typed
        changed = [f"{name}: {diff[f.name]}" for name, diff in PRESETS.items() if f.name in diff]
        text = f"{f.metadata['help']} (default: {', '.join([str(f.default) or '-', *changed])})"
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **kind)
    for verb, (text, _) in VERBS.items():
        parser.add_argument(f"--{verb}", metavar="RUN", default=argparse.SUPPRESS, help=text)
    return parser


def parse(argv):
    """Command line -> verb (of VERBS, or "train"), the run folder it names, overrides of Config."""
    flags = vars(make_parser().parse_args(argv))
    verbs = [verb for verb in VERBS if verb in flags]
    verb = verbs[0] if verbs else "train"
    run = flags.pop(verb, None)
    if len(verbs) > 1 or run == "" or flags.get("preset") == "prior":
        raise Stop(2, "give one run folder to one verb, such as --prior runs/fast-1.")
    beside = VERBS[verb][1] if verbs else [name for name in NAMES if name not in OF_PRIOR]
    if alien := [name for name in flags if name not in beside]:
        where = f"--{verb}" if verbs else "a VQ-VAE: it belongs to --prior or --sample"
        raise Stop(2, f"--{alien[0]} does not go with {where}.")
    return verb, Path(run) if verbs else None, flags


def run(argv):
    """The whole program; raises Stop."""
    verb, folder, flags = parse(argv)
    try:
        device = hardware()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0] or "its plugin is missing"
        text = f"JAX finds no device ({reason}): unset JAX_PLATFORMS"
        raise Stop(2, f"{text}, or name one that is here, such as JAX_PLATFORMS=cpu.") from None
    if verb == "sample":
        return sample_again(folder, flags)
    if verb == "prior":
        vqvae, folder = finished(folder), folder / "prior"
        flags = {"data_dir": vqvae.data_dir, **flags, "preset": "prior", "out": str(folder)}
    new = verb in ("train", "prior")
    config = configure(flags) if new else dataclasses.replace(read_config(folder), **flags)
    here = "a CPU" if jax.default_backend() == "cpu" else "a GPU"
    why = "" if verb != "train" or "preset" in flags else f", the one for {here}"
    say(f"preset {config.preset}{why}: {config.steps:,} steps of {config.batch} images on {device}")
    say(f"measured with this preset: {ABOUT.get(config.preset, 'nothing yet')}")
    if config.preset != "prior":
        say(f"published: {goal(config)[2]}")
    if new and config.out:
        refuse_taken(Path(config.out))  # before the wait
    # A row alone is not the end: a full disk may have refused the last checkpoint.
    measured = verb == "resume" and (folder / "result.json").exists()
    if measured and checkpoint_file(folder, config.steps).exists():
        raise Stop(2, f"the run in {folder} is finished: measure it again with --eval {folder}.")
    task = prior_task(config, folder.parent) if config.preset == "prior" else vqvae_task(config)
    if config.batch > len(task.examples):
        raise Stop(2, f"--batch {config.batch} is more than {len(task.examples)} images.")
    out = claim(config) if new else folder
    revision = commit()  # now, as the files may change while it runs
    say(f"the run is in {out}")
    if verb == "eval" or checkpoints(out):
        progress = load(out)[2]
    else:
        say("preparing the start")
        progress = Progress(task.init(), [], {}, 0.0, 0.0)
    try:
        progress = progress if verb == "eval" else train(config, task, progress, out)
        metrics, pictures = task.measure(jax.device_get(progress.state.params), progress.log)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        half = max(1, config.batch // 2)
        text = f"--batch {config.batch} is too much memory: start anew with --batch {half}."
        raise Stop(1, text) from None
    except KeyboardInterrupt:
        raise Stop(130, f"stopped; go on with --resume {out}") from None
    row = json.dumps(result_row(config, revision, progress, metrics), indent=1) + "\n"
    with atomic(out / ("eval.json" if verb == "eval" else "result.json")) as file:
        file.write(row.encode())
    return show_result(out, metrics, pictures, config)


def show_result(out, metrics, pictures, config):
    """Print the metrics, then draw the pictures."""
    for key, value in metrics.items():
        if value is not None and key != "perplexity_per_codebook":
            say(f"  {key:26} {value:.6g}")
    if config.preset != "prior":
        say(f"  published: {goal(config)[2]}")
    for name, draw in pictures.items():
        try:
            with atomic(out / name) as file:
                draw().savefig(file, dpi=150)
        except Exception as error:  # noqa: BLE001 (the numbers above stand)
            say(f"could not draw {name} ({error!r}): --eval {out} draws it again.", True)
    say(f"metrics, log and pictures are in {out}")


def main(argv=None):
    """Command line: 0 when done, 1 when the run failed, 2 for a wrong command, 128 + signal."""
    try:
        run(sys.argv[1:] if argv is None else argv)
        return 0
    except Stop as stop:
        code, text = stop.args
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code, text = 1, f"{where}{error.strerror or error}; no file was deleted."
    except KeyboardInterrupt:
        code, text = 130, "stopped."
    say(f"train.py: {text}", True)
    return code


def keep_memory():
    """Have malloc keep what is freed, in this program alone: XLA frees its buffers at every step,
    and having the kernel clear them anew takes up to a seventh of a step on a CPU.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing goes back to the kernel


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
