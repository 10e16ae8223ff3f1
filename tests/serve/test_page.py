"""The demo page in a real browser."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from serve.browser import chromium
from serve.running import Server, running, wait_until

HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
LONG = "Shares in the bank rose sharply after it said that profits had doubled this year. " * 40


class Page:
    """The page in a browser that is new to it."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.browser = browser
        self.server = server

    def open(self, fragment: str = "") -> None:
        self.browser.get("about:blank")
        self.browser.get(f"{self.server.url}/{fragment}")
        self.wait(lambda: "tokens" in self["about"].text or self["access"].is_displayed())
        self.wait(lambda: len(self.all("#examples button")) > 4)

    def __getitem__(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)  # type: ignore[no-any-return]

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)  # type: ignore[no-any-return]

    def wait(self, condition: Callable[[], bool]) -> None:
        wait_until(condition, "what the page should show")

    def classify(self, text: str) -> None:
        self["text"].clear()
        # typing long texts key by key takes a while, so put all but the last in at once
        self.browser.execute_script("arguments[0].value = arguments[1]", self["text"], text[:-1])
        self["text"].send_keys(text[-1])
        self["classify"].click()
        self.wait(self["result"].is_displayed)

    def content(self, name: str) -> str:
        return str(self[name].get_property("textContent"))

    def problems(self) -> list[dict[str, Any]]:
        """What the browser complained about, such as a breach of the content security policy."""
        return [
            entry for entry in self.browser.get_log("browser") if "favicon" not in entry["message"]
        ]


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[Any]:
    with chromium(downloads) as started:
        yield started


@pytest.fixture
def page(browser: Any, server: Server) -> Page:
    opened = Page(browser, server)
    opened.open()
    opened.problems()
    return opened


def test_a_pasted_article_is_labelled_with_bars(page: Page) -> None:
    page.classify(LONG[:400])
    bars = [bar.text.split("\n") for bar in page.all("#bars li")]
    assert page["verdict"].text == f"business, {bars[0][1]}"
    assert len(bars) == 5
    widths = [float(fill.value_of_css_property("width")[:-2]) for fill in page.all("#bars .fill")]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]
    assert "Tokens read" in page["facts"].text
    assert " ms" in page["facts"].text
    assert not page["short"].is_displayed()
    assert page.problems() == []


def test_the_cut_is_shown_in_the_text_itself(page: Page) -> None:
    page.classify(LONG)
    seen, rest = (
        page.all(f"#reading {part}")[0].get_property("textContent") for part in ("mark", ".unread")
    )
    assert str(seen) + str(rest) == LONG
    answer = page.server.invoke({"text": LONG}, query="?details=true").json
    assert len(str(seen)) == answer["read_chars"]
    assert page.all("#reading .cut")[0].is_displayed()
    assert "first 256 tokens" in page["extent"].text


def test_the_cut_stands_right_behind_characters_outside_the_first_plane(page: Page) -> None:
    text = "🎈 profits rose " * 400
    page.classify(text)
    seen = str(page.all("#reading mark")[0].get_property("textContent"))
    answer = page.server.invoke({"text": text}, query="?details=true").json
    assert seen == text[: answer["read_chars"]]


def test_a_text_that_is_read_whole_has_no_cut(page: Page) -> None:
    page.classify(LONG[:400])
    assert page.all("#reading .cut") == []
    assert page["extent"].text == "All of the text."


def test_a_short_text_is_answered_and_said_to_be_too_short(page: Page) -> None:
    page.classify("Striker signs two-year deal with champions")
    assert page["verdict"].text.startswith("sport, ")
    assert page["short"].text.startswith("Too short to trust: 42 characters.")
    assert "too short to trust" in page["status"].get_property("textContent")


def test_every_example_is_labelled_at_a_click(page: Page) -> None:
    for example in page.all("#examples button"):
        before = page["text"].get_property("value")
        example.click()
        page.wait(lambda: page["result"].is_displayed() and page["verdict"].text != "")
        assert page["text"].get_property("value") != before
        name = example.text.lower()
        if name in ("business", "entertainment", "politics", "sport", "tech"):
            page.wait(lambda name=name: page["verdict"].text.startswith(name))


def test_no_text_is_asked_for(page: Page) -> None:
    page["classify"].click()
    page.wait(page["error"].is_displayed)
    assert page["error"].text == "Paste a text first."


def test_the_json_is_the_answer_and_the_command_gives_the_same(page: Page) -> None:
    page.classify(f"{LONG[:350]} It's 'quoted' \"twice\" \\ and $HOME\nand `more`.")
    for view in ("curl-view", "json-view"):
        page[view].find_element(By.TAG_NAME, "summary").click()
    shown = json.loads(page["json"].text)
    command = page["curl"].text
    assert command.startswith("curl ")
    result = subprocess.run(
        ["bash", "-c", f"{command.replace('curl', 'curl -sS', 1)} --noproxy '*'"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    answer = json.loads(result.stdout)
    assert answer["probs"] == pytest.approx(shown.pop("probs"), abs=1e-5)
    assert shown.pop("score") == pytest.approx(answer["score"], abs=1e-5)
    assert {name: answer[name] for name in shown} == shown


def test_a_link_brings_text_and_result_back(page: Page) -> None:
    text = f"{LONG[:310]} + % # & ü 日本"
    page.classify(text)
    verdict = page["verdict"].text
    page["copy-link"].click()
    page.wait(lambda: "#text=" in page.browser.current_url)
    link = page.browser.current_url
    page.open(link[link.index("#") :])
    page.wait(lambda: page["verdict"].text == verdict)
    assert page["text"].get_property("value") == text
    assert "%23" not in page.server.log_text()


def test_a_link_to_the_json_opens_with_the_json(page: Page) -> None:
    page.classify(LONG[:310])
    page["json-view"].find_element(By.TAG_NAME, "summary").click()
    shown = json.loads(page["json"].text)
    page["text"].send_keys(" which is not in the result yet")
    page["copy-json-link"].click()
    page.wait(lambda: "#json=" in page.browser.current_url)
    link = page.browser.current_url
    page.open(link[link.index("#") :])
    page.wait(page["json"].is_displayed)
    assert json.loads(page["json"].text)["probs"] == pytest.approx(shown["probs"], abs=1e-5)
    assert page["text"].get_property("value") == LONG[:310]


def test_clear_takes_everything_away(page: Page) -> None:
    page.classify(LONG[:400])
    page["clear"].click()
    assert page["text"].get_property("value") == ""
    assert not page["result"].is_displayed()
    assert not page["programs"].is_displayed()


def test_what_a_user_pastes_is_text_and_never_html(page: Page) -> None:
    page.classify(f"{HOSTILE} {LONG[:300]}")
    assert HOSTILE in page.content("reading")
    assert page.all("#reading img, #reading script, pre img") == []
    assert page.browser.title == "News classifier"
    assert page.problems() == []


def test_what_a_file_holds_is_text_and_never_html(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "<b>hostile.csv"
    path.write_text(f'text,"<b>{"x"}"\n"a {HOSTILE.replace(chr(34), chr(34) * 2)}",{HOSTILE[:8]}\n')
    page["file"].send_keys(str(path))
    page.wait(page["table"].is_displayed)
    assert HOSTILE[:80] in page.content("rows")
    assert page.all("#table img, #table script, #table b") == []
    assert page.browser.title == "News classifier"


@pytest.mark.parametrize("name", ["news-1.parquet", "news-2.csv", "news-4.jsonl"])
def test_a_file_becomes_a_table(page: Page, sample: Path, name: str) -> None:
    page["file"].send_keys(str(sample / name))
    page.wait(page["table"].is_displayed)
    rows = page.all("#rows tr")
    assert page["table-title"].text == f"{name}: {len(rows)} rows"
    counts = [int(bar.text.split("\n")[-1]) for bar in page.all("#counts li")]
    assert sum(counts) == len(rows)
    header = [cell.text for cell in page.all("#columns th")]
    assert header[:4] == ["row", "label", "score", "text"]
    assert {"id", "title", "n_tokens", "truncated"} <= set(header)
    assert "error" not in header
    assert not page["copy-json-link"].is_displayed()


def test_rows_that_cannot_be_labelled_say_why(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text('text,id\nprofits of the bank rose,1\n"",2\n')
    page["file"].send_keys(str(path))
    page.wait(page["table"].is_displayed)
    assert [cell.text for cell in page.all("#columns th")][3] == "error"
    assert "empty_text" in page["rows"].text
    assert "not labelled" in page["counts"].text


def test_a_file_that_is_dropped_becomes_a_table(page: Page) -> None:
    page.browser.execute_script(
        "const dropped = new DataTransfer();"
        "dropped.items.add(new File(['text\\nprofits of the bank rose\\n'], 'dropped.csv'));"
        "arguments[0].dispatchEvent("
        "  new DragEvent('drop', {bubbles: true, cancelable: true, dataTransfer: dropped}));",
        page["drop"],
    )
    page.wait(page["table"].is_displayed)
    assert page["table-title"].text == "dropped.csv: 1 row"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_table_is_downloaded_as_the_server_makes_it(
    page: Page, sample: Path, downloads: Path, kind: str
) -> None:
    page["file"].send_keys(str(sample / "news-2.csv"))
    page.wait(page["table"].is_displayed)
    page[f"save-{kind}"].click()
    saved = downloads / f"news-2-labelled.{kind}"
    page.wait(saved.is_file)
    accept = {"csv": "text/csv", "parquet": "application/vnd.apache.parquet"}[kind]
    body = (sample / "news-2.csv").read_bytes()
    expected = page.server.invoke(body, "text/csv", "?keep_columns=all", Accept=accept)
    if kind == "csv":
        assert saved.read_bytes() == expected.body
    else:
        table = pq.read_table(saved)
        assert table.num_rows == 31
        assert {"title", "label", "probs"} <= set(table.column_names)


def test_another_text_column_can_be_named(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("body\nprofits of the bank rose\n")
    page["file"].send_keys(str(path))
    page.wait(page["error"].is_displayed)
    assert page["error"].text == (
        "other.csv: no text column 'text'; it has the columns body. "
        "Write one of them under “Column with the text”."
    )
    page["column"].clear()
    page["column"].send_keys("body", Keys.ENTER)
    page.wait(page["table"].is_displayed)
    assert not page["error"].is_displayed()


def test_a_file_of_another_kind_is_refused(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "letter.docx"
    path.write_text("text")
    page["file"].send_keys(str(path))
    page.wait(page["error"].is_displayed)
    assert "must end in .csv, .jsonl or .parquet" in page["error"].text


def test_everything_works_by_keyboard_alone(page: Page) -> None:
    def focused() -> str:
        return str(page.browser.switch_to.active_element.get_attribute("id"))

    def press(key: str, *, holding: str | None = None) -> None:
        keyboard = ActionChains(page.browser)
        if holding is None:
            keyboard.send_keys(key).perform()
        else:
            keyboard.key_down(holding).send_keys(key).key_up(holding).perform()

    def tab_to(name: str) -> None:
        for _ in range(40):
            press(Keys.TAB)
            if focused() == name:
                return
        raise AssertionError(f"the tab key does not lead to {name}")

    press(Keys.TAB)
    assert page.browser.switch_to.active_element.get_attribute("class") == "skip"
    press(Keys.ENTER)
    tab_to("classify")
    press(Keys.TAB, holding=Keys.SHIFT)
    assert focused() == "text"
    press("Two late goals won the cup final for the champions after extra time.")
    press(Keys.ENTER, holding=Keys.CONTROL)
    page.wait(page["result"].is_displayed)
    assert page["verdict"].text.startswith("sport, ")
    outline = page["text"].value_of_css_property("outline-style")
    assert outline == "solid"

    tab_to("classify")
    press(Keys.TAB)
    assert focused() == "clear"
    tab_to("file")
    tab_to("column")
    tab_to("reading")
    tab_to("copy-link")
    press(Keys.TAB)
    press(Keys.ENTER)
    page.wait(page["curl"].is_displayed)

    press(Keys.TAB)
    assert focused() == "curl"
    press(Keys.TAB)
    press(Keys.TAB)
    press(Keys.SPACE)
    page.wait(page["json"].is_displayed)


def test_a_server_that_is_gone_is_said_so(browser: Any, model: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "--model", model) as server:
        page = Page(browser, server)
        page.open()
        server.stop()
        page["text"].send_keys("some text")
        page["classify"].click()
        page.wait(page["error"].is_displayed)
        assert page["error"].text == "The server does not answer. Is it running?"


def test_the_page_asks_for_the_token(browser: Any, model: Path, tmp_path: Path) -> None:
    env = {"BATCHCLF_SERVE_TOKEN": "open-sesame"}
    with running(tmp_path / "log", "--model", model, env=env) as server:
        page = Page(browser, server)
        page.open()
        page.wait(page["access"].is_displayed)
        page["token"].send_keys("wrong", Keys.ENTER)
        page.wait(lambda: page["access-note"].text == "That is not the token.")
        page["token"].clear()
        page["token"].send_keys("open-sesame", Keys.ENTER)
        page.wait(lambda: "tokens" in page["about"].text)
        page.classify(LONG[:400])
        assert page["verdict"].text.startswith("business, ")
        assert "open-sesame" not in page.content("curl")


@pytest.mark.parametrize("width", [360, 768, 1440])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_sticks_out_at_any_width_and_everything_can_be_read(
    page: Page, sample: Path, width: int, theme: str
) -> None:
    run = page.browser.execute_cdp_cmd
    run(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": theme}]},
    )
    run(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    try:
        page.classify(LONG)
        page["curl-view"].find_element(By.TAG_NAME, "summary").click()
        for _ in range(2):
            scroll = page.browser.execute_script("return document.documentElement.scrollWidth")
            assert scroll <= width
            faint = page.browser.execute_script(CONTRAST)
            assert faint == []
            page["file"].send_keys(str(sample / "news-2.csv"))
            page.wait(page["table"].is_displayed)
    finally:
        run("Emulation.clearDeviceMetricsOverride", {})
        run("Emulation.setEmulatedMedia", {"features": []})


# Texts whose contrast is below 4.5 (WCAG 2.2, success criterion 1.4.3), with their ratio.
CONTRAST = """
const parse = (color) => color.match(/[\\d.]+/g).map(Number);
const light = (color) => {
  const [r, g, b] = color.map((v) => v / 255).map(
    (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const color = parse(getComputedStyle(at).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color.slice(0, 3);
  }
  return [255, 255, 255];
};
const faint = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !element.checkVisibility()) continue;
  const style = getComputedStyle(element);
  const [a, b] = [light(parse(style.color).slice(0, 3)), light(behind(element))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) faint.push(`${element.tagName} ${element.textContent.slice(0, 30)} ${ratio}`);
}
return faint;
"""


def test_the_page_loads_nothing_from_elsewhere(page: Page) -> None:
    page.classify(LONG[:400])
    urls = page.browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert urls
    assert all(url.startswith(page.server.url) for url in urls)


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/examples.json", "/icon.svg"])
def test_the_files_of_the_page_come_with_a_strict_policy(server: Server, path: str) -> None:
    answer = server.ask("GET", path)
    assert answer.status == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    again = server.ask("GET", path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status, again.body) == (304, b"")
