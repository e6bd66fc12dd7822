/* A Metropolis sampler in C that knows a density only as a function pointer: examples/c_metropolis.py hands it a flow. */

#include <math.h>
#include <stdint.h>

typedef double (*log_density)(int n, double *x);

/* xorshift64* (Vigna 2016): a uniform in the open interval (0, 1). */
static double uniform(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return ((double)((*state * 2685821657736338717ULL) >> 12) + 0.5) / 4503599627370496.0;
}

static double normal(uint64_t *state)
{
    double radius = sqrt(-2.0 * log(uniform(state)));
    return radius * cos(6.283185307179586 * uniform(state));
}

/* states (steps, d), of which the first row is where the chain starts. Returns how many proposals were accepted, or -1
 * where the density is not a number: the point is then states' row of index *bad. */
long metropolis(log_density f, int d, long steps, double width, uint64_t seed, double *states, long *bad)
{
    double here = f(d, states);
    long accepted = 0;
    uint64_t state = seed * 2 + 1;

    for (long t = 1; t < steps; t++) {
        double *from = states + (t - 1) * d, *to = states + t * d;
        for (int c = 0; c < d; c++)
            to[c] = from[c] + width * normal(&state);
        double there = f(d, to);
        if (isnan(there) || isnan(here)) {
            *bad = t;
            return -1;
        }
        if (log(uniform(&state)) < there - here) {
            here = there;
            accepted++;
        } else {
            for (int c = 0; c < d; c++)
                to[c] = from[c];
        }
    }
    return accepted;
}
