"""The sentences of docs/benchmarks.md: the title of each part and what its numbers are."""

HEAD = """
Made by `benchmarks/report.py` from the result files of one run of the suite; not to be edited by hand. Earlier runs,
and what was wanted, are in [results.md](results.md).
"""
TRIAL = """
**This is a trial (`--quick`): a round or two of nicecp alone. It shows that the scripts work
and says nothing about speed.**
"""
HOW = """
Contestants live in processes of their own, on the same CPUs with the same number of threads, the same dtype and full
precision of products; short pieces of work alternate between them, and who goes first changes from round to round.
Tables give medians, quartiles in brackets. *nicecp / it* is the median of the ratios taken round by round: below 1
nicecp is faster, or needs less. Absolute times swing with what else a machine does, such ratios much less. How each
part is measured: [benchmarks/README.md](../benchmarks/README.md).
"""
SECTIONS: dict[str, tuple[str, str]] = {
    "steps": (
        "Training steps",
        """
A step is all of it: gather the rows, dequantize, forward, loss, backward, Adam. Everyone starts from the same
weights, and losses on the same rows with the same noise agree before anything is timed. *bare matrix products* are
those of the step through NumPy's BLAS, a floor and not a contestant. torch.compile compiles the loss; nflows,
normflows and zuko run the library's own couplings with the same networks and optimiser. The breakdown replays each
kind of nicecp's calls on its own; threads do different ones side by side, so that they add up to more than the whole
step.
""",
    ),
    "target": (
        "Time to a validation log-likelihood on MNIST",
        """
Seconds of steps and validations, after every epoch until the target is reached; without start-up and compiling.
Everyone begins with the same weights, and draws noise and the order of rows himself.
""",
    ),
    "log_prob": (
        "Log-densities",
        """
D = 8, four additive couplings of 4-64-64-4. Peers get favours: weights frozen into the compiled function (JAX,
torch.jit.trace), rows resident in their own arrays, no checks; `log_prob` of nicecp takes a NumPy array and returns a
float or an array.
""",
    ),
    "sampling": (
        "Samples",
        """
From the same flow, the prior's random numbers included; nicecp's are Philox's and do not depend on batches.
""",
    ),
    "startup": (
        "Start-up, import, installation",
        """
Fresh processes. `import nicecp` loads its parts when they are first used, so that the first log-density, of one row
and from the start of the process, says more; Numba's cache is warm where not said otherwise. Installed sizes are
those of the files of a distribution and of all that it requires, as they lie on this machine's disk: PyTorch as built
for CUDA brings CUDA's libraries.
""",
    ),
    "depth": (
        "Memory against depth and batch",
        """
D = 256, additive couplings with networks of 3 x 256, float32, one thread. *buffers* are what the step keeps, as the
library counts; *grows by* is the peak resident memory of a fresh process beyond what it had before the model was
made, parameters and moments among it.
""",
    ),
    "streaming": (
        "Data larger than memory",
        """
A file and ones of 4 and 16 times as many rows, each trained on for an epoch and scored with the same limit; peak
resident memory, after compiling. The rate: epochs of steps on the file and on the same rows in memory, in turn.
""",
    ),
    "scaling": (
        "Several ranks, and the formula",
        """
The formula is that of [scaling.md](scaling.md). Latency and bandwidth of a sum are taken from the shortest and the
longest message, a machine's other constants from small programs just before; what lies between is a check. Two ranks
share the caches and the memory of one processor.
""",
    ),
    "tabular": (
        "Held-out log-likelihood of a table",
        """
Test rows in original units; the validation rows choose nicecp's epoch, the mixture's components and the kernel's
width. See [tables.md](tables.md).
""",
    ),
}
