"""Warnings: what is wrong, and flags to try that are not given already."""

from networks import SPEC, chain, made, settle

from dfq import Recipe, quantize_data_free
from utils.calibration.fidelity import Fidelity
from utils.passes.advice import LEAST_OUTPUT, MOST_SATURATED, fidelity_warnings, other_ranges

PLAIN = Recipe(quantize=True)


def test_a_good_network_has_no_warning():
    near = Fidelity(LEAST_OUTPUT, {"a": 3.0}, {"a": MOST_SATURATED})
    assert fidelity_warnings(near, PLAIN, 16, real=False) == []


def test_a_noisy_output_says_what_to_try():
    near = Fidelity(9.96, {})
    (line,) = fidelity_warnings(near, PLAIN, 16, real=False)
    assert line.startswith("the output is only 10.0 dB over its quantization noise on 16 held-out images (distilled)")
    for flag in ("--per_channel", "--equalize", "--correction", "--images DIR"):
        assert flag in line
    assert (
        "more bits" not in line and "--asymmetric" not in line
    )  # engines have no more than 8, and zero points cost there
    (line,) = fidelity_warnings(near, Recipe(quantize=True, bits_weight=4), 16, real=False)
    assert "more bits (--bits_weight)," in line and "--asymmetric" in line
    (line,) = fidelity_warnings(near, Recipe(quantize=True, bits_weight=7, target="openvino"), 16, real=False)
    assert "--asymmetric" not in line  # it takes none
    assert line.index("--distill_range") < line.index("--per_channel")
    given = Recipe(quantize=True, equalize=True, correction=True, per_channel=True, distill_range=True)
    (line,) = fidelity_warnings(near, given, 8, real=True)
    assert line.endswith("on 8 held-out images (yours); try --float_layers with the noisiest layers")
    (line,) = fidelity_warnings(near, Recipe(quantize=True, target="tensorrt"), 16, real=False)
    assert "per_channel" not in line  # its weights have a scale for every channel as it is
    assert len(fidelity_warnings(Fidelity(float("nan"), {}), PLAIN, 16, real=False)) == 1


def test_cut_tensors_are_counted_and_the_worst_is_named():
    near = Fidelity(30.0, {}, {"a": 2.0, "b": 7.5, "c": 0.5})
    (line,) = fidelity_warnings(near, PLAIN, 16, real=True)
    assert "values of 2 of 3 tensors" in line and "(most: b 7.5 %); try --distill_range" in line
    assert other_ranges(Recipe(quantize=True, distill_range=True), real=True) == ""


def test_a_run_warns_in_its_summary():
    model, graph = made(chain, settle)
    rough = Recipe(quantize=True, bits_weight=2, bits_activation=2)
    log = quantize_data_free(model, SPEC, rough, SPEC.probe(8), graph).log
    assert "  warning: the output is only" in log.report(verbose=False)
    fine = quantize_data_free(model, SPEC, PLAIN, SPEC.probe(8), graph).log
    assert "only" not in " ".join(fine.warnings)
