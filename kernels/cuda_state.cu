// Numbers of a step that are float64 for every flow: loss, step counter, rate. Compiled for REAL = double alone.

// state[LOSS] = -sum(w logp) / sum(w), dlogp = -w / sum(w), all (n,); rows of weight 0 are not read. One block.
KERNEL(loss)(double* __restrict__ state, double* __restrict__ dlogp, const double* __restrict__ logp,
             const double* __restrict__ weight, int64 n) {
    double total = 0.0, weights = 0.0;
    for (int64 i = threadIdx.x; i < n; i += THREADS) {
        const double w = weight[i];
        if (w != 0.0) {
            total += w * logp[i];
            weights += w;
        }
    }
    total = row_sum(total);
    weights = row_sum(weights);
    const double value = -total / weights;
    const bool skip = !isfinite(value);
    for (int64 i = threadIdx.x; i < n; i += THREADS) dlogp[i] = skip ? 0.0 : -weight[i] / weights;
    if (threadIdx.x != 0) return;
    state[SLOT_LOSS] = value;
    state[SLOT_LOSS_RING + static_cast<int64>(state[SLOT_CURSOR]) % SLOT_RING_SIZE] = value;
    state[SLOT_SKIP] = skip ? 1.0 : 0.0;
    if (skip) return;
    state[SLOT_LOG_PROB_SUM] += total;
    state[SLOT_WEIGHT_SUM] += weights;
}

// What update_adam and update_rmsprop need, once for all parameters: powers of float64 cost more than an update. One
// thread. out : (8,) b1, 1 - b1, b2, 1 - b2, rate, root, epsilon, skip.
KERNEL(update_coefficients)(double* __restrict__ out, const double* __restrict__ state, int optimizer) {
    double momentum = state[SLOT_MOMENTUM], rate = state[SLOT_RATE], root = 1.0;
    const double decay = state[SLOT_SQUARE_DECAY];
    if (optimizer == OPTIMIZER_ADAM) {
        const double t = state[SLOT_STEP] + 1.0;
        rate /= 1.0 - pow(momentum, t);
        root = 1.0 / sqrt(1.0 - pow(decay, t));
        momentum *= pow(state[SLOT_LAMBDA], t - 1.0);
    }
    out[0] = momentum;
    out[1] = 1.0 - momentum;
    out[2] = decay;
    out[3] = 1.0 - decay;
    out[4] = rate;
    out[5] = root;
    out[6] = state[SLOT_EPSILON];
    out[7] = state[SLOT_SKIP];
}

// End of a step: Backend.advance. One thread.
KERNEL(advance)(double* state) {
    const int64 cursor = static_cast<int64>(state[SLOT_CURSOR]);
    if (state[SLOT_BAD_GRADIENT] != 0.0) {
        state[SLOT_BAD_GRADIENT] = 0.0;
        state[SLOT_SKIPPED] += 1.0;
        state[SLOT_LOSS_RING + cursor % SLOT_RING_SIZE] = nan("");
    }
    state[SLOT_CURSOR] += 1.0;
    if (state[SLOT_SKIP] != 0.0) {
        state[SLOT_SKIPPED] += 1.0;
        return;
    }
    state[SLOT_STEP] += 1.0;
    const double rate = state[SLOT_RATE];
    state[SLOT_RATE] = fmax(rate / state[SLOT_RATE_DECAY], fmin(rate, state[SLOT_RATE_FLOOR]));
}

// out : (n,) += x.
KERNEL(accumulate)(double* __restrict__ out, const double* __restrict__ x, int64 n) {
    for (int64 t = first_thread(); t < n; t += all_threads()) out[t] += x[t];
}
