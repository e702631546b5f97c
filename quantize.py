"""Vector quantisation: the nearest code, its gradient, its losses, and how a codebook learns.

The paper (van den Oord, Vinyals, Kavukcuoglu 2017, arXiv 1711.00937), section 3:

    z_q(x) = e_k,  k = argmin_j |z_e(x) - e_j|                                      (eq. 1 and 2)
    loss   = -log p(x | z_q) + |sg[z_e] - e|^2 + beta |z_e - sg[e]|^2               (eq. 3)

with sg the stop-gradient (the paper prints the first term of eq. 3 without its minus). `nearest`
is written for ONE vector and lifted with jax.vmap.

Letters, here and in the other files:
    B        images in a batch
    h, w     height and width of the latent field, 8 x 8
    N        slots: latents at one position (the paper's N, in section 3.2, counts all positions)
    K, D     codes in a codebook, and the length of a code
    S        codebooks: 1 (shared by all slots) or N (one per slot)
    z_e      encoder output               [B, h, w, N, D]
    e        codebook                     [S, K, D]
    z_q      the codes that replace z_e   [B, h, w, N, D]
    codes    their indices k              [B, h, w, N]
Everything here is float32: in bfloat16 codes near each other become ties.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient as sg

# The nearest code


def nearest(z, codebook):
    """Index of the code nearest to ONE vector: z [D], codebook [K, D] -> int32. Lowest wins a tie.

    Half of |z - e|^2 without |z|^2, which is the same for every code: one matmul when lifted. A GPU
    would round its inputs to ten bits, and pick other codes than a CPU: hence the precision.
    """
    along = jnp.dot(codebook, z, precision=jax.lax.Precision.HIGHEST)  # [K]
    return first_least(0.5 * jnp.sum(codebook**2, -1) - along)


def first_least(x):
    """jnp.argmin of a vector, as two minima that vectorise on a CPU, where argmin does not."""
    k = jnp.arange(len(x), dtype=jnp.float32)  # floats are faster than integers there
    return least(jnp.where(x == least(x), k, len(x) - 1)).astype(jnp.int32)


def least(x):
    """jnp.min of a vector; on a CPU by halving it, so that lifted it compares rows of positions."""
    while len(x) > 1 and jax.default_backend() == "cpu":
        half = (len(x) + 1) // 2
        x = jnp.minimum(x[:half], x[-half:])
    return x.min()


def lookup(z_e, codebook):
    """Codes of a field: `nearest` over slots, positions and batch.

    z_e [B, h, w, N, D] and codebook [S, K, D] -> codes [B, h, w, N], int32.
    """
    N, D = z_e.shape[-2:]
    z = jnp.moveaxis(sg(z_e), -2, 0).reshape(N, -1, D)  # [N, B h w, D]
    books = jnp.broadcast_to(sg(codebook), (N, *codebook.shape[1:]))  # [N, K, D]
    if jax.default_backend() == "cpu":  # the same vmaps, in pieces that stay in cache

        def one_slot(pair):
            return jax.lax.map(lambda v: nearest(v, pair[1]), pair[0], batch_size=512)

        codes = jax.lax.map(one_slot, (z, books))
    else:
        codes = jax.vmap(jax.vmap(nearest, in_axes=(0, None)))(z, books)  # [N, B h w]
    return jnp.moveaxis(codes.reshape(N, *z_e.shape[:-2]), 0, -1)  # [B, h, w, N]


def embed(codes, codebook):
    """The codes' vectors: codes [B, h, w, N] and codebook [S, K, D] -> [B, h, w, N, D]."""
    slot = jnp.arange(codes.shape[-1]) % len(codebook)  # 0 for all of them if it is shared
    return codebook[slot, codes]


# How the decoder's gradient passes the argmin. Each of these has the value e and sends no gradient
# to e (the codebook has its own loss, or an EMA); they differ in what reaches z_e.


def straight_through(z_e, e):
    """The gradient of z_q goes to z_e unchanged (section 3.2).

    The value is exactly e: z_e + (e - z_e) would round.
    """
    return sg(e) + (z_e - sg(z_e))


def rotation(z_e, e):
    """The gradient turns with the vector: z_q = |e| / |z_e| R z_e, R and the ratio held constant.

    R = I - 2 r r^T + 2 e z^T, of unit vectors e, z and r along e + z, turns z_e onto e. The
    rotation trick, Fifty et al. 2025 (arXiv 2410.06424): not in the VQ-VAE paper.
    """
    length = jnp.linalg.norm(z_e, axis=-1, keepdims=True) + 1e-6
    ratio = jnp.linalg.norm(e, axis=-1, keepdims=True) / length
    z_unit, e_unit = sg(z_e / length), sg(e / (ratio * length + 1e-6))
    r = z_unit + e_unit
    r = sg(r / (jnp.linalg.norm(r, axis=-1, keepdims=True) + 1e-6))
    turned = z_e - 2 * jnp.sum(z_e * r, -1, keepdims=True) * r
    turned = sg(ratio) * (turned + 2 * jnp.sum(z_e * z_unit, -1, keepdims=True) * e_unit)
    return sg(e) + (turned - sg(turned))


GRADIENTS = {"straight-through": straight_through, "rotation": rotation}


# Kinds of quantiser


def init_codebook(key, S, K, D):
    """Uniform within sqrt(3 / D), so that a code is about one unit long: [S, K, D]."""
    limit = (3 / D) ** 0.5
    return jax.random.uniform(key, (S, K, D), minval=-limit, maxval=limit)


class Quantizer(NamedTuple):
    """What a kind of quantiser consists of; by default the paper's."""

    search: Callable = lookup  # z_e [B, h, w, N, D], codebook [S, K, D] -> codes [B, h, w, N]
    start: Callable = init_codebook  # key, S, K, D -> codebook [S, K, D]
    bound: Callable = lambda z_e: z_e  # what keeps z_e within the codebook, [..., N, D]
    learns: bool = True  # whether the codebook does, by its loss or by EMA
    refuses: Callable = lambda K, D: ""  # K, D -> what is wrong with them, or nothing


# Finite scalar quantisation, Mentzer et al. 2023 (arXiv 2309.15505): the codebook is a fixed grid
# of K = L^D points in (-1, 1)^D, so its search is rounding. tanh bounds z_e. That paper has no
# commitment loss: `--beta 0` leaves it out.


def fsq_levels(K, D):
    """L, points of the grid along each dimension."""
    return round(K ** (1 / D))


def fsq_grid(key, S, K, D):
    """The grid as a codebook [S, K, D]: the middles of L equal cells along each dimension."""
    L = fsq_levels(K, D)
    digits = np.stack(np.unravel_index(np.arange(K), (L,) * D), -1)  # [K, D]
    return jnp.broadcast_to(jnp.float32((2 * digits + 1) / L - 1), (S, K, D))


def fsq_search(z_e, codebook):
    """The code whose cell z_e lies in: [B, h, w, N, D] -> [B, h, w, N]."""
    K, D = codebook.shape[1:]
    L = fsq_levels(K, D)
    digits = jnp.clip(jnp.floor((sg(z_e) + 1) / 2 * L), 0, L - 1).astype(jnp.int32)
    return digits @ L ** jnp.arange(D - 1, -1, -1)


def fsq_refuses(K, D):
    """K has to be L^D with an L of 2 or more."""
    fits = [d for d in range(1, 17) if fsq_levels(K, d) >= 2 and fsq_levels(K, d) ** d == K]
    words = " or ".join(map(str, fits))
    return "" if D in fits else f"fsq needs K = L^D: for --K {K} give --D {words}"


QUANTIZERS = {
    "vq": Quantizer(),
    "fsq": Quantizer(fsq_search, fsq_grid, jnp.tanh, False, fsq_refuses),
}


class Quantized(NamedTuple):
    """What `quantize` returns; the losses are means over every element of the field."""

    z_q: jax.Array  # [B, h, w, N, D], with a gradient to z_e
    codes: jax.Array  # [B, h, w, N]
    codebook_loss: jax.Array
    commitment_loss: jax.Array


def quantize(z_e, codebook, search=lookup, gradient=straight_through):
    """z_q, codes and both losses of eq. 3: z_e [B, h, w, N, D], codebook [S, K, D] -> Quantized.

    The losses are means over B, h, w, N and D, as in DeepMind's example. The paper averages over
    latents but sums over D, and sums its first term over the 3072 values of an image; divided by
    3072 that weighs both losses D/3072 times these. Adam moves the codebook alike under any weight;
    the encoder weighs its loss against the first term, so a beta here is not the paper's.
    """
    codes = search(z_e, codebook)
    e = embed(codes, codebook)
    codebook_loss = jnp.mean((sg(z_e) - e) ** 2)
    commitment_loss = jnp.mean((z_e - sg(e)) ** 2)
    return Quantized(gradient(z_e, e), codes, codebook_loss, commitment_loss)


# How often codes are used


def usage(codes, S, K):
    """How often each code is used: codes [B, h, w, N] -> counts [S, K], float32; S is 1 or N."""
    slot = jnp.arange(codes.shape[-1]) % S  # 0 for all of them where the codebook is shared
    return jnp.zeros((S, K)).at[slot, codes].add(1.0)


def perplexity(counts):
    """exp of the entropy in nats of the code frequencies: counts [..., K] -> [...], 1 to K."""
    p = counts / counts.sum(-1, keepdims=True)
    return jnp.exp(jax.scipy.special.entr(p).sum(-1))


# Codebooks that learn by averages, not by gradient


class EMA(NamedTuple):
    """Appendix A.1: running averages of how many vectors of a batch chose a code, and their sum."""

    count: jax.Array  # [S, K], N_i in the paper
    total: jax.Array  # [S, K, D], m_i


def ema_init(codebook):
    """Every count 1 and every sum its code: an unused code then stays where it is.

    (Counts of 0 beside sums of e throw unused codes far away; sums of 0 pull them to zero.)
    """
    return EMA(count=jnp.ones(codebook.shape[:2]), total=codebook + 0.0)  # a copy: both are donated


def ema_update(ema, codebook, z_e, codes, gamma):
    """One step of appendix A.1, after the codes were looked up: -> EMA, codebook [S, K, D].

    N_i <- gamma N_i + (1 - gamma) n_i,  m_i <- gamma m_i + (1 - gamma) sum_j z_ij,  e_i = m_i / N_i

    n_i: how many vectors of this batch chose code i; z_ij: those vectors.
    """
    S, K, _ = codebook.shape
    slot = jnp.arange(codes.shape[-1]) % S
    total = jnp.zeros_like(codebook).at[slot, codes].add(sg(z_e))
    count = gamma * ema.count + (1 - gamma) * usage(codes, S, K)
    total = gamma * ema.total + (1 - gamma) * total
    seen = count[..., None] > 1e-10  # below this, 0 / 0 is near: leave the code where it is
    mean = total / jnp.where(seen, count[..., None], 1.0)
    return EMA(count, total), jnp.where(seen, mean, codebook)


def draw(key, z_e, S, K):
    """K encoder outputs for each codebook, drawn at random: z_e [B, h, w, N, D] -> [S, K, D].

    The outputs are cut into K runs and one is drawn from each: where there are K or more, none
    twice, and nothing needs sorting.
    """
    N, D = z_e.shape[-2:]
    outputs = jnp.moveaxis(sg(z_e).reshape(-1, N, D), 1, 0).reshape(S, -1, D)  # [S, B h w N/S, D]
    edge = np.arange(K + 1) * outputs.shape[1] // K
    place = edge[:-1] + jax.random.uniform(key, (S, K)) * np.diff(edge)  # [S, K]
    return jax.vmap(lambda z, i: z[i])(outputs, place.astype(int))


def restart(key, ema, codebook, z_e, threshold):
    """Codes used fewer than `threshold` times a batch move onto random encoder outputs.

    Vector, sum and count move together, or the code would go back at the next step.
    """
    S, K, _ = codebook.shape
    dead = ema.count < threshold  # [S, K]
    fresh = draw(key, z_e, S, K)
    count = jnp.where(dead, 1.0, ema.count)
    total = jnp.where(dead[..., None], fresh, ema.total)
    return EMA(count, total), jnp.where(dead[..., None], fresh, codebook)


def kmeans(key, z_e, S, K, rounds=3):
    """Codebooks [S, K, D] by k-means of z_e [n, h, w, N, D].

    A round is an EMA step of gamma 0 and a restart: codes move to the means of their vectors, and
    those without vectors onto random ones.
    """

    @jax.jit
    def one_round(key, e, z_e):  # z_e is an argument: closed over, it would be a slow constant
        ema, e = ema_update(ema_init(e), e, z_e, lookup(z_e, e), 0.0)
        return restart(key, ema, e, z_e, 0.5)[1]

    e = jax.jit(draw, static_argnums=(2, 3))(key, z_e, S, K)
    for i in range(rounds):
        e = one_round(jax.random.fold_in(key, i), e, z_e)
    return e
