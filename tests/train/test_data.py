"""Data sets by a word; CIFAR from files of the true formats, written here."""

from __future__ import annotations

import gzip
import hashlib
import pickle  # noqa: TID251 - the archive of CIFAR's python version holds pickles, and this test writes one
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from splitfx.errors import TrainingError
from splitfx.train import data
from splitfx.train.data import CIFAR_MEAN, CIFAR_STD, FASHION_MEAN, FASHION_STD, _as, load_data
from tests.train.networks import planted


def rows(count: int, labels: int, classes: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    table = draw.integers(0, 256, (count, labels + 3072), np.uint8)
    table[:, labels - 1] = np.arange(count) % classes
    return table


def cifar10_binary(root: Path) -> np.ndarray:
    """Five training batches of 4 images, and one to test on; returns the first."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    tables = [rows(4, 1, 10, i) for i in range(6)]
    for name, table in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], tables, strict=True):
        (folder / f"{name}.bin").write_bytes(table.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"name{i}" for i in range(10)) + "\n\n")
    return tables[0]


def test_binary_cifar10_byte_by_byte(tmp_path: Path) -> None:
    table = cifar10_binary(tmp_path)
    made = load_data(f"cifar10:{tmp_path}", augment=False)
    assert (len(made.train), len(made.val)) == (20, 4)  # type: ignore[arg-type]
    assert made.classes[3] == "name3"
    for index in range(4):
        image, label = made.train[index]
        assert label == table[index, 0]
        pixels = torch.from_numpy(table[index, 1:].reshape(3, 32, 32).copy()).float() / 255
        wanted = (pixels - torch.tensor(CIFAR_MEAN)[:, None, None]) / torch.tensor(CIFAR_STD)[:, None, None]
        torch.testing.assert_close(image, wanted)


def test_augmentation_of_the_papers(tmp_path: Path) -> None:
    """A padded crop, perhaps flipped: every image is one of 9 x 9 x 2, and the validation set has none."""
    cifar10_binary(tmp_path)
    made, plain = load_data(f"cifar10:{tmp_path}"), load_data(f"cifar10:{tmp_path}", augment=False)
    zero = (0 - torch.tensor(CIFAR_MEAN)[:, None, None]) / torch.tensor(CIFAR_STD)[:, None, None]
    padded = zero.expand(3, 40, 40).clone()
    padded[:, 4:36, 4:36] = plain.train[0][0]
    torch.manual_seed(0)
    places = set()
    for _ in range(40):
        image = made.train[0][0]
        found = [
            (top, left, flipped)
            for top in range(9)
            for left in range(9)
            for flipped in (False, True)
            if torch.allclose(
                image, padded[:, top : top + 32, left : left + 32].flip(2 if flipped else ()), atol=1e-5
            )
        ]  # fmt: skip
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 25
    assert {flipped for _, _, flipped in places} == {False, True}
    assert torch.equal(made.val[0][0], made.val[0][0])


def test_binary_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for name, count in (("train", 6), ("test", 3)):
        (folder / f"{name}.bin").write_bytes(rows(count, 2, 100, count).tobytes())
    made = load_data(f"cifar100:{tmp_path}")
    assert [made.train[i][1] for i in range(6)] == list(range(6))
    assert len(made.classes) == 100


def test_pickled_cifar_is_opened_after_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    table = rows(4, 1, 10, 0)

    def put(name: str, content: Any) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    batch = {"data": table[:, 1:], "labels": table[:, 0].tolist()}
    train = [put(f"data_batch_{i}", batch) for i in range(1, 6)]
    test = [put("test_batch", batch)]
    meta = put("batches.meta", {"label_names": [f"name{i}" for i in range(10)]})
    with pytest.raises(TrainingError, match="not there, or its files are damaged"):
        load_data(f"cifar10:{tmp_path}")  # the checksums are not the true files'
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    made = load_data(f"cifar10:{tmp_path}", augment=False)
    binary = table[1, 1:].reshape(3, 32, 32) / 255
    image = made.train[1][0] * torch.tensor(CIFAR_STD)[:, None, None] + torch.tensor(CIFAR_MEAN)[:, None, None]
    np.testing.assert_allclose(image.numpy(), binary, atol=1e-6)
    assert made.classes[2] == "name2"


def test_damaged_cifar(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="Put the folder 'cifar-10-batches-py'"):
        load_data(f"cifar10:{tmp_path}")
    cifar10_binary(tmp_path)
    batch = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    batch.write_bytes(batch.read_bytes()[:-7])
    with pytest.raises(TrainingError, match=r"data_batch_3.bin has 12285 bytes, not a multiple of 3073: .* cut off"):
        load_data(f"cifar10:{tmp_path}")
    batch.unlink()
    with pytest.raises(TrainingError, match=r"data_batch_3.bin is missing"):
        load_data(f"cifar10:{tmp_path}")
    batch.write_bytes(rows(4, 1, 10, 1).tobytes())
    spoilt = rows(4, 1, 10, 1)
    spoilt[2, 0] = 77
    batch.write_bytes(spoilt.tobytes())
    with pytest.raises(TrainingError, match="a label is 77, cifar10 has 10 classes"):
        load_data(f"cifar10:{tmp_path}")


def test_folder_of_images(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 30), (i * 60, 10, 20)).save(tmp_path / part / name / f"{i}.png")
    made = load_data(f"imagefolder:{tmp_path}", (3, 24, 20))
    assert made.classes == ("cat", "dog")
    assert made.train[0][0].shape == made.val[3][0].shape == (3, 24, 20)
    assert made.val[3][1] == 1
    (tmp_path / "val" / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(TrainingError, match=r"0.png cannot be read as an image"):
        [load_data(f"imagefolder:{tmp_path}", (3, 24, 20)).val[i] for i in range(4)]
    (tmp_path / "train" / "eel").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "train" / "eel" / "0.png")
    with pytest.raises(TrainingError, match="different classes: eel"):
        load_data(f"imagefolder:{tmp_path}")
    with pytest.raises(TrainingError, match=r"train is missing; an image folder holds train/CLASS"):
        load_data(f"imagefolder:{tmp_path / 'val'}")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("digit", "Did you mean 'digits'"),
        ("cifar10", "write 'cifar10:FOLDER'"),
        ("digits:/data", "digits needs no path"),
        ("cifar10:/no/such/folder", "there is no folder"),
    ],
)
def test_words_that_are_refused(word: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        load_data(word)


def test_digits_in_the_size_a_model_takes() -> None:
    made = load_data("digits", (3, 32, 32))
    assert made.train[0][0].shape == (3, 32, 32)
    assert len(made.train) + len(made.val) == 1797  # type: ignore[arg-type]
    plain = load_data("digits")
    assert plain.train[0][0].shape == (1, 8, 8)
    counts = [int((plain.val.targets == c).sum()) for c in range(10)]  # type: ignore[attr-defined]
    assert min(counts) >= 34
    with pytest.raises(TrainingError, match="have 2 channels"):
        _as(torch.zeros(1, 2, 4, 4), (3, 4, 4))


def test_planted_groups_are_nearer_to_themselves() -> None:
    made = planted(noise=0.0)
    means = torch.stack([made.train.images[made.train.targets == c].mean(0).flatten() for c in range(6)])  # type: ignore[attr-defined]
    far = torch.cdist(means, means)
    within = max(float(far[a, b]) for a in range(6) for b in range(6) if a // 3 == b // 3)
    across = min(float(far[a, b]) for a in range(6) for b in range(6) if a // 3 != b // 3)
    assert within < across
    assert made.classes == ("a0", "a1", "a2", "b0", "b1", "b2")


def fashion(root: Path, count: int = 12) -> np.ndarray:
    """Four files as the package has them, gzipped; returns the training images."""
    draw = np.random.default_rng(0)
    for part, many in (("train", count), ("t10k", 5)):
        images = draw.integers(0, 256, (many, 28, 28), np.uint8)
        put_idx(root / f"{part}-images-idx3-ubyte.gz", images)
        put_idx(root / f"{part}-labels-idx1-ubyte.gz", (np.arange(many) % 10).astype(np.uint8))
        if part == "train":
            train = images
    return train


def put_idx(path: Path, array: np.ndarray, magic: bytes | None = None) -> None:
    head = (magic or bytes((0, 0, 8, array.ndim))) + b"".join(n.to_bytes(4) for n in array.shape)
    whole = head + array.tobytes()
    path.write_bytes(gzip.compress(whole) if path.suffix == ".gz" else whole)


def test_fashion_mnist_byte_by_byte(tmp_path: Path) -> None:
    images = fashion(tmp_path)
    made = load_data(f"fashion-mnist:{tmp_path}", augment=False)
    assert (len(made.train), len(made.val), made.classes[9]) == (12, 5, "Boot")  # type: ignore[arg-type]
    for index in (0, 11):
        image, label = made.train[index]
        assert label == index % 10
        wanted = (torch.from_numpy(images[index]).float() / 255 - FASHION_MEAN[0]) / FASHION_STD[0]
        torch.testing.assert_close(image, wanted[None])
    assert load_data(f"fashion-mnist:{tmp_path}", (3, 32, 32)).val[0][0].shape == (3, 32, 32)
    drawn = load_data(f"fashion-mnist:{tmp_path}")
    torch.manual_seed(0)
    seen = [drawn.train[0][0] for _ in range(20)]
    plain = made.train[0][0]
    assert all(torch.equal(s, plain) or torch.equal(s, plain.flip(2)) for s in seen)
    assert len({torch.equal(s, plain) for s in seen}) == 2
    raw = tmp_path / "torchvision" / "FashionMNIST" / "raw"  # unpacked, where torchvision has it
    raw.mkdir(parents=True)
    for file in tmp_path.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    other = load_data(f"fashion-mnist:{tmp_path / 'torchvision'}", augment=False)
    assert torch.equal(other.train[3][0], made.train[3][0])


def test_damaged_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fashion(tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    whole, few = images.read_bytes(), labels.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(TrainingError, match=match):
            load_data(f"fashion-mnist:{tmp_path}")

    images.write_bytes(whole[:-300])
    refused("train-images-idx3-ubyte.gz cannot be read, it is damaged or cut off")
    images.write_bytes(gzip.compress(gzip.decompress(whole)[:-300]))
    refused(r"has 9108 of the 9408 bytes that its header says")
    images.write_bytes(gzip.compress(gzip.decompress(whole) + b"more"))
    refused("has more than the 9408 bytes")
    put_idx(images, np.zeros((2, 28, 28), np.uint8), magic=b"\x00\x00\x0d\x03")
    refused("no idx file of 3 dimensions: it starts with 00 00 0d 03")
    images.write_bytes(gzip.compress(bytes((0, 0, 8, 3)) + b"\xff" * 12))
    refused("is more than")  # of numbers that any machine holds; nothing of that size is allocated
    images.write_bytes(b"")
    refused("starts with nothing")
    images.write_bytes(whole)
    put_idx(labels, np.zeros(3, np.uint8))
    refused("has 3 labels for 12 images")
    put_idx(labels, np.full(12, 10, np.uint8))
    refused("a label is 10, there are 10 classes")
    labels.unlink()
    refused("train-labels-idx1-ubyte, or the same with .gz, is missing")
    labels.write_bytes(few)
    assert len(load_data(f"fashion-mnist:{tmp_path}").train) == 12  # type: ignore[arg-type]
    monkeypatch.setattr(data, "FASHION", tmp_path / "none")
    with pytest.raises(TrainingError, match="no folder .*none. Install Debian's package dataset-fashion-mnist"):
        load_data("fashion-mnist")
