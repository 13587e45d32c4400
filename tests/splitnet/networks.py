"""Networks that SplitNet is tried on, small or at small images, with a flat and a hierarchical split each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torchvision
from torch import fx, nn
from torchvision.models.vision_transformer import VisionTransformer

import splitfx
from benchmarks.networks import WideResNet
from splitfx.splitnet import Assignment
from splitfx.splitnet.structure import Structure

Levels = dict[str, int]


def vit() -> nn.Module:
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    head: Any = model.heads
    for weight in (head.head.weight, model.class_token):  # torchvision starts them at zero
        nn.init.normal_(weight)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], int, Levels, Levels]] = {
    "wrn": (
        lambda: WideResNet(16, 2, 20),
        32,
        {"stage[23].*": 2, "fc": 2},
        {"stage2.*": 2, "stage3.*": 4, "fc": 4},
    ),
    "alexnet": (
        torchvision.models.alexnet,
        96,
        {"features.[68]": 2, "features.10": 2, "classifier.*": 2},
        {"features.8": 2, "features.10": 2, "classifier.1": 2, "classifier.4": 4, "classifier.6": 4},
    ),
    "resnet18": (
        torchvision.models.resnet18,
        64,
        {"layer4.*": 2, "fc": 2},
        {"layer3.*": 2, "layer4.*": 4, "fc": 4},
    ),
    "vgg16": (
        torchvision.models.vgg16,
        32,
        {"features.2[468]": 2, "classifier.*": 2},
        {"features.2[468]": 2, "classifier.*": 4},
    ),
    "densenet121": (
        torchvision.models.densenet121,
        32,
        {"*denseblock4*": 2, "classifier": 2},
        {"*denseblock3*": 2, "*transition3*": 2, "*denseblock4*": 4, "classifier": 4},
    ),
    "mobilenet_v2": (
        torchvision.models.mobilenet_v2,
        32,
        {"features.1[4-8].*": 2, "classifier.1": 2},
        {"features.1[4-6].*": 2, "features.1[78].*": 4, "classifier.1": 4},
    ),
    "shufflenet_v2": (
        torchvision.models.shufflenet_v2_x1_0,
        32,
        {"stage4.*": 2, "conv5.*": 2, "fc": 2},
        {"stage3.*": 2, "stage4.*": 4, "conv5.*": 4, "fc": 4},
    ),
    "efficientnet_b0": (
        torchvision.models.efficientnet_b0,
        32,
        {"features.[78].*": 2, "classifier.1": 2},
        {"features.6.*": 2, "features.[78].*": 4, "classifier.1": 4},
    ),
    "vit": (
        vit,
        32,
        {"encoder.layers.encoder_layer_[12].*": 2},
        {"encoder.layers.encoder_layer_1.*": 2, "encoder.layers.encoder_layer_2.*": 4},
    ),
}


@cache
def traced(name: str) -> fx.GraphModule:
    """The graph of a case, not to be changed, with running statistics that are not left at zero and one."""
    make, size, *_ = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif key.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return splitfx.trace(model, torch.zeros(1, 3, size, size))


def ragged(found: Structure, seed: int = 0) -> Assignment:
    """Groups of very different sizes, none empty."""
    rng = np.random.default_rng(seed)
    labels = {}
    for name, v in found.vectors.items():
        odds = np.arange(1, v.level + 1) / sum(range(1, v.level + 1))
        rest = rng.choice(v.level, v.size - v.level, p=odds)
        labels[name] = rng.permutation(np.concatenate([np.arange(v.level), rest]))
    return Assignment(labels)
