import numpy as np
import pytest
from conftest import CHROMIUM

from segkit import meshes
from segkit.codes import encode
from segkit.formats.nifti import Grid
from segkit.labels import color_of


def signed_volume(mesh) -> float:
    """Volume inside a closed surface, mm3 (divergence theorem); positive where the faces look outwards."""
    a, b, c = (mesh.vertices[mesh.faces[:, corner]].astype(float) for corner in range(3))
    return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)


def ball(shape, centre, radius_mm, spacing):
    z, y, x = np.indices(shape)
    return sum(((axis - c) * s) ** 2 for axis, c, s in zip((z, y, x), centre, spacing, strict=True)) <= radius_mm**2


@pytest.mark.parametrize("kept", [1.0, 0.15])
def test_a_ball_has_its_volume_and_its_place_in_mm(kept):
    spacing = (2.0, 1.0, 1.5)  # z, y, x
    mask = ball((40, 60, 50), (20, 25, 30), 15, spacing)
    affine = np.diag([1.5, 1.0, 2.0, 1.0])
    affine[:3, 3] = (-100, 50, 7)
    mesh = meshes.make_mesh(mask, affine, kept)
    assert signed_volume(mesh) == pytest.approx(4 / 3 * np.pi * 15**3, rel=0.06)
    middle = (mesh.vertices.min(0) + mesh.vertices.max(0)) / 2
    assert np.allclose(middle, (-100 + 30 * 1.5, 50 + 25, 7 + 20 * 2), atol=0.5)
    assert np.allclose(np.ptp(mesh.vertices, axis=0), 30, atol=2)
    edges = np.sort(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()  # closed: every edge has two faces


def test_a_left_handed_grid_does_not_turn_the_surface_inside_out():
    mask = ball((20, 20, 20), (10, 10, 10), 6, (1, 1, 1))
    assert signed_volume(meshes.make_mesh(mask, np.diag([-1.0, 1, 1, 1]))) > 0


def test_a_single_voxel_and_a_thin_sheet_at_the_border_still_have_a_surface():
    mask = np.zeros((6, 6, 6), bool)
    assert meshes.make_mesh(mask, np.eye(4)) is None
    mask[0, 0, 0] = True
    assert signed_volume(meshes.make_mesh(mask, np.eye(4))) > 0
    mask[5] = True
    assert np.isclose(meshes.make_mesh(mask, np.eye(4)).vertices[:, 2].max(), 5, atol=0.7)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    shape = (30, 30, 30)
    masks = {
        "liver": ball(shape, (15, 15, 8), 6, (1, 1, 1)),
        "spleen": ball(shape, (15, 15, 22), 4, (1, 1, 1)),
        "aorta": ball(shape, (5, 15, 15), 3, (1, 1, 1)),
        "prostate": np.zeros(shape, bool),
    }
    volume = encode(masks.items(), shape)
    there = meshes.make_meshes(volume, Grid(shape, np.eye(4)))
    assert list(there) == ["liver", "spleen", "aorta"]
    figure = meshes.mesh_figure("s0000", {"ground truth": there, "prediction": {"liver": there["liver"]}})
    return meshes.write_page(tmp_path_factory.mktemp("page") / "3d.html", figure), figure


def test_traces_carry_colour_group_and_layer(page):
    _, figure = page
    liver = next(trace for trace in figure.data if trace.name == "liver")
    assert liver.color == color_of("liver") and liver.legendgroup == "ground truth: organs"
    assert [trace.visible for trace in figure.data] == [True, True, True, "legendonly"]
    assert figure.data[-1].legend == "legend2" and figure.layout.scene.aspectmode == "data"


def test_the_page_in_a_browser_without_a_network(page):
    if CHROMIUM is None:
        pytest.skip("no chromium: the page was not opened in a browser")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",
             "--disable-background-networking"]  # fmt: skip
    path, _ = page
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        tab = browser.new_page(viewport={"width": 1200, "height": 800})
        requests, errors = [], []
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(path.as_uri())
        tab.wait_for_selector(".legendtoggle")
        tab.wait_for_timeout(1500)

        def shown():
            data = "document.querySelector('.plotly-graph-div').data"
            return tab.evaluate(f"{data}.filter(t => t.visible === true || t.visible === undefined).map(t => t.name)")

        def click(text, double=False):
            box = tab.get_by_text(text, exact=True).first.bounding_box()
            (tab.mouse.dblclick if double else tab.mouse.click)(box["x"] + 8, box["y"] + 5)
            tab.wait_for_timeout(1200)

        assert shown() == ["spleen", "liver", "aorta"]
        click("spleen")
        assert shown() == ["liver", "aorta"]
        click("spleen")
        click("spleen", double=True)
        assert shown() == ["aorta"]
        click("prediction")
        assert shown() == ["aorta", "liver"]
        assert errors == [] and all(url.startswith(("file:", "blob:", "data:")) for url in requests)
        browser.close()
