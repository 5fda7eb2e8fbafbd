"""Read files of torch.save that may be damaged, or somebody else's: any failure is one reason in plain words.

A failure is Damaged (the content differs from the name), NotLoaded (the file may be good), or else Unreadable (the file
is of another kind). A run goes on without a file that is Damaged or Unreadable, and ends at one that is NotLoaded.

Such a file is a zip archive. torch.load does not compare the archive's checksums, so a flipped bit of a weight would
pass; here they are compared first. Nothing is allocated beyond the size of the file, and no code of it is run.
"""

import hashlib
import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

DIGITS = 16
"""Hexadecimal digits of the sha256 of a file, in its name."""


class Unreadable(ValueError):
    """The file cannot be used; the message continues a sentence that begins with its name."""


class Damaged(Unreadable):
    """The content is not what the name says."""


class NotLoaded(Unreadable):
    """Reading failed, perhaps for want of memory, for a network disk or for an older PyTorch: the file may be good."""


def digits(content: bytes | memoryview) -> str:
    """Return the first DIGITS of the sha256 of a file's content."""
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def content_of(file: Path) -> bytes:
    """Read a file whole, and check it by `check_name`.

    Raises:
        Unreadable: it is a folder; Damaged or NotLoaded in other cases.
    """
    try:
        content = file.read_bytes()
    except IsADirectoryError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error
    except (OSError, MemoryError) as error:
        raise NotLoaded(f"cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})") from error
    check_name(file.name, content)
    return content


def check_name(name: str, content: bytes) -> None:
    """Check a file's content against the digits in its name, as our checkpoints and files of torch.hub have them.

    Eight or sixteen decimals may be a date or a number, and are checked in names of our checkpoints only.

    Raises:
        Damaged: they differ.
    """
    found = re.search(r"^checkpoint-\d+-([0-9a-f]{16})\.pt$|-(?=\d*[a-f])([0-9a-f]{16}|[0-9a-f]{8})\.pth?$", name)
    if found and not hashlib.sha256(content).hexdigest().startswith(found[1] or found[2]):
        raise Damaged("is damaged: its sha256 does not match its name")


def unpickled(content: bytes) -> Any:
    """Return what torch.save wrote: tensors on the CPU, numbers, strings, lists and dictionaries.

    Args:
        content: of the file.

    Raises:
        Unreadable: it is no file of torch.save's.
        NotLoaded: it is damaged, holds other objects, which only code could make, or there is too little memory.
    """
    if not content:
        raise Unreadable("is empty")
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content):
        raise Unreadable(
            "is a safetensors file: convert it by torch.save(safetensors.torch.load_file(...), 'weights.pt')"
        )
    if not content.startswith(b"PK\3\4"):
        raise Unreadable(f"is no file of torch.save's since PyTorch 1.6: it begins with {ascii(content[:20])[1:]}")
    try:
        _check_archive(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of tensors that no network here can have
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Unreadable:
        raise
    except Exception as error:  # zipfile and torch raise whatever the bytes lead to
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise NotLoaded(
                f"holds more than tensors, {code[1]}, and code of a file is not run: save weights alone, "
                "torch.save(model.state_dict(), file)"
            ) from error
        text = " ".join(str(error).partition("\n")[0].split())
        what = "is damaged" if isinstance(error, zipfile.BadZipFile) else "cannot be loaded"
        raise NotLoaded(f"{what} ({type(error).__name__}{': ' if text else ''}{text})") from error


def _check_archive(content: bytes) -> None:
    """Compare every checksum, and the sizes, which torch.load allocates, with the content."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        names = {member.filename.rpartition("/")[2] for member in members}
        if "constants.pkl" in names:
            raise Unreadable("is a TorchScript program: save its weights alone, torch.save(model.state_dict(), file)")
        if "data.pkl" not in names:
            raise Unreadable("is a damaged archive, or no file of torch.save's")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise Unreadable(f"is damaged (the size of {member.filename})")
            # torch writes zeros where it is told to compute no checksum (torch.serialization.set_crc32_options).
            if member.CRC and len(archive.read(member)) != member.file_size:
                raise Unreadable(f"is damaged ({member.filename} is cut short)")
