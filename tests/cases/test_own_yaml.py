"""Files of options that users wrote, saved by editors or damaged: read, or refused in one line that names the place."""

import os
from pathlib import Path

import pytest
from damage import damages
from support import composed, refusal

from runners import CONF, cli, compose
from runners.config import ModeConfig
from runners.errors import UserError
from runners.option_files import mode, read

MODE = "name: mine\nlayers: coded\nbits: 4\n"
HERE = "mine/mode/mine.yaml, line"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(content: str | bytes, file: str = "mode/mine.yaml") -> None:
    path = Path("mine", file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command with these options is refused with; paths begin at the current folder."""
    assert cli.main(["--config-dir=mine", "dataset=digits", "--cfg", "job", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("blpa-run: error: ") and len(err.splitlines()) == 1
    return err.removeprefix("blpa-run: error: ").rstrip("\n").replace(f"{Path.cwd()}{os.sep}", "")


def bomb(mapping: bool = False) -> str:
    """Aliases of aliases, which stand for 9^9 values."""
    lines = ["label: &a {x: 1}" if mapping else "label: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        aliases = ", ".join([f"*{before}"] * 9)
        lines.append(f"{name}: &{name} {{<<: [{aliases}]}}" if mapping else f"{name}: &{name} [{aliases}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (MODE.replace("bits", "\tbits"), f"{HERE} 3, column 1: found character '\\t' that cannot start any token"),
        (f"{MODE}label: 'open\norder: 5\n", f"{HERE} 6, column 1: found unexpected end of stream while scanning"),
        (f"{MODE}bits: 8\n", f"{HERE} 4, column 1: the key 'bits' is already in line 3"),
        (f"{MODE}# größe\n".encode("latin-1"), f"{HERE} 4, column 5: byte 0xf6 is not UTF-8: save the file as UTF-8"),
        (MODE.encode("utf-16"), f"{HERE} 1, column 1: byte 0xff is not UTF-8"),
        (f"{MODE}\0\0", f"{HERE} 4, column 1: character 0x00 is not allowed in YAML"),
        (bytes(range(256)), f"{HERE} "),
        ("- a\n- b\n", f"{HERE} 1, column 1: expected lines of the form key: value, not a list"),
        ("hello\n", f"{HERE} 1, column 1: expected lines of the form key: value, not 'hello'"),
        ("", "mine/mode/mine.yaml is empty: expected the values of a mode, key: value"),
        ("# nothing\n", "mine/mode/mine.yaml is empty"),
        (MODE.replace("bits", "bit"), f"{HERE} 3, column 1: unknown key 'mode.bit' (did you mean bits?); allowed in "),
        (f"{MODE}true: 1\n", f"{HERE} 4, column 1: unknown key 'mode.true'"),
        (f"{MODE}? [a, b]\n: 1\n", f"{HERE} 4, column 3: expected lines of the form key: value"),
        (MODE.replace("4", "four"), f"{HERE} 3, column 1: mode.bits: Value 'four' of type 'str' could not be "),
        (MODE.replace("4", "[4]"), f"{HERE} 3, column 1: mode.bits: Value '[4]'"),
        (f"{MODE}label: {{a: b}}\n", f"{HERE} 4, column 1: mode.label: Cannot convert 'DictConfig' to string"),
        (f"{MODE}label: ${{x\n", f"{HERE} 4, column 1: mode.label: "),
        (f"{MODE}order: !!int x\n", f"{HERE} 4, column 8: cannot read 'x'"),
        (f"{MODE}order: !!timestamp 2024-01-01\n", f"{HERE} 4, column 1: mode.order: Value 'date'"),
        (f"{MODE}order: !!python/object:os.system x\n", f"{HERE} 4, column 8: could not determine a constructor"),
        (f"{MODE}colour: #ff0000\n", f"{HERE} 4, column 8: expected a text; quote a value that begins with #"),
        (f"{MODE}colour: red\n", "mode.colour=red is not allowed: it is #rrggbb"),
        (MODE.replace("coded", ""), f"{HERE} 2, column 8: expected a text"),
        (f"{MODE}label: \"a\\ud800\"\n", f"{HERE} 4, column 8: 'a\\ud800' is no Unicode text"),
        (f"{MODE}label: \"a\\0\"\n", f"{HERE} 4, column 8: 'a\\x00' is no Unicode text"),
        (f"{MODE}\"\\ud800\": 1\n", f"{HERE} 4, column 1: '\\ud800' is no Unicode text"),
        (f"{MODE}label: *x\n", f"{HERE} 4, column 8: found undefined alias 'x'"),
        (f"{MODE}---\n{MODE}", f"{HERE} 4, column 1: found another document"),
        (f"name: mine\n<<<<<<< HEAD\n{MODE}", f"{HERE} 3, column 1: could not find expected ':'"),
        (f"defaults: [4bot]\n{MODE}", "the defaults of mode/mine.yaml name mode/4bot.yaml, which is not there ("),
        (f"defaults: 4bit\n{MODE}", f"{HERE} 1, column 11: defaults: expected a list of options, such as [4bit]"),
        (f"defaults: [null]\n{MODE}", f"{HERE} 1, column 12: defaults: expected a list of options"),
        (f"defaults:\n  - /mode: 4bit\n{MODE}", f"{HERE} 2, column 5: defaults: expected names of options of "),
        (f"defaults: [mine]\n{MODE}", "the defaults of an option lead back to it"),
        (f"# @package a b\n{MODE}", f"{HERE} 1: cannot read '# @package a b': expected # @package _global_"),
        (f"# @package task\n{MODE}", f"{HERE} 1: @package task is not allowed: expected @package _global_, or none"),
        (bomb(), f"{HERE} 2, column 1: unknown key 'mode.b'"),
        (f"defaults:\n{bomb().replace('label: ', '- x: ').replace(chr(10), chr(10) + '- ')}", f"{HERE} "),
        (f"{MODE}label:\n  - {bomb(mapping=True).replace(chr(10), chr(10) + '    ')}", f"{HERE} "),
        (f"{MODE}label: &a [*a]\n", "mine/mode/mine.yaml: nested too deeply"),
        (f"{MODE}label: {'[' * 500}", "mine/mode/mine.yaml"),  # too deep, or never closed: torch may raise the limit
        (MODE.replace("name: mine\n", ""), "mode.name: Missing mandatory value, which neither an option's file nor"),
    ],
)  # fmt: skip
def test_a_mode_file_that_cannot_be_read(
    content: str | bytes, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(content)
    assert message(capsys, "mode=mine").startswith(expected)


@pytest.mark.parametrize(
    "content",
    [MODE.replace("\n", "\r\n"), MODE.replace("\n", "\r"), f"\ufeff{MODE}", f"\ufeff# @package mode\r\n{MODE}",
     f"base: &b\n{MODE}".replace("base: &b\n", "# größe\n"), "name: &n mine\nlayers: coded\nbits: 4\nlabel: ''\n",
     f"{MODE}label:\n", f"{MODE}label: # to come\n",
     "<<: {layers: coded, bits: 8}\nname: mine\nbits: 4\n"],
)  # fmt: skip
def test_a_mode_file_of_another_editor(content: str) -> None:
    write(content)
    assert mode("mine", "mine") == ModeConfig("mine", "coded", bits=4)
    with compose.session("mine"):
        assert compose.cells(["mode=mine"], multirun=False)[0].config.mode.bits == 4


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("dataset/mine.yaml", "defaults: [digits]\nitertions: 5\n", "line 2, column 1: unknown key 'dataset.iter"),
        ("dataset/mine.yaml", "defaults: [digits]\nschedule: 5\n", "line 2, column 1: dataset.schedule: "),
        ("gpu/mine.yaml", "name: mine\nmemory_gib: much\n", "line 2, column 1: gpu.memory_gib: Value 'much'"),
        ("task/mine.yaml", "name: runtime\nstesp: 3\n", "line 2, column 1: unknown key 'task.stesp' (did you "),
        ("task/mine.yaml", "name: runtime\nsteps: some\n", "line 2, column 1: task.steps: Value 'some'"),
        ("task/mine.yaml", "name: runtime\nmodes: exact\n", "line 2, column 8: task.modes: expected a list, such "),
        ("network/mine.yaml", "depth: 29\n", "line 1: expected # @package _global_"),
        ("network/mine.yaml", "# @package _global_\ndetph: 29\n", "line 2, column 1: unknown key 'detph' (did you"),
        ("experiment/mine.yaml", "# @package _global_\ntask: [a]\n", "line 2, column 7: expected lines of the form"),
        ("experiment/mine.yaml", "# @package _global_\nmode: {bit: 4}\n", "line 2, column 8: unknown key 'mode.bit'"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_of_each_group(
    file: str, content: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(content, file)
    group, _, _ = file.partition("/")
    assert message(capsys, f"{group}=mine").startswith(f"mine/{file}, {expected}")


@pytest.mark.parametrize(
    ("hydra", "expected"),
    [
        ("5", ", line 2, column 8: expected lines of the form key: value, not '5'"),
        ("", ", line 2, column 7: expected lines of the form key: value, not nothing"),
        ("{sweeper: [1]}", ", line 2, column 18: expected lines of the form key: value, not a list"),
        ("{sweeper: {params: 5}}", ", line 2, column 27: expected lines of the form key: value, not '5'"),
        ("{sweeper: {params: {seed: {a: 1}}}}", ", line 2, column 34: seed: expected a value, or several with commas"),
        ("{sweeper: {params: {run: }}}", ", line 2, column 32: expected a text"),
        ("{sweeper: {parms: {seed: 1}}}", ": hydra.sweeper.parms: Key 'parms' not in 'BasicSweeperConf'"),
        ("{launcher: {n_jobs: 2}}", ": hydra.launcher.n_jobs: Key 'n_jobs' not in 'BasicLauncherConf'"),
    ],
)
def test_a_mistake_in_an_experiment_s_values_of_hydra(
    hydra: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(f"# @package _global_\nhydra: {hydra}\n", "experiment/mine.yaml")
    said = message(capsys, "experiment=mine", "-m").removeprefix("mine/")
    assert said.startswith(f"experiment/mine.yaml{expected}")


def test_an_experiment_that_sweeps_numbers_as_yaml_writes_them() -> None:
    params = "{dataset.schedule: [[0.5, 0.1], [1.0, 0.01]], seed: 0x10, gpu.memory_gib: null, mode: '8bit,4bit'}"
    write(f"# @package _global_\nhydra: {{sweeper: {{params: {params}}}}}\n", "experiment/mine.yaml")
    with compose.session("mine"):
        found = [cell.config for cell in compose.cells(["experiment=mine", "dataset=digits"], multirun=True)]
    assert [config.mode.name for config in found] == ["8bit", "4bit"]
    assert found[0].dataset.schedule == [[0.5, 0.1], [1.0, 0.01]]
    assert (found[0].seed, found[0].gpu.memory_gib) == (16, None)


@pytest.mark.parametrize("params", ["", "null"])
def test_an_experiment_that_sweeps_nothing(params: str) -> None:
    write(f"# @package _global_\nseed: 3\nhydra: {{sweeper: {{params: {params}}}}}\n", "experiment/mine.yaml")
    with compose.session("mine"):
        assert [cell.config.seed for cell in compose.cells(["experiment=mine"], multirun=True)] == [3]


def test_a_colour_that_is_none_beside_the_mode_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Figures read all modes for their colours."""
    write(f"{MODE}colour: red\n")
    assert cli.main(["--config-dir=mine", "task=plots"]) == 1
    err = capsys.readouterr().err
    assert "mode mine: mode.colour=red is not allowed: it is #rrggbb" in err and len(err.splitlines()) == 1


def test_a_folder_in_place_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine/mode/mine.yaml").mkdir(parents=True)
    assert message(capsys, "mode=mine") == "mine/mode/mine.yaml: Is a directory; expected a YAML file"


def test_a_file_without_permission(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by the file system; for root, which may read everything, in its place."""
    write(MODE)
    read_bytes = Path.read_bytes

    def refusing(file: Path) -> bytes:
        if file.name == "mine.yaml":
            raise PermissionError(13, "Permission denied", str(file))
        return read_bytes(file)

    monkeypatch.setattr(Path, "read_bytes", refusing)
    assert message(capsys, "mode=mine") == "mine/mode/mine.yaml: Permission denied; expected a YAML file"


def test_a_damaged_mode_beside_the_one_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Tables read all modes for their labels."""
    write("label: 'open\n", "mode/other.yaml")
    assert cli.main(["--config-dir=mine", "task=tables"]) == 1
    err = capsys.readouterr().err
    assert "mine/mode/other.yaml, line 2, column 1: found unexpected end of stream" in err
    assert len(err.splitlines()) == 1


def test_modes_that_start_from_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    write(f"defaults: [b]\n{MODE}", "mode/a.yaml")
    write(f"defaults: [a]\n{MODE}", "mode/b.yaml")
    assert cli.main(["--config-dir=mine", "task=tables"]) == 1
    assert "mode/a.yaml: its defaults lead back to it: a -> b -> a" in capsys.readouterr().err


@pytest.mark.usefixtures("same_logging")
@pytest.mark.parametrize("flags", [["--cfg", "all"], ["--info", "config"]])
def test_hydra_s_own_flags_meet_a_damaged_file(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    write("label: 'open\n")
    assert "mine/mode/mine.yaml, line 2" in refusal(["--config-dir=mine", *flags, "mode=mine"], capsys)


def test_every_file_of_the_package_is_read() -> None:
    for file in CONF.rglob("*.yaml"):
        values, _ = read(file, file.parent.name if file.parent != CONF else None)
        assert values


@pytest.mark.parametrize(("group", "name", "count"), [("mode", "4bit", 60), ("experiment", "table2", 10)])
def test_a_file_with_random_damages(group: str, name: str, count: int) -> None:
    write("", f"{group}/mine.yaml")
    with compose.session("mine"):
        for damaged in damages((CONF / group / f"{name}.yaml").read_bytes(), count):
            read_or_refused(damaged, group)


def read_or_refused(content: bytes, group: str) -> str:
    """Compose with a file of these bytes, and return the message that it is refused with; empty where it is accepted.

    Must be called in a session with the folder `mine`.
    """
    write(content, f"{group}/mine.yaml")
    try:
        compose.runs([f"{group}=mine", "depth=11", "dataset=digits"], multirun=False)
    except UserError as error:
        return str(error)
    return ""


def test_the_package_s_own_options_are_the_same_as_ever() -> None:
    (config,) = composed([])
    assert (config.mode.alpha, config.mode.colour, config.mode.bits) == ("1/8", "#0072B2", 4)
