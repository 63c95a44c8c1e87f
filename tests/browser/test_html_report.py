"""HTML reports as people meet them: in a browser, by mouse and keyboard, on a phone, light and dark.

Each check is also shown a page that is broken on purpose, on which it must fail.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from report_pages import MERGES_AND_PRUNES, write_run_report
from typer.testing import CliRunner

from fftriton.app.cli import app
from fftriton.app.report.strip import states_of
from fftriton.runtime.shipped import NEEDLE

NotFound = pytest.importorskip("playwright.sync_api", reason="needs playwright: make browser").TimeoutError

DESKTOP, PHONE = {"width": 1100, "height": 900}, {"width": 375, "height": 700}
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder, for people who want to look


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page of a run, and [layer][frame, patch] what became of each patch."""
    page, (result,) = write_run_report(tmp_path_factory.mktemp("run"), "--method", MERGES_AND_PRUNES)
    return page, states_of(result.reduced.report)


@pytest.fixture
def visit(browser, tmp_path):
    """Open a page, as it is or with parts of its source replaced; what it asks for and what fails is noted."""
    contexts = []

    def open_page(path: Path, broken: tuple[str, str] | None = None, scheme: str = "light", size: dict = DESKTOP):
        if broken is not None:
            source = path.read_text(encoding="utf-8")
            assert broken[0] in source
            path = tmp_path / "broken.html"
            path.write_text(source.replace(*broken), encoding="utf-8")
        contexts.append(browser.new_context(color_scheme=scheme, viewport=size))
        page = contexts[-1].new_page()
        page.asked, page.faults = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


def shown(page) -> list[str]:
    """What the page says of each patch of the frame: kept, merged or pruned, by name, class and picture."""
    cells = page.locator(".cell").evaluate_all("cells => cells.map(c => [c.ariaLabel, c.className])")
    for label, classes in cells:
        assert label.split(": ")[1] in classes.split()
    return [label.split(": ")[1] for label, _ in cells]


def expected(state, frame: int) -> list[str]:
    size = state.shape[1]
    roots = state[frame].tolist()
    return ["pruned" if r == -1 else "kept" if r == frame * size + i else "merged" for i, r in enumerate(roots)]


def slide(page, name: str, key: str) -> None:
    """Move a slider as a person does who works with the keyboard, and who knows it by its label."""
    page.get_by_label(name, exact=True).press(key, timeout=2000)


def check_sliders(page, states) -> None:
    frames, layers = len(states[0]), len(states)
    slide(page, "Layer", "Home")
    slide(page, "Frame", "Home")
    assert shown(page) == expected(states[0], 0)
    first = page.locator(".shown").get_attribute("src")
    for frame in range(1, frames):
        slide(page, "Frame", "ArrowRight")
        assert shown(page) == expected(states[0], frame)
        assert f"{frame + 1} of {frames}" in page.locator("output").first.text_content()
    assert page.locator(".shown").get_attribute("src") != first
    assert page.locator("[aria-current]").count() == 1
    assert page.locator(".thumbnails button").last.get_attribute("aria-current") == "true"
    for layer in range(1, layers):
        slide(page, "Layer", "ArrowRight")
        assert shown(page) == expected(states[layer], frames - 1)
        kept = sum(expected(states[layer], frame).count("kept") for frame in range(frames))
        assert f"All frames: {kept} of {states[layer].size} kept" in page.locator(".summary").text_content()


def check_hover(page, states) -> None:
    state = states[-1]
    size = state.shape[1]
    own = next(i for i, root in enumerate(state.flat) if root not in (-1, i))  # merged
    root, columns = int(state.flat[own]), 4
    group = [i for i, other in enumerate(state.flat) if other == root]
    page.locator(".thumbnails button").nth(own // size).click()
    page.locator(".cell").nth(own % size).hover()
    text = page.locator(".patch").text_content()
    row, column = divmod(root % size, columns)
    assert f"merged into frame {root // size + 1}, row {row + 1}, column {column + 1}" in text
    for frame in range(len(state)):
        thumbnail = page.locator(".thumbnails button").nth(frame)
        outlined = [i % size for i in group if i // size == frame and i != root]
        assert squares(thumbnail, "group") == [divmod(i, columns) for i in outlined]
        assert squares(thumbnail, "root") == ([(row, column)] if root // size == frame else [])
        for kind in ("merged", "pruned"):
            names = expected(state, frame)
            assert squares(thumbnail, kind) == [divmod(i, columns) for i in range(size) if names[i] == kind]
    assert page.locator(".cell.group").count() == len([i for i in group if i // size == own // size and i != root])
    page.mouse.move(0, 0)
    assert page.locator(".cell.group, .cell.root").count() == 0


def squares(thumbnail, name: str) -> list[tuple[int, int]]:
    """Row and column of the squares of a path."""
    path = thumbnail.locator(f"path.{name}").get_attribute("d")
    return [(int(y), int(x)) for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", path)]


def check_axe(page) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, json.dumps(serious, indent=1)[:3000]


def test_the_sliders_show_every_frame_and_layer(visit, made):
    path, states = made
    page = visit(path)
    check_sliders(page, states)
    assert not page.faults
    assert all(url.startswith(("file:", "data:")) for url in page.asked)


@pytest.mark.parametrize(
    "broken",
    [
        ('layerSlider.addEventListener("input"', 'layerSlider.addEventListener("nothing"'),
        ('frameSlider.addEventListener("input"', 'frameSlider.addEventListener("nothing"'),
        ('<label for="s1-layer">', '<label for="elsewhere">'),
        ("cell.className = `cell ${what}`", "cell.className = 'cell kept'"),
        ("states.push(state)", "states.push(states[0] ?? state)"),
    ],
    ids=["layers", "frames", "label", "colours", "states"],
)
def test_a_broken_slider_or_label_is_noticed(visit, made, broken):
    path, states = made
    page = visit(path, broken)
    with pytest.raises((AssertionError, NotFound)):
        check_sliders(page, states)


def test_hovering_shows_the_token_of_a_patch(visit, made):
    path, states = made
    check_hover(visit(path), states)


@pytest.mark.parametrize(
    "broken",
    [('cell.addEventListener("mouseenter"', 'cell.addEventListener("nothing"'), ("other === root", "other > root")],
    ids=["hover", "group"],
)
def test_broken_hovering_is_noticed(visit, made, broken):
    path, states = made
    page = visit(path, broken)
    with pytest.raises(AssertionError):
        check_hover(page, states)


def test_everything_is_reached_by_keyboard(visit, made):
    path, states = made
    page = visit(path)
    for _ in range(2):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "s1-layer"
    page.keyboard.press("Tab")
    focused = "[...document.querySelectorAll('.cell')].indexOf(document.activeElement)"
    assert page.evaluate(focused) == 0
    for key, at in [("ArrowRight", 1), ("ArrowDown", 5), ("End", 7), ("ArrowRight", 7), ("Home", 4), ("ArrowUp", 0)]:
        page.keyboard.press(key)
        assert page.evaluate(focused) == at
    before = page.locator("output").first.text_content()
    page.keyboard.press("PageDown")
    assert page.locator("output").first.text_content() != before
    assert page.locator(".patch").text_content().startswith(f"Frame {int(before.split()[0]) + 1}, row 1, column 1:")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator(".thumbnails button").first.get_attribute("aria-current") == "true"
    assert shown(page) == expected(states[-1], 0)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_legible(visit, made, scheme, size):
    page = visit(made[0], scheme=scheme, size=size)
    page.locator(".cell").first.hover()
    check_axe(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == (scheme == "dark")
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"run-{scheme}-{size['width']}.png", full_page=True)


@pytest.mark.parametrize(
    "broken",
    [
        ('<label for="s1-layer">', '<label for="elsewhere">'),
        ("--faint: #555c68", "--faint: #c5ccd8"),
        ('cell.setAttribute("role", "gridcell")', 'cell.setAttribute("role", "nonsense")'),
    ],
    ids=["label", "contrast", "role"],
)
def test_axe_notices_a_page_that_is_broken(visit, made, broken):
    page = visit(made[0], broken)
    with pytest.raises(AssertionError, match="impact"):
        check_axe(page)


def test_what_moves_is_seen(visit, made):
    """The picture itself changes with the layer, not only its names."""
    path, states = made
    page = visit(path)
    page.locator(".thumbnails button").last.click()
    pictures = []
    for key in ("Home", "End"):
        slide(page, "Layer", key)
        page.mouse.move(0, 0)
        pictures.append(page.locator(".stage").screenshot())
    assert expected(states[0], -1) != expected(states[-1], -1)
    assert pictures[0] != pictures[1]


def test_the_pages_of_inspect_and_calibrate(visit, tmp_path):
    given: list[list[object]] = [
        ["inspect", "--out", tmp_path, "--report", tmp_path / "inspect.html"],
        [
            "calibrate", clip_as_requests(tmp_path), "--methods", "framefusion", "--budgets", "0.5",
            "--out", tmp_path / "out", "--report", tmp_path / "calibrate.html",
        ],
    ]  # fmt: skip
    for arguments in given:
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
    for name in ("inspect", "calibrate"):
        for scheme, size in (("light", PHONE), ("dark", DESKTOP)):
            page = visit(tmp_path / f"{name}.html", scheme=scheme, size=size)
            check_axe(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            assert not page.faults
            if SCREENSHOTS:
                page.screenshot(path=Path(SCREENSHOTS) / f"{name}-{scheme}-{size['width']}.png", full_page=True)
        slide(page, "Layer", "Home")
        slide(page, "Frame", "Home")
        assert set(shown(page)) == {"kept"}
        slide(page, "Frame", "End")
        assert "merged" in shown(page)


def clip_as_requests(folder: Path) -> Path:
    path = folder / "requests.jsonl"
    path.write_text(json.dumps({"video": str(NEEDLE.path), "question": NEEDLE.question}) + "\n")
    return path
