"""benchmarks.peers: what is measured, what is said of a peer that cannot run, and the table of both."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import images  # noqa: F401 (a fixture)

from benchmarks import peers
from benchmarks.peer_tools import FLOAT, PEERS, Job
from utils.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def flags(images, tmp_path):  # noqa: F811
    """Of a run on a tiny network: it is calibrated with copies of the pictures that it is scored on."""
    shutil.copytree(images, tmp_path / "others")
    words = [
        "--model",
        "test_cli:tiny",
        "--data",
        str(images),
        "--images",
        str(tmp_path / "others"),
        "--image_size",
        "8",
    ]
    return [*words, "--calibration", "6", "--results", str(tmp_path / "peers.jsonl")]


def recorded(tmp_path) -> list[dict]:
    return [json.loads(text) for text in (tmp_path / "peers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["ours", "ours-pictures", "ort-minmax"])
def test_a_peer_is_scored_on_the_images_beside_float(name, flags, tmp_path):
    peers.main([*flags, "--peer", FLOAT])
    peers.main([*flags, "--peer", name])
    reference, line = recorded(tmp_path)
    assert (line["peer"], line["samples"], line["calibration"]) == (name, 20, 6)
    assert line["version"] and line["seconds"] > 0
    for one in (reference, line):
        assert 5 * sum(hit for _, hit, _ in peers._unpacked(one).records) == pytest.approx(one["top1"])
    row = peers.report([reference, line]).splitlines()[-1]
    assert PEERS[name].recipe in row and f"{line['top1'] - reference['top1']:+.2f}" in row


def test_what_is_recorded_is_not_run_again(flags, tmp_path, capsys, monkeypatch):
    peers.main([*flags, "--peer", FLOAT])
    monkeypatch.setattr(peers, "_run_alone", lambda *_: pytest.fail("a recorded peer was run"))
    peers.main([*flags, "--only", FLOAT])
    assert len(recorded(tmp_path)) == 1
    assert (tmp_path / "peers.txt").read_text() in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_a_line_that_says_what_to_install(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(PEERS, "nncf", replace(PEERS["nncf"], package="no-such-package==1.0"))
    peers.main([*flags, "--peer", FLOAT])
    peers.main([*flags, "--only", "nncf"])
    line = next(line for line in recorded(tmp_path) if line["peer"] == "nncf")
    assert line["reason"] == "not installed; pip install no-such-package==1.0"
    rows = (tmp_path / "peers.txt").read_text().splitlines()
    assert any(row.startswith("NNCF") and row.endswith(line["reason"]) for row in rows)
    with pytest.raises(UserError, match="not installed; pip install no-such-package"):
        peers.main([*flags, "--peer", "nncf"])


def test_a_peer_that_fails_in_its_process_leaves_its_last_words(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [*flags[:-4], "--data", str(tmp_path / "absent"), "--peer", FLOAT]
    reason = peers._run_alone(words, 300)
    assert reason.startswith("ended with code 2: benchmarks.peers: error: ") and "test_cli" in reason


def line(name: str, hits: list[bool], **more) -> dict:
    made = {"weights_sha256": "0", "input": [8, 8, 8], "data": "d", "limit": None, "images": "i", "calibration": 6}
    made |= {"model": "m", "weights": "w", "peer": name, "version": "1.0", "seconds": 2.0, "samples": len(hits)}
    return made | {"top1": 100 * sum(hits) / len(hits), "hits": peers._packed(hits)} | more


def failed(name: str) -> dict:
    made = line(name, [True], reason="over 5 s")
    return {key: value for key, value in made.items() if key not in ("hits", "top1", "samples")}


def test_the_table_has_the_change_and_the_last_score_of_each():
    right = [False, True] * 50
    worse = [False] * 10 + right[10:]
    lines = [line(FLOAT, right, version=None), line("nncf", right), line("nncf", worse), failed("nncf"), failed("mct")]
    other = line("nncf", worse, data="elsewhere")
    first, second = peers.report([*lines, other]).strip().split("\n\n")
    title, pictures, _, fp32, nncf, mct = first.splitlines()
    assert "100 images of d" in title and "6 of i" in pictures
    assert fp32.split() == ["FP32", "50.00", "PyTorch"]
    assert "per tensor" in nncf and "45.00   -5.00" in nncf and "over 5 s" not in nncf
    low, high = map(float, nncf.split("-5.00")[1].split()[:3:2])
    assert low < -5 < high <= 0
    assert mct.endswith("over 5 s")
    assert "images of elsewhere" in second and second.splitlines()[-1].split()[-4:] == [
        "pictures",
        "45.00",
        "ONNX",
        "Runtime",
    ]


@pytest.mark.parametrize("hits", [[False, False, True], [True] * 9, [False] * 5])
def test_hits_come_back_as_they_were(hits):
    assert [hit for _, hit, _ in peers._unpacked(line(FLOAT, hits)).records] == hits


def test_pictures_that_are_scored_do_not_calibrate(flags, images, capsys):  # noqa: F811
    for folder in (images, next(path for path in images.iterdir() if path.is_dir())):
        with pytest.raises(SystemExit):
            peers.main([*flags, "--images", str(folder)])
        assert "share pictures" in capsys.readouterr().err


def test_every_row_has_a_name_of_its_own():
    rows = [(peer.tool, peer.recipe, peer.per_channel, peer.pictures, peer.ran_on) for peer in PEERS.values()]
    assert len(set(rows)) == len(rows)


def test_calibration_sees_every_picture_once():
    job = Job(torch.nn.Identity(), None, torch.arange(35.0).view(35, 1, 1, 1))
    assert torch.cat(job.batches()).flatten().tolist() == list(range(35))


def test_the_recorded_table_is_that_of_its_lines():
    lines = peers.read(ROOT / "results" / "peers" / "peers.jsonl")
    assert lines
    assert (ROOT / "results" / "peers" / "peers.txt").read_text() == peers.report(lines)
    assert not any(str(value).startswith("/") for line in lines for value in line.values())


def test_peers_are_chosen_by_name_and_float_is_always_there():
    assert peers.chosen(["mct"]) == [FLOAT, "mct"]
    assert peers.chosen(["mct*", "nncf"]) == [FLOAT, "nncf", "mct", "mct-channel", "mct-imx500"]
    assert peers.chosen(["*"]) == list(PEERS)
    with pytest.raises(UserError, match="there is no such peer"):
        peers.chosen(["mct", "absent"])
