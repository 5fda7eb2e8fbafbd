"""Files as disks, editors, spreadsheets and merges leave them: random damages of a file's bytes, from a seed."""

import random
from collections.abc import Iterator

ODD_TEXTS = (
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\r", b"\t", b" ", b",", b";", b'"', b"'", b"#", b"{", b"]",
    b"\n<<<<<<< HEAD\n", b"\n=======\n", b"NaN", b"inf", b"-1", b"1e999", b"TRUE", b"null", b"\xe9", "\u2028".encode(),
)  # fmt: skip


def damages(content: bytes, count: int, *, seed: int = 0) -> Iterator[bytes]:
    """Yield `count` damaged copies of a file's content; each differs from it."""
    random_ = random.Random(seed)
    done = 0
    while done < count:
        damaged = _damaged(content, random_)
        if damaged != content:
            done += 1
            yield damaged


def _damaged(content: bytes, random_: random.Random) -> bytes:
    size = len(content)
    start = random_.randrange(size)
    end = min(size, start + 1 + int(random_.expovariate(1 / 16)))
    lines = content.splitlines(keepends=True)
    kind = random_.randrange(11)
    if kind == 0:  # a bit flips
        flipped = bytearray(content)
        flipped[start] ^= 1 << random_.randrange(8)
        return bytes(flipped)
    if kind == 1:  # cut short
        return content[:start]
    if kind == 2:  # a block that was never written
        return content[:start] + bytes(end - start) + content[end:]
    if kind == 3:  # bytes of something else
        return content[:start] + random_.randbytes(end - start) + content[end:]
    if kind == 4:  # bytes missing
        return content[:start] + content[end:]
    if kind == 5:  # bytes twice
        return content[:end] + content[start:]
    if kind in (6, 7):  # typed over or into
        odd = random_.choice(ODD_TEXTS)
        return content[:start] + odd + content[start if kind == 6 else end :]
    if kind == 8:  # a line missing, twice or moved
        line = random_.randrange(len(lines))
        taken = [lines.pop(line)] if random_.random() < 0.5 else [lines[line]]
        place = random_.randrange(len(lines) + 1)
        return b"".join(lines[:place] + (taken if random_.random() < 0.7 else []) + lines[place:])
    if kind == 9:  # saved by a spreadsheet or an editor
        return random_.choice(
            (
                content.replace(b",", b";"),
                content.replace(b"\n", b"\r\n"),
                b"\xef\xbb\xbf" + content,
                content.upper(),
                content.replace(b".", b","),
                content.replace(b"\n", b"\n\n"),
            )
        )
    return content + random_.choice((content[start:end], random_.randbytes(8), b"\n", lines[-1]))  # written to its end
