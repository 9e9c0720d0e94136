"""Both notebooks in a real JupyterLab, in a browser without a screen, used as a person uses them.

Nothing waits for a fixed time: every step waits for what a person would see, up to PATIENCE.
"""

import base64
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import reduce
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image

from segkit.labels import rgb_of

TRAIN, ANALYSIS = "train_unet", "segmentation_detection_analysis"
PATIENCE = 240_000  # ms, for what takes seconds on a machine that has nothing else to do
SMALL = {
    "PHANTOM_SUBJECTS": 3, "PHANTOM_DETAIL": 0.35, "EPOCHS": 2, "TARGET_SHAPE": [32, 48], "FEATURES": [8, 16],
    "SLICES_PER_EPOCH": 160, "VALIDATION_SLICES": 16, "LEARNING_RATE": 0.005, "DEVICE": "cpu", "JOBS": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address, with its token, of a JupyterLab as `make lab` starts it, with small notebooks in it."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    for name, settings in ((TRAIN, SMALL), (ANALYSIS, {"DEVICE": "cpu", "JOBS": 1})):
        source = load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb"))
        small = parameterize_notebook(source, {"OUTPUT_DIR": str(folder / "outputs"), **settings})
        nbformat.write(small, folder / "notebooks" / f"{name}.ipynb")
    jupyter = tmp_path_factory.mktemp("jupyter")  # kernels, settings and state that no other Jupyter sees
    no_news = jupyter / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    no_news.mkdir(parents=True)  # else JupyterLab asks whether one wants to read its news
    (no_news / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(jupyter / "config"),
        "JUPYTER_PATH": str(jupyter / "share" / "jupyter"),  # before the kernels of this Python
        "JUPYTER_DATA_DIR": str(jupyter / "data"),
        "JUPYTER_RUNTIME_DIR": str(jupyter / "runtime"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    kernel, serve = commands_of_make_lab(jupyter)
    subprocess.run(kernel, env=environment, check=True, capture_output=True)
    serve += ["--no-browser", "--allow-root", "--ServerApp.port=0", f"--ServerApp.root_dir={folder}"]
    with (jupyter / "log").open("w") as log:
        server = subprocess.Popen(serve, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield address_of(server, jupyter)
    finally:
        server.send_signal(signal.SIGTERM)  # ends its kernels too
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def commands_of_make_lab(prefix: Path) -> list[list[str]]:
    """What `make lab` runs, with the Python of these tests and with the kernel installed below `prefix`."""
    recipe = re.search(r"^lab: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    own = {"$(BIN)": str(Path(sys.executable).parent), "--prefix .venv": f"--prefix {prefix}", "\\\n": ""}
    in_place = reduce(lambda text, item: text.replace(*item), own.items(), recipe)
    return [shlex.split(line) for line in in_place.strip().splitlines()]


def address_of(server: subprocess.Popen, jupyter: Path) -> tuple[str, str]:
    """Where a server that is starting listens, and its token, once it says so."""
    said = jupyter / "runtime" / f"jpserver-{server.pid}.json"
    until = time.monotonic() + PATIENCE / 1000
    while not said.is_file() or not said.read_text().strip().endswith("}"):
        assert server.poll() is None and time.monotonic() < until, (jupyter / "log").read_text()
        time.sleep(0.05)
    content = json.loads(said.read_text())
    return content["url"], content["token"]


@pytest.fixture
def page(lab, browser):
    """A tab in JupyterLab; afterwards nothing must have gone wrong in it, and nothing been asked of other machines."""
    page = browser.new_page(viewport={"width": 1500, "height": 1100})
    page.set_default_timeout(PATIENCE)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url.replace("ws:", "http:", 1)))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert errors == []
    assert [url for url in asked if not url.startswith((lab[0], "blob:", "data:"))] == []


def run_all(page, lab, name: str) -> None:
    """Open a notebook and choose Run, Run All Cells."""
    url, token = lab
    # a workspace of its own: nothing that was open before comes back
    page.goto(f"{url}lab/workspaces/{name}/tree/notebooks/{name}.ipynb?token={token}")
    page.wait_for_selector(".jp-Notebook h1")
    page.get_by_text("Python 3 (segkit) | Idle", exact=True).wait_for()  # in the status bar
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()


def wait_for(page, condition: str, argument=None):
    """Wait until a JavaScript function returns something; an error or a traceback in an output ends it at once."""
    found = page.wait_for_function(
        """([condition, argument]) => {
            const failed = document.querySelector('[data-mime-type="application/vnd.jupyter.error"]');
            if (failed) return {failed: failed.textContent};
            const found = eval(condition)(argument);
            return found ? {found} : false;
        }""",
        arg=[condition, argument],
    ).json_value()
    assert "failed" not in found, found["failed"]
    return found["found"]


def all_cells_ran(page) -> None:
    """Wait until every code cell has a number."""
    wait_for(
        page,
        """() => {
            const cells = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')];
            return cells.length && cells.every(
                cell => /\\[\\d+\\]/.test(cell.querySelector('.jp-InputArea-prompt').textContent));
        }""",
    )


def output_below(page, heading: str):
    """The outputs of the first code cell below a heading that has some."""
    return page.locator(
        f"xpath=//*[contains(@class,'jp-MarkdownCell')][.//h2[contains(.,'{heading}')]]/following-sibling::*"
        "[contains(@class,'jp-CodeCell')][.//*[contains(@class,'jp-OutputArea-output')]]"
    ).first


def test_the_training_notebook_shows_progress_while_it_learns(page, lab):
    run_all(page, lab, TRAIN)
    wait_for(page, "() => document.querySelector('.jp-OutputArea .widget-hprogress .progress-bar')?.offsetWidth")
    # one picture of the curves, drawn anew after each epoch in the same place
    drawn = """() => {
        const cells = [...document.querySelectorAll('.jp-CodeCell')];
        const picture = cells.find(cell => /train_members/.test(cell.textContent))?.querySelector('.jp-OutputArea img');
        if (picture) (window.drawn ??= new Set()).add(picture.src);
        return window.drawn && window.drawn.size >= 2;
    }"""
    wait_for(page, drawn)
    all_cells_ran(page)
    training = output_below(page, "9. Training")
    assert training.locator("img").count() == 2 and "worst structures" in training.inner_text()
    assert "epoch 2/2: loss" in training.inner_text()
    assert output_below(page, "11. Predictions").locator("img").count() == 1


def picture_of(image) -> np.ndarray:
    """What an <img> shows, uint8 (rows, columns, 3)."""
    content = image.evaluate(
        """async image => {
            while (!image.complete || !image.naturalWidth) await new Promise(requestAnimationFrame);
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext('2d').drawImage(image, 0, 0);
            return canvas.toDataURL('image/png').split(',')[1];
        }"""
    )
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def picture_when(page, image, holds) -> np.ndarray:
    """The picture that an <img> shows as soon as something holds of it, however often it is drawn until then."""
    while True:
        source = image.get_attribute("src")
        picture = picture_of(image)
        if holds(picture):
            return picture
        page.wait_for_function("([image, source]) => image.src !== source", arg=[image.element_handle(), source])


def colored(picture: np.ndarray) -> int:
    """Pixels that are not grey."""
    return int((np.ptp(picture.astype(int), axis=2) > 30).sum())


def own_color(picture: np.ndarray, structure: str) -> int:
    """Pixels that have the colour of a structure."""
    return int((np.abs(picture.astype(int) - rgb_of(structure)).max(2) < 3).sum())


def test_the_analysis_notebook_has_a_slice_browser_and_a_3d_view_that_answer(page, lab):
    run_all(page, lab, ANALYSIS)
    all_cells_ran(page)
    box = output_below(page, "15. The slice browser")
    image = box.locator("img.widget-image")
    first = picture_when(page, image, lambda picture: colored(picture) > 200)

    def press(slider, key):
        box.locator(".widget-slider").filter(has_text=slider).locator(".noUi-handle").focus()
        page.keyboard.press(key)

    press("slice", "ArrowRight")
    picture_when(page, image, lambda picture: picture.shape == first.shape and (picture != first).any())
    press("opacity", "Home")
    picture_when(page, image, lambda picture: colored(picture) == 0)
    press("opacity", "End")
    picture_when(page, image, lambda picture: own_color(picture, "liver") > 20)
    box.get_by_role("button", name="coronal").click()
    coronal = picture_when(page, image, lambda picture: picture.shape != first.shape)
    assert colored(coronal) > 2 * own_color(coronal, "liver")
    box.locator("select[multiple]").select_option("liver")
    # no other structure: all colour is the liver's (but for a few pixels below a letter)
    picture_when(page, image, lambda picture: 20 < colored(picture) < 1.03 * own_color(picture, "liver"))
    switch_a_mesh(page, output_below(page, "16. In three dimensions"))


def switch_a_mesh(page, output) -> None:
    """Click on a structure in the legend of the 3D page inside the notebook, and again."""
    output.locator("iframe").evaluate("frame => frame.scrollIntoView({block: 'center'})")
    frame = output.locator("iframe").element_handle().content_frame()
    legend = ".legend .legendtext[data-unformatted=liver]"
    visible = "document.querySelector('.plotly-graph-div')._fullData.find(trace => trace.name === 'liver').visible"
    frame.wait_for_selector(legend, timeout=PATIENCE)
    assert frame.evaluate(visible) is True
    for expected in ("legendonly", True):
        box = frame.wait_for_selector(legend, timeout=PATIENCE).bounding_box()
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        frame.wait_for_function(f"{visible} === {json.dumps(expected)}", timeout=PATIENCE)
