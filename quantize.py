"""Vector quantisation: the nearest code, its gradient, its losses, and how a codebook learns.

The paper (van den Oord, Vinyals, Kavukcuoglu 2017, arXiv 1711.00937), section 3:

    z_q(x) = e_k,  k = argmin_j |z_e(x) - e_j|                                      (eq. 1 and 2)
    loss   = -log p(x | z_q) + |sg[z_e] - e|^2 + beta |z_e - sg[e]|^2               (eq. 3)

with sg the stop-gradient (the paper prints the first term of eq. 3 without its minus).

Letters, here and in the other files (a code is a vector e_j; an array `codes` has their indices):
    B        images in a batch
    H, W, C  height and width of an image or of a layer's input, and its channels
    h, w     height and width of the latent field, 8 x 8 for images of 32 x 32
    N        slots: latents at one position (the paper's N, in section 3.2, counts all positions)
    K, D     codes in a codebook, and numbers in a code
    S        codebooks: N (one for each slot) or 1 (shared by all slots)
    z_e      encoder output               [B, h, w, N, D]
    codebook the vectors e_j              [S, K, D]
    codes    k, the index of the nearest  [B, h, w, N]
    e        that vector, e_k             [B, h, w, N, D]
    z_q      e, with a gradient to z_e    [B, h, w, N, D]

Everything here is float32: bfloat16 would round the distances of neighbouring codes to the same
number.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient as sg

# The nearest code


def nearest(z, codebook):
    """k = argmin_j |z - e_j| for ONE vector: z [D], codebook [K, D] -> int32. Lowest wins a tie."""
    return jnp.argmin(distances(z, codebook))


def distances(z, codebook):
    """(|z - e|^2 - |z|^2) / 2 of ONE vector and every code: z [D], codebook [K, D] -> [K].

    |z - e|^2 = |z|^2 - 2 e.z + |e|^2, and |z|^2 is the same for every code, so it is left out.
    Under vmap the product is one matmul. Without the precision a GPU would round its inputs to ten
    bits and find other codes than a CPU.
    """
    product = jnp.dot(codebook, z, precision=jax.lax.Precision.HIGHEST)  # [K]
    return 0.5 * jnp.sum(codebook**2, -1) - product


def lookup(z_e, codebook):
    """`nearest` under two vmaps: z_e [B, h, w, N, D], codebook [S, K, D] -> codes [B, h, w, N]."""
    N, D = z_e.shape[-2:]
    over_slots = jax.vmap(nearest)  # [N, D] and [N, K, D] -> [N]
    over_positions = jax.vmap(over_slots, in_axes=(0, None))  # [B h w, N, D] -> [B h w, N]
    codes = over_positions(z_e.reshape(-1, N, D), codebook[book_of_slot(N, len(codebook))])
    return codes.reshape(z_e.shape[:-1])


def embed(codes, codebook):
    """The codes' vectors e: codes [B, h, w, N] and codebook [S, K, D] -> [B, h, w, N, D]."""
    return jnp.asarray(codebook)[book_of_slot(codes.shape[-1], len(codebook)), codes]


def book_of_slot(N, S):
    """Which of S codebooks each of N slots uses, int32 [N]: its own, or 0 where all share one."""
    return np.arange(N) % S


def straight_through(z_e, e):
    """z_q: the value e; its gradient goes to z_e unchanged (section 3.2) and none goes to e.

    All are [B, h, w, N, D]. (The value is exactly e; the usual z_e + sg[e - z_e] rounds it.)
    """
    return sg(e) + (z_e - sg(z_e))


class Quantized(NamedTuple):
    """What `quantize` returns; both losses of eq. 3 are means over every element of z_e."""

    z_q: jax.Array  # [B, h, w, N, D], with a gradient to z_e
    codes: jax.Array  # [B, h, w, N], int32
    codebook_loss: jax.Array  # second term of eq. 3
    commitment_loss: jax.Array  # third term of eq. 3, without beta
    extra_loss: jax.Array  # for quantisers with a term of their own; 0 in the paper's


def quantize(z_e, codebook, search=lookup, gradient=straight_through, extra_loss=lambda *_: 0.0):
    """z_q, codes and losses of eq. 3: z_e [B, h, w, N, D], codebook [S, K, D] -> Quantized.

    The paper averages both losses over latents but sums them over D, and sums its first term over
    the 3 H W colour values of an image. Here all three are means, as in DeepMind's example. A beta
    here is therefore 3 H W / D times as much in the paper's units: .25 at 32 x 32 and D = 64 is 12.

    Raises ValueError unless the codebook is [S, K, D] with S = 1 or N.
    """
    if codebook.ndim != 3 or len(codebook) not in (1, z_e.shape[-2]):
        raise ValueError(f"codebook {codebook.shape} is not [S, K, D], S 1 or N: codebook[None]?")
    codes = search(sg(z_e), codebook)
    e = embed(codes, codebook)
    codebook_loss = jnp.mean((sg(z_e) - e) ** 2)
    commitment_loss = jnp.mean((z_e - sg(e)) ** 2)
    extra = extra_loss(z_e, sg(codebook))  # sg: or Adam moves FSQ's fixed grid
    return Quantized(gradient(z_e, e), codes, codebook_loss, commitment_loss, extra)


# How often codes are used


def usage(codes, S, K):
    """How often each code is used: codes [B, h, w, N] -> counts [S, K], int32; S is 1 or N."""
    return jnp.zeros((S, K), jnp.int32).at[book_of_slot(codes.shape[-1], S), codes].add(1)


def perplexity(counts):
    """exp of the entropy of the code frequencies, 1 to K: counts [..., K] -> [...]."""
    p = counts / counts.sum(-1, keepdims=True)
    return jnp.exp(jax.scipy.special.entr(p).sum(-1))


# How a codebook begins, and how it learns by averages instead of a gradient


def init_codebook(key, S, K, D):
    """Uniform within sqrt(3 / D), so that a code is about one unit long: [S, K, D]."""
    return (3 / D) ** 0.5 * jax.random.uniform(key, (S, K, D), minval=-1, maxval=1)


class EMA(NamedTuple):
    """Appendix A.1: running averages of how many vectors of a batch chose a code, and their sum."""

    count: jax.Array  # [S, K], N_i in the paper
    total: jax.Array  # [S, K, D], m_i


def ema_init(codebook):
    """Every count 1 and every sum its code: a code that is never used then stays where it is.

    (From count 0 the first batch that uses a code would throw it far out: its old sum divided by a
    few new counts. From count and sum 0 it would jump onto the mean of that one batch.) The sum is
    a copy, as train.py donates its state, in which no buffer may be twice.
    """
    return EMA(count=jnp.ones(codebook.shape[:2]), total=codebook + 0.0)


def ema_update(ema, codebook, z_e, codes, gamma):
    """One step of appendix A.1, after the codes were looked up: -> EMA, codebook [S, K, D].

    N_i <- gamma N_i + (1 - gamma) n_i,  m_i <- gamma m_i + (1 - gamma) sum_j z_ij,  e_i = m_i / N_i

    n_i: how many vectors of this batch chose code i; z_ij: those vectors. z_e [B, h, w, N, D] and
    codes [B, h, w, N] are the batch's.
    """
    S, K, _ = codebook.shape
    book = book_of_slot(codes.shape[-1], S)
    batch_total = jnp.zeros_like(codebook).at[book, codes].add(sg(z_e))  # sum_j z_ij, [S, K, D]
    count = gamma * ema.count + (1 - gamma) * usage(codes, S, K)
    total = gamma * ema.total + (1 - gamma) * batch_total
    seen = count[..., None] > 1e-10  # below this the quotient is nearly 0 / 0: leave the code alone
    return EMA(count, total), jnp.where(seen, total / count[..., None], codebook)


def restart(key, ema, codebook, z_e, part):
    """Move codes that are used less than `part` of the mean use onto random encoder outputs z_e.

    -> EMA, codebook [S, K, D]. Use is the running count; its mean is B h w N / (S K). Vector, sum
    and count (now 1) move together, or the code would go back at once. None moves whose count is
    above 1/2: with a large batch `part` of the mean is above 1, and it would move at every step.
    """
    dead = ema.count < jnp.minimum(part * z_e[..., 0].size / ema.count.size, 0.5)  # [S, K]
    fresh = random_outputs(key, z_e, *dead.shape)
    count = jnp.where(dead, 1.0, ema.count)
    total = jnp.where(dead[..., None], fresh, ema.total)
    return EMA(count, total), jnp.where(dead[..., None], fresh, codebook)


def random_outputs(key, z_e, S, K):
    """K encoder outputs for each of S codebooks: z_e [B, h, w, N, D] -> [S, K, D].

    To draw without repetition one would sort. Instead the outputs are cut into K equal stretches
    and one is drawn from each: where there are K or more, none comes twice.
    """
    N, D = z_e.shape[-2:]
    outputs = jnp.moveaxis(sg(z_e).reshape(-1, N, D), 1, 0).reshape(S, -1, D)  # [S, B h w N/S, D]
    edge = np.arange(K + 1) * outputs.shape[1] // K
    place = edge[:-1] + jax.random.uniform(key, (S, K)) * np.diff(edge)  # [S, K]
    return jax.vmap(lambda z, i: z[i])(outputs, place.astype(int))


@jax.jit(static_argnames=("S", "K", "rounds"))
def kmeans(key, z_e, S, K, rounds=3):
    """Codebooks [S, K, D] by k-means of z_e [n, h, w, N, D].

    A round is an EMA step with gamma 0 and a restart: codes move to the means of their vectors, and
    codes without vectors onto random ones.
    """

    def one_round(i, codebook):
        codes = lookup_on_cpu(z_e, codebook)  # in pieces: at once a GPU would need 5 GB
        ema, codebook = ema_update(ema_init(codebook), codebook, z_e, codes, 0.0)
        return restart(jax.random.fold_in(key, i), ema, codebook, z_e, 1e-6)[1]

    return jax.lax.fori_loop(0, rounds, one_round, random_outputs(key, z_e, S, K))


# The same lookup in a form that is fast on a CPU, where jnp.argmin does not vectorise


def lookup_here(z_e, codebook):
    """`lookup`, in the form that suits the device."""
    return (lookup_on_cpu if jax.default_backend() == "cpu" else lookup)(z_e, codebook)


def lookup_on_cpu(z_e, codebook):
    """The same codes as `lookup`, some twenty times faster on a CPU.

    One slot after the other and 512 positions at a time: their distances then stay in cache.
    """
    N, D = z_e.shape[-2:]
    z = jnp.moveaxis(z_e, -2, 0).reshape(N, -1, D)  # [N, B h w, D]
    books = codebook[book_of_slot(N, len(codebook))]  # [N, K, D]

    def one_slot(pair):
        z, book = pair
        return jax.lax.map(lambda v: argmin_on_cpu(distances(v, book)), z, batch_size=512)

    codes = jax.lax.map(one_slot, (z, books))  # [N, B h w]
    return jnp.moveaxis(codes, 0, -1).reshape(z_e.shape[:-1])


def argmin_on_cpu(x):
    """jnp.argmin of a vector as two minima, which vectorise: x [K] -> int32."""
    k = jnp.arange(len(x), dtype=jnp.float32)  # floats are faster than integers here
    return min_on_cpu(jnp.where(x == min_on_cpu(x), k, len(x) - 1)).astype(jnp.int32)


def min_on_cpu(x):
    """x.min() of a vector by halving it: under vmap it compares whole rows of positions."""
    while len(x) > 1:
        half = (len(x) + 1) // 2
        x = jnp.minimum(x[:half], x[-half:])
    return x[0]


# Beyond the paper: another gradient, another quantiser


def rotation(z_e, e):
    """z_q by the rotation trick, Fifty et al. 2025 (arXiv 2410.06424): z_e, e -> [B, h, w, N, D].

    z_q = |e| / |z_e| R z_e with R and the ratio held constant: the gradient is turned back and
    rescaled on its way to z_e. R = I - 2 r r^T + 2 u v^T turns z_e onto e, with u and v the unit
    vectors of e and z_e, and r that of u + v.
    """
    z_length, e_length = (jnp.linalg.norm(sg(x), axis=-1, keepdims=True) + 1e-6 for x in (z_e, e))
    v, u = sg(z_e) / z_length, sg(e) / e_length
    r = (u + v) / (jnp.linalg.norm(u + v, axis=-1, keepdims=True) + 1e-6)
    turned = z_e - 2 * jnp.sum(z_e * r, -1, keepdims=True) * r
    turned = e_length / z_length * (turned + 2 * jnp.sum(z_e * v, -1, keepdims=True) * u)
    return straight_through(turned, e)


# Finite scalar quantisation, Mentzer et al. 2023 (arXiv 2309.15505): the codebook is a fixed grid
# of K = L^D points in (-1, 1)^D, and tanh bounds z_e. Unlike there, all dimensions have the same
# L, and its cells are equally wide. That paper has no commitment loss: `--beta 0` leaves it out.


def fsq_levels(K, D):
    """L, points of the grid along each dimension."""
    return round(K ** (1 / D))


def fsq_grid(key, S, K, D):
    """The grid as a codebook [S, K, D]: the middles of L equal cells along each dimension."""
    L = fsq_levels(K, D)
    digits = np.stack(np.unravel_index(np.arange(K), (L,) * D), -1)  # [K, D]
    return jnp.broadcast_to(jnp.float32((2 * digits + 1) / L - 1), (S, K, D))


def fsq_wrong_sizes(K, D):
    """What is wrong with K and D, or "": K has to be L^D with an L of 2 or more."""
    fits = [d for d in range(1, 17) if fsq_levels(K, d) >= 2 and fsq_levels(K, d) ** d == K]
    sizes = " or ".join(map(str, fits))
    return "" if D in fits else f"--quantizer fsq needs K = L^D: for --K {K} give --D {sizes}"


class Quantizer(NamedTuple):
    """What a kind of quantiser consists of; by default the paper's."""

    search: Callable = lookup_here  # z_e, codebook -> codes, each near the z_e of its slot
    start: Callable = init_codebook  # key, S, K, D -> codebook [S, K, D]
    bound: Callable = lambda z_e, codebook: z_e  # applied to the encoder's output before all else
    extra_loss: Callable = lambda z_e, codebook: 0.0  # one more term; it moves z_e, not the codes
    learns: bool = True  # whether the codebook does, by its loss or by EMA
    wrong_sizes: Callable = lambda K, D: ""  # a sentence on what is wrong with them, or ""


FSQ = Quantizer(start=fsq_grid, bound=lambda z_e, codebook: jnp.tanh(z_e), learns=False)
QUANTIZERS = {"vq": Quantizer(), "fsq": FSQ._replace(wrong_sizes=fsq_wrong_sizes)}
GRADIENTS = {"straight-through": straight_through, "rotation": rotation}
