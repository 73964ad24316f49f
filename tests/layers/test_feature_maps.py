import pytest
import torch

from fastweights.errors import FastWeightsError
from fastweights.layers import feature_maps as module
from fastweights.layers.feature_maps import FEATURE_MAPS, FeatureMap, make_feature_map
from fastweights.models import convert, load_model
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_llama, random_ids
from tests.models.checks import check_changed_and_saved_it_is_loaded_as_it_is, check_pieces_equal_one_pass


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
def test_a_map_has_the_width_that_it_says(name):
    feature_map = make_feature_map(name, 6, 4)
    assert feature_map(torch.randn(2, 3, 4, 6)).shape == (2, 3, 4, feature_map.width)


def trained(name: str, head_dim: int, heads: int) -> FeatureMap:
    """In float64, with weights that differ from head to head."""
    torch.manual_seed(0)
    feature_map = make_feature_map(name, head_dim, heads).double()
    for parameter in feature_map.parameters():
        torch.nn.init.normal_(parameter)
    return feature_map


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


def test_a_projection():
    x, found = torch.randn(2, 3, 4, 6, dtype=torch.float64), trained("linear", 6, 4)
    for head in range(4):
        torch.testing.assert_close(found(x)[:, :, head], x[:, :, head] @ found.weight[head].T)
    assert make_feature_map("linear", 6, 4)(x.float()).equal(x.float())  # at the start


def test_relu_of_a_projection():
    x, found = torch.randn(2, 3, 4, 6, dtype=torch.float64), trained("relu", 6, 4)
    for head in range(4):
        expected = (x[:, :, head] @ found.weight[head].T + found.bias[head]).clamp(min=0)
        torch.testing.assert_close(found(x)[:, :, head], expected)
    assert make_feature_map("relu", 6, 4)(x.float()).equal(x.float().relu())  # at the start


def test_softmax_of_a_projection():
    x, found = torch.randn(2, 3, 4, 6, dtype=torch.float64), trained("softmax", 6, 4)
    for head in range(4):
        e = (x[:, :, head] @ found.weight[head].T).exp()
        expected = torch.cat((e / e.sum(-1, keepdim=True), (1 / e) / (1 / e).sum(-1, keepdim=True)), -1)
        torch.testing.assert_close(found(x)[:, :, head], expected)
    start = torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)
    torch.testing.assert_close(make_feature_map("softmax", 6, 4).double()(x), start)


@pytest.mark.parametrize("features", [4, 6, 15])
@pytest.mark.parametrize(("name", "sides"), [("relu", 1), ("softmax", 2)])
def test_more_features_and_fewer(name, sides, features):
    queries, keys = (make_feature_map(name, 6, heads, features=features) for heads in (4, 2))
    assert queries.weight.shape == (4, features, 6)
    assert queries.width == keys.width == sides * features
    assert queries(torch.randn(2, 3, 4, 6)).shape == (2, 3, 4, queries.width)
    assert (queries.weight == keys.weight[0]).all()  # so that they agree at first
    for rows in queries.weight[0].split(6):
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)))
    assert queries.weight[0, :6].equal(torch.eye(6)) == (features >= 6)


@pytest.mark.parametrize(
    ("settings", "rows"), [({"rule": "delta_and_average"}, 8), ({"rule": "gated", "feature_map": "softmax"}, 0)]
)
@pytest.mark.parametrize("features", [5, 20])
def test_more_features_and_fewer_in_a_model(settings, rows, features, tmp_path):
    """A state has two rows for each, beside those of the delta rule's keys."""
    model = convert(make_llama(), ConversionConfig(**settings, feature_dim=features)).eval()
    assert model.fast_attentions()[0].rule.state_shape[1] == rows + 2 * features
    check_pieces_equal_one_pass(model, (7, 8, 25))
    check_changed_and_saved_it_is_loaded_as_it_is(model, tmp_path)


@pytest.mark.parametrize(("name", "nu"), [("dpfp", 1), ("dpfp-2", 2), ("dpfp-3", 3)])
def test_dpfp_multiplies_neighbours(name, nu):
    x, found = torch.randn(2, 3, 4, 5, dtype=torch.float64), make_feature_map(name, 5, 4)
    r = torch.cat((x.clamp(min=0), -x.clamp(max=0)), -1)
    expected = [r[..., i] * r[..., i - j] for j in range(1, nu + 1) for i in range(10)]
    assert found.width == len(expected)
    torch.testing.assert_close(found(x), torch.stack(expected, -1))


def test_cosformer_weighs_by_distance():
    q, k = torch.randn(2, 1, 30, 2, 5, dtype=torch.float64)
    feature_map = make_feature_map("cosformer", 5, 2, 16)
    p = torch.arange(30)
    distance = (p[:, None] - p).double()
    expected = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu()) * (distance * torch.pi / 32).cos()
    for start in (0, 7, 10**15):  # a stream has no end
        found = torch.einsum("bihk,bjhk->bhij", *(feature_map(x, p[None] + start) for x in (q, k)))
        torch.testing.assert_close(found, expected)
    assert feature_map(q).equal(feature_map(q, p[None]))


@torch.no_grad()
@pytest.mark.parametrize("write", ["all", "leaving"])
def test_cosformer_knows_how_far_back_a_written_token_is(write):
    """Beside a window the key that is written is that of the token which leaves it."""
    torch.manual_seed(0)
    window = 5 if write == "leaving" else 0
    settings = {"window": window, "sinks": 0, "write": "leaving"} if window else {}
    model = convert(make_llama(), ConversionConfig(rule="add", feature_map="cosformer", rotary=False, **settings))
    layer, x = model.fast_attentions()[0], torch.randn(1, 40, 32)
    start = torch.tensor([[123]])
    embeddings = model.model.base.rotary_emb(x, torch.arange(40)[None])
    beside = model.model.window_embeddings(x)
    fast, _ = layer.read(x, None, embeddings, beside, None, torch.arange(40)[None] + start)
    q, k, v = (y[0].double() for y in layer.project(x))
    distance = (torch.arange(40)[:, None] - torch.arange(40)).double()
    k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
    weights = torch.einsum("ihd,jhd->hij", q.relu(), k.relu()) * layer.scaling
    weights = weights * (distance * torch.pi / (2 * layer.query_map.length)).cos() * (distance >= window)
    expected = torch.einsum("hij,jhv->ihv", weights, v)
    torch.testing.assert_close(fast[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
def test_a_map_says_whether_it_is_nowhere_negative(name):
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64) * 5
    where = [torch.tensor([[0, 3000, 6000]])] if FEATURE_MAPS[name].positional else []
    assert trained(name, 6, 4)(x, *where).ge(0).all() == FEATURE_MAPS[name].non_negative


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
def test_bfloat16_costs_no_more_than_its_rounding(name):
    feature_map, x = trained(name, 16, 4), (torch.randn(2, 30, 4, 16) * 3).bfloat16()
    expected = feature_map(x.double())
    found = feature_map.to(torch.float32).to(torch.bfloat16)(x)
    assert found.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in feature_map.parameters())
    torch.testing.assert_close(found.double(), expected, rtol=2.0**-8, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert feature_map(x).equal(found)


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
def test_gradients(name):
    feature_map = trained(name, 3, 2)
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = (
        zip(*feature_map.named_parameters(), strict=True) if list(feature_map.parameters()) else ((), ())
    )

    def of(x, *parameters):
        return torch.func.functional_call(feature_map, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(of, (x, *parameters))


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
def test_gradients_at_large_inputs_are_finite(name):
    x = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4])[None, None, None].requires_grad_()
    make_feature_map(name, 5, 1)(x).sum().backward()
    assert x.grad.isfinite().all()


def test_queries_and_keys_have_weights_of_their_own_for_each_head():
    model = convert(make_llama(), ConversionConfig(feature_map="relu", window=8))
    layer = model.fast_attentions()[0]
    assert layer.query_map.weight.shape == (4, 8, 8)
    assert layer.key_map.weight.shape == (2, 8, 8)
    assert {"query_map.weight", "query_map.bias", "key_map.weight", "key_map.bias"} <= set(layer.new_parameter_names())
    layer.key_map.weight.data.zero_()
    layer.reset_new_parameters()
    assert layer.key_map.weight.equal(torch.eye(8).expand(2, 8, 8))


@torch.no_grad()
def test_what_a_map_learns_is_loaded_in_float32(tmp_path):
    model = convert(make_llama(), ConversionConfig(feature_map="softmax"))
    expected = torch.nn.init.normal_(model.fast_attentions()[1].query_map.weight).clone()
    model.save_pretrained(tmp_path)
    layer = load_model(tmp_path, dtype=torch.bfloat16).fast_attentions()[1]
    assert layer.q_proj.weight.dtype == torch.bfloat16
    assert layer.query_map.weight.dtype == torch.float32
    assert layer.query_map.weight.equal(expected)


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
