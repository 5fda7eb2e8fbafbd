"""Schema of the configuration: a dataclass for each group, with a docstring for each field.

The values are plain YAML, a file for each option (conf/). Hydra composes them, and this schema types them: a misspelt
key or a value of the wrong type is refused. checks.py then refuses what a type cannot, in one line. Nothing here
imports torch, so a mistake is answered at once. The settings of a task are in its own file (runners/tasks).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from runners import CONF

PUBLISHED = "published"
"""The version of a data set that its authors published."""


@dataclass
class DatasetConfig:
    """A data set and the recipe it is trained by; a data set's recipe lives with the data set."""

    name: str = MISSING
    """The data set's name."""
    label: str = field(default="", compare=False)
    """The data set's name in tables and figures; empty shows `name`."""
    reader: str = MISSING
    """Module whose read(config) returns the data set: one of runners.data, or your own in your folder of options."""
    classes: int = MISSING
    """Number of classes."""
    image_size: int = MISSING
    """Height and width of an image, in pixels."""
    image_channels: int = MISSING
    """Channels of an image."""
    architecture: str = "cifar"
    """The network's form: cifar has a 3x3 stem and three groups of blocks, depth 9n + 2; imagenet a 7x7 stem with
    stride 2, a max pool and four groups, depth 26, 50, 101 or 152."""
    train_images: int | None = field(default=None, compare=False)
    """Number of training images of the published version, for a remark on larger batches; null makes none."""
    root: str = "data"
    """Folder of the data set; a download goes there."""
    version: str = PUBLISHED
    """published: files in `root` that differ from the published ones are refused. Any other name stands for your own
    files there, which are used as they are; the name is in every result."""
    download: bool = True
    """Fetch files of the published version that `root` does not hold; a file that is there is never replaced."""
    iterations: int = MISSING
    """Number of training steps."""
    batch_size: int = MISSING
    """Images per training step."""
    sub_batches: int = 1
    """Forward and backward passes per training step, of an equal part of the batch each; the gradients are averaged.
    Batch norm takes the statistics of each part. Tasks other than train do not divide the batch."""
    schedule: list[list[float]] = MISSING
    """Learning rate as [end, rate] pairs: `rate` holds up to the fraction `end` of the iterations, the last 1.0."""
    momentum: float = 0.9
    """Momentum of stochastic gradient descent (not Nesterov's)."""
    weight_decay: float = 2e-4
    """L2 penalty on convolution and classifier weights; batch norm and biases have none."""
    label_smoothing: float = 0.0
    """Part of the target that is spread over all classes in training, 0 to 1; 0.1 is usual for ImageNet today."""
    augmentation: str = "per-image"
    """How crop and flip are drawn: per-image (usual), per-batch (as the authors' code) or none."""
    crop_padding: int = 4
    """Zero pixels added on each side before a random crop of the original size."""
    flip: bool = True
    """Whether half of the images are mirrored (not for digits: a mirrored 2 is no digit)."""
    eval_batch_size: int = 500
    """Images per evaluation step."""
    eval_statistics: str = "running"
    """Batch norm statistics in evaluation: running averages, or batch (the authors' code)."""
    top5: bool = False
    """Count the test images, too, whose class is not among the five with the largest logits."""
    train_sides: list[int] | None = None
    """Data sets of image files only: smallest and largest short side, in pixels, that a training image is resized to
    before its random crop of `image_size`; null for data sets in memory, as the values that follow."""
    colour: bool | None = None
    """Image files: whether training changes brightness, saturation, hue and contrast of each image at random."""
    check_side: int | None = None
    """Image files: short side before the centre crop of evaluations before the last one."""
    check_images: int | None = None
    """Image files: number of test images of those evaluations, always the same ones."""
    test_side: int | None = None
    """Image files: short side before the crops of the last evaluation, which takes all test images."""
    test_crops: int | None = None
    """Image files: crops of the last evaluation, 1 (centre) or 10 (corners, centre, and their mirror images)."""
    decoder: str | None = None
    """Image files: pillow, or torchcodec (an extra: blpa[torchcodec]), which turns images by their EXIF orientation."""
    workers: int | None = field(default=None, compare=False)
    """Image files: processes that decode; 0 decodes in the training process, null is one per core, at most 16. Their
    number affects no result."""


IMAGE_FILES = ("train_sides", "colour", "check_side", "check_images", "test_side", "test_crops", "decoder")
"""Fields of DatasetConfig that every data set of image files gives, and no other."""


@dataclass
class ModeConfig:
    """What is saved of each activation for the backward pass (training/network.py has a table of the modes)."""

    name: str = MISSING
    """The mode's name in tables and file names."""
    layers: str = MISSING
    """stock: PyTorch's own layers. coded: ours. checkpoint: stock layers, recomputed in the backward pass. offload:
    stock layers that save activations in host memory. compiled: stock layers through torch.compile."""
    bits: int | None = None
    """Bits per element: 8, 4 or 2; null saves one full-precision tensor per BN-ReLU-conv. Coded layers only."""
    clip: float = 3.0
    """Half-width of the codec's range, in standard deviations of the channel."""
    forward_from_code: bool = False
    """Feed the decoded activation forward as well (the paper's naive baseline)."""
    codes_max_pool: bool = False
    """Save codes of the batch norm and ReLU before the max pool too, which the paper saves at full precision. Only
    the imagenet architecture has one. Coded layers only."""
    width_factor: float = 1.0
    """Factor on every channel count, on top of `width`."""
    segments: int | None = None
    """Checkpointed segments of the network; null is the square root of the number of blocks. Checkpoint layers only."""
    activation_memory_budget: float = 1.0
    """Fraction of the bytes that torch.compile saves, 0 to 1; it recomputes the rest. Compiled layers only."""
    fp8: bool = False
    """Save activations as 8-bit floats. Compiled layers only."""
    label: str = field(default="", compare=False)
    """The mode's name in tables and figures; empty shows `name`."""
    alpha: str = field(default="-", compare=False)
    """Saved bits per activation over 32, as the paper counts them, for the table of errors."""
    colour: str = field(default="#666666", compare=False)
    """Colour of the mode's lines in figures, #rrggbb."""
    order: int = field(default=1000, compare=False)
    """Position of the mode in tables and figures, the smallest first."""
    in_every_error_table: bool = field(default=False, compare=False)
    """Show the mode's row in the table of errors even where it was not run."""
    beside_paper: bool = field(default=False, compare=False)
    """Show the mode's row even where it was not run, in tables that also hold the paper's figures."""


MODE_LABELS = ("label", "alpha", "colour", "order", "in_every_error_table", "beside_paper")
"""Fields of ModeConfig for tables and figures. They affect no result and no comparison."""


@dataclass
class GpuConfig:
    """Where a run computes, and how."""

    name: str = MISSING
    """The option's name."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda."""
    precision: str = "auto"
    """tf32 (tensor cores round the factors of float32 products), bf16 (autocast), fp32 (strict), or auto: PyTorch's
    default for convolutions, which is tf32 on a CUDA GPU of compute capability 8.0 or later and fp32 elsewhere."""
    kernels: str = "auto"
    """Backend of the kernel functions: auto, torch, inductor or triton (CUDA only)."""
    cuda_graph: bool | None = None
    """Capture a training step as a CUDA graph and replay it; null does so on CUDA, in a run of one process."""
    deterministic: bool = True
    """Refuse operations whose result can differ between runs."""
    memory_gib: float | None = None
    """Memory that training may take, in GiB: the budget of max-batch; null is the whole card."""
    allowance_mib: int = 512
    """Part of that memory that is not counted, in MiB: the CUDA context and the workspaces of convolutions."""
    processes: int = 1
    """Processes that train one network together, each on a GPU of its own and on its part of every batch. Where
    torchrun or Slurm started them, as many as these started."""
    sync_batch_norm: bool = False
    """Whether batch norm takes the statistics of all processes' samples. Each takes those of its own otherwise, as the
    authors' code does."""
    from_other_processes: bool = False
    """Go on from a checkpoint that another number of processes wrote: iterations have the same images as without, the
    result other bits."""
    restarts: int = 0
    """Times that the processes begin again, from the last checkpoint, after one of them failed."""
    timeout_minutes: float = 10.0
    """Time for which a process waits for another one before it takes it for lost."""


@dataclass
class Config:
    """One run."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    mode: ModeConfig = field(default_factory=ModeConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    task: Any = MISSING
    """The task and its settings: the Settings of a module of runners/tasks."""
    depth: int = 164
    """Layers of the network, 9 n + 2 for n blocks per group: 164, 254, 488 and 1001 are the paper's. For ImageNet 26,
    50, 101 or 152, which is the paper's."""
    width: float = 1.0
    """Factor on every channel count: 4 is the paper's "4x"."""
    seed: int = 0
    """Seeds the weights, the order of the images and their augmentation."""
    resume: bool = True
    """Continue from the run's last good checkpoint; false starts anew and removes the old ones."""
    results: str = "results"
    """Folder for runs, records, tables and figures."""
    experiment: str = "single"
    """The group of table cells this run belongs to."""
    budget_minutes: float | None = None
    """Time limit of the command in minutes. Training stops in time and writes a checkpoint. A sweep starts no further
    cell that may not finish. With a launcher the limit holds per job."""
    jobs: int = 1
    """Training runs of a sweep that share one GPU, all in one process; elsewhere cells run one by one."""
    config_dir: str | None = None
    """Your own folder of options, in addition to conf, as --config-dir gives it: mode/mine.yaml."""
    run: str = MISSING
    """Folder of this run in results/runs; composed from the values that distinguish runs."""


LONGEST_NAME = 150
"""Characters of a name: file systems take 255, of which tasks and files append to the name of a run."""


def options(group: str, config_dir: str | None = None) -> list[str]:
    """List the options of a configuration group, by the names of its files.

    Args:
        group: a folder of conf, such as mode.
        config_dir: a folder with more options.
    """
    return sorted({file.stem for folder in folders(config_dir) for file in (folder / group).glob("*.yaml")})


def folders(config_dir: str | None) -> list[Path]:
    """List the folders of options, the one that takes precedence first."""
    return [*([Path(config_dir)] if config_dir else []), CONF]
