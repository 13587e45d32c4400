"""Every example runs, and says what it promises."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn
from torchvision.models.vgg import VGG, cfgs, make_layers

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    assert sorted(p.stem for p in EXAMPLES.glob("[0-9]*.py")) == [
        "01_vgg16",
        "02_train",
        "03_inspect",
        "04_stream_large_image",
        "05_search_factors",
        "06_subnetworks",
        "07_splitnet",
        "08_plan",
        "09_operation",
        "10_vae_decoder",
    ]


def vgg16(**options: object) -> nn.Module:
    """Its layers with a quarter of its channels, and a narrow head: what is left out proves nothing here."""
    model = VGG(make_layers([one if one == "M" else int(one) // 4 for one in cfgs["D"]]), init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(128 * 7 * 7, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
    return model


def test_vgg16_runs_twice_in_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = example("01_vgg16")
    monkeypatch.setattr(one, "SHAPE", (1, 3, 32, 32))
    monkeypatch.setattr(one.torchvision.models, "vgg16", vgg16)
    for _ in range(2):
        one.main(tmp_path / "out")
    out = capsys.readouterr().out
    assert "÷" in out
    assert "split.onnx: ok" in out
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "plan.toml",
        "split",
        "split.onnx",
        "split.html",
    }


def test_a_split_trains(capsys: pytest.CaptureFixture[str]) -> None:
    dense, before, after = example("02_train").main(epochs=3)
    assert after > max(0.8, before)
    assert dense > 0.5
    assert "fine-tuned" in capsys.readouterr().out


def test_inspect_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = example("03_inspect").main(tmp_path, size=64)
    assert page.read_text().startswith("<!doctype html>")
    assert "5 blocks" in capsys.readouterr().out


def test_a_large_image_is_streamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logits, path = example("04_stream_large_image").main(tmp_path, size=256)
    assert logits.shape == (1, 1000)
    assert path.exists()


def test_factors_are_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = example("05_search_factors")
    monkeypatch.setattr(one, "network", lambda side, make=one.network: make(side, (4, 4, 8)))
    result = one.main(tmp_path / "search", epochs=1, tuned=1, data="digits")
    assert result.finished
    assert result.accuracy >= result.original - 0.5
    out = capsys.readouterr().out
    assert "digits: training the unsplit network on 930 images" in out
    assert "* selected" in out


def test_sub_models_share_one_set_of_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = example("06_subnetworks")
    monkeypatch.setattr(one, "network", lambda make=one.network: make((8, 12, 12)))
    accuracy = one.main(tmp_path / "out", epochs=2)
    assert min(accuracy.values()) > 60
    assert {p.name for p in (tmp_path / "out" / "bundle").iterdir()} == {
        "base.onnx",
        "sub0.onnx",
        "sub1.onnx",
        "weights.data",
        "manifest.json",
    }
    out = capsys.readouterr().out
    assert "sub1 enters here with" in out
    assert "with time enough" in out


def small() -> nn.Module:
    blocks = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))


def test_splitnet_learns_and_carves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)  # as where it is run as a script
    example("07_splitnet").main(samples=2000)
    out = capsys.readouterr().out
    assert "2 groups, from 24 to 8 channels" in out
    assert "split in two" in out


def test_a_plan_for_half_the_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = example("08_plan").main(tmp_path, size=128)
    assert found.best.same
    assert found.best.figures.peak_bytes <= found.now.figures.peak_bytes // 2
    assert "peak memory" in capsys.readouterr().out
    assert (tmp_path / "unet.html").exists()


def test_an_operation_of_ones_own_is_tiled() -> None:
    found = example("09_operation").main(size=64)
    assert found.max_rel < 1e-5
    assert found.after.peak_bytes < found.before.peak_bytes


def test_vae_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example("10_vae_decoder").main(tmp_path, side=16) <= 0.4
    found = re.search(r"largest difference: (\S+);", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) < 1e-4
    assert (tmp_path / "decoder.html").exists()
