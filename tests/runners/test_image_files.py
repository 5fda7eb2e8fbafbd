"""data/image_files.py: the same bits for any number of workers and any resume, and what is left when one fails."""

import multiprocessing
import os
import signal
from dataclasses import replace
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any

import pytest
import torch
from small_files import config, write_folders
from support import CPU, TinyNet, assert_same_end, tiny_config
from torch import Tensor, nn

from runners import data
from runners.config import DatasetConfig
from runners.data import colour
from runners.data.image_files import ImageFiles, draw
from runners.errors import Interrupted, Stopped, UserError
from runners.image_files import decoding
from runners.image_files.workers import Workers, usual_workers
from runners.training import loop


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folders(tmp_path / "root")


def load(root: Path, **values: Any) -> tuple[data.ImageData, DatasetConfig]:
    given = config(root, **values)
    return data.load(given, CPU), given


def drawn(count: int, recipe: DatasetConfig, seed: int = 0) -> tuple[Tensor, Tensor]:
    return draw(count, recipe, generator=torch.Generator().manual_seed(seed))


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, first, second))


# ---- what is drawn


def test_sides_and_places_are_drawn_over_the_whole_of_their_ranges(root: Path) -> None:
    places, changes = drawn(4000, config(root))
    side, *place = places.T
    assert side.bincount()[9:].tolist() == pytest.approx([1000] * 4, abs=140)  # five standard deviations, of 27
    for drawn_place in place:
        # The ends are missed by 5000th parts with a probability of exp(-4000 / 200) each.
        assert 0 <= drawn_place.min() < (1 << 24) / 200
        assert (1 << 24) * (1 - 1 / 200) < drawn_place.max() < 1 << 24
    assert changes[:, 0].unique().tolist() == [0, 1]
    assert changes[:, 0].mean() == pytest.approx(0.5, abs=0.04)  # five standard deviations, of 0.008
    assert not drawn(4000, config(root, flip=False))[1][:, 0].any()


def test_without_augmentation_the_centre_is_taken(root: Path) -> None:
    images, given = load(root, augmentation="none", iterations=1)
    ((_, (crops, labels, changes)),) = images.train.inputs(given, seed=0)
    assert changes.tolist() == [[0, 0, 1, 0, 1]] * 5
    for crop, label in zip(crops, labels, strict=True):
        files = [str(file) for file in (root / "train" / ("ant", "bee", "cat")[label]).iterdir()]
        centres = torch.from_numpy(decoding.test_crops(files, side=10, size=8, count=1, decoder="pillow"))
        # A pixel may be rounded twice, to 2 of 255 away (test_decoding.py).
        apart = (centres[:, 0].int() - crop.permute(1, 2, 0).int()).abs().amax(dim=(1, 2, 3))
        assert apart.min() <= 2 < apart.sort().values[1]


def test_inputs_have_fixed_shapes_and_types(root: Path) -> None:
    images, given = load(root)
    found = list(images.train.inputs(given, seed=0))
    assert [iteration for iteration, _ in found] == list(range(1, 8))
    for _, (crops, labels, changes) in found:
        assert (crops.shape, crops.dtype) == ((5, 3, 8, 8), torch.uint8)
        assert crops.is_contiguous(memory_format=torch.channels_last)
        assert (labels.shape, labels.dtype) == ((5,), torch.int64)
        assert (changes.shape, changes.dtype) == ((5, 5), torch.float32)
    assert (len(images.train), len(images.test)) == (12, 7)


def test_an_epoch_visits_no_image_twice(root: Path) -> None:
    images, given = load(root, augmentation="none", colour=False, iterations=4)
    epochs = [[inputs[0] for _, inputs in images.train.inputs(given, seed=0)][at : at + 2] for at in (0, 2)]
    for epoch in epochs:
        assert len({crop.numpy().tobytes() for crop in torch.cat(epoch)}) == 10  # of 12 images, 2 are dropped
    assert not torch.equal(epochs[0][0], epochs[1][0])


# ---- the same bits


def test_workers_and_resumes_change_no_bit(root: Path) -> None:
    images, given = load(root)
    whole = dict(images.train.inputs(given, seed=3))
    torch.rand(5)  # the global generator has no say
    for workers, start in ((2, 1), (3, 4), (0, 6)):
        other, _ = load(root, workers=workers)
        part = dict(other.train.inputs(given, seed=3, start=start))
        assert list(part) == list(range(start, 8))
        assert all(same(inputs, whole[iteration]) for iteration, inputs in part.items())
        if workers == 2:
            for is_final in (False, True):
                views = zip(
                    *(split.batches(given, is_final=is_final) for split in (images.test, other.test)), strict=True
                )
                assert all(same(*pair) for pair in views)
    assert not same(next(images.train.inputs(given, seed=4))[1], whole[1])
    assert multiprocessing.active_children() == []


def test_a_run_stopped_and_resumed_with_other_workers_ends_with_the_same_bits(root: Path, tmp_path: Path) -> None:
    def run(folder: str, workers: int, stops_at: int | None = None) -> None:
        images, given = load(root, workers=workers)
        recipe = replace(tiny_config(), dataset=replace(given, iterations=9))
        net = TinyNet({stops_at: lambda _: os.kill(os.getpid(), signal.SIGTERM)} if stops_at else None)
        net.conv = nn.Conv2d(3, 4, 3, bias=False)
        nn.init.constant_(net.conv.weight, 0.1)
        loop.train(net, images, recipe, device=CPU, run_dir=tmp_path / folder)

    run("whole", 0)
    with pytest.raises(Interrupted, match="stopped by SIGTERM at iteration 5 of 9"):
        run("parts", 2, stops_at=5)
    assert multiprocessing.active_children() == []
    run("parts", 0)
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


# ---- what the device makes of it


def test_a_batch_is_changed_mirrored_and_standardised(root: Path) -> None:
    images, given = load(root)
    _, (crops, labels, changes) = next(images.train.inputs(given, seed=0))
    found, found_labels = images.train.batch((crops, labels, changes), given)
    assert torch.equal(found_labels, labels)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert 0 < changes[:, 0].sum() < 5
    for crop, change, output in zip(crops, changes, found, strict=True):
        expected = colour.changed(crop[None].float() / 255, change[None, 1:])
        expected = expected.flip(3) if change[0] else expected
        # Sums of a mean in another order, and a division by 0.22: a few units in the last place.
        torch.testing.assert_close(output, colour.standardised(expected)[0], rtol=0, atol=1e-5)
    plain, _ = images.train.batch((crops, labels, changes), replace(given, colour=False))
    assert not torch.equal(plain, found)
    half = images.train.batch((crops[1::2], labels[1::2], changes[1::2]), given)[0]
    torch.testing.assert_close(half, found[1::2], rtol=0, atol=1e-5)


def test_a_batch_reads_nothing_from_its_tensors(root: Path) -> None:
    """As a step must that a CUDA graph captures: on the meta device there is nothing to read."""
    images, given = load(root)
    _, inputs = next(images.train.inputs(given, seed=0))
    found, labels = images.train.batch(tuple(x.to("meta") for x in inputs), given)
    assert (found.shape, found.device.type, labels.shape) == ((5, 3, 8, 8), "meta", (5,))


def test_evaluations_take_the_images_in_one_mixed_order(root: Path) -> None:
    images, given = load(root)
    checks = [list(images.test.batches(given, is_final=False)) for _ in range(2)]
    assert all(same(*pair) for pair in zip(*checks, strict=True))
    assert [len(labels) for _, labels in checks[0]] == [3, 1]  # check_images, at eval_batch_size
    final = list(images.test.batches(given, is_final=True))
    labels = torch.cat([labels for _, labels in final])
    assert labels.bincount().tolist() == [2, 2, 3]
    assert labels.tolist() != sorted(labels)
    assert torch.equal(labels[:4], torch.cat([labels for _, labels in checks[0]]))
    for batches, crops, views in ((checks[0], 1, 1), (final, 6, 10)):
        assert batches[0][0].shape == (3, crops, 3, 8, 8)
        made, made_labels = images.test.views(batches[0], given)
        assert len(made) == views and torch.equal(made_labels, batches[0][1])
        assert all(view.shape == (3, 3, 8, 8) and view.dtype == torch.float32 for view in made)
    one = next(images.test.batches(replace(given, test_crops=1), is_final=True))
    assert torch.equal(one[0][:, 0], final[0][0][:, 4])


def test_a_pinned_buffer_is_filled_again_after_the_device_has_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a made-up device, on which every batch is in use until its event is waited for."""
    in_use: dict[int, int] = {}
    events: list[object] = []

    class Event:
        def record(self) -> None:
            events.append(self)
            self.address = address

        def synchronize(self) -> None:
            del in_use[self.address]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    split = ImageFiles.__new__(ImageFiles)
    split.device = torch.device("cuda")
    batches = [(torch.full((4, 3, 2, 2), float(number)), torch.arange(4)) for number in range(6)]
    batches.append((torch.full((2, 3, 2, 2), 6.0), torch.arange(2)))
    seen: list[Any] = []
    for number, found in enumerate(split._pinned(iter(batches))):
        address = found[0].data_ptr()
        assert address not in in_use
        in_use[address] = number
        assert same(found, batches[number])
        seen.append(address)
    assert len(set(seen)) == 2 and len(events) == 7


# ---- failures


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_one_line_and_leaves_no_process(root: Path, workers: int) -> None:
    bad = root / "train" / "bee" / "bee_1.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    images, given = load(root, workers=workers, augmentation="none")
    with pytest.raises(UserError, match=rf"^{bad} cannot be decoded: "):
        list(images.train.inputs(given, seed=0))
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_one_line_and_leaves_no_process() -> None:
    """And signals to all processes of a job leave the workers alone."""
    workers = Workers(2)
    results = workers.results(os.getpid, iter(lambda: (), None), ahead=2)
    worker = next(results)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(worker, number)
    assert {next(results) for _ in range(8)} - {os.getpid()}
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(Stopped, match=r"was killed, perhaps for want of memory: dataset\.workers=2 may be too many"):
        for _ in range(100):
            next(results)
    assert multiprocessing.active_children() == []


def test_a_worker_that_ends_before_its_first_result_is_told_apart() -> None:
    """As each one does where the script that is run has no guard."""
    with pytest.raises(Stopped, match=r"ended before its first result: .* under if __name__ == '__main__'; or "):
        list(Workers(1).results(os._exit, [(1,)], ahead=1))


def test_workers_begin_in_a_process_of_another_start_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joblib's processes have one that a new process does not know."""
    before = multiprocessing.get_start_method(allow_none=True)
    monkeypatch.setitem(multiprocessing.context._concrete_contexts, "other", SpawnContext())
    monkeypatch.setattr(multiprocessing.context._concrete_contexts["other"], "_name", "other")
    multiprocessing.set_start_method("other", force=True)
    try:
        assert os.getpid() not in Workers(1).results(os.getpid, [(), ()], ahead=1)
        assert multiprocessing.get_start_method() == "other"
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_who_stops_half_way_leaves_no_process(root: Path) -> None:
    images, given = load(root, workers=1)
    inputs = images.train.inputs(given, seed=0)
    next(inputs)
    assert len(multiprocessing.active_children()) == 1
    checks = images.test.batches(given, is_final=False)
    next(checks)
    assert len(multiprocessing.active_children()) == 1  # both sets use the same ones
    inputs.close()
    assert len(multiprocessing.active_children()) == 1
    checks.close()
    assert multiprocessing.active_children() == []


def test_the_time_spent_waiting_is_known(root: Path) -> None:
    images, given = load(root)
    assert images.train.seconds_waited == 0
    list(images.train.inputs(given, seed=0))
    assert images.train.seconds_waited > 0
    assert data.Split(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1).long()).seconds_waited is None
    assert usual_workers() in range(1, 17)


def test_a_batch_larger_than_the_training_set_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"^dataset\.batch_size=13: the training set has 12 images$"):
        load(root, batch_size=13)


def test_another_list_of_images_is_another_listing(root: Path, tmp_path: Path) -> None:
    """It is written into checkpoints: with other files the images would come in another order."""
    listings = [load(root)[0].train.listing]
    (root / "train" / "bee" / "bee_1.png").rename(root / "train" / "bee" / "bee_7.png")
    listings.append(load(root)[0].train.listing)
    (root / "train" / "bee" / "bee_7.png").unlink()
    listings.append(load(root)[0].train.listing)
    assert len(set(listings)) == 3
    assert [str(listing).split(",")[0] for listing in listings] == ["12 images", "12 images", "11 images"]
