"""The architectures: torchvision's state dicts and outputs, the papers' variants, and every model's run."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import nn

from fused_cnn import models

SMALL = {"num_classes": 7}
SHARED = ["googlenet", "resnet18", "resnet34", "resnet50", "wide_resnet50_2", "resnext50_32x4d"]


def torchvision_model(name, **options):
    torchvision = pytest.importorskip("torchvision")
    if name == "googlenet":
        options.setdefault("init_weights", False)
    return getattr(torchvision.models, name)(**options)


def randomise(model):
    """BatchNorm statistics and parameters that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model


def relative_error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SHARED)
def test_torchvision_state_dict_both_ways_and_equal_outputs(name):
    theirs = randomise(torchvision_model(name)).eval()
    ours = models.build(name, backend="reference").eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, got = theirs(x), ours(x)
    assert relative_error(got, expected) < 1e-5
    randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("name", ["googlenet", "resnet50"])
def test_fused_model_agrees_with_torchvision(name):
    theirs = randomise(torchvision_model(name)).eval().to(DEVICE)
    ours = models.build(name).eval().to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64).to(DEVICE, memory_format=torch.channels_last)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-4


@pytest.mark.parametrize("name", ["googlenet", "resnet18"])
def test_same_seed_gives_torchvisions_weights(name):
    torch.manual_seed(3)
    options = {"init_weights": True} if name == "googlenet" else {}
    theirs = torchvision_model(name, **options).state_dict()
    torch.manual_seed(3)
    ours = models.build(name).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_training_agrees_with_torchvision():
    options = {"dropout": 0.0, "dropout_aux": 0.0, **SMALL}
    theirs = torchvision_model("googlenet", **options)
    ours = models.build("googlenet", backend="reference", **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    got, expected = ours(x), theirs(x)
    assert got._fields == expected._fields == ("logits", "aux_logits2", "aux_logits1")
    for field in got._fields:
        assert relative_error(getattr(got, field), getattr(expected, field)) < 1e-4


def test_transform_input():
    theirs = torchvision_model("googlenet", transform_input=True, **SMALL).eval()
    ours = models.build("googlenet", transform_input=True, backend="reference", **SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("name", [n for n in models.MODELS if not n.endswith("_cifar")])
def test_every_imagenet_model_runs_eval(name):
    size = 64 if "152" not in name else 32
    model = models.build(name, **SMALL).eval().to(DEVICE)
    with torch.no_grad():
        assert model(torch.randn(1, 3, size, size, device=DEVICE)).shape == (1, 7)


@pytest.mark.parametrize("name", [n for n in models.MODELS if n.endswith("_cifar") and "110" not in n])
def test_cifar_models_train(name):
    model = models.build(name).to(DEVICE)
    model(torch.randn(2, 3, 32, 32, device=DEVICE)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "name, options",
    [
        ("googlenet", {}),
        ("googlenet", {"aux_logits": False}),
        ("googlenet", {"naive": True}),
        ("resnet18", {}),
        ("resnet18", {"shortcut": "A"}),
        ("resnet18", {"shortcut": "C"}),
        ("plain18", {}),
        ("resnet50_paper", {}),
        ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
    ],
)
@pytest.mark.parametrize("backend", ["reference", None])
def test_variants_train(name, options, backend):
    model = models.build(name, backend=backend, **SMALL, **options).to(DEVICE)
    out = model(torch.randn(2, 3, 64, 64, device=DEVICE))
    models.googlenet_loss(out, torch.tensor([1, 2], device=DEVICE)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("naive", [False, True])
def test_googlenet_paper_trains_at_224(naive):
    model = models.build("googlenet_paper", naive=naive, **SMALL)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, nn.LocalResponseNorm) for m in model.modules()) == 2
    assert model.dropout.p == 0.4 and model.aux1.dropout.p == 0.7
    out = model(torch.randn(1, 3, 224, 224))
    assert [tuple(t.shape) for t in out] == [(1, 7)] * 3
    models.googlenet_loss(out, torch.tensor([3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_googlenet_paper_form():
    model = models.build("googlenet_paper")
    block = model.inception3a
    assert block.branch3[1].conv.kernel_size == (5, 5) and block.branch3[1].conv.bias is not None
    pools = model.maxpool4.kernel_size, model.aux1.pool.kernel_size, model.aux1.pool.stride
    assert pools == (3, 5, 3)
    aux = 512 * 128 + 128 + 2048 * 1024 + 1024 + 1024 * 1000 + 1000
    assert parameters(model) == 6_998_552 + aux + (aux + 16 * 128)  # the second takes 528 channels


def test_naive_blocks_widen_and_have_no_reductions():
    model = models.build("googlenet_paper", naive=True)
    assert len(model.inception3a.branch2) == 1
    assert model.inception3b.branch1.conv.in_channels == 64 + 128 + 32 + 192


@pytest.mark.parametrize(
    "name, millions",
    [
        ("googlenet", 13.004888),
        ("resnet18", 11.689512),
        ("resnet34", 21.797672),
        ("resnet50", 25.557032),
        ("resnet50_paper", 25.557032),
        ("resnet101", 44.549160),
        ("resnet152", 60.192808),
        ("wide_resnet50_2", 68.883240),
        ("resnext50_32x4d", 25.028904),
        ("plain18", 11.515688),
        ("resnet20_cifar", 0.269722),
        ("resnet110_cifar", 1.727962),
        ("plain110_cifar", 1.727962),
    ],
)
def test_parameter_counts(name, millions):
    with torch.device("meta"):
        assert parameters(models.build(name)) == round(millions * 1e6)


def test_shortcut_options_differ_in_projections():
    def projections(**options):
        with torch.device("meta"):
            model = models.build("resnet34", **options)
        return sum(key.endswith("downsample.0.weight") for key in model.state_dict())

    assert projections(shortcut="A") == 0
    assert projections(shortcut="B") == 3
    assert projections(shortcut="C") == 16
    assert projections(residual=False) == 0


def test_option_a_pads_with_zeros():
    shortcut = models.resnet.ZeroPadShortcut(3, 5, 2)
    x = torch.randn(2, 3, 7, 7)
    out = shortcut(x)
    assert out.shape == (2, 5, 4, 4)
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2]) and not out[:, 3:].any()


def test_plain_net_is_the_residual_net_without_its_sums():
    plain, residual = (models.build(n, backend="reference", **SMALL).eval() for n in ("plain18", "resnet18"))
    missing = residual.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(".downsample." in key for key in missing)
    block, x = plain.layer1[0], torch.randn(1, 64, 8, 8)
    expected = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))
    assert torch.allclose(block(x), expected, atol=1e-6)


def test_stride_moves_to_the_first_1x1():
    for name, strides in (("resnet50", (1, 2)), ("resnet50_paper", (2, 1))):
        block = models.build(name, **SMALL).layer2[0]
        assert (block.conv1.stride[0], block.conv2.stride[0]) == strides


def test_zero_init_residual():
    model = models.build("resnet18", zero_init_residual=True, **SMALL)
    assert not model.layer3[1].bn2.weight.any() and model.layer3[1].bn1.weight.all()


def test_googlenet_loss_weighs_the_auxiliary_classifiers():
    logits, aux2, aux1 = torch.randn(3, 4, 7)
    target = torch.tensor([0, 1, 2, 3])
    main, second, first = (F.cross_entropy(t, target) for t in (logits, aux2, aux1))
    outputs = models.GoogLeNetOutputs(logits, aux2, aux1)
    assert torch.allclose(models.googlenet_loss(outputs, target), main + 0.3 * (second + first))
    assert torch.equal(models.googlenet_loss(logits, target), main)


@pytest.mark.parametrize("make", ["googlenet", "resnet18"])
def test_backend_reaches_every_block(make):
    model = models.build(make, backend="reference", **SMALL)
    found = {m.backend for m in model.modules() if hasattr(m, "backend")}
    assert found == {"reference"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: models.build("resnet51"), "did you mean resnet50"),
        (lambda: models.build("resnet18", shortcut="D"), 'must be "A", "B" or "C"'),
        (lambda: models.build("resnet18", stride_in_1x1=True), "BasicBlock has no 1x1"),
        (lambda: models.build("resnet50", replace_stride_with_dilation=[True]), "must have 3 elements"),
        (lambda: models.resnet_cifar(21), "6n \\+ 2"),
        (lambda: models.resnet.ZeroPadShortcut(4, 3, 1), "from 4 down to 3"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
