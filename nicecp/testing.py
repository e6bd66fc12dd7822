"""Gradient checks that users call from their own tests: derivatives and log-determinants against differences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.coupling import apply_law
from nicecp.flow import NICE
from nicecp.preprocessing import apply_steps
from nicecp.presented import past_transforms
from nicecp.records import Parameters
from nicecp.spec import ModelSpec

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

INPUT = "x"  # stands for the data among the names of parameters
RESOLUTION = 200.0  # signal over tolerance: an error of 1 % is then at least twice the tolerance
SINGLE_RTOL = 1e-3  # float32 against float64: far above rounding, far below an error in a formula
SINGLE_MARGIN = 1e-5  # units closer than this to their kink (relative to their layer) may differ between the two
TF32 = 20  # times as much: TF32 rounds the factors of products to 2^-11


@dataclass(frozen=True)
class GradientReport:
    """What check_gradients compared."""

    rows: int
    directions: int  # differences taken: parameters, inputs and random directions, at both sets of parameters
    left_out: int  # (row, direction) pairs beside a ReLU's kink at every step, not compared
    worst: str  # the parameter (or "x") with the largest error
    error: float  # that error as a fraction of what is allowed; at most 1
    log_det_error: float  # |log_det - slogdet of the numerical Jacobian| in nats


@dataclass(frozen=True)
class _Direction:
    """A unit vector in the space of one array: one entry of it (flat index), or all of them at once."""

    name: str
    label: str
    along: int | Floats

    def moved(self, value: Floats, h: float) -> Floats:
        """value + h * this direction; an array of rows moves in every row."""
        out = value.copy()
        if isinstance(self.along, int):
            out.reshape(-1)[self.along] += h
        else:
            out += h * self.along
        return out

    def dot(self, gradient: Floats) -> float:
        """The gradient's component along this direction."""
        if isinstance(self.along, int):
            return float(gradient.reshape(-1)[self.along])
        return float(np.vdot(gradient, self.along))


@dataclass
class _Check:
    """How to check, and what was found."""

    step: float
    rtol: float
    max_checks: int
    rng: np.random.Generator
    directions: int = 0
    left_out: int = 0
    worst: str = ""
    error: float = 0.0


def check_gradients(
    flow: NICE, x: ArrayLike, *, step: float = 1e-5, rtol: float = 1e-8, max_checks: int = 256, seed: int = 0
) -> GradientReport:
    """Check a flow's gradients against central differences of its log_prob, and its log-determinant by slogdet.

    Differences are taken in float64, on copies of the flow: with its own parameters, and with parameters drawn so that
    every array matters (in a fresh flow most gradients are too small for any difference to see). The gradients of a
    float32 flow are compared with those of its float64 copy.

    Parameters
    ----------
    flow : NICE, not changed
    x : (n, d) or (d,), finite
        A few rows of data space; 4 to 16 are plenty.
    step : float
        Of the differences, in the flow's input space (after preprocessing) and for parameters.
    rtol : float
        Allowed error of a directional derivative, as a fraction of the gradient's norm.
    max_checks : int
        Up to so many parameters, each is checked on its own; of more, a seeded sample of every array. Always also along
        each array's gradient and along a random direction of all its entries. Likewise for the inputs.
    seed : int
        Of the sample and of the drawn parameters.

    Raises
    ------
    AssertionError
        A gradient, the log-density or the log-determinant is wrong; names the array, with numbers.
    ValueError
        x is empty or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from nicecp import NICE
    >>> from nicecp.testing import check_gradients
    >>> flow = NICE(4, hidden=(8, 8), n_couplings=3, seed=1)
    >>> report = check_gradients(flow, np.random.default_rng(0).normal(size=(5, 4)))
    >>> report.error <= 1
    True
    """
    if not isinstance(flow, NICE):
        raise TypeError(f"flow must be a NICE, got {flow!r}")
    rows = np.atleast_2d(np.asarray(x, np.float64))
    if rows.ndim != 2 or len(rows) == 0 or not np.isfinite(rows).all():
        raise ValueError(f"x must be at least one row of {flow.n_features} finite numbers, got shape {rows.shape}")
    flow, rows = past_transforms(flow, rows)
    check = _Check(step, rtol, max_checks, np.random.default_rng(seed))
    exact = _in_float64(flow, flow.parameters())
    if flow.spec.dtype == "float32":
        _compare_precisions(flow, exact, rows)
        flow = exact
    _check_point(flow, exact, rows, check, must_resolve=False)
    drawn = _in_float64(flow, _drawn_parameters(flow.spec, apply_steps(flow.preprocessing, rows)[0], check.rng))
    _check_point(drawn, drawn, rows, check, must_resolve=True)
    log_det_error = _check_log_det(drawn, rows[0], step)
    return GradientReport(len(rows), check.directions, check.left_out, check.worst, check.error, log_det_error)


# --- one set of parameters ------------------------


def _check_point(judged: NICE, exact: NICE, x: Floats, check: _Check, must_resolve: bool) -> None:
    """The gradients of ``judged`` against differences of log_prob of its float64 copy ``exact``."""
    log_prob = _check_density(judged, exact, x)
    loss, mean = judged.loss_and_gradients(x)
    _require(abs(loss + float(log_prob.mean())) <= 1e-10 * (1 + abs(loss)), f"the loss {loss} is not -mean(log_prob)")
    dx = np.asarray(judged.grad_log_prob(x))
    for name, gradient in {**mean, INPUT: dx}.items():  # NaN and infinity would pass through the bounds below
        _require(bool(np.isfinite(gradient).all()), f"gradient by {name} is not finite")
    directions = [*_parameter_directions(mean, check), *_input_directions(exact, check)]
    slopes, squares = _slopes(judged, x, dx, directions, mean)
    differences, steps = _differences(exact, x, dx, directions, slopes, check.step)
    usable = steps > 0
    # Rounding in log_prob, a sum of d terms, is what is left of a difference's accuracy when the gradient is tiny.
    rounding = 8 * np.finfo(float).eps * float(np.abs(log_prob).max() + x.shape[1]) / check.step
    check.directions += len(directions)
    check.left_out += int((~usable).sum())
    signal: dict[str, float] = {}
    worst, message = -1.0, ""
    for kind in (False, True):
        chosen = [c for c, direction in enumerate(directions) if (direction.name == INPUT) == kind]
        # The differences join in the norm so that gradients of 0 cannot set the scale.
        seen = float((differences[:, chosen] ** 2).sum(axis=1).mean())
        limit = float(check.rtol * np.sqrt(max(seen, squares[kind])) + rounding)
        for c in (c for c in chosen if usable[:, c].any()):
            rows, name = np.flatnonzero(usable[:, c]), directions[c].name
            found, slope = differences[rows, c], slopes[rows, c]
            # Rounding grows as the step shrinks: a smaller step is allowed more, in proportion.
            miss = np.abs(found - slope) * steps[rows, c] / check.step
            signal[name] = max(signal.get(name, 0.0), _rms(found) / limit)
            error, row = _rms(miss) / limit, int(np.argmax(miss))
            if error > worst:
                worst, said = error, f"{slope[row]:.12g}, but the difference of log_prob is {found[row]:.12g}"
                message = (
                    f"gradient by {directions[c].label}: {said} (row {rows[row]}, {error:.3g} times the tolerance)"
                )
            if error > check.error:
                check.worst, check.error = name, error
    _require(worst <= 1, message)
    for name in {direction.name for direction in directions} if must_resolve else ():
        clear = signal.get(name, 0.0) >= RESOLUTION
        _require(clear, f"gradient by {name} cannot be judged: differences of log_prob hardly depend on it")


def _check_density(judged: NICE, exact: NICE, x: Floats) -> Floats:
    """log_prob must be the prior's log-density of forward(x) plus its log-determinant -> log_prob : (n,)."""
    log_prob = np.asarray(judged.log_prob(x))
    h, log_det = exact.forward(x)
    if exact.spec.prior == "gaussian":
        terms = -(h**2 + np.log(2 * np.pi)) / 2
    else:
        terms = -np.abs(h) - 2 * np.log1p(np.exp(-np.abs(h)))
    expected = terms.sum(axis=1) + log_det
    error = np.abs(log_prob - expected) / (x.shape[1] + np.abs(expected))
    row = int(np.argmax(error))
    message = f"log_prob is {log_prob[row]:.12g}, but the prior at forward(x) and log_det make {expected[row]:.12g}"
    _require(bool(error[row] <= 1e-10), f"{message} (row {row})")
    return log_prob


def _slopes(
    judged: NICE, x: Floats, dx: Floats, directions: list[_Direction], mean: Parameters
) -> tuple[Floats, list[float]]:
    """Directional derivatives of each row's log_prob by the flow's gradients -> (n, c); and the gradients' squared
    norms, mean over rows: of the parameters' and of the inputs'.

    Row by row, so that a row beside a kink can be left out; the mean over rows must then be what the batch gave.
    """
    n = x.shape[0]
    slopes, total = np.empty((n, len(directions))), {name: np.zeros(g.shape) for name, g in mean.items()}
    square = 0.0
    for i in range(n):
        gradients = judged.loss_and_gradients(x[i : i + 1])[1]
        square += sum(float((g**2).sum()) for g in gradients.values()) / n
        for name, gradient in gradients.items():
            total[name] += gradient / n
        for c, direction in enumerate(directions):
            slopes[i, c] = direction.dot(dx[i] if direction.name == INPUT else -gradients[direction.name])
    for name, gradient in mean.items():
        gap = float(np.linalg.norm(gradient - total[name]))
        _require(gap**2 <= 1e-20 * square, f"gradient by {name} is not the mean of the rows' (off by {gap:.3g})")
    inputs = [c for c, direction in enumerate(directions) if direction.name == INPUT]
    share = x.shape[1] / len(inputs)  # of a sample of the inputs
    return slopes, [square, float((slopes[:, inputs] ** 2).sum(axis=1).mean()) * max(1, share)]


def _differences(
    exact: NICE, x: Floats, dx: Floats, directions: list[_Direction], slopes: Floats, step: float
) -> tuple[Floats, Floats]:
    """Fourth-order central differences of each row's log_prob along each direction : (n, c), and their steps, 0 for
    rows left out. Slopes by the inputs are written anew, along the steps as they were rounded in data space.

    With ReLUs log_prob is smooth only as long as the same units are on. Where they are at p, p +- h and p +- 2h, all
    five points lie on one smooth function, whose derivative at p is the flow's: the difference is right to O(h^4)
    whatever happens in between. Where they are not, it says nothing about the derivative, and the row is tried again
    with a tenth of the step. That depends on the units alone, never on how well gradients and differences agree.
    """
    parameters, z = exact.parameters(), apply_steps(exact.preprocessing, x)[0]
    on = _units_on(exact.spec, parameters, z)
    out, steps = np.zeros((x.shape[0], len(directions))), np.zeros((x.shape[0], len(directions)))
    moved = _in_float64(exact, parameters)
    for c, direction in enumerate(directions):
        todo = np.ones(x.shape[0], bool)
        for h in (step, step / 10, step / 100):
            use, difference, slope = todo.copy(), np.zeros(x.shape[0]), np.zeros(x.shape[0])
            for weight, multiple in ((8, 1), (-8, -1), (-1, 2), (1, -2)):
                at, values = x, parameters
                if direction.name == INPUT:
                    at = direction.moved(x, multiple * h)
                else:
                    values = {**parameters, direction.name: direction.moved(parameters[direction.name], multiple * h)}
                    moved.set_parameters(values)
                use &= (_units_on(exact.spec, values, apply_steps(exact.preprocessing, at)[0]) == on).all(axis=1)
                difference += weight * np.asarray(moved.log_prob(at)) / (12 * h)
                slope += weight * ((at - x) * dx).sum(axis=1) / (12 * h)
            out[use, c], steps[use, c] = difference[use], h
            if direction.name == INPUT:
                slopes[use, c] = slope[use]
            todo &= ~use
            if not todo.any():
                break
        moved.set_parameters(parameters)
    return out, steps


def _parameter_directions(gradients: Parameters, check: _Check) -> Iterator[_Direction]:
    """Entries (all, or the same share of every array), each array's own gradient, and a random direction of each."""
    everything = sum(g.size for g in gradients.values()) <= check.max_checks
    share = max(1, check.max_checks // len(gradients))
    for name, gradient in gradients.items():
        count = gradient.size if everything else min(share, gradient.size)
        for entry in np.sort(check.rng.choice(gradient.size, count, replace=False)):
            index = ", ".join(str(int(i)) for i in np.unravel_index(entry, gradient.shape))
            yield _Direction(name, f"{name}[{index}]", int(entry))
        size = float(np.linalg.norm(gradient))
        if size > 0:
            yield _Direction(name, f"{name} along its gradient", gradient / size)
        random = check.rng.standard_normal(gradient.shape)
        yield _Direction(name, f"{name} along a random direction", random / np.linalg.norm(random))


def _input_directions(exact: NICE, check: _Check) -> Iterator[_Direction]:
    """Unit vectors of the flow's input space, as they look in data space: columns of data may differ in scale."""
    d = exact.n_features
    for entry in np.sort(check.rng.choice(d, min(d, check.max_checks), replace=False)):
        unit = np.where(np.arange(d) == entry, 1.0, 0.0)
        yield _Direction(INPUT, f"{INPUT}[{entry}]", _from_inputs(exact, unit))
    random = check.rng.standard_normal(d)
    yield _Direction(INPUT, f"{INPUT} along a random direction", _from_inputs(exact, random / np.linalg.norm(random)))


# --- float32, log-determinant ------------------------


def _compare_precisions(flow: NICE, exact: NICE, x: Floats) -> None:
    """A float32 flow's gradients against its float64 copy's, on rows where rounding cannot switch a unit."""
    looser = TF32 if flow.spec.precision == "tf32" else 1
    rtol, clear = looser * SINGLE_RTOL, (500 if looser > 1 else 1) * SINGLE_MARGIN
    margin = _margins(exact.spec, exact.parameters(), apply_steps(exact.preprocessing, x)[0])
    rows = x[margin > clear] if (margin > clear).any() else x[[int(np.argmax(margin))]]
    pairs = {INPUT: (flow.grad_log_prob(rows), exact.grad_log_prob(rows))}
    single, double = flow.loss_and_gradients(rows)[1], exact.loss_and_gradients(rows)[1]
    pairs |= {name: (single[name], double[name]) for name in double}
    floor = 1e-6 * float(np.sqrt(sum(np.linalg.norm(g) ** 2 for g in double.values())))
    gap = np.abs(flow.log_prob(rows) - exact.log_prob(rows)) / (flow.n_features + np.abs(exact.log_prob(rows)))
    _require(bool((gap <= rtol).all()), f"log_prob in float32 differs from float64 by {gap.max():.3g} relative")
    for name, (got, expected) in pairs.items():
        miss, size = float(np.linalg.norm(got - expected)), float(np.linalg.norm(expected))
        close = miss <= rtol * size + looser * floor
        _require(close, f"gradient by {name} in float32 is {miss:.3g} off that in float64, whose norm is {size:.3g}")


def _check_log_det(exact: NICE, row: Floats, step: float) -> float:
    """log_det of a row clear of all kinks against slogdet of its Jacobian by differences -> the error in nats."""
    d = exact.n_features
    basis = _from_inputs(exact, np.eye(d))  # (d, d): unit vectors of input space in data space
    jacobian = np.empty((d, d))
    for start in range(0, d, 512):
        part = step * basis[start : start + 512]
        jacobian[start : start + 512] = (exact.forward(row + part)[0] - exact.forward(row - part)[0]) / (2 * step)
    expected = float(np.linalg.slogdet(jacobian)[1] - np.linalg.slogdet(basis)[1])
    log_det = float(exact.forward(row)[1])
    error = abs(log_det - expected)
    _require(error <= 1e-5 * d, f"log_det is {log_det:.9g}, but slogdet of the numerical Jacobian is {expected:.9g}")
    return error


# --- the flow seen from outside ------------------------


def _rms(values: Floats) -> float:
    return float(np.sqrt((values**2).mean()))


def _require(condition: bool, message: str) -> None:
    if not condition:  # an assertion that python -O keeps
        raise AssertionError(message)


def _in_float64(flow: NICE, parameters: Parameters) -> NICE:
    double = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    spec = replace(flow.spec, dtype="float64", precision="full")
    return type(flow).from_spec(spec, double, flow.preprocessing, flow.info, backend=flow.backend)


def _from_inputs(flow: NICE, vectors: Floats) -> Floats:
    """Vectors (differences, not points) of input space in data space; preprocessing is affine."""
    moved, origin = vectors, np.zeros_like(vectors)
    for step in reversed(flow.preprocessing):
        moved, origin = step.inverse(moved), step.inverse(origin)
    return moved - origin


def _hidden(spec: ModelSpec, parameters: Parameters, z: Floats) -> Iterator[tuple[str, Floats]]:
    """Every hidden layer's name and values before the ReLU : (n, h)."""
    parts = [z[:, columns] for columns in spec.columns]
    for k, coupling in enumerate(spec.couplings):
        y = parts[coupling.conditions_on]
        for j in range(len(coupling.hidden) + 1):
            name = f"couplings/{k}/layers/{j}"
            weight, bias = parameters[f"{name}/weight"], parameters[f"{name}/bias"]
            product = y @ weight
            y = product + bias
            if j < len(coupling.hidden):
                yield name, y
                y = np.maximum(product + bias, 0)  # again: the reader may have written the bias
        parts[coupling.transforms] = apply_law(coupling.law, parts[coupling.transforms], y)


def _units_on(spec: ModelSpec, parameters: Parameters, z: Floats) -> Bools:
    """(n, all hidden units): which ReLUs are on."""
    layers = [y > 0 for _, y in _hidden(spec, parameters, z)]
    return np.concatenate([*layers, np.ones((len(z), 1), bool)], axis=1)


def _margins(spec: ModelSpec, parameters: Parameters, z: Floats) -> Floats:
    """(n,): distance of each row's nearest unit from its kink, relative to its layer; 0 exactly is 0 in any dtype."""
    margin = np.full(len(z), np.inf)
    for _, y in _hidden(spec, parameters, z):
        distance = np.abs(y) / max(_rms(y), np.finfo(float).tiny)
        margin = np.minimum(margin, np.where(y == 0, np.inf, distance).min(axis=1))
    return margin


def _drawn_parameters(spec: ModelSpec, z: Floats, rng: np.random.Generator) -> Parameters:
    """Parameters for which every array has a gradient that differences can see and a ReLU mask matters.

    Weights as He et al. 2015 (2 / fan_in), the last layer's smaller so that the Jacobian is well conditioned. Biases
    put every second unit of each layer on and the others off in the first row, all clear of the kink.
    """
    parameters: Parameters = {}
    for name, shape in spec.parameter_shapes().items():
        parameters[name] = rng.standard_normal(shape) * (np.sqrt(2 / shape[0]) if name.endswith("weight") else 0.1)
    for k, coupling in enumerate(spec.couplings):
        parameters[f"couplings/{k}/layers/{len(coupling.hidden)}/weight"] *= 0.5
    parameters["scaling/log_scale"] = rng.uniform(0.1, 0.5, spec.n_features)
    for name, y in _hidden(spec, parameters, z[:1]):
        sign = np.where(np.arange(y.shape[1]) % 2 == 0, 1, -1)
        target = sign * (0.3 + np.abs(rng.standard_normal(y.shape[1])))
        parameters[f"{name}/bias"] += target - y[0]
    return parameters
