"""The demo as a visitor meets it: started as a user starts it, in a real browser, which has no window here.

`DEMO_PICTURES=docs/images python -m pytest tests/test_demo.py` takes the pictures of docs/demo.md anew.
"""

import base64
import importlib.util
import io
import json
import os
import shutil
import signal
import socketserver
import threading
import zipfile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

import scripts
import tiny
from diffusers_dino.report import Report
from image_files import encoded

INSTALL = "pip install diffusers-dino[demo,dev]"
if importlib.util.find_spec("gradio") is None:  # found, not imported, which takes seconds in each process
    pytest.skip(f"The demo needs Gradio: {INSTALL}", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason=f"The browser is driven by playwright: {INSTALL}")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="No Chromium to test the demo in: apt-get install chromium"),
]

# The browser's own calls home are not the page's.
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-gpu"]
PATIENCE = 60_000  # ms
PICTURES = os.environ.get("DEMO_PICTURES")


class Demo(NamedTuple):
    address: str
    folder: Path  # where uploads and results lie
    asked: list[str]  # what the server asked of the world outside


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo on its bundled model, in a network whose only way out is a proxy that leads nowhere."""
    folder, asked = tmp_path_factory.mktemp("demo"), []

    class NoWayOut(socketserver.StreamRequestHandler):
        def handle(self):
            asked.append(self.rfile.readline().decode(errors="replace"))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), NoWayOut) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        way_out = f"http://127.0.0.1:{proxy.server_address[1]}"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        environment = {name: way_out for upper in names for name in (upper, upper.lower())}
        environment |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "True", "NO_PROXY": ""}
        process = scripts.start_script("demo", fresh=True, environment=environment)
        yield Demo(scripts.address_of(process), folder, asked)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        proxy.shutdown()
    assert not list(folder.iterdir())  # nothing of a visitor outlives the program


@pytest.fixture(scope="module")
def requests():
    return []


@pytest.fixture(scope="module")
def page(demo, requests):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1240, "height": 900})
        page.set_default_timeout(PATIENCE)
        playwright.expect.set_options(timeout=PATIENCE)
        page.on("request", lambda request: requests.append(request))
        page.goto(demo.address)
        yield page
        browser.close()


def open_tab(page, name):
    """The panel of a tab."""
    page.get_by_role("tab", name=name).click()
    return page.locator(f"#{name.lower()}-tab")


def source_of(page):
    """The picture of the image that all tabs use."""
    return page.locator("#source .picture img").first


def pixels(page, locator) -> np.ndarray:
    """What an `img` of the page shows, as the server sent it."""
    return np.asarray(Image.open(io.BytesIO(page.request.get(locator.get_attribute("src")).body())))


def download(page, panel, name) -> bytes:
    button = panel.get_by_role("button", name=name).or_(panel.get_by_role("link", name=name))
    playwright.expect(button).to_be_enabled()
    with page.expect_download() as saved:
        button.click()
    return Path(saved.value.path()).read_bytes()


def set_number(page, field, value):
    """Type a number that stays: a page just opened sets its fields once more after they show."""
    for _ in range(20):
        field.fill(value)
        field.press("Enter")
        page.wait_for_timeout(500)
        if field.input_value() == value:
            return
    pytest.fail(f"The field does not keep {value}.")


def take_picture(page, name):
    if PICTURES:
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # for marks that fade
        page.screenshot(path=Path(PICTURES) / f"demo_{name}.png", full_page=True)


def png_of(seed: int) -> bytes:
    return encoded((tiny.random_images(1, channels=1, size=60, seed=seed)[0, 0] * 255).byte().numpy())


def drop(page, name, content):
    """Drop a file on the place for images."""
    page.locator("#source input[type=file]").set_input_files({"name": name, "mimeType": "", "buffer": content})


def test_variations_of_an_example_are_made_and_downloaded(page):
    panel = open_tab(page, "Variations")
    panel.get_by_role("button", name="Make variations").click()
    shown = page.locator("#variations img")
    playwright.expect(shown).to_have_count(4)
    made = [pixels(page, shown.nth(i)) for i in range(4)]
    assert all(picture.shape[:2] == (128, 128) and picture.std() > 10 for picture in made)
    assert len(np.unique(np.stack(made), axis=0)) == 4
    with zipfile.ZipFile(io.BytesIO(download(page, panel, "Download all (ZIP)"))) as files:
        assert np.array_equal(np.asarray(Image.open(files.open("variation_seed_2.png"))), made[2])
        assert json.loads(files.read("settings.json"))["model"] == "showcase"
    take_picture(page, "variations")


def test_findings_are_drawn_and_contradictory_ones_refused_in_words(page):
    panel = open_tab(page, "Findings")
    panel.get_by_label("Viral Pneumonia").first.check()
    panel.get_by_role("button", name="Draw").click()
    shown = page.locator("#drawn img")
    playwright.expect(shown).to_have_count(4)
    made = [pixels(page, shown.nth(i)) for i in range(4)]
    assert all(picture.shape[:2] == (128, 128) and picture.std() > 10 for picture in made)
    with zipfile.ZipFile(io.BytesIO(download(page, panel, "Download all (ZIP)"))) as files:
        assert json.loads(files.read("settings.json"))["present"] == ["Viral Pneumonia"]
    panel.get_by_label("Viral Pneumonia").nth(1).check()
    panel.get_by_role("button", name="Draw").click()
    playwright.expect(page.get_by_text("present and absent at once")).to_be_visible()


def test_a_dropped_file_is_shown_used_and_not_kept(page, demo):
    panel, source = open_tab(page, "Variations"), page.locator("#source")
    before = source_of(page).get_attribute("src")
    old = page.locator("#variations img").first.get_attribute("src")
    content = png_of(seed=5)
    files = page.evaluate_handle(
        """text => {
            const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0)), files = new DataTransfer();
            files.items.add(new File([bytes], "scan.png", {type: "image/png"}));
            return files;
        }""",
        base64.b64encode(content).decode(),
    )
    source.locator(".drop button").dispatch_event("drop", {"dataTransfer": files})
    playwright.expect(page.locator("#variations img")).to_have_count(0)  # they were made of another image
    playwright.expect(source_of(page)).to_be_visible()
    playwright.expect(source_of(page)).not_to_have_attribute("src", before)
    seen = pixels(page, source_of(page))
    assert seen.shape[:2] == (60, 60)
    assert (seen.min(), seen.max()) == (0, 255)
    playwright.expect(source.locator(".drop button")).to_be_visible()  # and free for the next file
    assert not [path for path in demo.folder.rglob("*") if path.is_file() and path.read_bytes() == content]

    panel.get_by_label("number input for Number of variations").fill("1")
    panel.get_by_role("button", name="Make variations").click()
    playwright.expect(page.locator("#variations img")).to_have_count(1)
    assert page.locator("#variations img").get_attribute("src") != old


def test_a_broken_file_is_refused_in_words(page):
    panel, source = open_tab(page, "Variations"), page.locator("#source")
    drop(page, "cut.png", png_of(0)[:200])
    expect_and_close(page, "Cannot read cut.png")
    assert "Traceback" not in page.content()
    playwright.expect(source.locator(".windowed img")).to_have_count(0)  # nor is the image before it used
    playwright.expect(page.locator("#variations img")).to_have_count(0)
    panel.get_by_role("button", name="Make variations").click()
    expect_and_close(page, "Drop an image")
    source.locator(".thumbnail-item").nth(1).click()
    playwright.expect(source.locator(".windowed img")).to_have_count(1)


def expect_and_close(page, message):
    playwright.expect(page.get_by_text(message)).to_be_visible()
    page.get_by_test_id("toast-close").first.click()
    playwright.expect(page.get_by_text(message)).to_have_count(0)


def test_the_slider_of_a_blend_shows_another_image_without_the_server(page, requests):
    panel = open_tab(page, "Blend")
    panel.get_by_text("slerp").click()
    panel.get_by_role("button", name="Blend", exact=True).click()
    path = page.locator("#path img")
    playwright.expect(path).to_have_count(9)
    made = [pixels(page, path.nth(i)) for i in range(9)]
    assert all(picture.std() > 10 for picture in made)
    assert len(np.unique(np.stack(made), axis=0)) == 9
    shown = page.locator("#blend img")
    playwright.expect(shown).to_have_attribute("src", path.nth(4).get_attribute("src"))

    sent = len(requests)
    panel.get_by_label("range slider for Fraction of the way").press("ArrowRight")
    playwright.expect(shown).to_have_attribute("src", path.nth(5).get_attribute("src"))
    assert not [request for request in requests[sent:] if request.method == "POST"]
    path.nth(1).click()
    playwright.expect(shown).to_have_attribute("src", path.nth(1).get_attribute("src"))
    with zipfile.ZipFile(io.BytesIO(download(page, panel, "Download all (ZIP)"))) as files:
        assert np.array_equal(np.asarray(Image.open(files.open("blend_0.125.png"))), made[1])
        assert json.loads(files.read("settings.json"))["method"] == "slerp"
    path.nth(4).click()
    take_picture(page, "blend")


def test_another_threshold_gives_other_segments(page):
    panel = open_tab(page, "Segments")
    panel.get_by_role("button", name="Segment", exact=True).click()
    shown = page.locator("#segments img")
    playwright.expect(shown).to_have_count(1)
    assert pixels(page, shown).std() > 10
    take_picture(page, "segments")
    counts = []
    for threshold in ("0.05", "1"):
        before = shown.get_attribute("src")
        panel.get_by_label("number input for Merge threshold").fill(threshold)
        panel.get_by_label("number input for Merge threshold").press("Enter")
        playwright.expect(shown).not_to_have_attribute("src", before)
        mask = np.asarray(Image.open(io.BytesIO(download(page, panel, "Download mask (PNG)"))))
        assert mask.shape == (128, 128)
        counts.append(mask.max() + 1)
        playwright.expect(panel.get_by_text(f"{counts[-1]} segment")).to_be_visible()
        assert len(np.unique(mask)) == counts[-1]
    assert counts[0] > counts[1]
    painted = Image.open(io.BytesIO(download(page, panel, "Download overlay (PNG)")))
    assert (painted.size, painted.mode) == ((128, 128), "RGB")


def test_a_warning_about_a_file_is_shown(page):
    from dicom_files import dicom_bytes  # needs pydicom

    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    film = np.round(200 + 3500 * np.exp(-2 * (x**2 + y**2))).astype(np.uint16)  # a bright body on dark air
    drop(page, "film.dcm", dicom_bytes(film, 12, PhotometricInterpretation="MONOCHROME1", Modality="DX"))
    expect_and_close(page, "film.dcm says MONOCHROME1")
    playwright.expect(source_of(page)).to_be_visible()


def test_window_and_level_change_what_is_shown_without_the_server(page, requests):
    source = page.locator("#source")
    source.get_by_text("Window and level").click()
    sent = len(requests)
    set_number(page, source.get_by_label("number input for Window"), "40")
    set_number(page, source.get_by_label("number input for Level"), "30")
    parts = page.locator("#window [type=linear]")
    playwright.expect(parts.first).to_have_attribute("slope", "2.5")
    assert [float(parts.nth(i).get_attribute("intercept")) for i in range(3)] == pytest.approx([-0.25] * 3)
    assert "window" in source_of(page).evaluate("image => getComputedStyle(image).filter")
    for number in range(2):
        source.get_by_test_id("reset-button").nth(number).click()
    playwright.expect(parts.first).to_have_attribute("slope", "1")
    assert not [request for request in requests[sent:] if request.method == "POST"]


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("wide.png", lambda: encoded(Image.new("L", (20_000, 300))), "wide.png has 20000 x 300 pixels"),
        (
            "moving.gif",
            lambda: encoded(
                Image.open(io.BytesIO(png_of(1))), "GIF", save_all=True, append_images=[Image.new("L", (60, 60))]
            ),
            "moving.gif holds several images: the first one is used",
        ),
    ],
)
def test_a_file_that_is_too_wide_or_an_animation_is_told_of_in_words(page, name, make, message):
    drop(page, name, make())
    expect_and_close(page, message)
    assert "Traceback" not in page.content()
    shown = page.locator("#source .windowed img")  # nor is the image before it used
    playwright.expect(shown).to_have_count(int(name == "moving.gif"))


def test_images_unlike_those_of_the_training_are_warned_of(page):
    source = page.locator("#source")
    checkers = (np.indices((128, 128)) // 16).sum(0) % 2 * 255
    drop(page, "checkers.png", encoded(Image.fromarray(checkers.astype(np.uint8))))
    playwright.expect(source.get_by_text("Unlike the images that the model was trained on")).to_be_visible()
    source.locator(".thumbnail-item").nth(1).click()
    playwright.expect(source.get_by_text("Unlike the images")).to_have_count(0)


def test_source_and_variations_zoom_in_step_without_the_server(page, requests):
    panel = open_tab(page, "Variations")
    panel.get_by_role("button", name="Make variations").click()
    made = page.locator("#variations img").first
    playwright.expect(made).to_be_visible()
    sent = len(requests)

    def shown(picture):
        return picture.evaluate("image => [getComputedStyle(image).transform, image.style.length]")

    page.get_by_label("Zoom", exact=True).fill("3")
    page.get_by_label("Down", exact=True).fill("10")
    assert shown(source_of(page)) == shown(made) == ["matrix(3, 0, 0, 3, 0, 0)", 0]
    pictures = [source_of(page), made]
    origins = [
        one.evaluate("image => parseFloat(getComputedStyle(image).transformOrigin.split(' ')[1])") for one in pictures
    ]
    heights = [one.evaluate("image => image.offsetHeight") for one in pictures]
    assert [top / height for top, height in zip(origins, heights, strict=True)] == pytest.approx([0.1, 0.1], abs=1e-3)
    made.hover()
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    assert shown(source_of(page)) == shown(made) == ["matrix(6, 0, 0, 6, 0, 0)", 0]
    page.get_by_label("Zoom", exact=True).fill("1")
    assert not [request for request in requests[sent:] if request.method == "POST"]


def serious(page) -> list[str]:
    """What axe-core finds that keeps people from using a page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=f"axe-core is missing: {INSTALL}")
    found = axe.Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found if each["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_demo_has_no_serious_finding_of_accessibility(page, demo, theme):
    other = page.context.browser.new_page()
    other.goto(f"{demo.address}?__theme={theme}")
    for name in ("Variations", "Blend", "Segments", "Findings"):
        open_tab(other, name)
        other.get_by_text("Sampling").first.wait_for(state="attached")
        assert not serious(other)
    other.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_reports_have_no_serious_finding_of_accessibility(page, tmp_path, scheme):
    report = Report("What was measured")
    report.add_heading("Figures")
    report.add_text("Of phantoms.")
    report.add_table(["", "Dice"], [["lungs", 0.7]])
    report.add_image(Image.new("L", (32, 32), 99), "A phantom")
    report.save(tmp_path / "report.html")
    other = page.context.browser.new_page(color_scheme=scheme)
    other.goto((tmp_path / "report.html").as_uri())
    assert not serious(other)
    other.close()


def test_nothing_left_this_machine(page, demo, requests):
    addresses = [urlsplit(request.url) for request in requests]
    outside = {address.geturl() for address in addresses if address.hostname not in (None, "127.0.0.1")}
    assert len(addresses) > 20
    assert not outside
    assert not demo.asked
