"""The embedded demo: rendered scenes and small networks trained on them, in the formats of real ones."""

from dataclasses import dataclass

IMAGE_SIZES = {"classification": 64, "segmentation": 160, "detection": 160}  # side of each network's input, in pixels
MODELS = {
    "classification": "mobilenet_v2",
    "segmentation": "deeplabv3plus_mobilenet_v2",
    "detection": "ssd_lite_mobilenet_v2",
}
SCENES = {"classification": "classification", "segmentation": "voc", "detection": "voc"}
RESIZED = 73  # short side before the classifier's centre crop: ImageNet's 256 to 224


@dataclass(frozen=True)
class Demo:
    """flags: what the script's flags would be, as its parser gives them; note: its first line."""

    flags: dict[str, str | int | list[int]]
    note: str


def flags(task: str) -> dict[str, str | int | list[int]]:
    """What the script's flags would be for the demo's network, without its files."""
    chosen = {"model": MODELS[task], "image_size": [IMAGE_SIZES[task]]}
    return chosen | ({"resize": RESIZED} if task == "classification" else {})


def open(task: str, cache: str | None = None) -> Demo:
    """The demo of "classification", "segmentation" or "detection"; its images are rendered the first time.

    cache: folder to keep the images in (default: $DFQ_CACHE, or dfq in the user's cache folder).
    """
    from demo import render, weights  # slow to import, and needed by the demo alone

    files = {"data": str(render.rendered(SCENES[task], cache)), "weights": str(weights.checked(task))}
    count = render.KINDS[SCENES[task]].images
    return Demo(
        files | flags(task),
        f"demo: a small {MODELS[task]} on {count} rendered scenes; for your own network and data pass --weights FILE and --data DIR",
    )
