"""Which dataset of an HDF5 file plays which part: by the names that are usual, or for want of others."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nicecp import probe
from nicecp.errors import DataError, about_file

if TYPE_CHECKING:
    import h5py

    from nicecp.hdf5_data import Entry

TRAIN_NAMES = ("train", "x_train", "images", "data")
VALID_NAMES = ("valid", "x_valid")
TEST_NAMES = ("test", "x_test")
_LISTED = 8  # datasets named in a message


def split_spec(spec: str | os.PathLike[str]) -> tuple[str, str | None]:
    """'FILE.h5' -> (FILE.h5, None); 'FILE.h5:/NAME' -> (FILE.h5, /NAME). A path object is always a file."""
    if not isinstance(spec, str):
        return os.fspath(spec), None
    if "://" in spec or os.path.lexists(spec):
        return spec, None
    path, colon, name = spec.rpartition(":/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return (path, "/" + "/".join(parts)) if colon and path else (spec, None)


def listing(entries: Sequence[Entry]) -> str:
    more = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return "; ".join(str(e) for e in entries[:_LISTED]) + more


def _named(group: h5py.Group, where: str, names: Sequence[str], path: str) -> str | None:
    """The first of the names that is a dataset of rank >= 2 in the group; rank 1 is for labels."""
    import h5py

    from nicecp.hdf5_chunks import Unusable
    from nicecp.hdf5_data import entry, member

    for name in names:
        try:
            found = member(group, name)
        except Unusable as error:
            raise DataError(about_file(f"{path}:{where}{name}", *error.args)) from None
        if isinstance(found, h5py.Dataset):
            label = entry(where + name, found)
            if label.rank >= 2:
                return where + name
    return None


def _choose_train(group: h5py.Group, where: str, path: str) -> str:
    """The training dataset below a group by the rules of ``open_source``; DataError if there is none or no only one."""
    from nicecp.hdf5_data import search

    named = _named(group, where, TRAIN_NAMES, path)
    if named is not None:
        return named
    entries = list(search(group, where))
    usable = [e for e in entries if not e.problem]
    others = [e for e in usable if e.path.rpartition("/")[2] not in VALID_NAMES + TEST_NAMES]
    usable = others or usable
    if len(usable) == 1:
        return usable[0].path
    if usable:
        problem = f"several datasets could be the training data: {listing(usable)}"
        raise DataError(about_file(path, problem, f"choose one: {path + ':' + usable[0].path!r}"))
    if len(entries) == 1 and entries[0].rank != 1:
        return entries[0].path  # whoever opens it says what is wrong with it
    found = f"it holds {listing(entries)}" if entries else "it holds no datasets"
    problem = f"no usable dataset (numbers of rank 2 or more): {found}"
    raise DataError(about_file(path, problem, "store one sample per row in a dataset 'train'"))


def _walk(file: h5py.File, dataset: str, path: str) -> h5py.Group | h5py.Dataset:
    """What FILE.h5:/DATASET names; DataError with the candidates if there is no such thing."""
    import h5py

    from nicecp.hdf5_chunks import Unusable
    from nicecp.hdf5_data import member, search

    found: h5py.Group | h5py.Dataset | None = file
    for part in (part for part in dataset.split("/") if part not in ("", ".")):
        try:
            found = member(found, part) if isinstance(found, h5py.Group) else None
        except Unusable as error:
            raise DataError(about_file(f"{path}:{dataset}", *error.args)) from None
        if found is None:
            entries = [e for e in search(file, "/") if not e.problem]
            close = difflib.get_close_matches(dataset, [e.path for e in entries], 1)
            known = f"the file has {listing(entries)}" if entries else "the file has no usable dataset"
            remedy = f"did you mean {path + ':' + close[0]!r}?" if close else "choose one: " + known
            problem = f"no dataset {dataset!r}" + (f" ({known})" if close else "")
            raise DataError(about_file(path, problem, remedy))
    return found


def locate(path: str, dataset: str | None) -> tuple[dict[str, str], str]:
    """Roles -> dataset paths of a file, and where the test rows of an evaluation are ('' if nowhere)."""

    from nicecp.hdf5_open import damage_reported, open_hdf5
    from nicecp.store import is_checkpoint

    if is_checkpoint(path):
        raise DataError(
            about_file(
                path, "it is a nicecp checkpoint, not data", "give the data; to go on with its training: --resume"
            )
        )
    with open_hdf5(path, dataset) as file, damage_reported(path):
        roles, test = _roles(file, path, dataset)
    probe.remember(path, [*roles.values(), test])  # the child has been through these too
    return roles, test


def _roles(file: h5py.File, path: str, dataset: str | None) -> tuple[dict[str, str], str]:
    """As ``locate``, in the open file."""
    import h5py

    where = "/"
    group = file
    if dataset is not None:
        found = _walk(file, dataset, path)
        if isinstance(found, h5py.Dataset):
            roles = {"train": dataset}
            where, _, name = dataset.rpartition("/")
            if name in TRAIN_NAMES:
                roles |= _beside(_walk(file, where, path), where + "/", path)
            return roles, dataset
        group, where = found, dataset.rstrip("/") + "/"
    test = _named(group, where, TEST_NAMES, path)
    try:
        train = _choose_train(group, where, path)
    except DataError:
        if test is None:
            raise
        return {"test": test}, test
    parent = train.rpartition("/")[0]
    beside = _beside(_walk(file, parent, path), parent + "/", path)
    # The only dataset of a file is trained on whatever its name: it cannot be the validation or test set as well.
    roles = {"train": train} | {role: name for role, name in beside.items() if name != train}
    return roles, test or roles.get("test") or train


def _beside(group: h5py.Group | h5py.Dataset, where: str, path: str) -> dict[str, str]:
    """The valid and test datasets in the group of the training dataset."""
    found = {"valid": _named(group, where, VALID_NAMES, path), "test": _named(group, where, TEST_NAMES, path)}
    return {role: name for role, name in found.items() if name is not None}


def companion(path: str, dataset: str, role: str) -> str:
    """Where the rows of a role are for which a dataset holds the training rows': DATASET_ROLE, or in a name that says
    "train" the role in its place; the dataset itself if there is no such dataset."""
    import h5py

    from nicecp.hdf5_data import member
    from nicecp.hdf5_open import damage_reported, open_hdf5

    group, _, last = dataset.rpartition("/")
    with open_hdf5(path, dataset) as file, damage_reported(path):
        holder = _walk(file, group, path)
        for name in (f"{last}_{role}", *([last.replace("train", role)] if "train" in last else ())):
            if isinstance(holder, h5py.Group) and member(holder, name) is not None:
                return f"{group}/{name}"
    return dataset


def candidates(spec: str | os.PathLike[str]) -> str:
    """The usable datasets of a file with their shapes, for a message that asks the user to choose one."""
    from nicecp.hdf5_data import search
    from nicecp.hdf5_open import damage_reported, open_hdf5

    path = split_spec(spec)[0]
    with open_hdf5(path) as file, damage_reported(path):
        return listing([found for found in search(file, "/") if not found.problem])
