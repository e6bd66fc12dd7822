// Optimisers on a range of the flat buffers: 28 bytes a parameter in float32, read and written 16 at a time.

// What update_coefficients (cuda_state.cu) computed once for all parameters of a step.
struct Rule {
    real b1, one_b1, b2, one_b2, rate, root, epsilon;
};

INLINE Rule rule_of(const double* coefficients) {
    return {static_cast<real>(coefficients[0]), static_cast<real>(coefficients[1]), static_cast<real>(coefficients[2]),
            static_cast<real>(coefficients[3]), static_cast<real>(coefficients[4]), static_cast<real>(coefficients[5]),
            static_cast<real>(coefficients[6])};
}

// Moments of units that stay silent decay into denormal numbers: 0, on every device.
INLINE real flushed(real value) {
    const real tiny = sizeof(real) == 4 ? real(1.17549435082228750797e-38) : real(2.2250738585072014e-308);
    return value < tiny && value > -tiny ? real(0) : value;
}

INLINE bool is_finite(real g) {
    const real largest = sizeof(real) == 4 ? real(3.40282346638528859812e+38) : real(1.7976931348623157e+308);
    return g <= largest && g >= -largest;
}

// Kingma & Ba 2014, first version; see Backend.update.
INLINE void adam(const Rule& rule, real& p, real g, real& m, real& v) {
    m = flushed(rule.b1 * m + rule.one_b1 * g);
    v = flushed(rule.b2 * v + rule.one_b2 * g * g);
    p -= rule.rate * m / (sqrt(v) * rule.root + rule.epsilon);
}

// The published code of Dinh et al.: velocity m, mean square v, root mean square with a floor.
INLINE void rmsprop(const Rule& rule, real& p, real g, real& m, real& v) {
    v = flushed(rule.b2 * v + rule.one_b2 * g * g);
    const real root = sqrt(v);
    m = flushed(rule.b1 * m - rule.rate * g / (root > rule.epsilon ? root : rule.epsilon));
    p += m;
}

// N elements -> whether all gradients are finite; where one is not, its parameter stays as it is.
template <int OPTIMIZER, int N>
INLINE bool update_pack(const Rule& rule, real* p, const real* g, real* m, real* v) {
    Pack<N> parameter = load<N>(p), first = load<N>(m), second = load<N>(v);
    const Pack<N> gradient = load<N>(g);
    bool fine = true;
    for (int k = 0; k < N; ++k) {
        if (!is_finite(gradient.at[k])) {
            fine = false;
            continue;
        }
        if (OPTIMIZER == OPTIMIZER_ADAM) adam(rule, parameter.at[k], gradient.at[k], first.at[k], second.at[k]);
        else rmsprop(rule, parameter.at[k], gradient.at[k], first.at[k], second.at[k]);
    }
    store<N>(p, parameter);
    store<N>(m, first);
    store<N>(v, second);
    return fine;
}

template <int OPTIMIZER>
INLINE void update_range(real* p, const real* g, real* m, real* v, const double* coefficients, double* state,
                         int64 offset, int64 size) {
    if (coefficients[7] != 0.0) return;  // this step is skipped
    const Rule rule = rule_of(coefficients);
    p += offset, g += offset, m += offset, v += offset;
    const bool packed = aligned(p) && aligned(g) && aligned(m) && aligned(v);
    const int64 packs = packed ? size / WIDTH : 0;
    bool fine = true;
    for (int64 t = first_thread(); t < packs; t += all_threads()) {
        const int64 at = t * WIDTH;
        if (!update_pack<OPTIMIZER, WIDTH>(rule, p + at, g + at, m + at, v + at)) fine = false;
    }
    for (int64 at = packs * WIDTH + first_thread(); at < size; at += all_threads())
        if (!update_pack<OPTIMIZER, 1>(rule, p + at, g + at, m + at, v + at)) fine = false;
    if (!fine) state[SLOT_BAD_GRADIENT] = 1.0;  // whoever writes it writes the same
}

// p, m, v : [offset, offset + size) from g; coefficients : (8,). state : BAD_GRADIENT is written.
KERNEL(update_adam)(real* __restrict__ p, const real* __restrict__ g, real* __restrict__ m, real* __restrict__ v,
                    const double* __restrict__ coefficients, double* __restrict__ state, int64 offset, int64 size) {
    update_range<OPTIMIZER_ADAM>(p, g, m, v, coefficients, state, offset, size);
}

KERNEL(update_rmsprop)(real* __restrict__ p, const real* __restrict__ g, real* __restrict__ m, real* __restrict__ v,
                       const double* __restrict__ coefficients, double* __restrict__ state, int64 offset, int64 size) {
    update_range<OPTIMIZER_RMSPROP>(p, g, m, v, coefficients, state, offset, size);
}
