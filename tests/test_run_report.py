"""The page of a run: its numbers are those of the files, numbers that were not measured alike never meet on a curve, it
says what a careful reader must know, and browsers show it without a network."""

from __future__ import annotations

import html
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hrgan.errors import UserError
from hrgan.monitor import frames
from hrgan.monitor.cautions import cautions
from hrgan.monitor.curves import Chart, Curve, Look, Point, binned, draw, scale_of
from hrgan.monitor.record import read_record
from hrgan.monitor.report import write_report
from tests.conftest import TINY, Children, cli, show
from tests.made_runs import PROVENANCE, log_row, long_run, metric_row, picture, small_run, write_rows
from tests.test_train import train

HOSTILE = ("<script>alert(1)<", "\"><img src=x onerror=alert('1')>", "two\nlines & more", "\u202egnp", "' onload='x")


class Page(HTMLParser):
    """What a browser finds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def chart(self, title: str) -> str:
        """The source of the figure of this title."""
        return next(part for part in self.source.split('<figure class="chart">') if part.startswith(f"<h3>{title}"))

    def curves(self, title: str) -> dict[str, list[list[float | None]]]:
        """The numbers of a chart's curves by name."""
        found = re.findall(r'<g class="curve [^"]*" data-name="([^"]*)" data-points="([^"]*)">', self.chart(title))
        return {html.unescape(name): json.loads(points) for name, points in found}

    def row(self, name: str) -> list[str]:
        """The cells of the first table row of this name, without markup."""
        found = re.search(f'<tr><th scope="row">{name}</th>(.*?)</tr>', self.source)
        assert found, f"no row {name}"
        return [re.sub("<[^>]*>", " ", cell).strip() for cell in re.findall("<td>(.*?)</td>", found[1])]


def page(run: Path) -> Page:
    return Page(write_report(run))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path, children: Children) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "tiny.yaml").write_text(TINY.format(shards=shards))
    code, output = children.run(folder / "log", train, str(folder / "tiny.yaml"), str(folder / "run"))
    assert code == 0, output
    return folder / "run"


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return long_run(tmp_path_factory.mktemp("report") / "long")


# A trained run


def test_the_page_of_a_trained_run_holds_the_numbers_of_its_files(trained: Path, capsys: Any) -> None:
    assert cli("report", trained) == 0
    assert capsys.readouterr().out == f"{trained / 'report.html'}\n"
    made = Page(trained / "report.html")
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["nimg"] for row in rows] == [32, 96, 160]
    for row in rows:
        assert f'title="{row["fd_random"]!r}"' in made.source
    points = made.curves("fd_random, less is better")
    assert {name: [x for x, *_ in of] for name, of in points.items()} == {"4²": [0.032], "8²": [0.096], "16²": [0.16]}
    for row, (_, of) in zip(rows, points.items(), strict=True):
        assert of[0][1] == pytest.approx(row["fd_random"], rel=1e-5)
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    logged = made.curves("Losses")
    assert [y for _, y in logged["generator"]] == pytest.approx([row["loss_g"] for row in log], rel=1e-5)
    assert [y for _, y in logged["discriminator"]] == pytest.approx([row["loss_d"] for row in log], rel=1e-5)
    assert "finished" in made.text
    assert "is not FID" in made.text
    assert made.row("<b>network.latent</b>") == ["8  default: 512"]
    assert made.row("loss.gp_lambda") == ["10.0"]
    pictures = list((trained / "samples").glob("*.png"))
    assert len([1 for tag, of in made.elements if tag == "figure" and "data-kimg" in of]) == len(pictures) > 0


def test_a_run_goes_on_and_is_evaluated_beside_its_page(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    write_report(run)
    assert cli("eval", run, "--watch") == 0
    assert len(page(run).curves("fd_random, less is better")["16²"]) == 4  # In the fade, too.


# Any state


def test_a_run_that_has_just_started_has_a_page(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", [], log_jsonl=None, metrics_jsonl=None, FINISHED=None)
    made = page(run)
    assert "Nothing has been evaluated yet." in made.text
    assert "Nothing has been logged yet." in made.text
    assert "No sample grid yet." in made.text
    assert "running or interrupted" in made.text


def test_a_run_that_was_evaluated_and_not_logged_has_a_page(tmp_path: Path) -> None:
    assert page(small_run(tmp_path / "run", log_jsonl="")).curves("fid, less is better")["8²"][-1][:2] == [40.0, 5.0]


def test_a_stopped_run_says_why(tmp_path: Path) -> None:
    assert "stopped: SIGTERM & <b>" in page(small_run(tmp_path / "a", FINISHED=None, STOP="SIGTERM & <b>\n")).text
    assert "stopped: on request" in page(small_run(tmp_path / "b", FINISHED=None, STOP="")).text


def test_a_cut_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    for name in ("log.jsonl", "metrics.jsonl"):
        content = (run / name).read_text()
        (run / name).write_text(content + content[:50])
    made = page(run)
    assert "log.jsonl: its last line is cut" in made.text
    assert "metrics.jsonl: its last line is cut" in made.text
    assert len(made.curves("Losses")["generator"]) == 4
    assert len(made.curves("fid, less is better")["8²"]) == 2
    assert "its last line is cut" not in page(small_run(tmp_path / "whole")).text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config_yaml", "data: [broken"),
        ("config_yaml", "schedule: {total_kimg: many}"),
        ("config_yaml", "nothing: known"),
        ("config_yaml", None),
        ("environment_json", "{"),
        ("environment_json", "[1]"),
        ("log_jsonl", "\x00" * 50),
        ("log_jsonl", '{"kimg": 1}\n[3]\n'),
        ("metrics_jsonl", '{"nimg": 1}\n{"nimg": 1, "resolution": 8, "num_fake": [1]}\n'),
        ("metrics_jsonl", '{"nimg": 1000, "resolution": 8, "fid": NaN, "fid_floor": Infinity}\n'),
    ],
)
def test_damaged_files_cost_their_part_of_the_page_only(tmp_path: Path, name: str, content: str | None) -> None:
    made = page(small_run(tmp_path / "run", **{name: content}))
    assert "Environment" in made.text
    assert made.source.rstrip().endswith("</html>")


def test_without_a_configuration_fades_are_those_of_the_log(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", config_yaml=None)
    alphas = [(4, 1.0, 0), (8, 0.5, 1), (8, 1.0, 1), (8, 1.0, 2)]
    rows = [log_row(10_000 * (n + 1), resolution=r, alpha=a, phase=p) for n, (r, a, p) in enumerate(alphas)]
    write_rows(run / "log.jsonl", rows)
    found = [(band.start, band.end, band.size, band.fading) for band in read_record(run).bands()]
    assert found == [(0, 10, "4²", False), (10, 30, "8²", True), (30, 40, "8²", False)]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert cli("report", tmp_path) == 2
    assert "no run (it has none of environment.json" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "missing")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: Any) -> None:
    run = small_run(tmp_path / "run")
    assert cli("report", run, "--out", tmp_path / "none" / "page.html") == 2
    assert f"there is no folder {tmp_path / 'none'}" in capsys.readouterr().err
    assert cli("report", run, "--out", tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.glob("*.tmp"))


# Curves


def test_fades_are_shaded_where_the_schedule_has_them(tmp_path: Path, long: Path) -> None:
    chart = page(small_run(tmp_path / "run")).chart("Losses")
    rects = re.findall(r'<rect class="fade" x="([\d.]+)" y="0" width="([\d.]+)"', chart)
    assert [(float(x), float(width)) for x, width in rects] == [(250.0, 250.0)]  # 10 to 20 of 40 kimg.
    chart = page(long).chart("Losses")
    shaded = [float(x) * 12 for x in re.findall(r'<rect class="fade" x="([\d.]+)"', chart)]
    assert shaded == pytest.approx([600 + 1200 * n for n in range(8)])
    borders = [float(x) * 12 for x in re.findall(r'<path class="border" d="M([\d.]+) 0V1000"', chart)]
    assert borders == pytest.approx(shaded)


def test_a_size_that_is_not_square_is_named_as_height_and_width(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    (run / "config.yaml").write_text("network: {grid: [4, 6], resolution: 8}\nschedule: {total_kimg: 40}\n")
    assert "8x12" in page(run).curves("fid, less is better")


def test_two_provenances_never_share_a_curve(tmp_path: Path) -> None:
    others = {"num_fake": 50_000, "num_real": 9, "mirror": True, "truncation": 0.7, "real_set": "ef", "resize": "x"}
    rows = [metric_row(1000 * n, 10.0 + n, num_fake=2048) for n in range(1, 4)]
    rows += [metric_row(10_000 + 1000 * n, 100.0 + n, **{key: value}) for n, (key, value) in enumerate(others.items())]
    rows += [metric_row(39_000, 99.0, resolution=16)]
    del rows[1]["mirror"]  # As a row of an older run: not the same as false.
    made = page(small_run(tmp_path / "run", rows))
    chart = made.chart("fid, less is better")
    curves = re.findall(r'<g class="curve.*?</g>', chart)
    assert len(curves) == 2 + len(others) + 1
    seen: list[float] = []
    for curve in curves:
        numbers = json.loads(re.findall(r'data-points="([^"]*)"', curve)[0])
        line = re.findall(r'<path class="line" d="([^"]*)"', curve)
        assert len(line) == 1
        assert line[0].count("M") + line[0].count("L") == len(numbers)
        behind = [row for row in rows if row["fid"] in [n[1] for n in numbers]]
        assert len({tuple(str(row.get(key)) for key in ("resolution", *PROVENANCE)) for row in behind}) == 1
        seen += [n[1] for n in numbers]
    assert sorted(seen) == sorted(row["fid"] for row in rows)
    looks = re.findall(r'<li><svg class="key ([^"]*)".*?</svg>(.*?)</li>', chart)
    assert len({look for look, _ in looks}) == len(looks) == 2 + len(others)  # The resolutions of one share an entry.
    assert any("50,000 generated" in words for _, words in looks)
    assert any("truncation 0.7" in words for _, words in looks)


def test_rows_out_of_order_are_drawn_in_order_and_the_newest_stands_first_in_the_table(tmp_path: Path) -> None:
    made = page(small_run(tmp_path / "run", [metric_row(n, float(n)) for n in (40_000, 10_000, 30_000)]))
    assert [x for x, *_ in made.curves("fid, less is better")["8²"]] == [10.0, 30.0, 40.0]
    places = [made.source.index(f'<tr><th scope="row">{name}') for name in ("40<", "30<", "10 <b>best")]
    assert places == sorted(places)


def test_a_row_shows_value_error_and_floor_and_what_is_alike_stands_once(tmp_path: Path) -> None:
    rows = [metric_row(10_000, 9.5), metric_row(20_000, 7.25, num_fake=4096, kid=None, fid_error=0.125)]
    made = page(small_run(tmp_path / "run", rows))
    newest = made.row("20 <b>best</b>")  # Of two kinds with as many rows the one that was measured last.
    assert newest[0].split() == ["7.25", "±", "0.12", "floor", "0.5"]
    assert newest[1:] == ["not computed", "4,096"]
    assert made.row("10")[1:] == ["–", "2,048"]
    assert made.source.count("<dt>num_real</dt>") == 1
    assert made.source.count("<dt>num_fake</dt>") == 0


def test_error_bars_and_floors_are_drawn_at_their_numbers() -> None:
    points = [Point(0, 5.0, 4.0, 6.0), Point(10, 3.0, 2.0, 4.0)]
    drawn = draw(Chart("t", [Curve("a", points, Look(0, 0, 0), [(0, 1.0), (10, 1.0)])], 10))
    scale = scale_of([Curve("a", points, Look(0, 0, 0), [(0, 1.0)])])
    assert not scale.log
    assert f"M0.0 {scale.at(4):.1f}L0.0 {scale.at(6):.1f}" in drawn
    assert f'<path class="floor" d="M0.0 {scale.at(1):.1f}' in drawn


def test_skipped_steps_leave_gaps(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    rows = [log_row(10_000 * n, loss_g=None if n == 3 else float(n)) for n in range(1, 6)]
    write_rows(run / "log.jsonl", rows)
    made = page(run)
    assert made.curves("Losses")["generator"] == [[10, 1], [20, 2], [30, None], [40, 4], [50, 5]]
    line = re.findall(r'data-name="generator".*?<path class="line" d="([^"]*)"', made.chart("Losses"))[0]
    assert line.count("M") == 2
    assert line.count("L") == 2


def test_a_wide_range_is_drawn_on_a_logarithmic_scale() -> None:
    def of(*ys: float) -> Curve:
        return Curve("a", [Point(float(x), y) for x, y in enumerate(ys)])

    scale = scale_of([of(1, 10, 100)])
    assert scale.log
    assert scale.at(1) - scale.at(10) == pytest.approx(scale.at(10) - scale.at(100))
    assert not scale_of([of(1, 10, 20)]).log
    assert not scale_of([of(-1, 10, 100)]).log
    assert not scale_of([of(0, 10, 100)]).log
    assert 2 <= len(scale.ticks()) <= 6


@pytest.mark.parametrize("ys", [(0.0,), (5.0, 5.0), (-3.0,), (1e-9, 1e9), (-1e30, 1e30), (3.1, 3.100001), (1e-300,)])
def test_any_numbers_have_a_scale(ys: tuple[float, ...]) -> None:
    scale = scale_of([Curve("a", [Point(1.0, y) for y in ys])])
    assert all(0 <= scale.at(y) <= 1000 for y in ys)
    assert "nan" not in draw(Chart("t", [Curve("a", [Point(1.0, y) for y in ys])], 1))


def test_a_floor_is_in_sight_unless_it_would_press_the_curve_flat() -> None:
    def heights(y: float, floor: float) -> tuple[float, float]:
        scale = scale_of([Curve("a", [Point(0, y), Point(1, 1.2 * y)], floor=[(0, floor)])])
        return scale.low, scale.high

    assert heights(0.0, 0.93) == (0, pytest.approx(0.9858))
    low, high = heights(10.0, 0.5)
    assert low <= 0.5 < high
    low, high = heights(10.0, 1e-5)
    assert 1e-5 < low < 10.0


def test_bins_keep_the_mean_the_least_and_the_greatest() -> None:
    xs = [float(n) for n in range(1000)]
    points = binned(xs, [None if n < 10 else float(n % 10) for n in range(1000)], 100)
    assert len(points) == 100
    assert points[0] == Point(4.5, None)
    assert points[1] == Point(14.5, 4.5, 0.0, 9.0)
    assert len(binned(xs, xs, 1000)) == 1000
    assert binned([], [], 10) == []


def test_the_page_of_a_hundred_thousand_lines_is_small_and_made_in_seconds(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    write_rows(run / "log.jsonl", [log_row(400 * n, loss_g=1 + (n * 7919 % 100) / 100) for n in range(1, 100_001)])
    began = time.perf_counter()
    made = page(run)
    assert time.perf_counter() - began < 20
    assert len(made.source) < 1_500_000
    assert len(made.curves("Losses")["generator"]) == 500
    x, mean, low, high = made.curves("Losses")["generator"][0]
    assert (x, mean, low, high) == pytest.approx((40.2, 1.495, 1.0, 1.99))


# Details


def test_the_line_over_one_by_n_meets_zero_where_the_numbers_point(tmp_path: Path) -> None:
    at = {"1000": 8.0, "2000": 6.5, "4000": 5.75}  # 5 + 3000 / N.
    made = page(small_run(tmp_path / "run", [metric_row(40_000, fid_at=at)]))
    curves = made.curves("fid by number of pictures")
    assert curves["measured"] == [[0.00025, 5.75], [0.0005, 6.5], [0.001, 8.0]]
    assert curves["line through them"][0] == [0.0, pytest.approx(5.0)]


def test_the_worst_class_stands_first(tmp_path: Path) -> None:
    classes = {"shirt": 41.2, "shoe": 90.0, "hat": 12.5, "sock": None}
    row = metric_row(40_000, class_fid=40.0, class_fid_by_class=classes)
    source = page(small_run(tmp_path / "run", [row])).source
    section = source[source.index("class_fid, the worst class first") :]
    assert re.findall(r'<tr><th scope="row">(\w+)</th><td>([^<]*)</td>', section)[:4] == [
        ("shoe", "90"),
        ("shirt", "41.2"),
        ("hat", "12.5"),
        ("sock", "not computed"),
    ]


# Warnings

CAUSES: dict[str, tuple[dict[str, Any], list[dict[str, Any]] | None, dict[str, str | None]]] = {
    "not finished": ({}, None, {"FINISHED": None}),
    "no metrics": ({}, [], {}),
    "damage": ({}, None, {"environment_json": "{"}),
    "skipped": ({"skipped_steps": 3}, None, {}),
    "replaced": ({"bad_samples": 1}, None, {}),
    "rollback": ({"rollbacks": 2}, None, {}),
    "waiting": ({"data_wait": 0.2}, None, {}),
    "stand-in": (
        {},
        [{"nimg": 40_000, "resolution": 8, "fd_random": 5.0, "fd_random_floor": 0.5, **PROVENANCE}],
        {},
    ),
    "provenance": ({}, [metric_row(20_000, 9.0, num_fake=100), metric_row(40_000)], {}),
    "not computed": ({}, [metric_row(20_000, None), metric_row(40_000)], {}),
    "worse since": ({}, [metric_row(20_000, 4.5), metric_row(40_000)], {}),
    "memorised": ({}, [metric_row(40_000, authenticity=0.4)], {}),
    "near the floor": ({}, [metric_row(40_000, 0.55)], {}),
}


@pytest.mark.parametrize("about", CAUSES)
def test_each_warning_appears_where_its_cause_is_and_alone(tmp_path: Path, about: str) -> None:
    more, metrics, files = CAUSES[about]
    run = small_run(tmp_path / "run", metrics, **files)
    write_rows(run / "log.jsonl", [log_row(nimg, **more) for nimg in (10_000, 20_000, 30_000, 40_000)])
    found = cautions(read_record(run))
    assert [one.about for one in found] == [about]
    assert found[0].remedy
    assert re.findall('<li data-about="([^"]*)">', page(run).source) == [about]


def test_the_training_s_warnings_are_shown_once_with_where_they_began_and_a_remedy(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    rows = [
        log_row(10_000),
        log_row(20_000, warnings=["vanishing G"]),
        log_row(30_000, warnings=["vanishing G", "D memorising"], augment_strength=0.3),
        log_row(40_000, warnings=["x", 5, {}]),
        log_row(50_000, warnings="none"),
    ]
    write_rows(run / "log.jsonl", rows)
    found = cautions(read_record(run))
    assert [(one.about, one.says) for one in found] == [
        ("vanishing G", "Training warned of vanishing G, first at 20 kimg."),
        ("D memorising", "Training warned of D memorising, first at 30 kimg."),
    ]
    assert "stronger augmentation" in found[1].remedy



def test_without_a_cause_there_is_no_warning(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    assert cautions(read_record(run)) == []
    assert "<h2>Warnings</h2><p>None.</p>" in page(run).source


@pytest.mark.parametrize(("since", "warned"), [(5.1, False), (5.2, True), (4.9, False)])
def test_only_more_than_the_errors_counts_as_worse(tmp_path: Path, since: float, warned: bool) -> None:
    # Errors 0.05 each: twice both together is 0.141.
    run = small_run(tmp_path / "run", [metric_row(20_000, 5.0), metric_row(40_000, since)])
    assert [one.about for one in cautions(read_record(run))] == ["worse since"] * warned


@pytest.mark.parametrize(("used", "warned"), [(96, False), (40, True)])
def test_fewer_reals_than_the_set_has_are_said(tmp_path: Path, shards: Path, used: int, warned: bool) -> None:
    real_set = json.loads((shards / "manifest.json").read_text())["real_set"]
    run = small_run(tmp_path / "run", [metric_row(40_000, num_real=used, real_set=real_set)])
    (run / "config.yaml").write_text(f"data: {{path: {shards}}}\n")
    assert [one.about for one in cautions(read_record(run))] == ["fewer reals"] * warned


@pytest.mark.parametrize(("error", "doubtful"), [(0.01, False), (0.06, True), (None, False)])
def test_authenticity_within_its_error_is_said_with_doubt(tmp_path: Path, error: float | None, doubtful: bool) -> None:
    row = metric_row(40_000, authenticity=0.4, authenticity_error=error)
    (found,) = cautions(read_record(small_run(tmp_path / "run", [row])))
    assert ("by less than twice its error" in found.says) is doubtful


def test_growing_alone_is_no_change_of_provenance(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", [metric_row(9_000, 9.0, resolution=4), metric_row(40_000)])
    assert cautions(read_record(run)) == []


# Safety


def test_hostile_names_are_shown_and_do_nothing(tmp_path: Path) -> None:
    classes = {name: 10.0 + place for place, name in enumerate(HOSTILE)}
    rows = [
        metric_row(1000 * place, 5.0, extractor=name, real_set=name, class_fid_by_class=classes)
        for place, name in enumerate(HOSTILE, 1)
    ]
    run = small_run(tmp_path / "<b onclick=x>&run", rows, STOP="<script>")
    facts = {"command": list(HOSTILE), "<i>": "<i>", "packages": {"<u>": "<u>"}}
    (run / "environment.json").write_text(json.dumps(facts))
    (run / "config.yaml").write_text("data: {path: '<script>alert(2)</script>'}\n")
    made = page(run)
    tags = [tag for tag, _ in made.elements]
    assert tags.count("script") == 1  # The page's own.
    assert not {"i", "u", "img"} & set(tags)
    assert not [name for _, attributes in made.elements for name in attributes if name.startswith("on")]
    for name in HOSTILE:
        seen = name.replace("\n", "\\n").replace("\u202e", "\\u202e")
        assert seen in made.text


def test_the_page_refers_to_nothing_outside_and_runs_its_own_script_only(long: Path) -> None:
    made = page(long)
    policy = next(of["content"] for tag, of in made.elements if tag == "meta" and "http-equiv" in of)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    for tag, attributes in made.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "background"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), tag
    assert "url(" not in made.source
    assert "@import" not in made.source
    assert made.source == page(long).source


# Pictures


def test_generated_and_real_pictures_are_parted_and_reals_stand_once(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    for number in range(3):
        picture(run / "samples" / f"{10 * number:08.1f}kimg-8px.png", seed=number)
    strip = frames.strip_of(run / "samples", 1e6, split=True)
    assert [frame.kimg for frame in strip.frames] == [0, 10, 20]
    assert [shot.size for shot, _ in strip.shots] == [(40, 40)] * 3
    made = page(run)
    assert sum(tag == "img" for tag, _ in made.elements) == 4
    picture(run / "samples" / "000030.0kimg-8px.png", gap=None)  # One without reals beside.
    assert frames.strip_of(run / "samples", 1e6, split=True).shots[3][1] is None


def test_more_pictures_than_the_budget_are_thinned_evenly_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(tmp_path / "run")
    noise = np.random.default_rng(0)
    for number in range(41):
        path = run / "samples" / f"{number:08.1f}kimg-8px.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (100, 100, 3), dtype=np.uint8)).save(path)
    strip = frames.strip_of(run / "samples", 150_000, split=True)
    assert 5 < len(strip.frames) < 20
    assert strip.bytes <= 150_000
    kimg = [frame.kimg for frame in strip.frames]
    assert (kimg[0], kimg[-1]) == (0, 40)
    steps = np.diff(kimg)
    assert steps.max() - steps.min() <= 1
    monkeypatch.setattr("hrgan.monitor.report.BUDGET", 150_000 / 0.65)
    assert f"{len(kimg)} of 41 pictures" in page(run).text


def test_pictures_of_any_kind_are_shown_and_damaged_ones_named(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    folder = run / "samples"
    folder.mkdir()
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(folder / "000001.0kimg-8px.png")
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(folder / "000002.0kimg-8px.png")
    Image.new("L", (3000, 1500), 7).save(folder / "000003.0kimg-8px.png")
    (folder / "000004.0kimg-8px.png").write_bytes((folder / "000003.0kimg-8px.png").read_bytes()[:90])
    (folder / "notes.png").write_bytes(b"")
    strip = frames.strip_of(folder, 1e6, split=True)
    assert strip.damaged == ["000004.0kimg-8px.png"]
    assert [shot.size for shot, _ in strip.shots] == [(20, 20), (20, 20), (1024, 512)]
    colours = [frames._rgb(Image.open(frame.path)).getpixel((0, 0)) for frame in strip.frames]
    assert colours == [(155, 155, 155), (255, 255, 255), (7, 7, 7)]  # 40000 / 257; transparency over white.
    assert "1 picture cannot be read: 000004.0kimg-8px.png" in page(run).text


# In a browser


def moved(driver: Any, box: str) -> tuple[str, str]:
    """Label and picture that a slider shows."""
    script = """const box = document.querySelector(arguments[0]);
        const shown = [...box.querySelectorAll('.made .frame')].filter(frame => frame.offsetParent);
        return [box.querySelector('output').value, shown.map(frame => frame.querySelector('img').src).join()]"""
    label, source = driver.execute_script(script, f"#{box}")
    assert source.count("data:") == 1
    return label, source


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_shows_the_page_whole_and_quietly(chromium: Any, long: Path, width: int) -> None:
    show(chromium, write_report(long), width)
    assert chromium.execute_script("return window.innerWidth") == width
    chromium.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert chromium.execute_script("return document.querySelectorAll('details[open] table').length") >= 3
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    spilling = chromium.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
        "e.clientWidth && !e.closest('.wide, svg') && getComputedStyle(e).overflowX === 'visible' && "
        "!e.closest('.plot') && !e.querySelector('.plot')).map(e => e.outerHTML.slice(0, 80))"
    )
    assert spilling == []
    images = chromium.execute_script("return [...document.images].map(image => [image.complete, image.naturalWidth])")
    assert images
    assert all(complete and wide > 0 for complete, wide in images)
    requests = chromium.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in requests if not name.startswith("data:")] == []
    assert [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("late", [False, True])
def test_labels_of_an_axis_do_not_run_into_each_other(
    chromium: Any, long: Path, tmp_path: Path, width: int, late: bool
) -> None:
    run = small_run(tmp_path / "run", [metric_row(1_000_000)]) if late else long
    if late:  # All but the last resolution take 3 % of the axis.
        (run / "config.yaml").write_text("schedule: {total_kimg: 1000, stable_kimg: 20, fade_kimg: 10}\n")
    show(chromium, write_report(run), width)
    shown = chromium.execute_script("return [...document.querySelector('.plot').querySelectorAll('.size')].length")
    assert shown >= 4
    script = """return [...document.querySelectorAll('.plot')].flatMap(plot => ['.x', '.y', '.size'].flatMap(kind => {
      const boxes = [...plot.querySelectorAll(kind)].map(e => e.getBoundingClientRect()).filter(b => b.width);
      return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => a.left < b.right && b.left < a.right &&
        a.top < b.bottom && b.top < a.bottom).map(b => kind)).concat(
        boxes.filter(b => b.left < 0 || b.right > innerWidth).map(b => 'outside')); }))"""
    assert chromium.execute_script(script) == []
    sizes = "return [...document.querySelectorAll('.plot span')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(chromium.execute_script(sizes)) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_the_slider_moves_pictures_and_label_and_takes_the_neighbours_along(
    chromium: Any, long: Path, width: int
) -> None:
    from selenium.webdriver.common.keys import Keys

    show(chromium, write_report(long), width)
    assert moved(chromium, "samples")[0] == "10,800 kimg, 1024²"
    last, neighbour = moved(chromium, "samples"), moved(chromium, "neighbours")
    slider = chromium.find_element("css selector", "#samples input")
    slider.send_keys(Keys.ARROW_LEFT)
    before = moved(chromium, "samples")
    assert before[0] == "9,500 kimg, 1024²"
    assert before[1] != last[1]
    assert moved(chromium, "neighbours")[0] == "9,500 kimg, 1024²"
    assert moved(chromium, "neighbours")[1] != neighbour[1]
    slider.send_keys(Keys.HOME)
    assert moved(chromium, "samples")[0] == "400 kimg, 4²"
    assert moved(chromium, "neighbours")[0] == "8,200 kimg, 512²"  # The nearest there is.
    chromium.find_element("css selector", "#samples .stage").send_keys(Keys.ARROW_RIGHT)
    assert moved(chromium, "samples")[0] == "1,700 kimg, 8²"


@pytest.mark.slow
def test_play_runs_from_the_first_to_the_last_and_pauses(chromium: Any, long: Path) -> None:
    show(chromium, write_report(long), 1400)
    button = chromium.find_element("css selector", "#samples button")
    button.click()
    assert button.text == "Pause"
    assert moved(chromium, "samples")[0] == "400 kimg, 4²"
    deadline = time.monotonic() + 20
    while moved(chromium, "samples")[0] == "400 kimg, 4²" and time.monotonic() < deadline:
        time.sleep(0.05)
    button.click()
    paused = moved(chromium, "samples")
    assert paused[0] == "1,700 kimg, 8²"
    assert button.text == "Play"
    time.sleep(0.8)
    assert moved(chromium, "samples") == paused
    button.click()
    while button.text == "Pause" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert moved(chromium, "samples")[0] == "10,800 kimg, 1024²"


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_a_pointer_shows_the_numbers_at_its_place(chromium: Any, long: Path, width: int) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    path = write_report(long)
    show(chromium, path, width)
    plot = chromium.find_element("css selector", ".plot")
    chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    ActionChains(chromium).move_to_element_with_offset(plot, int(plot.size["width"] / 2) - 1, 0).perform()
    rows = {row["nimg"]: row for row in map(json.loads, (long / "metrics.jsonl").read_text().splitlines())}
    lines = chromium.find_element("css selector", ".tip").text.splitlines()
    last = rows[12_000_000]
    assert lines[0] == "12000 kimg"
    assert lines[1].startswith(f"1024², 50,000 generated: {last['fid']:.5g} (")
    assert len(lines) == 2  # None of another provenance.
    box = chromium.execute_script("return document.querySelector('.tip').getBoundingClientRect().toJSON()")
    assert 0 <= box["left"] < box["right"] <= width
    from selenium.webdriver.common.keys import Keys

    plot.send_keys(Keys.ARROW_LEFT)
    assert chromium.find_element("css selector", ".tip").text.splitlines()[0] == "11700 kimg"


@pytest.mark.slow
def test_a_tap_shows_the_numbers_until_another_chart_is_tapped(chromium: Any, long: Path) -> None:
    show(chromium, write_report(long), 390)
    chromium.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        for number in (0, 1):
            plot = chromium.find_elements("css selector", ".plot")[number]
            chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
            box = chromium.execute_script("return arguments[0].getBoundingClientRect().toJSON()", plot)
            point = {"x": box["left"] + 5, "y": box["top"] + 50}
            for kind, points in (("touchStart", [point]), ("touchEnd", [])):
                chromium.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
            time.sleep(0.5)  # Chromium waits for a second tap before it focuses.
            tips = [tip.text for tip in chromium.find_elements("css selector", ".tip") if tip.is_displayed()]
            assert len(tips) == 1
            assert tips[0].startswith("300 kimg\n4², 10,000 generated: ")
    finally:
        chromium.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


@pytest.mark.slow
def test_without_scripts_all_pictures_and_charts_are_there(chromium: Any, long: Path) -> None:
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(chromium, write_report(long), 390)
        found = chromium.find_elements("css selector", "#samples .made .frame")
        assert sum(one.is_displayed() for one in found) == 9
        assert chromium.find_element("css selector", ".plot .y").is_displayed()
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.slow
def test_the_page_follows_the_readers_choice_of_light_and_dark(chromium: Any, long: Path) -> None:
    path, shades = write_report(long), []
    for scheme in ("light", "dark"):
        show(chromium, path, 1400, scheme)
        for element, of in (("body", "backgroundColor"), (".plot .y", "color"), (".curve .line", "stroke")):
            colour = chromium.execute_script(f"return getComputedStyle(document.querySelector('{element}')).{of}")
            shades.append(sum(map(int, re.findall(r"\d+", colour)[:3])))
    assert shades[0] > 700 > 400 > shades[1]
    assert shades[3] < 100 < 350 < shades[4]
    assert shades[5] > shades[2]
