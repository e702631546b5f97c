"""The networks of section 4.1 and the likelihoods p(x | z_q).

    x [B, 32, 32, 3] -> Encoder -> z_e [B, 8, 8, N, D] -> quantize -> z_q -> Decoder -> outputs

    Encoder   two 4x4 convolutions of stride 2, two residual blocks, a 1x1 convolution to N x D
    Decoder   the mirror: two residual blocks, two 4x4 transposed convolutions of stride 2
    likelihood  outputs and x -> -log p(x | z_q) for each colour value, and a reconstruction

The letters are those of quantize.py; `outputs` holds what the likelihood asks for at each pixel.
Parameters are float32; `dtype` is that of the activations.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import quantize


class Down(nn.Module):
    """4x4 convolution of stride 2: [B, H, W, C] -> [B, H/2, W/2, features].

    Same kernel and result as nn.Conv(features, (4, 4), (2, 2)), computed as a 2x2 convolution over
    blocks of 2x2 pixels: the stride is what a CPU is slow at.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        B, H, W, C = x.shape
        kernel, bias = conv_parameters(self, C)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = x.reshape(B, H // 2 + 1, 2, W // 2 + 1, 2, C).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(B, H // 2 + 1, W // 2 + 1, 4 * C)  # [B, H/2 + 1, W/2 + 1, 4C]
        kernel = kernel.reshape(2, 2, 2, 2, C, -1).transpose(0, 2, 1, 3, 4, 5)
        return conv(x, kernel.reshape(2, 2, 4 * C, -1)) + bias  # [B, H/2, W/2, features]


class Up(nn.Module):
    """4x4 transposed convolution of stride 2: [B, H, W, C] -> [B, 2H, 2W, features].

    Same kernel and result as nn.ConvTranspose(features, (4, 4), (2, 2)), computed as a 2x2
    convolution to 2x2 blocks of pixels: the stock kernel gradient is far slower on a CPU.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        B, H, W, C = x.shape
        kernel, bias = conv_parameters(self, C)
        kernel = kernel.reshape(2, 2, 2, 2, C, -1)[:, ::-1, :, ::-1].transpose(0, 2, 4, 1, 3, 5)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        y = conv(x, kernel.reshape(2, 2, C, -1))  # [B, H + 1, W + 1, 4 features]
        y = y.reshape(B, H + 1, W + 1, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
        y = y.reshape(B, 2 * H + 2, 2 * W + 2, -1)  # one pixel too many on every side
        return y[:, 1:-1, 1:-1] + bias  # [B, 2H, 2W, features]


def conv_parameters(module, inputs):
    """Kernel [4, 4, inputs, features] and bias of a Down or Up, named and drawn as nn.Conv's."""
    shape = (4, 4, inputs, module.features)
    kernel = module.param("kernel", nn.initializers.lecun_normal(), shape)
    bias = module.param("bias", nn.initializers.zeros, (module.features,))
    return kernel.astype(module.dtype), bias.astype(module.dtype)


def conv(x, kernel):
    """Stride 1, no padding: x [B, H, W, C], kernel [a, b, C, F] -> [B, H - a + 1, W - b + 1, F]."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)


class Residual(nn.Module):
    """x + (ReLU, 3x3 convolution, ReLU, 1x1 convolution): [B, h, w, hidden] -> the same."""

    hidden: int
    residual: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.residual, (3, 3), dtype=self.dtype)(nn.relu(x))
        return x + nn.Conv(self.hidden, (1, 1), dtype=self.dtype)(nn.relu(y))


def residual_blocks(x, net):
    """The blocks of an encoder or decoder `net`, and a ReLU: [B, h, w, hidden] -> the same."""
    for _ in range(net.blocks):
        x = Residual(net.hidden, net.residual, net.dtype)(x)
    return nn.relu(x)


class Net(nn.Module):
    """What encoders and decoders are told: channels out, and the sizes that VQVAE lists."""

    features: int
    hidden: int
    residual: int
    blocks: int
    dtype: jnp.dtype


class Encoder(Net):
    """Section 4.1: x [B, 32, 32, 3] -> [B, 8, 8, features].

    In DeepMind's published example the first layer has half the channels, and a 3x3 convolution
    stands before the blocks.
    """

    deepmind: bool = False

    @nn.compact
    def __call__(self, x):
        stem = self.hidden // 2 if self.deepmind else self.hidden
        x = nn.relu(Down(stem, self.dtype)(x))  # [B, 16, 16, stem]
        x = Down(self.hidden, self.dtype)(x)  # [B, 8, 8, hidden]
        if self.deepmind:
            x = nn.Conv(self.hidden, (3, 3), dtype=self.dtype)(nn.relu(x))
        return nn.Conv(self.features, (1, 1), dtype=self.dtype)(residual_blocks(x, self))


class Decoder(Net):
    """The mirror: z [B, 8, 8, N D] -> [B, 32, 32, features]."""

    deepmind: bool = False

    @nn.compact
    def __call__(self, z):
        stem, window = (self.hidden // 2, (3, 3)) if self.deepmind else (self.hidden, (1, 1))
        x = nn.Conv(self.hidden, window, dtype=self.dtype)(z)  # [B, 8, 8, hidden]
        x = nn.relu(Up(stem, self.dtype)(residual_blocks(x, self)))  # [B, 16, 16, stem]
        return Up(self.features, self.dtype)(x)  # [B, 32, 32, features]


class PatchEncoder(Net):
    """Not the paper's: all at 8 x 8, on 4x4 patches, a linear map beside the network.

    The network sees asinh of the linear map's latents: their scales span two orders of magnitude.
    """

    @nn.compact
    def __call__(self, x):
        layer = functools.partial(nn.Dense, dtype=self.dtype)
        z = layer(self.features, name="linear")(to_patches(x))  # [B, 8, 8, features]
        h = nn.Conv(self.hidden, (3, 3), dtype=self.dtype)(jnp.arcsinh(z))
        h = residual_blocks(h, self)
        return z + layer(self.features, name="last")(h)


class PatchDecoder(Net):
    """The mirror: z [B, 8, 8, N D] -> [B, 32, 32, features]."""

    @nn.compact
    def __call__(self, z):
        layer = functools.partial(nn.Dense, dtype=self.dtype)
        h = nn.Conv(self.hidden, (3, 3), dtype=self.dtype)(jnp.arcsinh(z))
        h = residual_blocks(h, self)
        outputs = 16 * self.features
        return from_patches(layer(outputs, name="linear")(z) + layer(outputs, name="last")(h))


# name -> encoder and decoder
NETS = {
    "paper": (Encoder, Decoder),
    "deepmind": (
        functools.partial(Encoder, deepmind=True),
        functools.partial(Decoder, deepmind=True),
    ),
    "patches": (PatchEncoder, PatchDecoder),
}


class VQVAE(nn.Module):
    """Encoder, codebook and decoder.

    net       a key of NETS
    hidden    channels of the networks
    residual  channels between the two convolutions of a residual block
    blocks    residual blocks on each side
    outputs   numbers at each pixel, as the likelihood asks
    """

    net: str
    hidden: int
    residual: int
    blocks: int
    slots: int
    K: int
    D: int
    shared: bool
    outputs: int
    dtype: jnp.dtype

    def setup(self):
        encoder, decoder = NETS[self.net]
        sizes = {name: getattr(self, name) for name in ("hidden", "residual", "blocks", "dtype")}
        self.encoder = encoder(features=self.slots * self.D, **sizes)
        self.decoder = decoder(features=self.outputs, **sizes)
        S = 1 if self.shared else self.slots
        self.codebook = self.param("codebook", quantize.init_codebook, S, self.K, self.D)

    def __call__(self, images):
        """images uint8 [B, 32, 32, 3] -> outputs [B, 32, 32, outputs], z_e, Quantized."""
        z_e = self.encode(images)
        quantized = quantize.quantize(z_e, self.codebook)
        return self.decode(quantized.z_q), z_e, quantized

    def encode(self, images):
        """images uint8 [B, 32, 32, 3] -> z_e [B, 8, 8, N, D], float32."""
        z = self.encoder((images / 255.0 - 0.5).astype(self.dtype))  # [B, 8, 8, N D]
        return z.reshape(*z.shape[:3], self.slots, self.D).astype(jnp.float32)

    def decode(self, z_q):
        """z_q [B, 8, 8, N, D] -> outputs [B, 32, 32, outputs], in the dtype of the activations."""
        return self.decoder(z_q.reshape(*z_q.shape[:3], -1).astype(self.dtype))

    def to_codes(self, images):
        """images uint8 [B, 32, 32, 3] -> codes [B, 8, 8, N], int32."""
        return quantize.lookup(self.encode(images), self.codebook)

    def from_codes(self, codes):
        """codes [B, 8, 8, N] -> outputs [B, 32, 32, outputs]."""
        return self.decode(quantize.embed(codes, self.codebook))


def to_patches(x):
    """4x4 patches: [B, 32, 32, C] -> [B, 8, 8, 16 C]."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // 4, 4, W // 4, 4, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H // 4, W // 4, 16 * C)


def from_patches(x):
    """The inverse of to_patches: [B, 8, 8, 16 C] -> [B, 32, 32, C]."""
    B, h, w, _ = x.shape
    x = x.reshape(B, h, w, 4, 4, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, 4 * h, 4 * w, -1)


def pca_start(params, images, slots, K, key):
    """Parameters of a `patches` net with which step 0 is already a good quantiser of patches.

    The eigenvectors of the 48 x 48 covariance of 4x4 patches carry patches into the slots and back,
    k-means makes the codebooks, and the last layers of both networks are zero: they only have to
    learn what a linear map cannot. images: uint8 [n, 32, 32, 3], some thousand of them.
    """
    patches = np.asarray(to_patches(images / 255.0 - 0.5), np.float64)  # [n, 8, 8, 48]
    flat = patches.reshape(-1, 48)
    mean = flat.mean(0)
    power, vectors = np.linalg.eigh(np.cov(flat.T))  # ascending
    bits = waterfill(power, slots * math.log2(K))
    D = params["codebook"].shape[-1]
    basis, load, used = np.zeros((48, slots, D)), np.zeros(slots), np.zeros(slots, int)
    for d in np.argsort(-bits)[: (bits > 0).sum()]:  # the next one to the slot with least to do
        slot = np.where(used < D, load, np.inf).argmin()
        basis[:, slot, used[slot]] = vectors[:, d]
        load[slot] += bits[d]
        used[slot] += 1
    basis = basis.reshape(48, -1)  # [48, N D], orthonormal columns or zero ones

    z_e = LATENT_SCALE * jnp.float32(patches - mean) @ jnp.float32(basis)
    z_e = z_e.reshape(*z_e.shape[:3], slots, D)
    codebook = quantize.kmeans(key, z_e, slots, K)
    z_q = quantize.embed(quantize.lookup(z_e, codebook), codebook).reshape(*z_e.shape[:3], -1)
    z_q = np.asarray(z_q, np.float64).reshape(len(flat), -1) / LATENT_SCALE
    error = flat - mean - z_q @ basis.T
    encoder, decoder = dict(params["encoder"]), dict(params["decoder"])
    outputs = decoder["linear"]["bias"].size // 16
    bias, back = np.zeros((16, outputs)), np.zeros((slots * D, 16, outputs))
    bias[:, :3], back[:, :, :3] = mean.reshape(16, 3), basis.T.reshape(-1, 16, 3) / LATENT_SCALE
    bias[:, 3:] = logistic_start(255 * error.reshape(-1, 16, 3), outputs)
    for net in (encoder, decoder):
        net["last"] = jax.tree.map(jnp.zeros_like, net["last"])
    encoder["linear"] = dense(LATENT_SCALE * basis, -LATENT_SCALE * mean @ basis)
    decoder["linear"] = dense(back.reshape(slots * D, -1), bias.reshape(-1))
    return {"encoder": encoder, "decoder": decoder, "codebook": codebook}


LATENT_SCALE = 20.0  # holds the latents to their codes: with 1, the encoder runs away from them


def dense(kernel, bias):
    """Parameters of an nn.Dense."""
    return {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}


def waterfill(power, bits):
    """Reverse water-filling: how many of `bits` each Gaussian of variance `power` gets: [n]."""
    low, high = power.min() * 1e-9, power.max()
    for _ in range(100):
        level = math.sqrt(low * high)
        share = np.maximum(0, 0.5 * np.log2(np.maximum(power, 1e-12) / level))
        low, high = (level, high) if share.sum() > bits else (low, level)
    return share


def categorical(outputs, images, variance):
    """256-way softmax for each colour value, as the authors used: 768 outputs at a pixel."""
    del variance
    logits = outputs.reshape(*images.shape, 256).astype(jnp.float32)  # [B, 32, 32, 3, 256]
    at_x = jnp.take_along_axis(logits, images[..., None].astype(jnp.int32), -1)[..., 0]
    return nn.logsumexp(logits, -1) - at_x, nn.softmax(logits) @ jnp.arange(256.0)


def logistic(outputs, images, variance):
    """Discretised logistic, a mean and a log scale for each colour value: 6 outputs at a pixel.

    p(x) = F(x + 1/2) - F(x - 1/2), where F(-1/2) is 0 at x = 0 and F(255 + 1/2) is 1 at x = 255.
    """
    del variance
    mean, log_scale = jnp.split(outputs.astype(jnp.float32), 2, -1)  # [B, 32, 32, 3] each
    mean = 127.5 + 255 * mean  # grey levels
    return logistic_nll(images, mean, log_scale), jnp.clip(mean, 0, 255)


def colours(outputs, images, variance):
    """`logistic` with the colours of a pixel conditioned on one another: 9 outputs at a pixel.

    p(r) p(g | r) p(b | r, g): red's error moves green's mean, red's and green's move blue's. This
    is more than the paper's p(x | z_q), whose colours are independent. The reconstruction is z_q's.
    """
    del variance
    mean, log_scale, slope = jnp.split(outputs.astype(jnp.float32), 3, -1)
    mean = 127.5 + 255 * mean
    error = images - mean
    green = slope[..., 0] * error[..., 0]
    blue = slope[..., 1] * error[..., 0] + slope[..., 2] * error[..., 1]
    moved = mean + jnp.stack([jnp.zeros_like(green), green, blue], -1)
    return logistic_nll(images, moved, log_scale), jnp.clip(mean, 0, 255)


def logistic_start(error, outputs):
    """What `logistic` and `colours` should say beside the mean, given its errors.

    error [n, 16, 3] in grey levels, at each place of a patch -> [16, outputs - 3].
    """
    slopes = np.zeros((16, 3))
    if outputs == 9:
        error = error.copy()
        red, green, blue = error[..., 0], error[..., 1].copy(), error[..., 2]
        for i in range(16):
            slopes[i, 0] = red[:, i] @ green[:, i] / (red[:, i] @ red[:, i])
            both = np.stack([red[:, i], green[:, i]], -1)
            slopes[i, 1:] = np.linalg.lstsq(both, blue[:, i], rcond=None)[0]
        error[..., 2] -= slopes[:, 1] * red + slopes[:, 2] * green
        error[..., 1] -= slopes[:, 0] * red
    log_scale = np.log(error.std(0) * math.sqrt(3) / math.pi) - LOG_SCALE  # [16, 3]
    return np.concatenate([log_scale, slopes], -1)[:, : outputs - 3]


LOG_SCALE = math.log(16.0)  # an output of 0 is a scale of 16 grey levels


def logistic_nll(x, mean, log_scale):
    """-log p(x) of the discretised logistic, in nats; x and mean in grey levels, x an integer.

    With s the logistic function, s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)): no cancellation.
    """
    inverse = jnp.exp(-jnp.clip(log_scale + LOG_SCALE, -4, 6))
    above = jnp.where(x < 255, nn.log_sigmoid((x + 0.5 - mean) * inverse), 0.0)
    below = jnp.where(x > 0, nn.log_sigmoid((mean - x + 0.5) * inverse), 0.0)
    inner = jnp.where((x > 0) & (x < 255), jnp.log(-jnp.expm1(-inverse)), 0.0)
    return -(above + below + inner)


def gaussian(outputs, images, variance):
    """Squared error over the variance of the training pixels: 3 outputs at a pixel.

    DeepMind's example. It has no probability of an integer value, hence no bits/dim.
    """
    mean = outputs.astype(jnp.float32) + 0.5  # pixels in [0, 1]
    return (images / 255.0 - mean) ** 2 / variance, jnp.clip(255 * mean, 0, 255)


# name -> (outputs at a pixel, function, whether its loss is -log p in nats).
# A function takes outputs [B, 32, 32, outputs], images uint8 [B, 32, 32, 3] and the variance of the
# training pixels in [0, 1], and returns the loss of each colour value and a reconstruction in grey
# levels, both float32 [B, 32, 32, 3].
LIKELIHOODS = {
    "categorical": (3 * 256, categorical, True),
    "logistic": (3 * 2, logistic, True),
    "colours": (3 * 3, colours, True),
    "gaussian": (3, gaussian, False),
}
