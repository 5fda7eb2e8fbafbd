"""Texts that users typed, on the command line and in files of their own: each arrives as it was written."""

import functools
import os
import random
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.backends.backend_agg import RendererAgg
from omegaconf import OmegaConf
from support import TINY, composed, refusal

from runners import cli, compose
from runners.cells import command, overrides, task_module
from runners.config import Config, ModeConfig, options
from runners.option_files import types
from runners.reporting import figures
from runners.reporting.labels import Labels
from runners.tasks import train
from runners.texts import hydra_text, quoted

NUMBERLIKE = [
    "2024_11_26", "1e3", "1.10", "007", "0x1f", "12e4567", "2024-11-26", "1_0.5", "+1", "true", "False", "null", "None",
    "inf", "nan", "on", "yes", "0o7", "1:30",
]  # fmt: skip
SPECIAL = [
    "", " ", "a b", "a b ", "it's", 'a "b"', "a(b", "[b]", "{a: b}", "a=b", "100%", "$HOME", "a$b", "größe", "日本",
    "a,b", "-", "\\", "C:\\data", "a\\,b", "${seed}", "\\${seed}", "#", "@x", "a\u2028b",
]  # fmt: skip
BARE = ["a b ", "it's", "a(b", "[b]", "[a,b]", "a=b", "100%", "$HOME", "a$b", "größe", "C:\\x"]
KEYS = (
    "results", "dataset.root", "dataset.label", "mode.label", "mode.alpha", "gpu.name", "task.model",
)  # fmt: skip
"""Keys whose text is checked where it is used, if at all."""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/homes/me")


def one(*arguments: str) -> Config:
    (config,) = composed([*arguments])
    return config


def own(file: str, text: str, *arguments: str, multirun: bool = False) -> list[Config]:
    """The configurations that a command line asks for with a file in --config-dir."""
    path = Path("mine", file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    with compose.session("mine"):
        return [cell.config for cell in compose.cells([*arguments], multirun=multirun)]


def spread(texts: list[str]) -> list[dict[str, str]]:
    """Spread texts over the keys that take any, so that few compositions try many."""
    return [dict(zip(KEYS, texts[start:], strict=False)) for start in range(0, len(texts), len(KEYS))]


def arrived(config: Config, keys: Iterable[str]) -> dict[str, str]:
    """The texts of a configuration."""
    return {key: functools.reduce(getattr, key.split("."), config) for key in keys}  # type: ignore[misc]


# On the command line


@pytest.mark.parametrize("texts", spread([*NUMBERLIKE, *BARE]))
def test_texts_are_typed_without_quotes(texts: dict[str, str]) -> None:
    typed = one("task=explain", *(f"{key}={text}" for key, text in texts.items()))
    assert arrived(typed, texts) == texts


def test_a_text_is_typed_in_quotes() -> None:
    for text in ("'a,b'", '"a,b"', r"a\,b"):
        assert one(f"results={text}").results == "a,b"


def test_null_is_nothing_only_where_nothing_is_allowed() -> None:
    assert one("task=gradient-error", "task.checkpoint=null").task.checkpoint is None
    assert one("task=gradient-error", "task.checkpoint='null'").task.checkpoint == "null"
    assert one("run=null").run == "null"


def test_another_key_s_value_is_named_in_a_text() -> None:
    assert one("results=r-${seed}", "seed=3").results == "r-3"
    assert one(r"results=r-\${seed}").results == "r-${seed}"


@pytest.mark.parametrize(
    ("argument", "runs"),
    [
        ("run=1.1,1.10", ["1.1", "1.10"]),
        ("run=1e3, 007 ,'true'", ["1e3", "007", "true"]),
        ("run=choice(1.1,1.10)", ["1.1", "1.10"]),
        ("run=range(0,2)", ["0", "1"]),
    ],
)
def test_a_sweep_over_texts(argument: str, runs: list[str]) -> None:
    assert [config.run for config in composed([argument], multirun=True)] == runs


def test_options_named_like_numbers() -> None:
    text = "name: 1e3\nlayers: stock\n"
    assert [cell.mode.name for cell in own("mode/1e3.yaml", text, "mode=1e3")] == ["1e3"]
    assert [cell.mode.name for cell in own("mode/1e3.yaml", text, "mode=glob(1*)", multirun=True)] == ["1e3"]


def test_two_runs_of_the_same_number_have_two_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "run", lambda config: [])
    assert cli.main([*TINY, "mode=exact", "results=2024_11_26", "run=1.1,1.10"]) == 0
    assert sorted(os.listdir("2024_11_26/runs")) == ["1.1", "1.10"]


# In files of the user's own


@pytest.mark.parametrize("texts", spread([*NUMBERLIKE, "~x", "No", "1__0", ".5", "a$b", "it's"]))
def test_a_file_says_texts_without_quotes(texts: dict[str, str]) -> None:
    groups = {key.partition(".")[0] for key in texts if "." in key}
    lines = [f"{key}: {text}" for key, text in texts.items() if "." not in key]
    for group in sorted(groups - {"task"}):
        lines += [f"{group}:", *(f"  {key.partition('.')[2]}: {texts[key]}" for key in texts if key.startswith(group))]
    (config,) = own("experiment/mine.yaml", "\n".join(["# @package _global_", *lines]), "experiment=mine")
    written = {key: text for key, text in texts.items() if not key.startswith("task.")}
    assert arrived(config, written) == written


def test_an_experiment_lists_texts() -> None:
    experiment = "# @package _global_\nhydra: {sweeper: {params: {run: 1.10, seed: 1_0}}}\n"
    (config,) = own("experiment/mine.yaml", experiment, "experiment=mine", multirun=True)
    assert (config.run, config.seed) == ("1.10", 10)


def test_numbers_of_a_file_stay_numbers() -> None:
    (config,) = own("mode/mine.yaml", "name: mine\nlayers: coded\nbits: 4\nclip: 2\norder: 1_0\n", "mode=mine")
    assert (config.mode.bits, config.mode.clip, config.mode.order) == (4, 2.0, 10)


# The command that a record repeats itself by


def test_any_text_is_composed_again_by_its_command() -> None:
    """By Hydra alone, as a launcher does, and by blpa-run."""
    alphabet = [*"a1_-.e'\"\\$#{}()[],:= \t~%é日\n+/|?*@!&;", "\\\\", "${", "\\${", "null", "true", "1e3"]
    random_ = random.Random(0)
    texts = ["".join(random_.choices(alphabet, k=random_.randrange(9))) for _ in range(300)]
    parser = OverridesParser.create()
    for text in [*texts, *NUMBERLIKE, *SPECIAL, *BARE]:
        written = f"run={hydra_text(text)}"
        for override in (written, quoted(written)):
            value = parser.parse_override(override).value()
            assert OmegaConf.create({"run": str(value)}).run == text, override


@pytest.mark.parametrize("text", ["1.10", "null", "it's a (file), {here}=1.pt", "${seed}\\", "größe"])
def test_a_record_repeats_a_run_with_such_a_text(text: str) -> None:
    config = one("task=gradient-error", f"task.checkpoint={hydra_text(text)}")
    assert config.task.checkpoint == text
    assert composed(overrides(config)) == [config]


def test_a_list_of_texts_is_composed_again() -> None:
    assert hydra_text(["exact", "it's, two", "a\\"]) == r"['exact','it\'s, two','a\\']"
    config = one("task=runtime", "task.modes=[exact, 'compiled']")
    assert composed(overrides(config)) == [config]


def test_commands_that_are_in_records_already_stay_the_same() -> None:
    assert command(one("depth=11", "run=20241126", "task=runtime", "task.modes=[exact]")) == (
        "experiment=single task=runtime 'task.modes=['\"'\"'exact'\"'\"']' dataset=cifar10 mode=4bit gpu=auto depth=11 "
        "width=1.0 seed=0 run=20241126"
    )


# Homes


def test_a_home_begins_every_path() -> None:
    typed = one("results=~/r", "dataset.root=~/d", "task=gradient-error", "task.checkpoint='~/c.pt'")
    assert (typed.results, typed.dataset.root, typed.task.checkpoint) == (
        "/homes/me/r", "/homes/me/d", "/homes/me/c.pt"
    )  # fmt: skip
    assert quoted("results=~/a,~/b") == "results=/homes/me/a,/homes/me/b"
    (config,) = own("experiment/mine.yaml", "# @package _global_\nresults: ~/r\n", "experiment=mine")
    assert config.results == "/homes/me/r"


def test_a_folder_named_like_a_home() -> None:
    assert one("results=./~", "dataset.label=~/x").results == "./~"
    assert one("dataset.label=~/x").dataset.label == "~/x"


def test_a_home_holds_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("mine").mkdir()
    assert cli.main(["--config-dir=~/mine", "--cfg", "job"]) == 0


# In figures


def test_labels_with_dollars_are_drawn_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    label = r"a$\frac{$"
    labels = Labels({"4bit": ModeConfig(name="4bit", label=label)}, {"digits": label})
    curves = pd.DataFrame(
        [["digits", 11, 1.0, 3, 4, "fp32", "{}", "4bit", 0, 3, 5.0]],
        columns=["dataset", "depth", "width", "iterations", "batch_size", "precision", "settings", "mode", "seed",
                 "iteration", "test_error_percent"],
    )  # fmt: skip
    drawn: list[str] = []
    draw_text = RendererAgg.draw_text

    def remembered(self: Any, gc: Any, x: Any, y: Any, text: str, *rest: Any, ismath: Any = False, **more: Any) -> None:
        drawn.append(text)
        draw_text(self, gc, x, y, text, *rest, ismath=ismath, **more)

    monkeypatch.setattr(RendererAgg, "draw_text", remembered)
    figures.save(figures.draw(curves, labels), Path(), "curves")
    assert sum(label in text for text in drawn) >= 2  # title and line

    Path("memory").mkdir()
    Path("memory/steps.csv").write_text("mode,done,mib\n4bit,0.0,1.0\n4bit,1.0,2.0\n")
    drawn.clear()
    figures.draw_memory(Path(), "steps", labels)
    assert f"{label}: 2.00" in drawn


# Mistakes


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("run=a/b", "run=a/b is not allowed"),
        ("run=..", "run=.. is not allowed"),
        ("run=a ", "run=a is not allowed"),
        ("run=a\nb", "run=a b is not allowed"),
        ("run=" + 300 * "a", f"run={300 * 'a'} is not allowed: it has 300 characters, and may have 150"),
        ("results=a\nb", r"results='a\nb' is not allowed: a path or name has no control characters"),
        ("results=a\x7fb", r"results='a\x7fb' is not allowed: a path or name has no control characters"),
        ("dataset.root=a\x01b", r"dataset.root='a\x01b' is not allowed"),
        ("dataset.reader=a\x1bb", r"dataset.reader='a\x1bb' is not allowed"),
        ("gpu.name=a\x1bb", r"gpu.name='a\x1bb' is not allowed"),
        ("results=a\0b", r"cannot read 'results=a\x00b'"),
        ("results=a\udcffb", r"cannot read 'results=a\udcffb'"),
        ("results='a", 'cannot read "results=\'a"'),
        ("results=a,b", "results=a,b names several values: add -m"),
        ("run='1.10','1.1'", "run='1.10','1.1' names several values: add -m"),
        ("task.modes=8bit", "task.modes=8bit is not allowed: it is a list, task.modes=[8bit]"),
        ("task.modes=[a", "task.modes=[a is not allowed: it is a list, task.modes=[a]"),
        ("task.modes=choice(a", "task.modes=choice(a is not allowed: it is a list"),
        ("task.modes=${x", "task.modes=${x is not allowed: it is a list"),
        ("task.modes=${x}", "task.modes: Interpolation key 'x' not found"),
        ("mode.colour=ff0000", "mode.colour=ff0000 is not allowed: it is #rrggbb"),
        ("--config-dir=", "--config-dir=: there is no such folder"),
    ],
)
def test_a_text_that_cannot_be(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(["task=runtime", argument], capsys)
    assert said.startswith(f"blpa-run: error: {message}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("task", ["explain task.model", "gradient-error task.checkpoint", "thresholds task.checkpoint"])
def test_a_control_character_that_a_record_could_not_hold(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, key = task.split()
    said = refusal([f"task={name}", f"{key}=a\x07b"], capsys)
    assert said == f"blpa-run: error: {key}='a\\x07b' is not allowed: a path or name has no control characters\n"


def test_a_control_character_in_the_folder_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine\x07").mkdir()
    said = refusal(["--config-dir=mine\x07", "task=memory"], capsys)
    assert said.startswith("blpa-run: error: --config-dir=") and said.endswith(
        "a path or name has no control characters\n"
    )


def test_hydra_s_view_of_the_configuration_has_the_same_texts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--cfg", "all", "results=2024_11_26"]) == 0
    assert "\nresults: '2024_11_26'\n" in capsys.readouterr().out
    assert refusal(["--cfg", "all", "mode=nothing"], capsys).startswith("blpa-run: error: mode=nothing is not allowed")


def test_a_setting_has_one_type_in_all_tasks() -> None:
    """For the command line reads the types of all tasks together."""
    found = [
        (key.name, key.type) for task in options("task") for key in fields(task_module(task).Settings)
    ]  # fmt: skip
    assert {f"task.{name}": type_ for name, type_ in found} == {
        key: type_ for key, type_ in types().items() if key.startswith("task.")
    }
    assert len({(name, str(type_)) for name, type_ in found}) == len({name for name, _ in found})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["run=???"], "run=??? is not allowed: in a configuration ??? is a value that is missing"),
        (["results=~nobody-here/x"], "results=~nobody-here/x: there is no such user; a folder of that name is ./~nobo"),
        (["--config-dir=~nobody-here"], "--config-dir=~nobody-here: there is no such user"),
    ],
)
def test_a_text_that_stands_for_nothing(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reason in refusal([*arguments, "task=tables"], capsys)
