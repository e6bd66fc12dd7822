"""The kernel contract: what a device must be able to do for a flow to train, score and sample on it.

One legend everywhere: n rows, d features, of which part 0 has d0 = ceil(d / 2) and part 1 d1 = floor(d / 2), h hidden
units; x data, h latent, y a layer's output, ``dy`` the derivative of the loss by y. A permutation ``order`` of the
columns says which are in which part, and in which order: by default the even ones (0-based 0, 2, ...), then the odd.

Rules that every implementation keeps:

* The caller allocates outputs; they are C-contiguous and of the flow's dtype unless stated. A call allocates nothing
  that grows with its arguments, so that a step can be recorded once and replayed.
* Reductions have a fixed order: the same arguments give the same bits on the same machine with the same threads.
* Log-densities, their upstream gradients and row weights are float64 for every dtype of the flow: a float32 running
  sum over many rows loses digits.
* Step, epoch, rate and loss live in the state array (slots below); the host does not read it inside a step.
* Random numbers are Philox4x32-10 (Salmon et al. 2011). Key: the 64-bit seed, low word first. Counter: (column block,
  low 32 bits of the row, epoch, purpose << 24 | bits 32..55 of the row). The row is the row's index in its file, so
  noise does not depend on batch, threads, device or interruptions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from numpy.typing import DTypeLike, NDArray

from nicecp.errors import DeviceError
from nicecp.kernels.device_arrays import DeviceArrays
from nicecp.kernels.state import Purpose as Purpose  # part of the contract
from nicecp.kernels.state import Slot as Slot

Array: TypeAlias = Any  # a NumPy array on CPUs, a CuPy array on GPUs; kernels check shapes where they are called

ALIGNMENT = 256  # bytes: every buffer and every parameter view starts on such a boundary


Ready: TypeAlias = Callable[[int, int], None]


PRIORS = {"gaussian": 0, "logistic": 1}
FACTOR_BOUND = 3.0  # nats: a coupling's factor lies between exp(-3) and exp(3), 0.05 and 20
# A spline coupling's: bins of an interval from -BOUND to BOUND, each at least the share LEAST of it; least slope of a
# knot; OFFSET makes that slope 1 where the network gives 0, STEEP bounds it where networks give millions.
SPLINE_BINS, SPLINE_BOUND, SPLINE_LEAST, SPLINE_STEEP = 8, 4.0, 1e-3, 1000.0
SPLINE_OFFSET = math.log(math.expm1(1.0 - SPLINE_LEAST))
OPTIMIZERS = {"adam": 0, "rmsprop": 1}


class Backend(DeviceArrays):
    """A device. Chosen once (``nicecp.kernels.get_backend``) and passed on explicitly."""

    name: str
    device: str

    # --- arrays -----------------------------------------------------------------------------------

    @abstractmethod
    def alloc(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
        """(shape) array of zeros, C-contiguous, starting on an ALIGNMENT boundary."""

    @abstractmethod
    def asarray(self, host: NDArray[Any]) -> Array:
        """A device array with the host array's content; on a CPU the host array itself when it is C-contiguous."""

    @abstractmethod
    def copy_in(self, dst: Array, src: NDArray[Any]) -> None:
        """Host array to device array of the same shape, cast to its dtype."""

    @abstractmethod
    def copy_out(self, src: Array) -> NDArray[Any]:
        """A new host array with the device array's content."""

    @abstractmethod
    def computing(self) -> AbstractContextManager[None]:
        """Hold the number of BLAS threads that was asked for, and only for as long as the context lasts."""

    @abstractmethod
    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """A runnable that does what ``step`` does.

        ``step`` is called once; its calls of this backend are not carried out but written down, on a CPU on a tape, on
        a GPU in a graph, and what they work on must keep its place in memory. Fills are not recorded.
        """

    def host(self, function: Callable[[], None], reads: Sequence[Array], writes: Sequence[Array]) -> None:
        """Call a Python function here, in a recorded step too, between the calls before and after it.

        reads, writes : the arrays that it works on, in place. For couplings and networks in NumPy, which only devices
        whose arrays are NumPy's can serve: others raise DeviceError, as here.
        """
        raise DeviceError(f"couplings and networks of your own run on a CPU, not on {self.device!r}: use --device cpu")

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all that was launched has finished."""

    # --- borders: rows of data <-> two contiguous halves ------------------------------------------

    @abstractmethod
    def load_batch(
        self,
        x0: Array,
        x1: Array,
        weight: Array,
        data: Array,
        index: Array,
        rows: Array,
        order: Array,
        shift: Array,
        scale: Array,
        state: Array,
        seed: int,
        purpose: int,
    ) -> None:
        """Gather rows, dequantize or standardise them, and split them into halves.

        x0 : (n, d0), x1 : (n, d1) outputs; weight : (n,) float64 output, 1 for a row and 0 for padding
        data : (m, d) uint8, float32 or float64; index, rows : (>= (cursor + 1) * n,) int64
            Row i of the batch is data[index[cursor * n + i]]; it is row rows[cursor * n + i] of the file, which keys
            its noise. index < 0 marks padding: zeros with weight 0.
        order : (d,) int64, a permutation
            Column c of x0 is data column order[c], column c of x1 is order[d0 + c]. It never changes: an implementation
            may look at it when the call is made or recorded. Noise is keyed by the data column, whatever the order.
        shift, scale : (d,) float64, in data order
            uint8: x = shift + scale * (65536 k + bits) / 2^24, bits uniform in 0..65535 (column c: block c // 8, word
            c % 8 // 2, low half first), so with shift 0 and scale 1 x is exact in float32 and never 1. Epoch word:
            state[EPOCH]. Floating point: x = (value - shift) * scale, no noise.
        state : CURSOR and EPOCH are read.  Source: Dinh et al. 2015, section 5.1 (dequantization).
        """

    @abstractmethod
    def split(self, x0: Array, x1: Array, x: Array, order: Array) -> None:
        """x : (n, d) -> x0 : (n, d0), x1 : (n, d1), by ``order`` as in load_batch.  Pair: join."""

    @abstractmethod
    def join(self, x: Array, x0: Array, x1: Array, order: Array) -> None:
        """x0 : (n, d0), x1 : (n, d1) -> x : (n, d), data column order[c] from column c of both.  Pair: split."""

    @abstractmethod
    def permute(self, y0: Array, y1: Array, x0: Array, x1: Array, index: Array) -> None:
        """The halves by another order: column c of y0 and y1, side by side, is column index[c] of x0 and x1.

        y0, x0 : (n, d0), y1, x1 : (n, d1), four arrays. index : (d,) int64, a permutation that never changes, as
        load_batch's order; from one order to another it is np.argsort(one)[other]. log abs det is 0; the inverse, and
        so the backward pass, is permute by np.argsort(index).
        """

    @abstractmethod
    def logit_forward(
        self, z: Array, log_det: Array, x: Array, shift: Array, scale: Array, margin: float, first: bool
    ) -> None:
        """z = log(p) - log(1 - p), p = margin + (1 - 2 margin) (x - shift) scale; z, x : (n, k), z may be x.

        shift, scale : (k,) float64, as the computation is; 0 <= margin < 1/2. log_det : (n,) float64 = (first) or +=
        -sum(log p + log(1 - p)): each row's own part; the factor (1 - 2 margin) scale, which all rows have in common,
        is not in it. p outside (0, 1) gives NaN, p = 0 or 1 infinities. No backward: it comes before the parameters.
        """

    @abstractmethod
    def gather(self, out: Array, source: Array, index: Array, state: Array) -> None:
        """out[i] = source[index[cursor * n + i]], cast to out's dtype, and 0 where that index is negative.

        out : (n,) or (n, k) float64 or the flow's dtype; source : (m,) or (m, k) float32 or float64; index : as of
        load_batch; state : CURSOR is read. So a batch gets what belongs to its rows: context, weights.
        """

    @abstractmethod
    def copy_columns(self, out: Array, out_start: int, x: Array, x_start: int, count: int) -> None:
        """out[:, out_start:out_start+count] = x[:, x_start:x_start+count]; out, x : (n, ·), two arrays, one dtype.

        The other columns of out stay as they are.
        """

    # --- dense layers -----------------------------------------------------------------------------

    @abstractmethod
    def matmul(self, out: Array, a: Array, b: Array, transpose_a: bool = False, transpose_b: bool = False) -> None:
        """out = op(a) @ op(b) in the arrays' dtype (no reduced precision unless the backend was made for it)."""

    @abstractmethod
    def dense_forward(self, y: Array, x: Array, w: Array, b: Array, relu: bool) -> None:
        """y = x @ w + b, then max(y, 0) if relu.  x : (n, i), w : (i, o), b : (o,) -> y : (n, o).

        max(NaN, 0) is NaN: a bad number must not vanish inside a network.  Pair: dense_backward.
        """

    @abstractmethod
    def dense_backward(
        self,
        dx: Array | None,
        dw: Array | None,
        db: Array | None,
        dy: Array,
        y: Array,
        x: Array,
        w: Array,
        relu: bool,
        ready: Ready | None = None,
    ) -> None:
        """dx : (n, i) = dy @ w.T, dw : (i, o) = x.T @ dy, db : (o,) = sum of dy over rows; each may be None.

        With relu, dy : (n, o) is first set to 0 where y <= 0, in place.  Pair: dense_forward.

        ready(start, stop), for every row once: rows start..stop-1 of dw are complete and these rows of w no longer
        needed, so that they can be updated while they are in cache. While a step is recorded, some of these calls come
        after this one has returned, at the latest when the step ends.
        """

    # --- coupling ---------------------------------------------------------------------------------

    @abstractmethod
    def couple(self, y: Array, x: Array, m: Array, sign: int) -> None:
        """y = x + sign * m, all (n, k); y may be x.  sign = 1: additive coupling or an accumulation, -1: its inverse.

        Its own backward is the identity on x and sign on m.  Source: Dinh et al. 2015, section 3.2.
        """

    @abstractmethod
    def factor_forward(
        self, y: Array, log_det: Array, x: Array, m: Array, affine: bool, sign: int, first: bool
    ) -> None:
        """y = x * exp(a) + b for sign = 1, its inverse y = (x - b) * exp(-a) for -1; y, x : (n, k), y may be x.

        m : (n, k), or (n, 2k) if affine, a network's output: u in its first k columns, b in the others (else 0), and
        a = B tanh(u / B), B = FACTOR_BOUND. So the factor exp(a) is never 0 and cannot overflow, and a is u to third
        order around 0; the price is that one coupling stretches a feature at most 20 times and that beyond |u| of about
        2 B it hardly learns any more: more couplings reach further.
        log_det : (n,) float64 = (first) or += sign * sum(a).  Pair: factor_backward.
        Source: Dinh et al. 2015, section 3.2 (multiplicative, affine).
        """

    @abstractmethod
    def factor_backward(
        self, dx: Array, dm: Array, dy: Array, dlog_det: Array, x: Array, m: Array, affine: bool
    ) -> None:
        """dx = dy * exp(a); dm by u: (dy x exp(a) + dlog_det) (1 - (a / B)^2), by b: dy.  Pair: factor_forward, sign 1.

        dx, dy, x : (n, k), dx may be dy; dm, m : (n, k) or (n, 2k); dlog_det : (n,) float64.
        """

    @abstractmethod
    def spline_forward(self, y: Array, log_det: Array, x: Array, m: Array, sign: int, first: bool) -> None:
        """y = the spline of x for sign 1, its inverse for -1, column by column; y, x : (n, k), y may be x.

        m : (n, (3 K - 1) k), K = SPLINE_BINS, a network's output: for each number k columns, K widths, K heights, and
        slopes at the K - 1 inner knots. With B = SPLINE_BOUND and c = SPLINE_LEAST, widths and heights of
        bins are 2 B (c + (1 - K c) softmax), from -B on, slopes c + softplus(min(u, SPLINE_STEEP) + SPLINE_OFFSET), and
        1 at -B and B. In a bin of width w and height h, s = h / w, slopes l and r at its ends, and t = (x - x0) / w,

            y = y0 + h (s t^2 + l t (1 - t)) / (s + (l + r - 2 s) t (1 - t));    outside of [-B, B]  y = x.

        So m = 0 is the identity, y is once continuously differentiable, and slopes lie between 1e-13 and 1e4.
        log_det : (n,) float64 = (first) or += sign * sum(log dy/dx).  Pair: spline_backward.
        Sources: Gregory and Delbourgo 1982, equation 2.4; Durkan et al. 2019, "Neural spline flows".
        """

    @abstractmethod
    def spline_backward(self, dx: Array, dm: Array, dy: Array, dlog_det: Array, x: Array, m: Array) -> None:
        """dx, dm: of dy . y + dlog_det . log_det, by x and by m, of spline_forward with sign 1.

        dx, dy, x : (n, k), dx may be dy; dm, m : (n, (3 K - 1) k); dlog_det : (n,) float64.
        """

    @abstractmethod
    def accumulate(self, out: Array, x: Array) -> None:
        """out += x, both (n,) float64."""

    # --- scaling, prior, loss ---------------------------------------------------------------------

    @abstractmethod
    def scale_prior_forward(
        self, logp: Array, h0: Array, h1: Array, x0: Array, x1: Array, s0: Array, s1: Array, prior: int
    ) -> None:
        """h = x * exp(s); logp = sum_d log p_H(h_d) + s_d.

        x0, h0 : (n, d0), s0 : (d0,); x1, h1 : (n, d1), s1 : (d1,); logp : (n,) float64; h may be x.
        prior : PRIORS; logistic as -|h| - 2 log1p(exp(-|h|)).  NaN gives NaN, infinite h gives -inf.
        Pair: scale_prior_backward.  Source: Dinh et al. 2015, sections 3.3 and 3.4.
        """

    @abstractmethod
    def scale_prior_backward(
        self,
        dx0: Array,
        dx1: Array,
        ds0: Array | None,
        ds1: Array | None,
        dlogp: Array,
        h0: Array,
        h1: Array,
        s0: Array,
        s1: Array,
        prior: int,
    ) -> None:
        """dx = dlogp * g(h) * exp(s); ds = sum over rows of dlogp * (g(h) h + 1), g = d log p_H / d h.

        g(h) = -h (gaussian) or -tanh(h / 2) (logistic).  dlogp : (n,) float64; dx may be h; ds0 and ds1 may both be
        None.  Pair: scale_prior_forward.
        """

    @abstractmethod
    def scale_inverse(self, x0: Array, x1: Array, h0: Array, h1: Array, s0: Array, s1: Array) -> None:
        """x = h * exp(-s), the inverse of scale_prior_forward's scaling; x may be h."""

    @abstractmethod
    def loss(self, state: Array, dlogp: Array, logp: Array, weight: Array) -> None:
        """state[LOSS] = -sum(w logp) / sum(w), dlogp = -w / sum(w); all (n,) float64, rows of weight 0 are not read.

        Adds to LOG_PROB_SUM and WEIGHT_SUM and writes the loss ring.  A loss that is not finite sets SKIP, leaves the
        sums alone and makes dlogp 0; a finite one clears SKIP.
        """

    # --- optimiser --------------------------------------------------------------------------------

    @abstractmethod
    def update(
        self, p: Array, g: Array, m: Array, v: Array, offset: int, size: int, state: Array, optimizer: int
    ) -> None:
        """One update of p[offset:offset+size] from g; p, g, m, v are the flat buffers. Does nothing while SKIP is set.

        Where g is not finite, p, m and v stay as they are and BAD_GRADIENT is set.

        With t = STEP + 1. adam: b1_t = MOMENTUM * LAMBDA^(t-1); m = b1_t m + (1 - b1_t) g; v = SQUARE_DECAY v +
        (1 - SQUARE_DECAY) g^2; p -= RATE * (m / (1 - MOMENTUM^t)) / (sqrt(v / (1 - SQUARE_DECAY^t)) + EPSILON).
        rmsprop: v as above; m = MOMENTUM m - RATE g / max(sqrt(v), EPSILON); p += m.
        Source: Kingma & Ba 2014, first version; the published configuration files of Dinh et al.
        """

    @abstractmethod
    def advance(self, state: Array) -> None:
        """End of a step: CURSOR += 1; unless SKIP, STEP += 1 and RATE = max(RATE / RATE_DECAY, RATE_FLOOR) (a rate
        that starts below the floor stays); with SKIP, SKIPPED += 1. With BAD_GRADIENT, which is cleared, SKIPPED += 1
        and the step's place in the loss ring becomes NaN."""

    # --- random numbers ---------------------------------------------------------------------------

    @abstractmethod
    def fill_uniform(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        """out : (n, k) = bits * 2^-16, 16 each: block c // 8, word c % 8 // 2, low half first; row first_row + i."""

    @abstractmethod
    def fill_normal(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        """out : (n, k) standard normal by Box-Muller: block c // 2 gives columns 2j (cosine) and 2j + 1 (sine).

        Its words a, b, c, d give the open uniforms u = ((a >> 6) 2^26 + (b >> 6) + 0.5) 2^-52 and, from c, d, v (52
        bits and the half are exact in float64, so that neither is ever 0 or 1);
        columns sqrt(-2 log u) cos(2 pi v) and sqrt(-2 log u) sin(2 pi v), computed in float64.
        """

    @abstractmethod
    def fill_logistic(self, out: Array, seed: int, purpose: int, epoch: int, first_row: int = 0) -> None:
        """out : (n, k) logistic log(u / (1 - u)): columns 2j from u, 2j + 1 from v of block j, as in fill_normal."""
