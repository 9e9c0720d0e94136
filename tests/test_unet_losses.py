import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import segkit.chunks
import segkit.head
from segkit.choices import LOSSES
from segkit.chunks import Plan
from segkit.errors import SegkitError
from segkit.losses import (
    ModelWithLoss,
    annotated_number,
    head_loss,
    positive_weights,
    start_bias,
    structure_frequencies,
)
from segkit.norms import InstanceNorm
from segkit.slices import Targets
from segkit.unet import UNet2D, Up


def test_shapes_and_the_published_layout():
    model = UNet2D()
    assert [level[0].out_channels for level in model.down] == [32, 64, 128, 256]
    assert model.bottleneck[0].out_channels == 512 and len(model.up) == 4 and model.head.out_channels == 117
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 48, 32)).shape == (2, 117, 48, 32)
        assert UNet2D(2, 3, (8, 16)).eval()(torch.zeros(1, 2, 20, 12)).shape == (1, 3, 20, 12)
    # worked out by hand: two 3 x 3 convolutions and their normalisations per level, 2 x 2 transposed, 1 x 1 head
    widths, count = [1, 32, 64, 128, 256, 512], 0
    for a, b in pairwise(widths):
        count += 9 * a * b + 9 * b * b + 4 * b
    for a, b in pairwise(widths[1:]):
        count += 4 * b * a + a + 9 * 2 * a * a + 9 * a * a + 4 * a
    assert sum(p.numel() for p in model.parameters()) == count + 32 * 117 + 117


def test_a_pixel_is_seen_from_afar_and_skips_are_used():
    torch.manual_seed(0)  # few channels: by chance all of a level may be silent
    model = UNet2D(1, 1, (4, 4, 4, 4)).eval()
    image = torch.randn(1, 1, 64, 64, requires_grad=True)
    model(image)[0, 0, 32, 32].backward()
    assert (image.grad[0, 0] != 0).nonzero().min() < 8


def test_the_skip_connection_is_joined_as_published():
    torch.manual_seed(0)
    level = Up(6, 3, "instance").double()
    below, skip = torch.randn(2, 6, 4, 5).double(), torch.randn(2, 3, 8, 10).double()
    joined = level.convolve(torch.cat([skip, level.enlarge(below)], 1))
    assert torch.allclose(level(below, skip), joined, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 6, 7), (1, 2, 1, 9), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("device", DEVICES)
def test_instance_norm_is_that_of_torch(device, dtype, shape):
    torch.manual_seed(1)
    norm, reference = InstanceNorm(shape[1]), (nn.InstanceNorm2d if len(shape) == 4 else nn.InstanceNorm3d)(
        shape[1], affine=True
    )  # fmt: skip
    with torch.no_grad():
        for layer in (norm, reference):
            layer.weight.copy_(torch.linspace(0.5, 2, shape[1]))
            layer.bias.copy_(torch.linspace(-1, 1, shape[1]))
    results = []
    for layer in (norm, reference):
        layer.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype).requires_grad_()
        y = layer(x)
        (y * torch.linspace(-1, 2, y.numel(), device=device).view(shape)).sum().backward()
        results.append([y, x.grad, layer.weight.grad, layer.bias.grad])
    close = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.allclose(mine, theirs, rtol=close, atol=close * float(theirs.detach().abs().max()))


def test_a_normalised_slice_does_not_depend_on_those_beside_it():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    norm = InstanceNorm(3)
    whole = torch.autograd.grad((norm(x.requires_grad_()) * weight).sum(), x)[0]
    parts = [
        torch.autograd.grad((norm(part) * of_part).sum(), part)[0]
        for part, of_part in zip(x.detach().split(1), weight.split(1), strict=True) if part.requires_grad_() is part
    ]  # fmt: skip
    assert torch.equal(whole, torch.cat(parts))


def test_a_norm_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(SegkitError, match="NORM = 'layer': expected one of instance, batch"):
        UNet2D(norm="layer")


@pytest.mark.parametrize("arguments", [{"features": ()}, {"features": (0,)}, {"out_channels": 0}, {"in_channels": 0}])
def test_networks_without_channels_are_refused(arguments):
    with pytest.raises(SegkitError):
        UNet2D(**arguments)


def test_sizes_that_cannot_be_halved_are_refused():
    with pytest.raises(SegkitError, match="multiples of 16"):
        UNet2D(features=(2, 2, 2, 2))(torch.zeros(1, 1, 40, 32))


def random_case(seed: int, dtype=torch.float64):
    """Features, head, targets with overlaps and channels that are not annotated, positive weights."""
    g = torch.Generator().manual_seed(seed)
    batch, channels, width, codes = (int(torch.randint(1, n, (), generator=g)) for n in (4, 9, 6, 7))
    rows, columns = (int(n) for n in torch.randint(1, 9, (2,), generator=g))
    table = torch.rand(batch, codes + 1, channels, generator=g) < 0.3
    table[:, 0] = False
    annotated = torch.rand(batch, channels, generator=g) < 0.7
    annotated[0, 0] = True
    targets = Targets(torch.randint(0, codes + 1, (batch, rows, columns), generator=g), table, annotated)
    features = torch.randn(batch, width, rows, columns, generator=g, dtype=dtype, requires_grad=True)
    torch.manual_seed(seed)
    head = nn.Conv2d(width, channels, 1).to(dtype)
    return features, head, targets, torch.rand(channels, generator=g, dtype=dtype) * 20 + 1


def moved(case, device: str):
    """A random case on another device, its features still a leaf."""
    features, head, targets, weight = case
    there = Targets(*(part.to(device) for part in (targets.codes, targets.codebook, targets.annotated)))
    return features.detach().to(device).requires_grad_(), head.to(device), there, weight.to(device)


def dense_loss(features, head, targets, weight):
    """The reference: BCEWithLogitsLoss on dense planes, mean over what is annotated."""
    loss = F.binary_cross_entropy_with_logits(
        head(features), targets.dense().to(features.dtype), pos_weight=weight[:, None, None], reduction="none"
    )
    mask = targets.annotated[:, :, None, None].expand_as(loss)
    return loss[mask].mean()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_the_chunked_head_equals_the_dense_reference_with_every_gradient(seed):
    features, head, targets, weight = random_case(seed)
    inputs = [features, head.weight, head.bias]
    loss = head_loss(features, head, targets, weight)
    expected = dense_loss(features, head, targets, weight)
    assert torch.allclose(loss, expected, rtol=1e-9)
    ours, theirs = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 8192])
def test_the_size_of_the_chunks_changes_nothing(monkeypatch, chunk):
    features, head, targets, weight = random_case(5)
    expected = torch.autograd.grad(dense_loss(features, head, targets, weight), features)[0]
    monkeypatch.setattr(segkit.chunks, "CHUNK_PIXELS", chunk)
    loss = head_loss(features, head, targets, weight)
    assert torch.allclose(torch.autograd.grad(loss, features)[0], expected, rtol=1e-9)


def test_chunks_reach_over_samples_that_annotate_the_same_and_into_no_others(monkeypatch):
    monkeypatch.setattr(segkit.chunks, "CHUNK_PIXELS", 8)
    generator = torch.Generator().manual_seed(0)
    annotated = torch.tensor([[True, True, False], [True, True, False], [False, True, True]])
    table = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]]).bool().expand(3, -1, -1)
    targets = Targets(torch.randint(0, 4, (3, 2, 3), generator=generator), table, annotated)
    plan = Plan(targets, LOSSES["bce_dice"])
    assert plan.cuts == [(0, 8, 0), (8, 12, 0), (12, 18, 1)]  # three samples of six pixels
    members = (targets.dense() & annotated[:, :, None, None]).movedim(1, -1).flatten(0, -2)  # (pixel, channel)
    assert torch.equal(torch.stack([plan.pixel, plan.channel], 1), members.nonzero())
    assert plan.ends == [int(members[:stop].sum()) for _, stop, _ in plan.cuts]
    features = torch.randn(3, 4, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    head, weight = nn.Conv2d(4, 3, 1).double(), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    inputs = [features, head.weight, head.bias]
    for terms in (LOSSES["bce_dice"], LOSSES["focal"]):
        ours = torch.autograd.grad(head_loss(features, head, targets, weight, terms), inputs)
        theirs = torch.autograd.grad(dense_terms(features, head, targets, weight, terms), inputs)
        assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    features, head, targets, weight = random_case(11)

    def loss(x, w, b):
        replica = nn.Conv2d(*head.weight.shape[1::-1], 1).double()
        replica.weight, replica.bias = nn.Parameter(w), nn.Parameter(b)
        del replica.weight, replica.bias
        replica.weight, replica.bias = w, b
        return head_loss(x, replica, targets, weight, LOSSES[name])

    assert torch.autograd.gradcheck(loss, (features, head.weight, head.bias))


@pytest.mark.parametrize("device", DEVICES)
def test_float32_and_bfloat16_are_as_exact_as_the_dense_path(device):
    features, head, targets, weight = moved(random_case(3), device)
    exact = dense_loss(features, head, targets, weight)
    exact_gradient = torch.autograd.grad(exact, features)[0]
    single = [features.detach().float().requires_grad_(), head.float(), targets, weight.float()]
    loss = head_loss(*single)
    assert torch.allclose(loss, exact.float(), rtol=1e-5)
    gradient = torch.autograd.grad(loss, single[0])[0]
    assert torch.allclose(gradient, exact_gradient.float(), rtol=1e-5, atol=1e-7)
    low = features.detach().bfloat16().requires_grad_()
    loss = head_loss(low, head, targets, weight.float())
    with torch.autocast(device, torch.bfloat16):
        dense_low = F.binary_cross_entropy_with_logits(
            head(low).float(), targets.dense().float(), pos_weight=weight.float()[:, None, None], reduction="none"
        )[targets.annotated[:, :, None, None].expand(-1, -1, *low.shape[2:])].mean()
    assert abs(loss - exact) <= 2 * abs(dense_low - exact) + 1e-3


@pytest.mark.parametrize("name", ["bce", "bce_dice"])
@pytest.mark.parametrize("device", DEVICES)
def test_float16_gradients_survive_with_a_loss_scale(device, name):
    """At 2e7 terms 1 / number is below what float16 can hold, and so is a gradient times it."""
    features, head, targets, weight = moved(random_case(9, torch.float32), device)
    number = annotated_number(targets) * (20_000_000 // int(annotated_number(targets)))
    scale = 65536.0
    inputs = [features, head.weight, head.bias]
    low = features.detach().half().requires_grad_()
    loss = head_loss(low, head, targets, weight, LOSSES[name], number)
    ours = torch.autograd.grad(loss * scale, [low, *inputs[1:]])
    assert [g.dtype for g in ours] == [torch.float16, torch.float32, torch.float32]
    exact = low.detach().double().requires_grad_()
    wide = nn.Conv2d(head.in_channels, head.out_channels, 1, device=device).double()
    wide.load_state_dict(head.state_dict())
    inputs = [exact, wide.weight, wide.bias]
    expected = head_loss(exact, wide, targets, weight.double(), LOSSES[name], number)
    theirs = torch.autograd.grad(expected * scale, inputs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        # half a step of float16, and of its smallest numbers
        assert torch.allclose(a.double(), b, rtol=2**-11 if a.dtype == torch.float16 else 1e-5, atol=2**-25)


@pytest.mark.parametrize("shift", [-30.0, -9.0, 0.0, 9.0, 30.0])
def test_the_shared_logarithm_is_as_good_as_one_each(shift):
    z = torch.randn(1003, 5) + shift
    exact = F.softplus(z.double()).sum().item()
    assert segkit.head._softplus_sum(z.clone(), torch.sigmoid(z), z.clone()).item() == pytest.approx(exact, rel=2e-6)


def test_the_same_input_gives_the_same_bits():
    features, head, targets, weight = random_case(3, torch.float32)
    inputs = [features, head.weight, head.bias]
    first, second = (
        torch.autograd.grad(head_loss(features, head, targets, weight, LOSSES["bce_dice"]), inputs) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_batch_without_any_annotation_gives_zero_and_no_gradient():
    features, head, targets, weight = random_case(2)
    empty = Targets(targets.codes, targets.codebook, torch.zeros_like(targets.annotated))
    for terms in LOSSES.values():
        loss = head_loss(features, head, empty, weight, terms)
        assert loss == 0 and annotated_number(empty) == 0
        assert not torch.autograd.grad(loss, features)[0].any()


def test_without_gradients_none_are_computed():
    features, head, targets, weight = random_case(7)
    with torch.no_grad():
        loss = head_loss(features, head, targets, weight)
    assert loss.grad_fn is None
    assert torch.allclose(loss, dense_loss(features, head, targets, weight))


def dense_terms(features, head, targets, weight, terms):
    """The definitions written out on dense planes, for autograd to differentiate."""
    z, y = head(features), targets.dense().to(features.dtype)
    annotated = targets.annotated[:, :, None, None].to(z.dtype)
    p = torch.sigmoid(z)
    modulated = y * weight[:, None, None] * (1 - p) ** terms.gamma * F.softplus(-z)
    modulated = modulated + (1 - y) * p**terms.gamma * F.softplus(z)
    entropy = (modulated * annotated).sum() / (annotated.sum() * z[0, 0].numel())
    planes = (p * annotated, y * annotated)
    both, sizes = (planes[0] * planes[1]).sum((0, 2, 3)), sum(plane.sum((0, 2, 3)) for plane in planes)
    there = planes[1].sum((0, 2, 3)) > 0
    dice = ((2 * both + 1) / (sizes + 1))[there]
    return terms.bce * entropy + (terms.dice * (1 - dice.mean()) if there.any() else 0)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(LOSSES)))
def test_every_loss_equals_its_definition_with_every_gradient(device, seed, name):
    features, head, targets, weight = moved(random_case(seed), device)
    inputs = [features, head.weight, head.bias]
    loss = head_loss(features, head, targets, weight, LOSSES[name])
    expected = dense_terms(features, head, targets, weight, LOSSES[name])
    assert torch.allclose(loss, expected, rtol=1e-9)
    ours, theirs = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_dice_and_focal_agree_with_monai():
    from monai.losses import DiceLoss, FocalLoss

    features, head, targets, _ = random_case(4)
    targets = Targets(targets.codes, targets.codebook, torch.ones_like(targets.annotated))
    z, y = head(features), targets.dense().to(features.dtype)
    one = torch.ones(z.shape[1], dtype=z.dtype)
    there = y.sum((0, 2, 3)) > 0
    dice = DiceLoss(sigmoid=True, batch=True, include_background=True, smooth_nr=1, smooth_dr=1)
    assert torch.allclose(head_loss(features, head, targets, one, LOSSES["dice"]), dice(z[:, there], y[:, there]))
    focal = FocalLoss(gamma=2.0, include_background=True)
    ours = head_loss(features, head, targets, one, LOSSES["focal"])
    assert ours.item() == pytest.approx(focal(z, y).item(), 1e-5)


def test_a_batch_in_parts_gives_the_gradient_of_the_whole():
    features, head, targets, weight = random_case(6)
    number = annotated_number(targets)
    whole = torch.autograd.grad(head_loss(features, head, targets, weight), head.weight)[0]
    parts = [
        torch.autograd.grad(
            head_loss(
                features[i : i + 1],
                head,
                Targets(targets.codes[i : i + 1], targets.codebook[i : i + 1], targets.annotated[i : i + 1]),
                weight,
                number=number,
            ),
            head.weight,
        )[0]
        for i in range(len(features))
    ]
    assert torch.allclose(sum(parts), whole, rtol=1e-9)


def test_model_with_loss_trains_all_parameters():
    model = ModelWithLoss(UNet2D(1, 3, (4, 8)), torch.ones(3))
    targets = Targets(torch.randint(0, 2, (2, 8, 8)), torch.tensor([[[0, 0, 0], [1, 0, 1]]] * 2).bool(),
                      torch.tensor([[True, True, False]] * 2))  # fmt: skip
    loss = model(torch.randn(2, 1, 8, 8), targets)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.network.head.weight.grad[2].abs().max() == 0  # not annotated: no gradient


def test_frequencies_weights_and_start_bias_by_hand():
    voxels = [({"a": 9, "b": 0}, 98), ({"a": 0, "other": 5}, 100)]
    f = structure_frequencies(voxels, {"a": 0, "b": 1, "never": 2})
    assert f.tolist() == [10 / 200, 1 / 100, 1 / 2]
    w = positive_weights(f, cap=5)
    assert w.tolist() == pytest.approx([math.sqrt(20), 5, math.sqrt(2)])
    head = nn.Conv2d(1, 3, 1)
    start_bias(head, f, w)
    start = [wi * fi / (wi * fi + 1 - fi) for wi, fi in zip(w.tolist(), f.tolist(), strict=True)]
    assert torch.sigmoid(head.bias).tolist() == pytest.approx(start, rel=1e-5)
    # it is where the loss of a constant output has its minimum: the gradient over such data is 0
    bias = torch.tensor(math.log(start[0] / (1 - start[0])), dtype=torch.float64, requires_grad=True)
    (f[0] * w[0] * F.softplus(-bias) + (1 - f[0]) * F.softplus(bias)).backward()
    assert abs(bias.grad) < 1e-9
