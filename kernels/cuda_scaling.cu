// Scaling and prior (Dinh et al. 2015, sections 3.3 and 3.4), in float64. Backward stands under forward.
// Legend: n rows, parts of d0 and d1 features.

constexpr int SCALE_COLUMNS = 8;
constexpr int FACTORS = 64;  // of at most 2 each: their product cannot overflow

struct Score {
    double log_det, total, product;
    int factors;
};

// One row of one part: h = x exp(s), h may be x. Softplus terms log(1 + exp(-|h|)) are the logarithm of a product.
INLINE void scale_row(Score& score, real* h, const real* x, const real* __restrict__ s, int d, int prior) {
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
        const double log_scale = s[c], value = x[c] * exp(log_scale), size = fabs(value);
        h[c] = static_cast<real>(value);
        score.log_det += log_scale;
        if (prior == PRIOR_GAUSSIAN) {
            score.total += 0.5 * size * size;
            continue;
        }
        score.total += size;
        score.product *= 1.0 + exp(-size);
        if (++score.factors == FACTORS) {
            score.total += 2.0 * log(score.product);
            score.product = 1.0;
            score.factors = 0;
        }
    }
}

// h = x exp(s), logp : (n,) = sum_d log p_H(h_d) + s_d.
KERNEL(scale_prior_forward)(double* __restrict__ logp, real* h0, real* h1, const real* x0, const real* x1,
                            const real* __restrict__ s0, const real* __restrict__ s1, int64 n, int d0, int d1,
                            int prior) {
    for (int64 i = first_row(); i < n; i += all_rows()) {
        Score score = {0.0, 0.0, 1.0, 0};
        scale_row(score, h0 + i * d0, x0 + i * d0, s0, d0, prior);
        scale_row(score, h1 + i * d1, x1 + i * d1, s1, d1, prior);
        double value = score.log_det - score.total - 2.0 * log(score.product);
        value = row_sum(value);
        if (prior == PRIOR_GAUSSIAN) value -= (d0 + d1) * HALF_LOG_2PI;
        if (threadIdx.x == 0) logp[i] = value;
    }
}

// dx = dlogp g(h) exp(s), dx may be h; ds = sum over rows of dlogp (g(h) h + 1) if with_ds; g = d log p_H / d h.
// One block for SCALE_COLUMNS columns of a part.
KERNEL(scale_prior_backward)(real* dx0, real* dx1, real* ds0, real* ds1, const double* __restrict__ dlogp,
                             const real* h0, const real* h1, const real* s0, const real* s1, int64 n, int d0, int d1,
                             int prior, int with_ds) {
    constexpr int LANES = THREADS / SCALE_COLUMNS;
    __shared__ double sums[LANES][SCALE_COLUMNS];
    const int tiles0 = (d0 + SCALE_COLUMNS - 1) / SCALE_COLUMNS;
    const bool second = blockIdx.x >= static_cast<uint32>(tiles0);
    const int start = (second ? blockIdx.x - tiles0 : blockIdx.x) * SCALE_COLUMNS, d = second ? d1 : d0;
    real *dx = second ? dx1 : dx0, *ds = second ? ds1 : ds0;
    const real *h = second ? h1 : h0, *s = second ? s1 : s0;
    const int across = threadIdx.x % SCALE_COLUMNS, lane = threadIdx.x / SCALE_COLUMNS, c = start + across;
    double sum = 0.0;
    if (c < d) {
        const double factor = exp(static_cast<double>(s[c]));
        for (int64 i = lane; i < n; i += LANES) {
            const double value = h[i * d + c], up = dlogp[i];
            const double g = prior == PRIOR_GAUSSIAN ? -value : -tanh_half(value);
            dx[i * d + c] = static_cast<real>(up * g * factor);
            sum += up * (g * value + 1.0);
        }
    }
    if (!with_ds) return;
    sums[lane][across] = sum;
    column_sums<double, LANES, SCALE_COLUMNS>(sums);
    if (lane == 0 && c < d) ds[c] = static_cast<real>(sums[0][across]);
}

// x = h exp(-s), the inverse of the scaling; x may be h.
KERNEL(scale_inverse)(real* x0, real* x1, const real* h0, const real* h1, const real* __restrict__ s0,
                      const real* __restrict__ s1, int64 n, int d0, int d1) {
    for (int64 t = first_thread(); t < n * (d0 + d1); t += all_threads()) {
        const bool second = t >= n * d0;
        const int64 own = second ? t - n * d0 : t;
        const double log_scale = second ? s1[place(own, d1).column] : s0[place(own, d0).column];
        (second ? x1 : x0)[own] = static_cast<real>((second ? h1 : h0)[own] * exp(-log_scale));
    }
}
