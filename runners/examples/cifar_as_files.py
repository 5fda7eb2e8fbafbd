"""Write CIFAR-10 or CIFAR-100 as image files in class folders, as ImageNet lies on disk.

    python -m runners.examples.cifar_as_files --root data --out data/cifar10-files
    blpa-run dataset=cifar10-files

The folder gets its name when everything is in it, so one that is there is whole.
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from PIL import Image
from tqdm import tqdm

from runners.config import DatasetConfig
from runners.data import cifar
from runners.errors import UserError
from runners.option_files import option

FORMATS: dict[str, dict[str, Any]] = {"jpg": {"quality": 95}, "png": {}}
"""Options of Pillow's save by file extension."""


def write(name: str, root: str, out: Path, extension: str) -> None:
    """Write a data set's images to out/train/<class>/00000.jpg and out/val/<class>/00000.jpg, numbered by split.

    Args:
        name: cifar10 or cifar100.
        root: folder of the published files; what is missing is downloaded into it.
        out: the new folder.
        extension: jpg (quality 95, which changes the images a little) or png.

    Raises:
        UserError: `out` is there already; or see runners.data.cifar.read.
    """
    if out.exists():
        raise UserError(f"--out={out} is there already: remove it to have it written again")
    config = recipe(name, root)
    splits = dict(zip(("train", "val"), cifar.read(config), strict=True))
    classes = cifar.class_names(config)
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{out.name}.*.part"):  # by a killed process
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".part") as part:
        for split, (images, labels) in splits.items():
            folder = Path(part, "whole", split)
            for label in classes:
                (folder / label).mkdir(parents=True)
            numbered = zip(images.permute(0, 2, 3, 1).numpy(), labels.tolist(), strict=True)
            for number, (pixels, label) in enumerate(tqdm(numbered, split, total=len(labels))):
                file = folder / classes[label] / f"{number:05}.{extension}"
                Image.fromarray(pixels).save(file, **FORMATS[extension])
        Path(part, "whole").rename(out)


def recipe(name: str, root: str) -> DatasetConfig:
    """Return the settings of a data set as published, with another folder."""
    published = OmegaConf.merge(OmegaConf.structured(DatasetConfig), option("dataset", name))
    return replace(cast(DatasetConfig, OmegaConf.to_object(published)), root=root)


def main() -> None:
    """Read the command line, and write the files."""
    parser = argparse.ArgumentParser(prog="python -m runners.examples.cifar_as_files", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--name", default="cifar10", choices=list(cifar.SOURCES), help="the data set")
    parser.add_argument("--root", default="data", help="folder of the published files, downloaded if missing")
    parser.add_argument("--out", type=Path, default=Path("data/cifar10-files"), help="the new folder")
    parser.add_argument("--format", default="jpg", choices=list(FORMATS), help="jpg of quality 95, or png")
    given = parser.parse_args()
    try:
        write(given.name, given.root, given.out, given.format)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
