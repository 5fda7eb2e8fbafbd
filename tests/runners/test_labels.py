"""runners/reporting/labels.py: names, colours and order from YAML files, and settings in words."""

from pathlib import Path

from runners.config import options
from runners.reporting.labels import read_labels, settings_text


def test_every_mode_of_the_package_has_a_label_a_colour_and_a_place_of_its_own() -> None:
    labels = read_labels()
    assert sorted(labels.modes) == options("mode")
    for values in ({mode.label for mode in labels.modes.values()}, {mode.colour for mode in labels.modes.values()},
                   {mode.order for mode in labels.modes.values()}):  # fmt: skip
        assert len(values) == len(labels.modes)
    assert labels.label("4bit") == "proposed 4-bit"
    assert labels.images("cifar100") == "CIFAR-100"


def test_a_mode_without_labels_has_its_name_and_stands_last_in_grey() -> None:
    labels = read_labels()
    assert labels.label("mine") == "mine"
    assert labels.mode("mine").colour == "#666666"
    assert sorted(["mine", *labels.modes], key=labels.order)[-1] == "mine"
    assert labels.images("mine") == "mine"


def test_a_folder_of_the_users_own_adds_labels_and_replaces_those_of_the_package(tmp_path: Path) -> None:
    for group in ("mode", "dataset"):
        (tmp_path / group).mkdir()
    (tmp_path / "mode" / "mine.yaml").write_text("name: mine\nlayers: coded\nbits: 4\nlabel: My mode\norder: 5\n")
    (tmp_path / "mode" / "4bit.yaml").write_text("name: 4bit\nlabel: four bits\n")
    (tmp_path / "dataset" / "cats.yaml").write_text("name: cats\nlabel: Cats\n")
    labels = read_labels(str(tmp_path))
    assert labels.label("mine") == "My mode"
    assert sorted(labels.modes, key=labels.order)[0] == "mine"
    assert (labels.label("4bit"), labels.label("8bit")) == ("four bits", "proposed 8-bit")
    assert (labels.images("cats"), labels.images("cifar10")) == ("Cats", "CIFAR-10")


def test_settings_in_words() -> None:
    budget = {"memory_gib": 0.5, "allowance_mib": 512}
    assert settings_text({}) == ""
    assert settings_text(budget) == "0.5 GiB less 512 MiB"
    assert settings_text({**budget, "memory_gib": None}) == "the whole card"
    assert settings_text({**budget, "gpu.deterministic": False, "largest_batch": True, "mode.clip": 2.0}) == (
        "largest batch in 0.5 GiB less 512 MiB gpu.deterministic=false mode.clip=2.0"
    )
    assert settings_text({"checkpoint": None}) == "at initialisation"
    assert settings_text({"checkpoint": "exact-300"}) == "at exact-300"
    assert settings_text({"rows": 512, "channels": 32}) == "512 rows of 32 channels"
    assert settings_text({"kernel_size": 3, "in_channels": 16, "out_channels": 64}) == "unit 3x3 16 to 64"
