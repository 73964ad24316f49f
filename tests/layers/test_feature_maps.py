import pytest
import torch

from fastweights.errors import FastWeightsError
from fastweights.layers import feature_maps as module
from fastweights.layers.feature_maps import FEATURE_MAPS, FeatureMap, make_feature_map
from fastweights.models import convert
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_llama, random_ids
from tests.models.checks import check_pieces_equal_one_pass


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
def test_a_map_has_the_width_that_it_says(name):
    feature_map = make_feature_map(name, 6, 4)
    assert feature_map(torch.randn(2, 3, 4, 6)).shape == (2, 3, 4, feature_map.width)


def test_the_identity_changes_nothing():
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(make_feature_map("identity", 4, 3)(x), x)


def test_elu_plus_one():
    x = torch.linspace(-8, 8, 100)[None, None, None]
    found = make_feature_map("elu+1", 100, 1)(x)
    torch.testing.assert_close(found, torch.nn.functional.elu(x) + 1)
    assert found.min() > 0


def test_elu_plus_one_does_not_cancel_in_bfloat16():
    """elu(x) is near -1 there: adding 1 would leave nothing but its rounding."""
    x = torch.linspace(-8, -2, 50, dtype=torch.bfloat16)[None, None, None]
    found = make_feature_map("elu+1", 50, 1)(x).double()
    assert ((found - x.double().exp()).abs() / x.double().exp()).max() < 2.0**-8
    assert ((torch.nn.functional.elu(x) + 1).double() - x.double().exp()).abs().max() > 1e-3


def test_gradients_at_large_inputs_are_finite():
    x = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4])[None, None, None].requires_grad_()
    make_feature_map("elu+1", 5, 1)(x).sum().backward()
    assert x.grad.isfinite().all()


def test_an_unknown_map_names_the_known_ones():
    with pytest.raises(FastWeightsError, match="feature_map 'elu' is unknown; known are identity"):
        make_feature_map("elu", 4, 1)


@torch.no_grad()
def test_a_map_may_be_wider_than_a_head(monkeypatch):
    class Both(FeatureMap):
        def __init__(self, head_dim: int, heads: int) -> None:
            super().__init__(head_dim, heads)
            self.width = 2 * head_dim

        def forward(self, x):
            return torch.cat((x.relu(), (-x).relu()), -1)

    monkeypatch.setitem(module.FEATURE_MAPS, "both", Both)
    model = convert(make_llama(), ConversionConfig(feature_map="both", window=8)).eval()
    assert model.fast_attentions()[0].rule.state_shape == (2, 16, 8)
    cache = model(random_ids(1, 5), use_cache=True).cache
    assert cache.layers[0].state().shape == (1, 2, 16, 8)
    check_pieces_equal_one_pass(model, (7, 8, 25))
