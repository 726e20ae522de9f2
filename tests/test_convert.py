"""px.convert: the table, the refusals word for word, and that a refused model is unchanged."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from models import Net, backward, half_square_mean, mlp, randn
from torch import nn
from torch.nn.utils import parametrizations

import perexample as px
from perexample.testing import assert_moments, oracle


class Custom(nn.Module):
    """Holds a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.scale


class OldLSTM(nn.LSTM):
    """A subclass may compute something else."""


class KeptTwice(Custom):
    """Reaches its parameter by another way too."""

    def __init__(self):
        super().__init__()
        self.all = [self.scale]


class Special(torch.Tensor):
    """Some tensor subclass."""


class Quantised(Custom):
    """Its parameter is of a class of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3).as_subclass(Special))


class ForeignWeight(nn.Linear):
    """Its weight is some tensor."""

    def __init__(self):
        super().__init__(3, 3)
        weight = self.weight.detach().clone().requires_grad_()
        del self.weight
        self.weight = weight


class Tied(nn.Module):
    """A head that is the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.token.weight


def twice():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


def weight_norm(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(module, name)


def computed_out_proj():
    attention = nn.MultiheadAttention(4, 2)
    parametrizations.weight_norm(attention.out_proj)
    return attention


def sparse_weight():
    layer = nn.Linear(3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr())
    return layer


def frozen(module):
    return module.requires_grad_(False)


BATCH = (
    "batch statistics mix the examples, so no per-example gradient exists; use torch.nn.GroupNorm in its place, which "
    'px.convert(model, batchnorm="group") does, or in eval mode (its .eval()) torch.nn\'s own BatchNorm1d/2d/3d or '
    "SyncBatchNorm, which are served"
)
LAZY = "its parameters have no shape yet; run one forward pass before converting"
MAX_NORM = "max_norm changes the weight in the forward pass, which no gradient sees; normalise after the step instead"
BY_FREQ = "scale_grad_by_freq divides by counts over the whole batch, which mixes examples; set it to False"
SPARSE = "sparse gradients have no second moment here; set sparse=False"
RECURRENT = (
    "a recurrent layer that keeps its weights in a list besides; build it from cells (torch.nn.LSTMCell, GRUCell, "
    "RNNCell), or freeze its parameters (requires_grad_(False))"
)
KEPT = (
    "keeps a parameter besides in its attribute 'all', where its uses could not be seen; reach it by its own name only"
)
QUANTISED = "its scale is quantised or of a special class (Special); train in floating point, or freeze it"
IN_PROJ = (
    "an attention of another class, or whose in_proj is computed (a parametrization); use "
    "torch.nn.MultiheadAttention as it is, or freeze its parameters (requires_grad_(False))"
)
OUT_PROJ = (
    "its out_proj (ParametrizedNonDynamicallyQuantizableLinear) is no plain linear layer; remove the parametrization, "
    "or freeze the parameters of both (requires_grad_(False))"
)
SPARSE_WEIGHT = "its weight is sparse (torch.sparse_csr), which has no second moment here; make it dense, or freeze it"
FOREIGN = "its weight is a tensor that is no parameter; make it a torch.nn.Parameter"

# model, the lines of the message after the first; the module that is refused comes after a Linear that would be served.
REFUSED = {
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), [f"1 (BatchNorm2d): {BATCH}"]),
    "BatchNorm1d without affine": (lambda: nn.BatchNorm1d(3, affine=False), [f"1 (BatchNorm1d): {BATCH}"]),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), [f"1 (SyncBatchNorm): {BATCH}"]),
    "frozen BatchNorm": (lambda: frozen(nn.BatchNorm1d(3)), [f"1 (BatchNorm1d): {BATCH}"]),
    "lazy": (lambda: nn.LazyLinear(3), [f"1 (LazyLinear): {LAZY}"]),
    "LSTM": (lambda: OldLSTM(3, 3), [f"1 (OldLSTM): {RECURRENT}"]),
    "kept twice": (KeptTwice, [f"1 (KeptTwice): {KEPT}"]),
    "integer parameter": (Quantised, [f"1 (Quantised): {QUANTISED}"]),
    "foreign tensor": (ForeignWeight, [f"1 (ForeignWeight): {FOREIGN}"]),
    "LSTM with a computed weight": (lambda: weight_norm(nn.LSTM(3, 3), "weight_hh_l0"), [f"1 (LSTM): {RECURRENT}"]),
    "attention with a computed in_proj": (
        lambda: parametrizations.weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight"),
        [f"1 (ParametrizedMultiheadAttention): {IN_PROJ}"],
    ),
    "attention with a computed out_proj": (computed_out_proj, [f"1 (MultiheadAttention): {OUT_PROJ}"]),
    "sparse weight": (sparse_weight, [f"1 (Linear): {SPARSE_WEIGHT}"]),
    "max_norm": (lambda: nn.Embedding(3, 3, max_norm=1.0), [f"1 (Embedding): {MAX_NORM}"]),
    "scale_grad_by_freq": (lambda: nn.Embedding(3, 3, scale_grad_by_freq=True), [f"1 (Embedding): {BY_FREQ}"]),
    "sparse": (lambda: nn.Embedding(3, 3, sparse=True), [f"1 (Embedding): {SPARSE}"]),
    "several": (
        lambda: nn.Sequential(nn.BatchNorm1d(3), Custom(), KeptTwice()),
        [f"1.0 (BatchNorm1d): {BATCH}", f"1.2 (KeptTwice): {KEPT}"],
    ),
}


def snapshot(model):
    return [(name, type(module), dict(module.__dict__)) for name, module in model.named_modules()], dict(
        model._forward_hooks
    )


@pytest.mark.parametrize("which", REFUSED)
class TestRefusals:
    """What cannot be exact is refused, all of it at once."""

    def test_message_names_every_module_and_the_way_out(self, which):
        make, lines = REFUSED[which]
        model = nn.Sequential(nn.Linear(3, 3), make())
        with pytest.raises(ValueError) as caught:
            px.convert(model)
        first, *rest = str(caught.value).split("\n")
        assert rest == [f"  {line}" for line in lines]
        assert re.fullmatch(rf"px\.convert: {len(lines)} of \d+ modules cannot be served exactly:", first)

    def test_the_model_is_unchanged(self, which):
        model = nn.Sequential(nn.Linear(3, 3), REFUSED[which][0]())
        before = snapshot(model)
        with pytest.raises(ValueError):
            px.convert(model)
        assert snapshot(model) == before
        with pytest.raises(AttributeError):
            model[0].weight.sum_grad_squared  # noqa: B018

    def test_dry_run_tells_the_same(self, which):
        make, lines = REFUSED[which]
        model = nn.Sequential(nn.Linear(3, 3), make())
        before = snapshot(model)
        table = px.convert(model, dry_run=True)
        assert [str(row) for row in table if row.how == "refused"] == lines
        assert snapshot(model) == before


def test_the_model_itself_is_named_when_it_is_the_one():
    message = f"px.convert: 1 of 1 modules cannot be served exactly:\n  (the model itself) (KeptTwice): {KEPT}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        px.convert(KeptTwice())


class TestServed:
    """What is no obstacle."""

    @pytest.mark.parametrize(
        "make", [lambda: frozen(Custom()), lambda: frozen(nn.LSTM(3, 3)), lambda: frozen(Tied()), nn.Dropout]
    )
    def test_frozen_modules_and_modules_without_parameters(self, make):
        model = nn.Sequential(nn.Linear(3, 3), make())
        px.convert(model)
        assert type(model[0]) is px.nn.Linear

    def test_a_frozen_tie_is_harmless_and_served_when_it_is_thawed(self):
        tied = Tied().requires_grad_(False)
        model = nn.Sequential(tied.token, nn.Linear(4, 4), tied.head).double()
        px.convert(model)
        tokens, y = torch.tensor([[1, 2], [2, 2]]), randn(2, 2, 7)
        model(tokens).sum().backward()
        assert model[1].weight.sum_grad_squared is not None
        model[0].weight.requires_grad_(True)
        model.zero_grad()
        backward(model, tokens, target=y)
        assert_moments(model, oracle(model, half_square_mean, tokens, y))

    def test_norms_without_affine_part(self):
        model = nn.Sequential(
            nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), nn.GroupNorm(2, 4, affine=False)
        )
        backward(px.convert(model), randn(3, 4, dtype=torch.float32), target=randn(3, 4, dtype=torch.float32))
        assert model[0].weight.sum_grad_squared is not None

    def test_instance_norm_without_affine_part_keeps_examples_apart(self):
        assert px.convert(nn.Sequential(nn.Conv1d(3, 3, 1), nn.InstanceNorm1d(3)), dry_run=True)[0].how == "kernel"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "px.convert: model must be a torch.nn.Module, got NoneType"),
        (lambda: nn.Linear, "px.convert: model must be a torch.nn.Module, got type"),
        (lambda: {"a": 1}, "px.convert: model must be a torch.nn.Module, got dict"),
        (
            lambda: torch.compile(mlp(), backend="eager"),
            "px.convert: model is a OptimizedModule; convert the model first, then compile it: "
            "torch.compile(px.convert(model))",
        ),
    ],
)
def test_what_is_no_plain_module_is_a_type_error(make, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        px.convert(make())


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(nn.Tanh()), lambda: frozen(mlp()), lambda: nn.Linear(3, 3).requires_grad_(False)]
)
def test_nothing_to_convert(make):
    model = make()
    message = (
        f"px.convert: {type(model).__name__} has nothing to convert: no layer with a parameter that requires grad; "
        f"convert before freezing, or leave the model as it is"
    )
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        px.convert(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("option", "why"), [("max_norm", MAX_NORM), ("scale_grad_by_freq", BY_FREQ), ("sparse", SPARSE)]
)
def test_px_embedding_refuses_the_same_at_birth(option, why):
    with pytest.raises(ValueError, match=f"^{re.escape(f'Embedding: {why}')}$"):
        px.nn.Embedding(4, 3, **{option: 1.0 if option == "max_norm" else True})


def test_one_weight_for_two_layers_built_by_hand():
    model = nn.Sequential(px.nn.Linear(3, 3), nn.Tanh(), px.nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    x, y = randn(4, 3), randn(4, 3, seed=1)
    backward(model, x, target=y)  # outside of a converted model no forward pass tells which uses belong together
    opt = px.optim.Adam(model.parameters(), lr=1e-3, n_g=10, n_s=10)
    with pytest.raises(RuntimeError, match="was used more than once in one forward pass"):
        opt.step(batch_size=4)
    model.zero_grad()
    backward(px.convert(model), x, target=y)
    assert_moments(model, oracle(model, half_square_mean, x, y))


def test_dry_run_changes_nothing_and_prints_the_table():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.stem = Net(), nn.Linear(3, 3).requires_grad_(False)
            self.bn, self.own = nn.BatchNorm1d(3), Custom()

    model = Mixed()
    before = snapshot(model)
    table = px.convert(model, dry_run=True)
    assert snapshot(model) == before
    assert str(table) == "\n".join(
        [
            "module        class        served          why",
            "net.conv      Conv2d       kernel",
            "net.norm      GroupNorm    kernel",
            "net.fc        Linear       kernel",
            "net.ln        LayerNorm    kernel",
            "net.token     Embedding    kernel",
            "net.position  Embedding    kernel",
            "net.head      Linear       kernel",
            "stem          Linear       frozen",
            f"bn            BatchNorm1d  refused         {BATCH}",
            "own           Custom       exact fallback",
        ]
    )
    assert table[0] == px.Served("net.conv", "Conv2d", "kernel") and isinstance(table, px.ConversionTable)


def test_dry_run_of_a_single_layer_and_of_a_converted_model():
    assert str(px.convert(nn.Linear(2, 2), dry_run=True)) == "module    class   served  why\n(itself)  Linear  kernel"
    model = mlp()
    expected = str(px.convert(model, dry_run=True))
    assert str(px.convert(px.convert(model), dry_run=True)) == expected


def test_a_complex_parameter_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.complex64))
    why = "1 (Linear): its weight is complex; only real parameters have a second moment here"
    assert str(px.convert(model, dry_run=True)[1]) == why


def test_sync_batch_norm_in_eval_mode_has_a_kernel():
    row = px.convert(nn.Sequential(nn.SyncBatchNorm(3)).eval(), dry_run=True)[0]
    assert (row.how, row.why) == ("kernel", "as long as it stays in eval mode")


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (2, 1), (7, 1), (64, 32), (96, 32), (100, 25), (256, 32)])
def test_the_groups_in_the_place_of_a_batch_norm(channels, groups):
    model = px.convert(nn.Sequential(nn.BatchNorm1d(channels)), batchnorm="group")
    assert model[0].num_groups == groups


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 2), nn.Embedding(5, 4), nn.GRUCell(4, 4)])
def test_looking_at_a_parametrization_does_not_move_it_on(layer):
    name = "weight_hh" if isinstance(layer, nn.GRUCell) else "weight"
    model = nn.Sequential(parametrizations.spectral_norm(layer, name))  # a step of its power iteration for each read
    before = {key: value.clone() for key, value in model.state_dict().items()}
    px.convert(model, dry_run=True)
    px.convert(model)
    px.convert(px.convert(model), dry_run=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_convert_returns_the_model_and_prints_nothing(capsys):
    model = mlp()
    assert px.convert(model) is model
    assert capsys.readouterr() == ("", "")


def test_a_model_grown_after_conversion_is_converted_again():
    model = px.convert(nn.Sequential(nn.Linear(5, 4)).double())
    model.append(nn.Linear(4, 3).double())
    px.convert(model)
    backward(model, randn(4, 5), target=randn(4, 3, seed=1))
    assert model._examples.total.item() == 4
    assert all(p.sum_grad_squared is not None for p in model.parameters())
