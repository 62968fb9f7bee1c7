"""A profile's picture and table show what the profile says, and odd profiles still give them."""

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from hw_models.energy import Energy
from hw_models.profile import Profile
from nas.errors import ConfigError, RunError
from nas.report import profile_picture
from nas.report.profile_picture import MAX_ROWS, draw_profile, save_profile
from nas.report.profile_tables import crossover_text, gain_text, profile_lines, profile_record, profile_sheet
from nas.report.sheet import to_text
from nas.report.style import KERNEL_COLOURS
from tests.nas.profiles import LAYERS, make_profile

SVG = "{http://www.w3.org/2000/svg}"


def boxes(profile: Profile, height: float) -> list[dict[str, str]]:
    """The boxes of that height in the drawing, in order."""
    root = ET.fromstring(draw_profile(profile, "a network").svg("a network"))
    return [dict(e.attrib) for e in root.iter(f"{SVG}rect") if e.get("height") == f"{height:g}"]


def texts(profile: Profile) -> list[str]:
    root = ET.fromstring(draw_profile(profile, "a network").svg("a network"))
    return [e.text or "" for e in root.iter(f"{SVG}text")]


def test_bars_are_as_long_as_times_and_coloured_by_kernel() -> None:
    bars = [b for b in boxes(make_profile(), 10) if float(b["x"]) == profile_picture._BARS and "rx" not in b][2:]
    lengths = [float(b["width"]) for b in bars]
    assert lengths[0] / lengths[1] == pytest.approx(0.20 / 0.10, rel=1e-4)
    assert [b["fill"] for b in bars[:4]] == [KERNEL_COLOURS[kernel] for _, _, kernel, *_ in LAYERS]


def test_the_dashed_box_is_the_other_kind_of_kernel_on_the_same_scale() -> None:
    other = [b for b in boxes(make_profile(), 16) if "stroke-dasharray" in b]
    bars = [b for b in boxes(make_profile(), 10) if float(b["x"]) == profile_picture._BARS and "rx" not in b][2:]
    scale = float(bars[0]["width"]) / 0.20
    expected = [0.45, 0.60, 0.40, 0.60]  # sparse for the layer on torch, dense for the others
    assert [float(b["width"]) / scale for b in other] == pytest.approx(expected, rel=1e-4)
    colours = [KERNEL_COLOURS["specialised"], *[KERNEL_COLOURS["torch"]] * 3]
    assert [b["stroke"] for b in other] == colours


def test_where_the_time_goes_adds_up_to_the_whole_width() -> None:
    for profile in (make_profile(), make_profile(more=60)):
        parts = boxes(profile, 22)
        width = profile_picture._STRIP_END - profile_picture._BARS
        assert sum(float(b["width"]) + (float(b["width"]) > 2) for b in parts) == pytest.approx(width, abs=2)


def test_a_strip_is_logarithmic_from_a_hundredth_to_one() -> None:
    left, right = profile_picture._STRIP, profile_picture._STRIP_END
    places = [profile_picture._place(density) for density in (0.001, 0.01, 0.1, 1.0)]
    assert places == pytest.approx([left, left, (left + right) / 2, right])


def test_what_would_take_much_longer_is_cut_off_and_its_time_written() -> None:
    profile = make_profile(predicted=False)
    profile.table["dense_ms"] *= 100
    other = [b for b in boxes(profile, 16) if "stroke-dasharray" in b]
    width = profile_picture._BARS_END - profile_picture._BARS
    assert float(other[1]["width"]) == width
    bars = [b for b in boxes(profile, 10) if float(b["x"]) == profile_picture._BARS and "rx" not in b][2:]
    assert float(bars[2]["width"]) == pytest.approx(width / profile_picture.CLIP)  # the longest, 0.5 ms
    assert "60.0000 ›" in texts(profile)


def test_the_time_outside_of_all_operations_is_shown() -> None:
    profile = make_profile()
    assert "call" not in texts(profile)
    assert profile.measured is not None
    longer = replace(profile, measured=replace(profile.measured, floor_ms=2 * profile.measured.floor_ms))
    assert "call" in texts(longer)
    assert sum(float(b["width"]) for b in boxes(longer, 22)[:-1]) == pytest.approx(
        float(boxes(longer, 22)[-1]["width"]), abs=8
    )
    assert any(line.startswith("the call ") and "(50%)" in line for line in profile_lines(longer))


def test_a_layer_s_dot_stands_left_of_the_crossover_exactly_if_it_is_sparser() -> None:
    dots = [b for b in boxes(make_profile(), 10) if b.get("rx") == "5" and float(b["y"]) < 400]
    for (_, density, _, _, _, _, crossover), dot in zip(LAYERS, dots):
        at = profile_picture._place(crossover)
        assert (float(dot["x"]) + 5 < at) == (density < crossover)


def test_crossovers_and_gains_stand_beside_the_layers() -> None:
    shown = texts(make_profile())
    for text in ("above 0.1", "above 0.31", "above 0.18", "never", "6.0×", "0.80×", "30×"):
        assert text in shown


def test_no_operation_is_lost_where_there_are_too_many() -> None:
    profile = make_profile(more=100)
    rows = profile_picture._rows(profile)
    assert len(rows) == MAX_ROWS
    assert sum(row.ms for row in rows) == pytest.approx(profile.table["ms"].sum())
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert rows[-1].name == f"{105 - MAX_ROWS + 1} smaller ones"
    assert [row.name for row in rows[:4]] == [name for name, *_ in LAYERS]  # in order of execution


@pytest.mark.parametrize(
    "profile",
    [
        make_profile(measured=False),
        make_profile(predicted=False),
        make_profile(crossovers=False),
        replace(make_profile(), table=make_profile().table.iloc[:0]),
        replace(make_profile(), table=make_profile().table.assign(ms=0.0, share=0.0)),
        replace(make_profile(predicted=False), table=make_profile(predicted=False).table.assign(op="<&> " + "x" * 99)),
    ],
    ids=["predicted only", "measured only", "no crossovers", "no operations", "no time", "long names"],
)
def test_odd_profiles_give_pictures_and_tables(profile: Profile, tmp_path: Path) -> None:
    assert save_profile(profile, tmp_path / "p.png", "odd").read_bytes().startswith(b"\x89PNG")
    ET.fromstring(save_profile(profile, tmp_path / "p.svg", "odd").read_text())
    assert to_text(profile_sheet(profile))
    assert profile_lines(profile)
    json.dumps(profile_record(profile, "odd"), allow_nan=False)


def test_texts_stay_inside_the_picture() -> None:
    for profile in (make_profile(), make_profile(measured=False), make_profile(more=50)):
        canvas = draw_profile(profile, "x" * 300)
        root = ET.fromstring(canvas.svg("a network"))
        for e in root.iter(f"{SVG}text"):
            width = 0.6 * float(e.get("font-size", "11")) * len(e.text or "")
            left = float(e.get("x", "0")) - {"end": width, "middle": width / 2}.get(e.get("text-anchor", ""), 0)
            assert left >= 0, e.text
            assert left + width <= canvas.width, e.text
            assert 0 < float(e.get("y", "0")) < canvas.height, e.text


def test_the_table_has_a_row_per_operation_and_leaves_out_what_is_not_known() -> None:
    sheet = profile_sheet(make_profile())
    headers = [column.header for column in sheet.columns]
    cells = dict(zip(headers, sheet.rows[1], strict=True))
    assert cells["operation"] == "body.0"
    assert cells["kernel"] == "specialised"
    assert (cells["ms"], cells["dense ms"], cells["sparse ms"]) == ("0.1000", "0.6000", "0.1000")
    assert cells["predicted ms"] == "0.1100 [0.0900, 0.1400]"
    assert (cells["how"], cells["dense faster"]) == ("interpolated", "above 0.31")
    assert len(sheet.rows) == 5
    bare = [column.header for column in profile_sheet(make_profile(predicted=False, crossovers=False)).columns]
    assert set(headers) - set(bare) == {"predicted ms", "how", "dense faster"}


def test_a_predicted_profile_shows_predictions_where_times_stand() -> None:
    sheet = profile_sheet(make_profile(measured=False))
    cells = dict(zip([column.header for column in sheet.columns], sheet.rows[1], strict=True))
    assert (cells["ms"], cells["dense ms"], cells["sparse ms"]) == ("0.1100", "0.6600", "0.1100")
    assert "nothing was measured" in sheet.notes[0]


def test_the_lines_say_measured_predicted_and_notes() -> None:
    text = "\n".join(profile_lines(make_profile()))
    assert re.search(r"measured   0\.850 \[0\.842, 0\.867\] ms; dense 1\.8\d .*: 2\.\d\d times as fast", text)
    assert re.search(r"predicted  0\.935 .*\(interpolated; \+10\.0% of measured\)", text)
    assert "a model of thin air" in text
    assert "nothing here is true" in text


def test_the_record_holds_every_number_exactly() -> None:
    profile = make_profile()
    record = json.loads(json.dumps(profile_record(profile, "a network"), allow_nan=False))
    assert profile.measured is not None
    assert record["measured"]["ms"] == profile.measured.floor_ms
    assert record["measured"]["quality"] == "ok"
    assert [row["ms"] for row in record["operations"]] == list(profile.table["ms"])
    assert record["operations"][-1]["crossover_density"] is None


def test_energy_is_said_with_its_method_or_why_it_is_not_known() -> None:
    known = replace(make_profile(), energy=Energy(4.2, 3.8, 4.6, "constant power", "5 W, nominal"))
    assert "energy     4.20 [3.80, 4.60] mJ per call (constant power: 5 W, nominal)" in profile_lines(known)
    nan = float("nan")
    unknown = replace(make_profile(), energy=Energy(nan, nan, nan, "constant power", "no power is known"))
    assert "energy     not known: no power is known" in profile_lines(unknown)
    assert profile_record(unknown, "a network")["energy"]["mj"] is None


@pytest.mark.parametrize(
    ("gain", "text"),
    [(3.214, "3.21 times as fast"), (1.0, "as fast"), (0.5, "2.00 times slower"), (float("nan"), "–"), (0.0, "–")],
)
def test_gains_in_words(gain: float, text: str) -> None:
    assert gain_text(gain) == text


@pytest.mark.parametrize(
    ("density", "text"), [(0.312, "above 0.31"), (1.0, "never"), (0.0, "always"), (float("nan"), "–")]
)
def test_crossovers_in_words(density: float, text: str) -> None:
    assert crossover_text(density) == text


def test_a_picture_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.bmp"):
        save_profile(make_profile(), tmp_path / "p.bmp", "a network")
    with pytest.raises(RunError, match="cannot be written"):
        save_profile(make_profile(), tmp_path / "no" / "p.svg", "a network")
