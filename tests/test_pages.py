"""Pages and plots: well formed, self-contained, and nothing that strangers wrote runs in them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from outline import Outline

from batchclf import pages, plots
from batchclf.evaluation import Measures, Mistake, measure
from batchclf.evaluation_page import measure_sections, mistakes_section
from batchclf.training_report import FILES, write_training_report

HOSTILE = (
    "</title></style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)> id="x" url(#x)',
    "$\\frac{1}{$ & <svg onload=alert(1)>",
    "\x00\x1b[31m\u202e ]]> --> fill: #1a1c20 日本語",
)
HISTORY = {
    "epochs": [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "train_accuracy": 1 - 0.5 / epoch,
            "val_loss": 1.1 / epoch,
            "val_accuracy": 1 - 0.6 / epoch,
            "learning_rate": 1e-3,
            "seconds": 1.0,
        }
        for epoch in (1, 2, 3)
    ],
    "best_epoch": 2,
    "step_losses": [1 / (1 + step) for step in range(30)],
}


def measured(labels: tuple[str, ...] = HOSTILE, temperature: float = 1.5) -> Measures:
    chance = np.random.default_rng(0)
    truth = chance.integers(len(labels), size=200)
    logits = chance.normal(size=(200, len(labels))) + 3 * np.eye(len(labels))[truth]
    return measure(logits, truth, labels, temperature)


@pytest.fixture(scope="module")
def page() -> str:
    mistakes = [Mistake(text, text, text, text, 0.9) for text in HOSTILE]
    sections = [*measure_sections(measured()), mistakes_section(mistakes)]
    return pages.page(HOSTILE[0], HOSTILE[1], sections, "footer").decode()


def test_tags_are_closed_in_turn_and_text_stays_text(page: str) -> None:
    outline = Outline(page)
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in outline.tags}
    assert any("<script>alert(1)</script>" in text for text in outline.texts)


def test_a_long_path_may_be_broken_after_its_slashes_and_a_short_word_nowhere() -> None:
    found = pages.bullets(["s3://archive/2024/a.csv or and/or"])
    assert "s3://<wbr>archive/<wbr>2024/<wbr>a.<wbr>csv or and/or" in found
    assert Outline(found).texts[1] == "s3://archive/2024/a.csv or and/or"


def test_no_tag_has_a_handler(page: str) -> None:
    names = {name for _, attributes in Outline(page).tags for name in attributes}
    assert not [name for name in names if name.startswith("on")]


def test_no_text_turns_the_direction_of_what_follows(page: str) -> None:
    assert "\u202e" not in page
    assert "\x1b" not in page


def test_nothing_is_fetched(page: str) -> None:
    for _, attributes in Outline(page).tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "default-src 'none'" in page
    assert "@import" not in page


def test_ids_are_unique(page: str) -> None:
    ids = [a["id"] for _, a in Outline(page).tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_every_plot_says_what_it_shows_and_has_its_numbers_in_a_table(page: str) -> None:
    svgs = [attributes for tag, attributes in Outline(page).tags if tag == "svg"]
    assert len(svgs) == 3
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in svgs)
    assert page.count("<table>") >= 4


def test_a_page_has_colours_for_light_and_dark(page: str) -> None:
    assert "prefers-color-scheme: dark" in page
    assert "var(--ink)" in page
    for colour in (plots.INK, plots.ACCENT, plots.SECOND):
        assert not re.search(rf'style="[^"]*{colour}', page)


@pytest.mark.parametrize(
    "draw",
    [plots.confusion_matrix, plots.reliability, plots.risk_coverage],
)
def test_a_plot_is_well_formed_whatever_the_labels_are(
    draw: Callable[[Measures], plots.Draw],
) -> None:
    svg = plots.to_svg(draw(measured()), "name", HOSTILE[1])
    root = ET.fromstring(svg)
    assert root.attrib["aria-label"] == HOSTILE[1]


@pytest.mark.parametrize("num_labels", [2, 12, 60])
def test_a_confusion_matrix_of_many_labels_is_drawn(num_labels: int) -> None:
    labels = tuple(f"label {index}" for index in range(num_labels))
    drawn = plots.to_png(plots.confusion_matrix(measured(labels)))
    assert drawn.startswith(b"\x89PNG")


def test_a_page_of_many_labels_lists_the_confused_pairs() -> None:
    labels = tuple(f"label {index}" for index in range(30))
    found = "".join(measure_sections(measured(labels)))
    assert "Confused most often" in found
    assert len(found) < 1_000_000


def test_one_example_makes_a_page() -> None:
    one = measure(np.array([[0.0, 1.0]]), np.array([1]), ("a", "b"))
    outline = Outline(pages.page("one", "", measure_sections(one), ""))
    assert ("h1", {}) in outline.tags


def test_a_training_report_has_its_numbers_plots_and_page(tmp_path: Path) -> None:
    measures = {"test": measured(), "validation": measured(temperature=1.0)}
    details: dict[str, Any] = {"settings": {"epochs": 3}, "labels": ["a", HOSTILE[0]]}
    write_training_report(
        tmp_path / "report",
        title="Training",
        history=HISTORY,
        measures=measures,
        details=details,
        mistakes=[Mistake("news.csv row 1", HOSTILE[0], "a", "b", 0.8)],
    )
    assert {path.name for path in (tmp_path / "report").iterdir()} == set(FILES)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["measures"]["test"]["accuracy"] == measures["test"].accuracy
    assert metrics["history"]["best_epoch"] == 2
    for path in (tmp_path / "report").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    texts = Outline((tmp_path / "report" / "report.html").read_text()).texts
    assert "settings.epochs" in texts
    assert "2 (kept)" in texts
