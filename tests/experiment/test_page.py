"""The report's page."""

import re

import pytest
import torch
from networks import SPEC, chain, randomise, settle
from PIL import Image
from torch import nn

import main_cls
from dfq import Recipe, quantize_data_free
from utils.experiment import charts, page
from utils.experiment.report import network_sections
from utils.passes.log import PassLog

LINE = {
    "command": "python main_cls.py",
    "versions": {"torch": "2"},
    "commit": None,
    "weights_sha256": "ab" * 32,
    "time": "now",
}


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    return page.Picture(tmp_path / "red.png", "a <red> square")


def test_a_page_is_whole_in_itself_and_escapes_what_it_shows(tmp_path, picture):
    log = PassLog()
    log.applied("equalized", "<script>")
    log.skipped("equalized", "last", "read by <add>")
    log.note("1 < 2")
    section = page.Section("Samples & more", "what <they> say", [picture])
    table = [["", "top1"], ["<script>alert(1)</script>", "80.00"]]
    text = page.write(tmp_path / "r.html", "net <x>", "lead", table, log, [section], LINE).read_text()
    assert "<script>" not in text and "&lt;script&gt;alert(1)" in text and "a &lt;red&gt; square" in text
    assert text.count("data:image/png;base64,") == 1
    assert not re.search(r'(src|href)="(?!data:)', text)
    for heading in ("Passes", "Samples &amp; more", "To repeat it"):
        assert f"<h2>{heading}</h2>" in text
    assert "read by &lt;add&gt;" in text and "1 &lt; 2" in text


def test_weights_are_kept_after_every_pass(tmp_path):
    model = settle(randomise(chain(nn.ReLU)))
    result = quantize_data_free(model, SPEC, Recipe(quantize=True, equalize=True))
    stages = result.log.weights
    assert list(stages) == ["BatchNorm folded", "dead channels cleared", "equalized", "quantized"]
    assert stages["equalized"]["0.0"].shape == (8, 2)
    widths = {stage: stages[stage]["1.0"].abs().amax(1) for stage in ("BatchNorm folded", "equalized")}
    spread = {stage: float(width.max() / width.min()) for stage, width in widths.items()}
    assert spread["equalized"] < spread["BatchNorm folded"]
    qparams = result.simulated.get_submodule("1.0").weight_qparams
    steps = stages["quantized"]["1.0"] / qparams.scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    near = quantize_data_free(model, SPEC, Recipe(quantize=True), SPEC.probe(4)).fidelity
    sections = network_sections(tmp_path, stages, result.simulated, near)
    assert [section.title for section in sections] == ["Weights", "Activations", "Quantization noise"]
    assert all(picture.file.stat().st_size > 1000 for section in sections for picture in section.pictures)


def test_the_most_uneven_layer():
    even, odd = torch.tensor([[-1.0, 1.0]] * 4), torch.tensor([[-1.0, 1.0]] * 3 + [[0.0, 50.0]])
    assert charts.most_uneven({"even": even, "odd": odd}) == "odd"


@pytest.mark.parametrize("flags", [[], ["--quantize"], ["--table", "--rows", "Original", "+LE+BC per channel"]])
def test_the_demo_is_reported(flags, tmp_path):
    folder = tmp_path / "report"
    run = ["--limit", "8", "--workers", "0", "--results", str(tmp_path / "r.jsonl"), "--report", str(folder)]
    main_cls.main([*run, *flags])
    pages = {file.relative_to(folder).as_posix() for file in folder.rglob("*.html")}
    if "--table" in flags:
        assert pages == {"index.html", "Original/report.html", "LE_BC_per_channel/report.html"}
        assert 'href="LE_BC_per_channel/report.html"' in (folder / "index.html").read_text()
    else:
        assert pages == {"report.html"}
        text = (folder / "report.html").read_text()
        assert ("<h2>Quantization noise</h2>" in text) == ("--quantize" in flags)
        assert text.count("data:image/png") == len(list(folder.glob("*.png")))
