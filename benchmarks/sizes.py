"""What an installation brings: the bytes of a distribution and of all that it requires, as they lie on this disk."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def needed(name: str) -> set[str]:
    """The distribution and what it requires, again and again; what is not installed here is left out."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    waiting = [(name, "")]
    while waiting:
        requirement = Requirement(waiting.pop()[0])
        own = requirement.name.lower().replace("_", "-")
        try:
            distribution = metadata.distribution(own)
        except metadata.PackageNotFoundError:
            continue
        if own in found:
            continue
        found.add(own)
        extras = requirement.extras or {""}
        for text in distribution.requires or []:
            marker = Requirement(text).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append((text, ""))
    return found


def files_of(name: str) -> int:
    """Bytes of one distribution; a checkout's own (editable) from its sources."""
    distribution = metadata.distribution(name)
    if name == "nicecp":
        folders = [ROOT / folder for folder in ("nicecp", "kernels", "cli")]
        paths = [path for folder in folders for path in folder.glob("*") if path.is_file()]
    else:
        paths = [Path(str(distribution.locate_file(path))) for path in distribution.files or []]
    return sum(path.stat().st_size for path in paths if path.is_file() and path.suffix != ".pyc")


def installed_bytes(name: str) -> int:
    """Bytes with all that is required."""
    return sum(files_of(each) for each in needed(name))
