"""The images in some folders, listed once: a million names take minutes to list on a network's file system.

The user's cache holds one file for each folder of class folders:

    sha256 of the rest, in hexadecimal
    {"folder": ..., "images": {class folder: [time of its last change in ns, [names]]}}

Adding, renaming or removing a file changes the time of its folder, so such a folder is listed again; one that changed
in the last seconds before it was listed may change again at the same time, and is not written. Nor is one without
images, or with an image's name that is no file: the links in it may point to a disk that is not mounted yet, and the
mount would not change its time. The file is damaged or cannot be written: folders are listed as without it.
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
    found: dict[str, list[str]] = {}
    new: Listed = {}
    for name in tqdm(names, f"listing {folder}", delay=2, leave=False):
        changed_ns = os.stat(folder / name).st_mtime_ns
        if name in known and known[name][0] == changed_ns:
            found[name] = known[name][1]
            continue
        found[name], is_whole = _listed(folder / name)
        if found[name] and is_whole and changed_ns < now_ns - RECENT_NS:
            new[name] = (changed_ns, found[name])
    if file and new:
        _write(file, folder, {**known, **new})
    return found


def _listed(folder: Path) -> tuple[list[str], bool]:
    """Return the names of the images in a folder, sorted, and whether each image's name is a file."""
    with os.scandir(folder) as entries:
        named = [e for e in entries if e.name.lower().endswith(EXTENSIONS) and not e.name.startswith(".")]
        images = sorted(entry.name for entry in named if entry.is_file())
    return images, len(images) == len(named)


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
