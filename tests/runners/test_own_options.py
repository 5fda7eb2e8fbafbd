"""Options of a user's own, in --config-dir: README's numbered steps for a mode, and a data set with its reader."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from runners import CONF, cli, records

README = (CONF.parent / "README.md").read_text(encoding="utf-8")
TINY = ["width=0.25", "dataset.iterations=2", "dataset.batch_size=4", "gpu=cpu", "gpu.kernels=torch"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_readme_s_steps_add_a_mode_without_touching_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    steps = README.partition("A **mode**, without touching the package:")[2].partition("The same file in")[0]
    (name,) = re.findall(r"Write `(mine/mode/\S+\.yaml)`", steps)
    (text,) = re.findall(r"```yaml\n(.*?)```", steps, re.DOTALL)
    train, tables = (shlex.split(command)[1:] for command in re.findall(r"`(blpa-run .*?)`", steps))
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text(text)
    assert cli.main([*train, *TINY]) == 0
    assert cli.main(tables) == 0
    (label,) = re.findall(r"label: (.*)", text)
    assert re.search(rf"^\| {re.escape(label)} +\|.* \d+\.\d\d \(n=1\)", capsys.readouterr().out, re.MULTILINE)
    # The command that a record holds repeats the run.
    (run_dir,) = Path("results/runs").iterdir()
    command = shlex.split(records.read(run_dir / "records.json")[0].command)
    assert command[0].startswith("--config-dir=")
    assert cli.main([*command, "-m"]) == 0
    assert "1 cells: 0 done, 1 finished before" in capsys.readouterr().err


def test_a_data_set_s_reader_lies_beside_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine/dataset").mkdir(parents=True)
    Path("mine/dataset/half.yaml").write_text("defaults: [digits]\nname: half\nreader: half_of_the_digits\n")
    Path("mine/half_of_the_digits.py").write_text(
        "from runners.data import digits\n\n\n"
        "def read(config):\n"
        "    (images, labels), test = digits.read(config)\n"
        "    return (images[::2], labels[::2]), test\n"
    )
    assert cli.main(["--config-dir", "mine", "dataset=half", "depth=11", *TINY, "dataset.batch_size=650"]) == 1
    assert "dataset.batch_size=650: the training set has 649 images" in capsys.readouterr().err
    assert cli.main(["--config-dir", "mine", "dataset=half", "depth=11", *TINY]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-dir=nowhere"], "--config-dir=nowhere: there is no such folder"),
        (["config_dir=mine"], "config_dir= is not allowed: give the folder by --config-dir"),
        (["--config-dir", "mine", "mode=5bit"], "mode=5bit is not allowed (did you mean "),
    ],
    ids=str,
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"blpa-run: error: {message}")


@pytest.mark.usefixtures("same_logging")
def test_hydra_s_own_flags_know_the_folder(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine/mode").mkdir(parents=True)
    Path("mine/mode/narrow.yaml").write_text("name: narrow\nlayers: coded\nbits: 4\n")
    monkeypatch.setenv("COMP_LINE", "blpa-run mode=nar")
    assert cli.main(["--config-dir", "mine", "-sc", "query=bash"]) == 0
    assert capsys.readouterr().out == "mode=narrow\n"
    assert cli.main(["--config-dir", "mine", "mode=narrow", "--cfg", "all"]) == 0
    assert capsys.readouterr().out.startswith("hydra:\n")
    assert cli.main(["--config-dir", "mine", "--info", "searchpath"]) == 0
    assert str(Path("mine").absolute()) in capsys.readouterr().out
