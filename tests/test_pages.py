import numpy as np
import pytest
from test_meshes import ball

from segkit import meshes, pages
from segkit.codes import encode
from segkit.errors import SegkitError
from segkit.formats.nifti import Grid
from segkit.labels import color_of

MARKUP = ("<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>")


def meshes_of(**masks):
    shape = next(iter(masks.values())).shape
    return meshes.make_meshes(encode(masks.items(), shape), Grid(shape, np.eye(4)))


@pytest.fixture(scope="module")
def figure():
    shape = (30, 30, 30)
    liver = ball(shape, (15, 15, 8), 6)
    truth = meshes_of(liver=liver, spleen=ball(shape, (15, 15, 22), 4), aorta=ball(shape, (5, 15, 15), 3))
    prediction = meshes_of(liver=np.roll(liver, 3, axis=0), stomach=ball(shape, (24, 24, 24), 3))
    return pages.mesh_figure("s0000", {"ground truth": truth, "prediction": prediction})


def trace_of(figure, name, legend):
    [found] = [trace for trace in figure.data if trace.name == name and trace.legend == legend]
    return found


def test_traces_carry_colour_group_and_layer(figure):
    liver = trace_of(figure, "liver", "legend")
    assert liver.color == color_of("liver") and liver.legendgroup == "ground truth: organs"
    assert [trace.visible for trace in figure.data[:5]] == [True, True, True, "legendonly", "legendonly"]
    assert trace_of(figure, "liver", "legend2").visible == "legendonly" and figure.layout.scene.aspectmode == "data"
    assert liver.x.dtype == np.float32 and liver.i.dtype.itemsize <= 2


def test_a_shifted_prediction_carries_its_distance_in_mm(figure):
    liver = trace_of(figure, "liver", "legend2")
    # two balls of the same radius, 3 mm apart: 3 mm at both poles, next to nothing where they cross
    assert liver.intensity.max() == pytest.approx(3, abs=0.3) and liver.intensity.min() < 0.3
    # the prediction lies higher by 3 mm: the pole at the top is at z = 15 + 6 + 3
    assert liver.intensity[np.argmax(liver.z)] == pytest.approx(3, abs=0.3)
    assert liver.cmin == 0 and liver.cmax == 3 and trace_of(figure, "liver", "legend").intensity is None


def test_a_false_alarm_is_named_and_has_no_distance(figure):
    alarm = trace_of(figure, "stomach (not in ground truth)", "legend2")
    assert alarm.intensity is None and alarm.color == color_of("stomach")


def test_letters_say_which_side_is_where(figure):
    """In RAS coordinates x grows to the patient's right, y to the front and z to the head."""
    marks = figure.layout.scene.annotations
    there = {mark.text.removeprefix("<b>").removesuffix("</b>"): np.array([mark.x, mark.y, mark.z]) for mark in marks}
    for letters, axis in (("LR", 0), ("PA", 1), ("FH", 2)):
        low, high = (there[letter] for letter in letters)
        ends = [[trace[name] for trace in figure.data if trace.type == "mesh3d"] for name in "xyz"][axis]
        assert low[axis] == pytest.approx(min(map(min, ends))) and high[axis] == pytest.approx(max(map(max, ends)))
        assert np.delete(low, axis).tolist() == np.delete(high, axis).tolist()
    assert len(there) == 6 and "left" not in str(figure.layout.scene.xaxis.title.text)


def test_layers_without_anything_in_common_or_alone_have_no_buttons():
    there = meshes_of(liver=ball((20, 20, 20), (10, 10, 10), 5))
    assert not pages.mesh_figure("s0", {"prediction": there}).layout.updatemenus
    assert not pages.mesh_figure("s0", {"ground truth": {}, "prediction": there}).layout.updatemenus
    assert not pages.mesh_figure("s0", {"ground truth": {}, "prediction": {}}).data


@pytest.mark.parametrize("name", MARKUP)
def test_names_with_markup_are_refused(name):
    mesh = meshes_of(liver=ball((20, 20, 20), (10, 10, 10), 5))["liver"]
    with pytest.raises(SegkitError, match="cannot be used as a name"):
        pages.mesh_figure(name, {"ground truth": {"liver": mesh}})
    with pytest.raises(SegkitError, match="cannot be used as a name"):
        pages.mesh_figure("s0000", {"ground truth": {name: mesh}})


def open_page(tab, path):
    tab.goto(path.as_uri())
    tab.wait_for_selector(".legendtoggle")
    tab.wait_for_timeout(1200)


def click(tab, text, double=False):
    box = tab.get_by_text(text, exact=True).first.bounding_box()
    (tab.mouse.dblclick if double else tab.mouse.click)(box["x"] + 8, box["y"] + 5)
    tab.wait_for_timeout(900)


DATA = "document.querySelector('.plotly-graph-div')._fullData.filter(t => t.type === 'mesh3d')"


def shown(tab):
    return tab.evaluate(f"{DATA}.filter(t => t.visible === true).map(t => t.name)")


def colors_shown(tab):
    """Of each mesh of the prediction: its name, and its colour or the ends of its scale where it has distances."""
    color = "t.intensity ? t.colorscale[0][1] + ' ' + t.colorscale.at(-1)[1] : t.color"
    return tab.evaluate(f"{DATA}.filter(t => t.legend === 'legend2').map(t => [t.name, {color}])")


def test_legends_and_buttons_in_a_browser_without_a_network(figure, tab, tmp_path):
    open_page(tab, pages.write_page(tmp_path / "3d.html", figure))
    assert tab.title() == "s0000, from the front" and tab.evaluate("document.documentElement.lang") == "en"
    places = {letter: tab.get_by_text(letter, exact=True).bounding_box() for letter in "RLHF"}
    assert places["R"]["x"] < places["H"]["x"] < places["L"]["x"] and places["H"]["y"] < places["F"]["y"]
    assert shown(tab) == ["spleen", "liver", "aorta"]
    click(tab, "spleen")
    assert shown(tab) == ["liver", "aorta"]
    click(tab, "spleen")
    click(tab, "spleen", double=True)
    assert shown(tab) == ["aorta"]
    click(tab, "prediction")
    assert shown(tab) == ["aorta", "liver", "stomach (not in ground truth)"]
    liver, stomach = color_of("liver"), color_of("stomach")
    plain = [["liver", f"{liver} {liver}"], ["stomach (not in ground truth)", stomach]]
    assert colors_shown(tab) == plain and not tab.query_selector(".colorbar")
    click(tab, "distance to ground truth")
    assert shown(tab) == ["liver", "stomach (not in ground truth)"]
    assert colors_shown(tab) == [
        ["liver", "#440154 #fde725"],  # the ends of Viridis
        ["stomach (not in ground truth)", pages.FALSE_ALARM_COLOR],
    ]
    assert tab.locator(".cbaxis text").all_text_contents()[-1] == "3 mm"
    click(tab, "structures")
    assert colors_shown(tab) == plain and not tab.query_selector(".colorbar")


def test_a_layer_named_like_markup_comes_out_as_text(tab, tmp_path):
    there = meshes_of(liver=ball((20, 20, 20), (10, 10, 10), 5))
    figure = pages.mesh_figure("s0000", dict.fromkeys(MARKUP, there))
    open_page(tab, pages.write_page(tmp_path / "3d.html", figure))
    assert tab.locator("img").count() == 0 and tab.get_by_text(MARKUP[0], exact=True).count() >= 1
    assert tab.get_by_text(MARKUP[1], exact=True).count() == 1
