"""Layer tables against the papers; launches, traffic and saved bytes against sums done by hand."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_cnn
from fused_cnn import _library, models
from fused_cnn.analysis import count, minimum_traffic, op_costs, reduction, saved_bytes, summary
from fused_cnn.analysis.op_costs import FUSED_COSTS
from fused_cnn.analysis.paper import agrees
from fused_cnn.ops.conv.cases import stage_cost


def table(name, **options):
    with torch.device("meta"):
        model = models.build(name, **options)
    return summary(model, models.input_size(name), name)


@pytest.fixture(scope="module")
def paper_table():
    return table("googlenet_paper")


# arXiv 1409.4842, Table 1: output, #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj.
TABLE_1 = {
    "inception_3a": ([28, 28, 256], 64, 96, 128, 16, 32, 32),
    "inception_3b": ([28, 28, 480], 128, 128, 192, 32, 96, 64),
    "inception_4a": ([14, 14, 512], 192, 96, 208, 16, 48, 64),
    "inception_4b": ([14, 14, 512], 160, 112, 224, 24, 64, 64),
    "inception_4c": ([14, 14, 512], 128, 128, 256, 24, 64, 64),
    "inception_4d": ([14, 14, 528], 112, 144, 288, 32, 64, 64),
    "inception_4e": ([14, 14, 832], 256, 160, 320, 32, 128, 128),
    "inception_5a": ([7, 7, 832], 256, 160, 320, 32, 128, 128),
    "inception_5b": ([7, 7, 1024], 384, 192, 384, 48, 128, 128),
}
COLUMNS = ("output_size", "#1x1", "#3x3 reduce", "#3x3", "#5x5 reduce", "#5x5", "pool proj")


def test_googlenet_paper_rows_are_those_of_table_1(paper_table):
    rows = {row["name"]: row for row in paper_table.rows}
    for name, expected in TABLE_1.items():
        assert tuple(rows[name][column] for column in COLUMNS) == expected
        assert rows[name]["depth"] == 2
    others = {"conv1": [112, 112, 64], "maxpool1": [56, 56, 64], "conv2": [56, 56, 192], "maxpool2": [28, 28, 192]}
    others |= {"maxpool3": [14, 14, 480], "maxpool4": [7, 7, 832], "avgpool": [1, 1, 1024], "linear": [1, 1, 1000]}
    assert {name: rows[name]["output_size"] for name in others} == others
    assert rows["conv1"]["patch_size"] == "7x7/2" and rows["maxpool4"]["patch_size"] == "3x3/2"
    assert rows["avgpool"]["patch_size"] == "7x7/1" and rows["dropout"]["type"] == "dropout (40%)"


def test_googlenet_paper_figures_agree_or_are_named(paper_table):
    rows = {row["name"]: row for row in paper_table.rows}
    printed = {name: row for name, row in rows.items() if "paper" in row}
    ops = {name for name, row in printed.items() if agrees(row["macs"], row["paper"]["ops"])}
    params = {name for name, row in printed.items() if agrees(row["params"], row["paper"]["params"])}
    assert ops == {"conv2", *TABLE_1, "linear"} - {"inception_5a"}
    assert params == {"conv2", "inception_3a", "inception_3b", "linear"}
    for name, row in rows.items():
        if "paper" in row and not row["paper"]["agrees"]:
            assert any(note.startswith(f"{name}: the paper prints") for note in paper_table.notes)
    assert rows["inception_3a"]["params"] == 163_696 and rows["inception_3a"]["macs"] == 128_049_152
    assert paper_table.total["paper"]["agrees"]


@pytest.mark.parametrize(
    "name, macs, agrees_with_paper",
    [
        ("resnet18", 1_814_073_344, True),
        ("resnet34", 3_663_761_408, True),
        ("resnet50_paper", 3_857_973_248, True),
        ("resnet101_paper", 7_570_194_432, True),
        ("resnet152_paper", 11_282_415_616, True),
        ("plain34", 3_644_493_824, True),
        ("resnet50", 4_089_184_256, False),
        ("resnet20_cifar", 40_551_040, True),
        ("plain56_cifar", 125_485_696, True),
    ],
)
def test_resnets_against_the_paper(name, macs, agrees_with_paper):
    result = table(name)
    assert result.total["macs"] == macs
    assert result.total["paper"]["agrees"] is agrees_with_paper
    assert any("stride" in note for note in result.notes) is (not agrees_with_paper)


def test_resnet_rows_are_those_of_table_1():
    rows = {row["name"]: row for row in table("resnet50").rows}
    assert list(rows) == ["conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x", "avgpool", "fc"]
    assert rows["conv4_x"]["layers"] == "[1x1, 256; 3x3, 256; 1x1, 1024] x 6"
    assert rows["conv1"]["output_size"] == [112, 112, 64] and rows["conv5_x"]["output_size"] == [7, 7, 2048]


@pytest.mark.parametrize("name", ["wide_resnet50_2", "resnext50_32x4d", "googlenet"])
def test_networks_that_the_papers_do_not_have_are_not_compared(name):
    result = table(name)
    assert "paper" not in result.total and not any("paper" in row for row in result.rows)


@pytest.mark.parametrize("name", ["googlenet", "resnet18"])
def test_torchvision_models_have_the_same_table(name):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(**({"init_weights": False} if name == "googlenet" else {}))
    assert summary(theirs, (3, 224, 224), name).to_dict() == table(name).to_dict()


@pytest.mark.parametrize("name", ["googlenet_paper", "resnet18", "resnet20_cifar"])
def test_json_schema(name):
    found = json.loads(json.dumps(table(name).to_dict()))
    assert found["model"] == name
    for row in found["rows"]:
        assert {"name", "type", "output_size", "params", "macs"} <= set(row)
    assert found["total"]["params"] == sum(row["params"] for row in found["rows"])
    assert found["total"]["macs"] == sum(row["macs"] for row in found["rows"])


def test_text_table_marks_what_differs(paper_table):
    headings, rows = paper_table.table()
    cells = {row[0]: dict(zip(headings, row, strict=True)) for row in rows}
    assert cells["conv1"]["in the paper"] == "2.7K / 34M *"
    assert cells["inception_3a"]["in the paper"] == "159K / 128M"
    assert cells["inception_3a"]["output"] == "28x28x256" and cells["total"]["params"] == "6,998,552"


def test_summary_of_any_other_network_and_a_wrong_size():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    result = summary(model, (3, 8, 8))
    assert [row["macs"] for row in result.rows] == [4 * 3 * 9 * 36, 0, 0, 288]
    assert result.total["params"] == 108 + 290
    with pytest.raises(ValueError, match=r"three positive numbers .* got \(3, 8\)"):
        summary(model, (3, 8))


def test_summary_changes_nothing():
    model = models.build("resnet20_cifar").train()
    summary(model, (3, 32, 32))
    assert model.training and model.backend is None and not model.conv1._forward_hooks
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_reductions_save_what_the_weights_say(paper_table):
    found = {row["name"]: row for row in paper_table.reductions}
    assert list(found) == list(TABLE_1)
    naive = 192 * (64 + 9 * 128 + 25 * 32)
    assert found["inception_3a"]["naive_macs"] == naive * 28 * 28
    assert found["inception_3a"]["naive_params"] == naive + 64 + 128 + 32
    assert found["inception_3a"]["naive_channels"] == 64 + 128 + 32 + 192
    assert all(row["macs"] < row["naive_macs"] and row["params"] < row["naive_params"] for row in found.values())
    assert table("googlenet_paper", naive=True).reductions == []
    with torch.device("meta"):
        block = fused_cnn.nn.Inception(8, 2, 3, 4, 2, 3, 5)
    assert reduction("block", block, (2, 8, 4, 4))["channels"] == 2 + 4 + 3 + 5


def counted(fn, *args):
    found = count(fn, *args)
    return found.launches, found.bytes_read, found.bytes_written


X = torch.randn(2, 4, 5, 5)  # 800 bytes
IMAGE = X.numel() * 4


@pytest.mark.parametrize(
    "fn, expected",
    [
        (lambda x: x.relu(), (1, IMAGE, IMAGE)),
        (lambda x: x.clone().relu_(), (2, 2 * IMAGE, 2 * IMAGE)),
        (lambda x: x + x, (1, 2 * IMAGE, IMAGE)),
        (lambda x: x[:, :2].permute(0, 2, 3, 1).reshape(2, 25, 2).detach(), (0, 0, 0)),
        (lambda x: x[:, :2].relu(), (1, IMAGE // 2, IMAGE // 2)),
        (lambda x: torch.cat([x, x], 1), (1, 2 * IMAGE, 2 * IMAGE)),
        (lambda x: x + torch.ones(1).expand(5), (2, IMAGE + 4, IMAGE + 4)),
        (lambda x: torch.empty_like(x), (0, 0, 0)),
        (lambda x: torch.zeros_like(x), (1, 0, IMAGE)),
        (lambda x: torch.empty_like(x).copy_(x), (1, IMAGE, IMAGE)),
        (lambda x: torch.add(x, x, out=torch.empty_like(x)), (1, 2 * IMAGE, IMAGE)),
        (lambda x: x.sum(), (1, IMAGE, 4)),
        (lambda x: F.max_pool2d(x, 5), (1, IMAGE, 8 * (4 + 8))),  # the values and their int64 indices
        (lambda x: F.conv2d(x, torch.empty(3, 4, 1, 1)), (1, IMAGE + 48, 600)),
        (lambda x: torch._foreach_add([x, x], 1.0), (2, 2 * IMAGE, 2 * IMAGE)),
    ],
)
def test_count_by_hand(fn, expected):
    assert counted(fn, X) == expected


def test_views_are_free_and_reshape_copies_only_when_it_must():
    assert counted(lambda x: x.view(-1), X) == (0, 0, 0)
    assert counted(lambda x: x.permute(0, 2, 3, 1).reshape(-1), X) == (1, IMAGE, IMAGE)


def test_batch_norm_passes():
    vectors = [torch.ones(4) for _ in range(4)]
    channel = 4 * 4
    run = lambda x, training: F.batch_norm(x, vectors[0], vectors[1], vectors[2], vectors[3], training)  # noqa: E731
    assert counted(run, X, False) == (1, IMAGE + 4 * channel, IMAGE)
    launches, read, written = counted(run, X, True)  # on a CPU mean, variance and the rest each read x
    assert (launches, read, written) == (2, 3 * IMAGE + 4 * channel, IMAGE + 2 * channel)


def test_backward_of_a_convolution():
    weight = torch.randn(3, 4, 1, 1, requires_grad=True)
    x = X.clone().requires_grad_()
    out = F.conv2d(x, weight)
    grad = torch.ones_like(out)
    found = count(lambda: torch.autograd.grad(out, (x, weight), grad))
    assert found.by_op["aten::convolution_backward"].launches == 2
    assert found.bytes_read == 2 * 600 + IMAGE + 48 and found.bytes_written == IMAGE + 48
    assert found.flops == 2 * (2 * 2 * 25 * 12)


def test_fused_ops_by_hand():
    assert counted(lambda x: fused_cnn.add_relu(x, x, backend="native"), X) == (1, 2 * IMAGE, IMAGE)
    x, weight = X.double(), torch.randn(3, 4, 1, 1, dtype=torch.float64)
    run = lambda: fused_cnn.ops.conv_bias_relu(x, weight, backend="native")  # noqa: E731
    found = count(run)  # float64: oneDNN's convolution, then a pass over its result
    assert (found.launches, found.bytes_read, found.bytes_written) == (2, 1600 + 96 + 1200, 2 * 1200)
    assert found.flops == 2 * 50 * 12


def test_winograds_form_spares_operations():
    x, weight = torch.randn(1, 64, 28, 28), torch.randn(64, 64, 3, 3)
    packed, _ = fused_cnn.ops.pack_conv(weight, None, like=x)
    found = count(lambda: fused_cnn.ops.conv_bias_relu(x, packed, padding=1))
    assert found.flops == 2 * 28 * 28 * 9 * 64 * 64
    assert found.flops - found.flops_saved == 2 * 24 * (14 * 7) * 64 * 64  # 24 products for tiles of 2 x 4 pixels


def test_onednn_ops_by_hand():
    conv = torch.ops.mkldnn._convolution_pointwise
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN")
    weight, bias = torch.randn(3, 4, 1, 1), torch.randn(3)
    geometry = ([0, 0], [1, 1], [1, 1], 1)
    found = count(lambda: conv(X, weight, bias, *geometry, "relu", [], ""))
    assert (found.launches, found.bytes_read, found.bytes_written) == (1, IMAGE + 48 + 12, 600)
    assert found.flops == 2 * 50 * 12 and not found.unknown
    other = torch.randn(2, 3, 5, 5)
    found = count(lambda: conv.binary(X, other, weight, bias, *geometry, "add", None, "relu", [], None))
    assert (found.bytes_read, found.bytes_written) == (IMAGE + 600 + 48 + 12, 600)


def test_an_unknown_op_is_named():
    with torch.library._scoped_library("test_analysis", "DEF") as library:
        library.define("strange(Tensor x) -> Tensor")
        library.impl("strange", lambda x: x.clone(), "CPU")
        found = count(lambda x: torch.ops.test_analysis.strange(x).relu(), X)
    assert found.unknown == {"test_analysis::strange": 1}
    assert found.launches == 1 and "test_analysis::strange" not in found.by_op


def test_the_tables_name_real_ops():
    aten = op_costs._ALLOCATE | op_costs._WRITE_ONLY | op_costs._FOLLOW_THE_RULE | set(op_costs._SEVERAL_PASSES)
    assert all(hasattr(torch.ops.aten, name) for name in aten)
    assert all(hasattr(getattr(torch.ops, key.split("::")[0]), key.split("::")[1]) for key in FUSED_COSTS)


def test_every_op_of_the_package_has_a_cost():
    assert {f"fused_cnn::{name}" for name in _library.op_names()} <= set(FUSED_COSTS)


@pytest.mark.parametrize("name", ["googlenet", "resnet18", "resnet20_cifar"])
@pytest.mark.parametrize("train", [False, True])
def test_nothing_unknown_and_minimum_below_fused_below_eager(name, train):
    # Where images are few and small, weights are what is read, and Winograd's form of them on a CPU is 24 values for
    # nine: the processor decides whether fewer operations are worth it.
    x = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    found = {}
    for backend in ("reference", None):
        model = models.build(name, backend=backend, num_classes=10).to(memory_format=torch.channels_last)
        model.train(train)

        def step(model=model):
            if train:
                models.googlenet_loss(model(x), torch.arange(8)).backward()
            else:
                with torch.no_grad():
                    model(x)

        step()
        found[backend] = count(step)
        assert not found[backend].unknown
    least = minimum_traffic(model, x, backward=train)
    assert least.bytes < found[None].bytes < found["reference"].bytes
    assert found[None].flops == found["reference"].flops
    assert train or found[None].launches < found["reference"].launches


def test_minimum_traffic_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), fused_cnn.nn.BasicBlock(4, 4), nn.MaxPool2d(2)
    ).eval()  # fmt: skip
    least = minimum_traffic(model, torch.randn(1, 3, 6, 6))
    image, pooled = 4 * 36 * 4, 4 * 9 * 4
    blocks = [(b.name, b.bytes_read, b.bytes_written) for b in least.blocks]
    assert blocks == [
        ("0", 3 * 36 * 4 + 12 * 4 + 16, image),
        ("3", image + 2 * (144 * 4 + 16), image),
        ("4", image, pooled),
    ]
    assert least.bytes == least.bytes_read + least.bytes_written
    train = minimum_traffic(model, torch.randn(1, 3, 6, 6), backward=True)
    assert train.blocks[2].bytes_read == 2 * image + pooled and train.blocks[2].bytes_written == pooled + image


def test_saved_bytes_counts_each_storage_once_and_no_parameters():
    x = torch.randn(2, 4, 5, 5)
    conv = nn.Conv2d(4, 3, 1, bias=False)
    assert saved_bytes(conv, x) == IMAGE  # its input; not its weight
    y = x.clone().requires_grad_()
    assert saved_bytes(lambda t: (t * t) * t, y) == 2 * IMAGE  # t and t * t, each used twice
    linear = nn.Linear(5, 2)
    assert saved_bytes(lambda: linear(x)) == IMAGE


def test_saved_bytes_excludes_buffers():
    bn = nn.BatchNorm2d(4).eval()
    assert saved_bytes(bn, X) == IMAGE


def test_a_stage_on_a_gpu_reads_its_weights_and_what_lies_between() -> None:
    """Of tensors that stand for a GPU's: there each convolution reads and writes memory."""
    with FakeTensorMode():
        x = torch.empty(2, 8, 6, 6, device="cuda")
        packed = [torch.empty(16, 8, 1, 1, device="cuda"), torch.empty(16, device="cuda")] * 3
        pointwise, square = [8, 16, 1, 1, 1, 1, 0, 0, 1, 1], [16, 16, 3, 3, 1, 1, 1, 1, 1, 1]
        geometry = [*pointwise, *square, *pointwise]  # the last is the projection
        arguments = {"x": x, "packed": packed, "geometry": geometry, "lengths": [2], "shortcut": True, "projects": True}
        cost = stage_cost(arguments, x)
    assert cost.launches == 3 and cost.reads == {"packed": 1, "x": 2} and cost.rewrites == cost.flops_saved == 0
    assert cost.scratch == 2 * (2 * 16 * 6 * 6 * 4)  # what the first convolution gives, and the projection
