"""Runs beside each other: what was measured alike stands together, what was not stands apart with the reason, and a
difference within the errors is none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hrgan.errors import UserError
from hrgan.monitor.compare import as_page, as_text, as_tree, comparison
from tests.conftest import cli, show
from tests.made_runs import PROVENANCE, log_row, metric_row, small_run, write_rows


def runs(tmp_path: Path, **rows: list[dict[str, Any]]) -> list[Path]:
    """A small run for each name, with these rows."""
    return [small_run(tmp_path / name, of) for name, of in rows.items()]


def test_runs_measured_alike_stand_in_one_table_and_one_plot(tmp_path: Path) -> None:
    found = comparison(
        runs(
            tmp_path,
            a=[metric_row(20_000, 9.0), metric_row(30_000, 4.0), metric_row(40_000, 5.0)],
            b=[metric_row(40_000, 7.0), metric_row(20_000, 8.0)],
        )
    )
    tree = as_tree(found)
    assert len(tree["groups"]) == 1
    a, b = tree["groups"][0]["runs"]
    assert (a["best"]["value"], a["best"]["nimg"], a["last"]["value"], a["verdict"]) == (4.0, 30_000, 5.0, "best")
    assert (b["best"]["value"], b["best"]["nimg"], b["last"]["nimg"], b["verdict"]) == (7.0, 40_000, 40_000, "+3")
    assert a["best"]["error"] == 0.05
    assert a["best"]["floor"] == 0.5
    assert a["img_per_sec"] == 100
    assert re.search(r"^a +4 ± 0.05 +30 +5 ± 0.05 +40 +best +40 +0.11 +100$", as_text(found), re.MULTILINE)
    page = as_page(found)
    assert page.count('<figure class="chart">') == 2  # Over images and over hours.
    assert [json.loads(points)[0][0] for points in re.findall('data-points="([^"]*)"', page)] == [
        20.0,
        20.0,
        pytest.approx(200 / 3600, rel=1e-5),
        pytest.approx(200 / 3600, rel=1e-5),
    ]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_fake", 10_000, "num_fake 10000 against 2048"),
        ("num_real", 999, "num_real 999 against 2000"),
        ("extractor_sha256", "ef" * 32, "extractor_sha256 efefefefefef… against abababababab…"),
        ("mirror", None, "mirror not recorded against False"),
        ("truncation", 0.7, "truncation 0.7 against not recorded"),
        ("resolution", 16, "resolution 16 against 8"),
        ("resize", "other", "resize other against bilinear-antialias-64"),
    ],
)
def test_a_run_measured_otherwise_stands_apart_and_what_differs_is_named(
    tmp_path: Path, key: str, value: Any, words: str
) -> None:
    other = [metric_row(40_000, 1.0, **{key: value})]
    found = comparison(runs(tmp_path, odd=other, a=[metric_row(40_000, 4.0)], b=[metric_row(40_000, 6.0)]))
    assert [[entry.name for entry in group.entries] for group in found.groups] == [["a", "b"], ["odd"]]
    assert found.apart(found.groups[1]) == words
    assert f"not comparable with the first group: {words}" in as_text(found)
    assert [row["verdict"] for group in as_tree(found)["groups"] for row in group["runs"]] == ["best", "+2", ""]
    for figure in as_page(found).split('<figure class="chart">')[1:]:
        names = set(re.findall(r'data-name="(\w+)"', figure))
        assert names in ({"a", "b"}, {"odd"})


def test_rows_of_two_provenances_of_a_run_are_parted(tmp_path: Path) -> None:
    both = [metric_row(20_000, 9.0), metric_row(40_000, 8.0), metric_row(40_000, 3.0, num_fake=50_000)]
    found = comparison(runs(tmp_path, a=both, b=[metric_row(40_000, 5.0, num_fake=50_000)]))
    assert [group.kind[4] for group in found.groups] == [50_000]
    assert [row["best"]["value"] for row in as_tree(found)["groups"][0]["runs"]] == [3.0, 5.0]


def test_growing_runs_are_compared_at_their_last_resolution_and_below_on_the_page(tmp_path: Path) -> None:
    rows = [metric_row(10_000, 20.0, resolution=4), metric_row(40_000, 6.0)]
    found = comparison(runs(tmp_path, a=rows, b=rows, c=rows[:1]))
    assert [(g.kind[0], [e.name for e in g.entries]) for g in found.groups] == [(4, ["a", "b", "c"]), (8, ["a", "b"])]
    found = comparison([tmp_path / "a", tmp_path / "b"])
    assert [group.kind[0] for group in found.groups] == [8]
    assert [group.kind[0] for group in found.lower] == [4]


@pytest.mark.parametrize(
    ("value", "error", "verdict"),
    [(5.1, 0.05, "no difference"), (5.2, 0.05, "+0.2"), (5.2, 0.2, "no difference"), (5.2, None, "error not known")],
)
def test_a_difference_within_twice_the_errors_is_none(
    tmp_path: Path, value: float, error: float | None, verdict: str
) -> None:
    row = metric_row(40_000, value, fid_error=error)
    if error is None:
        del row["fid_error"]
    tree = as_tree(comparison(runs(tmp_path, a=[metric_row(40_000, 5.0)], b=[row])))
    assert tree["groups"][0]["runs"][1]["verdict"].endswith(verdict)


def test_of_some_metrics_more_is_better(tmp_path: Path) -> None:
    a, b = ([metric_row(20_000, recall=most), metric_row(40_000, recall=0.1)] for most in (0.3, 0.4))
    tree = as_tree(comparison(runs(tmp_path, a=a, b=b), "recall"))
    assert [row["best"]["value"] for row in tree["groups"][0]["runs"]] == [0.3, 0.4]
    assert tree["groups"][0]["runs"][1]["verdict"] == "best"


def test_fid_is_taken_where_runs_have_several_metrics_and_another_where_asked(tmp_path: Path) -> None:
    def rows(fid: float) -> list[dict[str, Any]]:
        random = {"nimg": 40_000, "resolution": 8, "fd_random": 1.0, "fd_random_floor": 0.1, **PROVENANCE}
        return [random, metric_row(40_000, fid)]

    found = runs(tmp_path, a=rows(3.0), b=rows(4.0))
    assert comparison(found).metric == "fid"
    assert comparison(found, "fd_random").metric == "fd_random"
    assert "It is no FID" in as_page(comparison(found, "fd_random"))
    assert "It is no FID" not in as_page(comparison(found))
    with pytest.raises(UserError, match="no run has 'kid'; they have fid, fd_random"):
        comparison(found, "kid")


def test_runs_without_a_number_are_listed_with_the_reason(tmp_path: Path) -> None:
    found = comparison(
        runs(
            tmp_path,
            a=[metric_row(40_000)],
            new=[],
            broken=[metric_row(40_000, None)],
            other=[{"nimg": 1, "resolution": 8, "kid": 1.0, **PROVENANCE}],
        )
    )
    assert {name: reason.split(";")[0] for name, reason in found.without.items()} == {
        "new": "not evaluated yet",
        "broken": "fid could not be computed: its pictures were not finite, or too few",
        "other": "no fid, it has kid",
    }
    for name, reason in found.without.items():
        assert f"{name}: {reason}" in as_text(found)
        assert f"<li>{name}: {reason}</li>" in as_page(found)


def test_fields_that_differ_are_listed_and_no_others(tmp_path: Path) -> None:
    found = runs(tmp_path, a=[metric_row(40_000)], b=[metric_row(40_000)], c=[metric_row(40_000)])
    (found[1] / "config.yaml").write_text((found[1] / "config.yaml").read_text() + "seed: 3\n")
    (found[2] / "config.yaml").write_text("{")
    tree = as_tree(comparison(found))
    assert tree["config"] == {"seed": {"a": 0, "b": 3, "c": "not readable"}}


def test_hours_at_a_number_of_images_are_those_of_the_log(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    write_rows(run / "log.jsonl", [log_row(10_000, seconds=3600.0), log_row(30_000, seconds=10_800.0)])
    record = comparison([run, small_run(tmp_path / "other")]).records[0]
    assert [record.hours_at(nimg) for nimg in (0, 5_000, 10_000, 20_000, 30_000)] == [0.0, 0.5, 1.0, 2.0, 3.0]
    assert record.hours_at(30_001) is None


def test_the_command_prints_a_table_and_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = runs(tmp_path, a=[metric_row(40_000)], b=[metric_row(40_000, 7.0)])
    monkeypatch.chdir(tmp_path)
    assert cli("compare", *found) == 0
    output = capsys.readouterr().out
    assert output.startswith("fid at 8²: pt_inception-2015-12-05, 2,048 generated, 2,000 real, set cdcdcdcd\nrun ")
    assert output.endswith("\ncompare.html\n")
    assert "<title>fid of 2 runs</title>" in (tmp_path / "compare.html").read_text()
    (tmp_path / "compare.html").unlink()
    assert cli("compare", *found, "--json") == 0
    assert json.loads(capsys.readouterr().out)["groups"][0]["runs"][1]["verdict"] == "+2"
    assert not (tmp_path / "compare.html").exists()
    assert cli("compare", *found, "--json", "--out", tmp_path / "page.html") == 0
    json.loads(capsys.readouterr().out)
    assert (tmp_path / "page.html").exists()


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, empty = runs(tmp_path, a=[metric_row(40_000)], empty=[])
    (tmp_path / "folder").mkdir()
    other = small_run(tmp_path / "other", [])
    for words, message in (
        ((a,), f"compare: only {a} is named; name two run directories or more"),
        ((a, a), "is named twice"),
        ((a, tmp_path / "folder"), "no run (it has none of"),
        ((a, tmp_path / "none"), "no such folder"),
        ((empty, other), "none of the 2 runs has been evaluated; hrgan eval RUN --watch"),
        ((a, empty, "--metric", "fld"), "no run has 'fld'; they have fid"),
    ):
        assert cli("compare", *words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    found = comparison([small_run(tmp_path / "x" / "run"), small_run(tmp_path / "y" / "run")])
    assert found.names == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]


def test_hostile_names_do_nothing(tmp_path: Path) -> None:
    other = [metric_row(40_000, real_set="<b>")]
    page = as_page(
        comparison(runs(tmp_path, **{"<script>alert(1)": [metric_row(40_000)], "\"><img src=x onerror='1'>": other}))
    )
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "<b>&" not in page
    assert "set &lt;b&gt;" in page


# In a browser


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_shows_the_page_and_switches_to_hours(chromium: Any, tmp_path: Path, width: int) -> None:
    rows = [metric_row(10_000 * n, 10.0 - n) for n in range(1, 5)]
    found = runs(tmp_path, a=rows, b=rows, **{"a-very-long-name-of-a-run-" * 4: [metric_row(40_000, num_fake=3)]})
    path = tmp_path / "compare.html"
    path.write_text(as_page(comparison(found)))
    show(chromium, path, width)

    def titles() -> list[str]:
        return [one.text for one in chromium.find_elements("css selector", ".chart h3") if one.is_displayed()]

    assert titles() == ["fid over thousands of images"] * 2
    chromium.find_element("css selector", "label[for=hours0]").click()
    assert titles() == ["fid over hours trained", "fid over thousands of images"]
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    assert [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    requests = chromium.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in requests if not name.startswith("data:")] == []
