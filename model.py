"""The networks of section 4.1 and the likelihoods p(x | z_q).

    x [B, 32, 32, 3] -> Encoder -> z_e [B, 8, 8, N, D] -> quantize -> z_q -> Decoder -> outputs

    Encoder   two 4x4 convolutions of stride 2, two residual blocks, a 1x1 convolution to N x D
    Decoder   the mirror: two residual blocks, two 4x4 transposed convolutions of stride 2
    likelihood  outputs and x -> -log p(x | z_q) for each colour value, and a reconstruction

The `transform` nets of the `fast` preset are not the paper's: their field is 2 x 2 with 16 N slots.
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
from quantize import sg

HIGHEST = jax.lax.Precision.HIGHEST  # a GPU would otherwise round a matmul to ten bits


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


class Filter(Net):
    """Image to image on 4x4 patches, zero at first: [B, 32, 32, C] -> [B, 32, 32, features]."""

    @nn.compact
    def __call__(self, x):
        x = to_blocks(x, 4)  # [B, 8, 8, 16 C]
        x = nn.Conv(self.hidden, (3, 3), dtype=self.dtype)(x)
        x = residual_blocks(x, self)
        last = nn.Dense(16 * self.features, dtype=self.dtype, kernel_init=nn.initializers.zeros)
        return from_blocks(last(x), 4)


class Transform(nn.Module):
    """16x16 blocks to latents or back; `transform_start` fits it, training bends it slowly.

    Coefficients are those of the blocks' eigenvectors, in BANDS bands. Each band is divided by its
    own strength in the block, its gain, so that one codebook serves smooth blocks and busy ones;
    the logarithms of the gains are latents too. Encoder and decoder have one each.
    """

    latents: int  # numbers for a block: slots x D

    def setup(self):
        fitted = lambda name, *shape: self.param(name, nn.initializers.ones, shape)
        # Adam moves all parameters alike; held at ten times their size, these move a tenth as far.
        self.mean = fitted("mean", 3 * BLOCK**2) / SLOW
        self.basis = fitted("basis", 3 * BLOCK**2, self.latents) / SLOW  # orthonormal, or zero
        self.weight = sg(fitted("weight", self.latents, BANDS))  # squares -> a band's strength
        self.place = sg(fitted("place", BANDS, self.latents))  # one a row: which latent is a gain

    def analysis(self, x):
        """x [B, 32, 32, 3] -> [B, 2, 2, latents]. Full precision: codes hang on the last bits."""
        z = jnp.matmul(to_blocks(x, BLOCK) - self.mean, self.basis, precision=HIGHEST)
        gain = 0.5 * jnp.log(z**2 @ self.weight + FLOOR)  # [B, 2, 2, BANDS]
        return z * self.spread(-gain) + gain @ self.place

    def synthesis(self, z):
        """Back, the inverse before training: z [B, 2, 2, latents] -> [B, 32, 32, 3]."""
        gain = z @ (self.place / jnp.sum(self.place**2, -1, keepdims=True)).T
        x = jnp.matmul(z * self.spread(gain), self.basis.T, precision=HIGHEST)
        return from_blocks(x + self.mean, BLOCK)

    def spread(self, gain):
        """exp(gain) of each latent's band: [B, 2, 2, BANDS] -> [B, 2, 2, latents]."""
        return jnp.exp(gain @ (self.weight.T > 0))


BLOCK = 16  # pixels on each side of what is transformed together
BANDS = 5  # bands of 3, 9, 36, 144 and 576 coefficients, strongest first
SLOW = 10.0
FLOOR = 0.1  # of a band's usual strength squared: below it, the gain no longer follows


class TransformEncoder(Net):
    """Not the paper's: a filter in the image, then the transform. features: latents of a block."""

    @nn.compact
    def __call__(self, x):
        x = x * (255 / GREY)
        sizes = (self.hidden, self.residual, self.blocks, self.dtype)
        x = x + Filter(3, *sizes)(x / 4).astype(jnp.float32)
        return Transform(self.features, name="transform").analysis(x)  # [B, 2, 2, features]


class TransformDecoder(Net):
    """The mirror: the transform back, then a filter, which also says how sure the means are."""

    @nn.compact
    def __call__(self, z):
        x = Transform(z.shape[-1], name="transform").synthesis(z)  # [B, 32, 32, 3]
        sizes = (self.hidden, self.residual, self.blocks, self.dtype)
        outputs = Filter(self.features, *sizes)(x / 4).astype(jnp.float32)
        return jnp.concatenate([outputs[..., :3] + x, outputs[..., 3:]], -1)


# name -> encoder, decoder, and how many of the 8x8 positions are coded as one with all their slots
NETS = {
    "paper": (Encoder, Decoder, 1),
    "deepmind": (
        functools.partial(Encoder, deepmind=True),
        functools.partial(Decoder, deepmind=True),
        1,
    ),
    "transform": (TransformEncoder, TransformDecoder, BLOCK**2 // 16),
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
        encoder, decoder, together = NETS[self.net]
        N = self.slots * together
        sizes = {name: getattr(self, name) for name in ("hidden", "residual", "blocks", "dtype")}
        self.encoder = encoder(features=N * self.D, **sizes)
        self.decoder = decoder(features=self.outputs, **sizes)
        S = 1 if self.shared else N
        self.codebook = self.param("codebook", quantize.init_codebook, S, self.K, self.D)

    def __call__(self, images):
        """images uint8 [B, 32, 32, 3] -> outputs [B, 32, 32, outputs], z_e, Quantized."""
        z_e = self.encode(images)
        quantized = quantize.quantize(z_e, self.codebook)
        return self.decode(quantized.z_q), z_e, quantized

    def encode(self, images):
        """images uint8 [B, 32, 32, 3] -> z_e [B, 8, 8, N, D], float32."""
        z = self.encoder((images / 255.0 - 0.5).astype(self.dtype))  # [B, 8, 8, N D]
        return z.reshape(*z.shape[:3], -1, self.D).astype(jnp.float32)

    def decode(self, z_q):
        """z_q [B, 8, 8, N, D] -> outputs [B, 32, 32, outputs], in the dtype of the activations."""
        return self.decoder(z_q.reshape(*z_q.shape[:3], -1).astype(self.dtype))

    def to_codes(self, images):
        """images uint8 [B, 32, 32, 3] -> codes [B, 8, 8, N], int32."""
        return quantize.lookup(self.encode(images), self.codebook)

    def from_codes(self, codes):
        """codes [B, 8, 8, N] -> outputs [B, 32, 32, outputs]."""
        return self.decode(quantize.embed(codes, self.codebook))


def to_blocks(x, size):
    """Blocks of size x size pixels: [B, 32, 32, C] -> [B, 32/size, 32/size, size^2 C]."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // size, size, W // size, size, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H // size, W // size, size**2 * C)


def from_blocks(x, size):
    """The inverse of to_blocks: [B, 32/size, 32/size, size^2 C] -> [B, 32, 32, C]."""
    B, h, w, _ = x.shape
    x = x.reshape(B, h, w, size, size, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, size * h, size * w, -1)


def transform_start(params, images, key):
    """Parameters of a `transform` net with which step 0 is already a good quantiser of blocks.

    The transform is fitted, k-means makes the codebooks, and the filters start at zero: they only
    have to learn what the transform cannot. images: uint8 [n, 32, 32, 3], some thousand of them.
    """
    N, K, D = params["codebook"].shape
    x = np.concatenate([images, images[:, :, ::-1]])
    x = (x - np.float32(127.5)) / np.float32(GREY)
    transform = fit_transform(np.asarray(to_blocks(x, BLOCK)).reshape(-1, 3 * BLOCK**2), N, K, D)
    net = Transform(N * D)
    run = functools.partial(jax.jit(net.apply, static_argnames="method"), {"params": transform})
    z_e = run(x[::2], method="analysis")  # of half of them: [n, 2, 2, N D]
    z_e = z_e.reshape(*z_e.shape[:3], N, D)
    codebook = quantize.kmeans(key, z_e, N, K)
    z_q = quantize.embed(quantize.lookup(z_e, codebook), codebook)
    error = GREY * (x[::2] - run(z_q.reshape(*z_q.shape[:3], -1), method="synthesis"))
    encoder, decoder = dict(params["encoder"]), dict(params["decoder"])
    encoder["transform"] = transform
    decoder["transform"] = jax.tree.map(jnp.copy, transform)  # each is donated on its own
    bias = decoder["Filter_0"]["Dense_0"]["bias"].reshape(16, -1)
    bias = bias.at[:, 3:].set(logistic_start(np.asarray(error, np.float64), bias.shape[-1]))
    decoder["Filter_0"]["Dense_0"]["bias"] = bias.reshape(-1)
    return {"encoder": encoder, "decoder": decoder, "codebook": codebook}


def fit_transform(blocks, N, K, D):
    """Parameters of a Transform to N slots of D numbers: blocks [n, 3 BLOCK^2], in units of GREY.

    Bits go to the coefficients by reverse water-filling, GAIN_BITS to each gain, and the dimensions
    are dealt to the slots so that each has about log2 K bits of work.
    """
    mean = blocks.mean(0)
    power, vectors = np.linalg.eigh(np.cov(blocks.T))
    power, vectors = np.maximum(power, 1e-9)[::-1], vectors[:, ::-1]  # strongest first
    P = len(power)
    band = np.digitize(np.arange(P), [P // 4**i for i in range(BANDS - 1, 0, -1)])
    one_hot = np.eye(BANDS)[band]  # [P, BANDS]
    z = (blocks - mean) @ np.float32(vectors)
    gain = 0.5 * np.log(z**2 @ (one_hot / one_hot.sum(0) / power[:, None]) + FLOOR)
    gain = gain - gain.mean(0)
    power_left = ((z * np.exp(-gain)[:, band]) ** 2).mean(0)
    bits = waterfill(power_left, N * math.log2(K) - BANDS * GAIN_BITS)
    level = (power_left / 4**bits)[bits > 0].mean()  # mean squared error of a coefficient
    bits = np.concatenate([bits, np.full(BANDS, GAIN_BITS)])

    dealt, load, used = np.zeros((P + BANDS, N * D)), np.zeros(N), np.zeros(N, int)
    for d in np.argsort(-bits)[: (bits > 0).sum()]:  # the next one to the slot with least to do
        slot = np.where(used < D, load, np.inf).argmin()
        dealt[d, slot * D + used[slot]] = 1
        load[slot] += bits[d]
        used[slot] += 1

    weight = dealt[:P].T @ (one_hot / power[:, None])  # [N D, BANDS]
    weight = weight / np.maximum((weight > 0).sum(0), 1)
    strength = (z @ np.float32(dealt[:P])) ** 2 @ weight
    usual = np.exp(np.log(strength + FLOOR).mean(0))
    spread = (0.5 * np.log(strength / usual + FLOOR)).std(0)
    place = dealt[P:] * (math.sqrt(level) * 2**GAIN_BITS / np.maximum(spread, 0.01))[:, None]
    basis = vectors @ dealt[:P]
    fitted = {"mean": SLOW * mean, "basis": SLOW * basis, "weight": weight / usual, "place": place}
    return jax.tree.map(jnp.float32, fitted)


GAIN_BITS = 7.0  # a gain's error multiplies everything in its band


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
    mean = 127.5 + GREY * mean  # grey levels
    return logistic_nll(images, mean, log_scale), jnp.clip(mean, 0, 255)


def colours(outputs, images, variance):
    """`logistic` with the colours of a pixel conditioned on one another: 9 outputs at a pixel.

    p(r) p(g | r) p(b | r, g): red's error moves green's mean, red's and green's move blue's. This
    is more than the paper's p(x | z_q), whose colours are independent. The reconstruction is z_q's.
    """
    del variance
    mean, log_scale, slope = jnp.split(outputs.astype(jnp.float32), 3, -1)
    mean = 127.5 + GREY * mean
    # Slopes times the errors of r, r, g move the means of g, b, b: as matmuls with zeros and ones,
    # since a CPU takes four times as long over slices of single channels.
    error_of = np.float32([[1, 1, 0], [0, 0, 1], [0, 0, 0]])
    mean_of = np.float32([[0, 1, 0], [0, 0, 1], [0, 0, 1]])
    error = jnp.matmul(images - mean, error_of, precision=HIGHEST)
    moved = mean + jnp.matmul(slope * error, mean_of, precision=HIGHEST)
    return logistic_nll(images, moved, log_scale), jnp.clip(mean, 0, 255)


def logistic_start(error, outputs):
    """What `logistic` and `colours` should say beside the mean, given its errors.

    error [n, 32, 32, 3] in grey levels -> [outputs - 3], the same for all pixels.
    """
    red, green, blue = error.reshape(-1, 3).T
    slopes = np.zeros(3)
    if outputs == 9:
        slopes[:1] = np.linalg.lstsq(red[:, None], green, rcond=None)[0]
        slopes[1:] = np.linalg.lstsq(np.stack([red, green], -1), blue, rcond=None)[0]
    moved = green - slopes[0] * red, blue - slopes[1] * red - slopes[2] * green
    scale = np.std([red, *moved], axis=1) * math.sqrt(3) / math.pi
    return np.concatenate([np.log(scale / GREY), slopes])[: outputs - 3]


GREY = 16.0  # outputs speak of means and scales in units of 16 grey levels


def logistic_nll(x, mean, log_scale):
    """-log p(x) of the discretised logistic, in nats; x and mean in grey levels, x an integer.

    With s the logistic function, s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)): no cancellation.
    """
    inverse = jnp.exp(-jnp.clip(log_scale + math.log(GREY), -4, 6))
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
