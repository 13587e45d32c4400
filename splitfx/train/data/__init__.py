"""Data sets by a word: ``digits``, ``fashion-mnist``, ``cifar10:PATH``, ``cifar100:PATH``, ``imagefolder:PATH``.

Does: training and validation sets whose items are (float image [C, H, W], class number), normalised, the training set
with the augmentations of the papers: CIFAR padded by 4, cropped at random, flipped, normalised by channel (Fuengfusin
and Tamukoh, section 3); images of a folder cropped at random and flipped. Images come in the size the model takes.
Refuses (`TrainingError`): missing, incomplete or damaged files, with what to put where. Nothing is downloaded.
Promises: pickled CIFAR files are opened by torchvision only after their checksum is right; the binary form is plain
bytes. ``fashion-mnist`` without a path is that of Debian's package dataset-fashion-mnist. ``digits`` (scikit-learn's
1,797 handwritten digits, 8x8) is split once and for all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from splitfx.errors import MissingExtraError, TrainingError, nearest
from splitfx.ground import limits
from splitfx.ground.files import read_text
from splitfx.text import first_line
from splitfx.train.data.idx import read_idx

KINDS = ("digits", "fashion-mnist", "cifar10", "cifar100", "imagefolder")
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)
FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")  # of image files, as Pillow names them
Shape = tuple[int, int, int]


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Images in memory, [N, C, H, W], with class numbers and names; ``change`` is applied to each image drawn."""

    def __init__(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        classes: tuple[str, ...],
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.images, self.targets, self.classes, self.change = images, targets.long(), classes, change

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        return image if self.change is None else self.change(image), int(self.targets[index])


@dataclass(frozen=True)
class Data:
    """A data set by its word, split in what is trained and what is validated on."""

    word: str
    train: Dataset[Any]
    val: Dataset[Any]
    classes: tuple[str, ...]


def load_data(word: str, shape: Shape | None = None, augment: bool = True) -> Data:
    """The data set that ``word`` names, its images as ``shape`` [C, H, W], by default their own. Raises
    `TrainingError`."""
    kind, _, path = word.partition(":")
    if kind not in KINDS:
        raise TrainingError(f"there is no data set '{kind}'.{nearest(kind, KINDS)} Known: {', '.join(KINDS)}")
    if kind == "digits":
        if path:
            raise TrainingError("digits needs no path: write 'digits'")
        return _digits(shape)
    if kind == "fashion-mnist":
        return _fashion(word, path, shape, augment)
    if not path:
        raise TrainingError(f"{kind} needs a path: write '{kind}:FOLDER'")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise TrainingError(f"{word}: there is no folder {folder}")
    if kind == "imagefolder":
        return _folder(word, folder, shape or (3, 224, 224), augment)
    return _cifar(word, folder, kind, shape, augment)


# ---------------------------------------------------------------- digits


def _digits(shape: Shape | None) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(f"scikit-learn cannot be imported ({error}): pip install 'splitfx[train]'") from None
    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(np.asarray(pixels, np.float32)).view(-1, 1, 8, 8) / 16
    images = (images - images.mean()) / images.std()
    return divided("digits", _as(images, shape), torch.from_numpy(np.asarray(targets)), tuple("0123456789"))


def divided(word: str, images: torch.Tensor, targets: torch.Tensor, classes: tuple[str, ...]) -> Data:
    """Four of five samples of each class to train on; the same ones always."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held = torch.zeros(len(images), dtype=torch.bool)
    for number in range(len(classes)):
        mine = order[targets[order] == number]
        held[mine[: len(mine) // 5]] = True
    return Data(
        word, Images(images[~held], targets[~held], classes), Images(images[held], targets[held], classes), classes
    )


def _as(images: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    """Images [N, C, H, W] in another size; one channel may become several alike."""
    if shape is None or tuple(images.shape[1:]) == shape:
        return images
    if images.shape[1] not in (1, shape[0]):
        raise TrainingError(f"the images have {images.shape[1]} channels, the model takes {shape[0]}")
    sized = F.interpolate(images, shape[1:], mode="bilinear", align_corners=False)
    return sized.expand(-1, shape[0], -1, -1).contiguous()


# ---------------------------------------------------------------- Fashion-MNIST


def _fashion(word: str, path: str, shape: Shape | None, augment: bool) -> Data:
    folder = Path(path).expanduser() if path else FASHION
    if not folder.is_dir():
        what = "Install Debian's package dataset-fashion-mnist, or give a folder that holds its four files"
        raise TrainingError(f"{word}: there is no folder {folder}. {what}: 'fashion-mnist:FOLDER'")
    if (folder / "FashionMNIST" / "raw").is_dir():  # torchvision's place for it
        folder = folder / "FashionMNIST" / "raw"
    sets = []
    for part in ("train", "t10k"):
        images = read_idx(_idx_file(word, folder, f"{part}-images-idx3-ubyte"), 3)
        targets = read_idx(labels := _idx_file(word, folder, f"{part}-labels-idx1-ubyte"), 1)
        if len(images) != len(targets) or len(images) == 0:
            raise TrainingError(f"{word}: {labels} has {len(targets)} labels for {len(images)} images")
        if targets.max() >= len(FASHION_CLASSES):
            raise TrainingError(f"{labels}: a label is {targets.max()}, there are {len(FASHION_CLASSES)} classes")
        change = _prepared(FASHION_MEAN, FASHION_STD, shape, _flip() if augment and part == "train" else [])
        pixels = torch.from_numpy(images)[:, None]
        sets.append(Images(pixels, torch.from_numpy(targets), FASHION_CLASSES, change))
    return Data(word, sets[0], sets[1], FASHION_CLASSES)


def _idx_file(word: str, folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise TrainingError(f"{word}: {folder / name}, or the same with .gz, is missing")


def _flip() -> list[Any]:
    from torchvision.transforms import v2

    return [v2.RandomHorizontalFlip()]


# ---------------------------------------------------------------- CIFAR


def _cifar(word: str, folder: Path, kind: str, shape: Shape | None, augment: bool) -> Data:
    binary = folder / ("cifar-10-batches-bin" if kind == "cifar10" else "cifar-100-binary")
    read = _cifar_binary if binary.is_dir() else _cifar_python
    parts = [read(word, binary if binary.is_dir() else folder, kind, train) for train in (True, False)]
    mean, std = (CIFAR_MEAN, CIFAR_STD) if kind == "cifar10" else (CIFAR100_MEAN, CIFAR100_STD)
    made = []
    for (images, targets, classes), train in zip(parts, (True, False), strict=True):
        change = _prepared(mean, std, shape, _crop_and_flip() if train and augment else [])
        made.append(Images(images, targets, classes, change))
    return Data(word, made[0], made[1], parts[0][2])


def _crop_and_flip() -> list[Any]:
    from torchvision.transforms import v2

    return [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]


def _prepared(mean: Any, std: Any, shape: Shape | None, drawn: list[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What is done to an image of bytes: what is ``drawn``, then the size and the channels of ``shape``, then scale."""
    from torchvision.transforms import v2

    channels = len(mean)
    if shape is not None and channels not in (1, shape[0]):
        raise TrainingError(f"the images have {channels} channels, the model takes {shape[0]}")
    steps = list(drawn)
    if shape is not None:
        steps.append(v2.Resize(shape[1:], antialias=True))  # the same size is left as it is
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    if shape is not None and channels != shape[0]:
        steps.append(lambda image: image.expand(shape[0], -1, -1))
    return v2.Compose(steps)


def _cifar_binary(word: str, folder: Path, kind: str, train: bool) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The binary version: per image its label (CIFAR-100: coarse, then fine) and 3x32x32 bytes. torchvision reads
    pickles only, and a folder of the user's that is plain bytes must not need one."""
    labels = 1 if kind == "cifar10" else 2
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    names = names if kind == "cifar10" else ["train.bin" if train else "test.bin"]
    listed = folder / ("batches.meta.txt" if kind == "cifar10" else "fine_label_names.txt")
    rows = []
    for path in (folder / name for name in names):
        if not path.is_file():
            raise TrainingError(f"{word}: {path} is missing; unpack the whole archive of CIFAR's binary version")
        flat = np.fromfile(path, np.uint8)
        if flat.size == 0 or flat.size % (3072 + labels):
            raise TrainingError(
                f"{word}: {path} has {flat.size} bytes, not a multiple of {3072 + labels}: it is damaged or cut off"
            )
        rows.append(flat.reshape(-1, 3072 + labels))
    table = np.concatenate(rows)
    classes = _class_names(word, listed) if listed.is_file() else ()
    count = 10 if kind == "cifar10" else 100
    classes = classes if len(classes) == count else tuple(map(str, range(count)))
    targets = torch.from_numpy(table[:, labels - 1].astype(np.int64))
    if int(targets.max()) >= count:
        raise TrainingError(f"{word}: a label is {int(targets.max())}, {kind} has {count} classes: a file is damaged")
    return torch.from_numpy(table[:, labels:].reshape(-1, 3, 32, 32).copy()), targets, classes


def _class_names(word: str, path: Path) -> tuple[str, ...]:
    try:
        return tuple(read_text(path, most=limits.PLAN_BYTES).split())
    except OSError as error:
        raise TrainingError(f"{word}: {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise TrainingError(f"{word}: {path} is no list of names: {error}") from None


def _cifar_python(word: str, folder: Path, kind: str, train: bool) -> tuple[torch.Tensor, torch.Tensor, Any]:
    from torchvision import datasets

    cls = datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100
    try:
        found = cls(str(folder), train=train, download=False)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise TrainingError(
            f"{word}: CIFAR is not there, or its files are damaged ({first_line(error)}). Put the folder "
            f"'{cls.base_folder}' of the archive {cls.filename} into {folder}, or that of the binary version"
        ) from error
    images = torch.from_numpy(np.ascontiguousarray(found.data.transpose(0, 3, 1, 2)))
    return images, torch.as_tensor(found.targets), tuple(found.classes)


# ---------------------------------------------------------------- a folder of images


def _folder(word: str, folder: Path, shape: Shape, augment: bool) -> Data:
    from torchvision import datasets
    from torchvision.transforms import v2

    if shape[0] != 3:
        raise TrainingError(f"{word}: images have 3 channels, the model takes {shape[0]}")
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    size = shape[1:]
    larger = [round(s * 256 / 224) for s in size]
    plain = [v2.Resize(max(larger), antialias=True), v2.CenterCrop(size), *finish]
    drawn = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *finish]
    sets = []
    for name, steps in (("train", drawn if augment else plain), ("val", plain)):
        part = folder / name
        if not part.is_dir():
            raise TrainingError(
                f"{word}: {part} is missing; an image folder holds train/CLASS/*.jpg and val/CLASS/*.jpg"
            )
        try:
            sets.append(datasets.ImageFolder(str(part), v2.Compose(steps), loader=_image))
        except (FileNotFoundError, OSError) as error:
            raise TrainingError(f"{word}: {first_line(error)}") from error
    if sets[0].classes != sets[1].classes:
        only = sorted(set(sets[0].classes) ^ set(sets[1].classes))
        raise TrainingError(f"{word}: train and val have different classes: {', '.join(only[:5])}")
    return Data(word, sets[0], sets[1], tuple(sets[0].classes))


def _image(path: str) -> Any:
    """One of `FORMATS`, known by its content: behind other names are decoders that start programs. Named in the error,
    unlike in torchvision's own loader."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged tags, and of sizes, which are looked at below
            with Image.open(path, formats=FORMATS) as opened:
                return _rgb(path, opened)
    except TrainingError:
        raise
    except Exception as error:  # what a damaged file makes of a decoder may be anything
        raise TrainingError(f"{path} cannot be read as an image: {error}") from error


def _rgb(path: str, opened: Any) -> Any:
    width, height = opened.size
    if width * height > limits.PIXELS:
        raise TrainingError(f"{path} has {width} x {height} pixels; an image has at most {limits.PIXELS}")
    if opened.mode.startswith(("I", "F")):  # these would be cut off at 255
        raise TrainingError(f"{path} has pixels of more than 8 bits; convert it to 8 bits")
    return opened.convert("RGB")
