"""`make docs`: the pictures in docs/images/ and both notebooks with their outputs as Markdown, from a run of the demo.

Takes what `make demo` left in outputs/; where that is missing, or of older notebooks, the demo runs first. Nothing of
the machine that it ran on stays in the pages.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ("train_unet", "segmentation_detection_analysis")
FIGURES = {
    "training_history": "training_history.png",
    "sample_predictions": "sample_predictions.png",
    "structure_ranking": "structure_ranking_*.png",
    "best_median_worst": "best_median_worst_*.png",
    "segmentation_visualization": "segmentation_visualization_*.png",
}
"""Pictures for README and pages: name in docs/images/, and the files of a run of which the newest is taken."""
WIDTH = 1400  # pixels, of a picture at most
ROWS = 12  # of a table at most
CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
WEBGL = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]


def make_docs(outputs: Path, docs: Path) -> list[Path]:
    """Write pages and pictures from a run's folder; pictures of an older run's notebooks go. Returns what it wrote."""
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    made = [shrink(newest(outputs, pattern).read_bytes(), images / f"{name}.png") for name, pattern in FIGURES.items()]
    made.append(shrink(view_of_page(newest(outputs, "3d_*.html")), images / "3d.png"))
    for name in NOTEBOOKS:
        executed = nbformat.read(outputs / "notebooks" / f"{name}.ipynb", 4)
        pictures = Pictures(name, executed, images)
        page = without_places(render(name, executed, pictures), outputs)
        (docs / f"{name}.md").write_text(page, encoding="utf-8")
        for older in set(images.glob(f"{name}_*.png")) - set(pictures.made):
            older.unlink()
        made += [*pictures.made, docs / f"{name}.md"]
    return made


def is_run_of(outputs: Path, notebooks: Path) -> bool:
    """Whether `outputs` holds both notebooks of `notebooks` as they are now, executed."""
    for name in NOTEBOOKS:
        executed = outputs / "notebooks" / f"{name}.ipynb"
        if not executed.is_file() or sources(executed) != sources(notebooks / f"{name}.ipynb"):
            return False
    return True


def sources(path: Path) -> list[str]:
    """The text of all cells, but for the one that papermill adds."""
    cells = nbformat.read(path, 4).cells
    return [cell.source for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def newest(folder: Path, pattern: str) -> Path:
    """The file of a pattern that was written last; stops with a sentence where there is none."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        sys.exit(f"{folder}: no {pattern}; run `make demo`")
    return found[-1]


def shrink(png: bytes, path: Path) -> Path:
    """Write a picture at most WIDTH wide, in 256 colours: a third of the bytes. They are spread over all that it has,
    not given to the many greys of a CT: a rare colour, an organ's or an error's, stays what it is.
    """
    image = Image.open(io.BytesIO(png)).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1).save(path, optimize=True)
    return path


def view_of_page(page: Path) -> bytes:
    """What the 3D page shows when it is opened, as PNG."""
    chromium = next((path for path in CHROMIUM if Path(path).exists()), None)
    if chromium is None:
        sys.exit(f"{page}: to take its picture chromium is needed, as one of {', '.join(CHROMIUM)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=WEBGL)
        tab = browser.new_page()
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector(".legendtoggle", state="attached")
        url = tab.evaluate("Plotly.toImage(document.querySelector('.plotly-graph-div'), {width: 1200, height: 800})")
        browser.close()
    return base64.b64decode(url.partition(",")[2])


class Pictures:
    """The pictures of one executed notebook, written beside each other as `<notebook>_<section>_<number>.png`."""

    def __init__(self, name: str, notebook: NotebookNode, folder: Path):
        self.name, self.folder, self.made = name, folder, []
        state = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
        self.widgets: Mapping = state.get("state", {})

    def add(self, png: bytes, section: str, alt: str) -> str:
        """Write a picture; returns the Markdown that shows it."""
        path = self.folder / f"{self.name}_{section}_{len(self.made) + 1}.png"
        self.made.append(shrink(png, path))
        return f"![{alt}](images/{path.name})"

    def of_widget(self, model: str) -> bytes | None:
        """What an image somewhere inside of a widget shows; None where there is none, as in a progress bar."""
        widget = self.widgets.get(model, {})
        for buffer in widget.get("buffers", ()) if widget.get("model_name") == "ImageModel" else ():
            return base64.b64decode(buffer["data"])
        inside = (child.removeprefix("IPY_MODEL_") for child in widget.get("state", {}).get("children", ()))
        return next((png for png in map(self.of_widget, inside) if png), None)


def render(name: str, notebook: NotebookNode, pictures: Pictures) -> str:
    """The notebook as Markdown: pictures as files, tables cut after ROWS rows, no progress bars."""
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            heading = cell.source.splitlines()[0].removeprefix("## ")
        if cell.cell_type == "code":
            section = heading.partition(".")[0].zfill(2)
            cell.outputs = [kept for each in cell.outputs if (kept := still(each, section, heading, pictures))]
    page, _ = MarkdownExporter().from_notebook_node(notebook)
    where = f"[notebooks/{name}.ipynb](../notebooks/{name}.ipynb)"
    title, rest = page.lstrip().split("\n", 1)
    lead = f"*{where} as `make demo` ran it, on synthetic scans; long tables are cut. Made by `make docs`.*"
    return f"{title}\n\n{lead}\n{rest}"


def still(output: NotebookNode, section: str, heading: str, pictures: Pictures) -> NotebookNode | None:
    """An output as a page can show it without a kernel; None for what says nothing there."""
    if output.output_type == "error":
        sys.exit(f"{pictures.name}, section {section}: {output.ename}: {output.evalue}; run `make demo` again")
    if output.output_type == "stream":
        output.text = output.text.rstrip("\n") + "\n"
        return output if output.name == "stdout" and output.text.strip() else None
    data = output.data
    widget = data.get("application/vnd.jupyter.widget-view+json")
    png = pictures.of_widget(widget["model_id"]) if widget else None
    if widget and png is None:
        return None
    if png or "image/png" in data:
        text = pictures.add(png or base64.b64decode(data["image/png"]), section, heading)
    elif "<iframe" in data.get("text/html", ""):
        text = f"![{heading}](images/3d.png)" if "/3d_" in data["text/html"] else ""
    elif "text/html" in data:
        text = plain_table(data["text/html"])
    else:
        return output
    return nbformat.v4.new_output("display_data", {"text/markdown": text})


def plain_table(markup: str) -> str:
    """A table of pandas with nothing but its cells, cut after ROWS rows: what code hosts show of it."""
    table = BeautifulSoup(markup, "html.parser").find("table")
    for tag in [table, *table.find_all(True)]:
        tag.attrs = {name: value for name, value in tag.attrs.items() if name in ("rowspan", "colspan")}
    rows = table.find("tbody").find_all("tr")
    for row in rows[ROWS:]:
        row.decompose()
    text = re.sub(r"\s*\n\s*", "\n", str(table))  # a blank line would end it
    return text + (f"\n\n… and {len(rows) - ROWS} more rows" if len(rows) > ROWS else "")


def without_places(page: str, outputs: Path) -> str:
    """The page without the folders of this machine: paths start at the project's root."""
    page = page.replace(str(outputs.resolve()), "outputs").replace(f"{ROOT}/", "")
    return page.replace(str(Path.home()), "~") if Path.home() != Path("/") else page


def main() -> None:
    """Run the demo if need be, then write pages and pictures and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="where the demo left its files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where pages and pictures go")
    chosen = parser.parse_args()
    if not is_run_of(chosen.outputs, ROOT / "notebooks"):
        print(f"{chosen.outputs}: no run of the demo with these notebooks: it runs first", flush=True)
        command = [sys.executable, "-m", "segkit", "demo", "--output-dir", str(chosen.outputs.resolve())]
        subprocess.run(command, cwd=ROOT, check=True)
    for path in (made := make_docs(chosen.outputs, chosen.docs)):
        print(f"{path.stat().st_size / 1024:7.0f} KiB  {path}")
    print(f"{sum(path.stat().st_size for path in made) / 2**20:7.1f} MiB in all")


if __name__ == "__main__":
    main()
