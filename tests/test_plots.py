"""The plots of the report: what is drawn, what is told apart, and that no name turns into anything but text."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantforge import plots, report
from quantforge.plots.drawing import LEFT, RIGHT, RULE
from quantforge.record import Histogram, Run
from quantforge.report import drawings

_SPEC = importlib.util.spec_from_file_location("made_reports", Path(__file__).with_name("made_reports.py"))
made_reports = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(made_reports)
a_report, a_run, layer = made_reports.a_report, made_reports.a_run, made_reports.layer
many, Page = made_reports.many, made_reports.Page


def test_every_one_of_many_series_has_a_colour_and_marker_of_its_own() -> None:
    for runs in (many().runs, [a_run(f"method{i}-int4", 4, 12 + i, method=f"method{i}") for i in range(42)]):
        found = list(plots.looks(runs).values())
        assert len({(look.color, look.marker) for look in found}) == len({look.name for look in found}) == len(found)


def test_of_many_runs_the_loss_plot_draws_those_of_the_narrowest_width() -> None:
    assert [run.bits for run in plots.loss_runs(many().runs)] == [2] * 8
    alike = [a_run(f"m{i}-int4", 4, 30.0 - i, method=f"m{i}") for i in range(20)]
    assert plots.loss_runs(alike) == alike[-plots.MOST_LINES :]
    assert plots.loss_runs(alike[:8]) == alike[:8]


def test_marks_above_each_other_are_named_beside_without_labels_that_overlap() -> None:
    runs = [a_run(f"m{i}-int4", 4, 12 + 0.01 * i, method=f"m{i}") for i in range(24)]
    labels = plots.perplexity_figure(runs).axes[0].texts
    assert sorted(label.get_text() for label in labels) == sorted(f"m{i}" for i in range(24))
    axes = labels[0].axes
    for side in ("left", "right"):
        heights = [
            axes.transData.transform(label.xy)[1] * 72 / axes.figure.dpi + label.xyann[1]
            for label in labels if label.get_ha() == side
        ]  # fmt: skip
        assert len(heights) == 12
        assert min(b - a for a, b in zip(sorted(heights), sorted(heights)[1:], strict=False)) > 9


def texts(figure: object, name: str = "p") -> list[str]:
    return [data for tag, data in Page(plots.svg(figure, name)).texts if tag == "text"]


def test_both_plots_are_in_the_page_in_its_own_colours() -> None:
    text = report.to_html(a_report())
    found = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(found) == 6  # three plots, each for wide and for narrow screens
    for drawing in found:
        assert not re.search(r"#[0-9a-f]{6}\b(?!\w)", re.sub(r'(id="|href="#|url\(#)[^")]*', "", drawing))
        assert set(re.findall(r"var\((--\w+)\)", drawing)) <= set(re.findall(r"(--\w+):", text))
        assert "font-family" not in drawing


def test_perplexity_is_drawn_as_one_labelled_line_per_method_and_a_level_for_the_float_model() -> None:
    figure = plots.perplexity_figure(a_report().runs)
    lines = [line for line in figure.axes[0].lines if len(set(line.get_ydata())) > 1]
    assert sorted(len(line.get_xdata()) for line in lines) == [3, 3]
    assert all(list(line.get_xdata()) == sorted(line.get_xdata()) for line in lines)
    assert {"rtn", "gptq", "float 10.000"} <= set(texts(figure))


def test_two_groupings_of_a_method_are_two_lines_with_different_names() -> None:
    runs = [a_run(f"rtn-int{b}-g{g}", b, 20 - b) for b in (4, 8) for g in (64, 128)]
    assert {"rtn-int-g64", "rtn-int-g128"} <= set(texts(plots.perplexity_figure(runs)))


@pytest.mark.parametrize(("worst", "scale"), [(11.0, "linear"), (1e6, "log")])
def test_perplexity_is_on_a_log_scale_only_when_it_spreads(worst: float, scale: str) -> None:
    figure = plots.perplexity_figure([a_run("rtn-int8", 8, 10.0), a_run("rtn-int2", 2, worst)])
    assert figure.axes[0].get_yscale() == scale


def test_loss_has_a_panel_per_kind_in_order_of_depth_and_a_line_per_run() -> None:
    shuffled = a_run(layers=(layer("v", 2, 0.3), layer("v", 0, 0.1), layer("v", 1, 0.2), layer("o", 0, 0.5)))
    figure = plots.loss_figure([a_run("float", None), shuffled, a_run("rtn-int4", layers=(layer("v", 0, 0.9),))])
    assert [axes.get_title("left") for axes in figure.axes] == ["v", "o"]
    first = figure.axes[0].lines[0]
    assert list(first.get_xdata()) == [0, 1, 2]
    assert list(first.get_ydata()) == [0.1, 0.2, 0.3]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert {"gptq", "rtn", "v", "o"} <= set(texts(figure))


def test_runs_that_differ_in_group_size_alone_are_two_series_in_both_plots() -> None:
    runs = [a_run("rtn-int4-g64", bits_per_weight=4.5), a_run("rtn-int4-g128", bits_per_weight=4.25)]
    for figure in (plots.perplexity_figure(runs), plots.loss_figure(runs)):
        assert {"rtn-int4-g64", "rtn-int4-g128"} <= set(texts(figure))
        assert len({line.get_color() for line in figure.axes[0].lines}) == 2


def legend(figure: object) -> dict[str, tuple[str, str]]:
    found = figure.legends[0]
    handles = zip(found.get_texts(), found.legend_handles, strict=True)
    return {text.get_text(): (line.get_color(), line.get_marker()) for text, line in handles}


def test_a_series_has_one_name_one_colour_and_one_marker_in_both_plots() -> None:
    unmeasured = a_run("awq-int4", perplexity=math.nan)  # shown in one plot only, yet counted in both
    runs = [a_run("fp", None), a_run("rtn-int4", layers=()), unmeasured, *a_report().runs[1:]]
    first, second = legend(plots.perplexity_figure(runs)), legend(plots.loss_figure(runs))
    assert set(first) == {"rtn", "gptq"}
    assert set(second) == {"rtn", "gptq", "awq", "2 bits", "4 bits", "8 bits"}
    assert all(first[name] == second[name] for name in first)


def test_a_number_in_the_name_of_a_method_is_not_taken_for_its_width() -> None:
    runs = [a_run(f"gptq-v2-int{bits}", bits, method="gptq-v2") for bits in (2, 3, 4)]
    assert [look.name for look in plots.looks(runs).values()] == ["gptq-v2"]


@pytest.mark.parametrize(("shift", "count"), [(0.0, 1), (0.0, 3), (0.001, 2), (1.0, 2), (3.0, 3)])
def test_the_axis_of_bits_reaches_half_a_bit_beyond_the_data_in_steps_of_quarters(shift: float, count: int) -> None:
    xs = [3.297 + i * shift for i in range(count)]
    axes = plots.perplexity_figure([a_run(f"m{i}", bits_per_weight=x) for i, x in enumerate(xs)]).axes[0]
    low, high = axes.get_xlim()
    assert low <= xs[0] - 0.5
    assert high >= xs[-1] + 0.5
    ticks = [x for x in axes.get_xticks() if low <= x <= high]
    assert 3 <= len(ticks) <= 10
    assert all(x * 4 == round(x * 4) for x in ticks)


@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 9, 11, 12])
def test_panels_fill_every_row_from_edge_to_edge(count: int, width: float) -> None:
    figure = plots.loss_figure([a_run(layers=tuple(layer(f"k{i}", b) for i in range(count) for b in (0, 1)))], width)
    boxes = [axes.get_position() for axes in figure.axes]
    rows = {round(box.y0, 6) for box in boxes}
    assert len(boxes) == count
    for row in rows:
        own = [box for box in boxes if round(box.y0, 6) == row]
        assert min(box.x0 for box in own) == pytest.approx(LEFT / width)
        assert max(box.x1 for box in own) == pytest.approx(1 - RIGHT / width)


def test_experts_of_one_block_are_drawn_as_their_mean() -> None:
    figure = plots.loss_figure([a_run(layers=(layer("up", 0, 0.1), layer("up", 0, 0.3), layer("up", 1, 0.5)))])
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([0.2, 0.5])


@pytest.mark.parametrize("runs", [(), (a_run("float", None),), (a_run(perplexity=math.nan, layers=()),)])
def test_a_plot_without_points_says_so(runs: tuple[Run, ...]) -> None:
    assert texts(plots.perplexity_figure(runs)) == ["No perplexity of a quantized model was measured."]
    assert texts(plots.loss_figure(runs)) == ["No loss by layer was recorded."]


def test_names_are_drawn_letter_by_letter_not_as_formulas() -> None:
    run = a_run("$x^2$_{4}", method="_$\\frac$", layers=(layer("$q$"),))
    assert "_$\\frac$" in texts(plots.perplexity_figure([run]))
    assert {"_$\\frac$", "$q$"} <= set(texts(plots.loss_figure([run])))
    two = [a_run("$x^2$_{4}", method="m"), a_run("$x^3$", method="m")]
    assert {"$x^2$_{4}", "$x^3$"} <= set(texts(plots.perplexity_figure(two)))


# --- quality against bytes --------------------------------------------------------------------------------------------


def spot(name: str, size: float, quality: float, level: bool = False) -> plots.Spot:
    return plots.Spot(name, name, name, size * 1e6, quality, level)


spots = st.lists(
    st.builds(spot, st.sampled_from("abcdef"), st.integers(1, 9), st.integers(1, 9), st.booleans()), min_size=1,
    max_size=9,
)  # fmt: skip


@given(some=spots)
def test_the_front_is_what_nothing_beats(some: list[plots.Spot]) -> None:
    best = plots.front(some)
    for one in some:
        beaten = any(
            other.size <= one.size and other.quality <= one.quality
            and (other.size, other.quality) != (one.size, one.quality)
            for other in some
        )  # fmt: skip
        assert (one not in best) == beaten


def test_the_front_is_joined_and_named_and_the_rest_is_grey():
    made = [spot("small", 100, 40), spot("large", 200, 30), spot("beaten", 210, 35), spot("fp", 400, 28, True)]
    figure = plots.pareto_figure(made, "perplexity")
    axes = figure.axes[0]
    joined = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert list(joined.get_xdata()) == [100, 200, 400]
    assert list(joined.get_ydata()) == [40, 30, 28]
    assert {text.get_text() for text in axes.texts} == {"small", "large", "fp"}
    grey = [line for line in axes.lines if line.get_color() == RULE]
    assert [list(line.get_xdata()) for line in grey] == [[210]]
    assert {"float model", "beaten in both"} <= set(texts(figure))


def test_names_of_the_front_do_not_lie_on_each_other():
    made = [spot(f"some-rather-long-name-{i}", 100 + 0.1 * i, 40 - 0.1 * i) for i in range(8)]
    for width in (plots.WIDE, plots.NARROW):
        axes = plots.pareto_figure(made, "perplexity", width).axes[0]
        unit = 72 / axes.figure.dpi
        heights = sorted(axes.transData.transform(text.xy)[1] * unit + text.xyann[1] for text in axes.texts)
        assert len(heights) == 8
        assert min(b - a for a, b in itertools.pairwise(heights)) > 11


def test_several_models_are_told_apart_by_colour_and_methods_by_shape():
    made = [
        plots.Spot(f"{m}{k}", m, k, s, q) for m, s, q in (("A", 1e8, 3.0), ("B", 2e8, 2.0)) for k in ("rtn", "gptq")
    ]
    figure = plots.pareto_figure(made, "bits per byte")
    found = legend(figure)
    assert {"A", "B", "rtn", "gptq"} <= set(found)
    assert found["A"][0] != found["B"][0]
    assert found["rtn"][1] != found["gptq"][1]


def test_a_float_model_whose_divergence_is_0_is_a_level_line():
    made = [spot("a", 100, 0.1), spot("fp", 400, 0.0, True)]
    figure = plots.pareto_figure(made, "KL")
    assert "fp" in texts(figure)
    assert len([line for line in figure.axes[0].lines if list(line.get_xdata()) == [400, 400]]) == 1


@pytest.mark.parametrize("made", [[], [spot("fp", 4, 2, True)], [spot("a", 1, math.nan)], [spot("a", 0, 1)]])
def test_without_sizes_the_plot_says_so(made):
    assert texts(plots.pareto_figure(made, "KL")) == ["No size and quality of a quantized model were measured."]


# --- histograms -------------------------------------------------------------------------------------------------------


def test_a_histogram_has_an_outline_before_and_a_fill_after_on_a_log_scale():
    figure = plots.histogram_figure(Histogram("q", "weights", 0.5, (0.2, 0.6, 0.2), (0.0, 1.0, 0.0)))
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert axes.get_xlim() == (-0.5, 0.5)
    filled, outline = axes.patches
    assert filled.get_fill()
    assert list(outline.get_data().values) == [0.2, 0.6, 0.2]
    assert list(outline.get_data().edges) == pytest.approx([-0.5, -1 / 6, 1 / 6, 0.5])
    assert not outline.get_fill()


@pytest.mark.parametrize(
    ("edge", "before"),
    [(1.0, ()), (1.0, (0.0, 0.0)), (math.nan, (1.0,)), (-1.0, (1.0,)), (0.0, (1.0,)), (1.0, (math.nan, 5.0))],
)
def test_a_histogram_of_nothing_says_so(edge, before):
    assert texts(plots.histogram_figure(Histogram("q", "weights", edge, before, ()))) == ["No values were counted."]


def test_the_page_draws_the_histograms_of_every_run_that_has_some_and_counts_those_it_leaves_out(monkeypatch):
    made = made_reports.rich(1, histograms=1)
    assert [(i, len(panels)) for i, panels in drawings.histograms(made)] == [(i, 2) for i in range(2, 8)]
    monkeypatch.setattr(drawings, "MOST_PANELS", 6)
    shown = drawings.histograms(made)
    assert [(i, len(panels)) for i, panels in shown] == [(i, 1) for i in range(2, 8)]
    assert drawings.histograms_left_out(made, shown) == 6
    panel = shown[0][1][0]
    assert (panel.layer, panel.what) == ("model.layers.0.self_attn.q_proj", "weights")


def test_a_float_model_of_two_machines_is_one_mark_and_one_level():
    one = made_reports.rich(1)
    again = dataclasses.replace(one.origins[0], machine={"processor": "another"})
    both = report.merge([one, dataclasses.replace(one, origins=(again,), runs=one.runs[:1])])
    names = report.groups.names(both)
    assert len([run for run in both.runs if run.label == "fp"]) == 2
    spots = drawings._spots(both, names, drawings.quality(both)[1])
    assert len([spot for spot in spots if spot.level]) == 1
    assert drawings.perplexity(both, names).wide.count("28.800</text>") == 1
