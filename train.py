"""Trains, measures and shows a VQ-VAE: the loop, the evaluation, the pictures, the command line.

    python train.py                      as many latents as the paper's, a better start; for a CPU
        --likelihood logistic --K 1024   the same, to be held against 4.67: colours independent
    python train.py --preset paper       8x8x10 latents; published: 4.67 bits/dim
    python train.py --preset notebook    8x8x1 latents; published: normalised MSE .056

What each costs and gives is in README.md, measured. The loss is eq. 3 of the paper (quantize.py):

    -log p(x | z_q) + |sg[z_e] - e|^2 + beta |z_e - sg[e]|^2

its first term a mean over the 3072 colour values (in nats), the others over the elements of z_e.
Order of the file: configuration, one step, measuring, pictures, checkpoints, the run, errors.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import math
import os
import platform
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import data
import model
import quantize

SHOWN = 16  # test images in the pictures
START_IMAGES = 4000  # what a data-dependent start looks at
EVAL_BATCH = 100
PIXELS = 32 * 32 * 3  # what bits/dim divides by


class UsageError(Exception):
    """The command line asks for something that cannot be: exit code 2."""


class RunError(Exception):
    """The run cannot go on: exit code 1."""


class Interrupted(Exception):
    """A signal ended the run after its checkpoint was written: exit code 128 + signal."""


def flag(default, text, choices=None, low=None, high=None):
    """A field of Config: its default, its help, and the values that make sense."""
    checks = {"help": text, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=checks)


TINY = 1e-12  # stands for "above zero"


# What each preset has other than the defaults of Config, which are those of `paper`.
PRESETS = {
    "paper": {},
    "fast": {
        "net": "transform", "hidden": 128, "residual": 32, "D": 6, "likelihood": "colours",
        "quantizer": "trellis", "codebook": "ema", "gamma": 0.98, "restart": 0.05, "init": "pca",
        "lr": 6e-4, "warmup": 200, "decay": 0.7, "batch": 64, "steps": 5_000, "flip": True,
    },
    "notebook": {
        "slots": 1, "hidden": 128, "residual": 32, "net": "deepmind", "likelihood": "gaussian",
        "codebook": "ema", "lr": 3e-4, "batch": 32, "steps": 10_000,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """One field, one flag. The defaults are the paper's (section 4.1)."""

    preset: str = flag("fast", "where the other defaults come from", list(PRESETS))
    dataset: str = flag("cifar10", "images to train on", list(data.DATASETS))
    data_dir: str = flag("data", "folder with CIFAR-10, or to fetch it into")
    val: bool = flag(False, "measure on the last tenth of the training images, held out")
    flip: bool = flag(False, "mirror half of the training images")
    slots: int = flag(10, "N, latents at each of the 8x8 positions", low=1, high=1024)
    K: int = flag(512, "codes in a codebook", low=2, high=65536)
    D: int = flag(64, "length of a code", low=1, high=4096)
    shared: bool = flag(False, "one codebook for all slots instead of one each")
    hidden: int = flag(256, "channels of the networks", low=2, high=8192)
    residual: int = flag(256, "channels inside a residual block", low=1, high=8192)
    blocks: int = flag(2, "residual blocks on each side", low=0, high=100)
    net: str = flag("paper", "section 4.1's networks, DeepMind's example's, or transform",
                    list(model.NETS))  # fmt: skip
    likelihood: str = flag("categorical", "p(x | z_q)", list(model.LIKELIHOODS))
    quantizer: str = flag("nearest", "which codes replace z_e: the nearest, or the best sequence "
                          "of a trellis", list(quantize.QUANTIZERS))  # fmt: skip
    codebook: str = flag("gradient", "how the codebook learns", ["gradient", "ema"])
    gamma: float = flag(0.99, "EMA: weight of the past", low=0.0, high=1 - 1e-9)
    restart: float = flag(0.0, "EMA: move codes used less a batch than this", low=0.0, high=1e6)
    init: str = flag("random", "start: random; codebook from the first batch (data); or fitted "
                     "transform (pca)", ["random", "data", "pca"])  # fmt: skip
    beta: float = flag(0.25, "weight of the commitment loss", low=0.0, high=1e6)
    lr: float = flag(2e-4, "Adam's learning rate", low=TINY, high=1e3)
    warmup: int = flag(0, "steps over which lr rises from 0", low=0)
    decay: float = flag(0.0, "last part of the run, over which lr and 1 - gamma fall linearly to 0",
                        low=0.0, high=1.0)  # fmt: skip
    batch: int = flag(128, "images a step", low=1)
    steps: int = flag(250_000, "length of the run", low=1, high=10**9)
    seed: int = flag(0, "of the weights and of the order of the images", low=0, high=2**31 - 1)
    dtype: str = flag("auto", "of the activations; auto: bfloat16 on a GPU, float32 on a CPU",
                      ["auto", "float32", "bfloat16"])  # fmt: skip
    out: str = flag("", "folder of the run (default: runs/PRESET-1, -2, ...)")
    log_every: int = flag(100, "steps between two lines of the log", low=1)
    checkpoint_minutes: float = flag(5.0, "between two checkpoints", low=TINY, high=1e6)


# What a preset is after, and where that number comes from.
PUBLISHED = {
    "fast": "4.67 bits/dim (arXiv 1711.00937, colours independent given z_q)",
    "paper": "4.67 bits/dim (arXiv 1711.00937, section 4.1)",
    "notebook": "normalised MSE .056, perplexity 326 (DeepMind's notebook, on training batches)",
}


def parse(argv):
    """Command line -> overrides of Config, then what --resume, --eval and --distributed say."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UsageError(f"{message}; python train.py --help lists the flags.")

    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        if f.metadata["choices"]:
            kind["choices"] = f.metadata["choices"]
        changed = [f"{name}: {diff[f.name]}" for name, diff in PRESETS.items() if f.name in diff]
        text = f"{f.metadata['help']} (default: {', '.join([str(f.default) or '-', *changed])})"
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **kind)
    parser.add_argument("--resume", metavar="RUN", help="continue this run")
    parser.add_argument("--eval", metavar="RUN", help="measure this run again")
    parser.add_argument(
        "--distributed", nargs="?", const="auto", metavar="HOST:PORT,COUNT,INDEX",
        help="train on several machines; SLURM and Open MPI need no value",
    )  # fmt: skip
    overrides = vars(parser.parse_args(argv))
    resume, again, join = (overrides.pop(name) for name in ("resume", "eval", "distributed"))
    if "" in (resume, again) or (resume and again):
        raise UsageError("give one run folder to --resume or --eval, such as --eval runs/paper-1.")
    if again and set(overrides) - {"data_dir"}:
        raise UsageError("--eval takes its settings from the run: only --data_dir goes beside it.")
    if join and (again or not (resume or overrides.get("out"))):
        raise UsageError("--distributed needs --out or --resume: process I writes to OUT-I.")
    return overrides, resume, again, join


def configure(overrides):
    """Config from a preset and what the command line changes; raises UsageError for nonsense."""
    preset = overrides.get("preset", Config.preset)
    config = Config(**{**PRESETS[preset], **overrides})
    for f in dataclasses.fields(Config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        if f.type is float and not math.isfinite(value):
            raise UsageError(f"--{f.name} {value} is not a number: give a finite one.")
        if low is not None and value < low:
            bound = "above 0" if low == TINY else f"at least {low}"
            raise UsageError(f"--{f.name} {value} is too small: it must be {bound}.")
        if high is not None and value > high:
            bound = "below 1" if f.name == "gamma" else f"at most {high}"
            raise UsageError(f"--{f.name} {value} is too large: it must be {bound}.")
    for name in ("gamma", "restart"):
        if config.codebook != "ema" and name in overrides:
            raise UsageError(f"--{name} belongs to the EMA codebook: add --codebook ema.")
    if (config.init == "pca") != (config.net == "transform"):
        raise UsageError("--net transform is fitted by --init pca, and only that: give both.")
    if config.init == "pca" and config.shared:
        raise UsageError("--init pca makes a codebook for each slot: leave --shared out.")
    if config.quantizer == "trellis" and (config.K % 2 or config.slots == 1):
        raise UsageError("--quantizer trellis needs an even --K, and --slots 2 or more.")
    if config.net == "transform" and config.D < model.BANDS:
        raise UsageError(f"--net transform needs --D {model.BANDS}, its gains, or more.")
    if config.init == "pca" and config.likelihood not in ("logistic", "colours"):
        raise UsageError("--init pca sets means and scales: --likelihood logistic or colours.")
    if not config.data_dir:
        raise UsageError('--data_dir "" names no folder: give one, such as --data_dir data.')
    return config


class TrainState(NamedTuple):
    """All that a step changes. Random numbers come from the seed and `step`."""

    step: jax.Array
    params: Any
    opt: Any
    ema: Any  # quantize.EMA, or () where the codebook learns by gradient


def build(config):
    """The network that a configuration describes: model.VQVAE."""
    cpu = jax.default_backend() == "cpu"
    dtype = {"auto": "float32" if cpu else "bfloat16"}.get(config.dtype, config.dtype)
    same = ("net", "hidden", "residual", "blocks", "slots", "K", "D", "shared", "quantizer")
    return model.VQVAE(
        **{name: getattr(config, name) for name in same},
        outputs=model.LIKELIHOODS[config.likelihood][0],
        dtype=jnp.dtype(dtype),
    )


def fall(config, step):
    """1, and over the last `decay` of the run linearly down to 0: what slows lr and the EMA."""
    return jnp.minimum(1.0, (config.steps - step) / max(1, config.decay * config.steps))


def make_optimizer(config):
    """Adam. Its learning rate rises over the first steps and falls to 0 over the last ones."""

    def schedule(step):
        rise = (step + 1) / max(1, config.warmup)
        return config.lr * jnp.minimum(rise, fall(config, step))

    return optax.adam(schedule)


def init_state(config, net, images):
    """TrainState before step 1; images uint8 [n, 32, 32, 3] are those of the first steps.

    None for the images leaves out what depends on the data, for a state of the same shapes.
    """
    key = jax.random.key(config.seed, impl="rbg")  # the default one takes seconds more to compile
    params = jax.jit(net.init)(key, np.zeros((1, 32, 32, 3), np.uint8))["params"]
    S, K, _ = params["codebook"].shape
    start = "random" if images is None else config.init
    if start == "data":
        first = images[: config.batch]
        z_e = jax.jit(lambda p, x: net.apply({"params": p}, x, method="encode"))(params, first)
        params["codebook"] = quantize.draw(jax.random.fold_in(key, 1), z_e, S, K)
    if start == "pca":
        params = model.transform_start(net, params, images, jax.random.fold_in(key, 1))
    ema = quantize.ema_init(params["codebook"]) if config.codebook == "ema" else ()
    return TrainState(jnp.int32(0), params, jax.jit(make_optimizer(config).init)(params), ema)


def make_train_step(config, net, variance):
    """The update: `state, metrics = train_step(state, images)`, images uint8 [B, 32, 32, 3]."""
    _, likelihood, exact = model.LIKELIHOODS[config.likelihood]
    optimizer = make_optimizer(config)

    def loss_fn(params, images):
        outputs, z_e, q = net.apply({"params": params}, images)
        reconstruction = likelihood(outputs, images, variance)[0].mean()
        loss = reconstruction + config.beta * q.commitment_loss
        if config.codebook == "gradient":  # under EMA the average below replaces this term
            loss = loss + q.codebook_loss
        return loss, (reconstruction, z_e, q)

    def train_step(state, images):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if config.flip:
            mirror = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
            images = jnp.where(mirror, images[:, :, ::-1], images)
        (loss, (reconstruction, z_e, q)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, images
        )
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params, ema = optax.apply_updates(state.params, updates), state.ema
        if config.codebook == "ema":  # the codebook's own gradient was zero
            gamma = 1 - (1 - config.gamma) * fall(config, state.step)
            ema, e = quantize.ema_update(ema, params["codebook"], z_e, q.codes, gamma)
            if config.restart:
                ema, e = quantize.restart(key, ema, e, z_e, config.restart)
            params = {**params, "codebook": e}
        S, K = len(params["codebook"]), config.K
        bits = reconstruction / math.log(2) + code_bits(config)
        metrics = {
            "loss": loss,
            **({"bits_per_dim": bits} if exact else {"nmse": reconstruction}),
            "codebook_loss": q.codebook_loss,
            "commitment_loss": q.commitment_loss,
            "perplexity": quantize.perplexity(quantize.usage(q.codes % K, S, K)).mean(),
            "grad_norm": optax.tree.norm(grads),
        }
        return TrainState(state.step + 1, params, opt, ema), metrics

    return train_step


def code_bits(config):
    """What the latents cost under the uniform prior, in bits/dim: 64 N log2(K) / 3072."""
    return 64 * config.slots * math.log2(config.K) / PIXELS


def make_train_steps(train_step):
    """Many steps in one launch: state, images [n, 32, 32, 3], index [count, batch] -> the same.

    The images live on the device, so a launch needs only indices. A GPU scans. A CPU unrolls (and
    gets one step a launch), because XLA's convolutions are many times slower inside a loop.
    """

    def train_steps(state, images, index):
        if jax.default_backend() != "cpu":
            return jax.lax.scan(lambda s, i: train_step(s, images[i]), state, index)
        metrics = []
        for i in index:
            state, last = train_step(state, images[i])
            metrics.append(last)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *metrics)

    return jax.jit(train_steps, donate_argnums=0, compiler_options=compiler_options())


# On a CPU: sums by YNNPACK, and nothing else. By default it takes matmuls and convolutions too, and
# a step of the paper's net nearly half as long again.
XLA_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_backend_optimization_level": 1,  # compiles a quarter faster; the step is no slower
}


def compiler_options():
    """XLA_OPTIONS; none on other devices, or where this jaxlib does not know them."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=XLA_OPTIONS)()
    except jax.errors.JaxRuntimeError:
        return {}
    return XLA_OPTIONS


def matmul_rate(config, net):
    """Operations a second of square matmuls in the dtype of the activations, on all devices."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    x, multiply = jnp.ones((side, side), net.dtype), jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds) * device_count(config)


def evaluate(config, net, params, dataset):
    """Metrics over every image of `dataset.test`, code counts [N, K], reconstructions of a few.

    bits/dim = [-sum log2 p(x_i | z_q) + 64 N log2 K] / 3072, None where there is no likelihood.
    """
    _, likelihood, exact = model.LIKELIHOODS[config.likelihood]
    variance = dataset.variance()

    @jax.jit
    def measure(params, images):
        outputs, _, q = net.apply({"params": params}, images)
        nll, shown = likelihood(outputs, images, variance)
        error = jnp.square(shown / 255 - images / 255.0).sum()
        return nll.sum(), error, q.codes % config.K, shown

    @jax.jit
    def count(params, images):
        codes = net.apply({"params": params}, images, method="to_codes")
        return quantize.usage(codes, codes.shape[-1], config.K)  # [N, K]

    measured = [measure(params, images) for images in batches(dataset.test)]
    nll, error, codes, shown = zip(*measured, strict=True)
    values = dataset.test.size  # 3072 an image
    nll, mse = (np.sum(np.float64(sums)) / values for sums in (nll, error))
    codes = np.concatenate(codes)  # [n, h, w, N]
    used = np.asarray(quantize.usage(codes, codes.shape[-1], config.K))
    pooled = used.sum(0, keepdims=True) if config.shared else used  # [S, K]
    perplexities = np.asarray(quantize.perplexity(pooled))
    metrics = {
        "bits_per_dim": None,
        "bits_per_dim_unigram": None,
        "mse": mse,
        "nmse": mse / variance,
        "psnr": -10 * math.log10(mse) if mse else None,
        "perplexity": math.exp(np.log(perplexities).mean()),
        "perplexity_per_codebook": [round(float(p), 1) for p in perplexities],
        "codes_used": int((pooled > 0).sum()),
    }
    if exact:
        prior = 1.0 + sum(np.float64(count(params, x)) for x in batches(dataset.train))
        bits = -np.log2(prior / prior.sum(1, keepdims=True))  # one added: no code is impossible
        metrics["bits_per_dim"] = nll / math.log(2) + code_bits(config)
        metrics["bits_per_dim_unigram"] = nll / math.log(2) + (used * bits).sum() / values
    return metrics, used, (np.asarray(shown[0])[:SHOWN], codes[:SHOWN])


def batches(images):
    """All images in pieces of EVAL_BATCH, the last one as small as it must be."""
    return (images[i : i + EVAL_BATCH] for i in range(0, len(images), EVAL_BATCH))


def draw_pictures(out, config, dataset, log, counts, shown):
    """Write reconstructions.png, curves.png and codes.png into the folder `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    images, (reconstructions, codes) = dataset.test[:SHOWN], shown
    codes = model.from_blocks(codes, 8 // codes.shape[1])  # [SHOWN, 8, 8, slots]
    title = f"{dataset.name}, {dataset.split} images"

    def save(figure, name):
        with atomic(out / name) as part:
            figure.savefig(part, format="png", dpi=150)
        plt.close(figure)

    rows = [images, reconstructions.round().astype(np.uint8)]
    grid = np.concatenate([np.concatenate(list(row), 1) for row in rows])  # [64, 32 SHOWN, 3]
    figure, axis = plt.subplots(figsize=(12, 2), layout="constrained")
    axis.imshow(grid, interpolation="nearest")
    axis.set(title=f"{title}: originals above, reconstructions below", xticks=[], yticks=[])
    save(figure, "reconstructions.png")

    fit = "bits_per_dim" if model.LIKELIHOODS[config.likelihood][2] else "nmse"
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    label = {"bits_per_dim": "bits/dim", "nmse": "normalised MSE"}[fit]
    names = {fit: label, "perplexity": "perplexity", "commitment_loss": "commitment loss"}
    for axis, (key, label) in zip(axes, names.items(), strict=True):
        axis.plot([line["step"] for line in log], [line[key] for line in log])
        axis.set(xlabel="step", title=f"{label}, training batches")
        axis.set_yscale("log" if key == "nmse" else "linear")
        axis.grid(alpha=0.3)
    figure.suptitle(f"{dataset.name}, preset {config.preset}, seed {config.seed}")
    save(figure, "curves.png")

    figure = plt.figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplot_mosaic([list("abcdefgh"), ["usage"] * 8], height_ratios=[1, 1.3])
    for name, image_codes in zip("abcdefgh", codes, strict=False):
        axes[name].imshow(image_codes[..., 0], cmap="nipy_spectral", vmin=0, vmax=config.K - 1)
        axes[name].set(xticks=[], yticks=[])
    usage = np.sort(counts, -1)[:, ::-1] / counts.sum(-1, keepdims=True)  # [N, K]
    axes["usage"].plot(usage.T, lw=0.8)
    axes["usage"].axhline(1 / config.K, color="black", lw=0.8, ls=":")
    axes["usage"].set(yscale="log", xlabel="codes of a slot, most used first", ylabel="frequency")
    figure.suptitle(f"{title}: code maps of the first slot; use of the codes (dotted: uniform)")
    save(figure, "codes.png")


@contextlib.contextmanager
def atomic(path):
    """Yields a new file's name beside `path` and moves it there: nobody sees half a file."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    """Write one JSON object, indented."""
    with atomic(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


class Progress(NamedTuple):
    """What a checkpoint holds: the state, the metrics since the last log line, the clock."""

    state: TrainState
    pending: dict  # name -> float32 [steps since the last log line]
    seconds: float
    compile_seconds: float


def checkpoints(out):
    """The checkpoints of a run folder, newest first."""
    return sorted(out.glob("checkpoint-*.msgpack"), reverse=True)


def fingerprint(config):
    """The settings that make two runs the same run, as text."""
    return json.dumps(dataclasses.asdict(config) | {"data_dir": "", "out": ""})


def save_checkpoint(out, progress, config):
    """Write checkpoint-STEP.msgpack and keep the one before it; the file opens with its sha256."""
    step = int(progress.state.step)
    state = flax.serialization.to_state_dict(jax.device_get(progress.state))
    content = {**progress._asdict(), "state": state, "config": fingerprint(config)}
    payload = flax.serialization.msgpack_serialize(content)
    with atomic(out / f"checkpoint-{step:09d}.msgpack") as part:
        part.write_bytes(hashlib.sha256(payload).digest() + payload)
    for old in checkpoints(out)[2:]:
        old.unlink()


def load_checkpoint(run, like, config):
    """Progress from the newest checkpoint of a run folder, or from the checkpoint file `run`.

    like: a TrainState of the same shapes. Raises RunError for a damaged file or one of another
    configuration; deletes nothing.
    """
    files = checkpoints(run) if run.is_dir() else [run]
    if not files:
        raise RunError(f"{run} has no checkpoint yet: start that run again with another --out.")
    content = files[0].read_bytes() if files[0].exists() else b""
    wrong = "is damaged" if hashlib.sha256(content[32:]).digest() != content[:32] else ""
    saved = {} if wrong else flax.serialization.msgpack_restore(content[32:])
    if not wrong and saved.pop("config") != fingerprint(config):
        wrong = f"belongs to another run than {files[0].parent / 'config.json'}"
    if wrong:
        older = [f for f in checkpoints(files[0].parent) if f < files[0]]
        remedy = f"continue from the one before it: --resume {older[0]}" if older else "start anew"
        raise RunError(f"{files[0]} {wrong}: {remedy}.")
    state = flax.serialization.from_state_dict(like, saved.pop("state"))
    return Progress(state=state, **saved)


def is_empty(out):
    """Whether a folder holds nothing, or nothing but the lock of a run that never began."""
    return not out.exists() or all(file.name == "lock" for file in out.iterdir())


def claim(out, fresh):
    """Make the run folder, or take an old one; holds a lock that dies with the process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if fresh and not is_empty(out):
            raise UsageError(f"--out {out} is not empty: name a new folder, or --resume {out}.")
        lock = open(out / "lock", "w")  # noqa: SIM115, the caller holds it
    except OSError as error:
        raise UsageError(f"cannot write to --out {out} ({error.strerror}): name another.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"another run writes to {out}: wait for it, or name another.") from None
    return lock


def open_run(overrides, resume):
    """Config, run folder and its lock: a new run, or the one that `resume` names."""
    if not resume:
        config = configure(overrides)
        out = Path(config.out) if config.out else None
        for n in range(1, 10**6) if out is None else ():
            out = Path("runs") / f"{config.preset}-{n}"
            if is_empty(out):
                break
        return config, out, claim(out, fresh=True)
    out = Path(resume) if Path(resume).is_dir() else Path(resume).parent
    config = read_config(out)
    for name, value in overrides.items():
        if name not in ("data_dir", "out", "preset") and value != getattr(config, name):
            raise UsageError(
                f"--{name} {value} is not what the run in {out} has, {getattr(config, name)}: "
                "leave the flag out, or start a new run."
            )
    if (out / "result.json").exists():
        raise UsageError(f"the run in {out} is finished: measure it again with --eval {out}.")
    config = dataclasses.replace(config, data_dir=overrides.get("data_dir", config.data_dir))
    return config, out, claim(out, fresh=False)


def read_config(out):
    """The Config of a run folder; raises UsageError where there is none."""
    try:
        return Config(**json.loads((out / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise UsageError(f"{out} is no run folder: it has no readable config.json.") from None


def load(run):
    """A run again: its Config, network, and parameters from the newest checkpoint.

    run: a run folder, or a checkpoint file in one.
    """
    run = Path(run)
    config = read_config(run if run.is_dir() else run.parent)
    net = build(config)
    shapes = jax.eval_shape(lambda: init_state(config, net, None))
    return config, net, load_checkpoint(run, shapes, config).state.params


def join_processes(how):
    """Become one of several processes through jax.distributed; returns this one's index.

    how: "auto", or "HOST:PORT,COUNT,INDEX" with the address of process 0. Before any use of JAX.
    """
    try:
        if how == "auto":
            jax.distributed.initialize()
        else:
            address, count, index = how.split(",")
            jax.distributed.initialize(address, int(count), int(index))
    except (ValueError, IndexError, RuntimeError) as error:
        raise UsageError(
            f"--distributed {how} does not join ({str(error).splitlines()[0]}): give --distributed "
            "HOST:PORT,COUNT,INDEX with the address of process 0 and this one's index."
        ) from None
    return jax.process_index()


def stop_signal(caught, logs):
    """The signal to stop at, or 0. Several processes agree on it, at lines of the log."""
    if jax.process_count() == 1:
        return caught[0] if caught else 0
    mine = np.int32(caught[0] if caught else 0)
    return int(multihost_utils.process_allgather(mine).max()) if logs else 0


def device_count(config):
    """Devices that a batch is split over: all of them, where they divide it."""
    count = math.gcd(config.batch, jax.device_count())
    if count < jax.device_count() and jax.process_count() > 1:
        raise UsageError(f"--batch must be a multiple of the {jax.device_count()} devices.")
    return count


def place(tree, sharding):
    """Arrays on the devices of all processes, each of which has the whole of them."""

    def one(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda where: x[where])

    return jax.tree.map(one, tree)


def placements(config):
    """How arrays lie on the devices: whole on each, or [count, batch] split over the batch."""
    devices = jax.devices()[: device_count(config)]
    mesh = jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "batch"))


@contextlib.contextmanager
def signals():
    """Yields a list that the first Ctrl-C or SIGTERM is put into; a second one stops at once."""
    numbers, caught = (signal.SIGINT, signal.SIGTERM), []
    before = [signal.getsignal(number) for number in numbers]

    def restore():
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

    def note(number, frame):
        caught.append(number)
        restore()

    for number in numbers:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        restore()


def train(config, net, progress, dataset, out):
    """The loop: from `progress` to the last step, or to a signal. Returns Progress and the log."""
    whole, split = placements(config)
    train_steps = make_train_steps(make_train_step(config, net, dataset.variance()))
    images, state = place((dataset.train, progress.state), whole)
    launch = 1 if jax.default_backend() == "cpu" else config.log_every
    step, saved, compiled, waiting = int(state.step), time.monotonic(), {}, []
    log, rate, least = open_log(out, step), matmul_rate(config, net), math.nan
    with signals() as caught, display(config, step) as show:
        clock = time.perf_counter()
        while step < config.steps:
            to_log = config.log_every - step % config.log_every
            count = min(launch, to_log, config.steps - step)
            order = data.order(config.seed, len(dataset.train), config.batch, step, count)
            index = place(order, split)
            if count not in compiled:
                start = time.perf_counter()
                lowered = train_steps.lower(state, images, index)
                compiled[count] = lowered.compile()
                least = lowered.cost_analysis()["flops"] / rate  # of one step: a loop counts once
                took = time.perf_counter() - start
                progress = progress._replace(compile_seconds=progress.compile_seconds + took)
                clock += took  # off the clock
            state, metrics = compiled[count](state, images, index)
            waiting.append(metrics)
            step += count
            show(step, None)

            logs = step % config.log_every == 0 or step == config.steps
            due = time.monotonic() - saved > 60 * config.checkpoint_minutes
            stop = stop_signal(caught, logs)
            if logs or due or stop:
                progress = collect(progress, state, waiting)
                seconds = progress.seconds + time.perf_counter() - clock
                progress, waiting = progress._replace(seconds=seconds), []
                check_finite(config, progress.pending, step)
                if logs:
                    log.append(write_log(out, step, progress, log, least))
                    show(step, log[-1])
                    progress = progress._replace(pending={})
                if due or stop or step == config.steps:
                    survive(lambda p=progress: save_checkpoint(out, p, config), "the checkpoint")
                    saved = time.monotonic()
                clock = time.perf_counter()
            if stop:
                raise Interrupted(stop, step, out)
    return progress, log


def collect(progress, state, waiting):
    """Fetch the metrics of the last launches, which waits for them, beside those pending."""
    fetched = jax.device_get(waiting)
    names = fetched[0] if fetched else progress.pending
    pending = {
        name: np.concatenate([progress.pending.get(name, []), *(m[name] for m in fetched)])
        for name in names
    }
    return progress._replace(state=state, pending=pending)


def check_finite(config, pending, step):
    """Raise RunError with the first step and term that is not a finite number."""
    wrong = {name: np.flatnonzero(~np.isfinite(values)) for name, values in pending.items()}
    wrong = {name: int(where[0]) for name, where in wrong.items() if len(where)}
    if wrong:
        first = min(wrong.values())
        names = ", ".join(name for name, where in wrong.items() if where == first)
        count = len(pending["loss"])
        raise RunError(
            f"step {step - count + first + 1}: {names} is no longer a finite number (learning rate "
            f"{config.lr:g}). The last checkpoint stands. Try --lr {config.lr / 3:.1g}."
        )


def survive(write, what):
    """Do a write; when the disk refuses, say so and let the run go on."""
    try:
        write()
    except OSError as error:
        print(
            f"could not write {what} ({error.strerror}): the run goes on; free some space.",
            file=sys.stderr,
        )


def read_log(out):
    """The lines of log.jsonl, without one that a full disk cut short."""
    path, lines = out / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def open_log(out, step):
    """Lines of log.jsonl up to `step`; later ones, which a killed run wrote, are dropped."""
    lines = [line for line in read_log(out) if line["step"] <= step]
    with atomic(out / "log.jsonl") as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def write_log(out, step, progress, log, least):
    """Append to log.jsonl the means since the last line; returns the line.

    mfu: `least`, the seconds of a step's arithmetic as a matmul, over the seconds that it took.
    """
    before = log[-1] if log else {"step": 0, "seconds": 0.0}
    ms = 1e3 * (progress.seconds - before["seconds"]) / (step - before["step"])
    line = {name: float(np.mean(values)) for name, values in progress.pending.items()}
    clock = {"ms_per_step": ms, "mfu": 1e3 * least / ms, "seconds": progress.seconds}
    line = {"step": step, **line, **clock}

    def append():
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    survive(append, "a line of the log")
    return line


@contextlib.contextmanager
def display(config, step):
    """Yields show(step, line of the log or None): a bar on a terminal, plain lines elsewhere."""
    fits, clocks = ("bits_per_dim", "nmse"), ("ms_per_step", "mfu")
    columns = ("step", *fits, "perplexity", "commitment_loss", *clocks)
    if sys.stdout.isatty():
        from rich import progress as rich

        parts = rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn()
        with rich.Progress(*parts, rich.TextColumn("{task.description}")) as bar:
            task = bar.add_task("compiling", total=config.steps, completed=step)

            def show(step, line):
                bar.update(task, completed=step)
                if line:
                    shown = [f"{name} {line[name]:.4g}" for name in columns[1:] if name in line]
                    bar.update(task, description="  ".join(shown))

            yield show
        return

    header = []

    def show(step, line):
        if line:
            names = [name for name in columns if name in line]
            if not header:
                header.append(print(" ".join(f"{name:>15}" for name in names)))
            print(" ".join(f"{line[name]:15.5g}" for name in names), flush=True)

    yield show


def hardware():
    """The device in words: "2 cores of AMD EPYC", "1 NVIDIA H200"."""
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} {jax.devices()[0].device_kind}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    affinity = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count()))
    cores = len(affinity(0))
    return f"{cores} core{'s' * (cores > 1)} of {name}"


def peak_memory():
    """Largest memory in MiB so far: of the GPU, or of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB elsewhere
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return round(stats.get("peak_bytes_in_use", resident) / 2**20)


def measure(config, net, params, dataset, out, log):
    """Evaluate, draw the pictures into `out`; returns the metrics."""
    n = len(dataset.test)
    print(f"measuring on {n:,} {dataset.split} images of {dataset.name}", flush=True)
    metrics, counts, shown = evaluate(config, net, params, dataset)
    survive(lambda: draw_pictures(out, config, dataset, log, counts, shown), "the pictures")
    for name, value in metrics.items():
        if value is not None and name != "perplexity_per_codebook":
            print(f"  {name:22} {value:.6g}")
    if config.dataset == "cifar10":
        print(f"  published              {PUBLISHED[config.preset]}")
    else:
        print("  This is not CIFAR-10: no published number belongs beside these.")
    return metrics


def result_row(config, argv, progress, metrics, dataset):
    """The row for result.json: what was run, where, how long it took, what it gave."""
    ms = 1e3 * progress.seconds / config.steps
    settings = ("preset", "likelihood", "steps", "batch", "seed")
    return {
        "command": " ".join(["python train.py", *argv]),
        "dataset": dataset.name,
        "split": dataset.split,
        **{name: getattr(config, name) for name in settings},
        "train_seconds": round(progress.seconds, 1),
        "compile_seconds": round(progress.compile_seconds, 1),
        "ms_per_step": round(ms, 3),
        "images_per_second": round(1e3 * config.batch / ms, 1),
        **metrics,
        "peak_memory_mib": peak_memory(),
        "device": hardware(),
        "devices": device_count(config),
        "versions": {m.__name__: m.__version__ for m in (jax, flax, optax, np)},
        "date": datetime.date.today().isoformat(),
    }


def run(argv):
    """The whole program; raises UsageError, RunError, data.DataError or Interrupted."""
    overrides, resume, again, join = parse(argv)
    if again:
        config, net, params = load(again)
        dataset = data.load(config.dataset, overrides.get("data_dir", config.data_dir), config.val)
        out = Path(again) if Path(again).is_dir() else Path(again).parent
        metrics = measure(config, net, params, dataset, out, read_log(out))
        write_json(out / "eval.json", metrics)
        return
    if join and (index := join_processes(join)):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, process 0 speaks for all
        resume = f"{resume}-{index}" if resume else None
        overrides["out"] = f"{overrides.get('out')}-{index}"
    config, out, lock = open_run(overrides, resume)
    with lock:
        print(
            f"preset {config.preset}{' (continued)' if resume else ''}, {config.steps:,} steps of "
            f"{config.batch} images, on {hardware()}"
        )
        print(f"after: {PUBLISHED[config.preset]}; this run goes to {out}", flush=True)
        dataset = data.load(config.dataset, config.data_dir, config.val)
        n = len(dataset.train)
        if config.batch > n:
            raise UsageError(f"--batch {config.batch} is more than the {n} training images.")
        net = build(config)
        if resume:
            shapes = jax.eval_shape(lambda: init_state(config, net, None))
            progress = load_checkpoint(Path(resume), shapes, config)
            print(f"continuing after step {int(progress.state.step):,}", flush=True)
        else:
            write_json(out / "config.json", dataclasses.asdict(config))
            first = data.order(config.seed, n, max(config.batch, START_IMAGES), 0, 1)[0]
            state = init_state(config, net, dataset.train[first])
            if join:
                state = multihost_utils.broadcast_one_to_all(state)
            progress = Progress(state, {}, 0.0, 0.0)
        try:
            progress, log = train(config, net, progress, dataset, out)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            half = max(1, config.batch // 2)
            raise RunError(f"--batch {config.batch} is too much memory: try {half}.") from None
        params = jax.device_get(progress.state.params)  # each process measures by itself
        metrics = measure(config, net, params, dataset, out, log)
        write_json(out / "result.json", result_row(config, argv, progress, metrics, dataset))
        print(f"pictures, log and result.json are in {out}")


def main(argv=None):
    """Command line: 0 when done, 1 when the run failed, 2 for a wrong command, 128 + signal."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except (RunError, data.DataError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        number, step, out = stop.args
        print(f"stopped after step {step:,}; go on with --resume {out}", file=sys.stderr)
        return 128 + number
    except OSError as error:
        print(f"train.py: {error.filename}: {error.strerror}; nothing deleted.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    return 0


def keep_memory():
    """Start this command again under a malloc that keeps what is freed, in huge pages.

    On a CPU, XLA frees its buffers at every step; having the kernel clear them anew takes up to a
    seventh of it. glibc reads this setting only when a process starts. One that is there stays.
    """
    settings = ("hugetlb=1", "mmap_max=0", "trim_threshold=10000000000")
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        environment = {
            **os.environ,
            "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{setting}" for setting in settings),
        }
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
