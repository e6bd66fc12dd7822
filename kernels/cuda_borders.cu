// Rows of data <-> the two halves, and what else belongs to a batch's rows. Legend: n rows, d features, d0 of them in
// part 0, the columns order[0..d0) of the data; part 1 are the columns order[d0..d).

constexpr int GROUP = 4;  // columns of a part for one thread: neighbours mostly share a block of random numbers

INLINE double value_of(double value, double shift, double scale, const Words&, int) { return (value - shift) * scale; }
INLINE double value_of(float value, double shift, double scale, const Words&, int) { return (value - shift) * scale; }

// (65536 k + bits) / 2^24 is exact; the product and the sum are rounded one by one, as on the CPU.
INLINE double value_of(unsigned char value, double shift, double scale, const Words& words, int column) {
    uint32 fixed = value * 65536u + half_word(words, column);
    return __dadd_rn(shift, __dmul_rn(scale, fixed * 0x1p-24));
}

// x0 : (n, d0), x1 : (n, d - d0), weight : (n,) <- rows index[cursor * n + i] of data : (m, d), noise keyed by rows[...].
// Negative: padding, 0 with weight 0; so is a batch beyond the index. An index beyond the data is NaN, not a crash.
template <typename Data>
INLINE void load_rows(real* __restrict__ x0, real* __restrict__ x1, double* __restrict__ weight,
                      const Data* __restrict__ data, const int64* __restrict__ index, const int64* __restrict__ rows,
                      const int64* __restrict__ order, const double* __restrict__ shift,
                      const double* __restrict__ scale, const double* __restrict__ state, uint64 seed, uint32 purpose,
                      int64 n, int d, int d0, int64 m, int64 given) {
    const int groups0 = (d0 + GROUP - 1) / GROUP, groups = groups0 + (d - d0 + GROUP - 1) / GROUP;
    const int64 first = static_cast<int64>(state[SLOT_CURSOR]) * n;
    const bool known = first >= 0 && first + n <= given;
    const uint32 epoch = static_cast<uint32>(state[SLOT_EPOCH]);
    for (int64 t = first_thread(); t < n * groups; t += all_threads()) {
        const Place at = place(t, groups);
        const int64 source = known ? index[first + at.row] : -1;
        if (at.column == 0) weight[at.row] = source < 0 ? 0.0 : 1.0;
        const bool second = at.column >= groups0;
        const int start = (second ? at.column - groups0 : at.column) * GROUP, size = second ? d - d0 : d0;
        real* out = (second ? x1 : x0) + at.row * size;
        const uint64 row = source < 0 ? 0 : rows[first + at.row];
        Words words = {};
        int block = -1;
        for (int c = start; c < size && c < start + GROUP; ++c) {
            if (source < 0) {
                out[c] = 0;
                continue;
            }
            const int column = static_cast<int>(order[second ? d0 + c : c]);
            if (sizeof(Data) == 1 && column / 8 != block) {
                block = column / 8;
                words = philox(block, row, epoch, purpose, seed);
            }
            double value = nan("");
            if (source < m) value = value_of(data[source * d + column], shift[column], scale[column], words, column);
            out[c] = static_cast<real>(value);
        }
    }
}

#define LOAD(name, Data)                                                                                              \
    KERNEL(name)(real* x0, real* x1, double* weight, const Data* data, const int64* index, const int64* rows,         \
                 const int64* order, const double* shift, const double* scale, const double* state, uint64 seed,      \
                 uint32 purpose, int64 n, int d, int d0, int64 m, int64 given) {                                      \
        load_rows(x0, x1, weight, data, index, rows, order, shift, scale, state, seed, purpose, n, d, d0, m, given);  \
    }

LOAD(load_bytes, unsigned char)
LOAD(load_floats, float)
LOAD(load_doubles, double)

// x : (n, d) -> x0 : (n, d0), x1 : (n, d - d0).
KERNEL(split)(real* __restrict__ x0, real* __restrict__ x1, const real* __restrict__ x, const int64* __restrict__ order,
              int64 n, int d, int d0) {
    for (int64 t = first_thread(); t < n * d; t += all_threads()) {
        const Place at = place(t, d);
        const real value = x[at.row * d + order[at.column]];
        if (at.column < d0) x0[at.row * d0 + at.column] = value;
        else x1[at.row * (d - d0) + at.column - d0] = value;
    }
}

// x0 : (n, d0), x1 : (n, d - d0) -> x : (n, d).
KERNEL(join)(real* __restrict__ x, const real* __restrict__ x0, const real* __restrict__ x1,
             const int64* __restrict__ order, int64 n, int d, int d0) {
    for (int64 t = first_thread(); t < n * d; t += all_threads()) {
        const Place at = place(t, d);
        const bool first = at.column < d0;
        x[at.row * d + order[at.column]] = first ? x0[at.row * d0 + at.column] : x1[at.row * (d - d0) + at.column - d0];
    }
}

// y0 : (n, d0), y1 : (n, d - d0), column c of both side by side <- column index[c] of x0 : (n, d0), x1 : (n, d - d0).
KERNEL(permute)(real* __restrict__ y0, real* __restrict__ y1, const real* __restrict__ x0, const real* __restrict__ x1,
                const int64* __restrict__ index, int64 n, int d, int d0) {
    for (int64 t = first_thread(); t < n * d; t += all_threads()) {
        const Place at = place(t, d);
        const int64 from = index[at.column];
        const real value = from < d0 ? x0[at.row * d0 + from] : x1[at.row * (d - d0) + from - d0];
        if (at.column < d0) y0[at.row * d0 + at.column] = value;
        else y1[at.row * (d - d0) + at.column - d0] = value;
    }
}

// out : (n, k) = source[index[cursor * n + i]] of (m, k), 0 where that is negative; NaN beyond the source.
template <typename Source>
INLINE void gather_rows(real* __restrict__ out, const Source* __restrict__ source, const int64* __restrict__ index,
                        const double* __restrict__ state, int64 n, int k, int64 m, int64 given) {
    const int64 first = static_cast<int64>(state[SLOT_CURSOR]) * n;
    const bool known = first >= 0 && first + n <= given;
    for (int64 t = first_thread(); t < n * k; t += all_threads()) {
        const Place at = place(t, k);
        const int64 from = known ? index[first + at.row] : -1;
        real value = 0;
        if (from >= 0) value = from < m ? static_cast<real>(source[from * k + at.column]) : static_cast<real>(nan(""));
        out[t] = value;
    }
}

#define GATHER(name, Source)                                                                                      \
    KERNEL(name)(real* out, const Source* source, const int64* index, const double* state, int64 n, int k,        \
                 int64 m, int64 given) {                                                                          \
        gather_rows(out, source, index, state, n, k, m, given);                                                   \
    }

GATHER(gather_floats, float)
GATHER(gather_doubles, double)

// out[:, out_start : out_start + count] = x[:, x_start : x_start + count], out : (n, out_width), x : (n, x_width).
KERNEL(copy_columns)(real* __restrict__ out, const real* __restrict__ x, int64 n, int out_width, int out_start,
                     int x_width, int x_start, int count) {
    for (int64 t = first_thread(); t < n * count; t += all_threads()) {
        const Place at = place(t, count);
        out[at.row * out_width + out_start + at.column] = x[at.row * x_width + x_start + at.column];
    }
}

// z : (n, k) = log(p) - log(1 - p), p = margin + (1 - 2 margin) (x - shift) scale, in float64; z may be x.
// log_det : (n,) = (first) or += -sum over columns of log p + log(1 - p), each row's own part of log |dz / dx|.
KERNEL(logit_forward)(real* z, double* __restrict__ log_det, const real* x, const double* __restrict__ shift,
                      const double* __restrict__ scale, double margin, int64 n, int k, int first) {
    const double width = 1.0 - 2.0 * margin;
    for (int64 i = first_row(); i < n; i += all_rows()) {
        double total = 0.0;
        for (int c = threadIdx.x; c < k; c += blockDim.x) {
            const double p = margin + width * ((x[i * k + c] - shift[c]) * scale[c]);
            const double up = log(p), down = log1p(-p);
            z[i * k + c] = static_cast<real>(up - down);
            total -= up + down;
        }
        total = row_sum(total);
        if (threadIdx.x == 0) log_det[i] = first ? total : log_det[i] + total;
    }
}
