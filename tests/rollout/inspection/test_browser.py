"""The page of `blockroll inspect` in headless Chromium: its counts, filters, keys, speed and accessibility.

Needs playwright, and Chromium at BLOCKROLL_CHROMIUM or at /usr/bin/chromium; axe-core at AXE_CORE (axe.min.js), or the package
axe-core-python. What is not there is skipped. Screenshots go to the test's temporary directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from inspected_runs import directory, payload_of, repeated, sampled, write

from blockroll.rollout.inspection.inspect import inspect
from blockroll.rollout.inspection.origins import ACCEPTED, origins_of, steps_of

CHROMIUM = os.environ.get("BLOCKROLL_CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
PAINT_MS = 1000
MANY = 1000

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
if not os.access(CHROMIUM, os.X_OK):
    pytest.skip(f"no Chromium at {CHROMIUM}; set BLOCKROLL_CHROMIUM", allow_module_level=True)


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return repeated(sampled(8, 4), MANY)


@pytest.fixture(scope="module")
def path(records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inspect(directory(tmp_path_factory.mktemp("inspect") / "run", records))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


def opened(
    browser: Browser, path: Path, complaints: list[str], width: int = 1440, scheme: str = "light", anchor: str = ""
) -> Page:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(path.as_uri() + anchor)
    page.wait_for_selector("#found:not(:empty)")
    return page


@pytest.fixture
def page(browser: Browser, path: Path) -> Iterator[Page]:
    complaints: list[str] = []
    made = opened(browser, path, complaints)
    yield made
    made.close()
    assert complaints == []


def found(page: Page) -> tuple[int, int]:
    """(trajectories, tokens) that the filters leave, as the page says."""
    count, _, rest = page.inner_text("#found").partition(" of ")
    return int(count.replace(",", "")), int(rest.split(" · ")[1].split()[0].replace(",", ""))


def fact(page: Page, box: str, name: str) -> str:
    return page.inner_text(f"{box} > div:has(dt:text-is('{name}')) dd")


def title(page: Page) -> str:
    return page.inner_text("#which")


def name(record: dict[str, Any]) -> str:
    return f"{record['id']} #{record['sample']}"


def painted(page: Page) -> float:
    """Milliseconds until the page was painted and everything in sight was drawn."""
    paint = page.evaluate("new Promise(done => new PerformanceObserver(list => done(list.getEntries().at(-1).startTime))"
                          ".observe({type: 'paint', buffered: true}))")  # fmt: skip
    return max(paint, page.evaluate("performance.getEntriesByName('drawn')[0].startTime"))


def test_counts_are_the_runs_and_the_first_paint_is_quick(page: Page, records) -> None:
    times = [painted(page)]
    while times[-1] > PAINT_MS and len(times) < 4:  # a busy machine may be slow now and then
        page.reload()
        times.append(painted(page))
    assert times[-1] <= PAINT_MS, times
    tokens = sum(len(record["tokens"]) for record in records)
    forwards = sum(record["forwards"] for record in records)
    accepted = 0
    for record in records:
        steps = steps_of(record["trace"], len(record["prompt_tokens"]), len(record["tokens"]))
        accepted += int((origins_of(steps, len(record["tokens"])) == ACCEPTED).sum())
    assert fact(page, "#totals", "Trajectories") == f"{MANY:,}" and fact(page, "#totals", "Tokens") == f"{tokens:,}"
    assert fact(page, "#totals", "Tokens per forward") == f"{tokens / forwards:.2f}"
    assert fact(page, "#totals", "Accepted drafts") == f"{100 * accepted / tokens:.0f} %"
    assert found(page) == (MANY, tokens)
    # Only the rows in sight exist, and the last one can be reached.
    assert page.locator(".item").count() < 60
    page.keyboard.press("End")
    assert title(page) == name(records[-1]) and page.locator(".item").count() < 60
    # Each token of the trajectory, with its origin.
    last = records[-1]
    assert page.locator("#text b").count() == len(last["tokens"])
    origin = origins_of(steps_of(last["trace"], len(last["prompt_tokens"]), len(last["tokens"])), len(last["tokens"]))
    classes = page.eval_on_selector_all("#text b", "tokens => tokens.map(token => Number(token.className.match(/o(\\d)/)[1]))")
    assert classes == origin.tolist()
    assert page.locator("#text b.s").count() == len(last["trace"])


def test_every_filter(page: Page, records) -> None:
    def expect(chosen) -> None:
        kept = [record for record in records if chosen(record)]
        assert 0 < len(kept) < MANY
        assert found(page) == (len(kept), sum(len(record["tokens"]) for record in kept))
        assert f"of the {len(kept):,} trajectories" in page.inner_text("#scope", timeout=2000)
        page.locator("#list").focus()
        page.keyboard.press("x")
        assert found(page)[0] == MANY

    page.select_option("#step", "2")
    expect(lambda record: record["step"] == 2)
    reason = next(r["finish_reason"] for r in records if r["finish_reason"] != records[0]["finish_reason"]) \
        if len({r["finish_reason"] for r in records}) > 1 else None  # fmt: skip
    if reason:
        page.select_option("#finish", reason)
        expect(lambda record: record["finish_reason"] == reason)
    page.check("#mixed")
    expect(lambda record: len(set(record["versions"])) > 1)
    page.fill("#search", records[0]["text"][:6])
    expect(lambda record: records[0]["text"][:6] in record["text"])
    page.fill("#search", "no text holds this")
    assert found(page) == (0, 0) and page.is_hidden("#trajectory")
    page.keyboard.press("Escape")
    page.keyboard.press("x")
    for button, best in (("Worst reward", min(records, key=lambda r: r["reward"])),
                         ("Longest", max(records, key=lambda r: len(r["tokens"]))), ("Run order", records[0])):  # fmt: skip
        page.click(f"#sorts button:text-is('{button}')")
        assert title(page) == name(best), button
    page.click("#sorts button:text-is('Least accepted')")
    shown = page.eval_on_selector_all(".item .soft:nth-last-child(2)", "all => all.map(e => e.innerText)")
    least = [float(text.split()[0]) for text in shown]
    assert least == sorted(least)


def test_every_key(page: Page, records) -> None:
    press = page.keyboard.press
    for key, place in (("j", 1), ("j", 2), ("k", 1), ("End", MANY - 1), ("Home", 0), ("PageDown", 10), ("PageUp", 0)):
        press(key)
        assert title(page) == name(records[place]), key
    page.locator("#list").focus()
    for key, place in (("ArrowDown", 1), ("ArrowUp", 0)):
        press(key)
        assert title(page) == name(records[place]), key
    group = [r for r in records if (r["id"], r["step"]) == (records[0]["id"], records[0]["step"])]
    press("g")
    assert title(page) == name(group[1])
    press("Home")
    second = records[0]["trace"][1][0] + 1 - len(records[0]["prompt_tokens"])
    for key, token in (("l", 0), ("ArrowRight", 1), ("h", 0), ("]", second)):
        press(key)
        assert page.get_attribute("#text b.at", "data-t") == str(token), key
    press("[")
    assert page.get_attribute("#text b.at", "data-t") == "0"
    assert f"id {records[0]['tokens'][0]} " in page.inner_text("#facts-of-token")
    for key, button in (("2", "Worst reward"), ("3", "Longest"), ("4", "Least accepted"), ("1", "Run order")):
        press(key)
        assert page.get_attribute(f"#sorts button:text-is('{button}')", "aria-pressed") == "true"
    press("m")
    assert page.is_checked("#mixed") and found(page)[0] < MANY
    press("x")
    assert not page.is_checked("#mixed") and found(page)[0] == MANY
    press("c")
    assert page.locator("#text b[class^=h]").count() == page.locator("#text b").count()
    press("c")  # no entropies here, so back to origins
    assert page.get_attribute("#colours button:text-is('Origin')", "aria-pressed") == "true"
    press("b")
    assert not page.is_checked("#blocks") and "blocks" not in (page.get_attribute("#text", "class") or "")
    before = page.get_attribute("html", "data-theme")
    press("t")
    assert page.get_attribute("html", "data-theme") != before
    press("/")
    press("j")
    assert page.input_value("#search") == "j"
    press("Escape")
    press("x")
    press("?")
    assert page.is_visible("#keys") and page.locator("#key-list dt").count() == 23
    press("Escape")
    assert page.is_hidden("#keys")


def test_moving_through_a_thousand_trajectories_is_quick(page: Page) -> None:
    """Milliseconds of script and layout per key, the median of 40."""
    press = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'j', bubbles: true})); document.body.offsetHeight"
    times = page.evaluate(f"""() => Array.from({{length: 40}}, () => {{
        const start = performance.now(); {press}; return performance.now() - start; }})""")
    assert sorted(times)[20] < 40, times
    page.fill("#search", "1")
    start = page.evaluate("performance.now()")
    page.fill("#search", "12")
    assert found(page)[0] < MANY and page.evaluate("performance.now()") - start < 1000


def test_the_pointer_shows_numbers(page: Page, records) -> None:
    at = min(range(len(records[0]["tokens"])), key=lambda t: records[0]["logprobs"][t])
    page.locator("#text b").nth(at).hover()
    tip = page.inner_text("#tip")
    assert f"id {records[0]['tokens'][at]}" in tip and f"log p: {records[0]['logprobs'][at]:.4f}" in tip and "version: " in tip
    page.locator("#curves svg").first.scroll_into_view_if_needed()
    page.locator("#curves svg .hit").first.hover()
    assert page.inner_text("#tip").startswith("step ")
    assert page.locator("#curves svg .cross[visibility=visible]").count() == page.locator("#curves svg").count()
    page.locator("#acceptance svg .hit").first.hover()
    assert page.inner_text("#tip").startswith("slot ")


def test_acceptance_is_what_the_traces_say(page: Page, records) -> None:
    """Per slot: the drafts that verification looked at, and those that it accepted."""
    looked, taken = np.zeros(64, int), np.zeros(64, int)
    for record in records:
        steps = steps_of(record["trace"], len(record["prompt_tokens"]), len(record["tokens"]))
        for drafted, accepted, slot in zip(steps.drafted, steps.accepted, steps.slot):
            looked[slot : slot + min(accepted + 1, drafted)] += 1
            taken[slot : slot + accepted] += 1
    slots = np.flatnonzero(looked >= 5)
    share = 100 * taken[slots] / looked[slots]
    heading = page.inner_text("#acceptance figcaption >> nth=0")
    first, last = (float(word) for word in heading.removeprefix("By slot: from ").replace("%", "").split(" to "))
    assert abs(first - share[0]) < 0.6 and abs(last - share[-1]) < 0.6


def test_the_state_outlives_the_page(browser: Browser, path: Path, records) -> None:
    complaints: list[str] = []
    page = opened(browser, path, complaints, anchor="#sort=longest&step=2&colour=logprob")
    chosen = max((r for r in records if r["step"] == 2), key=lambda r: len(r["tokens"]))
    assert title(page) == name(chosen) and page.input_value("#step") == "2"
    page.keyboard.press("j")
    after = title(page)
    page.reload()
    assert title(page) == after and complaints == []
    page.close()


def test_a_live_page_takes_newer_data_and_keeps_what_is_chosen(browser: Browser, records, tmp_path: Path) -> None:
    from blockroll.files import write_atomic
    from blockroll.rollout.inspection.page import page as made
    from blockroll.rollout.inspection.payload import payload
    from blockroll.rollout.inspection.run import Run

    run, target, complaints = Run.find(write(tmp_path / "in.jsonl", records[:4]), 2000), tmp_path / "live.html", list[str]()
    run.read()
    write_atomic(target, made(payload(run, None, None, live=0.2)))
    page = opened(browser, target, complaints)
    page.keyboard.press("j")
    assert title(page) == name(records[1])
    page.wait_for_timeout(500)  # looks at data that are as old
    write(tmp_path / "in.jsonl", records[:9])
    run.read()
    write_atomic(target, made(payload(run, None, None, live=0.2)))
    page.wait_for_selector("#found:text-matches('^9 of ')", timeout=10_000)
    assert title(page) == name(records[1]) and page.locator("iframe").count() <= 1
    page.keyboard.press("p")
    assert page.inner_text("#live") == "Paused"
    write(tmp_path / "in.jsonl", records[:12])
    run.read()
    write_atomic(target, made(payload(run, None, None)))
    page.wait_for_timeout(600)
    assert found(page)[0] == 9
    page.keyboard.press("p")
    page.wait_for_selector("#found:text-matches('^12 of ')", timeout=10_000)
    assert page.is_hidden("#live") and complaints == []
    page.close()


def axe_source() -> str:
    if given := os.environ.get("AXE_CORE"):
        return Path(given).read_text()
    spec = find_spec("axe_core_python")
    if spec is None or spec.origin is None:
        pytest.skip("no axe-core: set AXE_CORE to axe.min.js, or install axe-core-python")
    return (Path(spec.origin).parent / "axe.min.js").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1440])
def test_accessible_and_pictured(width: int, scheme: str, browser: Browser, path: Path, tmp_path: Path) -> None:
    axe, complaints = axe_source(), list[str]()
    page = opened(browser, path, complaints, width, scheme)
    assert page.get_attribute("html", "data-theme") == scheme
    page.keyboard.press("3")
    page.keyboard.press("l")
    for keys in ((), ("c",), ("?",)):
        for key in keys:
            page.keyboard.press(key)
        page.wait_for_timeout(300)
        page.screenshot(path=tmp_path / f"{scheme}-{width}-{'-'.join(keys) or 'plain'}.png", full_page=width < 900)
        page.evaluate(axe)
        violations = page.evaluate("axe.run(document).then(result => result.violations)")
        bad = [(v["id"], v["impact"], [node["html"][:150] for node in v["nodes"]][:3]) for v in violations]
        assert [one for one in bad if one[1] in ("serious", "critical")] == [], bad
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
    page.close()
    assert complaints == []


def test_a_long_trajectory_is_filled_where_it_is_seen(browser: Browser, tmp_path: Path) -> None:
    complaints: list[str] = []
    count = 20_000
    path = inspect(write(tmp_path / "in.jsonl", [{"tokens": [5 + i % 200 for i in range(count)]}]), policy="tiny-reasoner")
    page = opened(browser, path, complaints)
    assert 1024 <= page.locator("#text b").count() < count / 2
    page.evaluate("document.getElementById('text').scrollTop = 1e9")
    page.wait_for_selector(f"#text b[data-t='{count - 1}']", state="attached", timeout=10_000)
    page.keyboard.press("l")
    assert page.get_attribute("#text b.at", "data-t") == "0" and complaints == []
    page.close()


def test_a_page_without_traces_rewards_or_text(browser: Browser, tmp_path: Path) -> None:
    complaints: list[str] = []
    path = inspect(write(tmp_path / "in.jsonl", [{"tokens": [5, 6, 7]}, {"tokens": []}]))
    page = opened(browser, path, complaints)
    assert "no trace" in page.inner_text("#acceptance") and page.is_hidden("#run")
    assert page.locator("#sorts button:disabled").count() == 2
    page.keyboard.press("2")
    assert page.get_attribute("#sorts button:text-is('Run order')", "aria-pressed") == "true"
    page.keyboard.press("j")
    assert page.inner_text("#text") == "No tokens."
    assert payload_of(path)["decoded"] is False and complaints == []
    page.close()
