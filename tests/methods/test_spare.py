"""Spared columns: the picked channels keep their values, and the pick is what it says."""

from dataclasses import replace

import pytest
import torch

from quantforge.solvers.rtn import RTN
from quantforge.solvers.spare import Spare


@pytest.mark.parametrize("pick", ["activation", "weight", "random"])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_a_share_of_the_columns_keeps_its_values_and_the_rest_is_rounded(problem, pick, share):
    p = problem("int3-g16-asym", 6, 40)
    solved = Spare(share=share, pick=pick).solve(p)
    index = solved.residuals[0].index.long() if solved.residuals else torch.tensor([], dtype=torch.long)
    assert solved.notes["kept_columns"] == len(index) == len(index.unique()) == round(share * 40)
    assert torch.equal(solved.dequantize()[:, index], p.weight[:, index].bfloat16().float())
    rest = RTN().solve(replace(p, weight=p.weight.index_fill(1, index, 0.0))).dequantize()
    others = torch.ones(40, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(solved.dequantize()[:, others], rest[:, others])


def test_the_pick_is_by_inputs_or_by_weights(problem):
    p = problem("int3-g16-asym", 6, 40)
    magnitude = torch.zeros(40)
    magnitude[[3, 17]] = 5.0
    weight = p.weight.clone()
    weight[:, [8, 30]] *= 50
    p = replace(p, weight=weight, magnitude=magnitude)
    picked = {
        pick: Spare(share=0.05, pick=pick).solve(p).residuals[0].index.tolist() for pick in ("activation", "weight")
    }
    assert picked == {"activation": [3, 17], "weight": [8, 30]}


def test_a_draw_repeats_by_its_seed(problem):
    p = problem("int3-g16-asym", 6, 40)
    drawn = [Spare(share=0.2, pick="random", seed=seed).solve(p).residuals[0].index.tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("options", "says"), [({"share": 1.5}, "share"), ({"pick": "size"}, "'size'")])
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Spare(**options)
