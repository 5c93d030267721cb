"""`tools/plan_placement.py`: a placement file from traces, and what it says of wrong input."""

from __future__ import annotations

import json

import numpy as np
import plan_placement
import pytest
from placement.speeds import read_row_times
from placement.traces import read_domains

from engine.moe.placement.instances import Instances
from engine.moe.placement.placement_file import read_placement
from engine.moe.placement.row_split import RowSplit, SplitRule


def write_trace(path, *, layers=(1, 3), experts=8, steps=6, seed=0, exponent=1.0):
    draw = np.random.default_rng(seed)
    loads = np.empty((steps, len(layers), experts), dtype=np.int64)
    for n in range(len(layers)):
        weight_E = (draw.permutation(experts) + 1.0) ** -exponent
        loads[:, n] = draw.multinomial(2000, weight_E / weight_E.sum(), size=steps)
    np.savez(path, loads=loads, layers=np.array(layers))
    return path


@pytest.fixture
def trace(tmp_path):
    return write_trace(tmp_path / "text.npz")


def plan(capsys, *arguments):
    """Run the tool in this process; return what it printed and its record."""
    assert plan_placement.main([*map(str, arguments), "--processes", "1"]) == 0
    text = capsys.readouterr().out
    return text, json.loads(text.strip().splitlines()[-1])


def test_a_plan_is_written_that_loads_and_keeps_its_promise(trace, tmp_path, capsys):
    out = tmp_path / "placement.yaml"
    text, record = plan(capsys, trace, "--ranks", 4, "--copies", 4, "--out", out)
    placement = read_placement(out)
    assert set(placement.layers) == {1, 3} and placement.num_copies == 8
    assert placement.domains["text"].share > 0.99 > record["shares"][0]["today"]
    assert sum(placement.domains["text"].loads_E[3]) == pytest.approx(2000, abs=8)
    assert [point["copies"] for point in record["frontier"]] == [0, 1, 2, 4]
    assert "planned" in text and "<table>" in out.with_suffix(".html").read_text()


def test_equal_arguments_write_equal_files(trace, tmp_path, capsys):
    written = []
    for name in ("a.json", "b.json"):
        plan(capsys, trace, "--ranks", 2, "--copies", 2, "--out", tmp_path / name)
        written.append((tmp_path / name).read_text())
    assert written[0] == written[1]


@pytest.mark.slow
def test_processes_side_by_side_write_the_same(trace, tmp_path, capsys):
    plan(capsys, trace, "--ranks", 2, "--copies", 1, "--out", tmp_path / "one.yaml")
    arguments = [str(trace), "--ranks", "2", "--copies", "1", "--processes", "2"]
    plan_placement.main([*arguments, "--out", str(tmp_path / "two.yaml")])
    assert (tmp_path / "one.yaml").read_text() == (tmp_path / "two.yaml").read_text()


def test_every_trace_is_a_domain_and_so_is_their_mix(trace, tmp_path, capsys):
    other = write_trace(tmp_path / "x.npz", seed=7)
    out = tmp_path / "p.yaml"
    _, record = plan(capsys, trace, f"tasks={other}", "--ranks", 4, "--copies", 4, "--out", out)
    assert [row["traffic"] for row in record["shares"]] == ["text", "tasks", "mixed"]
    assert all(row["planned"] > 0.97 for row in record["shares"])
    assert list(read_placement(out).domains) == ["text", "tasks", "mixed"]


def test_a_target_takes_fewer_copies_than_a_higher_one(trace, tmp_path, capsys):
    copies = []
    for target in (0.9, 0.999):
        out = tmp_path / f"{target}.yaml"
        plan(capsys, trace, "--ranks", 4, "--target", target, "--out", out)
        placement = read_placement(out)
        assert min(placement.domains["text"].layer_shares.values()) >= target - 0.005
        copies.append(placement.num_copies)
    assert copies[0] < copies[1]


@pytest.mark.parametrize(("precision", "per_rank"), [("model", 3), ("int8", 6)])
def test_no_rank_holds_more_copies_than_its_memory(precision, per_rank, trace, tmp_path, capsys):
    out = tmp_path / "p.yaml"
    budget = ["--memory-gib", 3.5 * 1000 / 2**30, "--expert-bytes", 1000]
    plan(capsys, trace, "--ranks", 4, *budget, "--precision", precision, "--out", out)
    placement = read_placement(out)
    held = [r for x in placement.layers.values() for ranks in x.copies_E for r in ranks]
    assert placement.precision == precision
    assert np.bincount(held, minlength=4).tolist() == [per_rank] * 4


def test_the_size_of_an_expert_is_read_from_the_checkpoint(trace, tmp_path, capsys):
    out = tmp_path / "p.yaml"
    model = (
        plan_placement.Path(plan_placement.__file__).parents[1] / "configs/checkpoints/tiny_mixtral"
    )
    budget = ["--memory-gib", 0.01, "--model", model]
    plan(capsys, trace, "--ranks", 4, *budget, "--out", out)
    assert read_placement(out).num_copies > 0


def test_a_placement_is_changed_by_few_moves(trace, tmp_path, capsys):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    plan(capsys, trace, "--ranks", 4, "--copies", 4, "--out", first)
    other = write_trace(tmp_path / "other.npz", seed=7)
    plan(capsys, other, "--from", first, "--max-moves", 1, "--out", second)
    before, after = read_placement(first), read_placement(second)
    for index, layer in after.layers.items():
        old = before.layers[index]
        assert layer.home_E == old.home_E and layer.num_copies == old.num_copies
        new = [set(a) - set(b) for a, b in zip(layer.copies_E, old.copies_E, strict=True)]
        assert sum(map(len, new)) <= 1


def test_speeds_are_planned_around_and_kept(trace, tmp_path, capsys):
    speeds, out = tmp_path / "speeds.yaml", tmp_path / "p.yaml"
    speeds.write_text("speeds: [1, 1, 1, 0.5]")
    plan(capsys, trace, "--ranks", 4, "--copies", 4, "--speeds", speeds, "--out", out)
    placement = read_placement(out)
    assert tuple(placement.row_times_W) == (1, 1, 1, 2) and placement.domains["text"].share > 0.97


def test_a_curve_counts_at_the_rows_of_a_balanced_rank(tmp_path):
    path = tmp_path / "speeds.yaml"
    fast, slow = "{rows: [100, 200], seconds: [1, 2]}", "{rows: [100, 200], seconds: [1, 4]}"
    path.write_text(f"curves: [{fast}, {slow}]")
    assert read_row_times(path, 2, 150) == pytest.approx((1, 2.5 / 1.5))
    assert read_row_times(path, 2, 400) == pytest.approx((1, 2))


def report_of(path, *seconds_per_row, changes=()):
    """Write a report of ranks with such costs; a call of 100 rows is a cold one."""
    ranks = [
        {
            "rank": rank,
            "expert_cost": {
                "calls": [1, 50],
                "rows": [100.0, 1000.0 + 8 * rank],
                "seconds": [each * 100, each * (1000 + 8 * rank)],
            },
        }
        for rank, each in enumerate(seconds_per_row)
    ]
    for rank in changes:
        del ranks[rank]["expert_cost"]
    path.write_text(json.dumps({"total": 3, "run": {"seconds": 1.0, "ranks": ranks}}))
    return path


def test_a_rank_at_half_speed_is_planned_around_by_the_report_of_a_job(trace, tmp_path, capsys):
    report = report_of(tmp_path / "out.report.json", 1e-6, 1.02e-6, 1e-6, 2e-6)
    out = tmp_path / "p.yaml"
    plan(capsys, trace, "--ranks", 4, "--copies", 4, "--speeds", report, "--out", out)
    placement = read_placement(out)
    assert tuple(placement.row_times_W) == (1, 1, 1, 2), "ranks within 5% count as equal"
    assert placement.domains["text"].share > 0.97
    rows_W = np.zeros(4)  # after the split: the slow rank has about half of another's
    for layer, planned in placement.layers.items():
        instances = Instances(planned, 4)
        split = RowSplit(instances, SplitRule(speeds_W=placement.speeds_W))
        load_E = np.array(placement.domains["text"].loads_E[layer])
        rows_I = split.rows(load_E[instances.expert_of_home_E])
        np.add.at(rows_W, instances.rank_I, rows_I)
    assert rows_W[3] == pytest.approx(rows_W[:3].mean() / 2, rel=0.05)


def test_a_report_without_costs_or_of_other_ranks_is_named(tmp_path):
    path = report_of(tmp_path / "r.json", 1e-6, 2e-6, changes=(1,))
    with pytest.raises(ValueError, match=r"r.json: run.ranks\[1\].expert_cost is missing"):
        read_row_times(path, 2, 100)
    with pytest.raises(ValueError, match="the job had 2 ranks, the plan is for 4"):
        read_row_times(path, 4, 100)
    path.write_text('{"run": null}')
    with pytest.raises(ValueError, match="the job had no ranks"):
        read_row_times(path, 2, 100)


@pytest.mark.parametrize("name", ["map.png", "map.html"])
def test_the_heat_map_is_a_picture_or_a_page(name, trace, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    budget = ["--ranks", 2, "--copies", 0, "--out", tmp_path / "p.yaml"]
    plan(capsys, trace, *budget, "--heat-map", path)
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<!do")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["missing", "--ranks", 4], "missing: there is no such trace"),
        (["text.npz", "--ranks", 9], "--ranks 9"),
        (["text.npz"], "--ranks: give"),
        (["text.npz", "--ranks", 0], "--ranks 0: must be at least 1"),
        (["text.npz", "--ranks", 4, "--copies", -1], "--copies -1"),
        (["text.npz", "--ranks", 4, "--target", 1.5], "--target 1.5"),
        (["text.npz", "--ranks", 4, "--memory-gib", 1], "give --model DIR, or --expert-bytes"),
        (["text.npz", "--ranks", 4, "--memory-gib", 1e-9, "--expert-bytes", 999], "hold no copy"),
        (["text.npz", "--ranks", 4, "--nodes", 3], "--nodes 3"),
        (["text.npz", "--ranks", 4, "--max-moves", 3], "needs --from"),
        (["text.npz", "--from", "p.yaml", "--copies", 3], "omit --copies"),
        (["text.npz", "--from", "p.yaml"], "p.yaml"),
        (["text.npz", "text.npz", "--ranks", 4], "a second trace named 'text'"),
        (["mixed=text.npz", "--ranks", 4], "is the name of all traces"),
        (["text.npz", "more.npz", "--ranks", 4], "experts 6, but"),
        (["text.npz", "late.npz", "--ranks", 4], "must be of one model"),
        (["empty.npz", "--ranks", 4], "no recorded rows"),
        (["broken.npz", "--ranks", 4], "broken.npz: cannot be read"),
        (["text.npz", "--ranks", 4, "--heat-map", "x.gif"], "must end in .png or .html"),
        (["text.npz", "--ranks", 4, "--speeds", "none.yaml"], "--speeds none.yaml"),
        (["text.npz", "--ranks", 4, "--speeds", "short.yaml"], "one for each of 4 ranks"),
        (["text.npz", "--ranks", 4, "--speeds", "zero.yaml"], "speeds has an entry"),
    ],
)
def test_wrong_input_is_named(arguments, named, trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_trace("more.npz", experts=6)
    write_trace("late.npz", layers=(1, 4))
    np.savez("empty.npz", loads=np.zeros((2, 1, 8), dtype=np.int64))
    (tmp_path / "broken.npz").write_text("no archive")
    (tmp_path / "short.yaml").write_text("speeds: [1, 2]")
    (tmp_path / "zero.yaml").write_text("speeds: [1, 1, 1, 0]")
    with pytest.raises(ValueError, match=named):
        plan_placement.main([*map(str, arguments), "--out", "out.yaml"])


def test_two_budgets_are_refused(trace, capsys):
    with pytest.raises(SystemExit):
        plan_placement.main([str(trace), "--ranks", "4", "--copies", "2", "--target", "0.9"])
    assert "not allowed with" in capsys.readouterr().err


def test_arrays_without_numbers_of_layers_count_from_zero(tmp_path):
    np.savez(tmp_path / "a.npz", loads=np.ones((2, 3, 4), dtype=np.int64))
    assert read_domains([str(tmp_path / "a.npz")])[0].layers == (0, 1, 2)
