// Spline couplings: what m means, and the symbols, is in Backend.spline_forward. Backward stands under forward. In
// float64, one thread for each number. Legend: n rows, k features of a part.

constexpr int OUTPUTS = 3 * SPLINE_BINS - 1;
constexpr double SMALLEST = 2.0 * SPLINE_BOUND * SPLINE_LEAST;               // bin
constexpr double SHARED = 2.0 * SPLINE_BOUND - SPLINE_BINS * SMALLEST;       // of the interval, what softmax shares out

// Sizes of bins from BINS numbers u, k apart: SMALLEST + scale * exp(u - top).
struct Shares {
    const real* u;
    int k;
    double top, scale;
};

INLINE double share(const Shares& shares, int b) {
    return shares.scale * exp(shares.u[static_cast<int64>(b) * shares.k] - shares.top);
}

INLINE Shares shares_of(const real* u, int k) {
    double top = u[0], total = 0.0;
#pragma unroll 1  // 8 times as many registers would be too many
    for (int b = 1; b < SPLINE_BINS; ++b) {
        const double other = u[static_cast<int64>(b) * k];
        top = other > top ? other : top;
    }
#pragma unroll 1
    for (int b = 0; b < SPLINE_BINS; ++b) total += exp(u[static_cast<int64>(b) * k] - top);
    return {u, k, top, SHARED / total};
}

// A bin's number, and where it begins and ends.
struct Ends {
    int at;
    double start, stop;
};

// The bin that a value lies in or, for at >= 0, that of this number. NaN is in the first one.
INLINE Ends ends_of(const Shares& shares, double value, int at) {
    Ends found = {0, -SPLINE_BOUND, SPLINE_BOUND};
    double start = -SPLINE_BOUND;
#pragma unroll 1
    for (int b = 0; b < SPLINE_BINS; ++b) {
        const double stop = b == SPLINE_BINS - 1 ? SPLINE_BOUND : start + SMALLEST + share(shares, b);
        if (b == 0 || (at < 0 ? value >= start : b <= at)) found = {b, start, stop};
        start = stop;
    }
    return found;
}

// A knot's slope: LEAST + softplus(u + OFFSET).
INLINE double slope_of(double u) {
    const double a = (u > SPLINE_STEEP ? SPLINE_STEEP : u) + SPLINE_OFFSET;
    return SPLINE_LEAST + (a > 0.0 ? a : 0.0) + log1p(exp(-fabs(a)));
}

INLINE double slope_backward(double up, double u) {
    const double a = u + SPLINE_OFFSET, e = exp(-fabs(a));
    return u > SPLINE_STEEP ? 0.0 : up * (a < 0.0 ? e : 1.0) / (1.0 + e);
}

// The bin of one column's value.
struct Bin {
    int at;
    double x0, w, y0, h, s, u0, u1, left, right, excess;
};

// m points to the first of the column's numbers.
INLINE Bin bin_of(const real* m, int k, double value, bool inverse) {
    Bin bin;
    const Shares widths = shares_of(m, k), heights = shares_of(m + static_cast<int64>(SPLINE_BINS) * k, k);
    const int at = inverse ? ends_of(heights, value, -1).at : ends_of(widths, value, -1).at;
    const Ends x = ends_of(widths, value, at), y = ends_of(heights, value, at);
    bin.at = at;
    bin.x0 = x.start, bin.w = x.stop - x.start;
    bin.y0 = y.start, bin.h = y.stop - y.start;
    bin.s = bin.h / bin.w;
    const real* slopes = m + 2 * static_cast<int64>(SPLINE_BINS) * k;  // at the end of bin 0, of bin 1, ...
    bin.u0 = at > 0 ? slopes[static_cast<int64>(at - 1) * k] : real(0);
    bin.u1 = at < SPLINE_BINS - 1 ? slopes[static_cast<int64>(at) * k] : real(0);
    bin.left = slope_of(bin.u0), bin.right = slope_of(bin.u1);
    bin.excess = bin.left + bin.right - 2.0 * bin.s;
    return bin;
}

INLINE double below_of(const Bin& bin, double t) { return bin.s + bin.excess * t * (1.0 - t); }
INLINE double above_of(const Bin& bin, double t) {
    const double rest = 1.0 - t;
    return bin.right * t * t + 2.0 * bin.s * t * rest + bin.left * rest * rest;
}
INLINE double slope_in(const Bin& bin, double t) {
    const double part = bin.s / below_of(bin, t);
    return part * part * above_of(bin, t);
}

// y : (n, k) = the spline of x for sign 1, its inverse for -1; log_det : (n,) = (first) or += sign * sum(log dy/dx).
// m : (n, OUTPUTS k). y may be x.
KERNEL(spline_forward)(real* y, double* __restrict__ log_det, const real* x, const real* __restrict__ m, int64 n, int k,
                       int sign, int first) {
    for (int64 i = first_row(); i < n; i += all_rows()) {
        double total = 0.0;
        for (int c = threadIdx.x; c < k; c += blockDim.x) {
            const double value = x[i * k + c];
            if (!(fabs(value) < SPLINE_BOUND)) {  // NaN, too
                y[i * k + c] = static_cast<real>(value);
                continue;
            }
            const Bin bin = bin_of(m + i * OUTPUTS * k + c, k, value, sign < 0);
            double t, result;
            if (sign > 0) {
                t = (value - bin.x0) / bin.w;
                result = bin.y0 + bin.h * (bin.s * t * t + bin.left * t * (1.0 - t)) / below_of(bin, t);
            } else {  // the root that does not cancel: Durkan et al. 2019, appendix A.1
                const double up = value - bin.y0, linear = bin.h * bin.left - up * bin.excess;
                const double square = bin.h * (bin.s - bin.left) + up * bin.excess;
                const double under = linear * linear + 4.0 * bin.s * up * square;
                t = 2.0 * bin.s * up / (linear + sqrt(under < 0.0 ? 0.0 : under));
                result = bin.x0 + bin.w * t;
            }
            y[i * k + c] = static_cast<real>(result);
            total += log(slope_in(bin, t));
        }
        total = sign * row_sum(total);
        if (threadIdx.x == 0) log_det[i] = first ? total : log_det[i] + total;
    }
}

// Gradients by the start and the size of the bin in use -> by the BINS numbers that sizes come from, at d.
// The start is -BOUND and the sizes of all bins before; of softmax p, the gradient is p (g - sum of p g). Shares are
// computed once more, since registers are few.
INLINE void shares_backward(real* d, const real* u, int k, int at, double start, double size, double by_start,
                            double by_size) {
    const Shares shares = shares_of(u, k);
    const double before = start + SPLINE_BOUND - at * SMALLEST;
    const double total = (by_start * before + by_size * (size - SMALLEST)) / SHARED;
#pragma unroll 1
    for (int b = 0; b < SPLINE_BINS; ++b) {
        const double gradient = b < at ? by_start : (b == at ? by_size : 0.0);
        d[static_cast<int64>(b) * k] = static_cast<real>(share(shares, b) * (gradient - total));
    }
}

// dx : (n, k), dx may be dy; dm as m, from dy and dlog_det : (n,). Two blocks a multiprocessor: some 20 numbers of
// float64 are in use at once, of float32 flows, too.
KERNEL_WITH(spline_backward, 2)(real* dx, real* __restrict__ dm, const real* dy, const double* __restrict__ dlog_det,
                        const real* __restrict__ x, const real* __restrict__ m, int64 n, int k) {
    for (int64 e = first_thread(); e < n * k; e += all_threads()) {
        const Place where = place(e, k);
        const int64 first = where.row * OUTPUTS * k + where.column;
        const double value = x[e], up = dy[e], up_log = dlog_det[where.row];
        real* d = dm + first;
        if (!(fabs(value) < SPLINE_BOUND)) {
            for (int p = 0; p < OUTPUTS; ++p) d[static_cast<int64>(p) * k] = real(0);
            dx[e] = static_cast<real>(up);
            continue;
        }
        const Bin bin = bin_of(m + first, k, value, false);
        const double t = (value - bin.x0) / bin.w, rest = 1.0 - t, v = t * rest, turn = 1.0 - 2.0 * t;
        const double below = below_of(bin, t), above = above_of(bin, t), part = (bin.s * t * t + bin.left * v) / below;
        const double up_part = up * bin.h / below, log_above = up_log / above, log_below = 2.0 * up_log / below;
        // By the place t, by s, and by the two slopes, each with the others held.
        const double at_left = v * (up_part * (1.0 - part) - log_below) + log_above * rest * rest;
        const double at_right = log_above * t * t - v * (up_part * part + log_below);
        const double by_left = slope_backward(at_left, bin.u0), by_right = slope_backward(at_right, bin.u1);
        real* slopes = d + 2 * static_cast<int64>(SPLINE_BINS) * k;
#pragma unroll 1
        for (int j = 0; j < SPLINE_BINS - 1; ++j) {  // the slope between bins j and j + 1
            const double by_u = j == bin.at ? by_right : (j + 1 == bin.at ? by_left : 0.0);
            slopes[static_cast<int64>(j) * k] = static_cast<real>(by_u);
        }
        const double by_t = up * slope_in(bin, t) * bin.w - log_below * bin.excess * turn
                            + 2.0 * log_above * (bin.right * t + bin.s * turn - bin.left * rest);
        const double by_s = up_part * (t * t - part * (1.0 - 2.0 * v)) + 2.0 * up_log / bin.s + 2.0 * v * log_above
                            - log_below * (1.0 - 2.0 * v);
        dx[e] = static_cast<real>(by_t / bin.w);
        const double by_w = -(t * by_t + bin.s * by_s) / bin.w, by_h = up * part + by_s / bin.w;
        shares_backward(d, m + first, k, bin.at, bin.x0, bin.w, -by_t / bin.w, by_w);
        const int64 heights = static_cast<int64>(SPLINE_BINS) * k;
        shares_backward(d + heights, m + first + heights, k, bin.at, bin.y0, bin.h, up, by_h);
    }
}
