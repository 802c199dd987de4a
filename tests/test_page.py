"""The page at `/`, in a real headless Chromium, against a server that speaks its API."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from page_stub import PAGE, Stub
from PIL import Image

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import expect, sync_playwright

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
PATIENCE = 60_000  # milliseconds: a shared machine may take long over what takes a second
SHORT = 4  # steps
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def site() -> Iterator[Stub]:
    server = Stub()
    server.step_seconds = 0.02
    yield server
    server.shutdown()
    server.server_close()


class Visit:
    """A page and all that went wrong on it; what a test expects it may allow."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.url = url
        self.context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce", **options}
        )
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.allowed: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on(
            "console",
            lambda said: self.faults.append(said.text) if said.type in ("error", "warning") else 0,
        )
        self.page.on("request", self._asked)
        self.page.add_init_script(
            "addEventListener('securitypolicyviolation', (event) =>"
            " console.error('CSP violation', event.violatedDirective, event.blockedURI))"
        )

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.faults.append(f"request to {request.url}")

    def start(self) -> Page:
        self.page.goto(self.url)
        expect(self.page.locator("[data-field=image_size]")).to_be_visible()
        return self.page

    def end(self) -> None:
        self.context.close()
        left = [one for one in self.faults if not any(text in one for text in self.allowed)]
        assert left == []


@pytest.fixture
def visit(browser: Browser, site: Stub) -> Iterator[Visit]:
    one = Visit(browser, site.url)
    yield one
    one.end()


@pytest.fixture
def page(visit: Visit) -> Page:
    return visit.start()


def job_of(site: Stub, prompt: str) -> dict[str, Any]:
    return next(job for job in jobs(site) if job["arguments"]["prompt"] == prompt)


def jobs(site: Stub) -> list[dict[str, Any]]:
    with urllib.request.urlopen(site.url + "api/jobs?limit=50") as answer:
        found: list[dict[str, Any]] = json.load(answer)["jobs"]
    return found


def choose(page: Page, steps: int = SHORT) -> None:
    """A small and quick picture."""
    page.locator("input[name=size][value=square]").check()
    if page.locator("#more").get_attribute("open") is None:
        page.locator("#more summary").click()
    page.get_by_role("spinbutton", name="Number of inference steps").fill(str(steps))


def draw(page: Page, prompt: str, steps: int = SHORT) -> None:
    choose(page, steps)
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Draw").click()


def tiles(page: Page, kind: str) -> Locator:
    return page.locator(f".tile[data-kind={kind}]")


def png(width: int = 96, height: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


DROP = """([target, bytes, type]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(bytes)], "in.png", { type }));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    const happens = { dataTransfer: transfer, bubbles: true, cancelable: true };
    document.querySelector(target).dispatchEvent(new DragEvent(kind, happens));
  }
}"""


def drop(page: Page, data: bytes, content_type: str = "image/png") -> None:
    page.evaluate(DROP, ["#drop", list(data), content_type])


def test_a_prompt_becomes_a_picture_and_its_progress_is_seen(page: Page, site: Stub) -> None:
    site.step_seconds = 0.25
    draw(page, "A quiet harbour", steps=12)
    expect(tiles(page, "pending")).to_have_count(1)
    expect(page.get_by_role("progressbar", name="Drawing: A quiet harbour")).to_be_attached()
    expect(page.locator(".tile .facts", has_text="Step ")).to_be_visible()
    expect(page.locator(".preview")).to_have_attribute("src", re.compile("^data:image/jpeg"))
    assert "%" in page.title()
    before = page.locator(".tile .frame").bounding_box()
    site.step_seconds = 0
    expect(page.locator(".picture.loaded")).to_have_count(1)
    assert page.locator(".tile .frame").bounding_box() == before  # nothing jumped
    picture = page.locator(".picture")
    assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [512, 512]
    expect(page.locator("#live")).to_have_text("Drawn: one picture.")
    expect(page.locator(".facts")).to_contain_text(
        f"seed {job_of(site, 'A quiet harbour')['seed']}"
    )


def test_the_keyboard_draws_cancels_and_looks(page: Page, site: Stub) -> None:
    def press(*keys: str) -> None:
        for key in keys:
            page.keyboard.press(key)

    def focus() -> str:
        return str(page.evaluate("document.activeElement.id || document.activeElement.textContent"))

    site.step_seconds = 5
    press("Tab", "Tab")  # past the link that skips the form
    assert focus() == "prompt"
    page.keyboard.type("First")
    press("Control+Enter")
    expect(tiles(page, "pending")).to_have_count(1)
    assert focus() == "prompt"
    page.locator("#gallery").focus()
    press("Tab")
    assert focus() == "Cancel"
    press("Enter")
    expect(tiles(page, "pending")).to_have_count(0)
    assert focus() == "prompt"  # never lost with what had it
    site.step_seconds = 0
    for prompt in ("Second", "Third"):
        press("Control+a")
        page.keyboard.type(prompt)
        press("Control+Enter")
        expect(page.get_by_role("button", name=f"Open picture: {prompt}")).to_be_visible()
    page.locator("#gallery").focus()
    press("Tab", "Enter")
    viewer = page.get_by_role("dialog")
    expect(viewer.locator("#words")).to_have_text("Third")
    press("ArrowRight")
    expect(viewer.locator("#words")).to_have_text("Second")
    press("ArrowLeft")
    expect(viewer.locator("#words")).to_have_text("Third")
    press("Escape")
    expect(viewer).not_to_be_visible()
    assert focus() == "Open picture: Third"


def test_a_reload_finds_the_running_job_its_progress_and_the_form_again(
    page: Page, site: Stub
) -> None:
    site.step_seconds = 0.5
    draw(page, "Slow hills", steps=50)
    expect(page.locator(".tile .facts", has_text="Step ")).to_be_visible()
    page.reload()
    expect(tiles(page, "pending")).to_have_count(1)
    expect(page.locator(".tile .facts", has_text="Step ")).to_be_visible()
    expect(page.get_by_label("Prompt")).to_have_value("Slow hills")
    expect(page.get_by_role("spinbutton", name="Number of inference steps")).to_have_value("50")
    site.step_seconds = 0
    expect(page.get_by_role("button", name="Open picture: Slow hills")).to_be_visible()


def test_jobs_wait_in_order_and_each_can_be_cancelled(page: Page, site: Stub) -> None:
    site.step_seconds = 0.5
    for prompt in ("one", "two", "three", "four"):
        draw(page, prompt, steps=50)
        expect(page.locator(f"[title='{prompt}'], #queue li:has-text('{prompt}')")).to_be_visible()
    queue = page.locator("#queue li")
    expect(queue).to_have_count(2)  # one is drawn, two is next and has its place already
    expect(queue.locator(".position")).to_have_text(["2", "3"])
    expect(page.locator("#queued")).to_have_text("3 waiting")
    page.get_by_role("button", name="Cancel: three").click()
    expect(queue).to_have_count(1)
    page.get_by_role("button", name="Cancel: one").click()
    expect(page.locator(".tile .facts", has_text="Step ")).to_be_visible()  # two runs now
    expect(page.locator("#queue")).not_to_be_visible()
    states = {job["arguments"]["prompt"]: job["state"] for job in jobs(site)}
    assert states == {"one": "cancelled", "two": "running", "three": "cancelled", "four": "queued"}


def test_a_dropped_image_is_redrawn_with_the_defaults_of_image_to_image(
    page: Page, site: Stub
) -> None:
    expect(page.get_by_role("spinbutton", name="Strength")).to_have_count(0)
    drop(page, png(192, 128))
    expect(page.locator("#input-picture")).to_be_visible()
    expect(page.locator("#input-size")).to_have_text("192 × 128")
    expect(page.locator("[data-field=image_size]")).to_have_count(0)
    steps = page.get_by_role("spinbutton", name="Number of inference steps", include_hidden=True)
    expect(steps).to_have_value("40")
    page.get_by_role("spinbutton", name="Strength").fill("0.5")
    page.get_by_label("Prompt").fill("In gouache")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".picture.loaded")).to_have_count(1)
    job = job_of(site, "In gouache")
    assert job["endpoint"].endswith("/image-to-image")
    assert (job["arguments"]["strength"], job["arguments"]["num_inference_steps"]) == (0.5, 40)
    assert (job["pictures"][0]["width"], job["pictures"][0]["height"]) == (192, 128)
    page.get_by_role("button", name="Remove input image").click()
    expect(page.locator("[data-field=image_size]")).to_be_visible()
    expect(page.get_by_role("spinbutton", name="Strength")).to_have_count(0)


def test_another_tab_finds_the_input_image_again(browser: Browser, page: Page, site: Stub) -> None:
    drop(page, png(192, 128))
    page.get_by_label("Prompt").fill("In gouache")
    expect(page.locator("#input-picture")).to_be_visible()
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".picture.loaded")).to_have_count(1)
    other = Visit(browser, site.url)
    tab = other.start()
    tab.get_by_role("button", name="Open picture: In gouache").click()
    tab.get_by_role("button", name="Again with this seed").click()
    expect(tab.locator("#input-size")).to_have_text("192 × 128")
    expect(tab.locator("#image-error")).to_have_text("")
    other.end()


def test_what_is_no_image_is_refused_beside_the_drop_zone(visit: Visit, page: Page) -> None:
    visit.allowed.append("422")
    drop(page, b"hello", "text/plain")
    expect(page.locator("#image-error")).to_contain_text("not an image")
    drop(page, b"hello", "image/png")
    expect(page.locator("#image-error")).to_contain_text("image")
    expect(page.locator("#input")).not_to_be_visible()


def test_a_picture_can_be_the_next_ones_input_or_recipe_and_can_be_deleted(
    page: Page, site: Stub
) -> None:
    page.locator("input[name=choice-num_images][value='2']").check()
    draw(page, "Two dunes")
    expect(page.locator(".picture.loaded")).to_have_count(2)
    page.get_by_label("Prompt").fill("something else")
    page.get_by_role("button", name="Open picture: Two dunes").nth(1).click()
    recipe = page.locator("#recipe")
    seed = job_of(site, "Two dunes")["seed"] + 1
    expect(recipe).to_contain_text(f"Seed{seed}")
    expect(recipe).to_contain_text("Size512 × 512")
    expect(recipe).to_contain_text("Image2 of 2")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == f"two-dunes-{seed}.jpeg"
    with Image.open(download.value.path()) as picture:
        assert picture.size == (512, 512)
    page.get_by_role("button", name="Again with this seed").click()
    expect(page.get_by_label("Prompt")).to_have_value("Two dunes")
    expect(page.get_by_label("Seed")).to_have_value(str(seed))
    expect(page.locator("input[name=choice-num_images][value='1']")).to_be_checked()
    page.get_by_role("button", name="Open picture: Two dunes").first.click()
    page.get_by_role("button", name="Use as input image").click()
    expect(page.locator("#input-size")).to_have_text("512 × 512")
    page.get_by_role("button", name="Open picture: Two dunes").first.click()
    page.locator("#delete").click()
    expect(page.locator("#delete")).to_have_text("Delete all 2 of this drawing?")
    page.locator("#delete").click()
    expect(page.locator(".picture")).to_have_count(0)
    expect(page.get_by_text("Nothing drawn yet.")).to_be_visible()
    assert jobs(site) == []


def test_the_prompt_is_copied(visit: Visit) -> None:
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = visit.start()
    draw(page, "To be copied")
    page.get_by_role("button", name="Open picture").click()
    page.get_by_role("button", name="Copy prompt").click()
    expect(page.get_by_text("Prompt copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "To be copied"


def test_faults_are_told_beside_their_fields(visit: Visit, page: Page, site: Stub) -> None:
    visit.allowed.append("422")
    page.locator("input[name=size][value=custom]").check()
    page.get_by_role("spinbutton", name="Width").fill("4000")
    page.get_by_role("spinbutton", name="Height").fill("3000")
    page.locator("#more summary").click()
    page.get_by_role("spinbutton", name="Guidance scale").fill("99")
    page.locator("#more summary").click()
    page.get_by_role("button", name="Draw").click()
    guidance = page.locator("[data-field=guidance_scale]")
    expect(guidance.locator(".error")).to_contain_text("less than or equal to 20")
    expect(page.locator("[data-field=image_size] .error")).to_contain_text("megapixels")
    expect(page.get_by_role("spinbutton", name="Guidance scale")).to_have_attribute(
        "aria-invalid", "true"
    )
    assert page.evaluate("document.activeElement.closest('.field') !== null")
    assert jobs(site) == []
    page.get_by_role("button", name="Back to the defaults").click()
    expect(page.locator(".error:visible")).to_have_count(0)
    expect(page.get_by_role("spinbutton", name="Guidance scale")).to_have_value("4.5")


def test_a_failed_job_says_why_and_can_be_tried_again(page: Page, site: Stub) -> None:
    site.fail = "the GPU's memory does not suffice: ask for a smaller picture"
    draw(page, "Too large")
    expect(tiles(page, "failed")).to_contain_text("the GPU's memory does not suffice")
    page.get_by_label("Prompt").fill("")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_label("Prompt")).to_have_value("Too large")
    page.get_by_role("button", name="Dismiss").click()
    expect(tiles(page, "failed")).to_have_count(0)


def test_a_prompt_of_markup_is_shown_as_text(page: Page, site: Stub) -> None:
    attack = "<img src=x onerror=\"document.title='owned'\"><script>alert(1)</script>"
    site.step_seconds = 0.3
    for _ in range(3):
        draw(page, attack, steps=12)
    expect(page.locator("#queue li")).to_have_count(1)
    expect(page.locator("#queue .prompt")).to_have_text(attack)
    site.step_seconds = 0
    expect(page.locator(".picture.loaded")).to_have_count(3)
    expect(page.locator(".tile .prompt").first).to_have_text(attack)
    page.locator(".open").first.click()
    expect(page.locator("#words")).to_have_text(attack)
    assert "owned" not in page.title()
    assert page.locator("img[src=x]").count() == 0


def test_a_server_with_a_key_asks_for_it_once(browser: Browser, site: Stub) -> None:
    site.api_key = "open-sesame"
    visit = Visit(browser, site.url)
    visit.allowed.append("401")
    page = visit.page
    page.goto(site.url)
    dialog = page.get_by_role("dialog", name="This server wants its key")
    page.get_by_role("textbox", name="Key").fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_text("That is not the key.")).to_be_visible()
    page.get_by_role("textbox", name="Key").fill("open-sesame")
    page.keyboard.press("Enter")
    expect(dialog).not_to_be_visible()
    draw(page, "With a key")
    expect(page.locator(".picture.loaded")).to_have_count(1)
    page.reload()  # kept for the tab
    expect(page.locator(".picture.loaded")).to_have_count(1)
    expect(dialog).not_to_be_visible()
    assert page.evaluate("localStorage.length") == 0
    visit.end()


def test_a_lost_connection_is_told_and_found_again(visit: Visit, page: Page) -> None:
    visit.allowed.append("ERR_INTERNET_DISCONNECTED")
    visit.context.set_offline(True)
    expect(page.get_by_role("alert").filter(has_text="connection")).to_be_visible()
    page.get_by_label("Prompt").fill("Kept")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#form-error")).to_have_text("The server cannot be reached.")
    visit.context.set_offline(False)
    expect(page.locator("#banner")).not_to_be_visible()
    expect(page.get_by_label("Prompt")).to_have_value("Kept")


def test_the_status_line_tells_model_queue_and_gpu_memory(page: Page, site: Stub) -> None:
    expect(page.locator("#model")).to_have_text("krea is ready")
    expect(page.locator("#workers")).to_have_text("cuda:0 35 of 85 GB")
    meter = page.get_by_role("meter", name="GPU memory of cuda:0")
    assert meter.evaluate("meter => meter.value / meter.max") == pytest.approx(0.414, abs=1e-3)
    site.state = {"ready": False, "reason": "no transformer/ in /models: see weights.md"}
    expect(page.locator("#model")).to_have_text(
        "krea could not be loaded: no transformer/ in /models: see weights.md"
    )


def test_every_field_has_the_bounds_default_and_help_of_the_schema(page: Page, site: Stub) -> None:
    with urllib.request.urlopen(site.url + "api/schema") as answer:
        endpoint = json.load(answer)["endpoints"]["fal-ai/flux/krea"]
    page.locator("#more summary").click()
    shown = 0
    for field in endpoint["fields"]:
        if field["name"] in ("prompt", "image_url", "sync_mode"):
            continue
        row = page.locator(f"[data-field={field['name']}]")
        expect(row.locator(".help")).to_have_text(field["description"])
        shown += 1
        if row.get_attribute("data-kind") == "slider":
            for control in row.locator("input").all():
                assert float(control.get_attribute("min") or "") == field["minimum"]
                assert float(control.get_attribute("max") or "") == field["maximum"]
                assert float(control.input_value()) == field["default"]
        if field["type"] == "boolean":
            assert row.locator("input").is_checked() == field["default"]
        if field["type"] == "enum":
            radios = row.locator("input").all()
            assert [radio.input_value() for radio in radios] == field["choices"]
            assert row.locator("input:checked").input_value() == field["default"]
    assert shown == 8


def test_every_control_has_a_name_and_room_for_a_finger(page: Page, site: Stub) -> None:
    draw(page, "A picture")
    drop(page, png())
    expect(page.locator("#input-picture")).to_be_visible()
    expect(page.locator(".picture.loaded")).to_have_count(1)
    session = page.context.new_cdp_session(page)
    asked = ("button", "textbox", "slider", "spinbutton", "radio", "checkbox", "switch", "link",
             "image", "dialog", "progressbar", "meter", "group", "form")  # fmt: skip

    def unnamed() -> list[Any]:
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        seen = [node for node in nodes if not node["ignored"]]
        assert len(seen) > 40
        return [
            node
            for node in seen
            if node.get("role", {}).get("value", "") in asked
            and not node.get("name", {}).get("value")
            # Details and lists of settings are groups that their own heading names.
            and node["role"]["value"] != "group"
        ]

    assert unnamed() == []
    small = """elements => elements.filter(e => e.checkVisibility()).map(e => {
        const box = (e.closest('label') ?? e).getBoundingClientRect();
        return [e.outerHTML.slice(0, 80), Math.round(box.width), Math.round(box.height)];
    }).filter(([, width, height]) => width < 44 || height < 44)"""
    touched = "button, a.button, input, textarea, summary, label.pick"
    assert page.locator(touched).evaluate_all(small) == []
    page.locator(".open").click()
    assert unnamed() == []
    assert page.locator("dialog button, dialog a").evaluate_all(small) == []


@pytest.mark.parametrize("width", [320, 768, 3840])
def test_nothing_runs_out_of_the_window(browser: Browser, site: Stub, width: int) -> None:
    long = "Donaudampfschifffahrtsgesellschaftskapitän" * 6
    site.add("fal-ai/flux/krea", {"prompt": long, "num_inference_steps": 1})
    visit = Visit(browser, site.url, viewport={"width": width, "height": 700})
    page = visit.start()
    expect(page.locator(".picture")).to_have_count(1)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    page.locator(".open").click()
    assert page.evaluate(fits)
    box = page.locator("#viewer").bounding_box()
    assert box is not None
    assert box["width"] <= width
    visit.end()


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = rgb(getComputedStyle(one).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  const weak = [];
  for (const element of document.querySelectorAll("main *, header *")) {
    const isText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!isText || !element.checkVisibility() || element.closest(".sr")) continue;
    const [one, other] = [light(rgb(getComputedStyle(element).color)), light(ground(element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < 4.5) weak.push([element.outerHTML.slice(0, 80), ratio]);
  }
  return weak;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser: Browser, site: Stub, scheme: str) -> None:
    visit = Visit(browser, site.url, color_scheme=scheme)
    visit.allowed.append("422")
    page = visit.start()
    draw(page, "A picture")
    expect(page.locator(".picture.loaded")).to_have_count(1)
    page.get_by_role("spinbutton", name="Guidance scale").fill("99")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("[data-field=guidance_scale] .error")).to_be_visible()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(19, 19, 18)") == (scheme == "dark")
    assert page.evaluate(CONTRAST) == []
    visit.end()


def test_those_who_want_no_motion_get_none(browser: Browser, site: Stub) -> None:
    visit = Visit(browser, site.url, reduced_motion="no-preference")
    page = visit.start()
    site.step_seconds = 5
    draw(page, "Still")
    expect(page.locator(".tile:not(.idle)")).to_have_count(1)
    assert page.evaluate("document.getAnimations().length") > 0
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate("document.getAnimations().length") == 0
    visit.end()


def test_older_pictures_come_when_asked_for(page: Page, site: Stub) -> None:
    for number in range(30):
        prompt = f"Number {number}"
        arguments = {"prompt": prompt, "num_inference_steps": 1, "image_size": "square"}
        site.add("fal-ai/flux/krea", arguments)
    expect(page.get_by_role("button", name="Open picture: Number 29")).to_be_visible()
    page.reload()
    expect(page.locator(".tile")).to_have_count(24)
    page.get_by_role("button", name="Show older pictures").click()
    expect(page.locator(".tile")).to_have_count(30)
    expect(page.get_by_role("button", name="Show older pictures")).not_to_be_visible()


def test_a_job_that_others_overtook_in_the_list_is_still_seen_to_end(
    page: Page, site: Stub
) -> None:
    site.step_seconds = 5
    draw(page, "In front", steps=50)
    draw(page, "Early")
    for number in range(30):
        arguments = {"prompt": f"Number {number}", "num_inference_steps": 1}
        site.add("fal-ai/flux/krea", arguments)
    expect(page.locator("#queue li", has_text="Number 29")).to_be_visible()
    expect(page.locator(".tile", has_text="Early")).to_be_visible()
    job_of(site, "Early")  # on the newest page no more
    page.get_by_role("button", name="Cancel: In front").click()
    site.step_seconds = 0
    expect(page.get_by_role("button", name="Open picture: Early")).to_be_visible()


def test_a_large_seed_keeps_every_digit(page: Page, site: Stub) -> None:
    seed = 2**64 - 1
    page.get_by_label("Seed").fill(str(seed))
    draw(page, "Large seed")
    page.get_by_role("button", name="Open picture").click()
    expect(page.locator("#recipe")).to_contain_text(f"Seed{seed}")
    page.get_by_role("button", name="Again with this seed").click()
    expect(page.get_by_label("Seed")).to_have_value(str(seed))
    assert job_of(site, "Large seed")["arguments"]["seed"] == seed


def test_the_page_names_no_other_site_and_holds_no_inline_code() -> None:
    for file in Path(PAGE).iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        assert ".innerHTML" not in text
        if file.suffix == ".html":
            assert " style=" not in text
            assert " on" + "click" not in text


@pytest.fixture(scope="module")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `krea-local serve` in a process of its own, with the tiny model."""
    pytest.importorskip("krea_local.server.app")
    folder = tmp_path_factory.mktemp("served")
    with serving(tiny_folder, folder) as url:
        yield url


@contextlib.contextmanager
def serving(model: Path, folder: Path, **variables: str) -> Iterator[str]:
    command = [sys.executable, "-m", "krea_local", "serve", "--model", str(model), "--port", "0"]
    command += ["--device", "cpu", "--folder", str(folder)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        url = first.rsplit(" ", 1)[-1].strip()
        assert url.startswith("http://127.0.0.1:"), first
        yield url + "/"  # the model is still being loaded, which the page has to bear
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE / 1000)
    assert process.returncode == 0


def test_the_real_server_shows_progress_and_a_reload_finds_the_job_to_cancel_it(
    browser: Browser, served: str
) -> None:
    visit = Visit(browser, served)
    page = visit.start()
    draw_for_long(page, "A lighthouse")
    expect(page.locator(".tile .facts", has_text="Step ")).to_be_visible()
    expect(page.locator(".preview").first).to_have_attribute("src", re.compile("^data:image/jpeg"))
    page.reload()
    expect(page.locator(".tile .facts", has_text="Step ")).to_be_visible()
    page.get_by_role("button", name="Cancel: A lighthouse").first.click()
    expect(page.locator(".tile")).to_have_count(0)
    visit.end()


def draw_for_long(page: Page, prompt: str) -> None:
    """The tiny model takes a minute or so for this."""
    choose(page, steps=50)
    page.locator("input[name=choice-num_images][value='4']").check()
    page.locator("input[name=size][value=custom]").check()
    page.get_by_role("spinbutton", name="Width").fill("1024")
    page.get_by_role("spinbutton", name="Height").fill("1024")
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Draw").click()


def test_the_real_server_draws_four_pictures_and_deletes_them(
    browser: Browser, served: str
) -> None:
    visit = Visit(browser, served)
    page = visit.start()
    page.locator("input[name=choice-num_images][value='4']").check()
    choose(page, steps=1)
    page.get_by_label("Prompt").fill("A lighthouse")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".picture.loaded")).to_have_count(4)
    page.locator(".open").first.click()
    expect(page.locator("#recipe")).to_contain_text("Size512 × 512")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    with Image.open(download.value.path()) as picture:
        assert picture.size == (512, 512)
    page.locator("#delete").click()
    page.locator("#delete").click()
    expect(page.locator(".tile")).to_have_count(0)
    visit.end()


def test_the_real_server_redraws_an_image_and_tells_faults(browser: Browser, served: str) -> None:
    visit = Visit(browser, served)
    visit.allowed.append("422")
    page = visit.start()
    drop(page, png(192, 128))
    expect(page.locator("#input-size")).to_have_text("192 × 128")
    page.get_by_role("spinbutton", name="Strength").fill("0.3")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".picture.loaded")).to_have_count(1)
    page.locator(".open").click()
    expect(page.locator("#recipe")).to_contain_text("Size192 × 128")
    expect(page.locator("#recipe")).to_contain_text("Strength0.3")
    page.get_by_role("button", name="Again with this seed").click()
    expect(page.locator("#input-size")).to_have_text("192 × 128")  # the server kept it
    page.get_by_role("spinbutton", name="Strength").fill("7")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("[data-field=strength] .error")).to_contain_text("less than or equal to 1")
    drop(page, b"hello", "image/png")
    expect(page.locator("#image-error")).to_be_visible()
    visit.end()


def test_the_real_server_asks_for_its_key(
    browser: Browser, tiny_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("krea_local.server.app")
    key = "0123456789abcdef"
    with serving(tiny_folder, tmp_path, KREA_LOCAL_API_KEY=key) as url:
        visit = Visit(browser, url)
        visit.allowed.append("401")
        page = visit.page
        page.goto(url)
        page.get_by_role("textbox", name="Key").fill("no")
        page.keyboard.press("Enter")
        expect(page.get_by_text("That is not the key.")).to_be_visible()
        page.get_by_role("textbox", name="Key").fill(key)
        page.keyboard.press("Enter")
        draw(page, "With a key")
        expect(page.locator(".picture.loaded")).to_have_count(1)
        visit.end()


ATTACK = """<!doctype html><title>attack</title><iframe name="hole"></iframe><script>
const server = SERVER;
const body = JSON.stringify({
  endpoint: "fal-ai/flux/krea", arguments: { prompt: "attack" }, prompt: "attack",
});
const types = ["text/plain", "application/x-www-form-urlencoded", "application/json", null];
const paths = ["api/jobs", "run/fal-ai/flux/krea", "queue/fal-ai/flux/krea",
  "v1/images/generations"];
const all = paths.flatMap((path) => types.flatMap((type) => ["cors", "no-cors"].map((mode) => {
  const data = type === null ? new Blob([body]) : body;
  const headers = type === null ? {} : { "Content-Type": type };
  const options = { method: "POST", mode, headers, body: data, credentials: "include" };
  return fetch(server + path, options).then((answer) => answer.ok && answer.status, () => 0);
})));
for (const path of paths) {
  navigator.sendBeacon(server + path, body);
  const form = Object.assign(document.createElement("form"), {
    action: server + path, method: "post", enctype: "text/plain", target: "hole",
  });
  const [name, value] = body.split(/:(.*)/s);
  form.append(Object.assign(document.createElement("input"), { name, value }));
  document.body.append(form);
  form.submit();
}
Promise.all(all).then((answers) => {
  document.body.dataset.accepted = answers.filter(Boolean);
});
</script>"""


def test_a_page_on_another_origin_cannot_start_a_job(browser: Browser, served: str) -> None:
    attack = ATTACK.replace("SERVER", json.dumps(served)).encode()
    # A sandboxed frame has the origin "null".
    framed = b"<iframe sandbox='allow-scripts allow-forms' src='/attack'></iframe>"

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(framed if self.path == "/framed" else attack)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    def listed() -> list[str]:
        with urllib.request.urlopen(served + "api/jobs?limit=200") as answer:
            return [job["id"] for job in json.load(answer)["jobs"]]

    before = listed()
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        page = browser.new_page()
        asked: list[Any] = []
        page.on("requestfinished", lambda request: asked.append(request))
        page.on("requestfailed", lambda request: asked.append(request))
        address = f"http://127.0.0.1:{elsewhere.server_address[1]}"
        page.goto(f"{address}/attack")
        expect(page.locator("body")).to_have_attribute("data-accepted", "")
        page.goto(f"{address}/framed")
        frame = page.frame_locator("iframe")
        expect(frame.locator("body")).to_have_attribute("data-accepted", "")
        sent = [one for one in asked if one.url.startswith(served) and one.method == "POST"]
        assert len(sent) > 40  # they did arrive, or were stopped by the browser's own preflight
        page.close()
        elsewhere.shutdown()
    assert listed() == before
