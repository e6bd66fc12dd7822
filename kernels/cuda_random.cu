// Random numbers into arrays : (n, k), row i of the array being row first_row + i: see kernels/backend.py for the counter.

// 16 bits * 2^-16, a thread for a block of eight columns.
KERNEL(fill_uniform)(real* __restrict__ out, int64 n, int k, uint64 seed, uint32 purpose, uint32 epoch, int64 first_row) {
    const int blocks = (k + 7) / 8;
    for (int64 t = first_thread(); t < n * blocks; t += all_threads()) {
        const Place at = place(t, blocks);
        const Words words = philox(at.column, first_row + at.row, epoch, purpose, seed);
        for (int c = at.column * 8; c < k && c < at.column * 8 + 8; ++c)
            out[at.row * k + c] = static_cast<real>(half_word(words, c) * 0x1p-16);
    }
}

// Two numbers of a block of two columns, from the open uniforms u and v.
INLINE void normal(double u, double v, double* pair) {
    const double radius = sqrt(-2.0 * log(u));
    double sine, cosine;
    sincospi(2.0 * v, &sine, &cosine);  // of 2 pi v, without the large arguments that sin and cos must be ready for
    pair[0] = radius * cosine;
    pair[1] = radius * sine;
}

INLINE void logistic(double u, double v, double* pair) {
    pair[0] = log(u / (1.0 - u));
    pair[1] = log(v / (1.0 - v));
}

template <typename Pair>
INLINE void fill_pairs(real* out, int64 n, int k, uint64 seed, uint32 purpose, uint32 epoch, int64 first_row, Pair pair) {
    const int blocks = (k + 1) / 2;
    for (int64 t = first_thread(); t < n * blocks; t += all_threads()) {
        const Place at = place(t, blocks);
        const Words words = philox(at.column, first_row + at.row, epoch, purpose, seed);
        double numbers[2];
        pair(open_uniform(words.at[0], words.at[1]), open_uniform(words.at[2], words.at[3]), numbers);
        real* to = out + at.row * k + 2 * at.column;
        to[0] = static_cast<real>(numbers[0]);
        if (2 * at.column + 1 < k) to[1] = static_cast<real>(numbers[1]);
    }
}

// Standard normal, Box-Muller in float64.
KERNEL(fill_normal)(real* __restrict__ out, int64 n, int k, uint64 seed, uint32 purpose, uint32 epoch, int64 first_row) {
    fill_pairs(out, n, k, seed, purpose, epoch, first_row,
               [](double u, double v, double* pair) { normal(u, v, pair); });
}

// Standard logistic, log(u / (1 - u)) in float64.
KERNEL(fill_logistic)(real* __restrict__ out, int64 n, int k, uint64 seed, uint32 purpose, uint32 epoch,
                      int64 first_row) {
    fill_pairs(out, n, k, seed, purpose, epoch, first_row,
               [](double u, double v, double* pair) { logistic(u, v, pair); });
}
