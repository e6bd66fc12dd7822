// Dense layers but for their products: bias, ReLU, and the way back. Legend: n rows, o outputs.

constexpr int BIAS_COLUMNS = 16;

// max(value, 0), where NaN stays NaN: a bad number must not vanish inside a network.
INLINE real rectified(real value) { return value < real(0) ? real(0) : value; }

template <int N> INLINE void add_bias(real* y, const real* b, int64 n, int o, int relu) {
    for (int64 t = first_thread(); t < n * (o / N); t += all_threads()) {
        Pack<N> value = load<N>(y + t * N), bias = load<N>(b + place(t, o / N).column * N);
        for (int k = 0; k < N; ++k) {
            value.at[k] += bias.at[k];
            if (relu) value.at[k] = rectified(value.at[k]);
        }
        store<N>(y + t * N, value);
    }
}

// y : (n, o) += b : (o,), then max(y, 0) if relu.
KERNEL(bias_forward)(real* __restrict__ y, const real* __restrict__ b, int64 n, int o, int relu) {
    if (o % WIDTH == 0 && aligned(y) && aligned(b)) add_bias<WIDTH>(y, b, n, o, relu);
    else add_bias<1>(y, b, n, o, relu);
}

template <int N> INLINE void bias_columns(real* dy, real* db, const real* y, int64 n, int o, int relu, int with_db) {
    constexpr int ACROSS = BIAS_COLUMNS / N, LANES = THREADS / ACROSS;
    __shared__ real sums[LANES][BIAS_COLUMNS];
    const int across = threadIdx.x % ACROSS * N, lane = threadIdx.x / ACROSS;
    const int c = blockIdx.x * BIAS_COLUMNS + across;
    Pack<N> sum = {};
    if (c < o) {
        for (int64 i = lane; i < n; i += LANES) {
            Pack<N> slope = load<N>(dy + i * o + c);
            if (relu) {
                const Pack<N> active = load<N>(y + i * o + c);
                for (int k = 0; k < N; ++k) slope.at[k] = active.at[k] <= real(0) ? real(0) : slope.at[k];
                store<N>(dy + i * o + c, slope);
            }
            for (int k = 0; k < N; ++k) sum.at[k] += slope.at[k];
        }
    }
    if (!with_db) return;
    for (int k = 0; k < N; ++k) sums[lane][across + k] = sum.at[k];
    column_sums<real, LANES, BIAS_COLUMNS>(sums);
    const int own = blockIdx.x * BIAS_COLUMNS + threadIdx.x;
    if (threadIdx.x < BIAS_COLUMNS && own < o) db[own] = sums[0][threadIdx.x];
}

// dy : (n, o) = 0 where y <= 0 if relu, in place; db : (o,) = the sum of dy over rows if with_db. y may be dy.
// One block for BIAS_COLUMNS columns.
KERNEL(bias_backward)(real* dy, real* db, const real* y, int64 n, int o, int relu, int with_db) {
    if (o % WIDTH == 0 && aligned(dy) && aligned(y)) bias_columns<WIDTH>(dy, db, y, n, o, relu, with_db);
    else bias_columns<1>(dy, db, y, n, o, relu, with_db);
}

template <int N> INLINE void bias_then_couple(real* y, const real* x, real* m, const real* b, int64 n, int k, real sign) {
    for (int64 t = first_thread(); t < n * (k / N); t += all_threads()) {
        Pack<N> value = load<N>(m + t * N), from = load<N>(x + t * N);
        const Pack<N> bias = load<N>(b + place(t, k / N).column * N);
        for (int j = 0; j < N; ++j) {
            value.at[j] += bias.at[j];
            from.at[j] += sign * value.at[j];
        }
        store<N>(m + t * N, value);
        store<N>(y + t * N, from);
    }
}

// bias_forward without ReLU on m : (n, k), then couple, y = x + sign * m; y may be x.
KERNEL(bias_couple)(real* y, const real* x, real* m, const real* b, int64 n, int k, int sign) {
    if (k % WIDTH == 0 && aligned(y) && aligned(x) && aligned(m) && aligned(b))
        bias_then_couple<WIDTH>(y, x, m, b, n, k, static_cast<real>(sign));
    else bias_then_couple<1>(y, x, m, b, n, k, static_cast<real>(sign));
}
