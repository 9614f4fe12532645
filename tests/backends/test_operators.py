"""Operators in the ONNX file: the parity gate passes and ONNX Runtime computes what the simulation does, or one line says why not."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx
import pytest
import torch
import torch.nn.functional as F
from networks import conv_bn, randomise, settle
from torch import nn

from dfq import Recipe, quantize_data_free
from utils.backends.onnxruntime.export import build, check_parity
from utils.backends.onnxruntime.session import OnnxNetwork, find_kernels
from utils.backends.torch_onnx import Input, exported_by_torch
from utils.core.errors import UserError
from utils.core.input_spec import InputSpec
from utils.graph.nodes import module_of, weighted_nodes
from utils.passes.exactness import probed_outputs

SPEC = InputSpec(size=(12, 12), resize=12)
RECIPE = Recipe(quantize=True, equalize=True, correction=True)


class Around(nn.Module):
    """A convolution, something else, and a convolution that reads the result."""

    def __init__(self, middle: nn.Module | Callable, channels: int = 8):
        super().__init__()
        self.first, self.middle, self.last = conv_bn(3, 8, 3, padding=1), middle, conv_bn(channels, 4, 1)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Squeeze(nn.Module):
    """Squeeze-and-excitation with a gate."""

    def __init__(self, gate: Callable):
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), gate

    def forward(self, x):
        return x * self.gate(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Unpool(nn.Module):
    """Maxima go back to where they stood. wider: columns that the result has more than what was pooled."""

    def __init__(self, *window: int, wider: int = 0):
        super().__init__()
        self.pool, self.wider = nn.MaxPool2d(*window, return_indices=True), wider
        self.layer, self.unpool = conv_bn(8, 8, 1), nn.MaxUnpool2d(2)

    def forward(self, x):
        maxima, places = self.pool(x)
        return self.unpool(self.layer(maxima), places, output_size=(x.shape[2], x.shape[3] + self.wider))


class Attention(nn.Module):
    """Two heads over the positions; fused: torch's operator for it."""

    def __init__(self, fused: bool):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.fused = fused

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (f(tokens).unflatten(2, (2, 4)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v) if self.fused else torch.softmax(q @ k.mT / 2, -1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)


def normalised(x):
    """A norm in words, whose mean is 0 but for rounding where x is normalised already."""
    return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()


class BatchSecond(nn.Module):
    """torch's own attention, which puts positions before images."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)


class LastNorm(nn.Module):
    """LayerNorm over channels, as ConvNeXt has it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class As(nn.Module):
    """A layer on a reshaped tensor: of one dimension (all positions in a row) or three (channels as planes of depth)."""

    def __init__(self, dims: int, layer: Callable):
        super().__init__()
        self.dims, self.layer = dims, layer

    def forward(self, x):
        if self.dims == 1:
            return self.layer(x.flatten(2)).unsqueeze(3)
        return self.layer(x.unflatten(1, (2, 4))).flatten(1, 2)


@dataclass
class Function(nn.Module):
    """A function behind a convolution without activation."""

    function: Callable

    def __post_init__(self):
        super().__init__()
        self.layer = conv_bn(8, 8, 1, activation=None)

    def forward(self, x):
        return self.function(self.layer(x))

    __hash__ = nn.Module.__hash__


class Einsum(nn.Module):
    """A layer by einsum. first: whether its weight is the first operand."""

    def __init__(self, equation: str, first: bool = False):
        super().__init__()
        self.equation, self.first, self.weight = equation, first, nn.Parameter(torch.randn(8, 8) * 0.5)

    def forward(self, x):
        return torch.einsum(self.equation, *((self.weight, x) if self.first else (x, self.weight)))


class EachImage(nn.Module):
    """A convolution whose weights are mixed for every image, all images in one call: CondConv."""

    def __init__(self, groups: int, bias: bool):
        super().__init__()
        self.routing, self.groups = nn.Linear(8, 3), groups
        self.experts = nn.Parameter(torch.randn(3, 8 * 8 // groups * 9) / 5)
        self.biases = nn.Parameter(torch.randn(3, 8)) if bias else None

    def forward(self, x):
        images, channels, *sides = x.shape
        shares = torch.sigmoid(self.routing(x.mean((2, 3))))
        kernels = (shares @ self.experts).view(images * 8, channels // self.groups, 3, 3)
        bias = None if self.biases is None else (shares @ self.biases).view(-1)
        y = F.conv2d(x.reshape(1, -1, *sides), kernels, bias, 2, 2, 2, groups=images * self.groups)
        return y.view(images, 8, *y.shape[2:])


class Beside(nn.Module):
    """What torch.onnx writes as a loop over its operands."""

    def forward(self, x):
        return torch.hstack([x, x.flip(1)])


class Merge(nn.Module):
    """A constant matrix times what a kernel lies on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 72) / 8)

    def forward(self, x):
        return F.fold(self.weight @ F.unfold(x, 3, padding=1), x.shape[2:], 1)


def fractions(x):
    """Where a sampling grid points that is the same for all images."""
    side = torch.linspace(-0.9, 0.9, 7)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)[None]
    return F.grid_sample(x, grid.expand(x.shape[0], -1, -1, -1), align_corners=False)


MIDDLES = {
    "max pooling": nn.MaxPool2d(3, 2, 1),
    "max pooling, partial windows, dilated": nn.Sequential(
        nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2, 1, 0, 2)
    ),
    "max pooling behind -inf": lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2),
    "max pooling, 1d": As(1, nn.MaxPool1d(3, 2)),
    "max pooling, 3d": As(3, nn.MaxPool3d((1, 2, 2))),
    "unpooling": Unpool(2, 2),
    "unpooling, overlapping windows": Unpool(3, 2, 1),
    "average pooling": nn.AvgPool2d(2),
    "average pooling, partial windows": nn.AvgPool2d(5, 2, 1, ceil_mode=True),
    "average pooling without padding": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "average pooling, own divisor": nn.AvgPool2d(2, divisor_override=3),
    "pooling of shuffled channels": lambda x: (
        x + F.adaptive_avg_pool2d(x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2), 1)
    ),
    "adaptive pooling, even windows": nn.AdaptiveAvgPool2d(4),
    "adaptive pooling, uneven windows": nn.AdaptiveAvgPool2d((5, 7)),
    "adaptive pooling, 1d": As(1, nn.AdaptiveAvgPool1d(7)),
    "adaptive pooling, 3d": As(3, nn.AdaptiveAvgPool3d((4, 5, 7))),  # depth stays
    "adaptive maximum, uneven windows": nn.AdaptiveMaxPool2d((5, 7)),
    "zeros before a convolution": nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), conv_bn(8, 8, 3)),
    "padding modes": nn.Sequential(nn.ReflectionPad2d(2), nn.ReplicationPad2d((1, 2, 3, 0)), nn.CircularPad2d(2)),
    "a convolution's padding modes": nn.Sequential(
        *(conv_bn(8, 8, 3, padding=1, padding_mode=mode) for mode in ("reflect", "replicate", "circular")),
        conv_bn(8, 8, (3, 4), padding="same"),
    ),
    "padding of ones, cut": lambda x: F.pad(F.pad(x, (1, 1, 1, 1), value=1.0), (-1, 2, 1, -2)),
    "dilated depthwise": conv_bn(8, 8, 3, padding=2, dilation=2, groups=8, activation=nn.ReLU6),
    "convolution, 1d": As(1, nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())),
    "convolution, 3d": As(3, nn.Sequential(nn.Conv3d(2, 2, 3, padding=1), nn.BatchNorm3d(2), nn.ReLU())),
    "transposed": nn.Sequential(nn.ConvTranspose2d(8, 8, 3, 2, 1, 1), nn.BatchNorm2d(8), nn.ReLU()),
    "transposed, grouped": nn.ConvTranspose2d(8, 8, 2, 2, groups=4),
    "transposed, 1d": As(1, nn.ConvTranspose1d(8, 8, 2, 2)),
    "transposed, 3d": As(3, nn.ConvTranspose3d(2, 2, (1, 2, 2), (1, 2, 2))),
    "weights of each image's own": EachImage(1, bias=False),
    "weights of each image's own, depthwise": EachImage(8, bias=True),
    "a layer as a product with patches": Merge(),
    "nearest": nn.Upsample(scale_factor=2),
    "nearest by a factor": nn.Upsample(scale_factor=1.7),
    "nearest to a size": nn.Upsample(size=(7, 19)),
    "nearest, 1d": As(1, nn.Upsample(scale_factor=2)),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bilinear by a factor": nn.Upsample(scale_factor=1.7, mode="bilinear"),
    "bilinear, corners aligned": nn.Upsample(size=(31, 17), mode="bilinear", align_corners=True),
    "linear": As(1, nn.Upsample(scale_factor=2, mode="linear")),
    "trilinear": As(3, nn.Upsample(scale_factor=(1, 2, 2), mode="trilinear")),
    "bicubic": nn.Upsample(size=(20, 21), mode="bicubic"),
    "hardswish": Function(F.hardswish),
    "silu": Function(F.silu),
    "gelu": Function(F.gelu),
    "gelu by tanh": Function(lambda x: F.gelu(x, approximate="tanh")),
    "leaky": Function(F.leaky_relu),
    "celu, selu": Function(lambda x: F.celu(x, 0.7) + F.selu(x)),
    "softplus, log-sigmoid": Function(lambda x: F.softplus(x, 2.0) * F.logsigmoid(x)),
    "shrinks": Function(lambda x: F.hardshrink(x) + F.softshrink(x, 0.3) + F.tanhshrink(x)),
    "random slope": Function(F.rrelu),
    "power of a parameter": Function(lambda x: x.clamp(min=0.01).pow(torch.tensor([1.5]))),
    "branches": Function(lambda x: torch.where(x > 0.5, x, torch.expm1(x.clamp(max=0))).masked_fill(x < -1, -0.7)),
    "waves": Function(lambda x: torch.lerp(torch.sin(x), torch.log1p(x.abs()), 0.3) + torch.rsqrt(1 + x * x)),
    "threshold": Function(lambda x: F.threshold(x, 0.1, 0.0)),
    "prelu": nn.Sequential(conv_bn(8, 8, 1, activation=None), nn.PReLU(8)),
    "sum and product": lambda x: x + x.mean(1, keepdim=True) * x,
    "difference": lambda x: 1 - x.mean((2, 3), keepdim=True) + x,
    "squeeze-and-excitation": Squeeze(torch.sigmoid),
    "squeeze-and-excitation, hard": Squeeze(F.hardsigmoid),
    "concat of slices": (lambda x: torch.cat([x[:, 4:], x[:, :2]], 1), 6),
    "flip, roll, repeat": lambda x: x.flip(3).roll(3, 2)[:, ::2].repeat(1, 2, 1, 1),
    "channel shuffle": nn.ChannelShuffle(2),
    "pixel shuffle": (nn.PixelShuffle(2), 2),
    "pixel unshuffle": (nn.PixelUnshuffle(2), 32),
    "channels by number": lambda x: x.index_select(1, torch.tensor([3, 1, 7, 0, 2, 2, 6, 5]))[
        :, [1, 0, 3, 2, 4, 5, 7, 6]
    ],
    "channels by mask": (lambda x: x[:, torch.tensor([True, False, False, True] * 2)], 4),
    "repeated one by one": (lambda x: x[:, :3].repeat_interleave(2, 1), 6),
    "patches": (lambda x: F.unfold(x, 3, 2, 1, 2).unflatten(2, (5, 5))[:, ::9], 8),
    "windows": lambda x: x.unfold(2, 3, 2).unfold(3, 2, 2).amax((4, 5)),
    "minima": lambda x: x.amin((2, 3), True) + x - x.min(1, keepdim=True).values,
    "deviations": lambda x: x / (x.std(1, keepdim=True) + 1) + torch.var(x, (2, 3), unbiased=False, keepdim=True),
    "variance and mean": lambda x: torch.relu(x - torch.var_mean(x, 1, keepdim=True)[1]),
    "unit length": lambda x: 4 * F.normalize(x, dim=1),
    "a choice": lambda x: torch.where(x > x.flip(1), x, x.roll(1, 1)).masked_fill(x.flip(2) == 0, 0.25),
    "masks": lambda x: x * ((x > x.flip(1)) & ~(x.flip(2) >= 1)).float() + (x != x.flip(3)).to(x.dtype),
    "nearest exactly": nn.Upsample(scale_factor=1.5, mode="nearest-exact"),
    "sum of a stack": lambda x: torch.stack([x, x.flip(1)]).sum(0) + torch.stack([x, x.flip(2)], 4).mean(-1),
    "einsum: a gate": lambda x: torch.einsum("nchw,nc->nchw", x, x.mean((2, 3))),
    "einsum: matrices": lambda x: (
        torch.einsum("nij,njk->nik", *[torch.einsum("bchw,bcvw->bhv", x, x) / 20] * 2)[:, None] + x
    ),
    "einsum: a layer": nn.Sequential(Einsum("b c h w, o c -> b o h w"), nn.ReLU()),
    "einsum: a layer, weight first": nn.Sequential(Einsum("oc,...chw->...ohw", first=True), nn.ReLU()),
    "softmax": lambda x: x * torch.softmax(x, 1),
    "attention": Attention(fused=False),
    "fused attention": Attention(fused=True),
    "attention, images second": BatchSecond(),
    "roots, which have no numbers below 0": nn.LPPool2d(2, 2),
    "layer norm": LastNorm(),
    "layer norm of images": nn.LayerNorm([8, 12, 12]),
    "group norm": nn.GroupNorm(2, 8),
    "instance norm": nn.InstanceNorm2d(8, affine=True),
    "a mean of values that cancel": lambda x: normalised(normalised(x)),
}
BY_TORCH = {
    "unpooling to another size": Unpool(2, 2, wider=1),
    "grid_sample": fractions,
    "cumsum": lambda x: torch.cumsum(x, 1),
    "a function without a form": Function(lambda x: torch.atan(x) * torch.sigmoid(x)),
    "a value for all positions": lambda x: x * (x > x.mean()).float(),
}


def quantized(middle, recipe=RECIPE):
    torch.manual_seed(0)
    network = Around(*middle) if isinstance(middle, tuple) else Around(middle)
    return quantize_data_free(settle(randomise(network), SPEC), SPEC, recipe)


def checked(result, opset=None) -> onnx.ModelProto:
    """The model, once it is known to agree with the simulation."""
    model = build(result, SPEC, {}, opset)
    parity = check_parity(model, result.simulated, SPEC.probe(4))
    assert parity.layers and parity.agreement > 0.97
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    images = SPEC.probe(3, seed=4)  # another batch than that of the comparison
    found = probed_outputs(OnnxNetwork(model.SerializeToString()), images)[0]
    expected = probed_outputs(result.simulated, images)[0]
    assert (found - expected).abs().mean() < 0.005 * expected.abs().max()  # ties move single steps
    return model


@pytest.mark.parametrize("name", MIDDLES)
def test_operators_compute_what_the_simulation_does_at_opset_13(name):
    assert checked(quantized(MIDDLES[name])).opset_import[0].version == 13


@pytest.mark.parametrize("name", BY_TORCH)
def test_what_the_table_lacks_is_written_by_torch_onnx(name):
    result = quantized(BY_TORCH[name])
    assert checked(result).opset_import[0].version == 18
    with pytest.raises(UserError, match=r"needs opset 18 or newer, not 17; pass --opset 18, or leave out --opset"):
        build(result, SPEC, {}, opset=17)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_every_opset_computes_the_same_on_integers(opset):
    middles = [Squeeze(F.hardsigmoid), nn.AdaptiveAvgPool2d((5, 7)), nn.ReflectionPad2d(1), nn.Upsample(scale_factor=2)]
    result = quantized(nn.Sequential(*middles, nn.MaxPool2d(2), nn.GroupNorm(2, 8)))
    model = checked(result, opset)
    assert model.opset_import[0].version == opset
    assert set(find_kernels(model, result.simulated).floating) == {"last.0"}  # which hands out the network's output
    if opset >= 18:
        checked(quantized(BY_TORCH["cumsum"]), opset)


def test_linear_layers_on_tokens_run_on_integers():
    result = quantized(Attention(fused=False))
    integer = find_kernels(build(result, SPEC, {}), result.simulated).integer
    assert {"middle.query", "middle.key", "middle.value"} <= set(integer)


def test_loops_that_torch_onnx_writes_keep_their_names_apart():
    """hstack is one, which the rules otherwise take: two of them in one file."""
    module = Beside()
    parts = [exported_by_torch(module, [Input("x", torch.zeros(2, 4), [0])], 18, prefix, "") for prefix in ("a", "b")]
    nodes = [node for part in parts for node in part[0]]
    inner = [step for node in nodes for attribute in node.attribute for step in attribute.g.node]
    assert inner and len({name for step in inner for name in step.output}) == sum(len(s.output) for s in inner)


def test_what_nobody_has_a_form_for_is_named():
    result = quantized(Function(lambda x: x * torch.special.bessel_j0(x)))
    with pytest.raises(UserError, match=r"Elementwise '\S+' cannot be exported: .*bessel_j0"):
        build(result, SPEC, {})


def test_a_network_that_gives_no_numbers_is_refused():
    result = quantized(nn.Identity())
    model = build(result, SPEC, {})
    result.simulated.get_submodule("last.0").bias.data[0] = torch.nan
    with pytest.raises(UserError, match="no numbers"):
        check_parity(model, result.simulated, SPEC.probe(2))


def test_an_engine_that_gives_no_numbers_is_refused():
    result = quantized(LastNorm())
    model = build(result, SPEC, {})
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_mul_values"):
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * float("nan"), tensor.name)
            )
    with pytest.raises(UserError, match="disagree at"):
        check_parity(model, result.simulated, SPEC.probe(2))


def test_a_tensor_of_one_number_has_its_shape_where_more_than_arithmetic_reads_it():
    torch.manual_seed(0)
    middle = Around(lambda x: torch.cat([torch.full_like(x, float("-inf")), x], 1).softmax(1), 16)
    result = quantize_data_free(settle(middle, SPEC), SPEC, Recipe(quantize=True))
    check_parity(build(result, SPEC, {}), result.simulated, SPEC.probe(4))


def test_a_grouped_transposed_convolution_has_one_scale_where_others_have_one_per_channel():
    result = quantized(nn.ConvTranspose2d(8, 8, 2, 2, groups=4), replace(RECIPE, per_channel=True))
    checked(result)
    layers = {node.target: module_of(result.simulated, node) for node in weighted_nodes(result.simulated)}
    assert {name: layer.weight_qparams.per_channel for name, layer in layers.items()} == {
        "first.0": True,
        "middle": False,
        "last.0": True,
    }
    assert any("middle has one scale" in note for note in result.log.notes)
