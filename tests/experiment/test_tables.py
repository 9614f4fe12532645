"""The Markdown tables made from recorded lines."""

import pytest

from utils.core.errors import UserError
from utils.experiment import records, tables


def line(**changes):
    content = {
        "format": records.FORMAT,
        "task": "classification",
        "engine": "simulate",
        "weights_sha256": "0",
        "model": "net",
        "weights": "net.pth",
        "data": "images",
        "samples": 100,
        "metric": "top1",
        "fp32": 70.0,
        "fp32_original": 71.0,
        "quantized": 69.5,
        "intervals": {"fp32_original": [61.0, 80.0]},
        "change_interval": [-3.0, 0.25],
        "recipe": "+ReLU+LE",
        "bits": {"weight": 8, "activation": 8, "bias": 32},
        "flags": {"per_channel": False, "relu": True},
        "command": "python main_cls.py --weights net.pth --quantize --workers 3 --results here",
        "commit": "abc",
    }
    return content | changes


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Put lines into results/ of a project of its own."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)

    def write(*lines):
        for one in lines:
            records.record(tmp_path / "results" / "some.jsonl", one)
        return "results/some.jsonl"

    return write


OTHER = {"quantized": None, "bits": None, "recipe": "Original", "flags": {"per_channel": False}}
OTHER |= {"command": "python main_cls.py --weights net.pth"}


def test_a_row_has_its_figures_its_interval_and_its_own_flags():
    (group,) = tables.grouped([line(), line(**OTHER)])
    text = tables.rows_table(group)
    assert "**net**, weights net.pth, 100 images of images; top1 in percent" in text
    assert "FP32 as loaded 71.00 (61.00 to 80.00); `python main_cls.py --weights net.pth` and:" in text
    assert "| row | W/A/bias | FP32 | quantized | change | 95 % CI | flags | commit |" in text
    assert "| +ReLU+LE | 8/8/32 | 70.00 | 69.50 | -1.50 | -3.00 to +0.25 | `--quantize` | abc |" in text
    assert "| Original | - | 70.00 | - | - | - | `` | abc |" in text


def test_a_flag_keeps_its_value_beside_another_of_the_same_value():
    common = "python main_cls.py --weights net.pth --distill_batch 4 --workers 4 --quantize"
    other = line(command=f"{common} --bits_weight 4", flags={"bits_weight": 4})
    (group,) = tables.grouped([line(command=common), other])
    text = tables.rows_table(group)
    assert "`python main_cls.py --weights net.pth --distill_batch 4` and:" in text
    assert "`--quantize` |" in text and "`--quantize --bits_weight 4` |" in text


def test_of_a_row_that_was_recorded_again_the_last_line_counts():
    (group,) = tables.grouped([line(quantized=1.0), line(**OTHER), line(quantized=2.0)])
    assert [row["quantized"] for row in group.rows] == [None, 2.0]


def test_rows_stand_in_one_order_whenever_they_were_recorded():
    four = {"weight": 4, "activation": 8, "bias": 32}
    lines = [
        line(recipe=name, flags={"n": i}) for i, name in enumerate(["auto: +LE+BC", "+of no table", "+BC", "+ReLU"])
    ]
    lines += [line(recipe="+ReLU", bits=four), line(recipe="+ReLU", flags={"per_channel": True})]
    (group,) = tables.grouped(lines)
    names = [tables.rows_table(group, ["row", "W/A/bias"]).splitlines()[i].split(" | ")[0] for i in range(4, 10)]
    assert names == ["| +ReLU", "| +ReLU per channel", "| +BC", "| +of no table", "| auto: +LE+BC", "| +ReLU"]


def test_networks_and_images_have_tables_of_their_own():
    groups = tables.grouped([line(), line(model="other", flags={"relu": False}), line(data="more")])
    assert [(group.rows[0]["model"], group.rows[0]["data"]) for group in groups] == [
        ("net", "images"),
        ("other", "images"),
        ("net", "more"),
    ]


def test_a_published_network_shows_the_published_figures():
    (group,) = tables.grouped([line(model="mobilenet_v2", data="ImageNet")])
    text = tables.rows_table(group)
    assert "| published (FP32 71.81) | published change | FP32 |" in text
    assert "| 70.32 | -1.49 | 70.00 | 69.50 | -1.50 |" in text


@pytest.mark.parametrize(
    ("changes", "name", "figure"),
    [
        ({"flags": {"relu": True, "asymmetric": True}}, "+ReLU+LE asymmetric", "70.32"),
        ({"flags": {"relu": True, "per_channel": True}}, "+ReLU+LE per channel", "-"),
        ({"bits": {"weight": 6, "activation": 8, "bias": 32}}, "+ReLU+LE", "-"),
        ({"engine": "onnxruntime"}, "+ReLU+LE in ONNX Runtime", "-"),
        ({"recipe": "auto: +ReLU+LE"}, "auto: +ReLU+LE", "-"),
    ],
)
def test_published_figures_stand_beside_rows_of_the_same_kind(changes, name, figure):
    (group,) = tables.grouped([line(model="mobilenet_v2", data="ImageNet", **changes)])
    row = tables.rows_table(group, ["row", "published"]).splitlines()[-1]
    assert row == f"| {name} | {figure} |"


def test_a_page_gets_the_rows_and_columns_that_it_asks_for(recorded):
    file = recorded(line(), line(**OTHER), line(model="other", flags={"relu": False}))
    page = f"before\n<!-- table: {file} | model: net | rows: Original, +ReLU+LE | columns: row, change -->\nold\n<!-- /table -->\nafter\n"
    text = tables.update(page)
    assert text.startswith("before\n<!-- table: ") and text.endswith("\n<!-- /table -->\nafter\n")
    assert "old" not in text and "other" not in text
    assert text.splitlines()[5:9] == [
        "| row | change |",
        "| --- | --- |",
        "| Original | - |",
        "| +ReLU+LE | -1.50 |",
    ]
    assert tables.update(text) == text


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("| colour: red", "no option 'colour'"),
        ("| model: absent", "no recorded row"),
        ("| layout: round", "layout 'round'; use engines or auto"),
        ("| layout: auto", "no recorded row"),
    ],
)
def test_a_wish_that_cannot_be_met_is_named(recorded, wish, message):
    with pytest.raises(UserError, match=message):
        tables.wished(f"{recorded(line())} {wish}")


def test_engines_are_shown_beside_the_simulation():
    found = line(engine="onnxruntime", metrics={"simulated": {"top1": 69.4}}, agreement=99.987)
    assert tables.engines_table(tables.grouped([found])).splitlines()[-1] == (
        "| net | net.pth | 100 | +ReLU+LE | top1 | 69.40 | 69.50 | 99.99 % |"
    )


def test_what_auto_loses_stands_in_a_line_for_each_network_and_a_column_for_each_number_of_bits():
    auto = {"recipe": "auto: +LE+BC", "flags": {"auto": True}}
    four = {"recipe": "auto: +AR", "flags": {"auto": True, "bits_weight": 4}, "quantized": 65.0}
    four |= {"bits": {"weight": 4, "activation": 8, "bias": 32}}
    elsewhere = auto | {
        "weights": "folder/other.pth",
        "weights_sha256": "1",
        "command": "python main_cls.py --weights folder/other.pth --auto",
    }
    groups = tables.grouped([line(), line(**four), line(**auto), line(**elsewhere)])
    assert tables.auto_table(groups) == (
        "| network | weights | images | metric | FP32 | 8 bits | 4 bits |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| net | net.pth | 100 | top1 | 71.00 | -1.50 (-3.00 to +0.25) | -6.00 (-3.00 to +0.25) |\n"
        "| net | other.pth | 100 | top1 | 71.00 | -1.50 (-3.00 to +0.25) | - |"
    )


def test_rows_of_older_code_are_counted_by_commit(monkeypatch):
    monkeypatch.setattr(tables, "_is_current", lambda commit, besides: commit == "abc" and not besides)
    assert tables.stale([line(), line(commit="old"), line(commit="old"), line(commit=None)]) == {"old": 2, "None": 1}
    assert tables.stale([line(), line(recipe="auto: +LE+BC")]) == {"abc": 1}, "a search has more code than its row"
    assert tables.stale([line(), line(fidelity={"noise": 20.0})]) == {"abc": 1}, "and a judgement has some"


def test_a_row_of_auto_is_of_older_code_where_todays_search_would_take_another(monkeypatch):
    monkeypatch.setattr(tables, "_is_current", lambda commit, besides: True)
    ranking = {"candidates": [{"recipe": "+LE+BC", "noise": 20.0}]}
    found = line(recipe="auto: +LE+BC", flags={"per_channel": False, "auto": True}, ranking=ranking)
    for name, old in (("+LE+BC", 0), ("+LE+BC per channel", 1), (None, 1)):
        monkeypatch.setattr(tables, "replayed", lambda line, name=name: name)
        assert tables.stale([line(), found]).total() == old


def test_code_that_learns_rounding_counts_where_rounding_was_learned_or_tried():
    learned = line(flags={"distill_rounding": "adaround"})
    ranking = {"candidates": [{"recipe": "+LE+AR+BC"}, {"recipe": "+LE+BC"}]}
    tried = line(recipe="auto: +LE+BC", ranking=ranking)
    compensated = line(flags={"distill_rounding": "gptq"})
    assert [set(tables._LEARNING) <= set(tables._besides(one)) for one in (learned, tried)] == [True, True]
    assert not set(tables._LEARNING) & {*tables._besides(compensated), *tables._besides(line())}
    assert all((tables.ROOT / file).is_file() for file in (*tables._LEARNING, *tables._SEARCH))


def test_other_words_make_no_other_code():
    code = 'def f(x):\n    """One."""\n    return x + 1  # so\n'
    assert tables._code(code) == tables._code('"""A file."""\ndef f(x):\n    """Two."""\n    return (x + 1)\n')
    assert tables._code(code) != tables._code(code.replace("+", "-"))


def test_a_file_is_held_to_what_it_was_at_a_commit(monkeypatch):
    file = "utils/quantization/qparams.py"
    now = (tables.ROOT / file).read_text()
    for before, same in ((now, True), (now + "# more\n", True), (now + "more = 1\n", False), (None, False)):
        told = {"diff": file, "show": before}
        monkeypatch.setattr(tables, "_git", lambda *words, told=told: told[words[0]])
        assert tables._is_current("abc", ()) == same


def test_code_that_was_never_committed_is_not_todays():
    for besides in ((), tables._SEARCH):
        assert not tables._is_current("abc+", besides) and not tables._is_current("None", besides)
        assert not tables._is_current("0" * 12, besides)


def test_a_page_without_markers_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(UserError, match="asks for no table"):
        tables.main([str(tmp_path / "page.md")])
