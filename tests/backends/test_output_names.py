"""Names of outputs in an exported file."""

import onnxruntime
import torch
from networks import SPEC, made, settle
from torch import nn
from torch.utils._pytree import tree_leaves

from dfq import Recipe, quantize_data_free
from utils.backends.onnxruntime.export import build


class Named(nn.Module):
    """Hands out what its layer `aux` gives under that layer's name, scaled."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.out, self.aux = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, images):
        features = self.stem(images)
        return {"out": self.out(features), "aux": self.aux(features) * 2}


def test_an_output_may_have_the_name_of_a_layer():
    model, graph = made(Named, settle)
    result = quantize_data_free(model, SPEC, Recipe(quantize=True), captured=graph)
    result.simulated.meta["outputs"] = ["out", "aux"]
    session = onnxruntime.InferenceSession(
        build(result, SPEC, {}).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert [output.name for output in session.get_outputs()] == ["out", "aux"]
    images = SPEC.probe(2)
    found = session.run(None, {"images": images.numpy()})
    for values, expected in zip(found, tree_leaves(result.simulated(images)), strict=True):
        torch.testing.assert_close(torch.from_numpy(values), expected, rtol=0, atol=0.02 * float(expected.abs().max()))
