"""Vector quantisation: the nearest code, its gradient, its losses, and how a codebook learns.

The paper (van den Oord, Vinyals, Kavukcuoglu 2017, arXiv 1711.00937), section 3:

    z_q(x) = e_k,  k = argmin_j |z_e(x) - e_j|                                      (eq. 1 and 2)
    loss   = -log p(x | z_q) + |sg[z_e] - e|^2 + beta |z_e - sg[e]|^2               (eq. 3)

with sg the stop-gradient. `nearest` is written for ONE vector and lifted with jax.vmap.

Letters, here and in the other files:
    B        images in a batch
    h, w     height and width of the latent field, 8 x 8
    N        slots: latents at one position of the field
    K, D     codes in a codebook, and the length of a code
    S        codebooks: 1 (shared by all slots) or N (one per slot)
    z_e      encoder output               [B, h, w, N, D]
    e        codebook                     [S, K, D]
    z_q      the codes that replace z_e   [B, h, w, N, D]
    codes    their indices                [B, h, w, N]
Everything here is float32: in half precision distances overflow and neighbours merge.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient as sg


class Quantized(NamedTuple):
    """What `quantize` returns; the losses are means over every element of the field."""

    z_q: jax.Array  # [B, h, w, N, D], with the straight-through gradient
    codes: jax.Array  # [B, h, w, N]; of a trellis the rows: code + K or code + 0
    codebook_loss: jax.Array
    commitment_loss: jax.Array


class EMA(NamedTuple):
    """Appendix A.1: exponential averages, a batch, of how often a code is used and by what."""

    count: jax.Array  # [S, K], N_i in the paper
    total: jax.Array  # [S, K, D], m_i


def nearest(z, codebook):
    """Index of the code nearest to ONE vector: z [D], codebook [K, D] -> int32. Lowest wins a tie.

    |z - e|^2 without |z|^2, which is the same for every code: one matmul when lifted. Precision is
    asked for because a GPU would otherwise round it to ten bits and pick other codes than a CPU.
    """
    return first_least(half_distances(z, codebook))


def half_distances(z, codebook):
    """Half of |z - e|^2 - |z|^2 for each code: z [D], codebook [K, D] -> [K]."""
    along = jnp.dot(codebook, z, precision=jax.lax.Precision.HIGHEST)
    return 0.5 * jnp.sum(codebook**2, -1) - along


def first_least(x):
    """jnp.argmin(x, -1), as two reductions that vectorise on a CPU, where argmin does not."""
    k = jnp.arange(x.shape[-1], dtype=jnp.float32)  # floats reduce faster than integers there
    return jnp.min(jnp.where(x == x.min(-1, keepdims=True), k, len(k) - 1), -1).astype(jnp.int32)


def lookup(z_e, codebook):
    """Codes of a field: `nearest` over slots, positions and batch.

    z_e [B, h, w, N, D] and codebook [S, K, D] -> codes [B, h, w, N], int32.
    """
    codes = lift(nearest, z_e, codebook)  # [N, B h w]
    return jnp.moveaxis(codes.reshape(-1, *z_e.shape[:-2]), 0, -1)  # [B, h, w, N]


def lift(one, z_e, codebook):
    """one(z [D], codebook [K, D]) over slots, positions and batch -> its results [N, B h w, ...].

    z_e [B, h, w, N, D], codebook [S, K, D].
    """
    N, D = z_e.shape[-2:]
    z = jnp.moveaxis(sg(z_e), -2, 0).reshape(N, -1, D)  # [N, B h w, D]
    codebook = jnp.broadcast_to(sg(codebook), (N, *codebook.shape[1:]))
    if jax.default_backend() != "cpu":
        return jax.vmap(jax.vmap(one, (0, None)))(z, codebook)

    def one_slot(pair):  # slot by slot, 2048 vectors at a time: the distances stay in cache
        return jax.lax.map(lambda v: one(v, pair[1]), pair[0], batch_size=2048)

    return jax.lax.map(one_slot, (z, codebook))


def embed(codes, codebook):
    """The codes' vectors: codes [B, h, w, N] and codebook [S, K, D] -> [B, h, w, N, D]."""
    slot = jnp.arange(codes.shape[-1]) % len(codebook)  # 0 for all of them if it is shared
    return codebook[slot, codes]


def trellis_lookup(z_e, codebook):
    """Trellis-coded quantisation (Marcellin and Fischer 1990): rows of two codebooks a slot.

    z_e [B, h, w, N, D] and codebook [S, 2K, D] -> rows [B, h, w, N], int32. Row k + K a is code k
    of book a, and which book a slot uses follows from the codes before it (`trellis_rows`): a code
    costs log2 K bits as ever, while the search has 2K vectors to choose from. It is Viterbi's: the
    rows whose distances sum to the least. Slot 0 has its nearest code of book 0, and steers
    nothing.
    """
    N, K = z_e.shape[-2], codebook.shape[1] // 2
    before, used = branches()

    def best_of_quarters(z, codebook):  # a slot can use two of the quarters 2a + (k >= K / 2)
        distances = half_distances(z, codebook).reshape(4, K // 2)
        return first_least(distances), distances.min(-1)

    def forward(cost, distance):  # [B h w, 8] and [B h w, 4]: the cheaper way into each state
        ways = cost[:, before] + distance[:, used]  # [B h w, 8, 2]
        return ways.min(-1), ways.argmin(-1)

    def backward(state, way):
        way = jnp.take_along_axis(way, state[:, None], 1)[:, 0]  # [B h w]
        return before[state, way], used[state, way]

    first = lookup(z_e[..., :1, :], codebook[:1, :K])
    slots = codebook[1:] if len(codebook) == N else codebook
    index, distance = lift(best_of_quarters, z_e[..., 1:, :], slots)  # [N - 1, B h w, 4]
    start = jnp.where(jnp.arange(8) == 0, 0.0, jnp.inf)
    cost, ways = jax.lax.scan(forward, jnp.broadcast_to(start, (index.shape[1], 8)), distance)
    _, quarter = jax.lax.scan(backward, cost.argmin(-1), ways, reverse=True)  # [N - 1, B h w]
    rows = quarter * (K // 2) + jnp.take_along_axis(index, quarter[..., None], -1)[..., 0]
    rows = jnp.moveaxis(rows.reshape(-1, *z_e.shape[:-2]), 0, -1)  # [B, h, w, N - 1]
    return jnp.concatenate([first, rows], -1)


def trellis_rows(codes, K):
    """The rows of trellis_lookup that codes stand for: [..., N] -> [..., N].

    Ungerboeck's trellis of eight states (1982): with u = (code >= K / 2), book a_n of slot n is
    u_{n-1} xor a_{n-2} xor a_{n-3}, from slot 2 on; before, it is 0.
    """

    def step(state, u):
        a, b, c = state
        return (b ^ u, c ^ a, a), a

    u = jnp.moveaxis(jnp.asarray(codes) // (K // 2), -1, 0)[1:]
    zeros = jnp.zeros_like(codes[..., 0])
    _, book = jax.lax.scan(step, (zeros, zeros, zeros), u)  # [N - 1, ...]
    return codes + K * jnp.moveaxis(jnp.concatenate([zeros[None], book]), 0, -1)


def branches():
    """The trellis of trellis_rows as the two ways into each state a + 2b + 4c: [8, 2] twice.

    First the state that a way comes from, then the quarter 2a + u of the rows that it uses.
    """
    ways = [[] for _ in range(8)]
    for state, u in np.ndindex(8, 2):
        a, b, c = state & 1, state >> 1 & 1, state >> 2
        ways[(b ^ u) + 2 * (c ^ a) + 4 * a].append((state, 2 * a + u))
    return jnp.moveaxis(jnp.array(ways), -1, 0)


def straight_through(z_e, e):
    """z_q: the value of e, the gradient of z_e (section 3.2). Exactly e, not z_e + (e - z_e)."""
    return sg(e) + (z_e - sg(z_e))


# name -> (search: z_e, codebook -> rows of it; codebooks of K a slot; codes, K -> rows)
QUANTIZERS = {
    "nearest": (lookup, 1, lambda codes, K: codes),
    "trellis": (trellis_lookup, 2, trellis_rows),
}


def quantize(z_e, codebook, search=lookup):
    """z_q, codes and both losses of eq. 3: z_e [B, h, w, N, D], codebook [S, K, D] -> Quantized.

    The losses are means over B, h, w, N and D, as in DeepMind's example. The paper averages over
    latents but sums over D, and sums its first term over the 3072 values of an image; divided by
    3072 that weighs both losses D/3072 times these. Adam hides it from the codebook, beta does not.
    """
    codes = search(z_e, codebook)
    e = embed(codes, codebook)
    return Quantized(
        z_q=straight_through(z_e, e),
        codes=codes,
        codebook_loss=jnp.mean((sg(z_e) - e) ** 2),
        commitment_loss=jnp.mean((z_e - sg(e)) ** 2),
    )


def usage(codes, S, K):
    """How often each code is used: codes [B, h, w, N] -> counts [S, K], float32; S is 1 or N."""
    slot = jnp.arange(codes.shape[-1]) % S  # 0 for all of them where the codebook is shared
    return jnp.zeros((S, K)).at[slot, codes].add(1.0)


def perplexity(counts):
    """exp of the entropy in nats of the code frequencies: counts [..., K] -> [...], 1 to K."""
    p = counts / counts.sum(-1, keepdims=True)
    return jnp.exp(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), -1))


def init_codebook(key, S, K, D):
    """Uniform within sqrt(3 / D), so that a code is about one unit long: [S, K, D]."""
    limit = (3 / D) ** 0.5
    return jax.random.uniform(key, (S, K, D), minval=-limit, maxval=limit)


def draw(key, z_e, S, K):
    """K encoder outputs for each codebook, drawn at random: z_e [B, h, w, N, D] -> [S, K, D].

    One in each K-th of the outputs, so that none is drawn twice and nothing needs sorting.
    """
    N, D = z_e.shape[-2:]
    outputs = jnp.moveaxis(sg(z_e).reshape(-1, N, D), 1, 0).reshape(S, -1, D)  # [S, B h w N/S, D]
    edge = np.arange(K + 1) * outputs.shape[1] // K
    place = edge[:-1] + jax.random.uniform(key, (S, K)) * np.diff(edge)  # [S, K]
    return jax.vmap(lambda z, i: z[i])(outputs, place.astype(int))


def ema_init(codebook):
    """Every count 1 and every sum its code: an unused code then stays where it is.

    (Counts of 0 beside sums of e throw unused codes far away; sums of 0 pull them to zero.)
    """
    return EMA(count=jnp.ones(codebook.shape[:2]), total=codebook + 0.0)  # a copy: both are donated


def ema_update(ema, codebook, z_e, codes, gamma):
    """One step of appendix A.1, after the codes were looked up: -> EMA, codebook [S, K, D].

    N_i <- gamma N_i + (1 - gamma) n_i,  m_i <- gamma m_i + (1 - gamma) sum_j z_ij,  e_i = m_i / N_i
    """
    S, K, _ = codebook.shape
    slot = jnp.arange(codes.shape[-1]) % S
    total = jnp.zeros_like(codebook).at[slot, codes].add(sg(z_e))
    count = gamma * ema.count + (1 - gamma) * usage(codes, S, K)
    total = gamma * ema.total + (1 - gamma) * total
    seen = count[..., None] > 1e-10  # below this, 0 / 0 is near: leave the code where it is
    mean = total / jnp.where(seen, count[..., None], 1.0)
    return EMA(count, total), jnp.where(seen, mean, codebook)


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


def kmeans(key, z_e, S, K, search=lookup, rounds=6):
    """Codebooks [S, K, D] by k-means of z_e [n, h, w, N, D]. A round is an EMA step of gamma 0."""

    @jax.jit
    def one_round(key, e, z_e):  # an argument: XLA would compute with a constant while it compiles
        ema, e = ema_update(ema_init(e), e, z_e, search(z_e, e), 0.0)
        return restart(key, ema, e, z_e, 0.5)[1]

    e = jax.jit(draw, static_argnums=(2, 3))(key, z_e, S, K)
    for i in range(rounds):
        e = one_round(jax.random.fold_in(key, i), e, z_e)
    return e
