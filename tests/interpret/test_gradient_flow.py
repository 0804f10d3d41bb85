"""Gradient flow: norms equal those of a backward pass, variants are as described, and the model is unchanged."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from decoder_cases import randomize_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmx.config.schema import DecoderConfig, ModelConfig, QuestionEncoderConfig, SourceConfig
from mmx.encoders.base import Features
from mmx.errors import MmxError
from mmx.interpret import TextBatch
from mmx.interpret.gradient_flow import FlowRow, FlowValues, GradientFlow, gradient_flow
from mmx.interpret.parameter_groups import parameter_group
from mmx.models.model import Model
from mmx.models.question_encoder import QUESTION_ENCODER
from mmx.models.source import SourceBatch
from mmx.nn.attention import attention
from mmx.nn.layers import merge_heads, split_heads
from mmx.testing.toys import ToyEncoder, tiny_model, toy_tokenizer

THIS_MODULE = f"{__name__}:"


def random_batch(model, length=5, streams=2):
    """Two rows of numbers and their texts; the first two positions of each text are a prompt."""
    generator = torch.Generator().manual_seed(3)
    sources = {"numbers": model.collate("numbers", [[0.1, 0.9, -0.4], [0.5, -0.7]])}
    tokens, targets = torch.randint(200, (2, 2, streams, length), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 0, -1] = False
    targets[..., :2] = -100
    targets[0, 0, -1] = -100
    return sources, TextBatch(tokens, targets, mask)


def reference_loss(model, sources, text):
    """Mean cross-entropy per token, as in training."""
    logits = model(sources, text.tokens, text.mask)
    return F.cross_entropy(logits.flatten(0, 2), text.targets.flatten(), ignore_index=-100)


def norm_of(gradients):
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))


def norms(flow, part):
    return {row.name: row.norms for row in flow.of(part)}


class EncoderWithUnusualNames(ToyEncoder):
    """Parameters of its own, in a list, in a dict, with a digit in a name, unused, and of an integer type."""

    def __init__(self, options):
        super().__init__(options)
        self.Scale = nn.Parameter(torch.ones(8))
        self.tables = nn.ParameterList([torch.randn(8), torch.randn(8)])
        self.stack = nn.ModuleDict({"lay3r": nn.Linear(8, 8), "7": nn.Sequential(nn.Linear(8, 8))})
        self.unused = nn.Linear(3, 3)
        self.counts = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, batch):
        states = super().forward(batch).states * self.Scale + self.tables[0] * self.tables[1]
        return Features(self.stack["7"](self.stack["lay3r"](states)), batch["mask"])


class EncoderWithoutGradient(ToyEncoder):
    @torch.no_grad()
    def forward(self, batch):
        return super().forward(batch)


# ---- the baseline --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    """A model of three layers, a batch, and their gradient flow."""
    model = randomize_parameters(tiny_model(num_layers=3))
    batch = random_batch(model)
    return model, batch, gradient_flow(model, *batch)


def test_norms_are_those_of_a_backward_pass(measured):
    model, batch, flow = measured
    reference = deepcopy(model)
    loss = reference_loss(reference, *batch)
    loss.backward()
    assert flow.losses.baseline == pytest.approx(loss.item(), abs=1e-6)
    decoder = reference.decoder
    source = reference.sources["numbers"]
    expected = {f"layers.{i}": norm_of(p.grad for p in layer.parameters()) for i, layer in enumerate(decoder.layers)}
    expected |= {"embedding": norm_of(p.grad for p in decoder.embedding.parameters())}
    expected |= {"norm": norm_of(p.grad for p in decoder.norm.parameters())}
    assert {name: n.baseline for name, n in norms(flow, "decoder").items()} == pytest.approx(expected, rel=1e-5)
    assert norms(flow, "encoder")["numbers.linear"].baseline == pytest.approx(
        norm_of(p.grad for p in source.encoder.parameters()), rel=1e-5
    )
    by_layer = norms(flow, "projection")
    for kind in ("key", "value"):
        linear = getattr(source.projection, kind)
        for layer in range(3):
            rows = slice(32 * layer, 32 * layer + 32)  # [L*H*D, F], layer by layer
            want = norm_of(p.grad[rows] for p in linear.parameters())
            assert by_layer[f"numbers.{kind}.{layer}"].baseline == pytest.approx(want, rel=1e-5)
    assert flow.total("projection", "numbers").baseline == pytest.approx(
        norm_of(p.grad for p in source.projection.parameters()), rel=1e-5
    )


def test_no_weight_is_left_out_or_counted_twice(measured):
    model, batch, flow = measured
    gradients = torch.autograd.grad(reference_loss(model, *batch), list(model.parameters()), allow_unused=True)
    parts = [flow.total(part).baseline for part in ("encoder", "projection", "question_encoder", "decoder")]
    assert math.hypot(*parts) == pytest.approx(norm_of(gradients), rel=1e-5)
    assert len({(row.part, row.name) for row in flow.rows}) == len(flow.rows)


def test_the_gradient_of_the_features(measured):
    model, (sources, text), flow = measured
    source = model.sources["numbers"]
    features = source.encoder(sources["numbers"].inputs)
    states = features.states.detach().requires_grad_()
    logits = model.decoder(text.tokens, source.projection(features._replace(states=states)), text.mask)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 2), text.targets.flatten()), states)
    assert norms(flow, "features")["numbers"].baseline == pytest.approx(norm_of([gradient]), rel=1e-5)


def test_rows_are_in_the_order_of_the_forward_pass(measured):
    names = [row.name for row in measured[2].rows]
    kinds = [f"numbers.{kind}.{layer}" for kind in ("key", "value") for layer in range(3)]
    assert names[:2] == ["numbers.linear", "numbers"]
    assert [n for n in names if n in kinds] == kinds
    assert names[-5:] == ["embedding", "layers.0", "layers.1", "layers.2", "norm"]


# ---- last cross-attention only -------------------------------------------------------------------------------------


def test_layers_without_cross_attention_have_exactly_zero_gradient(measured):
    found = norms(measured[2], "projection")
    for kind in ("key", "value"):
        assert [found[f"numbers.{kind}.{layer}"].last_cross_attention_only for layer in (0, 1)] == [0.0, 0.0]
        assert all(found[f"numbers.{kind}.{layer}"].baseline > 1e-6 for layer in range(3))
        assert found[f"numbers.{kind}.2"].last_cross_attention_only > 1e-6


def test_the_variant_equals_a_model_whose_other_cross_attentions_have_zero_output(measured):
    model, batch, flow = measured
    reference = deepcopy(model)
    with torch.no_grad():
        for layer in reference.decoder.layers[:2]:
            for parameter in layer.cross_attention.out.parameters():
                parameter.zero_()
    loss = reference_loss(reference, *batch)
    loss.backward()
    assert flow.losses.last_cross_attention_only == pytest.approx(loss.item(), abs=1e-5)
    want = norm_of(p.grad for p in reference.sources["numbers"].encoder.parameters())
    assert norms(flow, "encoder")["numbers.linear"].last_cross_attention_only == pytest.approx(want, rel=1e-4)
    want = norm_of(p.grad for p in reference.decoder.layers[2].parameters())
    assert norms(flow, "decoder")["layers.2"].last_cross_attention_only == pytest.approx(want, rel=1e-4)


def test_tied_keys_and_values_have_one_row():
    config = ModelConfig(
        sources={"numbers": SourceConfig(encoder="mmx.testing:ToyEncoder")},
        decoder=DecoderConfig(hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64),
        tie_key_value="layers",
    )
    model = randomize_parameters(Model(config, toy_tokenizer()).eval())
    found = norms(gradient_flow(model, *random_batch(model)), "projection")
    assert [name for name in found if ".key." in name] == ["numbers.key.0"]
    assert min(found["numbers.key.0"]) > 1e-6


def test_the_last_cross_attention_need_not_be_in_the_last_layer():
    model = randomize_parameters(tiny_model(num_layers=5, cross_attention_every_n_layers=2))
    found = norms(gradient_flow(model, *random_batch(model)), "projection")
    assert [found[f"numbers.value.{layer}"].last_cross_attention_only > 0 for layer in (0, 1)] == [False, True]


# ---- without residuals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_the_variant_equals_a_decoder_written_out(placement):
    model = randomize_parameters(tiny_model(num_layers=1, norm_placement=placement))
    sources, text = random_batch(model, streams=1)
    tokens, targets = text.tokens, text.targets
    sources["numbers"] = model.collate("numbers", [[0.1, 0.9], [0.5, -0.7]])
    flow = gradient_flow(model, sources, TextBatch(tokens, targets))
    decoder = model.decoder
    layer = decoder.layers[0]
    memory = model.encode(sources, 2)
    positions = torch.arange(5).expand(2, 5)
    causal = torch.ones(5, 5).tril().bool()[None, None]

    def cross_attention(y):
        queries = split_heads(layer.cross_attention.query(y), 4)
        return layer.cross_attention.out(merge_heads(attention(queries, *memory.layer(0))))

    def residual(x, module, sublayer):
        if placement == "pre":
            return x.detach() + sublayer(module.norm(x))
        return module.norm(x.detach() + sublayer(x))

    x = decoder.embedding(tokens[:, 0], positions)
    x = residual(x, layer.self_residual, lambda y: layer.self_attention(y, causal, positions))
    x = residual(x, layer.cross_residual, cross_attention)
    x = residual(x, layer.feed_residual, layer.feed_forward)
    loss = F.cross_entropy(decoder.logits(decoder.norm(x)).flatten(0, 1), targets.flatten())
    loss.backward()
    assert flow.losses.without_residuals == pytest.approx(loss.item(), abs=1e-5)
    want = norm_of(p.grad for p in layer.parameters())
    assert norms(flow, "decoder")["layers.0"].without_residuals == pytest.approx(want, rel=1e-4)
    want = norm_of(p.grad for p in model.encoder("numbers").parameters())
    assert norms(flow, "encoder")["numbers.linear"].without_residuals == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_without_residuals_gradients_shrink_with_depth(placement):
    """Eight layers at initialization: by at least a factor of 100 a layer; with residuals by less than 4 in all (30 for
    post-norm)."""
    model = tiny_model(num_layers=8, norm_placement=placement)
    flow = gradient_flow(model, *random_batch(model))
    assert flow.losses.without_residuals == flow.losses.baseline, "the forward pass is bitwise equal"
    found = [norms(flow, "decoder")[f"layers.{i}"] for i in range(8)]
    baseline = [n.baseline for n in found]
    assert max(baseline) / min(baseline) < {"pre": 4, "post": 30}[placement]
    ratios = [
        after.without_residuals / before.without_residuals
        for before, after in zip(found, found[1:])
        if before.without_residuals > 1e-30
    ]
    assert len(ratios) >= 3
    assert all(ratio > 100 for ratio in ratios)
    assert flow.share("numbers").without_residuals < 0.3
    assert 0.3 < flow.share("numbers").last_cross_attention_only < 1.5


# ---- the model is unchanged ----------------------------------------------------------------------------------------


def test_parameters_gradients_and_modes_are_unchanged():
    model = tiny_model().train()
    model.decoder.layers[0].eval()
    model.encoder("numbers").requires_grad_(False)
    batch = random_batch(model)
    reference_loss(model, *batch).backward()
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    with torch.no_grad():
        gradient_flow(model, *batch)
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name])
        assert parameter.requires_grad == trainable[name]
        assert (parameter.grad is None) == (name not in gradients)
        assert name not in gradients or torch.equal(parameter.grad, gradients[name])


def test_results_do_not_depend_on_dropout_and_training_mode():
    model = randomize_parameters(tiny_model(dropout=0.5))
    batch = random_batch(model)
    assert gradient_flow(model.train(), *batch) == gradient_flow(model.eval(), *batch)


# ---- any encoder -------------------------------------------------------------------------------------------------


def test_an_encoder_with_unusual_parameter_names():
    model = tiny_model({"numbers": f"{THIS_MODULE}EncoderWithUnusualNames"})
    found = norms(gradient_flow(model, *random_batch(model)), "encoder")
    rows = ["Scale", "linear", "tables.0", "tables.1", "stack.7", "stack", "unused"]
    assert sorted(found) == sorted(f"numbers.{row}" for row in rows)
    assert found["numbers.unused"] == (0.0, 0.0, 0.0)
    assert all(min(n) > 0 for name, n in found.items() if name != "numbers.unused")


def test_features_of_an_encoder_without_gradients_have_a_gradient():
    model = tiny_model({"numbers": f"{THIS_MODULE}EncoderWithoutGradient"})
    flow = gradient_flow(model, *random_batch(model))
    assert norms(flow, "encoder") == {"numbers.linear": (0.0, 0.0, 0.0)}
    assert min(norms(flow, "features")["numbers"]) > 0


def test_frozen_parameters_are_measured_as_well(measured):
    model, batch, flow = measured
    assert gradient_flow(deepcopy(model).requires_grad_(False), *batch) == flow


def test_a_convolutional_backbone_of_timm():
    options = {"backbone": "resnet10t", "size": 32, "stage": 2}
    model = tiny_model({"image": SourceConfig(encoder="image", options=options)}).train()
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(12).view(2, 1, 6)
    sources = {"image": SourceBatch({"pixels": pixels}, torch.arange(2))}
    flow = gradient_flow(model, sources, TextBatch(tokens, tokens + 1))
    names = [row.name for row in flow.of("encoder", "image")]
    assert names[-3:] == ["image.backbone.bn1", "image.backbone.layer1.0", "image.backbone.layer2.0"]
    assert names[0] == "image.backbone.conv1.0"
    assert all(row.norms.baseline > 0 for row in flow.of("encoder"))
    assert all(torch.equal(b, statistics[n]) for n, b in model.named_buffers())


def test_a_question_encoder_has_its_own_rows_and_a_projection():
    """It is the same in all variants, which change the decoder only."""
    config = ModelConfig(
        sources={"numbers": SourceConfig(encoder="mmx.testing:ToyEncoder")},
        decoder=DecoderConfig(hidden_size=32, num_layers=3, num_heads=4, max_position_embeddings=64),
        question_encoder=QuestionEncoderConfig(
            hidden_size=24,
            num_layers=2,
            num_heads=3,
            max_position_embeddings=60,
            prefix_token_ids=(1,),
            suffix_token_ids=(2,),
        ),
        question_input=QUESTION_ENCODER,
    )
    model = randomize_parameters(Model(config, toy_tokenizer()).eval())
    sources, text = random_batch(model)
    questions = model.collate(QUESTION_ENCODER, ["who?", "why?", "is it so?", "or not?"])._replace(streams=2)
    sources[QUESTION_ENCODER] = questions
    flow = gradient_flow(model, sources, text)
    loss = reference_loss(model, sources, text)
    gradients = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))
    for part, source, prefix in (
        ("question_encoder", None, "question_encoder."),
        ("projection", "numbers", "sources.numbers.projection."),
        ("projection", QUESTION_ENCODER, "question_encoder.projection."),
    ):
        skipped = "question_encoder.projection." if part == "question_encoder" else "-"
        want = [g for n, g in gradients.items() if n.startswith(prefix) and not n.startswith(skipped)]
        assert flow.total(part, source).baseline == pytest.approx(norm_of(want), rel=1e-5)
    assert [row.name for row in flow.of("features")] == ["numbers", QUESTION_ENCODER]
    found = norms(flow, "projection")
    assert [found[f"question_encoder.value.{layer}"].last_cross_attention_only > 0 for layer in range(3)] == [
        False,
        False,
        True,
    ]
    assert [found[f"numbers.value.{layer}"].last_cross_attention_only > 0 for layer in range(2)] == [True, True]


def test_an_absent_source_has_zero_gradient():
    model = tiny_model({"numbers": "mmx.testing:ToyEncoder", "other": "mmx.testing:ToyEncoder"})
    flow = gradient_flow(model, *random_batch(model))
    assert flow.total("features", "numbers").baseline > 0
    assert flow.total("features", "other") == flow.total("encoder", "other") == (0.0, 0.0, 0.0)
    assert flow.total("projection", "other") == (0.0, 0.0, 0.0)


# ---- names, tables, errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, group",
    [
        ("backbone.layer1.0.conv1.weight", "backbone.layer1.0"),
        ("backbone.conv1.weight", "backbone.conv1"),
        ("backbone.pos_embed", "backbone"),
        ("backbone.blocks.11.attn.2.bias", "backbone.blocks.11"),
    ],
)
def test_parameter_groups_within_a_backbone(name, group):
    assert parameter_group(name, [name, "backbone.layer1.0.conv1.weight", "backbone.norm.weight"]) == group


def test_parameter_groups_without_a_common_root():
    assert parameter_group("stem.conv.weight", ["stem.conv.weight", "head.weight"]) == "stem"
    assert parameter_group("cls_token", ["cls_token"]) == "cls_token"
    assert parameter_group("linear.weight", ["linear.weight", "linear.bias"]) == "linear"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b1", "0", "12"]), min_size=1, max_size=5), min_size=1, max_size=6))
def test_a_group_is_a_prefix_of_the_name_that_ends_at_its_first_number(components):
    names = [".".join(parts) for parts in components]
    for parts, name in zip(components, names, strict=True):
        group = parameter_group(name, names).split(".")
        assert group and parts[: len(group)] == group
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        assert not numbers or len(group) == numbers[0] + 1


def test_the_table_by_hand():
    rows = (
        FlowRow("features", "image", FlowValues(2.0, 1.0, 0.5)),
        FlowRow("features", "audio", FlowValues(0.0, 0.0, 0.0)),
        FlowRow("decoder", "layers.0", FlowValues(3.0, 1.25, 1e-12)),
        FlowRow("decoder", "layers.1", FlowValues(4.0, 0.0, 0.0)),
    )
    flow = GradientFlow(rows, FlowValues(1.5, 1.75, 1.5))
    assert flow.total("decoder") == (5.0, 1.25, 1e-12)
    assert flow.share("image") == (1.0, 0.5, 0.25)
    assert all(math.isnan(share) for share in flow.share("audio"))
    assert [line.split() for line in flow.table().splitlines()[1:]] == [
        ["features", "image", "2", "1", "0.5"],
        ["features", "audio", "0", "0", "0"],
        ["decoder", "layers.0", "3", "1.25", "1e-12"],
        ["decoder", "layers.1", "4", "0", "0"],
        ["share", "image", "1", "0.5", "0.25"],
        ["share", "audio", "-", "-", "-"],
        ["loss", "1.5", "1.75", "1.5"],
    ]
    assert len({len(line) for line in flow.table().splitlines()}) == 1
    with pytest.raises(MmxError) as error:
        flow.share("text")
    assert error.value.code == "gradient_flow.source"
    assert error.value.details == {"source": "text", "known": ["image", "audio"]}


def test_behind_closed_gates_the_gradient_is_zero():
    model = tiny_model(gate="tanh")
    flow = gradient_flow(model, *random_batch(model))
    assert flow.total("features").baseline == 0.0
    assert math.isnan(flow.share("numbers").baseline)
    assert norms(flow, "decoder")["layers.1"].baseline > 0, "the gates themselves have a gradient"


@pytest.mark.parametrize(
    "config", [{"hidden_size": 256}, {"padded_vocab_size": 2**11 + 200}], ids=["all linears", "output layer only"]
)
def test_a_prepacked_model_is_an_error(config):
    model = tiny_model(**config)
    batch = random_batch(model)
    model.prepare_for_inference("float32")
    with pytest.raises(MmxError) as error:
        gradient_flow(model, *batch)
    assert error.value.code == "gradient_flow.prepacked"


def test_a_text_without_targets_is_an_error(measured):
    model, (sources, text), _ = measured
    with pytest.raises(MmxError) as error:
        gradient_flow(model, sources, TextBatch(text.tokens, torch.full_like(text.targets, -100), text.mask))
    assert error.value.code == "gradient_flow.no_targets"
