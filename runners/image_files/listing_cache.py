"""The images in some folders, listed once: a million names take minutes to list on a network's file system.

The user's cache holds one file for each folder of class folders:

    sha256 of the rest, in hexadecimal
    {"folder": ..., "images": {class folder: [time of its last change in ns, [names]]}}

Adding, renaming or removing a file changes the time of its folder, so such a folder is listed again; one that changed
in the last seconds before it was listed may change again at the same time, and is not written. The file is damaged or
cannot be written: folders are listed as without it.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from runners.files import write_whole

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
RECENT_NS = 2_000_000_000
"""No file system that is in use has coarser times: FAT's are of two seconds."""

Listed = dict[str, tuple[int, list[str]]]
"""Time of the last change in ns, and names of the images, by folder."""


def images(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """List the images in each of some folders, sorted.

    Args:
        folder: the folder that holds them.
        names: their names.

    Raises:
        OSError: a folder cannot be read.
    """
    folder = folder.resolve()
    file = _file(folder)
    known = _read(file, folder) if file else {}
    now_ns = time.time_ns()
    found: Listed = {}
    for name in tqdm(names, f"listing {folder}", delay=2, leave=False):
        changed_ns = os.stat(folder / name).st_mtime_ns
        is_known = name in known and known[name][0] == changed_ns
        found[name] = known[name] if is_known else (changed_ns, _listed(folder / name))
    settled = {name: entry for name, entry in found.items() if entry[0] < now_ns - RECENT_NS}
    if file and any(known.get(name) != entry for name, entry in settled.items()):
        _write(file, folder, {**known, **settled})
    return {name: listed for name, (_, listed) in found.items()}


def _listed(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") and entry.is_file()
        )


def _file(folder: Path) -> Path | None:
    """Return the cache of a folder; None where there is no home to put it in."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):
        return None
    return Path(cache, "blpa", f"images-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}.json")


def _read(file: Path, folder: Path) -> Listed:
    """Read what was listed before; nothing where the file is not there, not whole, or of another folder."""
    try:
        digest, _, text = file.read_bytes().partition(b"\n")
    except OSError:
        return {}
    if digest != _digest(text):
        return {}
    content = json.loads(text)
    if content["folder"] != str(folder):
        return {}
    return {name: (changed_ns, listed) for name, (changed_ns, listed) in content["images"].items()}


def _write(file: Path, folder: Path, listed: Listed) -> None:
    text = json.dumps({"folder": str(folder), "images": listed}).encode()
    with suppress(OSError):  # the next start lists again
        write_whole(file, _digest(text) + b"\n" + text)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
