// Coupling laws (Dinh et al. 2015, section 3.2). Backward stands under forward. Legend: n rows, k features of a part.

template <int N> INLINE void add(real* y, const real* x, const real* m, int64 size, real sign) {
    const int64 packs = size / N;
    for (int64 t = first_thread(); t < packs; t += all_threads()) {
        Pack<N> value = load<N>(x + t * N);
        const Pack<N> other = load<N>(m + t * N);
        for (int k = 0; k < N; ++k) value.at[k] += sign * other.at[k];
        store<N>(y + t * N, value);
    }
    const int64 t = packs * N + first_thread();
    if (t < size) y[t] = x[t] + sign * m[t];
}

// y = x + sign * m, all of this size; y may be x.
KERNEL(couple)(real* y, const real* x, const real* m, int64 size, int sign) {
    if (aligned(y) && aligned(x) && aligned(m)) add<WIDTH>(y, x, m, size, static_cast<real>(sign));
    else add<1>(y, x, m, size, static_cast<real>(sign));
}

// The logarithm of the factor: a = B tanh(u / B), see Backend.factor_forward.
INLINE double bounded(double u) { return FACTOR_BOUND * tanh_half(u * (2.0 / FACTOR_BOUND)); }

// y : (n, k) = x exp(a) + shift for sign 1, (x - shift) exp(-a) for -1; log_det : (n,) = (first) or += sign * sum(a).
// m : (n, k) holds u, or, if affine, (n, 2k) u and behind it the shift. In float64. y may be x.
KERNEL(factor_forward)(real* y, double* __restrict__ log_det, const real* x, const real* __restrict__ m, int64 n, int k,
                       int affine, int sign, int first) {
    const int64 width = affine ? 2 * static_cast<int64>(k) : k;
    for (int64 i = first_row(); i < n; i += all_rows()) {
        double total = 0.0;
        for (int c = threadIdx.x; c < k; c += blockDim.x) {
            const double a = bounded(m[i * width + c]), shift = affine ? m[i * width + k + c] : real(0);
            const double value = x[i * k + c];
            y[i * k + c] = static_cast<real>(sign > 0 ? value * exp(a) + shift : (value - shift) * exp(-a));
            total += a;
        }
        total = sign * row_sum(total);
        if (threadIdx.x == 0) log_det[i] = first ? total : log_det[i] + total;
    }
}

// dx : (n, k) = dy exp(a), dx may be dy; dm as m: by u (dy x exp(a) + dlog_det) (1 - (a / B)^2), by the shift dy.
KERNEL(factor_backward)(real* dx, real* __restrict__ dm, const real* dy, const double* __restrict__ dlog_det,
                        const real* __restrict__ x, const real* __restrict__ m, int64 n, int k, int affine) {
    const int64 width = affine ? 2 * static_cast<int64>(k) : k;
    for (int64 t = first_thread(); t < n * k; t += all_threads()) {
        const Place at = place(t, k);
        const int64 u = at.row * width + at.column;
        const double a = bounded(m[u]), part = a / FACTOR_BOUND, slope = dy[t], through = slope * exp(a);
        dm[u] = static_cast<real>((through * x[t] + dlog_det[at.row]) * (1.0 - part * part));
        if (affine) dm[u + k] = static_cast<real>(slope);
        dx[t] = static_cast<real>(through);
    }
}
