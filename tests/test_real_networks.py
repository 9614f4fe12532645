"""Real trained networks on real images, where they are at hand: what the method promises."""

import json

import main_cls


def run(tmp_path, *argv):
    """The rows of a table, from one capture and one reading of the images."""
    file = tmp_path / "runs.jsonl"
    main_cls.main([*argv, "--results", str(file)])
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_mobilenet_v2_collapses_and_recovers(shared, tmp_path):
    flags = [
        "--weights",
        str(shared / "weights/mobilenet_v2_imagenette.pth"),
        "--data",
        str(shared / "data/imagenette-val"),
    ]
    flags += ["--image_size", "160", "--limit", "200"]
    rows = ["Original", "+LE+BC", "+ReLU+LE+BC"]
    original, exact, published = run(tmp_path, *flags, "--table", "--rows", *rows)
    assert [row["recipe"] for row in (original, exact, published)] == rows
    assert original["fp32_original"] > 95
    assert original["quantized"] < 60
    assert exact["quantized"] >= exact["fp32_original"] - 1.0  # of 200 images; the bar is 0.5 of 2,000
    assert published["quantized"] >= published["fp32"] - 1.0


def test_efficientnet_lite0_stays_close_to_float(shared, tmp_path):
    flags = ["--model", "efficientnet_lite0", "--data", str(shared / "data/imagenet-val-1300"), "--limit", "130"]
    (line,) = run(tmp_path, *flags, "--quantize", "--equalize", "--correction")
    assert line["fp32_original"] > 78
    assert line["quantized"] >= line["fp32_original"] - 2.0  # of 130 images; the bar is 0.7 of 1,300
