"""The settings of one run as plain values that a checkpoint's JSON can hold, from a preset and what is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nicecp.averaging import average_kind
from nicecp.decay import check_decay
from nicecp.kernels import PRECISIONS
from nicecp.kernels.backend import PRIORS
from nicecp.network import ACTIVATIONS
from nicecp.optimizers import Optimizer, optimizer_from
from nicecp.orders import PARTITIONS, RANDOM
from nicecp.params import INITS
from nicecp.partition import MAX_COLUMNS
from nicecp.preset_table import RANGE, choose
from nicecp.registry import MLP, is_law, is_network
from nicecp.spec import DTYPES, LAWS, ModelSpec, alternating, partition_of, repartitioned
from nicecp.table_size import TableSize, sized
from nicecp.train_config import TrainConfig
from nicecp.transform_spec import NONE, as_text, parse
from nicecp.whitening import KINDS


@dataclass(frozen=True)
class Settings:
    """All that decides what a run computes, beside the data and the machine.

    patience: epochs without a better validation log-likelihood before stopping. value_range: of dequantized 8-bit
    data. window: rows shuffled together. whiten, regularization: see nicecp.whitening. hidden_by_coupling: hidden
    layers of each coupling, where they differ (``hidden`` is then empty), else None. partition: of ModelSpec, or
    "random", a permutation from the seed; order: that of "permutation"; repartition: after so many couplings the seed
    draws another (0: never). activations: what is kept for the backward pass
    (nicecp.network.ACTIVATIONS).
    """

    preset: str
    hidden: tuple[int, ...]
    couplings: int
    prior: str
    init: str
    dtype: str
    optimizer: Optimizer
    epochs: int
    batch_size: int
    patience: int | None
    valid_fraction: float
    seed: int
    value_range: tuple[float, float]
    standardize: bool
    allow_constant: bool
    window: int
    coupling: tuple[str, ...] = ("additive",)  # laws, gone through again and again
    whiten: str = "none"  # nicecp.whitening.KINDS
    regularization: float = 0.0
    hidden_by_coupling: tuple[tuple[int, ...], ...] | None = None
    partition: str = "odd-even"
    order: tuple[int, ...] | None = None
    logit: float | None = None  # the margin of a logit step
    network: str = MLP  # or one of nicecp.registry
    activations: str = "store"
    schedule: str = "constant"  # of the learning rate: nicecp.decay
    weight_decay: float = 0.0
    weight_average: str = "none"  # nicecp.averaging
    transform: str = NONE  # of single float columns: nicecp.transform_spec
    precision: str = "full"  # nicecp.kernels.PRECISIONS
    repartition: int = 0
    device_memory_limit: int | None = None  # bytes of a GPU for training data (nicecp.feed): changes no result

    def model_spec(self, n_features: int, n_context: int = 0) -> ModelSpec:
        couplings = alternating(self.hidden_by_coupling or self.hidden, self.couplings, self.coupling, self.network)
        form = partition_of(self.partition if self.order is None else self.order, n_features, self.seed)
        spec = ModelSpec(n_features, couplings, self.prior, self.dtype, n_context, self.precision, *form)
        return repartitioned(spec, self.repartition, self.seed)

    def train_config(self) -> TrainConfig:
        """What the training loop needs of them."""
        return TrainConfig(**{name: getattr(self, name) for name in TRAINING})

    def to_json(self) -> dict[str, Any]:
        """Only what JSON has: tuples as lists, the optimiser as its kind and numbers."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("hidden", "value_range", "coupling"):
            values[name] = list(values[name])
        if self.hidden_by_coupling is not None:
            values["hidden_by_coupling"] = [list(hidden) for hidden in self.hidden_by_coupling]
        values["order"] = None if self.order is None else list(self.order)
        if not self.repartition:  # settings of runs without it stay those that earlier versions know
            del values["repartition"]
        values["optimizer"] = {"kind": self.optimizer.kind, **asdict(self.optimizer)}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        """The inverse of to_json; ValueError, TypeError or KeyError where the values are not of that form."""
        given = dict(values)
        optimizer = dict(given.pop("optimizer"))
        low, high = given.pop("value_range")
        hidden = tuple(int(size) for size in given.pop("hidden"))
        laws = tuple(str(law) for law in given.pop("coupling", ("additive",)))  # the first files know no others
        each = given.pop("hidden_by_coupling", None)
        if each is not None:
            each = tuple(tuple(int(size) for size in sizes) for sizes in each)
        order, logit = given.pop("order", None), given.pop("logit", None)
        settings = cls(
            order=None if order is None else tuple(int(column) for column in order),
            logit=None if logit is None else float(logit),
            hidden=hidden,
            coupling=laws,
            hidden_by_coupling=each,
            value_range=(float(low), float(high)),
            optimizer=optimizer_from(str(optimizer.pop("kind")), optimizer),
            **given,
        )
        for field in fields(cls):  # what is plain; ModelSpec, TrainConfig and the optimiser check their own values
            kinds = {"int": (int,), "str": (str,), "bool": (bool,), "float": (int, float)}.get(str(field.type))
            value = getattr(settings, field.name)
            if kinds is not None and (type(value) not in kinds):
                raise TypeError(f"{field.name} should be {field.type}, is {value!r}")
        return settings


# What the training loop needs of them: TrainConfig's fields of the same names.
TRAINING = tuple(
    field.name for field in fields(TrainConfig) if field.name in {setting.name for setting in fields(Settings)}
)

# Settings that may be given anew when a run goes on.
CHANGEABLE = ("epochs", "patience", "activations", "device_memory_limit")

# Names under which a run's caller may give settings; None means "as the preset or the data say".
NAMES = tuple(field.name for field in fields(Settings) if field.name not in ("preset", "optimizer", "window"))


def check_names(given: Mapping[str, Any]) -> None:
    """TypeError for a setting that there is not."""
    unknown = sorted(given.keys() - set(NAMES))
    if unknown:
        raise TypeError(f"unknown setting {', '.join(unknown)}")


def optimizer_with(base: Optimizer, kind: str | None, numbers: Mapping[str, float | None]) -> Optimizer:
    """An optimiser of a kind with these numbers; what is None comes from ``base``, or its kind's own defaults.

    Raises ValueError for an unknown kind, a number that the kind does not have, or one out of bounds.
    """
    start = base if kind is None or kind == base.kind else optimizer_from(kind, {})
    given = {name: value for name, value in numbers.items() if value is not None}
    for name in given.keys() - asdict(start).keys():
        raise ValueError(f"optimizer {start.kind} has no setting {name}; it has {', '.join(asdict(start))}")
    return optimizer_from(start.kind, {**asdict(start), **given})


def resolve(
    data: Any,
    eight_bit: bool,
    window: int,
    preset: str = "auto",
    optimizer: str | None = None,
    numbers: Mapping[str, float | None] | None = None,
    size: TableSize | None = None,
    **given: Any,
) -> Settings:
    """The settings of a run: what is given (names of NAMES, None left out), else the preset's, else the data's.

    size : of the training rows, which some presets follow (nicecp.table_size).

    Raises ValueError where a value is out of bounds or does not apply to the data.
    """
    chosen = choose(preset, data, eight_bit, 0 if size is None else size.columns)
    if size is not None and not eight_bit:
        chosen = sized(chosen, size)
    check_names(given)
    values = {name: value for name, value in given.items() if value is not None}
    if "transform" in values:
        values["transform"] = as_text(values["transform"])
    if not eight_bit and "value_range" in values and "logit" not in values:
        problem = (
            "a value range (--range) is for 8-bit data, or for floats with a logit (--logit), and these are floats"
        )
        raise ValueError(f"{problem}: leave it out")
    if not eight_bit and "logit" in values and "value_range" not in values:
        raise ValueError("a logit of floats needs the interval in which they lie (--range LO,HI, value_range=)")
    if eight_bit and values.get("logit") == 0:
        raise ValueError("logit must be above 0 for 8-bit data, in which the ends of their range occur")
    if eight_bit and values.get("transform", NONE) != NONE:
        raise ValueError("transforms of columns (--transform) are for floats, and these are 8-bit data: leave them out")
    if eight_bit and values.get("standardize") is False:
        raise ValueError("8-bit data are not standardised: leave --no-standardize out")
    if eight_bit and values.get("allow_constant"):
        raise ValueError("8-bit data may have constant columns anyway: leave --allow-constant out")
    if values.get("dtype") in (None, "auto"):
        values["dtype"] = "float32" if eight_bit else "float64"
    settings = Settings(
        preset=chosen.name,
        hidden=chosen.hidden,
        couplings=chosen.couplings,
        prior=chosen.prior,
        init=chosen.init,
        dtype="float64",
        optimizer=optimizer_with(chosen.optimizer, optimizer, numbers or {}),
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        patience=chosen.patience,
        valid_fraction=chosen.valid_fraction,
        seed=0,
        value_range=chosen.value_range if eight_bit else RANGE,
        standardize=True,
        allow_constant=False,
        window=window,
        whiten=chosen.whiten,
        hidden_by_coupling=chosen.hidden_by_coupling,
        partition=chosen.partition,
        transform=NONE if eight_bit else chosen.transform,
        coupling=chosen.coupling,
        schedule=chosen.schedule,
        weight_decay=chosen.weight_decay,
        repartition=chosen.repartition,
        regularization=chosen.regularization,
    )
    if chosen.hidden_by_coupling is not None and "couplings" in values and "hidden" not in values:
        raise ValueError(f"couplings must be those of the preset {chosen.name!r}, unless hidden is given too")
    if "hidden" in values and "hidden_by_coupling" not in values:
        values["hidden_by_coupling"] = None
        if values["hidden"] and isinstance(values["hidden"][0], tuple):  # sizes for each coupling
            values["hidden"], values["hidden_by_coupling"] = (), values["hidden"]
            values.setdefault("couplings", len(values["hidden_by_coupling"]))
    if "order" in values:
        values.setdefault("partition", "permutation")
    if "partition" in values:  # a preset's is for its own
        values.setdefault("repartition", 0)
    if "whiten" in values:  # as well
        values.setdefault("regularization", 0.0)
    if "logit" in values or values.get("standardize") is False:  # columns as they are, or all of them in one way
        values.setdefault("transform", NONE)
    settings = replace(settings, **values)
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """ValueError for the first setting that is out of bounds; the model's and the loop's classes check theirs again."""
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {settings.dtype!r}")
    if settings.precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {settings.precision!r}")
    if settings.precision == "tf32" and settings.dtype != "float32":
        raise ValueError(f"precision must be full for {settings.dtype}: tf32 is for float32")
    if settings.prior not in PRIORS:
        raise ValueError(f"the prior must be one of {', '.join(sorted(PRIORS))}, got {settings.prior!r}")
    if settings.init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {settings.init!r}")
    if not settings.coupling or not all(is_law(law) for law in settings.coupling):
        raise ValueError(f"the coupling's laws must be of {', '.join(LAWS)}, got {_shown(settings.coupling)}")
    if any(size < 1 for size in settings.hidden):
        raise ValueError(f"hidden sizes must be at least 1, got {settings.hidden}")
    each = settings.hidden_by_coupling
    if each is not None and (len(each) != settings.couplings or any(size < 1 for sizes in each for size in sizes)):
        raise ValueError(f"hidden_by_coupling must be {settings.couplings} lists of sizes of at least 1, got {each}")
    if not is_network(settings.network):
        raise ValueError(f"network must be {MLP} or a registered one, got {settings.network!r}")
    if settings.partition not in (*PARTITIONS, RANDOM):
        raise ValueError(f"partition must be one of {', '.join((*PARTITIONS, RANDOM))}, got {settings.partition!r}")
    if settings.repartition < 0:
        raise ValueError(f"repartition must be at least 0, got {settings.repartition}")
    if (settings.order is None) == (settings.partition == "permutation"):
        raise ValueError(f"an order belongs to the partition 'permutation' and to no other, got {settings.partition!r}")
    if settings.order is not None and len(settings.order) > MAX_COLUMNS:
        raise ValueError(f"an order may have at most {MAX_COLUMNS} columns, got {len(settings.order)}")
    if settings.logit is not None and not 0 <= settings.logit < 0.5:
        raise ValueError(f"logit must be a margin of at least 0 and below 0.5, got {settings.logit}")
    if settings.logit is not None and settings.whiten == "approximate":
        raise ValueError("whiten must be zca or gaussian behind a logit, whose closed form approximate would learn")
    if settings.whiten not in KINDS:
        raise ValueError(f"whiten must be one of {', '.join(KINDS)}, got {settings.whiten!r}")
    if not 0 <= settings.regularization < float("inf"):
        raise ValueError(f"regularization must be at least 0 and finite, got {settings.regularization}")
    if settings.regularization and settings.whiten not in ("zca", "gaussian"):
        raise ValueError("regularization is for whitening by zca or gaussian: leave it out")
    if settings.activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {settings.activations!r}")
    check_decay(settings.schedule, settings.weight_decay)
    average_kind(settings.weight_average)
    if settings.transform != NONE:
        parse(settings.transform)
    for name in ("epochs", "batch_size", "couplings"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    limit = settings.device_memory_limit
    if limit is not None and limit < 1:
        raise ValueError(f"device_memory_limit must be at least 1 byte, got {limit}")
    if settings.patience is not None and settings.patience < 1:
        raise ValueError(f"patience must be at least 1, got {settings.patience}")
    if not 0 <= settings.seed < 2**64:
        raise ValueError(f"the seed must be in 0..2^64 - 1, got {settings.seed}")
    if not 0 <= settings.valid_fraction < 1:
        raise ValueError(f"the fraction of held-out rows must be at least 0 and below 1, got {settings.valid_fraction}")


def contradiction(
    settings: Settings,
    preset: str = "auto",
    optimizer: str | None = None,
    numbers: Mapping[str, float | None] | None = None,
    **given: Any,
) -> str:
    """The first setting given that differs from a run's own, as 'name is X in the run, Y was asked for', or ''.

    Those of CHANGEABLE may differ: a run can be extended, and its memory changes no result but its last bits.
    """
    values = {name: value for name, value in given.items() if value is not None and name not in CHANGEABLE}
    if values.get("dtype") == "auto":
        del values["dtype"]
    if preset != "auto":
        values["preset"] = preset
    recorded = {field.name: getattr(settings, field.name) for field in fields(settings)}
    if settings.hidden_by_coupling is not None:
        recorded["hidden"] = tuple(settings.hidden_by_coupling)
    if optimizer is not None:
        values["optimizer"], recorded["optimizer"] = optimizer, settings.optimizer.kind
    for name, number in (numbers or {}).items():
        if number is not None:
            values[name], recorded[name] = number, asdict(settings.optimizer).get(name, "not a setting")
    for name, value in values.items():
        if recorded[name] != value:
            return f"{name} is {_shown(recorded[name])} in the run, {_shown(value)} was asked for"
    return ""


def _shown(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    if value and isinstance(value[0], tuple):  # sizes for each coupling
        return "/".join(_shown(sizes) for sizes in value)
    return ",".join(str(item) for item in value[:20]) + (",..." if len(value) > 20 else "")
