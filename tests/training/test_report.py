"""The report: what is plotted with what, where values lie, and a page that is there whole or not at all."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from kolors_fast.training.log import Log
from kolors_fast.training.report import REPORT, Axis, Curve, arrange, read_curves, write_report

COLOUR = (0x00, 0x72, 0xB2)  # of the first line of a plot


def written(folder, steps=range(100, 1100, 100), **figures):
    """A log of figures, each a function of the step."""
    log = Log(folder)
    for step in steps:
        log.write(step, {name: value(step) for name, value in figures.items()})
    log.close()
    return folder


def test_curves_are_those_of_the_log(tmp_path):
    log = Log(tmp_path)
    log.write(1, {"loss": 3.0})
    log.write(1, {"right": 0.5})
    log.write(2, {"loss": math.nan})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # which is being written
    curves = read_curves(tmp_path)
    assert list(curves) == ["loss", "right"]
    assert curves["loss"].steps.tolist() == [1, 2] and curves["loss"].finite().values.tolist() == [3.0]
    assert curves["right"].values.tolist() == [0.5]


def curve(*values):
    return Curve(np.arange(len(values), dtype=float), np.array(values, dtype=float))


def test_figures_are_plotted_with_their_kind():
    names = ["seconds per step", "loss", "validation loss", "validation loss error", "loss/t 0-100", "loss/t 100-400"]
    curves = {name: curve(5, 4) for name in names} | {"right": curve(0, 1), "objects": curve(0.5), "rms": curve(1, 2)}
    plots = {title: list(lines) for title, lines in arrange(curves | {"gone": curve()}).items()}
    assert plots == {
        "loss": ["loss", "validation loss"],
        "loss by timestep": ["t 0-100", "t 100-400"],
        "shares": ["right", "objects"],
        "rms": ["rms"],
        "seconds per step": ["seconds per step"],
    }
    assert list(plots)[-1] == "seconds per step"
    assert list(arrange({"right": curve(0, 1)})) == ["right"]


def test_smoothing_keeps_what_rises_and_drops_what_sticks_out():
    few, rising = curve(*range(59, 0, -1)), curve(*np.arange(400.0) ** 2)
    assert few.smoothed() is few
    np.testing.assert_array_equal(rising.smoothed().values, rising.values)
    flat = np.zeros(400)
    flat[[37, 200, 201]] = 9
    assert not curve(*flat).smoothed().values.any()


def test_axes_are_linear_or_logarithmic():
    linear = Axis(np.array([0.0, 50, 100]), room=0.0)
    assert linear.place(np.array([0, 25, 100])).tolist() == [0, 0.25, 1] and linear.ticks() == [0, 20, 40, 60, 80, 100]
    wide = Axis(np.array([0.001, 10.0]), logarithmic=True, room=0.0)
    np.testing.assert_allclose(wide.place(np.array([0.001, 0.1, 10])), [0, 0.5, 1])
    np.testing.assert_allclose(wide.ticks(), [0.001, 0.01, 0.1, 1, 10])
    for narrow in ([1.0, 2.0], [-1.0, 100.0], [0.0, 100.0]):
        assert not Axis(np.array(narrow), logarithmic=True).logarithmic
    for alone in (0.0, -3.0, 1e-4):  # a value that never changes lies in the middle
        assert float(Axis(np.array([alone, alone])).place(np.array(alone))) == pytest.approx(0.5)


@pytest.mark.parametrize(("low", "high"), [(0.1, 1), (0.07, 0.61), (2, 17), (1e-5, 3e4), (-0.3, 0.2), (99, 101)])
def test_ticks_are_few_and_inside(low, high):
    for logarithmic in (False, True):
        axis = Axis(np.array([low, high]), logarithmic=logarithmic)
        ticks = axis.ticks()
        assert 3 <= len(ticks) <= 12
        assert all(-1e-9 <= float(axis.place(np.array(tick))) <= 1 + 1e-9 for tick in ticks)


def first_plot(path):
    """Where the first plot's line is: x and y of its pixels, from 0 to 1 over them all."""
    pixels = np.asarray(Image.open(path).convert("RGB"))[150:400, :610].astype(int)
    ys, xs = np.nonzero(np.abs(pixels - COLOUR).sum(2) < 60)
    return (xs - xs.min()) / np.ptp(xs), (ys.max() - ys) / np.ptp(ys)


def test_the_line_goes_where_the_figures_go(tmp_path):
    path = write_report(written(tmp_path, loss=lambda step: 1 + (step / 1000) ** 2))
    x, y = first_plot(path)
    steps = 0.1 + 0.9 * x  # from 100 to 1000
    assert np.abs(y - (steps**2 - 0.01) / 0.99).max() < 0.06  # a line's width, straight between ten points


def test_the_page_is_written_whole_and_nothing_else(tmp_path, monkeypatch):
    folder = written(tmp_path / "recipe" / "stage", loss=lambda step: 1 / step, right=lambda step: step / 2000)
    (folder / "samples").mkdir()
    Image.new("RGB", (64, 32), "red").save(folder / "samples" / "000100.png")
    Image.new("RGB", (64, 32), "lime").save(folder / "samples" / "001000.png")
    path = write_report(folder)
    assert path == folder / REPORT
    page = np.asarray(Image.open(path))
    assert page.shape[1] == 1240 and (page[-48:] == 255).all() and (page[:, -40:] == 255).all()
    assert (page == (0, 255, 0)).all(2).sum() > 100_000 and not (page == (255, 0, 0)).all(2).any()  # the last sheet
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(folder)
    assert path.read_bytes() == before
    assert sorted(f.name for f in folder.iterdir() if f.suffix in (".png", ".tmp")) == [REPORT]


def test_figures_that_are_no_numbers_do_not_stop_it(tmp_path):
    folder = written(tmp_path, loss=lambda step: math.inf if step > 500 else step, nothing=lambda step: math.nan)
    assert write_report(folder).is_file()


def test_a_folder_without_figures_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder: expected that of a stage, with a log.jsonl, got"):
        write_report(tmp_path)
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 3}) + "\n")
    with pytest.raises(ValueError, match=r"folder: expected figures in .*, got none"):
        write_report(tmp_path)
