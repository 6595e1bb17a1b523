"""The page in a browser, clicked through, its numbers against the same computed here."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

from dmoe_var import DynamicVAR
from dmoe_var.figures.style import COLOURS
from dmoe_var.report import microscope, page
from dmoe_var.report.microscope import runs_at
from dmoe_var.report.pictures import grid_uri, png_uri
from dmoe_var.sampling.sampler import SamplingConfig

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
SCALES = (2, 3)
CHOSEN = (0.3, 0.6)
LESS = "\u221220.0\u00a0%"
HOSTILE = "</script><img src=x onerror=alert(1)>"
COSTS = {"fixed_gmac": 0.25, "pair_gmac": {"2": 1e-4, "3": 2e-4}, "dense_gmac": 0.5, "branches": 2}


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(BROWSERS)})")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=path, args=list(FLAGS))
        yield found
        found.close()


def noise(side, seed):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def recordings(make_vqvae, make_var, make_moe):
    """Two pictures of a tiny model of random weights, 8 experts a layer."""
    model = DynamicVAR(make_var(), make_moe(make_var(seed=1, activation="relu")), SCALES)
    vqvae, sampling = make_vqvae(), SamplingConfig(top_k=20)
    return [microscope.record(model, vqvae, i, 0, i, sampling, "grouped") for i in (0, 1)]


def a_row(number, gmac, fid, **changes):
    return {
        "id": f"point-{number}", "dense": False, "chosen": False, "label": "x",
        "tau": f"0.{number}", "fid": fid, "fid_std": 0.5, "seeds": 3, "gmac": gmac,
        "at": ["evaluate/x"],
        "scales": [{"gmac": gmac / 2, "share": None}, {"gmac": gmac / 2, "share": 0.4}],
        "parts": [gmac, None], "agreement": None, "grid_columns": 2,
        "grid": grid_uri(np.stack([noise(8, number)] * 2), 2, 8), "grid_note": f"note {number}",
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(recordings):
    """What the stage would hand over."""
    drawn = [
        {"tau": tau, "gmac": 0.4 - tau / 10, "shares": [1 - tau, 1 - tau], "difference": 10 * tau,
         "image": png_uri(noise(8, int(10 * tau)), 8)}
        for tau in (0.0, 0.2, 0.6)
    ]  # fmt: skip
    pictures = [
        {"label": i, "seed": 0, "index": i, "name": HOSTILE if i else "zero", "drawn": drawn,
         "dense": png_uri(noise(8, 99), 8), **page.packed(recording, 8)}
        for i, recording in enumerate(recordings)
    ]  # fmt: skip
    curves = [
        ("dense VAR", None, "*", [a_row(0, 0.5, 10.0, dense=True, tau="")]),
        ("one tau", COLOURS["last"], "o", [a_row(i, 0.5 - i / 20, 10.0 + i) for i in (1, 2, 3)]),
        (HOSTILE, COLOURS["chosen"], "x", [a_row(4, 0.3, 10.2, chosen=True)]),
    ]
    return {
        "about": {
            "name": HOSTILE, "made": "2026-01-01T00:00:00+00:00", "commit": "0" * 40,
            "patch_nums": [1, 2, 3, 4], "moe_scales": list(SCALES), "num_experts": 8,
            "expert_size": 32, "depth": 2, "width": 64, "cfg": 1.5, "image_size": 8,
        },
        "quality": {
            "curves": [
                {"name": name, "colour": colour, "marker": marker, "line": len(rows) > 1,
                 "rows": rows}
                for name, colour, marker, rows in curves
            ],
            "fid_name": "FID", "num_samples": 20, "parts": ["ffn", "experts"],
        },
        "stages": [
            {"name": "sweep", "state": "present", "note": "", "records": [
                {"variant": HOSTILE, "started": "", "ended": "2026", "device": "cpu",
                 "dtype": "float32", "seed": 0, "num_samples": 2, "git_commit": "0" * 40,
                 "metrics": {"fid": 1.5}}]},
            {"name": "calibrate", "state": "missing", "note": "not yet", "records": []},
        ],
        "microscope": {**COSTS, "chosen": list(CHOSEN), "tau": [0.0, 0.2, 0.6],
                       "pictures": pictures, "left_out": 3, "picture_mb": 1.0, "max_mb": 20.0},
    }  # fmt: skip


@pytest.fixture
def open_page(browser, tmp_path):
    """open_page(data) -> the page in the browser; the test fails where it asks the network for
    anything, or says that something went wrong."""
    troubles, asked, contexts = [], [], []

    def open_page(data, **options):
        file = tmp_path / "report.html"
        file.write_text(page.build(f"Report {HOSTILE}", data), encoding="utf-8")
        context = browser.new_context(**options)
        contexts.append(context)
        opened = context.new_page()
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("pageerror", lambda error: troubles.append(str(error)))
        opened.on("console", lambda message: troubles.append(message.text))
        opened.on("dialog", lambda dialog: troubles.append(dialog.message))
        opened.goto(file.as_uri())
        opened.wait_for_function("document.fonts.status === 'loaded'")
        return opened

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)


def value(opened, name):
    return float(opened.locator(f"#read-{name}").get_attribute("data-value"))


def expected(recording, taus, si, layer, branch):
    """Experts a token, error, share and GMAC as the page should tell them."""
    masks = {each: runs_at(recording.ratios[each], taus[each]) for each in SCALES}
    counts = masks[si].sum(-1)
    errors = np.take_along_axis(recording.errors[si], counts[..., None] - 1, -1)[..., 0]
    layers = slice(None) if layer is None else layer
    pairs = sum(masks[each].sum() * COSTS["pair_gmac"][str(each)] for each in SCALES)
    return {
        "experts": counts[layers, branch].mean(),
        "error": errors[layers, branch].mean(),
        "share": masks[si].mean(),
        "gmac": COSTS["fixed_gmac"] + pairs,
    }


def test_microscope_tells_pythons_numbers(open_page, data, recordings):
    """Picture, scale, layer, branch and tau, chosen one after the other."""
    opened = open_page(data)
    taus = dict(zip(SCALES, CHOSEN, strict=True))
    state = {"picture": 0, "si": 3, "layer": None, "branch": 0}

    def check():
        where = {key: state[key] for key in ("si", "layer", "branch")}
        wanted = expected(recordings[state["picture"]], taus, **where)
        step = data["microscope"]["pictures"][state["picture"]]["error_step"]
        for name, number in wanted.items():
            exact = {"abs": step} if name == "error" else {"rel": 1e-12}
            assert value(opened, name) == pytest.approx(number, **exact), (name, state)

    check()
    opened.get_by_text("unconditional", exact=True).click()
    state["branch"] = 1
    check()
    opened.locator("input[name=picture][value='1']").check(force=True)
    state["picture"] = 1
    check()
    opened.locator("#layer").select_option(index=2)
    state["layer"] = 1
    check()
    opened.locator("input[name=scale][value='2']").check(force=True)
    state["si"] = 2
    check()
    opened.locator("#tau").fill("0.705")
    taus[2] = 0.705  # the other scale keeps its own
    check()
    opened.locator("#together").check()
    taus[3] = 0.705
    check()
    for tau in (0.0, 0.35, 1.0):
        opened.locator("#tau").fill(str(tau))
        taus = dict.fromkeys(SCALES, tau)
        check()
    opened.get_by_role("button", name="scale 4, layer 1:").click()
    state.update(si=3, layer=0)
    check()
    opened.locator("#chosen-tau").click()
    taus = dict(zip(SCALES, CHOSEN, strict=True))
    check()


def test_a_token_is_found_by_keys_and_by_pointer(open_page, data, recordings):
    opened = open_page(data)
    opened.locator("#layer").select_option(index=1)
    opened.locator("#experts-map").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp"):
        opened.keyboard.press(key)
    recording = recordings[0]

    def check(row, column):
        ratios_E = recording.ratios[3][0, 0, 4 * row + column]
        errors_E = recording.errors[3][0, 0, 4 * row + column]
        count = runs_at(ratios_E, CHOSEN[1]).sum()
        text = opened.locator("#token-about").inner_text()
        assert f"Row {row + 1}, column {column + 1}, layer 1: {count} of 8 experts run" in text
        error = re.search(r"error ([\d.]+)", text)[1]
        assert float(error) == pytest.approx(100 * errors_E[count - 1], abs=0.06)
        assert opened.locator("#token rect.runs").count() == count

    check(0, 2)
    box = opened.locator("#error-map").bounding_box()
    opened.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.6 * box["height"])
    check(2, 3)


def test_maps_are_painted_in_the_colours_of_the_ramp(open_page, data, recordings):
    """The token that runs most experts is the ramp's brightest, the one with fewest its darkest."""
    opened = open_page(data)
    opened.locator("#layer").select_option(index=1)
    opened.locator("#opacity").fill("1")
    counts_l = runs_at(recordings[0].ratios[3], CHOSEN[1]).sum(-1)[0, 0]
    assert counts_l.min() < counts_l.max()
    read = """() => { const canvas = document.getElementById('experts-map');
        const shown = canvas.getContext('2d').getImageData(0, 0, 512, 512).data;
        const at = i => 4 * (512 * (12 + 128 * Math.floor(i / 4)) + 12 + 128 * (i % 4));
        return Array.from({length: 16}, (_, i) => [...shown.slice(at(i), at(i) + 3)]) }"""
    corners = opened.evaluate(read)  # of each cell, beside its number
    assert corners[counts_l.argmax()] == [0xFE, 0xE8, 0x38]
    assert corners[counts_l.argmin()] == [0x00, 0x22, 0x4E]


def test_the_curve_tells_and_leads_to_images(open_page, data):
    opened = open_page(data)
    tip = opened.locator("#curve .tip")
    assert not tip.is_visible()
    opened.locator("#point-2 .halo").hover()
    for part in ("one tau", "tau 0.2", "0.4000 GMAC", LESS, "FID 12.00 ± 0.50", "3 seeds"):
        assert part in tip.inner_text()
    assert "note 4" in opened.locator("#grid-chosen-caption").inner_text()  # the operating point
    opened.locator("#point-2").click()
    assert opened.url.endswith("#images")
    rows = data["quality"]["curves"][1]["rows"]
    assert opened.locator("#grid-chosen").get_attribute("src") == rows[1]["grid"]
    dense = data["quality"]["curves"][0]["rows"][0]
    assert opened.locator("#grid-dense").get_attribute("src") == dense["grid"]
    cells = opened.locator("#by-scale tbody tr").nth(1).locator("th, td").all_inner_texts()
    assert cells == ["2", "2 \u00d7 2", "0.2500", "0.2000", LESS, "40.0\u00a0%"]
    opened.locator("#point-3").focus()
    assert "tau 0.3" in tip.inner_text()
    opened.keyboard.press("Enter")
    assert opened.locator("#grid-chosen").get_attribute("src") == rows[2]["grid"]
    opened.locator("#quality summary").click()
    assert opened.locator("#points tbody tr").count() == 5


def test_drawn_pictures_are_compared(open_page, data):
    opened = open_page(data)
    opened.locator("#strip button").nth(2).click()
    assert opened.locator("#tau-shown").inner_text() == "0.6"
    assert "Mean difference 6.00 of 255" in opened.locator("#difference").inner_text()
    wanted = 4 * np.abs(noise(8, 99).astype(int) - noise(8, 6)).clip(0, 63.75)
    read = """() => { const canvas = document.getElementById('difference-map');
        return [...canvas.getContext('2d').getImageData(0, 0, 8, 8).data] }"""
    opened.wait_for_function("document.getElementById('difference-map').width === 8")
    shown = np.array(opened.evaluate(read)).reshape(8, 8, 4)[..., :3]
    assert (shown == wanted.round()).all()


def test_text_stays_text_and_gaps_are_told(open_page, data):
    """Names that look like markup; a stage without a record; pictures that did not fit."""
    opened = open_page(data)
    assert opened.title() == f"Report {HOSTILE}"
    assert opened.locator("h1").inner_text() == f"DMoE-VAR {HOSTILE}"
    assert opened.locator("img[onerror]").count() == 0
    assert "calibrate" in opened.locator("#missing").inner_text()
    assert "3 more would not fit" in opened.locator("#microscope-about").inner_text()
    opened.locator("#stage-sweep summary").click()
    assert "1.5000" in opened.locator("#stage-sweep table").inner_text()


def test_a_page_without_points_or_pictures(open_page, data):
    bare = {
        **data,
        "quality": {**data["quality"], "curves": []},
        "microscope": {**data["microscope"], "pictures": []},
    }
    opened = open_page(bare)
    assert "no evaluation" in opened.locator("#quality-about").inner_text()
    assert not opened.locator("#images").is_visible()
    assert opened.locator("#microscope canvas").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_scrolls_one_way(open_page, data, scheme):
    opened = open_page(data, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    assert opened.evaluate(f"({widths})[0] <= ({widths})[1]")
    ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(251, 250, 248)" if scheme == "light" else "rgb(21, 23, 27)")
