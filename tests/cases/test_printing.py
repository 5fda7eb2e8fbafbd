"""Nobody reads what a run prints: that costs the printing, and no number."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from support import TINY

from runners import CONF, cli, printing
from runners.config import Config
from runners.tasks import train

ALONE = [argument for argument in TINY if argument != "-m"]
MEASURING = [
    ["task=gradient-error", "task.steps=1", "gpu.kernels=torch"],
    ["task=runtime", "task.steps=1", "gpu.kernels=torch"],
    ["task=memory"],
    ["task=max-batch", "gpu.memory_gib=0.6"],
    ["task=train", "mode=exact"],
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pipe_without_reader() -> IO[str]:
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", buffering=1, encoding="utf-8")


def full_disk() -> IO[str]:
    return open("/dev/full", "w", buffering=1, encoding="utf-8")


def terminal_that_closed() -> IO[str]:
    ours, its = os.openpty()
    os.close(ours)
    return open(its, "w", buffering=1, encoding="utf-8")


@pytest.fixture(params=[pipe_without_reader, full_disk, terminal_that_closed], ids=lambda make: make.__name__)
def unwritable(request: pytest.FixtureRequest) -> Iterator[IO[str]]:
    """A stream whose every write fails; when it is closed, nothing may be left in it that would fail again."""
    with request.param() as stream:
        yield stream


def test_each_task_is_killed_while_it_prints_and_has_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    class Deadly(io.StringIO):
        def write(self, text: str) -> int:
            raise Killed

    for task in MEASURING:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(sys, "stdout", Deadly())
            cli.main([*ALONE, *task])
    assert len(list(Path("results/runs").glob("*/records.json"))) == len(MEASURING)
    assert len(list(Path("results").glob("[gm]*/*.csv"))) == 2


def test_a_sweep_was_printed_where_nothing_can_be_written(unwritable: IO[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Config) -> None:
        print("measured")
        print("a note", file=sys.stderr, flush=True)
        seeds.append(config.seed)

    seeds: list[int] = []
    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(sys, "stdout", unwritable)
    monkeypatch.setattr(sys, "stderr", unwritable)
    assert cli.main([*TINY, "seed=0,1"]) == 0
    assert seeds == [0, 1]
    assert not list(Path("results/runs").glob("*/failure.json"))


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["task=progress"]], ids=lambda words: words[-1])
def test_what_only_prints_has_failed_where_it_cannot(
    arguments: list[str], unwritable: IO[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", unwritable)
    code, error = cli.main(arguments), capsys.readouterr().err
    try:
        os.write(unwritable.fileno(), b"text")
    except BrokenPipeError:
        assert (code, error) == (141, "")
    except OSError as reason:
        assert (code, error) == (1, f"blpa-run: error: cannot write to stdout: {reason.strerror}\n")
    else:
        pytest.fail("it can be written")


def test_a_name_that_the_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert cli.main([*ALONE, "task=memory", "results='größe 大'"]) == 0
    assert b"gr\\xf6\\xdfe \\u5927/figures/" in output.buffer.getvalue()
    assert Path("größe 大/memory").is_dir()


def test_the_stream_was_closed_by_the_program_around(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    output.close()
    monkeypatch.setattr(sys, "stdout", output)
    assert cli.main([*ALONE, "task=memory"]) == 0
    assert cli.main(["task=progress"]) == 1


def test_nothing_is_changed_for_the_program_around() -> None:
    before = sys.stdout, sys.stderr, [os.fstat(number).st_ino for number in range(3)]
    with printing.tolerant():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr, [os.fstat(number).st_ino for number in range(3)]) == before


def test_stdin_stdout_and_stderr_were_closed_from_the_start() -> None:
    """A file that took the number of stdout would get what C code prints."""
    script = (
        "import os\nfrom runners import cli, printing\n"
        "with printing.tolerant(), open('number', 'w') as file:\n"
        "    os.write(1, b'from C')\n    os.write(2, b'from C')\n    file.write(str(file.fileno()))\n"
        "code = cli.main(['--help'])\n"
        "with open('code', 'w') as file:\n    file.write(str(code))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    command = 'exec "$0" -c "$1" >&- 2>&- <&-'
    assert subprocess.run(["sh", "-c", command, sys.executable, script], env=environment, check=False).returncode == 0
    assert Path("number").read_text() == "3"
    assert Path("code").read_text() == "1"  # the help went nowhere
