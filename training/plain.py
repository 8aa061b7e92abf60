"""timm's layers -> torch's own, which are all that torch knows how to quantize."""

from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

__all__ = ["make_plain"]


def make_plain(backbone: nn.Module) -> bool:
    """Replaces timm's layers by torch's; the backbone computes the same.

    TensorFlow pads an even side of a strided convolution at its far end only. torch pads both ends, but then needs the
    near one alone. So a backbone with TensorFlow's padding is turned by 180 degrees, kernel by kernel.

    Args:
        backbone: in evaluation mode; changed in place.

    Returns:
        Whether the backbone takes its chips upside down from now on.
    """
    turned = any(isinstance(module, Conv2dSame) for module in backbone.modules())
    if turned:
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = nn.Parameter(module.weight.detach().flip(2, 3), requires_grad=False)
    _replace(backbone)
    return turned


def _replace(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, BatchNormAct2d):
            norm = nn.BatchNorm2d(child.num_features, eps=child.eps)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, nn.Sequential(norm, child.act).eval())
        elif isinstance(child, Conv2dSame):
            setattr(module, name, _padded_on_both_ends(child))
        else:
            _replace(child)


def _padded_on_both_ends(convolution: nn.Conv2d) -> nn.Conv2d:
    (kernel, _), (stride, _), (dilation, _) = convolution.kernel_size, convolution.stride, convolution.dilation
    plain = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        kernel,
        stride,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        groups=convolution.groups,
        bias=convolution.bias is not None,
    )
    plain.load_state_dict(convolution.state_dict())
    return plain.eval()
