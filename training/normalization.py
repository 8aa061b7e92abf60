"""Networks whose published weights come with their normalizations folded in -> ones that can be trained on."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["normalized_convolutions", "standardize"]


def normalized_convolutions(network: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each convolution that a normalization follows, with it, from the input on."""
    before: nn.Module | None = None
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
            yield before, module
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            before = module


@torch.inference_mode()
def standardize(network: nn.Module, chips: Tensor) -> None:
    """Gives each normalization the statistics of its input, which folding lost, without changing any output.

    Afterwards the network behaves in training, where the statistics are the batch's, as it does in evaluation; and each
    kernel yields about unit variance, so that one learning rate suits all of them.

    Args:
        network: with loaded weights whose normalizations are folded; changed in place. Of others, what the
            normalizations divide by would be lost.
        chips: a sample of what the network takes.
    """

    def adopt(convolution: nn.Conv2d, norm: nn.BatchNorm2d, output: Tensor) -> Tensor:
        mean, std = output.mean((0, 2, 3)), output.std((0, 2, 3))
        std = torch.where(std > 1e-3 * std.median(), std, 1.0)  # channels that never answer stay as they are
        assert norm.running_mean is not None
        assert norm.running_var is not None
        convolution.weight.div_(std[:, None, None, None])
        norm.bias.add_(norm.weight * (mean - norm.running_mean))
        norm.weight.mul_(std)
        norm.running_mean.copy_(mean / std)
        norm.running_var.fill_(1 - norm.eps)
        return output / std[None, :, None, None]

    hooks = [
        convolution.register_forward_hook(lambda module, _, output, norm=norm: adopt(module, norm, output))
        for convolution, norm in normalized_convolutions(network)
    ]
    network.eval()(chips)
    for hook in hooks:
        hook.remove()
