"""--table: every row once, whatever interrupts it."""

import multiprocessing
import re
import time
from functools import partial

import pytest
import torch

import dfq
import main_cls
import main_det
from utils.calibration import distillation
from utils.core.errors import UserError
from utils.experiment import cli
from utils.experiment.command_line import command
from utils.experiment.records import identity, read_lines
from utils.passes.block_learning import Reconstruction
from utils.quantization.recipe import TABLE
from utils.tasks.data import Batches

DEFAULTS = cli.defaults(main_cls.TASK)
ROWS = ["Original", "+ReLU+LE", "+LE+BC", "+LE+BC per channel"]


@pytest.fixture
def table(tmp_path):
    return ["--table", "--limit", "24", "--workers", "0", "--results", str(tmp_path / "runs.jsonl")]


def comparable(line):
    return {key: value for key, value in line.items() if key not in ("time", "forward_seconds", "command", "flags")}


def test_names_of_the_rows():
    assert list(TABLE) == [
        "Original",
        "+ReLU",
        "+ReLU+LE",
        "+ReLU+LE +DR",
        "+BC",
        "+BC +clip_15",
        "+ReLU+LE+BC",
        "+ReLU+LE+BC +DR",
        "+DC",
        "+DC+BC",
        "+LE",
        "+LE+BC",
        "+LE+BC +DR",
        "+LE+DBC",
        "+LE+DBC +DR",
        "+DLE+BC +DR",
        "+DLE+DBC +DR",
        "+LE+GPTQ+BC +DR",
        "+DLE+GPTQ+BC +DR",
        "+DLE+AR+BC +DR",
        "+LE+HBA+BC",
        "Original per channel",
        "+LE+BC per channel",
        "+DLE+GPTQ+BC +DR per channel",
        "+DLE+AR+BC +DR per channel",
    ]


def test_a_row_is_what_its_own_command_gives(table, tmp_path, capsys):
    main_cls.main([*table, "--rows", *ROWS])
    rows = read_lines(tmp_path / "runs.jsonl")
    assert [TABLE[name].words for name in ROWS] == [
        ["--quantize"],
        ["--relu", "--equalize", "--quantize"],
        ["--equalize", "--quantize", "--correction"],
        ["--equalize", "--quantize", "--correction", "--per_channel"],
    ]
    assert capsys.readouterr().out.count("FP32 as loaded") == len(ROWS)
    for row in (rows[1], rows[3]):
        program, script, *flags = row["command"].split()
        assert (program, script) == ("python", "main_cls.py") and "--table" not in flags and "--rows" not in flags
        flags[flags.index("--results") + 1] = str(tmp_path / "alone.jsonl")
        main_cls.main(flags)
        alone = read_lines(tmp_path / "alone.jsonl")[-1]
        assert comparable(alone) == comparable(row)
        assert identity(alone, DEFAULTS) == identity(row, DEFAULTS)


def test_a_row_that_looks_at_no_images_is_found_whatever_stands_beside_it(table, tmp_path, capsys):
    few = [*table, "--bits_weight", "4", "--distill_images", "8", "--distill_cache", str(tmp_path / "cache")]
    main_cls.main([*few, "--rows", "Original"])
    main_cls.main([*few, "--rows", "Original", "+LE+DBC"])
    assert "2 rows, 1 of them in" in capsys.readouterr().out
    first, second = read_lines(tmp_path / "runs.jsonl")
    assert [line["flags"]["distill_start"] for line in (first, second)] == ["natural", "leaves"]


def test_a_row_has_the_images_of_its_own_kind_whatever_stands_beside_it(table, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distillation, "LEAVES_STEPS", 1)
    monkeypatch.setattr(dfq, "Reconstruction", partial(Reconstruction, iterations=2))
    few = [*table, "--bits_weight", "4", "--distill_images", "4", "--distill_cache", str(tmp_path / "cache")]
    compensated, learned = "+LE+GPTQ+BC +DR", "+DLE+AR+BC +DR"
    looked, quantize = {}, dfq.quantize_data_free

    def looking(model, spec, recipe, **sources):
        looked[str(recipe)] = model, spec, sources["images"]
        return quantize(model, spec, recipe, **sources)

    monkeypatch.setattr(dfq, "quantize_data_free", looking)
    main_cls.main([*few, "--rows", compensated])
    main_cls.main([*few, "--rows", learned, compensated, "Original"])
    assert "3 rows, 1 of them in" in capsys.readouterr().out
    lines = list(read_lines(tmp_path / "runs.jsonl"))
    steps = {line["recipe"]: line["flags"]["distill_steps"] for line in lines}
    assert steps == {compensated: 0, learned: 1, "Original": 40}
    start = {line["recipe"]: line["flags"]["distill_start"] for line in lines}
    assert start == {compensated: "leaves", learned: "leaves", "Original": "natural"}
    model, spec, _ = looked[learned]
    kinds = {compensated: 0, learned: 1, "Original": 0}
    for name, taken in kinds.items():
        settings = distillation.from_leaves(distillation.Distillation(images=4), taken)
        assert torch.equal(looked[name][2], distillation.distill(model, spec, settings, torch.device("cpu")))


def test_detection_compares_with_the_float_network_that_ran_once(table, tmp_path):
    main_det.main([*table, "--rows", "Original", "+LE+BC"])
    (second,) = [row for row in read_lines(tmp_path / "runs.jsonl") if row["recipe"] == "+LE+BC"]
    flags = second["command"].split()[2:]
    flags[flags.index("--results") + 1] = str(tmp_path / "alone.jsonl")
    main_det.main(flags)
    alone = read_lines(tmp_path / "alone.jsonl")[-1]
    # Shifts are means over floats that kernels may round otherwise from run to run.
    assert alone["metrics"]["quantized"] == pytest.approx(second["metrics"]["quantized"], rel=1e-3)
    assert alone["metrics"]["fp32_original"] == second["metrics"]["fp32_original"]
    assert second["metrics"]["quantized"]["score_shift_mean"] > 0


def test_a_killed_table_goes_on_where_it_was(table, tmp_path, capsys):
    """Killed while rows are being written, again and again, until none is missing."""
    file = tmp_path / "runs.jsonl"
    argv = [*table, "--rows", *ROWS]

    def rows_there():
        return file.read_bytes().count(b"\n") if file.exists() else 0

    for _ in ROWS[:2]:
        before = rows_there()
        process = multiprocessing.get_context("fork").Process(target=main_cls.main, args=(argv,))
        process.start()
        while rows_there() == before and process.is_alive():
            time.sleep(0.01)
        process.kill()
        process.join()
        assert rows_there() > before
    with file.open("ab") as handle:
        handle.write(b'{"format": 2, "task": "class')
    main_cls.main(argv)
    assert "torn line" in capsys.readouterr().err
    rows = read_lines(file)
    assert len(rows) == len(ROWS) == len({identity(row, DEFAULTS) for row in rows})
    main_cls.main(argv)
    again = capsys.readouterr().out
    assert f"{len(ROWS)} rows, {len(ROWS)} of them in {file} already" in again
    assert [name for name in ROWS if re.search(rf"^{re.escape(name)} +\d", again, re.MULTILINE)] == ROWS
    assert rows_there() == len(ROWS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--table", "--relu"], "leave out --relu"),
        (["--table", "--per_channel"], "leave out --per_channel"),
        (["--rows", "Original"], "--rows needs --table"),
    ],
)
def test_flags_that_contradict_the_table(flags, message, capsys):
    with pytest.raises(SystemExit):
        main_cls.parse_args(flags)
    assert message in capsys.readouterr().err


def test_unknown_rows_are_named(table):
    with pytest.raises(UserError, match=r"no row '\+XY'; choose from 'Original', '\+ReLU'"):
        main_cls.main([*table, "--rows", "Original", "+XY"])


def test_the_command_of_a_row_leaves_the_table_out():
    words = ["--table", "--rows", "Original", "+LE+BC per channel", "--limit", "5"]
    assert command("main_cls.py", words, ["--quantize"]) == "python main_cls.py --limit 5 --quantize"
    assert command("main_cls.py", words[4:]) == "python main_cls.py --limit 5"


class Counted(torch.utils.data.Dataset):
    def __init__(self):
        self.read = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.read.append(index)
        return torch.full((3, 4, 4), float(index)), index


def test_the_command_of_a_row_without_images_says_what_they_were_for():
    """--table judges every row by images; --distill_batch alone would be refused where a row uses none."""
    typed = ["--table", "--distill_batch", "4"]
    without = command("main_cls.py", typed, ["--quantize"], looks=False)
    assert without == "python main_cls.py --distill_batch 4 --quantize --fidelity"
    assert cli.parse(main_cls.TASK, without.split()[2:]).distill_batch == 4
    assert command("main_cls.py", typed, ["--quantize", "--distill_range"]).endswith("--quantize --distill_range")
    assert command("main_cls.py", ["--table"], ["--quantize"], looks=False).endswith("main_cls.py --quantize")


@pytest.mark.parametrize(("room", "read_again"), [(10**6, 0), (4 * 3 * 16 * 4, 6), (0, 10)])
def test_images_are_decoded_once_where_they_fit(room, read_again):
    samples = Counted()
    loader = Batches(samples, batch_size=4, workers=0, seed=0, room=room)
    first, again = ([batch.targets.tolist() for batch in loader] for _ in range(2))
    assert first == again == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(samples.read) == 10 + read_again


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_rows_on_a_gpu_are_those_of_the_cpu(table, tmp_path):
    main_cls.main([*table, "--rows", *ROWS])
    main_cls.main([*table, "--rows", *ROWS, "--device", "cuda", "--results", str(tmp_path / "cuda.jsonl")])
    on_cpu, on_gpu = (read_lines(tmp_path / name) for name in ("runs.jsonl", "cuda.jsonl"))
    assert [line["recipe"] for line in on_gpu] == ROWS
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert other["quantized"] == pytest.approx(one["quantized"], abs=100 / 24)  # an image at a tie
