"""Real trained networks on real images, where they are at hand: what the method promises."""

import json

import main_cls

RECIPE = ["--quantize", "--equalize", "--correction"]


def run(tmp_path, *argv):
    file = tmp_path / "runs.jsonl"
    main_cls.main([*argv, "--results", str(file)])
    return json.loads(file.read_text().splitlines()[-1])


def test_mobilenet_v2_collapses_and_recovers(shared, tmp_path):
    flags = [
        "--weights",
        str(shared / "weights/mobilenet_v2_imagenette.pth"),
        "--data",
        str(shared / "data/imagenette-val"),
    ]
    flags += ["--image_size", "160", "--limit", "200"]
    original = run(tmp_path, *flags, "--quantize")
    assert original["fp32_original"] > 95
    assert original["quantized"] < 60
    exact = run(tmp_path, *flags, *RECIPE)
    assert exact["quantized"] >= exact["fp32_original"] - 1.0  # of 200 images; the bar is 0.5 of 2,000
    published = run(tmp_path, *flags, *RECIPE, "--relu")
    assert published["quantized"] >= published["fp32"] - 1.0


def test_efficientnet_lite0_stays_close_to_float(shared, tmp_path):
    flags = ["--model", "efficientnet_lite0", "--data", str(shared / "data/imagenet-val-1300"), "--limit", "130"]
    line = run(tmp_path, *flags, *RECIPE)
    assert line["fp32_original"] > 78
    assert line["quantized"] >= line["fp32_original"] - 2.0  # of 130 images; the bar is 0.7 of 1,300
