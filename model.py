"""The networks of section 4.1, the likelihoods p(x | z_q), a start for both, the prior over codes.

    x [B, 32, 32, 3] -> Encoder -> z_e [B, 8, 8, N, D] -> quantize -> z_q -> Decoder -> outputs

    Encoder   two 4x4 convolutions of stride 2, two residual blocks, a 1x1 convolution to N x D
    Decoder   the mirror: a 1x1 convolution, two residual blocks, two 4x4 transposed convolutions
    likelihood  outputs and x -> -log p(x | z_q) for each colour value, and a reconstruction

The letters are those of quantize.py; `outputs` holds what the likelihood asks for at each pixel.
Parameters and `outputs` are float32; `dtype` is that of the activations between.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import quantize

# Networks


class Network(nn.Module):
    """What all of them have: a train.Config, or anything with its fields, and a dtype."""

    config: Any
    dtype: jnp.dtype


class Residual(Network):
    """x + (ReLU, 3x3 convolution, ReLU, 1x1 convolution): [B, h, w, hidden] -> the same."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.config.residual, (3, 3), dtype=self.dtype)(nn.relu(x))
        return x + nn.Conv(self.config.hidden, (1, 1), dtype=self.dtype)(nn.relu(y))


def residual_blocks(x, config, dtype):
    """The blocks of an encoder or decoder, and a ReLU: [B, h, w, hidden] -> the same."""
    for _ in range(config.blocks):
        x = Residual(config, dtype)(x)
    return nn.relu(x)


class Encoder(Network):
    """x [B, 32, 32, 3] -> [B, 8, 8, features].

    In DeepMind's published example (`--net deepmind`) the layer next to the pixels has half the
    channels, and a 3x3 convolution stands before the blocks; so in the decoder.
    """

    features: int

    @nn.compact
    def __call__(self, x):
        hidden, deepmind = self.config.hidden, self.config.net == "deepmind"
        x = Down(hidden // 2 if deepmind else hidden, self.dtype)(x)  # [B, 16, 16, hidden or half]
        x = Down(hidden, self.dtype)(nn.relu(x))  # [B, 8, 8, hidden]
        if deepmind:
            x = nn.Conv(hidden, (3, 3), dtype=self.dtype)(nn.relu(x))
        x = residual_blocks(x, self.config, self.dtype)
        return nn.Conv(self.features, (1, 1), dtype=self.dtype)(x)  # [B, 8, 8, features]


class Decoder(Network):
    """The mirror of Encoder: z [B, 8, 8, N D] -> [B, 32, 32, features]."""

    features: int

    @nn.compact
    def __call__(self, z):
        hidden, deepmind = self.config.hidden, self.config.net == "deepmind"
        x = nn.Conv(hidden, (3, 3) if deepmind else (1, 1), dtype=self.dtype)(z)
        x = residual_blocks(x, self.config, self.dtype)  # [B, 8, 8, hidden]
        x = Up(hidden // 2 if deepmind else hidden, self.dtype)(x)  # [B, 16, 16, hidden or half]
        # float32: at the start the softmax's logits reach hundreds, which bfloat16 rounds by one.
        return Up(self.features, jnp.float32)(nn.relu(x))  # [B, 32, 32, features]


# name of a network -> encoder and decoder. These two share their classes, which read config.net.
NETS = {"paper": (Encoder, Decoder), "deepmind": (Encoder, Decoder)}


class VQVAE(Network):
    """Encoder, codebook and decoder."""

    def setup(self):
        c, (encoder, decoder) = self.config, NETS[self.config.net]
        self.encoder = encoder(c, self.dtype, c.slots * c.D)
        self.decoder = decoder(c, self.dtype, LIKELIHOODS[c.likelihood].outputs)
        self.quantizer = quantize.QUANTIZERS[c.quantizer]
        start = self.quantizer.start
        self.codebook = self.param("codebook", start, 1 if c.shared else c.slots, c.K, c.D)

    def __call__(self, images):
        """images uint8 [B, 32, 32, 3] -> outputs [B, 32, 32, outputs], z_e, Quantized."""
        z_e = self.encode(images)
        gradient = quantize.GRADIENTS[self.config.gradient]
        quantized = quantize.quantize(z_e, self.codebook, self.quantizer.search, gradient)
        return self.decode(quantized.z_q), z_e, quantized

    def encode(self, images):
        """images uint8 [B, 32, 32, 3] -> z_e [B, 8, 8, N, D], float32."""
        z = self.encoder(jnp.asarray(images, self.dtype) / 255 - 0.5)  # [B, 8, 8, N D]
        z_e = z.reshape(len(z), 8, 8, self.config.slots, self.config.D).astype(jnp.float32)
        return self.quantizer.bound(z_e)

    def decode(self, z_q):
        """z_q [B, 8, 8, N, D] -> outputs [B, 32, 32, outputs], float32."""
        z = z_q.reshape(*z_q.shape[:3], -1).astype(self.dtype)  # [B, 8, 8, N D]
        return self.decoder(z).astype(jnp.float32)

    def to_codes(self, images):
        """images uint8 [B, 32, 32, 3] -> codes [B, 8, 8, N], int32."""
        return self.quantizer.search(self.encode(images), self.codebook)

    def from_codes(self, codes):
        """codes [B, 8, 8, N] -> outputs [B, 32, 32, outputs]."""
        return self.decode(quantize.embed(codes, self.codebook))


# The two strided layers, as a CPU is fast at them. Kernels and results are the stock layers'.


class Down(nn.Module):
    """nn.Conv(features, (4, 4), (2, 2)): [B, H, W, C] -> [B, H/2, W/2, features]."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        shape = (4, 4, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return self.convolve(x, kernel) + bias

    def convolve(self, x, kernel):
        return down(x, kernel)


class Up(Down):
    """nn.ConvTranspose(features, (4, 4), (2, 2)): [B, H, W, C] -> [B, 2H, 2W, features]."""

    def convolve(self, x, kernel):  # nn.ConvTranspose does not mirror its kernel
        return up(x, kernel[::-1, ::-1].swapaxes(2, 3))


def down(x, kernel):
    """4x4 convolution of stride 2: x [B, H, W, C], kernel [4, 4, C, F] -> [B, H/2, W/2, F].

    Computed as a 2x2 convolution over blocks of 2x2 pixels: strides are what a CPU is slow at.
    """
    x = to_blocks(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 2)  # [B, H/2 + 1, W/2 + 1, 4C]
    kernel = kernel.reshape(2, 2, 2, 2, -1, kernel.shape[3]).swapaxes(1, 2)  # as the blocks are
    kernel = kernel.reshape(2, 2, -1, kernel.shape[-1])  # [2, 2, 4C, F]
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)


@jax.custom_vjp
def up(x, kernel):
    """The transpose of `down`: x [B, H, W, F], kernel [4, 4, C, F] -> [B, 2H, 2W, C].

    So its gradients are made of down's; those that JAX derives are many times slower on a CPU.
    """
    B, H, W, _ = x.shape
    large = jax.ShapeDtypeStruct((B, 2 * H, 2 * W, kernel.shape[2]), x.dtype)
    return jax.linear_transpose(lambda y: down(y, kernel), large)(x)[0]


def up_gradients(inputs, gradient):
    """The gradients of `up` by x and kernel; `gradient` is that by its result [B, 2H, 2W, C]."""
    x, kernel = inputs
    by_x, transpose = jax.vjp(lambda kernel: down(gradient, kernel), kernel)
    return by_x, *transpose(x)


up.defvjp(lambda x, kernel: (up(x, kernel), (x, kernel)), up_gradients)


def to_blocks(x, size):
    """Blocks of size x size pixels: [B, H, W, C] -> [B, H/size, W/size, size^2 C]."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // size, size, W // size, size, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H // size, W // size, size**2 * C)


# Likelihoods: outputs [B, 32, 32, outputs], images uint8 [B, 32, 32, 3] and the variance of the
# training pixels in [0, 1] -> the loss of each colour value and a reconstruction in grey levels,
# both float32 [B, 32, 32, 3].

# -log p(x) of whole numbers under a softmax, in nats: logits [..., K], x [...] -> [...].
softmax_nll = optax.softmax_cross_entropy_with_integer_labels
GREY = 16.0  # grey levels: the unit of means and scales, in `logistic`, `colours` and the start


def categorical(outputs, images, variance):
    """256-way softmax for each colour value, as the authors used: 768 outputs at a pixel."""
    logits = outputs.reshape(*images.shape, 256)  # [B, 32, 32, 3, 256]
    return softmax_nll(logits, images), nn.softmax(logits) @ jnp.arange(256.0)


def logistic(outputs, images, variance):
    """Discretised logistic, a mean and a log scale for each colour value: 6 outputs at a pixel.

    p(x) = F(x + 1/2) - F(x - 1/2), F the logistic distribution function of that mean and scale; at
    x = 0 the second term is 0, at x = 255 the first is 1.
    """
    mean, log_scale = jnp.split(outputs, 2, -1)  # [B, 32, 32, 3] each
    mean = 127.5 + GREY * mean  # grey levels
    return logistic_nll(images, mean, log_scale), jnp.clip(mean, 0, 255)


def colours(outputs, images, variance):
    """`logistic` with the colours of a pixel conditioned on one another: 9 outputs at a pixel.

    p(r) p(g | r) p(b | r, g): red's error moves green's mean, red's and green's move blue's. This
    is more than the authors' softmax, whose colours are independent. The reconstruction is z_q's.
    """
    mean, log_scale, slope = jnp.split(outputs, 3, -1)
    mean = 127.5 + GREY * mean
    # Slopes times the errors of r, r, g move the means of g, b, b: as matmuls with zeros and ones,
    # since a CPU takes four times as long over slices of single channels.
    error_of = np.float32([[1, 1, 0], [0, 0, 1], [0, 0, 0]])
    mean_of = np.float32([[0, 1, 0], [0, 0, 1], [0, 0, 1]])
    exact = jax.lax.Precision.HIGHEST  # a GPU would otherwise round to ten bits
    error = jnp.matmul(images - mean, error_of, precision=exact)
    moved = mean + jnp.matmul(slope * error, mean_of, precision=exact)
    return logistic_nll(images, moved, log_scale), jnp.clip(mean, 0, 255)


def logistic_nll(x, mean, log_scale):
    """-log p(x) of the discretised logistic, in nats; x an integer.

    x and mean are in grey levels; log_scale is of a scale in units of GREY.

    With s the logistic function, s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)): no difference of nearly
    equal numbers, but for the last factor, whose logarithm is right to 5e-5 at every scale.
    """
    inverse = jnp.exp(-jnp.clip(log_scale + math.log(GREY), -4, 6))  # 1 / grey levels

    def minus_log(a):  # -log s(a); nn.log_sigmoid, nn.softplus and expm1 are slow on a CPU
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


# What each says at the start. With m and l, a pixel's three means (less 127.5) and log scales (of a
# logistic) in units of GREY, `outputs` are [m, l] @ weights + bias; weights [6, outputs] and bias
# [outputs] are made from the errors' standard deviation [3] and slopes [3], as `colours` has them.


def categorical_start(deviation, slopes):
    """Logits of a discretised Gaussian, (m x - x^2 / 2) / deviation^2: linear in its mean m."""
    x = (np.arange(256) - 127.5) / GREY
    weights = np.zeros((6, 3, 256))
    weights[range(3), range(3)] = x / deviation[:, None] ** 2
    bias = -0.5 * (x / deviation[:, None]) ** 2  # [3, 256]
    return weights.reshape(6, -1), bias.reshape(-1)


def linear_start(outputs, unit=1.0):
    """Of outputs that are means, log scales and slopes in this order, or the first of these."""
    weights = unit * np.eye(6, outputs)
    return lambda deviation, slopes: (weights, np.pad(slopes, (6, 0))[:outputs])


class Likelihood(NamedTuple):
    """A row of LIKELIHOODS."""

    outputs: int  # numbers at a pixel
    loss: Callable  # as above
    exact: bool  # whether the loss is -log p in nats, so that there are bits/dim
    start: Callable | None = None  # as above; without it there is no `--init pca`
    conditioned: bool = False  # whether a pixel's colours are conditioned on one another


LIKELIHOODS = {
    "categorical": Likelihood(3 * 256, categorical, True, categorical_start),
    "logistic": Likelihood(3 * 2, logistic, True, linear_start(6)),
    "colours": Likelihood(3 * 3, colours, True, linear_start(9), conditioned=True),
    "gaussian": Likelihood(3, gaussian, False, linear_start(3, GREY / 255)),
}


# The start `--init pca`. The paper does not say how its weights began; here step 0 already is a
# good quantiser of 4x4 patches, in the layers as they are. A linear value passes a ReLU as the
# pair v, -v. Residual blocks begin as the identity. Channels not needed keep their stock weights.
# n images, k directions of a patch that are kept.

PATCH = 4 * 4 * 3
ROOM = 2 * PATCH  # channels that the pairs of a whole patch take


def pca_start(config, params, images, key):
    """`params` of a VQVAE, begun as the patch quantiser that suits `images`, uint8 [n, 32, 32, 3].

    Eigenvectors of patches are dealt to the slots, k-means makes the codebooks, and the decoder's
    outputs begin at the size of the errors that are left.
    """
    quantizer = quantize.QUANTIZERS[config.quantizer]
    mean = images.mean((0, 1, 2))  # [3], grey levels
    patches = np.float32(to_blocks((images - np.float32(mean)) / GREY, 4))  # [n, 8, 8, 48]
    bits = config.slots * math.log2(config.K)
    conditioned = LIKELIHOODS[config.likelihood].conditioned
    analysis, synthesis, share = principal(patches.reshape(-1, PATCH), bits, conditioned)
    dealt = deal(share, config.slots, config.D)  # [k, N D]
    analysis, synthesis = analysis[:, : len(dealt)], synthesis[: len(dealt)]
    if not quantizer.learns:  # fit the coefficients to the grid, not the grid to them
        dealt = dealt / (2 * (patches @ analysis).std((0, 1, 2))[:, None])

    z_e = jnp.array(patches @ np.float32(analysis @ dealt))  # [n, 8, 8, N D]
    z_e = quantizer.bound(z_e.reshape(*z_e.shape[:3], config.slots, config.D))
    codebook = params["codebook"]
    if quantizer.learns:
        codebook = quantize.kmeans(key, z_e, len(codebook), config.K)
    codes = jax.jit(quantizer.search)(z_e[:1000], codebook)
    z_q = np.asarray(quantize.embed(codes, codebook)).reshape(*codes.shape[:3], -1)
    inverse = np.linalg.pinv(dealt)  # [N D, k]
    kept = z_q @ inverse  # [n, 8, 8, k], n at most 1000
    growth, weights, bias = fit_errors(config.likelihood, kept, patches[:1000] - kept @ synthesis)

    params = jax.tree.map(np.array, params)  # a copy to write into
    shift = (mean - 127.5) / GREY
    write_encoder(params["encoder"], analysis, dealt, shift)
    bias = bias + np.pad(shift, (0, 3)) @ weights
    write_decoder(params["decoder"], synthesis, inverse, growth, weights, bias)
    for name, layer in [*params["encoder"].items(), *params["decoder"].items()]:
        if name.startswith("Residual"):  # it adds zero
            layer["Conv_1"]["kernel"][:] = 0
    return jax.tree.map(jnp.asarray, {**params, "codebook": codebook})


def principal(patches, bits, conditioned):
    """The directions of patches [n, 48] that deserve bits: analysis [48, k], synthesis [k, 48].

    And how many of the `bits` each gets, strongest first: share [k]. `conditioned`: the likelihood
    is `colours`, for which `colour_scale` weighs the colours before.
    """
    covariance = patches.T @ patches / len(patches)
    colour = colour_scale(covariance, bits) if conditioned else np.eye(3)
    scale = np.kron(np.eye(PATCH // 3), colour)  # [48, 48]
    variance, vectors = np.linalg.eigh(scale.T @ covariance @ scale)
    variance, vectors = variance[::-1], vectors[:, ::-1]
    share = waterfill(variance, bits)
    share = share[share > 0]
    kept = vectors[:, : len(share)]
    return scale @ kept, kept.T @ np.linalg.inv(scale), share


def waterfill(variance, bits):
    """Reverse water-filling: how many of `bits` each Gaussian of these variances gets."""
    power = np.log2(np.maximum(variance, 1e-9))
    total = np.sort(power)[::-1].cumsum()  # of the k strongest, k = 1, 2, ...
    level = ((total - 2 * bits) / np.arange(1, len(power) + 1)).max()  # if those k share the bits
    return np.maximum(0, 0.5 * (power - level))


def colour_scale(covariance, bits, rounds=40):
    """What to multiply a pixel's colours by, for `colours`: [3, 3]; covariance [48, 48] of patches.

    Conditioned on one another, colours cost the logarithm of the determinant of their errors'
    covariance: the product of the errors along three axes, where a mean squared error has the sum.
    Chroma is smooth, so bits make its error small in all pixels at once, and belong there. With the
    best split the scaled errors are alike along all axes.
    """
    colour, pixels = np.eye(3), PATCH // 3
    for _ in range(rounds):
        scale = np.kron(np.eye(pixels), colour)
        variance, vectors = np.linalg.eigh(scale.T @ covariance @ scale)
        left = np.maximum(variance, 1e-9) / 4 ** waterfill(variance, bits)
        error = ((vectors * left) @ vectors.T).reshape(pixels, 3, pixels, 3)
        colour = colour @ np.linalg.inv(np.einsum("iaib->ab", error))
        colour = colour / np.cbrt(np.linalg.det(colour))
    return colour


def deal(share, N, D):
    """A permutation matrix, [k, N D]: the place in z_e that each direction gets.

    One after the other they go to the slot with the fewest bits of work so far that has room.
    """
    dealt, load, used = np.zeros((min(len(share), N * D), N * D)), np.zeros(N), np.zeros(N, int)
    for d in range(len(dealt)):
        slot = np.where(used < D, load, np.inf).argmin()
        dealt[d, slot * D + used[slot]] = 1
        load[slot] += share[d]
        used[slot] += 1
    return dealt


def fit_errors(likelihood, kept, error):
    """What a likelihood can say at the start of the errors that the quantiser leaves.

    kept [n, 8, 8, k] are the quantised coefficients, error [n, 8, 8, 48] what they leave of a
    patch. A patch of strong coefficients has large errors. Returns growth [2, 2, k, 3], by how much
    the log errors of its four blocks of 2x2 pixels grow with each coefficient's size (least
    squares), and the weights and bias that make outputs of means and log scales, as above.
    """
    red, green, blue = np.float64(error).reshape(-1, 3).T
    slopes = np.zeros(3)
    if LIKELIHOODS[likelihood].conditioned:
        slopes[:1] = np.linalg.lstsq(red[:, None], green, rcond=None)[0]
        slopes[1:] = np.linalg.lstsq(np.stack([red, green], -1), blue, rcond=None)[0]
    left = np.stack([red, green - slopes[0] * red, blue - slopes[1:] @ [red, green]], -1)
    square = (left**2).reshape(-1, 2, 2, 2, 2, 3).mean((2, 4)).reshape(-1, 12)  # [n 8 8, 12]
    sizes = np.abs(kept).reshape(len(square), -1)  # [n 8 8, k]
    centred = sizes - sizes.mean(0)
    log_error = 0.5 * np.log(square + 2e-4)  # errors below a fifth of a grey level are all alike
    growth = np.linalg.lstsq(centred, log_error, rcond=None)[0]  # [k, 12]
    level = 0.5 * np.log((square / np.exp(2 * sizes @ growth)).mean(0))  # [12]
    weights, bias = LIKELIHOODS[likelihood].start(np.sqrt((left**2).mean(0)), slopes)
    # A logistic of scale s has the standard deviation s pi / sqrt(3).
    log_scale = level.reshape(4, 3).mean(0) + math.log(math.sqrt(3) / math.pi)
    growth = np.moveaxis(growth.reshape(-1, 2, 2, 3), 0, 2)
    return growth, weights, bias + np.pad(log_scale, (3, 0)) @ weights


def by_blocks(rows):
    """Rows of a patch [48, F] -> [2, 2, 12, F]: which 2x2 block, and where in it."""
    return np.moveaxis(to_blocks(rows.T.reshape(-1, 4, 4, 3), 2), 0, -1)


def pairs(x, axis=-1):
    """x and -x, one after the other along `axis`."""
    return np.concatenate([x, -x], axis)


def wire(layer, block, bias=0.0, transposed=False):
    """Write `block` [t, t, inputs, outputs] into the middle of a kernel, for its first channels.

    Those outputs read nothing else. `transposed`: of nn.ConvTranspose, whose kernel is mirrored.
    """
    t, _, inputs, outputs = block.shape
    edge = (len(layer["kernel"]) - t) // 2
    layer["kernel"][..., :outputs] = 0
    block = block[::-1, ::-1] if transposed else block
    layer["kernel"][edge : edge + t, edge : edge + t, :inputs, :outputs] = block
    layer["bias"][:outputs] = bias


def write_encoder(layers, analysis, dealt, shift):
    """Pixels, as pairs -> coefficients of a patch, as pairs -> their places in z_e."""
    pixels = pairs(np.eye(12) * 255 / GREY).reshape(2, 2, 3, 24)  # the 12 values of a 2x2 block
    wire(layers["Down_0"], pixels, pairs(np.tile(-shift, 4)))
    wire(layers["Down_1"], pairs(pairs(by_blocks(analysis)), 2))  # four blocks -> coefficients
    convolutions = [layers[name] for name in ("Conv_0", "Conv_1") if name in layers]
    for layer in convolutions[:-1]:  # the 3x3 one that DeepMind's example has
        wire(layer, pairs(pairs(np.eye(len(dealt))), 0)[None, None])
    wire(convolutions[-1], pairs(dealt, 0)[None, None])


def write_decoder(layers, synthesis, inverse, growth, weights, bias):
    """Coefficients, as pairs -> values and log scales of 2x2 blocks, as pairs -> outputs."""
    wire(layers["Conv_0"], pairs(inverse)[None, None])
    means = pairs(by_blocks(synthesis.T).swapaxes(2, 3), 2)  # [2, 2, 2k, 12]
    log_scales = np.tile(growth, (2, 1))  # [2, 2, 2k, 3]: |v| is the sum of the pair's ReLUs
    wire(layers["Up_0"], pairs(np.concatenate([means, log_scales], -1)), transposed=True)
    pixels = np.zeros((2, 2, 15, 6))  # 12 means, 3 log scales of a block -> those of its pixels
    pixels[..., :12, :3] = np.eye(12).reshape(12, 2, 2, 3).transpose(1, 2, 0, 3)
    pixels[..., 12:, 3:] = np.eye(3)
    wire(layers["Up_1"], pairs(pixels, 2) @ weights, bias, transposed=True)


# The prior p(codes) of section 3.3, trained once the codes are fixed. Positions come in raster
# order and the slots of a position one after another: the product of all conditionals is exact.
# The paper has a PixelCNN. This is a transformer, whose first layer is a PixelCNN's: on a field of
# 8 x 8 attention sees everything, and a CPU is faster at large matmuls than at convolutions.
# T = h w positions; F features of a code.


class Prior(Network):
    """Logits of p(code | all earlier codes)."""

    def setup(self):
        self.context = Context(self.config, self.dtype)
        self.slots = Slots(self.config, self.dtype)

    def __call__(self, codes, codebook):
        """codes [B, h, w, N], codebook [S, K, D] -> logits [B, h, w, N, K], float32."""
        x = self.context(codes, codebook)
        logits = self.slots(x, codes.reshape(*x.shape[:2], -1), codebook)  # [B, T, N, K]
        return logits.reshape(*codes.shape, -1)


class Context(Network):
    """A causal transformer over positions: what each knows of all before it, [B, T, width]."""

    @nn.compact
    def __call__(self, codes, codebook):
        """codes [B, h, w, N], codebook [S, K, D] -> [B, T, width]."""
        (B, h, w, N), width = codes.shape, self.config.width
        vectors = quantize.embed(codes, code_features(codebook, N)[0])  # [B, h, w, N, D]
        x = neighbours(vectors.reshape(B, h, w, -1).astype(self.dtype))  # [B, h, w, 4 N D]
        x = nn.Dense(width, dtype=self.dtype)(x)
        row = self.param("row", nn.initializers.normal(0.02), (h, 1, width))
        column = self.param("column", nn.initializers.normal(0.02), (1, w, width))
        x = (x + (row + column).astype(self.dtype)).reshape(B, h * w, width)
        for _ in range(self.config.layers):
            x = Block(self.config, self.dtype)(x)
        return nn.LayerNorm(dtype=self.dtype)(x)


def code_features(codebook, N):
    """What is known of each code: codebook [S, K, D] -> e [N, K, D], and e with products [N, K, F].

    Both in units of their own spread. A logit that is linear in e and its products can be the
    logarithm of any Gaussian, and codes near each other get logits near each other. Products of all
    pairs of dimensions up to D = 8; above, of each with itself (a diagonal Gaussian).
    """

    def standardise(x):  # over the codes; what is the same for all of them stays 0
        x, spread = x - x.mean(1, keepdims=True), x.std(1, keepdims=True)
        return x / (spread + 1e-3 * spread.max(-1, keepdims=True) + 1e-6)

    e = standardise(jax.lax.stop_gradient(codebook))
    D = e.shape[-1]
    i, j = np.triu_indices(D) if D <= 8 else (np.arange(D), np.arange(D))
    both = jnp.concatenate([e, standardise(e[..., i] * e[..., j])], -1)
    return tuple(jnp.broadcast_to(x, (N, *x.shape[1:])) for x in (e, both))


def neighbours(x):
    """The position before each one in raster order and the three above it: [B, h, w, C] -> 4 C.

    Zeros beyond the field; before the first of a row comes the last of the row above. But for that,
    a Dense of them is a masked 3x3 convolution.
    """
    (B, h, w, C), edge = x.shape, ((0, 0), (1, 0), (1, 1), (0, 0))
    before = jnp.pad(x.reshape(B, h * w, C), ((0, 0), (1, 0), (0, 0)))[:, :-1]
    above = jnp.pad(x, edge)[:, :h]  # [B, h, w + 2, C]
    three = [above[:, :, i : i + w] for i in range(3)]
    return jnp.concatenate([before.reshape(x.shape), *three], -1)


class Block(Network):
    """One layer of a causal transformer: x [B, T, width] -> the same."""

    @nn.compact
    def __call__(self, x):
        (B, T, width), heads = x.shape, self.config.heads
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        qkv = dense(3 * width)(nn.LayerNorm(dtype=self.dtype)(x))
        q, k, v = jnp.moveaxis(qkv.reshape(B, T, 3, heads, width // heads), 2, 0)
        causal = jnp.tril(jnp.ones((T, T), bool))
        y = nn.dot_product_attention(q, k, v, mask=causal, dtype=self.dtype)
        x = x + dense(width)(y.reshape(B, T, width))
        y = nn.gelu(dense(2 * width)(nn.LayerNorm(dtype=self.dtype)(x)))
        return x + dense(width)(y)


class Slots(Network):
    """The head: slot n from its position's context and the slots before n.

    A sum over earlier slots and a layer for each slot, as in NADE (Uria et al. 2016, arXiv
    1605.02226), so that one pass gives the logits of all N.
    """

    @nn.compact
    def __call__(self, x, codes, codebook):
        """x [B, T, width], codes [B, T, N], codebook [S, K, D] -> logits [B, T, N, K]."""
        e, features = code_features(codebook, codes.shape[-1])
        (N, K, F), width = features.shape, x.shape[-1]
        vectors = quantize.embed(codes, e).astype(self.dtype)  # [B, T, N, D]
        layer = functools.partial(nn.DenseGeneral, axis=-1, batch_dims=0)  # its own for each slot
        x = nn.Dense(width, dtype=self.dtype)(x)
        own = layer(width, dtype=self.dtype)(jnp.moveaxis(vectors, 2, 0))  # [N, B, T, width]
        earlier = jnp.tril(jnp.ones((N, N), self.dtype), -1)  # jnp.cumsum is slow on a CPU
        y = x + jnp.einsum("nm,m...->n...", earlier, own)  # [N, B, T, width]
        y = nn.gelu(nn.LayerNorm(dtype=self.dtype)(y))
        y = nn.gelu(layer(width, dtype=self.dtype)(y)).astype(jnp.float32)
        y = layer(F, kernel_init=nn.initializers.zeros)(y)  # [N, B, T, F]
        bias = self.param("bias", nn.initializers.zeros, (N, K))
        logits = jnp.einsum("nbtf,nkf->nbtk", y, features) + bias[:, None, None]
        return jnp.moveaxis(logits, 0, 2)


def sample_codes(prior, params, codebook, key, shape, temperature=1.0, show=lambda *_: None):
    """Codes drawn from a Prior, position by position: shape (count, h, w, N) -> codes, int32.

    Every logit is divided by the temperature: below 1, fields are likelier and more alike.
    show(done, "") is called after each position.
    """
    w, N = shape[2:]
    context = jax.jit(lambda params, codes: prior.bind(params).context(codes, codebook))

    @jax.jit
    def draw(params, x, key):  # x [B, 1, width] -> the codes of its position [B, N]
        def draw_slot(n, here):  # slots after n are still 0, and n does not see them
            logits = prior.bind(params).slots(x, here, codebook)[:, 0, n]
            drawn = jax.random.categorical(jax.random.fold_in(key, n), logits / temperature)
            return here.at[:, 0, n].set(drawn)

        return jax.lax.fori_loop(0, N, draw_slot, jnp.zeros((len(x), 1, N), jnp.int32))[:, 0]

    codes, params = jnp.zeros(shape, jnp.int32), {"params": params}
    for t in range(shape[1] * w):
        x = context(params, codes)[:, t : t + 1]
        codes = codes.at[:, t // w, t % w].set(draw(params, x, jax.random.fold_in(key, t)))
        show(t + 1, "")
    return codes
