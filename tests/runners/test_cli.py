"""runners/cli.py and train.py: the command line from the first word to the last record.

Most call `main` in this process; the ones that ask what a fresh process imports or leaves behind start one.
"""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from support import composed

from blpa.codec import Codec
from runners import CONF, cli, records
from runners.cells import recipe_changes, task_module
from runners.checks import check
from runners.config import Config, DatasetConfig, GpuConfig, ModeConfig, options
from runners.errors import Busy, Stopped
from runners.run import locked
from runners.tasks import train

TINY = ["dataset=digits", "gpu=cpu", "depth=11", "dataset.iterations=2", "dataset.batch_size=4", "width=0.25"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line a mistake is answered with, after all that must hold for each of them."""
    assert cli.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("blpa-run: error: ")
    assert err.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []
    return err.removeprefix("blpa-run: error: ").rstrip("\n")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Stands in for the train task: the configurations it was given, in order."""
    given: list[Config] = []
    monkeypatch.setattr(train, "run", given.append)
    return given


# Mistakes


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("dpeth=20", "unknown key 'dpeth' (did you mean depth?); allowed: budget_minutes, "),
        ("dataset.itertions=5", "unknown key 'dataset.itertions' (did you mean iterations?); allowed in dataset: "),
        ("iterations=5", "unknown key 'iterations'; allowed: budget_minutes, "),
        ("mode.Bits=4", "unknown key 'mode.Bits' (did you mean bits?); allowed in mode: activation_memory_budget, "),
        ("nothing.like.it=1", "unknown key 'nothing'; allowed: budget_minutes, dataset, depth, "),
        ("+depht=20", "unknown key 'depht' (did you mean depth?); allowed: "),
        ("~depth", "unknown key 'depth'"),
        ("dataset@mode=digits", "Could not override 'dataset@mode'."),
        ("dataset=cifr10", "dataset=cifr10 is not allowed (did you mean cifar10?); choose one of cifar10, "),
        ("mode=16bit", "mode=16bit is not allowed"),
        ("mode=", "mode= is not allowed; choose one of 2bit, 4bit, 4bit-pool, "),
        ("mode=null", "mode=null is not allowed"),
        (
            "task=trian",
            "task=trian is not allowed (did you mean train?); choose one of converted-runtime, explain, ",
        ),
        ("network=1001", "network=1001 is not allowed; choose one of resnet"),
        ("hydra.run.dir=x", "hydra.run.dir=x is not allowed: of Hydra's own keys blpa-run heeds hydra.launcher., "),
        ("experiment=tabel1", "experiment=tabel1 is not allowed (did you mean table1?)"),
        ("depth=deep", "depth: Value 'deep' of type 'str' could not be converted to Integer"),
        ("depth=", "depth: Value '' of type 'str' could not be converted to Integer"),
        ("depth=29.5", "depth: Value '29.5' of type 'float' could not be converted to Integer"),
        ("depth=null", "depth: "),
        ("depth=???", "depth: Missing mandatory value"),
        ("resume=perhaps", "resume: Value 'perhaps' is not a valid bool"),
        ("dataset.schedule=5", "dataset.schedule: "),
        (
            "dataset.schedule=[[1,0.1]]",
            "dataset.schedule[0]: Value 1 (int) is incompatible with type hint 'float'; every ",
        ),
        ("width=0.01", "width=0.01 with mode.width_factor=1.0 leaves less than a channel: "),
        ("run=${nothing}", "run: Interpolation key 'nothing' not found"),
        ("depth=165", "depth=165 is not 9n + 2 for any n of at least 1: the nearest are 164 and 173"),
        ("mode.bits=3", "mode.bits=3 is not allowed: choose 2, 4 or 8, or null for full precision"),
        ("dataset.batch_size=0", "dataset.batch_size=0 is not allowed: it is a whole number, at least 1"),
        ("dataset.iterations=-5", "dataset.iterations=-5 is not allowed: it is a whole number, at least 1"),
        ("dataset.schedule=[[1.0,-0.1]]", "dataset.schedule=[[1.0, -0.1]] is not allowed: its rates are"),
        ("run=../elsewhere", "run=../elsewhere is not allowed"),
        ("depth", "cannot read 'depth': write key=value"),
        ("depth=(", "cannot read 'depth=(': write key=value"),
        ("", "cannot read '': write key=value"),
        ("=5", "cannot read '=5': write key=value"),
        ("mode=glob([48]bit)", "cannot read 'mode=glob([48]bit)': write key=value"),
        ("depth=20 seed=1", "cannot read 'depth=20 seed=1'"),
        ("-x", "unknown flag -x; allowed: -h, --help, -m, --multirun, "),
        ("--multrun", "unknown flag --multrun (did you mean --multirun?)"),
        ("seed=0,1", "seed=0,1 names several values: add -m to run each of them"),
        ("mode=exact,4bit", "mode=exact,4bit names several values: add -m"),
        ("task.steps=3", "unknown key 'task.steps'; allowed in task: checkpoint_every, evaluate_every, "),
        ("dataset.image_size=10", "dataset.image_size=10 is not allowed: it is a multiple of 4, at least 8"),
        ("dataset.image_size=4", "dataset.image_size=4 is not allowed: it is a multiple of 4, at least 8"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    capsys: pytest.CaptureFixture[str], ran: list[Config], argument: str, message: str
) -> None:
    line = refused(capsys, "dataset=digits", argument)
    assert line.startswith(message)
    assert ran == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["depth=20,21"], "depth=21 is not 9n + 2"),
        (["mode=4bit,5bit"], "mode=5bit is not allowed"),
        (["mode=8bit,4bit", "mode.bits=8,3"], "mode.bits=3 is not allowed"),
        (["dataset.iterations=10,20"], "two cells of this sweep would share the folder cifar10-4bit-depth164-width1-"),
        (["task=runtime", "task.steps=1,2"], "two cells of this sweep would share the folder cifar10-4bit-"),
        (["seed=glob(*)"], "seed=glob(*) names no value at all"),
        (["mode=glob(x*)"], "mode=glob(x*) names no value at all"),
        (["seed=interval(0,3)"], "seed=interval(0,3): BasicSweeper does not support sweep type : INTERVAL_SWEEP"),
        (["seed=range(1,10,0)"], "seed=range(1,10,0): range() arg 3 must not be zero"),
        (["experiment=demo", "depth=165"], "depth=165 is not 9n + 2"),
    ],
)
def test_every_cell_of_a_sweep_is_checked_before_the_first_runs(
    capsys: pytest.CaptureFixture[str], ran: list[Config], arguments: list[str], message: str
) -> None:
    assert refused(capsys, "-m", *arguments).startswith(message)
    assert ran == []


# What a command line stands for


def test_the_users_own_example(ran: list[Config]) -> None:
    assert cli.main(["mode=4bit", "depth=1001"]) == 0
    (config,) = ran
    assert isinstance(config, Config)
    assert (config.dataset.name, config.mode.bits, config.depth, config.task.name) == ("cifar10", 4, 1001, "train")
    assert config.run == "cifar10-4bit-depth1001-width1-seed0"


@pytest.mark.parametrize("group", ["dataset", "mode", "gpu", "task"])
def test_every_option_composes_and_bears_its_files_name(capsys: pytest.CaptureFixture[str], group: str) -> None:
    for option in options(group):
        needed = {
            "max-batch": ["gpu.memory_gib=11"], "thresholds": ["task.checkpoint=weights.pt"], "explain": ["mode=4bit"],
            "imagenet": ["depth=152"],
        }.get(option, [])  # fmt: skip
        assert cli.main(["-c", "job", f"{group}={option}", *needed]) == 0
        assert f"{group}:\n  name: {option}\n" in capsys.readouterr().out


def test_the_papers_recipe(ran: list[Config]) -> None:
    assert cli.main(["dataset=cifar10,cifar100", "-m"]) == 0
    for config in ran:
        recipe = config.dataset
        assert (recipe.iterations, recipe.batch_size, recipe.momentum, recipe.weight_decay) == (64000, 128, 0.9, 2e-4)
        changes = [(end * recipe.iterations, rate) for end, rate in recipe.schedule]
        assert changes == [(400, 1e-2), (32000, 1e-1), (48000, 1e-2), (64000, 1e-3)]
        assert (recipe.crop_padding, recipe.flip, recipe.augmentation) == (4, True, "per-image")


def test_a_sweep_runs_every_combination_in_order(ran: list[Config]) -> None:
    assert cli.main(["mode=exact,8bit", "-m", "depth=164,254"]) == 0
    assert [(config.mode.name, config.depth) for config in ran] == [
        ("exact", 164), ("exact", 254), ("8bit", 164), ("8bit", 254),
    ]  # fmt: skip


def test_ranges_and_patterns_are_sweeps_too(ran: list[Config]) -> None:
    assert cli.main(["gpu=glob(*u*)", "seed=range(0,2)", "run=${gpu.name}-${seed}", "-m"]) == 0
    assert [config.run for config in ran] == ["auto-0", "auto-1", "cpu-0", "cpu-1"]


def test_the_demo_runs_five_modes_on_digits(ran: list[Config]) -> None:
    assert cli.main(["experiment=demo", "-m"]) == 0
    assert [config.mode.name for config in ran] == ["exact", "fewer-features", "naive-8bit", "8bit", "4bit"]
    assert {config.dataset.name for config in ran} == {"digits"}
    assert all(config.run.startswith("demo-digits-") for config in ran)


def test_table1_is_the_papers_cells_and_2_bits_in_the_order_of_value() -> None:
    cells = composed(["experiment=table1"], multirun=True)
    assert len({config.run for config in cells}) == len(cells) == 2 * 6 * 3
    assert {config.depth for config in cells} == {164}
    modes = ["4bit", "exact", "naive-8bit", "8bit", "fewer-features", "2bit"]
    assert [(config.seed, config.dataset.name, config.mode.name) for config in cells[:13]] == [
        *((0, "cifar10", mode) for mode in modes), *((0, "cifar100", mode) for mode in modes), (1, "cifar10", "4bit"),
    ]  # fmt: skip
    assert {config.gpu.precision for config in cells} == {"tf32"}
    for config in cells:
        group = (
            *(getattr(config.dataset, name) for name in ("name", "iterations", "batch_size")),
            recipe_changes(config),
        )
        assert group == (config.dataset.name, 64000, 128, {})  # so that the paper's figures stand beside them


def test_a_quarter_of_table1_is_six_cells_side_by_side(ran: list[Config]) -> None:
    assert cli.main(["experiment=table1-quarter", "-m"]) == 0
    assert {config.jobs for config in ran} == {6}
    assert [config.mode.name for config in ran] == ["2bit", "4bit", "exact", "naive-8bit", "8bit", "fewer-features"]
    told = {(c.dataset.name, c.dataset.iterations, c.gpu.precision, c.seed, c.depth) for c in ran}
    assert told == {("cifar10", 16000, "bf16", 0, 164)}
    assert not any(map(recipe_changes, ran))
    assert {(c.task.evaluate_every, c.task.checkpoint_every, c.dataset.eval_batch_size) for c in ran} == {
        (4000, 1000, 2500)
    }


def test_a_cell_of_an_experiment_side_by_side_runs_by_itself_too(ran: list[Config]) -> None:
    assert cli.main(["experiment=table1-quarter", "mode=4bit"]) == 0
    assert [config.mode.name for config in ran] == ["4bit"]


def test_the_command_line_goes_before_an_experiments_lists(ran: list[Config]) -> None:
    assert cli.main(["experiment=table1", "mode=2bit", "seed=7,8", "dataset=digits", "-m"]) == 0
    assert [(config.mode.name, config.seed, config.dataset.name) for config in ran] == [
        ("2bit", 7, "digits"), ("2bit", 8, "digits"),
    ]  # fmt: skip


def test_an_experiment_without_m_is_one_run_in_its_group(ran: list[Config]) -> None:
    assert cli.main(["experiment=demo", "mode=8bit"]) == 0
    (config,) = ran
    assert config.run == f"demo-digits-8bit-depth{config.depth}-width1-fp32-seed0"


def test_cfg_prints_and_runs_nothing(capsys: pytest.CaptureFixture[str], ran: list[Config]) -> None:
    assert cli.main(["--cfg", "job", "mode=exact,2bit", "-m"]) == 0
    out = capsys.readouterr().out
    assert out.count("---\n") == 1
    assert "run: cifar10-exact-" in out and "run: cifar10-2bit-" in out
    assert ran == []


def test_help_shows_every_option_and_every_value_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for group in ("dataset", "mode", "gpu", "task", "experiment"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {group:12}")]
        assert set(line.replace("[", "").replace("]", "").split()[1:]) == set(options(group))
    shown = set(re.findall(r"^  ([\w.]+)=", text, re.MULTILINE))
    for values, prefix in ((Config, ""), (DatasetConfig, "dataset."), (ModeConfig, "mode."), (GpuConfig, "gpu.")):
        assert {f"{prefix}{field.name}" for field in fields(values)} - shown <= {
            "dataset", "mode", "gpu", "task", "config_dir",
        }  # fmt: skip
    for task in options("task"):
        assert {f"task.{field.name}" for field in fields(task_module(task).Settings)} - shown <= {"task.name"}
    assert "Number of training steps." in text


# What comes of a run


def stopped(exit_code: int) -> Stopped:
    error = Stopped("stopped for a reason")
    error.exit_code = exit_code
    return error


def failing(monkeypatch: pytest.MonkeyPatch, failures: dict[int, BaseException]) -> list[int]:
    """Stands in for the train task: fails for some seeds; the seeds it was given, in order."""
    seeds: list[int] = []

    def run(config: Config) -> None:
        seeds.append(config.seed)
        if config.seed in failures:
            raise failures[config.seed]

    monkeypatch.setattr(train, "run", run)
    return seeds


def test_a_cell_that_fails_does_not_keep_the_next_from_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = failing(monkeypatch, {0: stopped(7)})
    assert cli.main(["seed=0,1", "-m"]) == 7
    assert seeds == [0, 1]
    assert "blpa-run: error: stopped for a reason\n" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [stopped(128 + signal.SIGTERM), KeyboardInterrupt()])
def test_a_signal_ends_the_whole_sweep(monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    seeds = failing(monkeypatch, {0: failure})
    assert cli.main(["seed=0,1", "-m"]) == (130 if isinstance(failure, KeyboardInterrupt) else 143)
    assert seeds == [0]


def test_an_os_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, {0: OSError(28, "No space left on device", "results/records.csv")})
    assert cli.main([]) == 1
    assert capsys.readouterr().err == "blpa-run: error: results/records.csv: No space left on device\n"


@pytest.mark.parametrize("bug", [ValueError("not raised by blpa"), RuntimeError("a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, bug: Exception) -> None:
    failing(monkeypatch, {0: bug})
    with pytest.raises(type(bug)):
        cli.main([])


def test_what_the_library_refuses_is_a_bug_of_the_runner_that_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "run", lambda config: Codec(bits=3))
    with pytest.raises(ValueError, match=r"^bits = 3: must be 8, 4 or 2$"):
        cli.main([])


def test_a_user_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Config) -> None:
        config.depth = 12
        check(config)

    monkeypatch.setattr(train, "run", run)
    assert cli.main([]) == 1
    assert capsys.readouterr().err == (
        "blpa-run: error: depth=12 is not 9n + 2 for any n of at least 1: the nearest are 11 and 20\n"
    )


def test_a_run_leaves_its_records_and_nothing_of_hydras(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(TINY) == 0
    assert capsys.readouterr().out.startswith("digits-4bit-depth11-width0.25-seed0: test error ")
    assert [path.name for path in Path.cwd().iterdir()] == ["results"]
    assert [path.name for path in Path("results").iterdir()] == ["runs"]
    written = records.read(Path("results/runs/digits-4bit-depth11-width0.25-seed0/records.json"))
    assert [record.metric for record in written] == ["test_error_percent", "train_seconds", "samples_per_second"]
    error = written[0]
    assert error.value == error.low == error.high
    assert 0 <= error.value <= 100
    assert (error.n, error.bits, error.kernels, error.iterations, error.width) == (1, 4, "torch", 2, 0.25)


def test_a_finished_run_started_again_keeps_its_records() -> None:
    assert cli.main([*TINY, "mode=exact"]) == 0
    (file,) = Path("results/runs").glob("*/records.json")
    rows = json.loads(file.read_text())
    for row in rows:
        row["date"] = "2000-01-01T00:00:00+00:00"
    file.write_text(json.dumps(rows))
    assert cli.main([*TINY, "mode=exact"]) == 0
    assert {record.date for record in records.read(file)} == {"2000-01-01T00:00:00+00:00"}
    assert cli.main([*TINY, "mode=exact", "resume=false"]) == 0
    assert "2000-01-01T00:00:00+00:00" not in {record.date for record in records.read(file)}


def test_a_finished_run_given_another_experiment_bears_its_name() -> None:
    named = [*TINY, "mode=exact", "run=a", "dataset.weight_decay=0.1"]
    assert cli.main([*named, "experiment=single"]) == 0
    (before, *_) = records.read(Path("results/runs/a/records.json"))
    config = [*named, "experiment=demo", "dataset.iterations=2", "task.evaluate_every=1000"]
    assert cli.main(config) == 0
    (after, *_) = records.read(Path("results/runs/a/records.json"))
    assert (before.experiment, after.experiment) == ("single", "demo")
    assert (after.date, after.value, after.settings) == (before.date, before.value, {"dataset.weight_decay": 0.1})


def test_runtimes_of_several_batch_sizes_keep_their_records() -> None:
    arguments = ["task=runtime", "task.steps=1", "gpu.kernels=torch", "dataset.batch_size=2,4", "run=a", "-m"]
    assert cli.main([*TINY, *arguments]) == 0
    found = records.collect(Path("results"))
    assert [(record.metric, record.batch_size) for record in found] == [
        ("ratio_to_exact", 2), ("ratio_to_exact", 4), ("seconds_per_sample", 2), ("seconds_per_sample", 4),
    ]  # fmt: skip
    assert {(record.kernels, record.n, record.task) for record in found} == {("torch", 1, "runtime")}


def test_a_run_that_another_process_is_at_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("results/runs/a").mkdir(parents=True)
    with locked(Path("results/runs/a")):  # another opening of the file, as another process has
        assert cli.main([*TINY, "run=a"]) == Busy.exit_code
    assert capsys.readouterr().err.endswith(
        "blpa-run: error: another process is working on results/runs/a: name another folder by run=\n"
    )
    assert [path.name for path in Path("results/runs/a").iterdir()] == ["lock"]


def test_results_that_cannot_be_written_are_refused_first(capsys: pytest.CaptureFixture[str]) -> None:
    Path("results").write_text("a file where the folder is to be")
    assert cli.main([*TINY]) == 1
    err = capsys.readouterr().err
    assert err.startswith("blpa-run: error: cannot write into results/runs/digits-4bit-depth11-width0.25-seed0 (")
    assert err.count("\n") == 1


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main([*TINY, "gpu.device=cuda"]) == 1
    err = capsys.readouterr().err
    assert err == "blpa-run: error: gpu.device=cuda: torch finds no CUDA device on this machine; choose auto or cpu\n"


def test_a_data_folder_that_is_missing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dataset.root=nowhere", "dataset.download=false", "gpu=cpu", "depth=11", "width=0.25"]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("blpa-run: error: dataset.root=nowhere")


# A fresh process


def fresh_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the empty folder, finding the package where these tests found it."""
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["depth=165"], ["dpeth=20"], ["--cfg", "job"]])
def test_help_and_mistakes_are_answered_without_torch(arguments: list[str]) -> None:
    script = "import sys; from runners import cli; cli.main(sys.argv[1:]); print('torch' in sys.modules)"
    done = fresh_process("-c", script, *arguments)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_module_is_a_command_and_its_exit_code_is_the_processs() -> None:
    done = fresh_process("-m", "runners", "depth=165")
    assert done.returncode == 2
    assert done.stderr.startswith("blpa-run: error: depth=165 is not 9n + 2")
    assert done.stderr.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []


def test_a_reader_that_leaves_gets_no_traceback() -> None:
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "runners", "--help"]
    done = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_configuration_is_plain_yaml_inside_the_package() -> None:
    assert {path.name for path in CONF.iterdir()} == {
        "config.yaml", "dataset", "experiment", "gpu", "mode", "network", "task",
    }  # fmt: skip
