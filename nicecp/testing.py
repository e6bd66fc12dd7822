"""Gradient checks that users call from their own tests: derivatives and log-determinants against differences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nicecp.flow import NICE
from nicecp.kinks import drawn_parameters, margins, rms, units_on
from nicecp.preprocessing import apply_steps, undo_steps
from nicecp.presented import past_transforms
from nicecp.records import Parameters
from nicecp.spec import ModelSpec

Floats = NDArray[np.float64]

INPUT = "x"  # stands for the data among the names of parameters
ROWS = 6  # drawn where none are given
RESOLUTION = 200.0  # signal over tolerance: an error of 1 % is then at least twice the tolerance
SINGLE_RTOL = 1e-3  # float32 against float64: far above rounding, far below an error in a formula
SINGLE_MARGIN = 1e-5  # units closer than this to their kink (relative to their layer) may differ between the two


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
    """A unit vector in the space of one array: one entry of it (flat index), or all of them at once.

    For the data it is one of the flow's input space, ``unit`` : (d,), and ``along`` is how it looks in data space:
    (d,), or (n, d) where it looks different in every row.
    """

    name: str
    label: str
    along: int | Floats
    unit: Floats | None = None

    def moved(self, value: Floats, h: float) -> Floats:
        """value + h * this direction; an array of rows moves in every row."""
        out = value.copy()
        if isinstance(self.along, int):
            out.reshape(-1)[self.along] += h
        else:
            out += h * self.along
        return out

    def dot(self, gradient: Floats, row: int = 0) -> float:
        """The gradient's component along this direction; for the data that of one row."""
        if self.unit is not None and not isinstance(self.along, int) and self.along.ndim == 2:
            return float(np.vdot(gradient, self.along[row]))
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
    flow: NICE | ModelSpec,
    x: ArrayLike | None = None,
    *,
    step: float = 1e-5,
    rtol: float = 1e-8,
    max_checks: int = 256,
    seed: int = 0,
) -> GradientReport:
    """Check a flow's gradients against central differences of its log_prob, its log-determinant, and its inverse.

    Differences are taken in float64, on copies of the flow: with its own parameters, and with parameters drawn so that
    every array matters (in a fresh flow most gradients are too small for any difference to see). The gradients of a
    float32 flow are compared with those of its float64 copy.

    Parameters
    ----------
    flow : NICE, not changed, or a ModelSpec, of which a fresh flow is made
        With couplings and networks of one's own (nicecp.registry) it is their functions that are checked.
    x : (n, d) or (d,), finite
        A few rows of data space; 4 to 16 are plenty. By default six drawn from a normal distribution.
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
    if isinstance(flow, ModelSpec):
        flow = NICE.from_spec(flow, seed=seed)
    if not isinstance(flow, NICE):
        raise TypeError(f"flow must be a NICE or a ModelSpec, got {flow!r}")
    x = np.random.default_rng(seed).standard_normal((ROWS, flow.n_features)) if x is None else x
    rows = np.atleast_2d(np.asarray(x, np.float64))
    if rows.ndim != 2 or len(rows) == 0 or not np.isfinite(rows).all():
        raise ValueError(f"x must be at least one row of {flow.n_features} finite numbers, got shape {rows.shape}")
    flow, rows = past_transforms(flow, rows)
    check = _Check(step, rtol, max_checks, np.random.default_rng(seed))
    with np.errstate(invalid="ignore", divide="ignore"):
        if not np.isfinite(_to_inputs(flow, rows)).all():
            raise ValueError("x must lie where the flow's preprocessing has finite values")
    exact = _in_float64(flow, flow.parameters())
    if flow.spec.dtype == "float32":
        _compare_precisions(flow, exact, rows)
        flow = exact
    _check_point(flow, exact, rows, check, must_resolve=False)
    drawn = _in_float64(flow, drawn_parameters(flow.spec, _to_inputs(flow, rows), check.rng))
    _check_point(drawn, drawn, rows, check, must_resolve=True)
    log_det_error = _check_log_det(drawn, rows[0], step)
    _check_inverse(drawn, rows)
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
    directions = [*_parameter_directions(mean, check), *_input_directions(exact, x, check)]
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
            signal[name] = max(signal.get(name, 0.0), rms(found) / limit)
            error, row = rms(miss) / limit, int(np.argmax(miss))
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
            slopes[i, c] = direction.dot(dx[i] if direction.name == INPUT else -gradients[direction.name], i)
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
    parameters, z = exact.parameters(), _to_inputs(exact, x)
    on = units_on(exact.spec, parameters, z)
    out, steps = np.zeros((x.shape[0], len(directions))), np.zeros((x.shape[0], len(directions)))
    moved = _in_float64(exact, parameters)
    for c, direction in enumerate(directions):
        todo = np.ones(x.shape[0], bool)
        for h in (step, step / 10, step / 100):
            use, difference, slope = todo.copy(), np.zeros(x.shape[0]), np.zeros(x.shape[0])
            for weight, multiple in ((8, 1), (-8, -1), (-1, 2), (1, -2)):
                at, values = x, parameters
                if direction.unit is not None:
                    at = _moved_inputs(exact, x, z, direction, multiple * h)
                else:
                    values = {**parameters, direction.name: direction.moved(parameters[direction.name], multiple * h)}
                    moved.set_parameters(values)
                use &= (units_on(exact.spec, values, _to_inputs(exact, at)) == on).all(axis=1)
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


def _input_directions(exact: NICE, x: Floats, check: _Check) -> Iterator[_Direction]:
    """Unit vectors of the flow's input space, as they look in data space: columns of data may differ in scale."""
    d = exact.n_features
    for entry in np.sort(check.rng.choice(d, min(d, check.max_checks), replace=False)):
        unit = np.where(np.arange(d) == entry, 1.0, 0.0)
        yield _Direction(INPUT, f"{INPUT}[{entry}]", _from_inputs(exact, unit, x), unit)
    random = check.rng.standard_normal(d)
    random /= np.linalg.norm(random)
    yield _Direction(INPUT, f"{INPUT} along a random direction", _from_inputs(exact, random, x), random)


# --- float32, log-determinant ------------------------


def _compare_precisions(flow: NICE, exact: NICE, x: Floats) -> None:
    """A float32 flow's gradients against its float64 copy's, on rows where rounding cannot switch a unit."""
    margin = margins(exact.spec, exact.parameters(), _to_inputs(exact, x))
    rows = x[margin > SINGLE_MARGIN] if (margin > SINGLE_MARGIN).any() else x[[int(np.argmax(margin))]]
    pairs = {INPUT: (flow.grad_log_prob(rows), exact.grad_log_prob(rows))}
    single, double = flow.loss_and_gradients(rows)[1], exact.loss_and_gradients(rows)[1]
    pairs |= {name: (single[name], double[name]) for name in double}
    floor = 1e-6 * float(np.sqrt(sum(np.linalg.norm(g) ** 2 for g in double.values())))
    gap = np.abs(flow.log_prob(rows) - exact.log_prob(rows)) / (flow.n_features + np.abs(exact.log_prob(rows)))
    _require(bool((gap <= SINGLE_RTOL).all()), f"log_prob in float32 differs from float64 by {gap.max():.3g} relative")
    for name, (got, expected) in pairs.items():
        miss, size = float(np.linalg.norm(got - expected)), float(np.linalg.norm(expected))
        close = miss <= SINGLE_RTOL * size + floor
        _require(close, f"gradient by {name} in float32 is {miss:.3g} off that in float64, whose norm is {size:.3g}")


def _check_log_det(exact: NICE, row: Floats, step: float) -> float:
    """log_det of a row clear of all kinks against slogdet of its Jacobian by differences -> the error in nats."""
    d = exact.n_features
    basis = _from_inputs(exact, np.eye(d), row[None])  # (d, d): unit vectors of input space in data space
    jacobian = np.empty((d, d))
    for start in range(0, d, 512):
        part = step * basis[start : start + 512]
        jacobian[start : start + 512] = (exact.forward(row + part)[0] - exact.forward(row - part)[0]) / (2 * step)
    expected = float(np.linalg.slogdet(jacobian)[1] - np.linalg.slogdet(basis)[1])
    log_det = float(exact.forward(row)[1])
    error = abs(log_det - expected)
    _require(error <= 1e-5 * d, f"log_det is {log_det:.9g}, but slogdet of the numerical Jacobian is {expected:.9g}")
    return error


def _check_inverse(exact: NICE, x: Floats) -> None:
    """inverse must undo forward, and have the opposite log-determinant."""
    h, log_det = exact.forward(x)
    back, opposite = exact.inverse(h)
    miss, allowed = float(np.abs(back - x).max()), 1e-7 * (1 + float(np.abs(x).max()))
    _require(miss <= allowed, f"inverse does not undo forward: off by {miss:.3g}")
    gap = float(np.abs(opposite + log_det).max())
    _require(
        gap <= 1e-7 * x.shape[1], f"log_det of inverse is not that of forward with the sign changed: {gap:.3g} off"
    )


# --- the flow seen from outside ------------------------


def _require(condition: bool, message: str) -> None:
    if not condition:  # an assertion that python -O keeps
        raise AssertionError(message)


def _in_float64(flow: NICE, parameters: Parameters) -> NICE:
    double = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    spec = replace(flow.spec, dtype="float64")
    return type(flow).from_spec(spec, double, flow.preprocessing, flow.info, backend=flow.backend)


def _to_inputs(flow: NICE, x: Floats) -> Floats:
    """Data space to the flow's input space."""
    return np.asarray(apply_steps(flow.preprocessing, x)[0])


def _affine(flow: NICE) -> bool:
    return all(step.affine for step in flow.preprocessing)


def _from_inputs(flow: NICE, vectors: Floats, x: Floats) -> Floats:
    """Vectors (differences, not points) of input space in data space, at rows x : (n, d) if steps are not affine."""
    if not _affine(flow):
        z, h = _to_inputs(flow, x), 1e-5
        ends = (undo_steps(flow.preprocessing, z + sign * h * vectors)[0] for sign in (1, -1))
        return np.asarray(np.subtract(*ends) / (2 * h))
    moved, origin = vectors, np.zeros_like(vectors)
    for step in reversed(flow.preprocessing):
        moved, origin = step.inverse(moved), step.inverse(origin)
    return moved - origin


def _moved_inputs(flow: NICE, x: Floats, z: Floats, direction: _Direction, h: float) -> Floats:
    """x : (n, d) moved by h along a direction of input space, in which the rows are z : (n, d)."""
    if direction.unit is None or _affine(flow):
        return direction.moved(x, h)
    return np.asarray(undo_steps(flow.preprocessing, z + h * direction.unit)[0])
