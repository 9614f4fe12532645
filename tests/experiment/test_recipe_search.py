"""--auto and --doctor as one types them: what they print, record and write, and what ends them."""

import json
import shlex
from argparse import Namespace
from functools import partial

import pytest
import torch
from networks import SPEC, chain, conv_bn, folded, randomise, settle, spread_gains
from test_cli import failure, flags, images  # noqa: F401
from torch import nn
from torch.nn.functional import avg_pool2d

import dfq
import main_cls
import main_seg
from utils.calibration import distillation
from utils.calibration.moments import Gaussian
from utils.core.errors import UserError
from utils.experiment import cli, runner
from utils.experiment.doctor import FAR, coarse_share, contradictions
from utils.graph.nodes import module_of, weighted_nodes
from utils.passes import noise_equalization
from utils.passes.block_learning import Reconstruction

FEW = ("--distill_images", "8", "--distill_steps", "3")


@pytest.fixture(autouse=True, scope="module")
def _short_learning():
    """Scales and roundings that a candidate learns take a tenth of the steps: what is told and written of it is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_equalization, "ITERATIONS", 30)
        patch.setattr(noise_equalization, "_MINIMA", {})  # what other tests find is found in full
        patch.setattr(dfq, "Reconstruction", partial(Reconstruction, iterations=20))
        yield


def uneven():
    """A network that equalization helps, for --model test_recipe_search:uneven."""
    return settle(spread_gains(settle(randomise(chain()))))


def test_a_search_is_recorded_with_its_ranking_and_repeated_by_its_flags(images, tmp_path, capsys):  # noqa: F811
    own = ("--distill_cache", str(tmp_path / "cache"), *FEW)
    main_cls.main(
        flags(
            images,
            tmp_path,
            "--auto",
            *own,
            "--export",
            str(tmp_path / "x.onnx"),
            "--report",
            str(tmp_path / "page"),
            model="test_recipe_search:uneven",
        )
    )
    printed = capsys.readouterr().out
    line = json.loads((tmp_path / "runs.jsonl").read_text())
    assert line["recipe"].startswith("auto: +") and (tmp_path / "x.onnx").exists()
    noise = [one["noise"] for one in line["ranking"]["candidates"] if "noise" in one]
    assert noise == sorted(noise, reverse=True) and len(noise) >= 6
    again = next(text for text in printed.splitlines() if "the same by: " in text).partition("main_cls.py ")[2]
    page = (tmp_path / "page" / "report.html").read_text()
    assert all(f"<td>{one['recipe']}</td><td>{one['noise']:.1f}</td>" in page for one in line["ranking"]["candidates"])
    words = shlex.split(again)
    assert "--auto" not in words and "--quantize" in words
    main_cls.main(words)
    repeated = json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[1])
    assert f"auto: {repeated['recipe']}" == line["recipe"]
    assert repeated["quantized"] == line["quantized"]


@pytest.mark.parametrize("fits", [True, False])
def test_for_few_bits_a_search_looks_at_dead_leaves_where_they_fit(fits, images, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(distillation, "LEAVES_FIT", 9 if fits else 0)
    monkeypatch.setattr(distillation, "LEAVES_STEPS", 2)
    own = ("--distill_cache", str(tmp_path / "cache"), "--distill_images", "8", "--bits_weight", "6")
    main_cls.main(flags(images, tmp_path, "--auto", *own, model="test_recipe_search:uneven"))
    printed = capsys.readouterr().out
    line = json.loads((tmp_path / "runs.jsonl").read_text())
    chosen = "--distill_start leaves --distill_steps 2"
    again = next(text for text in printed.splitlines() if "the same by: " in text)
    assert all((chosen in text) == fits for text in (again, line["command"]))
    assert all("--bits_first_last 8" in text for text in (again, line["command"])) and line["bits"]["first_last"] == 8
    assert ("dead leaves, which meet" in printed) == fits == (line["flags"]["distill_start"] == "leaves")


@pytest.mark.parametrize(
    ("method", "more"),
    [("gptq", ()), ("adaround", ()), ("gptq", ("--distill_steps", "3")), ("gptq", ("--bits_weight", "8"))],
)
def test_rounding_by_images_looks_at_dead_leaves_too(method, more, images, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(distillation, "LEAVES_FIT", 9)
    monkeypatch.setattr(distillation, "LEAVES_STEPS", 2)
    passes = ("--quantize", "--correction", "--distill_rounding", method, "--distill_cache", str(tmp_path / "cache"))
    passes += ("--distill_images", "8")
    argv = flags(images, tmp_path, *passes, "--bits_weight", "6", *more, model="test_recipe_search:uneven")
    main_cls.main(argv)
    printed = capsys.readouterr().out
    line = json.loads((tmp_path / "runs.jsonl").read_text())
    leaves = not more
    steps = 2 if method == "adaround" else 0
    assert (f"--distill_start leaves --distill_steps {steps}" in line["command"]) == leaves
    assert ("half of them distilled for 2 steps" in printed) == (method == "adaround")
    assert ("dead leaves, which meet" in printed) == leaves == (line["flags"]["distill_start"] == "leaves")


@pytest.mark.parametrize("typed", [None, 3])
def test_a_task_that_distils_few_images_takes_more_leaves_unless_told_how_many(typed, monkeypatch):
    monkeypatch.setattr(distillation, "LEAVES_FIT", 9)
    words = ["--quantize", "--correction", "--distill_rounding", "--bits_weight", "4"]
    words += ["--distill_images", str(typed)] if typed else []
    args = cli.parse(main_seg.TASK, words)
    run = runner.Run(main_seg.TASK, words, args, Namespace(model=None), None, torch.device("cpu"))
    monkeypatch.setattr(runner, "for_few_bits", lambda captured, spec, own, learned: distillation.from_leaves(own, 0))
    found = runner._with_leaves(run, None, False)
    assert (args.distill_images, found.args.distill_images) == ((3, 3) if typed else (8, 32))
    assert ("--distill_images 32" in " ".join(found.argv)) == (typed is None)


def test_a_network_far_from_float_writes_nothing_unless_forced(images, tmp_path, capsys):  # noqa: F811
    bits = ("--bits_weight", "2", "--bits_activation", "2", "--distill_cache", str(tmp_path / "cache"), *FEW)
    argv = flags(
        images, tmp_path, "--auto", *bits, "--save", str(tmp_path / "x.dfq"), model="test_recipe_search:uneven"
    )
    assert "no candidate comes near to float" in failure(argv, capsys)
    assert not (tmp_path / "x.dfq").exists()
    main_cls.main([*argv, "--force"])
    assert (tmp_path / "x.dfq").exists() and "because of --force" in capsys.readouterr().out


def test_without_batchnorm_a_search_asks_for_images(images, tmp_path, capsys):  # noqa: F811
    argv = flags(images, tmp_path, "--auto", model="test_cli:without_batchnorm")
    assert "--images DIR" in failure(argv, capsys)


def test_the_doctor_says_what_was_captured_and_what_to_type(images, tmp_path, capsys):  # noqa: F811
    main_cls.main(
        flags(images, tmp_path, "--doctor", "--report", str(tmp_path / "page"), model="test_recipe_search:uneven")
    )
    printed = capsys.readouterr().out
    assert "layers: 3 Conv2d, 1 Linear" in printed and "activations: 3 ReLU6" in printed
    assert "ONNX Runtime runs 4 of 4 layers on integers" in printed
    assert "--auto --export test_recipe_search_uneven-int8.onnx" in printed
    assert "4 of 4 layers" in (tmp_path / "page" / "doctor.html").read_text()
    assert not (tmp_path / "runs.jsonl").exists()


def test_the_doctor_ends_with_2_where_nothing_can_be_quantized(images, tmp_path, capsys):  # noqa: F811
    argv = flags(images, tmp_path, "--doctor", model="test_recipe_search:nothing")
    assert failure(argv, capsys)


def test_the_doctor_follows_the_target(images, tmp_path, capsys):  # noqa: F811
    main_cls.main(
        flags(images, tmp_path, "--doctor", "--target", "tensorrt", "--verbose", model="test_recipe_search:uneven")
    )
    printed = capsys.readouterr().out
    assert "int8 activations, zero point 0" in printed and "TensorRT is not here to say" in printed
    assert "names: 0.0, 1.0, 2.0, 3.linear" in printed
    main_cls.main(flags(images, tmp_path, "--doctor", "--bits_weight", "4", model="test_recipe_search:uneven"))
    printed = capsys.readouterr().out
    assert "of 4 bits or fewer are stored in 8" in printed and "--bits_weight 4 --auto --export" in printed
    main_cls.main(flags(images, tmp_path, "--doctor", "--bits_activation", "4", model="test_recipe_search:uneven"))
    printed = capsys.readouterr().out
    assert "simulated alone: it has no kernels for --bits_activation 4, only for 8" in printed
    assert "--bits_activation 4 --auto --save test_recipe_search_uneven-int8.dfq\n" in printed


@pytest.mark.parametrize(
    ("model", "words", "typed"),
    [
        ("uneven", ("--bits_activation", "4", "--opset", "21", "--weight_type", "int8"), ("--save",)),
        ("unknown", ("--distill_images", "16", "--distill_steps=3"), ("--images",)),
        ("OneAtATime", ("--batch_size", "4"), ("--batch_size", "1")),
    ],
)
def test_what_the_doctor_says_to_type_is_taken(model, words, typed, images, tmp_path, capsys):  # noqa: F811
    own = f"test_recipe_search:{model}"
    main_cls.main(flags(images, tmp_path, "--doctor", *words, model=own))
    said = next(line for line in capsys.readouterr().out.partition("\nNext")[2].splitlines() if "--auto" in line)
    argv = shlex.split(said)[2:]
    assert all(word in argv for word in typed) and argv.count("--batch_size") == words.count("--batch_size")
    args = main_cls.parse_args(argv)  # which ends the process where it refuses
    assert args.auto and not args.doctor and args.model == own


@pytest.mark.parametrize(("count", "refused"), [(2, True), (3, True), (4, False)])
def test_pictures_that_no_candidate_sees_are_needed(count, refused, images, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "few"
    folder.mkdir()
    for i, file in enumerate(sorted(images.rglob("*.png"))[:count]):
        (folder / f"{i}.png").write_bytes(file.read_bytes())
    argv = flags(images, tmp_path, "--auto", "--images", str(folder), model="test_recipe_search:uneven")
    if refused:
        assert "pass at least 4 with --images DIR" in failure(argv, capsys)
    else:
        main_cls.main(argv)
        assert "judged on 1 held-out images (yours)" in capsys.readouterr().out


def test_with_no_layer_to_spare_a_noise_that_is_not_reached_is_a_warning(images, tmp_path, capsys):  # noqa: F811
    argv = flags(
        images, tmp_path, "--auto", "--max_noise", "300", "--images", str(images), model="test_recipe_search:uneven"
    )
    main_cls.main(argv)
    assert "--max_noise 300 is not reached" in capsys.readouterr().out


def fails():
    raise NameError("first line\nsecond line")


def test_code_that_fails_is_one_line(images, tmp_path, capsys):  # noqa: F811
    (tmp_path / "broken_module.py").write_text("x = undefined_name\n")
    import sys

    sys.path.insert(0, str(tmp_path))
    line = failure(flags(images, tmp_path, "--doctor", model="broken_module:f"), capsys)
    sys.path.remove(str(tmp_path))
    assert "its code fails as it is imported (NameError: name 'undefined_name' is not defined)" in line
    assert "first line" in failure(flags(images, tmp_path, "--doctor", model="test_recipe_search:fails"), capsys)


def test_without_data_a_run_still_says_what_it_did(tmp_path, capsys):
    words = [
        "--model",
        "test_recipe_search:uneven",
        "--image_size",
        "24",
        "--quantize",
        "--export",
        str(tmp_path / "x.onnx"),
    ]
    main_cls.main(words)
    printed = capsys.readouterr().out
    assert "quantized weights" in printed and "exported" in printed


@pytest.mark.parametrize("words", [("--report", "page"), ("--engine", "onnxruntime")])
def test_without_data_nothing_is_shown_or_run(words, tmp_path):
    argv = ["--model", "test_recipe_search:uneven", "--quantize", "--save", str(tmp_path / "x.dfq"), *words]
    with pytest.raises(UserError, match=f"{' '.join(words) if words[0] == '--engine' else words[0]} needs data"):
        main_cls.main(argv)
    assert not (tmp_path / "x.dfq").exists()


def unknown():
    """A network without BatchNorm, for --model test_recipe_search:unknown."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def nothing():
    """A network without a layer, for --model test_recipe_search:nothing."""
    from torch import nn

    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_contradicted_statistics_are_found_without_data():
    network, statistics = folded(settle(chain()))
    assert max(contradictions(network, SPEC, statistics).values()) < 1
    layer = [node.target for node in weighted_nodes(network)][1]
    known = statistics[layer]
    statistics[layer] = Gaussian(known.mean + 5 * known.variance.sqrt(), known.variance)
    found = contradictions(network, SPEC, statistics)
    assert found[layer] > FAR > min(found.values())


def test_channels_of_few_steps_are_counted():
    network, _ = folded(settle(chain()))
    layer = module_of(network, weighted_nodes(network)[0])
    layer.weight.data /= layer.weight.data.abs().amax((1, 2, 3), keepdim=True)
    assert coarse_share(layer) == 0
    layer.weight.data[:2] /= 100
    assert coarse_share(layer) == pytest.approx(0.25)


class OneAtATime(nn.Module):
    """A network whose code fixes its batch, for --model test_recipe_search:OneAtATime."""

    def __init__(self):
        super().__init__()
        self.body, self.head = settle(randomise(conv_bn(3, 8, 3, padding=1))), nn.Linear(8 * 6 * 6, 5)

    def forward(self, x):
        return self.head(avg_pool2d(self.body(x), 4).reshape(1, -1))


def test_a_network_that_takes_one_image_at_a_time_is_searched_as_any_other(images, tmp_path, capsys):  # noqa: F811
    one = ("--batch_size", "1", "--distill_cache", str(tmp_path / "cache"), *FEW)
    own = {"model": "test_recipe_search:OneAtATime"}
    main_cls.main(flags(images, tmp_path, "--doctor", **own))
    assert "1 image(s) at a time" in capsys.readouterr().out
    main_cls.main(flags(images, tmp_path, "--auto", *one, **own))
    line = json.loads((tmp_path / "runs.jsonl").read_text())
    tried = [one["recipe"] for one in line["ranking"]["candidates"] if "noise" in one]
    assert any("+GPTQ" in name for name in tried) and any("+DLE" in name for name in tried)
    assert line["fidelity"]["output"] > 10


def untold():
    """Two layers behind which no BatchNorm tells of any range, for --model test_recipe_search:untold."""
    untold = nn.Conv2d(12, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)
    return nn.Sequential(*uneven()[:-1], *untold, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_the_doctor_distils_nothing(images, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(dfq, "distill_few", None)
    main_cls.main(flags(images, tmp_path, "--doctor", model="test_recipe_search:untold"))
    assert "without: " in capsys.readouterr().out


class Outputs(nn.Module):
    """Labels and a score beside its logits, for --model test_recipe_search:Outputs."""

    def __init__(self):
        super().__init__()
        self.network = uneven()

    def forward(self, x):
        logits = self.network(x)
        return {"label": logits.argmax(1), "scores": logits, "top": logits.amax(1)}


def test_outputs_of_one_number_an_image_are_judged_too(images, tmp_path):  # noqa: F811
    own = ("--distill_cache", str(tmp_path / "cache"), *FEW)
    passes = ("--quantize", "--equalize", "--correction", "--fidelity")
    main_cls.main(flags(images, tmp_path, *passes, *own, model="test_recipe_search:Outputs"))
    assert 5 < json.loads((tmp_path / "runs.jsonl").read_text())["fidelity"]["noise"] < 60


def test_the_doctor_names_what_no_file_can_hold(images, tmp_path, capsys):  # noqa: F811
    main_cls.main(flags(images, tmp_path, "--doctor", model="test_recipe_search:Median"))
    printed = capsys.readouterr().out
    assert (
        "no file of it: " in printed
        and "--save" in printed.partition("Next")[2]
        and "--export" not in printed.partition("Next")[2]
    )


class Median(nn.Module):
    """A network with an operator that ONNX lacks."""

    def __init__(self):
        super().__init__()
        self.body = settle(randomise(conv_bn(3, 5, 3, padding=1)))

    def forward(self, x):
        return self.body(x).flatten(2).median(2).values
