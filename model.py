"""The networks of section 4.1 and the likelihoods p(x | z_q).

    x [B, 32, 32, 3] -> Encoder -> z_e [B, 8, 8, N, D] -> quantize -> z_q -> Decoder -> outputs

    Encoder   two 4x4 convolutions of stride 2, two residual blocks, a 1x1 convolution to N x D
    Decoder   the mirror: two residual blocks, two 4x4 transposed convolutions of stride 2
    likelihood  outputs and x -> -log p(x | z_q) for each colour value, and a reconstruction

The `transform` nets of the `fast` preset are not the paper's: their field is 4 x 4 with 4 N slots.
The letters are those of quantize.py; `outputs` holds what the likelihood asks for at each pixel.
Parameters are float32; `dtype` is that of the activations.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import quantize
from quantize import sg

HIGHEST = jax.lax.Precision.HIGHEST  # a GPU would otherwise round a matmul to ten bits


class Down(nn.Module):
    """4x4 convolution of stride 2: [B, H, W, C] -> [B, H/2, W/2, features].

    Same kernel and result as nn.Conv(features, (4, 4), (2, 2)).
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        kernel, bias = conv_parameters(self, x.shape[-1])
        return down(x, kernel) + bias


class Up(nn.Module):
    """4x4 transposed convolution of stride 2: [B, H, W, C] -> [B, 2H, 2W, features].

    Same kernel and result as nn.ConvTranspose(features, (4, 4), (2, 2)).
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        kernel, bias = conv_parameters(self, x.shape[-1])
        return up(x, kernel[::-1, ::-1].swapaxes(2, 3)) + bias


def conv_parameters(module, inputs):
    """Kernel [4, 4, inputs, features] and bias of a Down or Up, named and drawn as nn.Conv's."""
    shape = (4, 4, inputs, module.features)
    kernel = module.param("kernel", nn.initializers.lecun_normal(), shape)
    bias = module.param("bias", nn.initializers.zeros, (module.features,))
    return kernel.astype(module.dtype), bias.astype(module.dtype)


def down(x, kernel):
    """4x4 convolution of stride 2: x [B, H, W, C], kernel [4, 4, C, F] -> [B, H/2, W/2, F].

    Computed as a 2x2 convolution over blocks of 2x2 pixels: strides are what a CPU is slow at.
    """
    C = x.shape[-1]
    x = to_blocks(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 2)  # [B, H/2 + 1, W/2 + 1, 4C]
    kernel = kernel.reshape(2, 2, 2, 2, C, -1).transpose(0, 2, 1, 3, 4, 5)
    return conv(x, kernel.reshape(2, 2, 4 * C, -1))


@jax.custom_vjp
def up(x, kernel):
    """The transpose of `down`: x [B, H, W, F], kernel [4, 4, C, F] -> [B, 2H, 2W, C].

    So its gradients are made of down's; those that JAX derives are many times slower on a CPU.
    """
    B, H, W, _ = x.shape
    large = jax.ShapeDtypeStruct((B, 2 * H, 2 * W, kernel.shape[2]), x.dtype)
    return jax.linear_transpose(lambda y: down(y, kernel), large)(x)[0]


def up_gradients(inputs, gradient):
    """Of `up`, by x and by the kernel, from that by its result [B, 2H, 2W, C]."""
    x, kernel = inputs
    by_x, transpose = jax.vjp(lambda kernel: down(gradient, kernel), kernel)
    return by_x, *transpose(x)


up.defvjp(lambda x, kernel: (up(x, kernel), (x, kernel)), up_gradients)


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
        x = nn.relu(Down(stem, self.dtype)(x.astype(self.dtype)))  # [B, 16, 16, stem]
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


class TransformEncoder(Net):
    """Not the paper's: a linear map of 8x8 blocks, and the strength of its bands in each block.

    x [B, 32, 32, 3] -> [B, 4, 4, features]. The blocks overlap, by a filter across their borders
    (`fit_overlap`). Each band of coefficients is divided by its strength, so that one codebook
    serves smooth blocks and busy ones. The strengths' logarithms, the gains, are slot 0, and are
    rounded to their code first: both sides then divide and multiply by the same.
    `transform_start` fits all of it and nothing here is trained (it gained nothing in a try), so
    the gradient ends at z_q; hidden, residual and blocks are the decoder's alone.
    """

    @nn.compact
    def __call__(self, x, gains):
        D = gains.shape[-1]  # of the codes of the gains: [1, K, D]
        overlap, mean, basis, weight = transform_parameters(self, self.features - D)
        x = to_blocks(both_ways(x * (255 / GREY), overlap), BLOCK)  # [B, 4, 4, P]
        z = jnp.matmul(x - mean, basis, precision=HIGHEST)  # codes hang on the last bits
        gain = 0.5 * jnp.log(z**2 @ weight + FLOOR)  # [B, 4, 4, BANDS]
        gain = sg(jnp.pad(gain, [(0, 0)] * 3 + [(0, D - BANDS)]))  # [B, 4, 4, D]
        rounded = quantize.embed(quantize.lookup(gain[..., None, :], gains), sg(gains))
        z = z * band_scale(-rounded[..., 0, :BANDS], weight)
        return jnp.concatenate([gain, z], -1)


class TransformDecoder(Net):
    """The inverse map, then a filter in the image: [B, 4, 4, N D] -> [B, 32, 32, features].

    The gains say how large the errors of a block are, which is most of what its scales need. The
    filter works on 4x4 patches and adds zero at first.
    """

    @nn.compact
    def __call__(self, z):
        gain = z[..., :BANDS]
        overlap, mean, basis, weight = transform_parameters(self, z.shape[-1])
        z = jnp.matmul(z * band_scale(gain, weight), basis.T, precision=HIGHEST)  # [B, 4, 4, P]
        x = both_ways(from_blocks(z + mean, BLOCK), overlap)  # [B, 32, 32, 3]
        log_scale = gain @ self.param("log_scale", nn.initializers.zeros, (BANDS, 3))
        log_scale = jnp.repeat(jnp.repeat(log_scale, BLOCK, 1), BLOCK, 2)  # [B, 32, 32, 3]

        h = nn.Conv(self.hidden, (3, 3), dtype=self.dtype)(to_blocks(x / 4, 4))  # [B, 8, 8, hidden]
        last = nn.Dense(16 * self.features, dtype=self.dtype, kernel_init=nn.initializers.zeros)
        y = from_blocks(last(residual_blocks(h, self)), 4).astype(jnp.float32)
        return y.at[..., :3].add(x).at[..., 3:6].add(log_scale)


def transform_parameters(module, latents):
    """What a transform consists of; P = 3 BLOCK^2. All of it stays as fitted.

    overlap [32, 32] filters across the borders of blocks, or undoes that; mean [P]; basis
    [P, latents]; weight [latents, BANDS]: squares of coefficients -> strength of a band, squared.
    """
    P = 3 * BLOCK**2
    overlap = module.param("overlap", nn.initializers.zeros, (32, 32))
    mean = module.param("mean", nn.initializers.zeros, (P,))
    basis = module.param("basis", nn.initializers.zeros, (P, latents))
    weight = module.param("weight", nn.initializers.zeros, (latents, BANDS))
    return sg((overlap, mean, basis, weight))


def both_ways(x, matrix):
    """matrix [32, 32] on the columns and on the rows of images: [B, 32, 32, C] -> the same."""
    return jnp.einsum("ij,bjkc,lk->bilc", matrix, x, matrix, precision=HIGHEST)


def band_scale(gain, weight):
    """exp(gain) of each latent's band: gain [B, 4, 4, BANDS] -> [B, 4, 4, latents]."""
    return jnp.exp(gain @ (weight.T > 0))


BLOCK = 8  # pixels on each side of what is transformed together
BANDS = 4  # bands of 3, 9, 36 and 144 coefficients, strongest first
FLOOR = 0.1  # of a band's usual strength squared: below it, the gain no longer follows


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
    quantizer: str
    outputs: int
    dtype: jnp.dtype

    def setup(self):
        encoder, decoder, together = NETS[self.net]
        N = self.slots * together
        sizes = {name: getattr(self, name) for name in ("hidden", "residual", "blocks", "dtype")}
        self.encoder = encoder(features=N * self.D, **sizes)
        self.decoder = decoder(features=self.outputs, **sizes)
        S = 1 if self.shared else N
        self.search, copies, self.rows_of = quantize.QUANTIZERS[self.quantizer]
        self.codebook = self.param("codebook", quantize.init_codebook, S, copies * self.K, self.D)

    def __call__(self, images):
        """images uint8 [B, 32, 32, 3] -> outputs [B, 32, 32, outputs], z_e, Quantized."""
        z_e = self.encode(images)
        quantized = quantize.quantize(z_e, self.codebook, self.search)
        return self.decode(quantized.z_q), z_e, quantized

    def encode(self, images):
        """images uint8 [B, 32, 32, 3] -> z_e [B, 8, 8, N, D], float32."""
        gains = [self.codebook[:1, : self.K]] if self.net == "transform" else []
        z = self.encoder(images / 255.0 - 0.5, *gains)  # [B, 8, 8, N D]
        return z.reshape(*z.shape[:3], -1, self.D).astype(jnp.float32)

    def decode(self, z_q):
        """z_q [B, 8, 8, N, D] -> outputs [B, 32, 32, outputs], in the dtype of the activations."""
        return self.decoder(z_q.reshape(*z_q.shape[:3], -1))

    def to_codes(self, images):
        """images uint8 [B, 32, 32, 3] -> codes [B, 8, 8, N], int32."""
        return self.search(self.encode(images), self.codebook) % self.K

    def from_codes(self, codes):
        """codes [B, 8, 8, N] -> outputs [B, 32, 32, outputs]."""
        return self.decode(quantize.embed(self.rows_of(codes, self.K), self.codebook))


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


def transform_start(net, params, images, key):
    """Parameters of a `transform` net with which step 0 is already a good quantiser of blocks.

    The map is fitted, k-means makes the codebooks, and the filter starts at zero: it only has to
    learn what a linear map cannot. images: uint8 [n, 32, 32, 3], some thousand of them.
    """
    (N, rows, D), K = params["codebook"].shape, net.K
    x = np.concatenate([images, images[:, :, ::-1]])
    x = (x - np.float32(127.5)) / np.float32(GREY)
    overlap = fit_overlap(x)
    blocks = np.asarray(to_blocks(both_ways(x, overlap), BLOCK)).reshape(-1, 3 * BLOCK**2)
    bits = (N - 1) * math.log2(K)
    colour = colour_scale(blocks, bits) if net.outputs == 9 else np.eye(3)
    encoder, decoder = fit_transform(blocks, bits, N - 1, D, colour)
    encoder = {**params["encoder"], **encoder, "overlap": overlap}
    decoder = {**params["decoder"], **decoder, "overlap": jnp.linalg.inv(overlap)}
    params = {"encoder": encoder, "decoder": decoder, "codebook": params["codebook"]}

    images = images[::2]  # all of them take k-means twice as long and gain nothing that lasts
    encode = jax.jit(lambda p, images: net.apply({"params": p}, images, method="encode"))
    gains = quantize.kmeans(key, encode(params, images)[..., :1, :], 1, K)
    params["codebook"] = params["codebook"].at[:1, :K].set(gains)
    z_e = encode(params, images)  # divided by the gains as those will be rounded
    search = quantize.QUANTIZERS[net.quantizer][0]
    params["codebook"] = quantize.kmeans(key, z_e, N, rows, search).at[:1, :K].set(gains)

    outputs, z_e, _ = jax.jit(net.apply)({"params": params}, images[:1000])
    error = images[:1000] - (127.5 + GREY * np.asarray(outputs[..., :3], np.float64))
    bias = decoder["Dense_0"]["bias"].reshape(16, -1)  # [16, outputs]
    start, decoder["log_scale"] = logistic_start(error, z_e[..., 0, :BANDS], net.outputs)
    decoder["Dense_0"] = {**decoder["Dense_0"], "bias": bias.at[:, 3:].set(start).reshape(-1)}
    return params


def fit_overlap(x, steps=500):
    """Filter across the borders of blocks that makes the map of each block code best: [32, 32].

    The pre-filter of a lapped transform (Tran, Liang and Tu 2003): on the BLOCK pixels around each
    border a butterfly, a matrix V on the differences, the butterfly again. V is what makes
    log det of the blocks' covariance and the error that the inverse spreads smallest together.
    x [n, 32, 32, 3]; rows and columns of its grey values are what is fitted.
    """
    grey = np.asarray(x).mean(-1)
    lines = np.concatenate([grey, grey.swapaxes(1, 2)]).reshape(-1, 32)
    covariance = np.cov(lines.T, dtype=np.float32)
    half = BLOCK // 2
    mirror = np.eye(half)[::-1]
    butterfly = np.block([[np.eye(half), mirror], [mirror, -np.eye(half)]]) / 2**0.5
    borders, starts = range(half, 32 - BLOCK, BLOCK), range(0, 32, BLOCK)

    def overlap(V):
        around = butterfly @ jax.scipy.linalg.block_diag(jnp.eye(half), V) @ butterfly
        return jax.scipy.linalg.block_diag(
            jnp.eye(half), *[around for _ in borders], jnp.eye(half)
        )

    def cost(V):
        F = overlap(V)
        filtered = jnp.linalg.multi_dot([F, covariance, F.T], precision=HIGHEST)
        blocks = jnp.stack([filtered[i : i + BLOCK, i : i + BLOCK] for i in starts])
        spread = jnp.sum(jnp.linalg.inv(F) ** 2) / 32
        return jnp.linalg.slogdet(blocks)[1].sum() / 32 + jnp.log(spread)

    optimizer = optax.adam(0.02)

    def step(carry, _):
        V, state = carry
        updates, state = optimizer.update(jax.grad(cost)(V), state)
        return (V + updates, state), None

    V = jnp.eye(half)
    (V, _), _ = jax.lax.scan(step, (V, optimizer.init(V)), length=steps)
    return overlap(V)


def colour_scale(blocks, bits, rounds=40):
    """What to multiply the colours of a pixel by before the transform, for `colours`: [3, 3].

    Conditioned on one another, colours cost the logarithm of the determinant of their errors'
    covariance: the product of the errors along three axes, where a mean squared error has the sum.
    Chroma is smooth, so bits make its error small in all pixels at once, and belong there. With the
    best split the scaled errors are alike along all axes. blocks and `bits` as in fit_transform.
    """
    covariance, colour, pixels = np.cov(blocks.T), np.eye(3), BLOCK**2
    for _ in range(rounds):
        scale = np.kron(np.eye(pixels), colour)
        power, vectors = np.linalg.eigh(scale.T @ covariance @ scale)
        power = np.maximum(power, 1e-9)
        left = power / 4 ** waterfill(power, bits)
        error = ((vectors * left) @ vectors.T).reshape(pixels, 3, pixels, 3)
        colour = colour @ np.linalg.inv(np.einsum("iaib->ab", error))
        colour = colour / np.cbrt(np.linalg.det(colour))
    return colour


def fit_transform(blocks, bits, N, D, colour):
    """Parameters of the linear map of blocks to N slots of D numbers, and of its inverse.

    blocks [n, 3 BLOCK^2] in units of GREY; colour [3, 3] scales what is then held equally dear.
    The coefficients are those of eigenvectors. `bits` go to them by reverse water-filling, and they
    are dealt to the slots so that each has about as many bits of work.
    """
    mean = blocks.mean(0)
    blocks = ((blocks - mean).reshape(-1, 3) @ np.float32(colour)).reshape(blocks.shape)
    power, vectors = np.linalg.eigh(np.cov(blocks.T))
    power, vectors = np.maximum(power, 1e-9)[::-1], vectors[:, ::-1]  # strongest first
    power, vectors = np.float32(power), np.float32(vectors)
    P = len(power)
    band = np.digitize(np.arange(P), [P // 4**i for i in range(BANDS - 1, 0, -1)])
    one_hot = np.eye(BANDS, dtype=np.float32)[band]  # [P, BANDS]
    z = blocks @ vectors
    gain = 0.5 * np.log(z**2 @ (one_hot / one_hot.sum(0) / power[:, None]) + FLOOR)
    gain = gain - gain.mean(0)
    share = waterfill(((z * np.exp(-gain)[:, band]) ** 2).mean(0), bits)

    dealt, load, used = np.zeros((P, N * D), np.float32), np.zeros(N), np.zeros(N, int)
    for d in np.argsort(-share)[: min((share > 0).sum(), N * D)]:
        slot = np.where(used < D, load, np.inf).argmin()  # the next one where there is least to do
        dealt[d, slot * D + used[slot]] = 1
        load[slot] += share[d]
        used[slot] += 1

    weight = dealt.T @ (one_hot / power[:, None])  # [N D, BANDS]
    weight = weight / np.maximum((weight > 0).sum(0, dtype=np.float32), 1)
    strength = (z @ dealt) ** 2 @ weight
    weight = weight / np.exp(np.log(strength + FLOOR).mean(0))
    basis = (vectors @ dealt).reshape(P // 3, 3, -1)
    there = np.einsum("ab,ibc->iac", colour, basis).reshape(P, -1)
    back = np.einsum("ba,ibc->iac", np.linalg.inv(colour), basis).reshape(P, -1)
    slot_0 = np.zeros((D, BANDS)), np.zeros((P, D))
    encoder = {"mean": mean, "basis": there, "weight": weight}
    decoder = {
        "mean": mean,
        "basis": np.concatenate([slot_0[1], back], 1),
        "weight": np.concatenate([slot_0[0], weight]),
    }
    return jax.tree.map(jnp.float32, (encoder, decoder))


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


def logistic_start(error, gain, outputs):
    """What `logistic` and `colours` should say beside the mean, given its errors.

    error [n, 32, 32, 3] in grey levels and gain [n, 4, 4, BANDS] -> the same [outputs - 3] for all
    pixels, and how log scales depend on the gains [BANDS, 3].
    """
    red, green, blue = error.reshape(-1, 3).T
    slopes = np.zeros(3)
    if outputs == 9:
        slopes[:1] = np.linalg.lstsq(red[:, None], green, rcond=None)[0]
        slopes[1:] = np.linalg.lstsq(np.stack([red, green], -1), blue, rcond=None)[0]
    moved = np.stack([red, green - slopes[0] * red, blue - slopes[1:] @ [red, green]], -1)
    blocks = np.asarray(to_blocks(moved.reshape(error.shape), BLOCK)).reshape(-1, BLOCK**2, 3)
    scale = np.sqrt((blocks**2).mean(1) + 0.05) * (math.sqrt(3) / math.pi / GREY)  # [16 n, 3]
    factors = np.concatenate([np.asarray(gain).reshape(-1, BANDS), np.ones((len(scale), 1))], 1)
    weights = np.linalg.lstsq(factors, np.log(scale), rcond=None)[0]  # [BANDS + 1, 3]
    return np.concatenate([weights[-1], slopes])[: outputs - 3], jnp.float32(weights[:-1])


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
