"""The reference: NICE and the kernel contract in plain NumPy float64, written from the paper and to be read beside it.

Nothing here is fast and nothing here is shared with the library except the numbering of the state array's slots.
The flow's functions also accept complex arrays, for derivatives by complex step: f'(x) = Im f(x + i e) / e, which
subtracts nothing and so is right to rounding (Squire and Trapp 1998). For that ReLU and the absolute value branch on
the real part.

Sources: Dinh, Krueger, Bengio 2015 (sections 3.2 to 3.4 and 5.1), Kingma & Ba 2014 (first version), Salmon et al. 2011.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.kernels.backend import Slot
from nicecp.spec import ModelSpec
from tests import oracle_spline as spline
from tests.oracle_parts import order_of, orders_of, parts_of, regrouped, whole_of

F64 = NDArray[np.float64]
Parameters = Mapping[str, NDArray[Any]]

# --- random numbers: Salmon et al. 2011, section 3.3 ------------------------

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox(
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]
) -> tuple[NDArray[Any], ...]:
    """Four counter words and two key words (scalars or arrays that broadcast) -> four words as uint64 arrays."""
    left0, right0, left1, right1 = (np.asarray(word, np.uint64) for word in counter)
    for round_number in range(10):
        k0, k1 = ((key[i] + round_number * WEYL[i]) & MASK for i in (0, 1))
        product0, product1 = left0 * MULTIPLIERS[0], left1 * MULTIPLIERS[1]
        left0, left1 = (product1 >> 32) ^ right0 ^ k0, (product0 >> 32) ^ right1 ^ k1
        right0, right1 = product1 & MASK, product0 & MASK
    return left0, right0, left1, right1


def words(seed: int, purpose: int, epoch: int, rows: ArrayLike, n_blocks: int) -> NDArray[np.uint64]:
    """rows : (n,) -> (n, n_blocks, 4): counter (block, row low, epoch, purpose << 24 | row high), key the seed."""
    row = np.asarray(rows, np.int64)[:, None]
    block = np.arange(n_blocks)[None, :]
    out = philox((block, row & MASK, epoch, (purpose << 24) | (row >> 32)), (seed & MASK, seed >> 32))
    return np.stack(np.broadcast_arrays(*out), axis=-1)


def uniform_bits(seed: int, purpose: int, epoch: int, rows: ArrayLike, k: int) -> NDArray[np.int64]:
    """rows : (n,) -> (n, k) integers in 0..65535: eight to a block, two to a word, the low half first."""
    w = words(seed, purpose, epoch, rows, (k + 7) // 8)
    halves = np.stack([w & 0xFFFF, w >> 16], axis=-1)  # (n, blocks, word, low or high)
    return halves.reshape(len(w), -1)[:, :k].astype(np.int64)


def open_uniforms(seed: int, purpose: int, epoch: int, rows: ArrayLike, k: int) -> tuple[F64, F64]:
    """Two (n, ceil(k / 2)) uniforms in the open interval, 52 bits and a half each."""
    a, b, c, d = np.moveaxis(words(seed, purpose, epoch, rows, (k + 1) // 2), -1, 0)
    return tuple(((p >> 6) * 2**26 + (q >> 6)).astype(float) * 2.0**-52 + 2.0**-53 for p, q in ((a, b), (c, d)))  # type: ignore[return-value]


def interleave(even: NDArray[Any], odd: NDArray[Any], k: int) -> NDArray[Any]:
    """Columns 0, 2, ... from even and 1, 3, ... from odd -> (n, k)."""
    out = np.empty((len(even), k), np.result_type(even, odd))
    out[:, 0::2], out[:, 1::2] = even[:, : (k + 1) // 2], odd[:, : k // 2]
    return out


def fill_uniform(seed: int, purpose: int, epoch: int, rows: ArrayLike, k: int) -> F64:
    return uniform_bits(seed, purpose, epoch, rows, k) / 65536.0


def fill_normal(seed: int, purpose: int, epoch: int, rows: ArrayLike, k: int) -> F64:
    u, v = open_uniforms(seed, purpose, epoch, rows, k)
    radius = np.sqrt(-2 * np.log(u))
    return interleave(radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v), k)


def fill_logistic(seed: int, purpose: int, epoch: int, rows: ArrayLike, k: int) -> F64:
    u, v = open_uniforms(seed, purpose, epoch, rows, k)
    return interleave(np.log(u / (1 - u)), np.log(v / (1 - v)), k)


# --- the contract's operations ------------------------


def load_batch(
    n: int,
    data: NDArray[Any],
    index: NDArray[np.int64],
    rows: NDArray[np.int64],
    order: NDArray[np.int64],
    shift: F64,
    scale: F64,
    state: F64,
    seed: int,
    purpose: int,
) -> tuple[F64, F64, F64]:
    """The batch at state[CURSOR] -> x0 : (n, d0), x1 : (n, d1), weight : (n,)."""
    batch = slice(int(state[Slot.CURSOR]) * n, (int(state[Slot.CURSOR]) + 1) * n)
    i, row = index[batch], rows[batch]
    value = data[np.maximum(i, 0)].astype(float)
    if data.dtype == np.uint8:
        bits = uniform_bits(seed, purpose, int(state[Slot.EPOCH]), np.maximum(row, 0), data.shape[1])
        x = shift + scale * (65536 * value + bits) / 2**24
    else:
        x = (value - shift) * scale
    x[i < 0] = 0
    x0, x1 = parts_of(x, order)
    return x0, x1, np.where(i < 0, 0.0, 1.0)


def logit(x: F64, low: F64, width: F64, margin: float) -> tuple[F64, F64]:
    """x : (n, k) in low..low + width -> z : (n, k), and each row's own part of log abs det : (n,)."""
    p = margin + (1 - 2 * margin) * (x - low) / width
    return np.log(p / (1 - p)), -np.log(p * (1 - p)).sum(axis=1)


def gather(n: int, source: NDArray[Any], index: NDArray[np.int64], state: F64) -> NDArray[Any]:
    """The rows of source : (m,) or (m, k) that belong to the batch at state[CURSOR]; 0 for padding."""
    batch = index[int(state[Slot.CURSOR]) * n : (int(state[Slot.CURSOR]) + 1) * n]
    out = source[np.maximum(batch, 0)].astype(float)
    out[batch < 0] = 0
    return out


def copy_columns(out: F64, out_start: int, x: F64, x_start: int, count: int) -> F64:
    """-> out with columns of x in the place of its own."""
    out = out.copy()
    out[:, out_start : out_start + count] = x[:, x_start : x_start + count]
    return out


def relu(x: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.isnan(x.real) | (x.real > 0), x, 0)


def dense(x: NDArray[Any], w: NDArray[Any], b: NDArray[Any], rectify: bool) -> NDArray[Any]:
    y = x @ w + b
    return relu(y) if rectify else y


def dense_backward(dy: F64, y: F64, x: F64, w: F64, rectify: bool) -> tuple[F64, F64, F64, F64]:
    """-> dx, dw, db, and dy behind the ReLU."""
    dy = np.where(y <= 0, 0, dy) if rectify else dy
    return dy @ w.T, x.T @ dy, dy.sum(axis=0), dy


def log_prior(h: NDArray[Any], prior: str) -> NDArray[Any]:
    """Section 3.4, elementwise; the logistic density -|h| - 2 log(1 + exp(-|h|)) is even in h."""
    if prior == "gaussian":
        return -(h * h + np.log(2 * np.pi)) / 2
    size = np.where(h.real < 0, -h, h)
    return -size - 2 * np.log1p(np.exp(-size))


def log_prior_slope(h: F64, prior: str) -> F64:
    return -h if prior == "gaussian" else -np.tanh(h / 2)


def scale_prior(x: NDArray[Any], s: NDArray[Any], prior: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """x : (n, d) -> h = x exp(s), logp : (n,) = sum_d log p_H(h_d) + s_d  (section 3.3)."""
    h = x * np.exp(s)
    return h, (log_prior(h, prior) + s).sum(axis=1)


def scale_prior_backward(dlogp: F64, h: F64, s: F64, prior: str) -> tuple[F64, F64]:
    """dlogp : (n,), h : (n, d) -> dx : (n, d), ds : (d,)."""
    g = log_prior_slope(h, prior)
    return dlogp[:, None] * g * np.exp(s), (dlogp[:, None] * (g * h + 1)).sum(axis=0)


def loss(state: F64, logp: F64, weight: F64) -> tuple[F64, F64]:
    """-> the state after the kernel, dlogp : (n,)."""
    state, used = state.copy(), weight != 0
    total, weighted = weight[used].sum(), (weight[used] * logp[used]).sum()
    mean = -weighted / total if total else np.nan
    state[Slot.LOSS] = state[Slot.LOSS_RING + int(state[Slot.CURSOR]) % Slot.RING_SIZE] = mean
    state[Slot.SKIP] = 0 if np.isfinite(mean) else 1
    if state[Slot.SKIP]:
        return state, np.zeros_like(weight)
    state[Slot.LOG_PROB_SUM] += weighted
    state[Slot.WEIGHT_SUM] += total
    return state, -weight / total


def adam(p: F64, g: F64, m: F64, v: F64, state: F64) -> tuple[F64, F64, F64]:
    """Kingma & Ba 2014, version 1, in the paper's parametrisation."""
    t = int(state[Slot.STEP]) + 1
    b1, b2 = state[Slot.MOMENTUM], state[Slot.SQUARE_DECAY]
    b1_t = b1 * state[Slot.LAMBDA] ** (t - 1)
    m = b1_t * m + (1 - b1_t) * g
    v = b2 * v + (1 - b2) * g**2
    m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
    return p - state[Slot.RATE] * m_hat / (np.sqrt(v_hat) + state[Slot.EPSILON]), m, v


def rmsprop(p: F64, g: F64, m: F64, v: F64, state: F64) -> tuple[F64, F64, F64]:
    """The published configuration files: velocity m, mean square v, root mean square with a floor."""
    average = state[Slot.SQUARE_DECAY]
    v = average * v + (1 - average) * g**2
    m = state[Slot.MOMENTUM] * m - state[Slot.RATE] * g / np.maximum(np.sqrt(v), state[Slot.EPSILON])
    return p + m, m, v


def update(p: F64, g: F64, m: F64, v: F64, offset: int, size: int, state: F64, optimizer: str) -> tuple[F64, F64, F64]:
    """-> p, m, v, changed in [offset, offset + size) where g is finite, and not at all while SKIP is set."""
    p, m, v = p.copy(), m.copy(), v.copy()
    part = offset + np.flatnonzero(np.isfinite(g[offset : offset + size]))
    if not state[Slot.SKIP]:
        rule = {"adam": adam, "rmsprop": rmsprop}[optimizer]
        p[part], m[part], v[part] = rule(p[part], g[part], m[part], v[part], state)
    return p, m, v


def advance(state: F64) -> F64:
    state = state.copy()
    if state[Slot.BAD_GRADIENT]:
        state[Slot.BAD_GRADIENT] = 0
        state[Slot.SKIPPED] += 1
        state[Slot.LOSS_RING + int(state[Slot.CURSOR]) % Slot.RING_SIZE] = np.nan
    state[Slot.CURSOR] += 1
    if state[Slot.SKIP]:
        state[Slot.SKIPPED] += 1
        return state
    state[Slot.STEP] += 1
    if state[Slot.RATE] > state[Slot.RATE_FLOOR]:
        state[Slot.RATE] = max(state[Slot.RATE] / state[Slot.RATE_DECAY], state[Slot.RATE_FLOOR])
    return state


# --- the flow, in its input space ------------------------


def layers(parameters: Parameters, coupling: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """[(weight, bias), ...] of one coupling's network."""
    pairs = []
    while (name := f"couplings/{coupling}/layers/{len(pairs)}") + "/weight" in parameters:
        pairs.append((parameters[f"{name}/weight"], parameters[f"{name}/bias"]))
    return pairs


def network(parameters: Parameters, coupling: int, x: NDArray[Any]) -> list[NDArray[Any]]:
    """m(x) of one coupling: [x, hidden layer, ..., output]; ReLU on all layers but the last."""
    outputs = [x]
    pairs = layers(parameters, coupling)
    for j, (w, b) in enumerate(pairs):
        outputs.append(dense(outputs[-1], w, b, rectify=j < len(pairs) - 1))
    return outputs


BOUND = 3.0  # of a factor's logarithm, in nats


def split_output(law: str, m: NDArray[Any]) -> tuple[Any, Any]:
    """A network's output -> u, of which the factor is exp(B tanh(u / B)), and the shift: section 3.2."""
    if law == "additive":
        return None, m
    return (m[:, : m.shape[1] // 2], m[:, m.shape[1] // 2 :]) if law == "affine" else (m, 0.0)


def couple(law: str, x: NDArray[Any], m: NDArray[Any], sign: int = 1) -> tuple[NDArray[Any], Any]:
    """x : (n, k) -> the law's y, or its inverse, and log abs det : (n,)."""
    if law == "spline":
        return spline.couple(x, m, sign)
    u, shift = split_output(law, m)
    if u is None:
        return x + sign * shift, np.zeros(len(x))
    a = BOUND * np.tanh(u / BOUND)
    return (x * np.exp(a) + shift if sign == 1 else (x - shift) * np.exp(-a)), sign * a.sum(axis=1)


def couple_backward(law: str, dy: F64, dlog_det: F64, x: F64, m: F64) -> tuple[F64, F64]:
    """-> dx, dm."""
    if law == "spline":
        return spline.couple_backward(dy, dlog_det, x, m)
    u, _ = split_output(law, m)
    if u is None:
        return dy, dy
    tanh = np.tanh(u / BOUND)
    dx = dy * np.exp(BOUND * tanh)
    du = (dx * x + dlog_det[:, None]) * (1 - tanh**2)
    return dx, np.hstack([du, dy]) if law == "affine" else du


def beside(part: NDArray[Any], context: F64 | None) -> NDArray[Any]:
    """What a network reads: (n, d_c), and a context (n, k) behind it."""
    return part if context is None else np.concatenate([part, context], axis=1)


def forward(
    spec: ModelSpec, parameters: Parameters, x: NDArray[Any], context: F64 | None = None
) -> tuple[NDArray[Any], Any]:
    """x : (n, d), context : (n, k) scaled -> h : (n, d), log abs det : (n,): sections 3.2 and 3.3."""
    parts, order, log_det = parts_of(x, order_of(spec)), order_of(spec), 0.0
    for k, (c, after) in enumerate(zip(spec.couplings, orders_of(spec), strict=True)):
        parts, order = regrouped(parts, order, after), after
        m = network(parameters, k, beside(parts[c.conditions_on], context))[-1]
        parts[c.transforms], more = couple(c.law, parts[c.transforms], m)
        log_det = log_det + more
    s = parameters["scaling/log_scale"]
    return whole_of(parts, order) * np.exp(s), log_det + s.sum()


def inverse(spec: ModelSpec, parameters: Parameters, h: NDArray[Any], context: F64 | None = None) -> NDArray[Any]:
    y = h * np.exp(-parameters["scaling/log_scale"])
    order = orders_of(spec)[-1]
    parts = parts_of(y, order)
    for k, c in reversed(list(enumerate(spec.couplings))):
        parts, order = regrouped(parts, order, orders_of(spec)[k]), orders_of(spec)[k]
        m = network(parameters, k, beside(parts[c.conditions_on], context))[-1]
        parts[c.transforms] = couple(c.law, parts[c.transforms], m, -1)[0]
    return whole_of(parts, order)


def log_prob(spec: ModelSpec, parameters: Parameters, x: NDArray[Any], context: F64 | None = None) -> NDArray[Any]:
    """x : (n, d) -> (n,) nats."""
    h, log_det = forward(spec, parameters, x, context)
    return log_prior(h, spec.prior).sum(axis=1) + log_det


def mean_loss(spec: ModelSpec, parameters: Parameters, x: NDArray[Any], context: F64 | None = None) -> Any:
    return -log_prob(spec, parameters, x, context).mean()


def gradients(
    spec: ModelSpec, parameters: Parameters, x: F64, context: F64 | None = None
) -> tuple[dict[str, F64], F64]:
    """By hand: -> d mean_loss / d parameters by name, d log_prob(x_i) / d x_i : (n, d)."""
    n, orders = len(x), orders_of(spec)
    parts, order = parts_of(x, order_of(spec)), order_of(spec)
    saved, before = [], []
    for k, c in enumerate(spec.couplings):
        parts, order = regrouped(parts, order, orders[k]), orders[k]
        saved.append(network(parameters, k, beside(parts[c.conditions_on], context)))
        before.append(parts[c.transforms])
        parts[c.transforms] = couple(c.law, before[-1], saved[-1][-1])[0]
    s = parameters["scaling/log_scale"]
    h = whole_of(parts, order) * np.exp(s)
    grads: dict[str, F64] = {}
    dy, grads["scaling/log_scale"] = scale_prior_backward(np.full(n, -1 / n), h, s, spec.prior)
    dparts = parts_of(dy, order)
    for k, c in reversed(list(enumerate(spec.couplings))):
        dparts, order = regrouped(dparts, order, orders[k]), orders[k]
        pairs, dlogp = layers(parameters, k), np.full(n, -1 / n)
        dparts[c.transforms], dz = couple_backward(c.law, dparts[c.transforms], dlogp, before[k], saved[k][-1])
        for j in reversed(range(len(pairs))):
            x_j, y_j = saved[k][j], saved[k][j + 1]
            name = f"couplings/{k}/layers/{j}"
            dz, grads[f"{name}/weight"], grads[f"{name}/bias"], _ = dense_backward(
                dz, y_j, x_j, pairs[j][0], rectify=j < len(pairs) - 1
            )
        dparts[c.conditions_on] = dparts[c.conditions_on] + dz[:, : dparts[c.conditions_on].shape[1]]
    return grads, -n * whole_of(dparts, order)


def complex_step(
    spec: ModelSpec, parameters: Parameters, x: F64, context: F64 | None = None, epsilon: float = 1e-40
) -> tuple[dict[str, F64], F64]:
    """The same two gradients by complex step, one entry at a time."""
    grads = {}
    for name, value in parameters.items():
        grad = np.empty(value.shape)
        for entry in np.ndindex(value.shape):
            moved = value.astype(complex)
            moved[entry] += 1j * epsilon
            grad[entry] = mean_loss(spec, {**parameters, name: moved}, x, context).imag / epsilon
        grads[name] = grad
    dx = np.empty(x.shape)
    for column in range(x.shape[1]):  # rows are independent: one column moves in all of them
        moved = x.astype(complex)
        moved[:, column] += 1j * epsilon
        dx[:, column] = log_prob(spec, parameters, moved, context).imag / epsilon
    return grads, dx
