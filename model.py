"""The networks of section 4.1, likelihoods p(x | z_q), their start `--init pca`, the prior.

    x [B, H, W, 3] -> Encoder -> z_e [B, h, w, N, D] -> quantize -> z_q -> Decoder -> outputs

    Encoder     two 4x4 convolutions of stride 2, two residual blocks, a 1x1 convolution to N x D
    Decoder     the mirror: a 1x1 convolution, two residual blocks, two 4x4 transposed convolutions
    likelihood  outputs and x -> -log p(x | z_q) for each colour value, and a reconstruction
    Prior       p(codes), from which new images are sampled

The letters are those of quantize.py; h = H / 4, w = W / 4, features = N D. `outputs` [B, H, W,
Likelihood.outputs] holds what the likelihood asks for at each pixel. Parameters, quantiser and
`outputs` are float32; `dtype` is that of the activations between. Networks are flax.nnx modules,
which are pytrees: jax.jit, jax.grad and optax take a whole model; `p[...]` is a parameter's array.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from optax import softmax_cross_entropy_with_integer_labels as softmax_nll

import quantize

# Networks. `config` is a train.Config, or anything with its fields.


class Residual(nnx.Module):
    """x + (ReLU, 3x3 convolution, ReLU, 1x1 convolution): [B, h, w, hidden] -> the same."""

    def __init__(self, hidden, residual, dtype, rngs):
        conv = functools.partial(nnx.Conv, dtype=dtype, rngs=rngs)
        self.conv = conv(hidden, residual, (3, 3))
        self.back = conv(residual, hidden, (1, 1))

    def __call__(self, x):
        return x + self.back(nnx.relu(self.conv(nnx.relu(x))))


class Encoder(nnx.Module):
    """x [B, H, W, 3] -> [B, h, w, features]. Down and Up, below, are nnx.Conv and ConvTranspose.

    DeepMind's published example (`--net deepmind`) has half the channels in the layer next to the
    pixels, and a 3x3 convolution on each side of z.
    """

    def __init__(self, config, features, dtype, rngs):
        conv = functools.partial(nnx.Conv, dtype=dtype, rngs=rngs)
        hidden, deepmind = config.encoder_hidden or config.hidden, config.net == "deepmind"
        outer = hidden // 2 if deepmind else hidden
        self.down = Down(3, outer, (4, 4), 2, dtype=dtype, rngs=rngs)
        self.down_again = Down(outer, hidden, (4, 4), 2, dtype=dtype, rngs=rngs)
        blocks = [Residual(hidden, config.residual, dtype, rngs) for _ in range(config.blocks)]
        if deepmind:
            blocks = [nnx.Sequential(nnx.relu, conv(hidden, hidden, (3, 3))), *blocks]
        self.blocks = nnx.List(blocks)
        self.to_z = conv(hidden, features, (1, 1))

    def __call__(self, x):
        x = nnx.relu(self.down(x))  # [B, H/2, W/2, hidden or half of it]
        x = self.down_again(x)  # [B, h, w, hidden]
        for block in self.blocks:
            x = block(x)
        return self.to_z(nnx.relu(x))  # [B, h, w, features]


class Decoder(nnx.Module):
    """The mirror of Encoder: z [B, h, w, features] -> outputs [B, H, W, outputs], float32."""

    def __init__(self, config, features, outputs, dtype, rngs):
        hidden, deepmind = config.hidden, config.net == "deepmind"
        outer, window = (hidden // 2, (3, 3)) if deepmind else (hidden, (1, 1))
        self.from_z = nnx.Conv(features, hidden, window, dtype=dtype, rngs=rngs)
        blocks = [Residual(hidden, config.residual, dtype, rngs) for _ in range(config.blocks)]
        self.blocks = nnx.List(blocks)
        self.up = Up(hidden, outer, (4, 4), 2, dtype=dtype, rngs=rngs)
        # float32: with `--init pca` logits begin in the hundreds, which bfloat16 rounds by one.
        self.up_again = Up(outer, outputs, (4, 4), 2, dtype=jnp.float32, rngs=rngs)

    def __call__(self, z):
        x = self.from_z(z)  # [B, h, w, hidden]
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.up(nnx.relu(x)))  # [B, H/2, W/2, hidden or half of it]
        return self.up_again(x)  # [B, H, W, outputs]


class VQVAE(nnx.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, config, dtype, rngs):
        self.config, self.dtype, (encoder, decoder, _) = config, dtype, NETS[config.net]
        self.quantizer = quantize.QUANTIZERS[config.quantizer]
        features, outputs = config.slots * config.D, LIKELIHOODS[config.likelihood].outputs
        self.encoder = encoder(config, features, dtype, rngs)
        self.decoder = decoder(config, features, outputs, dtype, rngs)
        books = 1 if config.shared else config.slots
        self.codebook = nnx.Param(self.quantizer.start(rngs.params(), books, config.K, config.D))

    def __call__(self, images):
        """images uint8 [B, H, W, 3] -> outputs [B, H, W, outputs], z_e, Quantized."""
        z_e, kind = self.encode(images), self.quantizer
        gradient = quantize.GRADIENTS[self.config.gradient]
        q = quantize.quantize(z_e, self.codebook[...], kind.search, gradient, kind.extra_loss)
        return self.decode(q.z_q), z_e, q

    def encode(self, images):
        """images uint8 [B, H, W, 3] -> z_e [B, h, w, N, D], float32; ValueError for any others."""
        size = self.config.size
        if images.dtype != jnp.uint8 or images.shape[1:] != (size, size, 3):
            found = f"{images.dtype} {images.shape}"
            raise ValueError(f"images must be uint8 [B, {size}, {size}, 3], 0 to 255, not {found}")
        z = self.encoder(jnp.asarray(images, self.dtype) / 255 - 0.5)  # [B, h, w, N D]
        z_e = z.reshape(*z.shape[:3], self.config.slots, self.config.D).astype(jnp.float32)
        return self.quantizer.bound(z_e, jax.lax.stop_gradient(self.codebook[...]))

    def decode(self, z_q):
        """z_q [B, h, w, N, D] -> outputs [B, H, W, outputs], float32."""
        z = z_q.reshape(*z_q.shape[:3], -1).astype(self.dtype)  # [B, h, w, N D]
        return self.decoder(z).astype(jnp.float32)

    def to_codes(self, images):
        """images uint8 [B, H, W, 3] -> codes [B, h, w, N], int32."""
        return self.quantizer.search(self.encode(images), self.codebook[...])

    def from_codes(self, codes):
        """codes [B, h, w, N] -> outputs [B, H, W, outputs]."""
        return self.decode(quantize.embed(codes, self.codebook[...]))

    def to_images(self, codes):
        """codes [B, h, w, N] -> pictures uint8 [B, H, W, 3], the means of the likelihood."""
        outputs = self.from_codes(codes)
        blank = jnp.zeros((*outputs.shape[:3], 3), jnp.uint8)  # a loss needs images, means do not
        means = LIKELIHOODS[self.config.likelihood].loss(outputs, blank, 1.0)[1]
        return jnp.clip(means, 0, 255).round().astype(jnp.uint8)


# The two strided layers. Weights and results are those of flax's own; for speed on a CPU they and
# their gradients are computed by convolutions of stride 1 over blocks of 2x2 pixels.


class Down(nnx.Conv):
    """nnx.Conv(inputs, outputs, (4, 4), 2): [B, H, W, inputs] -> [B, H/2, W/2, outputs]."""

    def __call__(self, x):
        x, kernel = x.astype(self.dtype), self.kernel.astype(self.dtype)
        return down(x, kernel) + self.bias.astype(self.dtype)


class Up(nnx.ConvTranspose):
    """nnx.ConvTranspose(inputs, outputs, (4, 4), 2): [B, H, W, inputs] -> [B, 2H, 2W, outputs]."""

    def __call__(self, x):  # flax's kernel is up's, turned by 180 degrees, channels swapped
        kernel = self.kernel.astype(self.dtype)[::-1, ::-1].swapaxes(2, 3)
        return up(x.astype(self.dtype), kernel) + self.bias.astype(self.dtype)


def down(x, kernel):
    """4x4 convolution of stride 2: x [B, H, W, C], kernel [4, 4, C, F] -> [B, H/2, W/2, F]."""
    x = to_blocks(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 2)  # [B, H/2 + 1, W/2 + 1, 4C]
    kernel = kernel.reshape(2, 2, 2, 2, -1, kernel.shape[3]).swapaxes(1, 2)  # [2, 2, 2, 2, C, F]
    kernel, layout = kernel.reshape(2, 2, -1, kernel.shape[-1]), ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)


@jax.custom_vjp
def up(x, kernel):
    """The transpose of `down`: x [B, H, W, F], kernel [4, 4, C, F] -> [B, 2H, 2W, C]."""
    B, H, W, _ = x.shape
    large = jax.ShapeDtypeStruct((B, 2 * H, 2 * W, kernel.shape[2]), x.dtype)
    return jax.linear_transpose(lambda y: down(y, kernel), large)(x)[0]


def up_gradients(saved, gradient):
    """The gradients of a loss by x and kernel of `up`, from that by its result [B, 2H, 2W, C].

    `up` is linear in both, and <up(x, kernel), g> = <x, down(g, kernel)>: by x it is down(g,
    kernel), by kernel the gradient of <x, down(g, kernel)>.
    """
    by_x, transpose = jax.vjp(lambda kernel: down(gradient, kernel), saved[1])
    return by_x, *transpose(saved[0])


up.defvjp(lambda x, kernel: (up(x, kernel), (x, kernel)), up_gradients)


def to_blocks(x, size):
    """Blocks of size x size pixels: [B, H, W, C] -> [B, H/size, W/size, size^2 C]."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // size, size, W // size, size, C).swapaxes(2, 3)
    return x.reshape(B, H // size, W // size, -1)


# name -> the class of the encoder, that of the decoder, and whether both have the layers, by name,
# that `--init pca` writes to. One pair of classes serves both names: it reads config.net.
NETS = {"paper": (Encoder, Decoder, True), "deepmind": (Encoder, Decoder, True)}


# Likelihoods: outputs [B, H, W, outputs], images uint8 [B, H, W, 3] and the variance of the
# training pixels in [0, 1] -> the loss of each colour value, and a reconstruction in grey levels,
# of `outputs` alone: both float32 [B, H, W, 3].

GREY = 16.0  # grey levels: the unit of means and scales, in `logistic` and in the start


def categorical(outputs, images, variance):
    """256-way softmax for each colour value, as the authors used: 768 outputs at a pixel.

    softmax_nll: logits [..., 256] and whole numbers x [...] -> -log p(x) in nats [...].
    """
    logits = outputs.reshape(*images.shape, 256)  # [B, H, W, 3, 256]
    return softmax_nll(logits, images), nnx.softmax(logits) @ jnp.arange(256.0)


def logistic(outputs, images, variance):
    """Discretised logistic, a mean and a log scale for each colour value: 6 outputs at a pixel.

    p(x) = cdf(x + 1/2) - cdf(x - 1/2), of the logistic distribution of that mean and scale; at x =
    0 the second term is 0, at x = 255 the first is 1.
    """
    mean, log_scale = jnp.split(outputs, 2, -1)  # [B, H, W, 3] each
    mean = 127.5 + GREY * mean  # grey levels
    return logistic_nll(images, mean, log_scale), jnp.clip(mean, 0, 255)


def logistic_nll(x, mean, log_scale):
    """-log p(x) of the discretised logistic, in nats; x an integer.

    x and mean are in grey levels; log_scale is of a scale in units of GREY.

    With s the sigmoid, s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)): no difference of nearly equal
    numbers, but for the last factor, whose logarithm is right to 5e-5 at every scale allowed: from
    .02 to 400 grey levels. Beyond, log_scale has no gradient.
    """
    inverse = jnp.exp(-jnp.clip(log_scale + math.log(GREY), -4, 6))  # 1 / grey levels

    def minus_log(a):  # -log s(a); nnx.log_sigmoid, nnx.softplus and expm1 are slow on a CPU
        return jnp.maximum(-a, 0) + jnp.log(1 + jnp.exp(-jnp.abs(a)))

    above = jnp.where(x < 255, minus_log((x + 0.5 - mean) * inverse), 0.0)
    below = jnp.where(x > 0, minus_log((mean - x + 0.5) * inverse), 0.0)
    inner = jnp.where((x > 0) & (x < 255), jnp.log(1 - jnp.exp(-inverse)), 0.0)
    return above + below - inner


def gaussian(outputs, images, variance):
    """Squared error over the variance of the training pixels: 3 outputs at a pixel.

    DeepMind's example. It has no probability of an integer value, hence no bits/dim.
    """
    mean = outputs + 0.5  # pixels in [0, 1]
    return (images / 255.0 - mean) ** 2 / variance, jnp.clip(255 * mean, 0, 255)


# What `outputs` begin as with `--init pca`: [m, l] @ weights + bias, where m and l are a pixel's
# three means (less 127.5) and log scales in units of GREY. A start is a function of the errors'
# standard deviation [3], in units of GREY, and gives weights [6, outputs] and bias [outputs].


def categorical_start(deviation):
    """Logits of a discretised Gaussian, (m x - x^2 / 2) / deviation^2: linear in its mean m."""
    x = (np.arange(256) - 127.5) / GREY
    weights = np.zeros((6, 3, 256))
    weights[range(3), range(3)] = x / deviation[:, None] ** 2
    return weights.reshape(6, -1), (-0.5 * (x / deviation[:, None]) ** 2).reshape(-1)


def linear_start(outputs, unit=1.0):
    """A start for outputs that are unit * [m, l], or unit * m alone."""
    return lambda deviation: (unit * np.eye(6, outputs), np.zeros(outputs))


class Likelihood(NamedTuple):
    """A row of LIKELIHOODS."""

    outputs: int  # numbers at a pixel
    loss: Callable  # as above
    is_log_prob: bool  # whether the loss is -log p in nats: bits/dim; else it is logged as nmse
    start: Callable | None = None  # as above; without it there is no `--init pca`


LIKELIHOODS = {
    "categorical": Likelihood(3 * 256, categorical, True, categorical_start),
    "logistic": Likelihood(3 * 2, logistic, True, linear_start(6)),
    "gaussian": Likelihood(3, gaussian, False, linear_start(3, GREY / 255)),
}


# The start `--init pca`. The paper does not say how its weights began; here step 0 already is a
# good quantiser of 4x4 patches, in the layers as they are. A linear value passes a ReLU as the
# pair v, -v. Residual blocks begin as the identity. Channels not needed keep their stock weights.
# n images, k directions of a patch that are kept.

MIN_HIDDEN = 2 * 48  # channels that the pairs of a whole patch take, 4 x 4 x 3
ROUNDING = 1 / 12 / GREY**2  # variance of rounding to a grey level: the least that an error has


def pca_start(model, images, key):
    """Write into a VQVAE the patch quantiser that suits `images`, uint8 [n, H, W, 3].

    Eigenvectors of patches are assigned to the slots, k-means makes the codebooks, and the
    likelihood begins with the size of the errors that are left.
    """
    config, quantizer = model.config, model.quantizer
    mean = images.mean((0, 1, 2))  # [3], grey levels
    patches = to_blocks((images - np.float32(mean)) / np.float32(GREY), 4)  # [n, h, w, 48]
    rows = patches.reshape(-1, 48)
    variance, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    bits_each = waterfill(variance[::-1], config.slots * math.log2(config.K))  # strongest first
    places = assign_to_slots(bits_each[bits_each > 0], config.slots, config.D)  # [k, N D]
    vectors = vectors[:, ::-1][:, : len(places)]  # [48, k]
    if not quantizer.learns:  # a fixed grid: two standard deviations become 1, by tanh .76
        places = places / (2 * (rows @ vectors).std(0)[:, None] + 1e-3)

    z_e = jnp.asarray(patches @ np.float32(vectors @ places))  # [n, h, w, N D]
    z_e = z_e.reshape(*z_e.shape[:3], config.slots, config.D)
    z_e = quantizer.bound(z_e, model.codebook[...])
    if quantizer.learns:
        model.codebook[...] = quantize.kmeans(key, z_e, len(model.codebook), config.K)
    codes = jax.jit(quantizer.search)(z_e[:1000], model.codebook[...])
    z_q = np.asarray(quantize.embed(codes, model.codebook[...])).reshape(*codes.shape[:3], -1)
    inverse = np.linalg.pinv(places)  # [N D, k]
    kept = z_q @ inverse  # the quantised coefficients [n, h, w, k], n at most 1000
    square = (patches[:1000] - kept @ vectors.T).reshape(-1, 3) ** 2  # errors that are left
    deviation = np.sqrt(square.mean(0) + ROUNDING)  # [3]
    # The standard deviation of a logistic is its scale times pi / sqrt(3).
    log_scale, shift = np.log(deviation * math.sqrt(3) / math.pi), (mean - 127.5) / GREY
    weights, bias = LIKELIHOODS[config.likelihood].start(deviation)
    write_encoder(model.encoder, vectors, places, shift)
    bias = bias + np.concatenate([shift, log_scale]) @ weights
    write_decoder(model.decoder, vectors, inverse, weights[:3], bias)
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        if isinstance(block, Residual):  # it adds zero
            block.back.kernel[...] *= 0


def waterfill(variance, bits):
    """Reverse water-filling: how many of `bits` each Gaussian of these variances gets."""
    power = np.log2(np.maximum(variance, 1e-9))
    total = np.sort(power)[::-1].cumsum()  # of the k strongest, k = 1, 2, ...
    level = ((total - 2 * bits) / np.arange(1, len(power) + 1)).max()  # highest for the right k
    return np.maximum(0, 0.5 * (power - level))


def assign_to_slots(bits_each, N, D):
    """A 1 for the place in z_e that each of k directions gets: [k, N D].

    One after the other they go to the slot with the fewest bits of work so far that has room.
    """
    k = min(len(bits_each), N * D)
    places, load, used = np.zeros((k, N * D)), np.zeros(N), np.zeros(N, int)
    for d in range(k):
        slot = np.where(used < D, load, np.inf).argmin()
        places[d, slot * D + used[slot]] = 1
        load[slot] += bits_each[d]
        used[slot] += 1
    return places


def write_encoder(encoder, vectors, places, shift):
    """Pixels, as pairs -> coefficients of a patch, as pairs -> their places in z_e."""
    pixels = pairs(np.eye(12) * 255 / GREY).reshape(2, 2, 3, 24)  # the 12 values of a 2x2 block
    write_kernel(encoder.down, pixels, pairs(np.tile(-shift, 4)))
    write_kernel(encoder.down_again, pairs(pairs(split_rows(vectors)), 2))
    for block in encoder.blocks:
        if isinstance(block, nnx.Sequential):  # DeepMind's
            write_kernel(block.layers[1], pairs(pairs(np.eye(len(places))), 0)[None, None])
    write_kernel(encoder.to_z, pairs(places, 0)[None, None])


def write_decoder(decoder, vectors, inverse, weights, bias):
    """Coefficients, as pairs -> values of 2x2 blocks, as pairs -> outputs.

    [::-1, ::-1]: the kernels of flax's ConvTranspose run against the pixels that they write.
    """
    write_kernel(decoder.from_z, pairs(inverse)[None, None])
    write_kernel(decoder.up, pairs(pairs(split_rows(vectors).swapaxes(2, 3), 2))[::-1, ::-1])
    pixels = np.eye(12).reshape(2, 2, 3, 12).swapaxes(2, 3)  # [2, 2, 12, 3]
    write_kernel(decoder.up_again, (pairs(pixels, 2) @ weights)[::-1, ::-1], bias)


def split_rows(rows):
    """Rows of a patch [48, k] -> [2, 2, 12, k]: which block of 2x2 pixels, and where in it."""
    return np.moveaxis(to_blocks(rows.T.reshape(-1, 4, 4, 3), 2), 0, -1)


def pairs(x, axis=-1):
    """x and -x, one after the other along `axis`."""
    return np.concatenate([x, -x], axis)


def write_kernel(conv, block, bias=0.0):
    """Write `block` [t, t, inputs, outputs] into the middle of a kernel, for its first channels.

    Those outputs then read the first `inputs` channels alone, in the middle t x t.
    """
    t, _, inputs, outputs = block.shape
    own = slice((conv.kernel.shape[0] - t) // 2, (conv.kernel.shape[0] + t) // 2)
    kernel = conv.kernel[...].at[..., :outputs].set(0)
    conv.kernel[...] = kernel.at[own, own, :inputs, :outputs].set(block)
    conv.bias[...] = conv.bias[...].at[:outputs].set(bias)


# The prior p(codes) of section 3.3, trained once the codes are fixed. Positions come in raster
# order and the slots of a position one after another: the product of all conditionals is exact.
# The paper has a PixelCNN. This is a transformer, whose first layer is a PixelCNN's: on a field of
# 8 x 8 attention sees everything, and a CPU is faster at large matmuls than at convolutions.
# M = B h w positions; F features of a code; `config` is a train.PriorConfig.


class Prior(nnx.Module):
    """Logits of p(code | all earlier codes), for fields [h, w, N] and codebooks [S, K, D].

    `context` is a causal transformer over positions. `head` goes through the slots of a position: a
    sum over earlier slots and layers for each slot, as in NADE (Uria et al. 2016, arXiv
    1605.02226), so that one pass gives the logits of all N.
    """

    def __init__(self, config, field, K, D, dtype, rngs):
        self.dtype, (h, w, N), width = dtype, field, config.width
        linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.neighbours = linear(4 * N * D, width)
        self.row = nnx.Param(0.02 * jax.random.normal(rngs.params(), (h, 1, width)))
        self.column = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, w, width)))
        self.blocks = nnx.List([Block(config, dtype, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        # The head, with layers of its own for each slot: [N, ...] -> [N, ...].
        own = functools.partial(nnx.LinearGeneral, axis=-1, batch_axis={0: N}, rngs=rngs)
        self.head_context, self.head_code = linear(width, width), own(D, width, dtype=dtype)
        self.head_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        hidden = [own(width, width, dtype=dtype) for _ in range(config.head_layers)]
        self.head_hidden = nnx.List(hidden)
        # Zeros: before step 1 the logits are `bias` alone, the unigram prior.
        self.head_out = own(width, D + len(product_pairs(D)[0]), kernel_init=nnx.initializers.zeros)
        self.bias = nnx.Param(jnp.zeros((N, K)))

    def __call__(self, codes, codebook):
        """codes [B, h, w, N], codebook [S, K, D] -> logits [N, B h w, K], float32, by slot."""
        x = self.context(codes, codebook)
        return self.head(x.reshape(-1, x.shape[-1]), codes.reshape(-1, codes.shape[-1]), codebook)

    def nll(self, codes, codebook):
        """-log p of each code, in nats: codes [B, h, w, N], codebook [S, K, D] -> [B, h, w, N]."""
        by_slot = codes.reshape(-1, codes.shape[-1]).T  # [N, M]; to turn all logits would be slow
        return softmax_nll(self(codes, codebook), by_slot).T.reshape(codes.shape)

    def context(self, codes, codebook):
        """What each position knows of all before it: codes [B, h, w, N] -> [B, h, w, width]."""
        e, _ = code_features(codebook, codes.shape[-1])  # [N, K, D]
        vectors = quantize.embed(codes, e).reshape(*codes.shape[:3], -1)  # [B, h, w, N D]
        x = neighbours(vectors.astype(self.dtype))  # [B, h, w, 4 N D]
        x = self.neighbours(x) + (self.row + self.column).astype(self.dtype)
        for block in self.blocks:
            x = block(x)  # [B, h, w, width]
        return self.norm(x)

    def head(self, x, codes, codebook):
        """x [M, width], codes [M, N] -> logits [N, M, K]; slot n sees slots before n."""
        N = codes.shape[-1]
        e, features = code_features(codebook, N)
        vectors = quantize.embed(codes, e).astype(self.dtype)  # [M, N, D]
        own = self.head_code(jnp.moveaxis(vectors, 1, 0))  # [N, M, width]
        # Running sums: slot n has the context and the slots before n. jnp.cumsum is slow on a CPU,
        # and so is the gradient of a context that is added to every slot.
        terms = jnp.concatenate([self.head_context(x)[None], own[:-1]])  # [N, M, width]
        y = jnp.einsum("ns,smc->nmc", jnp.tri(N, dtype=self.dtype), terms)
        for layer in [self.head_norm, *self.head_hidden]:
            y = nnx.gelu(layer(y))
        y = self.head_out(y.astype(jnp.float32))  # [N, M, F]
        return jnp.einsum("nmf,nkf->nmk", y, features) + self.bias[...][:, None]


class Block(nnx.Module):
    """One layer of a causal transformer: x [B, h, w, width] -> the same."""

    def __init__(self, config, dtype, rngs):
        width, linear = config.width, functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.heads, self.norm = config.heads, nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.norm_mlp = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.wide, self.narrow = linear(width, 2 * width), linear(2 * width, width)

    def __call__(self, x):
        B, h, w, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, h * w, 3, self.heads, width // self.heads)
        y = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
        x = x + self.out(y.reshape(x.shape))
        return x + self.narrow(nnx.gelu(self.wide(self.norm_mlp(x))))


def code_features(codebook, N):
    """What is known of each code: codebook [S, K, D] -> e [N, K, D], and e with products [N, K, F].

    Both in units of their own spread. A logit that is linear in e and its products can be the
    logarithm of any Gaussian (above D = 8 of any with a diagonal covariance), and codes near each
    other get logits near each other.
    """

    def standardise(x):  # over the codes; what is the same for all of them stays 0
        x, spread = x - x.mean(1, keepdims=True), x.std(1, keepdims=True)
        return x / (spread + 1e-3 * spread.max(-1, keepdims=True) + 1e-6)

    e = standardise(jax.lax.stop_gradient(jnp.asarray(codebook)))
    i, j = product_pairs(e.shape[-1])
    both = jnp.concatenate([e, standardise(e[..., i] * e[..., j])], -1)
    book = quantize.book_of_slot(N, len(codebook))
    return e[book], both[book]


def product_pairs(D):
    """Dimensions i, j whose products are features: all pairs up to D = 8, above i = j alone."""
    return np.triu_indices(D) if D <= 8 else np.diag_indices(D)


def neighbours(x):
    """The position before each one in raster order and the three above: [B, h, w, C] -> [.., 4 C].

    Zeros beyond the field; before the first of a row comes the last of the row above. But for that,
    a linear map of them is a masked 3x3 convolution.
    """
    (B, h, w, C), edge = x.shape, ((0, 0), (1, 0), (1, 1), (0, 0))
    before = jnp.pad(x.reshape(B, h * w, C), ((0, 0), (1, 0), (0, 0)))[:, :-1].reshape(x.shape)
    above = jnp.pad(x, edge)[:, :h]  # [B, h, w + 2, C]
    return jnp.concatenate([before] + [above[:, :, i : i + w] for i in range(3)], -1)


def sample_codes(prior, codebook, key, shape, temperature=1.0, track=lambda steps: steps):
    """Codes drawn from a Prior, position by position: shape (count, h, w, N) -> codes, int32.

    Every logit is divided by the temperature: below 1, fields are likelier and more alike. `track`
    wraps the range of positions, to show how far it is.
    """
    w, N = shape[2:]

    @jax.jit
    def draw(prior, codes, t):  # -> the codes of position t [B, N]
        x = prior.context(codes, codebook)[:, t // w, t % w]  # [B, width]
        key_t = jax.random.fold_in(key, t)

        def draw_slot(n, here):  # slots after n are still 0, and n does not see them
            logits = prior.head(x, here, codebook)[n]
            drawn = jax.random.categorical(jax.random.fold_in(key_t, n), logits / temperature)
            return here.at[:, n].set(drawn)

        return jax.lax.fori_loop(0, N, draw_slot, jnp.zeros((len(x), N), jnp.int32))

    codes = jnp.zeros(shape, jnp.int32)
    for t in track(range(shape[1] * w)):
        codes = codes.at[:, t // w, t % w].set(draw(prior, codes, t))
    return codes
