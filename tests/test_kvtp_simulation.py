"""The recall simulation of per-frame budgets: what the allocation is worth, and that it is worth nothing by chance."""

import pytest
import torch
from typer.testing import CliRunner

from bench.kvtp import simulate as simulation


def test_recall_with_a_gap_of_four():
    """The figures of 200 trials are .51/.98, .94/.97 and 1.0/.15; those of 30 lie within .015 of them."""
    recall = simulation.simulate(simulation.Setting(), gap=4, trials=30)
    for policy, needle, context in (("uniform", 0.51, 0.98), ("kvtp", 0.94, 0.97), ("hard", 1.0, 0.15)):
        assert recall[policy].needle == pytest.approx(needle, abs=0.015)
        assert recall[policy].context == pytest.approx(context, abs=0.015)


def test_no_gain_from_relevance_without_meaning():
    recall = simulation.simulate(simulation.Setting(), gap=0, trials=30)
    assert recall["kvtp"].needle < recall["uniform"].needle + 0.01
    assert recall["kvtp"].context < recall["uniform"].context + 0.01


def test_all_policies_spend_the_same():
    setting = simulation.Setting(frames=10, patches=7, budget=0.33, min_tokens=1)
    counts = simulation.allocations(setting, torch.tensor([0.0, 3, 1, 0, 0, 2, 9, 0, 0, 0]))
    assert {int(count.sum()) for count in counts.values()} == {23}
    assert counts["hard"].tolist() == [0, 7, 2, 0, 0, 7, 7, 0, 0, 0]


def test_keeps_the_most_salient_of_each_frame():
    salience = torch.tensor([[0.0, 2.0, 1.0], [5.0, 4.0, 3.0]])
    kept = simulation.keep(salience, torch.tensor([1, 2]))
    assert kept.tolist() == [[False, True, False], [True, True, False]]


def test_command_line():
    app = simulation.typer.Typer()
    app.command()(simulation.main)
    result = CliRunner().invoke(app, ["--trials", "1", "--gaps", "4"])
    assert result.exit_code == 0
    assert all(policy in result.output for policy in ("uniform", "kvtp", "hard"))
