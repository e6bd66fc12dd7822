"""From the calls of a step to a graph: fewer launches, and two streams.

What a call needs is written in ``reads`` and ``writes``, so all that is done here is safe whatever the step looks like:
calls are joined only where nothing between them touches what they work on, and the main stream waits for a side block
as soon as it touches what the block does, and not before.
"""

from __future__ import annotations

from typing import Any

from nicecp.kernels.backend import Array
from nicecp.kernels.cuda_calls import BiasBackward, BiasForward, Call, Coefficients, Couple, Product, Update
from nicecp.kernels.cuda_driver import Bias, BiasGradient, Driver, Epilogue, MaskedBiasGradient, ReluBias

Span = tuple[int, int]  # first byte and end
MAIN = 0


class Plan:
    """The calls of a step in the order of their launches.

    calls : what is launched; streams : for each of them MAIN or the number, from 1, of its side block; waits : for each
    of them the block that the main stream waits for first, or 0.
    """

    def __init__(self, driver: Driver, calls: list[Call]) -> None:
        self._driver = driver
        self.calls = self._with_shared_coefficients(calls)
        self.calls = _with_joined_updates(self.calls)
        self.calls = self._with_forward_epilogues(self.calls)
        self.calls = self._with_backward_epilogues(self.calls)
        for call in self.calls:
            call.prepare(driver)
        self.streams: list[int] = []
        self.waits: list[int] = []
        self._schedule()

    def play(self) -> None:
        """Launch all of it: what a driver captures."""
        driver, tokens, position = self._driver, dict[int, Any](), 0
        while position < len(self.calls):
            block = self.streams[position]
            if block == MAIN:
                if self.waits[position]:
                    driver.wait(tokens[self.waits[position]])
                self.calls[position].run(driver)
                position += 1
                continue
            with driver.side() as tokens[block]:
                while position < len(self.calls) and self.streams[position] == block:
                    self.calls[position].run(driver)
                    position += 1

    # --- fewer launches -----------------------------------------------------------------------------------------------

    def _with_shared_coefficients(self, calls: list[Call]) -> list[Call]:
        """Coefficients are computed again only after something else wrote the state."""
        out: list[Call] = []
        fresh: Coefficients | None = None
        for call in calls:
            if isinstance(call, Coefficients):
                if fresh is not None and call.optimizer == fresh.optimizer and self._same(call.state, fresh.state):
                    continue
                fresh = call
            elif fresh is not None and not isinstance(call, Update) and self._meet(call.writes(), [fresh.state]):
                fresh = None
            out.append(call)
        return out

    def _with_forward_epilogues(self, calls: list[Call]) -> list[Call]:
        """Bias and ReLU by the product, with a mask if a backward pass asks for it later; or bias by the coupling."""
        out: list[Call] = []
        for position, call in enumerate(calls):
            later = calls[position + 1 :]
            if isinstance(call, BiasForward):
                before = out[-1] if out else None
                if isinstance(before, Product) and self._same(before.out, call.y):
                    epilogue: Epilogue = Bias(call.b)
                    if call.relu:
                        epilogue = ReluBias(call.b, self._mask_wanted(call.y, later))
                    if before.take(self._driver, epilogue):
                        continue
                after = later[0] if later else None
                if not call.relu and isinstance(after, Couple) and self._adds_bias(after, call.y):
                    after.bias = call.b
                    continue
            out.append(call)
        return out

    def _mask_wanted(self, y: Array, later: list[Call]) -> Array | None:
        wanted = any(isinstance(call, BiasBackward) and call.relu and self._same(call.y, y) for call in later)
        return self._driver.relu_mask(*y.shape) if wanted else None

    def _adds_bias(self, couple: Couple, m: Array) -> bool:
        apart = not self._meet([couple.x, couple.y], [m])
        return self._same(couple.m, m) and apart and couple.y.shape == m.shape

    def _with_backward_epilogues(self, calls: list[Call]) -> list[Call]:
        """Mask and bias gradient by the product that gives dy, or the bias gradient by the one that takes it."""
        out: list[Call] = []
        for position, call in enumerate(calls):
            if isinstance(call, BiasBackward) and call.db is not None:
                if call.relu and self._masked_before(out, call, call.db):
                    continue
                after = calls[position + 1] if position + 1 < len(calls) else None
                takes_dy = isinstance(after, Product) and after.transpose_a and self._same(after.b, call.dy)
                if not call.relu and takes_dy and after.take(self._driver, BiasGradient(call.db)):  # type: ignore[union-attr]
                    continue
            out.append(call)
        return out

    def _masked_before(self, before: list[Call], call: BiasBackward, db: Array) -> bool:
        mask = None
        for earlier in before:  # the last call that wrote y: its mask still tells where y > 0
            if self._meet(earlier.writes(), [call.y]):
                mask = None
                if isinstance(earlier, Product) and isinstance(earlier.epilogue, ReluBias):
                    mask = earlier.epilogue.mask if self._same(earlier.out, call.y) else None
        if mask is None:
            return False
        for earlier in reversed(before):
            if isinstance(earlier, Product) and self._same(earlier.out, call.dy):
                return earlier.take(self._driver, MaskedBiasGradient(mask, db))
            if self._meet([*earlier.writes(), *earlier.reads()], [call.dy, db]):
                return False
        return False

    # --- two streams --------------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        pending: list[tuple[int, list[Span], list[Span]]] = []  # side blocks nobody has waited for: writes, reads
        block, inside = 0, False
        for call in self.calls:
            writes, reads = self._spans(call.writes()), self._spans(call.reads())
            if call.side:
                if not inside:
                    block, inside = block + 1, True
                    pending.append((block, [], []))
                pending[-1][1].extend(writes)
                pending[-1][2].extend(reads)
                self.streams.append(block)
                self.waits.append(0)
                continue
            inside, last = False, 0
            for number, written, read in pending:
                if _overlap(writes, written) or _overlap(writes, read) or _overlap(reads, written):
                    last = number
            pending = [one for one in pending if one[0] > last]
            self.streams.append(MAIN)
            self.waits.append(last)

    # --- which memory -------------------------------------------------------------------------------------------------

    def _spans(self, arrays: list[Array]) -> list[Span]:
        starts = [self._driver.address(array) for array in arrays]
        return [(start, start + array.nbytes) for start, array in zip(starts, arrays, strict=True)]

    def _same(self, one: Array, other: Array) -> bool:
        return self._spans([one]) == self._spans([other]) and one.dtype == other.dtype

    def _meet(self, some: list[Array], others: list[Array]) -> bool:
        return _overlap(self._spans(some), self._spans(others))


def _overlap(some: list[Span], others: list[Span]) -> bool:
    return any(a < end and start < b for a, b in some for start, end in others)


def _with_joined_updates(calls: list[Call]) -> list[Call]:
    """Updates that follow one another and whose ranges adjoin, as of a layer's weight and its bias, become one."""
    out: list[Call] = []
    for call in calls:
        last = out[-1] if out else None
        if isinstance(call, Update) and isinstance(last, Update) and _adjoin(last, call):
            last.offset, last.size = min(last.offset, call.offset), last.size + call.size
        else:
            out.append(call)
    return out


def _adjoin(last: Update, call: Update) -> bool:
    alike = all(getattr(last, name) is getattr(call, name) for name in ("p", "g", "m", "v", "state"))
    touch = last.offset + last.size == call.offset or call.offset + call.size == last.offset
    return alike and last.optimizer == call.optimizer and touch
