"""The damage table tells what one massive token does to the others that share its range."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from quantforge.models import arch, tiny

ROOT = Path(__file__).parent.parent
_SPEC = spec_from_file_location("damage", ROOT / "tools" / "damage.py")
damage = module_from_spec(_SPEC)
_SPEC.loader.exec_module(damage)


@pytest.fixture(scope="module")
def losses():
    """Return the table of a model whose last block gives the first token of a window a massive input of `down_proj`."""
    model = tiny.make("llama", intermediate_size=128)
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, out: out * massive)
    massive = torch.ones(1, 16, 1)
    massive[:, 0] = 1000.0
    ids = torch.randint(8, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    return damage.measure(model, ids)


def test_every_layer_is_in_the_table_once_a_format(losses):
    names = {name for stage in arch.find_stages(tiny.make("llama", intermediate_size=128))[0] for name in stage.names}
    for notation in damage.FORMATS:
        found = [name for (_, asked), rows in losses.items() if asked == notation for _, name in rows]
        assert sorted(found) == sorted(names)
    assert "down_proj" in damage.table(losses)


@pytest.mark.parametrize("shared", ["int8-tensor", "int8-tensor-static"])
def test_a_massive_token_costs_the_others_only_where_they_share_its_range(losses, shared):
    by_token, by_tensor = ({n: v for v, n in losses["down_proj", f]} for f in ("int8-token", shared))
    hit = "model.layers.1.mlp.down_proj"
    assert by_tensor[hit] > 0.5
    assert by_token[hit] < 1e-3
    other = "model.layers.0.mlp.down_proj"
    assert by_tensor[other] < 1e-2
