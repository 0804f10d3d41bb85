"""Gradient flow: the norms are those of an ordinary backward, the variants take away what they say, and nothing else
of the model moves."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from decoder_cases import randomize_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmx.config.schema import DecoderConfig, ModelConfig, ProjectionConfig, QuestionEncoderConfig, SourceConfig
from mmx.encoders.base import Features
from mmx.errors import MmxError
from mmx.interpret.gradient_flow import FlowRow, FlowValues, GradientFlow, gradient_flow, group_of
from mmx.models.model import Model
from mmx.models.question_encoder import QUESTION_ENCODER
from mmx.models.source import SourceBatch
from mmx.nn.attention import attention
from mmx.nn.layers import merge_heads, split_heads
from mmx.testing.toys import ToyEncoder, tiny_model, toy_tokenizer

HERE = f"{__name__}:"


def some_batch(model, length=5, streams=2):
    """Two rows of numbers, their texts, and what should follow; the first places of each are a prompt."""
    drawn = torch.Generator().manual_seed(3)
    sources = {"numbers": model.collate("numbers", [[0.1, 0.9, -0.4], [0.5, -0.7]])}
    tokens, targets = torch.randint(200, (2, 2, streams, length), generator=drawn)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 0, -1] = False
    targets[..., :2], targets[0, 0, -1] = -100, -100
    return sources, tokens, mask, targets


def plain_loss(model, sources, tokens, mask, targets):
    """What training minimises, a token."""
    logits = model(sources, tokens, mask)
    return F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=-100)


def norm_of(gradients):
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))


def norms(flow, part):
    return {row.name: row.norms for row in flow.of(part)}


class Odd(ToyEncoder):
    """A stranger's: weights at the top, in a list, in a named stack, behind a number within a word, and unused."""

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


class Still(ToyEncoder):
    """Computes without gradients."""

    @torch.no_grad()
    def forward(self, batch):
        return super().forward(batch)


# ---- as it is ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    model = randomize_parameters(tiny_model(layers=3))
    batch = some_batch(model)
    return model, batch, gradient_flow(model, *batch)


def test_norms_are_those_of_an_ordinary_backward(whole):
    model, batch, flow = whole
    twin = deepcopy(model)
    loss = plain_loss(twin, *batch)
    loss.backward()
    assert flow.losses.baseline == pytest.approx(loss.item(), abs=1e-6)
    decoder, source = twin.decoder, twin.sources["numbers"]
    expected = {f"blocks.{i}": norm_of(p.grad for p in block.parameters()) for i, block in enumerate(decoder.layers)}
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


def test_no_weight_is_left_out_or_counted_twice(whole):
    model, batch, flow = whole
    gradients = torch.autograd.grad(plain_loss(model, *batch), list(model.parameters()), allow_unused=True)
    parts = [flow.total(part).baseline for part in ("encoder", "projection", "question_encoder", "decoder")]
    assert math.hypot(*parts) == pytest.approx(norm_of(gradients), rel=1e-5)
    assert len({(row.part, row.name) for row in flow.rows}) == len(flow.rows)


def test_the_features_gradient_is_that_of_the_features(whole):
    model, (sources, tokens, mask, targets), flow = whole
    source = model.sources["numbers"]
    features = source.encoder(sources["numbers"].inputs)
    states = features.states.detach().requires_grad_()
    logits = model.decoder(tokens, source.projection(features._replace(states=states)), mask)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 2), targets.flatten()), states)
    assert norms(flow, "features")["numbers"].baseline == pytest.approx(norm_of([gradient]), rel=1e-5)


def test_rows_come_in_the_order_of_the_forward(whole):
    names = [row.name for row in whole[2].rows]
    kinds = [f"numbers.{kind}.{layer}" for kind in ("key", "value") for layer in range(3)]
    assert names[:2] == ["numbers.linear", "numbers"]
    assert [n for n in names if n in kinds] == kinds
    assert names[-5:] == ["embedding", "blocks.0", "blocks.1", "blocks.2", "norm"]


# ---- only the last looks -----------------------------------------------------------------------------------------


def test_layers_that_no_longer_look_get_exactly_nothing(whole):
    found = norms(whole[2], "projection")
    for kind in ("key", "value"):
        assert [found[f"numbers.{kind}.{layer}"].last_cross_attention_only for layer in (0, 1)] == [0.0, 0.0]
        assert all(found[f"numbers.{kind}.{layer}"].baseline > 1e-6 for layer in range(3))
        assert found[f"numbers.{kind}.2"].last_cross_attention_only > 1e-6


def test_the_last_looker_alone_is_a_model_whose_others_hand_over_nothing(whole):
    """An independent way to the same: the output maps of the others are zero, so that their looks add nothing."""
    model, batch, flow = whole
    twin = deepcopy(model)
    with torch.no_grad():
        for block in twin.decoder.layers[:2]:
            for parameter in block.cross_attention.out.parameters():
                parameter.zero_()
    loss = plain_loss(twin, *batch)
    loss.backward()
    assert flow.losses.last_cross_attention_only == pytest.approx(loss.item(), abs=1e-5)
    want = norm_of(p.grad for p in twin.sources["numbers"].encoder.parameters())
    assert norms(flow, "encoder")["numbers.linear"].last_cross_attention_only == pytest.approx(want, rel=1e-4)
    want = norm_of(p.grad for p in twin.decoder.layers[2].parameters())
    assert norms(flow, "decoder")["blocks.2"].last_cross_attention_only == pytest.approx(want, rel=1e-4)


def test_one_shared_layer_is_still_looked_at_by_the_last():
    model = randomize_parameters(tiny_model(projection=ProjectionConfig(share_layers=True)))
    found = norms(gradient_flow(model, *some_batch(model)), "projection")
    assert [name for name in found if ".key." in name] == ["numbers.key.0"]
    assert min(found["numbers.key.0"]) > 1e-6


def test_the_last_looking_layer_need_not_be_in_the_last_block():
    model = randomize_parameters(tiny_model(layers=5, cross_every=2))
    found = norms(gradient_flow(model, *some_batch(model)), "projection")
    assert [found[f"numbers.value.{layer}"].last_cross_attention_only > 0 for layer in (0, 1)] == [False, True]


# ---- the highway cut ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_the_cut_is_that_of_a_decoder_written_out(placement):
    model = randomize_parameters(tiny_model(layers=1, norm_placement=placement))
    sources, tokens, _, targets = some_batch(model, streams=1)
    sources["numbers"] = model.collate("numbers", [[0.1, 0.9], [0.5, -0.7]])
    flow = gradient_flow(model, sources, tokens, None, targets)
    decoder, block, memory = model.decoder, model.decoder.layers[0], model.encode(sources, 2)
    places = torch.arange(5).expand(2, 5)
    causal = torch.ones(5, 5).tril().bool()[None, None]

    def look(y):
        queries = split_heads(block.cross_attention.query(y), 4)
        return block.cross_attention.out(merge_heads(attention(queries, *memory.layer(0))))

    def path(x, part, sublayer):
        if placement == "pre":
            return x.detach() + sublayer(part.norm(x))
        return part.norm(x.detach() + sublayer(x))

    x = decoder.embedding(tokens[:, 0], places)
    x = path(x, block.self_residual, lambda y: block.self_attention(y, causal, places))
    x = path(x, block.cross_residual, look)
    x = path(x, block.feed_residual, block.feed_forward)
    loss = F.cross_entropy(decoder.logits(decoder.norm(x)).flatten(0, 1), targets.flatten())
    loss.backward()
    assert flow.losses.without_residuals == pytest.approx(loss.item(), abs=1e-5)
    want = norm_of(p.grad for p in block.parameters())
    assert norms(flow, "decoder")["blocks.0"].without_residuals == pytest.approx(want, rel=1e-4)
    want = norm_of(p.grad for p in model.encoder("numbers").parameters())
    assert norms(flow, "encoder")["numbers.linear"].without_residuals == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_without_the_highway_gradients_shrink_with_depth(placement):
    """At a random start of eight blocks: by at least a factor of 100 a block without it, by less than 4 in all (pre
    norm; 30 with post norm) with it."""
    model = tiny_model(layers=8, norm_placement=placement)
    flow = gradient_flow(model, *some_batch(model))
    assert flow.losses.without_residuals == flow.losses.baseline, "the forward is the same, to the bit"
    found = [norms(flow, "decoder")[f"blocks.{i}"] for i in range(8)]
    most, least = (choose(n.baseline for n in found) for choose in (max, min))
    assert most / least < {"pre": 4, "post": 30}[placement]
    shrunk = [
        after.without_residuals / before.without_residuals
        for before, after in zip(found, found[1:])
        if before.without_residuals > 1e-30
    ]
    assert len(shrunk) >= 3
    assert all(ratio > 100 for ratio in shrunk)
    assert flow.share("numbers").without_residuals < 0.3
    assert 0.3 < flow.share("numbers").last_cross_attention_only < 1.5


# ---- the model stays ---------------------------------------------------------------------------------------------


def test_the_model_is_not_touched():
    model = tiny_model().train()
    model.decoder.layers[0].eval()
    model.encoder("numbers").requires_grad_(False)
    batch = some_batch(model)
    plain_loss(model, *batch).backward()
    before = {n: (p.detach().clone(), p.grad if p.grad is None else p.grad.clone(), p.requires_grad)
              for n, p in model.named_parameters()}  # fmt: skip
    modules = [(name, type(part), part.training) for name, part in model.named_modules()]
    with torch.no_grad():
        gradient_flow(model, *batch)
    assert [(name, type(part), part.training) for name, part in model.named_modules()] == modules
    for name, parameter in model.named_parameters():
        value, gradient, wanted = before[name]
        assert torch.equal(parameter, value) and parameter.requires_grad == wanted
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def test_it_comes_again_with_dropout_and_in_training_mode():
    model = randomize_parameters(tiny_model(dropout=0.5))
    batch = some_batch(model)
    assert gradient_flow(model.train(), *batch) == gradient_flow(model.eval(), *batch)


# ---- any encoder -------------------------------------------------------------------------------------------------


def test_a_strangers_encoder_with_odd_names():
    model = tiny_model({"numbers": f"{HERE}Odd"})
    found = norms(gradient_flow(model, *some_batch(model)), "encoder")
    rows = ["Scale", "linear", "tables.0", "tables.1", "stack.7", "stack", "unused"]
    assert sorted(found) == sorted(f"numbers.{row}" for row in rows)
    assert found["numbers.unused"] == (0.0, 0.0, 0.0)
    assert all(min(n) > 0 for name, n in found.items() if name != "numbers.unused")


def test_where_an_encoder_computes_without_gradients_its_features_still_get_one():
    model = tiny_model({"numbers": f"{HERE}Still"})
    flow = gradient_flow(model, *some_batch(model))
    assert norms(flow, "encoder") == {"numbers.linear": (0.0, 0.0, 0.0)}
    assert min(norms(flow, "features")["numbers"]) > 0


def test_a_frozen_encoder_is_measured_like_the_others(whole):
    model, batch, flow = whole
    assert gradient_flow(deepcopy(model).requires_grad_(False), *batch) == flow


def test_a_convolutional_backbone_of_timm():
    options = {"backbone": "resnet10t", "size": 32, "stage": 2}
    model = tiny_model({"image": SourceConfig(encoder="image", options=options)}).train()
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(12).view(2, 1, 6)
    flow = gradient_flow(model, {"image": SourceBatch({"pixels": pixels}, torch.arange(2))}, tokens, None, tokens + 1)
    names = [row.name for row in flow.of("encoder", "image")]
    assert names[-3:] == ["image.backbone.bn1", "image.backbone.layer1.0", "image.backbone.layer2.0"]
    assert names[0] == "image.backbone.conv1.0"
    assert all(row.norms.baseline > 0 for row in flow.of("encoder"))
    assert all(torch.equal(b, statistics[n]) for n, b in model.named_buffers())


def test_a_reader_has_its_own_rows_and_its_projection_is_one_more():
    """And it keeps its looks in all variants: what only the last looks at is of the decoder."""
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
    sources, tokens, mask, targets = some_batch(model)
    asked = model.collate(QUESTION_ENCODER, ["who?", "why?", "is it so?", "or not?"])._replace(streams=2)
    sources[QUESTION_ENCODER] = asked
    flow = gradient_flow(model, sources, tokens, mask, targets)
    loss = plain_loss(model, sources, tokens, mask, targets)
    gradients = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))
    for part, source, prefix in (
        ("question_encoder", None, "reader."),
        ("projection", "numbers", "sources.numbers.projection."),
        ("projection", QUESTION_ENCODER, "question_encoder.projection."),
    ):
        skipped = "question_encoder.projection." if part == "question_encoder" else "-"
        want = [g for n, g in gradients.items() if n.startswith(prefix) and not n.startswith(skipped)]
        assert flow.total(part, source).baseline == pytest.approx(norm_of(want), rel=1e-5)
    assert [row.name for row in flow.of("features")] == ["numbers", QUESTION_ENCODER]
    found = norms(flow, "projection")
    assert [found[f"reader.value.{layer}"].last_cross_attention_only > 0 for layer in range(3)] == [False, False, True]
    assert [found[f"numbers.value.{layer}"].last_cross_attention_only > 0 for layer in range(2)] == [True, True]


def test_sources_apart_and_one_that_is_absent():
    model = tiny_model({"numbers": "mmx.testing:ToyEncoder", "other": "mmx.testing:ToyEncoder"})
    flow = gradient_flow(model, *some_batch(model))
    assert flow.total("features", "numbers").baseline > 0
    assert flow.total("features", "other") == flow.total("encoder", "other") == (0.0, 0.0, 0.0)
    assert flow.total("projection", "other") == (0.0, 0.0, 0.0)


# ---- names, tables, refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, group",
    [
        ("backbone.layer1.0.conv1.weight", "backbone.layer1.0"),
        ("backbone.conv1.weight", "backbone.conv1"),
        ("backbone.pos_embed", "backbone"),
        ("backbone.blocks.11.attn.2.bias", "backbone.blocks.11"),
    ],
)
def test_groups_within_a_backbone(name, group):
    assert group_of(name, [name, "backbone.layer1.0.conv1.weight", "backbone.norm.weight"]) == group


def test_groups_without_one_root():
    assert group_of("stem.conv.weight", ["stem.conv.weight", "head.weight"]) == "stem"
    assert group_of("cls_token", ["cls_token"]) == "cls_token"
    assert group_of("linear.weight", ["linear.weight", "linear.bias"]) == "linear"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b1", "0", "12"]), min_size=1, max_size=5), min_size=1, max_size=6))
def test_a_group_is_the_beginning_of_a_name_and_ends_at_its_first_number(given_names):
    names = [".".join(parts) for parts in given_names]
    for parts, name in zip(given_names, names):
        group = group_of(name, names).split(".")
        assert group and parts[: len(group)] == group
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        assert not numbers or len(group) == numbers[0] + 1


def test_a_table_by_hand():
    rows = (
        FlowRow("features", "image", FlowValues(2.0, 1.0, 0.5)),
        FlowRow("features", "sound", FlowValues(0.0, 0.0, 0.0)),
        FlowRow("decoder", "blocks.0", FlowValues(3.0, 1.25, 1e-12)),
        FlowRow("decoder", "blocks.1", FlowValues(4.0, 0.0, 0.0)),
    )
    flow = GradientFlow(rows, FlowValues(1.5, 1.75, 1.5))
    assert flow.total("decoder") == (5.0, 1.25, 1e-12)
    assert flow.share("image") == (1.0, 0.5, 0.25)
    assert all(math.isnan(share) for share in flow.share("sound"))
    assert [line.split() for line in flow.table().splitlines()[1:]] == [
        ["features", "image", "2", "1", "0.5"],
        ["features", "sound", "0", "0", "0"],
        ["decoder", "blocks.0", "3", "1.25", "1e-12"],
        ["decoder", "blocks.1", "4", "0", "0"],
        ["share", "image", "1", "0.5", "0.25"],
        ["share", "sound", "-", "-", "-"],
        ["loss", "1.5", "1.75", "1.5"],
    ]
    assert len({len(line) for line in flow.table().splitlines()}) == 1
    with pytest.raises(MmxError, match=r"^the flow has no source 'text'; expected one of image, sound\.$"):
        flow.share("text")


def test_behind_shut_gates_nothing_arrives():
    model = tiny_model(gate="tanh")
    flow = gradient_flow(model, *some_batch(model))
    assert flow.total("features").baseline == 0.0
    assert math.isnan(flow.share("numbers").baseline)
    assert norms(flow, "decoder")["blocks.1"].baseline > 0, "that of the gate's opening among it"


@pytest.mark.parametrize(
    "facts", [{"hidden_size": 256}, {"padded_vocab_size": 2**11 + 200}], ids=["the maps", "the head alone"]
)
def test_a_packed_model_is_refused(facts):
    model = tiny_model(**facts)
    batch = some_batch(model)
    model.prepare_for_inference("float32")
    with pytest.raises(MmxError, match=r"laid out for speaking.* mmx\.checkpoint\.load_model\(FOLDER\) gives it\.$"):
        gradient_flow(model, *batch)


def test_targets_that_do_not_fit_are_refused(whole):
    model, (sources, tokens, mask, targets), _ = whole
    with pytest.raises(MmxError, match=r"^targets \[2, 2, 4\] with \d+ to be learned do not fit tokens \[2, 2, 5\]"):
        gradient_flow(model, sources, tokens, mask, targets[..., 1:])
    with pytest.raises(MmxError, match="with 0 to be learned"):
        gradient_flow(model, sources, tokens, mask, torch.full_like(targets, -100))
