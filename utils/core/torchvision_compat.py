"""torchvision, imported so that it also works beside a CPU-only build of torch.

PyPI's torchvision for Linux is linked against CUDA. Beside a CPU-only torch its compiled operators
do not load, which torchvision tolerates, but the fake (meta) implementations it then registers name
operators that do not exist and the import dies: "operator torchvision::nms does not exist". Defining
the two operators first would let it through, but where the compiled ones do load, a second
definition aborts the process: so the ordinary import always comes first.

Everything in the project takes torchvision from here: `from utils.core.torchvision_compat import torchvision`.
"""

import importlib

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _greedy_nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Indices of the boxes kept by non-maximum suppression, by falling score.

    boxes: [N, 4] as x1, y1, x2, y2; scores: [N]. The same result as torchvision's compiled nms.
    """
    order = scores.argsort(descending=True, stable=True)
    overlaps = torchvision.ops.box_iou(boxes[order], boxes[order]) > iou_threshold
    suppressed = torch.zeros(len(order), dtype=torch.bool)
    for i, row in enumerate(overlaps.cpu()):
        if not suppressed[i]:
            suppressed[i + 1 :] |= row[i + 1 :]
    return order[~suppressed.to(order.device)]


def _import_torchvision():
    try:
        return importlib.import_module("torchvision"), None
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms" + _SCHEMA)
    library.define("qnms" + _SCHEMA)
    library.impl("nms", _greedy_nms, "CompositeExplicitAutograd")
    module = importlib.import_module("torchvision")
    module.ops.boxes._assert_has_ops = lambda: None
    return module, library  # the operators live as long as the library object


torchvision, _library = _import_torchvision()
