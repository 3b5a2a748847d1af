"""The report: its schema, its page (whole, safe, self-contained), its card, its table, and making them again."""
from __future__ import annotations

import ast
import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_sample as sample
from pydantic import ValidationError
from rich.console import Console

from edgekd import report as reports
from edgekd.errors import EdgekdError
from edgekd.report import card, charts, figures, html, schema, words
from edgekd.report.figures import Curve, Overlay, Panel
from edgekd.report.schema import Accuracy, Agreement, BudgetRow, CandidateRow, Report

EVIL = '"><img src=x onerror=alert(1)><script>alert(2)</script>\'{{ 7*7 }} | `x` </svg>.jpg'
BUDGETS = {"met": BudgetRow(latency_ms=8), "balanced": BudgetRow(), "missed": BudgetRow(latency_ms=0.5), "accuracy": BudgetRow(min_accuracy=0.99)}


@pytest.fixture(params=BUDGETS)
def report(request: pytest.FixtureRequest) -> Report:
    return sample.report(BUDGETS[request.param])


class Page(HTMLParser):
    """Collects tags with their attributes, text, and checks that what opens is closed."""

    VOID = frozenset({"meta", "img", "br", "line", "circle", "path", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data + " "

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.tags)


# --- schema -----------------------------------------------------------------------------------------------------------------


def test_schema__shipped_file_is_current() -> None:
    assert schema.JSON_SCHEMA.read_text(encoding="utf-8") == schema.json_schema(), "run: python -m edgekd.report.schema"


def test_document__has_the_keys_of_the_design(report: Report) -> None:
    document = report.document()
    assert document["schema"] == "edgekd.report/1" and next(iter(document)) == "schema"
    assert {"run", "environment", "target", "budget", "protocol", "teacher", "candidates", "chosen", "verdict"} <= set(document)
    best = next((c for c in document["candidates"] if c["id"] == document["chosen"]), None)
    assert (best is None) == (document["verdict"] == "missed")
    if best:
        assert {"p50", "p90", "p99", "n", "provenance"} <= set(best["components"]["encoder"]["latency_ms"])
        assert {"box_miou", "center_miou", "teacher_agreement"} <= set(best["accuracy"])
        assert document["speedup"]["provenance"] == "measured"
    else:
        assert document["nearest"]["id"]


def test_document__has_no_null_but_chosen(report: Report) -> None:
    def nulls(value: object, at: str = "") -> list[str]:
        if isinstance(value, dict):
            return [n for k, v in value.items() for n in nulls(v, f"{at}.{k}")]
        return [n for i, v in enumerate(value) for n in nulls(v, f"{at}[{i}]")] if isinstance(value, list) else [at] if value is None else []

    assert nulls(report.document()) == ([] if report.chosen else [".chosen"])


def test_document__round_trips(report: Report, tmp_path: Path) -> None:
    path = schema.save(tmp_path / "report.json", report)
    assert schema.load(path) == report
    assert json.loads(path.read_text()) == report.document() and path.read_text() == schema.dumps(schema.load(path))


def test_load__missing_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="no report here"):
        schema.load(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(EdgekdError, match="cannot be read"):
        schema.load(tmp_path / "report.json")
    (tmp_path / "report.json").write_text(json.dumps(sample.report().document() | {"surprise": 1}))
    with pytest.raises(EdgekdError, match="surprise"):
        schema.load(tmp_path / "report.json")


@pytest.mark.parametrize(("change", "says"), [
    ({"schema": "edgekd.report/2"}, "edgekd.report/1"), ({"chosen": "nobody"}, "not among the accepted"), ({"verdict": "missed"}, "no chosen"),
    ({"chosen": "repvit_nano-256-onnx-w8a8_static"}, "not among the accepted")])
def test_report__refuses_contradictions(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        schema.parse(sample.report().document() | change)


def test_report__refuses_repeated_ids() -> None:
    document = sample.report().document()
    document["candidates"].append(document["candidates"][0])
    with pytest.raises(ValidationError, match="repeat"):
        schema.parse(document)


def test_row__refusal_needs_a_reason() -> None:
    with pytest.raises(ValidationError, match="without a reason"):
        CandidateRow(id="a", student="a", image_size=256, scheme="fp32", format="onnx", status="rejected")


@pytest.mark.parametrize(("metric", "expected"), [("teacher_agreement.box", 0.9), ("box_miou", 0.8), ("center_miou", None), ("teacher_agreement.center", None),
                                                  ("teacher_agreement", None), ("nonsense", None), ("box_miou.x", None)])
def test_accuracy__value_by_path(metric: str, expected: float | None) -> None:
    assert Accuracy(box_miou=0.8, teacher_agreement=Agreement(box=0.9)).value(metric) == expected


# --- the page ---------------------------------------------------------------------------------------------------------------


def test_page__is_well_formed_and_complete(report: Report) -> None:
    page = Page(html.render(report, sample.overlays(), sample.curves()))
    assert page.open == [] and page.count("html") == 1 and page.count("h1") == 1
    for c in report.candidates:
        assert c.reason in page.text
    assert report.run.command in page.text and words.VERDICTS[report.verdict] in page.text
    assert page.count("img") == 6 and "coffee.jpg" in page.text
    bodies = [a for t, a in page.tags if t == "tr" and "data-id" in a]
    assert len(bodies) == len(report.candidates)


def test_page__loads_nothing_from_anywhere(report: Report) -> None:
    text = html.render(report, sample.overlays(), sample.curves())
    assert not any(s in text for s in ('src="http', "src='http", 'href="http', "cdn.", "@import", "url(", "<link", "<iframe", "fetch(", "XMLHttpRequest"))
    page = Page(text)
    assert all((a.get("src") or "").startswith("data:image/jpeg;base64,") for t, a in page.tags if t == "img")
    assert all("src" not in a for t, a in page.tags if t == "script")
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'")


def test_page__escapes_whatever_the_user_named() -> None:
    image = sample.overlays(("a.jpg",))[0].panels[0].jpeg
    evil = sample.report(name=EVIL, dataset=EVIL, skipped=(EVIL,))
    document = evil.document()
    document["run"]["command"] = document["teacher"]["name"] = document["target"]["device"] = document["environment"]["note"] = EVIL
    document["candidates"][1]["reason"] = EVIL
    text = html.render(schema.parse(document), [Overlay(EVIL, EVIL, (Panel(EVIL, image),))], [Curve(EVIL, EVIL, (0, 1), (2.0, 1.0), EVIL)])
    page = Page(text)
    assert page.open == [] and page.count("script") == 1
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert all((a.get("src") or "").startswith("data:") for t, a in page.tags if t == "img")
    assert EVIL in page.text, "shown as it is, neither run nor expanded"


def test_page__pictures_are_the_bytes_given() -> None:
    overlays = sample.overlays()
    text = html.render(sample.report(), overlays)
    assert all(base64.b64encode(p.jpeg).decode() in text for o in overlays for p in o.panels)


def test_page__every_number_of_the_table_says_its_provenance() -> None:
    document = sample.report(BUDGETS["balanced"]).document()
    for c in document["candidates"]:
        for part in [c, *c["components"].values()]:
            if "latency_ms" in part:
                part["latency_ms"] |= {"provenance": "predicted", "n": 0}
    document |= {"verdict": "unverified"}
    del document["speedup"]
    page = html.render(schema.parse(document))
    body = page[page.index("<tbody>"):page.index("</tbody>")]
    cells = re.findall(r'<td data-sort="[0-9.]+">(.*?)</td>', body)
    assert len(cells) > 50 and all("mark predicted" in c or "mark measured" in c for c in cells)
    assert "mark predicted" in cells[0] and "◐ predicted" in page and words.VERDICTS["unverified"] in page


def test_page__without_figures_has_no_empty_sections() -> None:
    text = html.render(sample.report())
    assert "On your photos" not in text and "How the students learned" not in text


def test_page__with_nothing_but_failures() -> None:
    document = sample.report(BUDGETS["missed"]).document()
    document["candidates"] = [{"id": "a-256-onnx-fp32", "student": "a", "image_size": 256, "scheme": "fp32", "format": "onnx", "status": "failed", "reason": "no such operator"}]
    del document["nearest"]
    page = Page(html.render(schema.parse(document)))
    assert page.open == [] and "no such operator" in page.text and "Use it" not in page.text


def test_page__is_the_same_every_time() -> None:
    assert html.render(sample.report(), sample.overlays(), sample.curves()) == html.render(sample.report(), sample.overlays(), sample.curves())


def test_ordered__chosen_first_then_accepted_then_the_rest() -> None:
    found = html.ordered(sample.report())
    statuses = [c.status for c in found]
    assert found[0].id == "repvit_m1-256-openvino-bf16" and statuses == sorted(statuses, key=["accepted", "rejected", "failed"].index)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_snippet__is_a_short_program(format: str) -> None:
    best = next(c for c in sample.rows() if c.format == format)
    program = html.snippet(best)
    ast.parse(program)
    assert (len(program.splitlines()) <= 20 and "S, precision = 256" in program) or "S = 256" in program


def test_snippet__openvino_asks_for_the_precision_of_the_scheme() -> None:
    found = {c.scheme: html.snippet(c) for c in sample.rows() if c.format == "openvino"}
    assert '"bf16"' in found["bf16"] and '"f32"' in found["fp32"]


def test_snippet__unknown_format_has_none() -> None:
    best = sample.rows()[0].model_copy(update={"format": "ncnn"})
    assert html.snippet(best) == ""


def test_pairs__flattens_and_leaves_out_what_is_not_known() -> None:
    assert html.pairs({"os": "Linux", "versions": {"torch": "2"}, "flags": ["a", "b"], "none": None, "empty": []}) == [
        ("os", "Linux"), ("versions torch", "2"), ("flags", "a, b")]


def test_bars__are_as_long_as_the_total_and_divided_by_the_parts() -> None:
    teacher, parent, best = html.bars(sample.report())
    assert teacher.encoder + teacher.decoder == pytest.approx(100) and (teacher.name, parent.other, best.other) == ("sam_nano", True, False)
    assert best.encoder + best.decoder == pytest.approx(100 * 3.99 / 48.7) and best.encoder / best.decoder == pytest.approx(3.18 / 0.81)
    assert best.split == "3.18 + 0.81" and html.bars(sample.report(BUDGETS["missed"]))[-1].name == "repvit_nano bf16"


# --- charts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lo", "hi", "log"), [(0.0, 1.0, False), (0.74, 1.01, False), (2.0, 60.0, True), (0.001, 5000.0, True), (4.0, 4.5, False), (3.9, 4.4, True)])
def test_axis__ticks_are_round_and_inside(lo: float, hi: float, log: bool) -> None:
    axis = charts.Axis(lo, hi, 0, 100, log=log)
    ticks = axis.ticks(5)
    assert len(ticks) <= 8 and ticks == sorted(ticks) and all(lo <= t <= hi for t in ticks)
    assert axis(lo) == pytest.approx(0) and axis(hi) == pytest.approx(100)


def test_spread__holds_every_value_even_equal_ones() -> None:
    for values in ([5.0, 5.0], [0.0, 0.0], [1.0, 9.0]):
        axis = charts.spread(values, 0, 100)
        assert all(0 < axis(v) < 100 for v in values)
    assert all(0 < charts.spread([3.0, 3.0], 0, 100, log=True)(v) < 100 for v in (3.0,))


def test_tradeoff__shows_every_candidate_with_latency_and_accuracy() -> None:
    report = sample.report()
    page = Page(str(charts.tradeoff(report, 1000, 400)))
    shown = {a["data-id"] for t, a in page.tags if t == "g"}
    assert shown == {c.id for c in report.candidates if c.latency_ms and c.accuracy and c.status != "failed"}
    assert "sam_nano (teacher)" in page.text and "budget 8 ms" in page.text and "repvit_m1 openvino bf16" in page.text


def test_tradeoff__stays_inside_its_frame() -> None:
    for width, height in ((1056, 420), (358, 320)):
        page = Page(str(charts.tradeoff(sample.report(), width, height)))
        for tag, a in page.tags:
            if tag == "circle":
                assert 0 <= float(a["cx"] or 0) <= width and 0 <= float(a["cy"] or 0) <= height


def test_tradeoff__names_the_chosen_one_even_without_room() -> None:
    assert "repvit_m1 openvino bf16" in Page(str(charts.tradeoff(sample.report(), 358, 320))).text


def test_tradeoff__needs_two_points() -> None:
    assert charts.tradeoff(sample.report().model_copy(update={"candidates": sample.rows()[:1]}), 800, 400) == ""


def test_curve__of_one_point_is_nothing_and_flat_ones_work() -> None:
    assert charts.curve(Curve("a", "b", (0,), (1.0,))) == ""
    assert "<path" in charts.curve(Curve("a", "b", (0, 1), (1.0, 1.0))) and "<path" in charts.curve(Curve("a", "b", (0, 1), (0.0, -1.0)))


def test_curve__refuses_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="not a number"):
        Curve("a", "b", (0, 1), (1.0, float("nan")))
    with pytest.raises(ValueError, match="2 steps"):
        Curve("a", "b", (0, 1), (1.0,))


# --- files ------------------------------------------------------------------------------------------------------------------


def test_write__leaves_all_files_and_rebuild_makes_the_same(report: Report, tmp_path: Path) -> None:
    page = reports.write(tmp_path, report, sample.overlays(), sample.curves())
    names = ("report.html", "report.json", "MODEL_CARD.md")
    before = {n: (tmp_path / n).read_bytes() for n in names}
    assert page == tmp_path / "report.html"
    (tmp_path / "report.html").unlink()
    (tmp_path / "MODEL_CARD.md").write_text("old")
    assert reports.rebuild(tmp_path) == page
    assert {n: (tmp_path / n).read_bytes() for n in names} == before
    assert not list(tmp_path.rglob(".*.??????*")), "no temporary file is left"


def test_rebuild__without_a_report_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EdgekdError, match="no report here"):
        reports.rebuild(tmp_path)


def test_figures__round_trip_and_damage(tmp_path: Path) -> None:
    overlays, curves = sample.overlays(), sample.curves()
    figures.save(tmp_path, overlays, curves)
    assert figures.load(tmp_path) == (overlays, curves)
    (tmp_path / "report/00-0.jpg").unlink()
    with pytest.raises(EdgekdError, match="figures cannot be read"):
        figures.load(tmp_path)


def test_figures__none_is_none(tmp_path: Path) -> None:
    assert figures.load(tmp_path) == ([], [])


def test_figures__names_cannot_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    figures.save(tmp_path, sample.overlays(("a",)), [])
    index = tmp_path / "report/figures.json"
    index.write_text(index.read_text().replace("00-0.jpg", "../secret.jpg"))
    with pytest.raises(EdgekdError):
        figures.load(tmp_path)


# --- card, table, words -------------------------------------------------------------------------------------------------------


def test_card__says_what_how_and_under_which_terms(report: Report) -> None:
    text = card.render(report)
    for head in ("## How it was made", "## Numbers", "## Limits", "## Licence"):
        assert text.count(f"\n\n{head}\n\n") == 1
    assert ("## How to run it" in text) == (report.chosen is not None)
    if report.chosen:
        assert text.startswith(f"# {report.chosen}\n\n") and "| measured |" in text and "\n| --- | ---: | --- |\n" in text
    assert "\n\n\n" not in text


def test_card__names_cannot_break_out() -> None:
    document = sample.report(dataset=EVIL + "\n# forged").document()
    document["teacher"]["name"] = EVIL
    text = card.render(schema.parse(document))
    assert "<script>" not in text and "\n# forged" not in text


def console(width: int = 120) -> Console:
    return Console(width=width, record=True, file=open("/dev/null", "w"), color_system=None)


def test_terminal__shows_every_candidate_the_verdict_and_the_page(report: Report, tmp_path: Path) -> None:
    screen = console()
    screen.print(reports.terminal_table(report, tmp_path / "report.html"), soft_wrap=False)
    text = screen.export_text()
    assert all(c.id in text for c in report.candidates) and "report.html" in text.replace("\n", "")
    assert (f"> {report.chosen}" in text) == (report.chosen is not None)


def test_terminal__says_what_was_not_measured() -> None:
    document = sample.report(BUDGETS["balanced"]).document()
    document["candidates"][0]["latency_ms"]["provenance"] = "predicted"
    screen = console()
    screen.print(reports.terminal_table(schema.parse(document)))
    assert "◐ predicted" in screen.export_text()


@pytest.mark.parametrize(("budget", "says"), [("met", "segments a photo in 3.99 ms"), ("missed", "No candidate meets the budget of at most 0.5 ms."),
                                              ("accuracy", "box agreement with the teacher of at least 0.99")])
def test_headline(budget: str, says: str) -> None:
    assert says in words.headline(sample.report(BUDGETS[budget]))


def test_headline__unverified_does_not_claim() -> None:
    document = sample.report().document()
    best = next(c for c in document["candidates"] if c["id"] == document["chosen"])
    best["latency_ms"] |= {"provenance": "predicted"}
    said = words.headline(schema.parse(document | {"verdict": "unverified"}))
    assert "should take 3.99 ms (predicted)" in said and "segments" not in said
    del best["latency_ms"]
    assert "not timed" in words.headline(schema.parse(document | {"verdict": "unverified"}))


def test_device__is_the_processor_when_it_is_this_machine() -> None:
    document = sample.report().document() | {"environment": {"device": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz (2 cores)"}}
    assert words.device(schema.parse(document)) == "Intel Xeon Platinum 8481C (2 cores)"
    document["target"]["transport"] = "ssh"
    assert words.device(schema.parse(document)) == document["target"]["device"]


@pytest.mark.parametrize(("found", "text"), [
    (words.number_ms(None), "–"), (words.number_ms(3.987), "3.99"), (words.megabytes(22_900_000), "22.9"), (words.megabytes(147_000_000), "147"), (words.megabytes(50_000), "0.05"),
    (words.times(12.21), "12.2×"), (words.times(1.55), "1.55×"), (words.times(250.0), "250×"), (words.times(None), "–"), (words.millions(4_900_000), "4.9 M"), (words.millions(9_100), "9 k"),
    (words.duration(161.4), "2 min 41 s"), (words.duration(59.6), "1 min 0 s"), (words.duration(7300), "2 h 1 min"), (words.duration(12), "12 s"), (words.score(0.8834), "0.883")])
def test_words(found: str, text: str) -> None:
    assert found == text
