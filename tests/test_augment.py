"""Each operation does what its paper says, to the share of images that the strength says, and to nothing else."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from hrgan import augment as module
from hrgan.augment import LENGTH, adapted, augment, expanded
from hrgan.checks import problems
from hrgan.config import ADA, AUGMENTATIONS, DIFFAUGMENT, AugmentConfig, Config, LossConfig
from tests.test_step import CountReads

ALWAYS, NEVER = torch.tensor(1.0), torch.tensor(0.0)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    """From U(-1, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def uniforms(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, LENGTH, generator=torch.Generator().manual_seed(seed))


def chosen(**values: Sequence[float]) -> Tensor:
    """(1, LENGTH): each operation's numbers after its first, which says that it happens."""
    numbers = torch.full((1, LENGTH), 0.5)
    for op, given in values.items():
        first = module._FIRST[op]
        numbers[0, first : first + module._DRAWS[op]] = torch.tensor([0, *given])
    return numbers


def once(op: str, image: Tensor, *values: float, strength: Tensor = ALWAYS) -> Tensor:
    """(C, H, W) -> (C, H, W): an operation with numbers of its own."""
    return augment(image[None], chosen(**{op: values}), strength, (op,))[0]


def tail(sigmas: float) -> float:
    """The uniform number that becomes this normal one."""
    return NormalDist().cdf(sigmas)


def mirror_index(size: int, by: int) -> list[int]:
    """Where pixels come from after a shift, mirrored at the centres of the outermost pixels."""
    places = (abs(place - by) % (2 * size - 2) for place in range(size))
    return [min(place, 2 * size - 2 - place) for place in places]


# Geometry


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 7), (4, 8, 12), (3, 13, 6)])
def test_flips_quarter_turns_and_shifts_by_pixels_copy_pixels_exactly(shape: tuple[int, int, int]) -> None:
    image = pictures(*shape)
    assert torch.equal(once("flip", image, 0.49), image.flip(2))
    assert torch.equal(once("flip", image, 0.5), image)
    turned = [once("rotate90", image, turn) for turn in (0.1, 0.3, 0.6, 0.9)]
    if shape[1] == shape[2]:
        assert all(torch.equal(turned[k], image.rot90(k, (1, 2))) for k in range(4))
    else:
        assert all(torch.equal(turned[k], image.rot90(k // 2 * 2, (1, 2))) for k in range(4))
    for u, v in ((0.01, 0.5), (0.99, 0.2), (0.5, 0.99)):
        x, y = round((2 * u - 1) * shape[2] / 8), round((2 * v - 1) * shape[1] / 8)
        expected = image[:, mirror_index(shape[1], y)][:, :, mirror_index(shape[2], x)]
        assert torch.equal(once("translate", image, u, v), expected)


def test_pixels_are_copied_exactly_by_the_bilinear_way_too() -> None:
    """Beside fractional operations that do not happen, at a size where float32 rounds."""
    images, numbers = pictures(16, 3, 100, 100), uniforms(16)
    for op in ("scale", "rotate", "rotate_again", "anisotropic", "shift"):
        numbers[:, module._FIRST[op]] = 0.999
    whole = augment(images, numbers, torch.tensor(0.9), ("flip", "rotate90", "translate"))
    assert not torch.equal(whole, images)
    assert torch.equal(augment(images, numbers, torch.tensor(0.9), ADA[:7]), whole)


def test_geometry_is_done_in_the_paper_s_order() -> None:
    image = pictures(3, 16, 16)
    numbers = chosen(flip=[0.1], rotate90=[0.3], translate=[0.9, 0.1])
    step = once("translate", once("rotate90", once("flip", image, 0.1), 0.3), 0.9, 0.1)
    found = augment(image[None], numbers, ALWAYS, ("translate", "flip", "rotate90"))[0]
    assert torch.equal(found, step)


def ramp(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Each pixel's place from the centre: x and y, (H, W)."""
    x, y = torch.arange(width) - (width - 1) / 2, torch.arange(height) - (height - 1) / 2
    return x.expand(height, width), y[:, None].expand(height, width)


def inner(image: Tensor) -> Tensor:
    """Away from edges that are mirrored in."""
    h, w = image.shape[-2:]
    return image[..., h * 3 // 8 : h * 5 // 8, w * 3 // 8 : w * 5 // 8]


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_fractional_transforms_move_a_plane_as_they_say(size: tuple[int, int]) -> None:
    """Bilinear is exact on x and y themselves, so the output is the place that each pixel comes from."""
    height, width = size
    x, y = ramp(height, width)
    plane = torch.stack([x, y, x - y])

    def came_from(op: str, *values: float) -> Tensor:
        return inner(once(op, plane, *values))

    def expect(found: Tensor, x: Tensor, y: Tensor) -> None:
        torch.testing.assert_close(found, inner(torch.stack([x, y, x - y])), atol=2e-5, rtol=1e-5)

    expect(came_from("scale", tail(1)), x / 2**0.2, y / 2**0.2)
    expect(came_from("scale", tail(-1)), x * 2**0.2, y * 2**0.2)
    expect(came_from("anisotropic", tail(1)), x / 2**0.2, y * 2**0.2)
    expect(came_from("shift", tail(0.5), tail(-0.7)), x - 0.5 * width / 8, y + 0.7 * height / 8)


@pytest.mark.parametrize("which", ["rotate", "rotate_again"])
def test_an_image_is_turned_about_its_centre(which: str) -> None:
    x, y = ramp(32, 32)
    numbers = chosen(**{which: [0.5 + 30 / 360]})
    numbers[:, module._FIRST["rotate_again" if which == "rotate" else "rotate"]] = 1
    found = augment(torch.stack([x, y, x + y])[None], numbers, ALWAYS, ("rotate",))[0]
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))
    expected = torch.stack([cos * x - sin * y, sin * x + cos * y])
    torch.testing.assert_close(inner(found[:2]), inner(expected), atol=2e-5, rtol=1e-5)


def test_a_quarter_turn_by_angle_is_the_quarter_turn() -> None:
    image = pictures(3, 16, 16)
    numbers = chosen(rotate=[0.75])
    numbers[:, module._FIRST["rotate_again"]] = 1
    found = augment(image[None], numbers, ALWAYS, ("rotate",))[0]
    torch.testing.assert_close(found, image.rot90(1, (1, 2)), atol=1e-4, rtol=0)


def test_what_comes_in_is_the_mirrored_image() -> None:
    image = pictures(1, 8, 8)
    found = once("shift", image, tail(3), 0.5)  # By 3 pixels to the right.
    torch.testing.assert_close(found, image[:, :, [3, 2, 1, 0, 1, 2, 3, 4]], atol=1e-4, rtol=0)
    far = once("scale", image, 2**-25)  # Shrunk to half: over two periods of the mirrored image.
    assert far.isfinite().all()
    assert far.abs().max() <= image.abs().max()


# Colour


def test_brightness_contrast_and_the_flip_of_luma_follow_their_formulas() -> None:
    for channels in (1, 3):
        image = pictures(channels, 5, 6)
        torch.testing.assert_close(once("brightness", image, tail(1.5)), image + 0.3)
        torch.testing.assert_close(once("contrast", image, tail(-2)), image / 2, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(once("luma_flip", image, 0.4), image - 2 * image.mean(0))
        assert torch.equal(once("luma_flip", image, 0.6), image)


def test_hue_turns_colours_and_keeps_their_luma_and_saturation() -> None:
    image = pictures(3, 5, 6)
    red, green, blue = image
    for third, expected in ((1, [blue, red, green]), (-1, [green, blue, red])):
        torch.testing.assert_close(once("hue", image, 0.5 + third / 3), torch.stack(expected), atol=1e-5, rtol=0)
    turned = once("hue", image, 0.6)
    torch.testing.assert_close(turned.mean(0), image.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close((turned - turned.mean(0)).norm(dim=0), (image - image.mean(0)).norm(dim=0))
    pure = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 4, 4)
    hue = colorsys.rgb_to_hsv(*once("hue", pure, 0.5 + 1 / 6)[:, 0, 0].clamp(0).tolist())[0]
    assert hue == pytest.approx(1 / 6, abs=1e-5)  # Yellow, as hues are counted.


def test_saturation_moves_colours_from_their_grey() -> None:
    image = pictures(3, 5, 6)
    grey = image.mean(0)
    torch.testing.assert_close(once("saturation", image, tail(1)), grey + 2 * (image - grey), atol=1e-5, rtol=0)


def test_all_of_ada_s_colour_together_is_one_after_the_other() -> None:
    image, numbers = pictures(3, 5, 6), uniforms(1)
    expected = image[None]
    for op in ("brightness", "contrast", "luma_flip", "hue", "saturation"):
        expected = augment(expected, numbers, ALWAYS, (op,))
    torch.testing.assert_close(augment(image[None], numbers, ALWAYS, ADA[7:]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_is_diffaugment_s_brightness_saturation_and_contrast_in_turn(channels: int) -> None:
    image = pictures(channels, 5, 6)
    for b, s, c in ((0.9, 0.5, 0.5), (0.5, 0.1, 0.5), (0.5, 0.5, 0.8), (0.9, 0.2, 0.1)):
        expected = image + b - 0.5
        expected = expected.mean(0) + 2 * s * (expected - expected.mean(0))
        expected = expected.mean() + (c + 0.5) * (expected - expected.mean())
        torch.testing.assert_close(once("color", image, b, s, c), expected, atol=1e-6, rtol=1e-5)


def test_hue_and_saturation_leave_grey_images_as_they_are() -> None:
    grey = pictures(4, 1, 8, 8)
    assert torch.equal(augment(grey, uniforms(4), ALWAYS, ("hue", "saturation")), grey)


@pytest.mark.parametrize("op", ["color", "brightness", "contrast", "luma_flip", "hue", "saturation"])
def test_colours_change_as_without_an_alpha_which_stays(op: str) -> None:
    images, numbers = pictures(8, 4, 6, 6), uniforms(8)
    found = augment(images, numbers, ALWAYS, (op,))
    assert torch.equal(found[:, 3], images[:, 3])
    assert not torch.equal(found[:, :3], images[:, :3])
    assert torch.equal(found[:, :3], augment(images[:, :3], numbers, ALWAYS, (op,)))


@pytest.mark.parametrize("op", [*ADA[:7], "translation", "cutout"])
def test_alpha_moves_with_the_image(op: str) -> None:
    images = pictures(8, 1, 16, 16).expand(8, 4, 16, 16)
    found = augment(images, uniforms(8), ALWAYS, (op,))
    assert not torch.equal(found, images)
    assert torch.equal(found[:, :1].expand_as(found), found)


# Rectangles


def test_cutout_empties_half_the_sides_about_its_centre() -> None:
    image = torch.ones(3, 16, 24)
    expected = image.clone()
    expected[:, 4:12, 6:18] = 0
    assert torch.equal(once("cutout", image, 0.5, 0.5), expected)
    expected = image.clone()
    expected[:, 12:, :6] = 0
    assert torch.equal(once("cutout", image, 0.0, 1.0), expected)
    shares = 1 - augment(torch.ones(4000, 1, 16, 16), uniforms(4000), ALWAYS, ("cutout",)).mean((1, 2, 3))
    # A side loses 1/2 less what lies outside: 1/8 x 2 ends x 1/4 on average; both sides are independent.
    assert shares.mean().item() == pytest.approx((1 / 2 - 1 / 16) ** 2, rel=0.02)


def test_translation_shifts_zeros_in_and_takes_each_shift_equally_often() -> None:
    image = pictures(3, 16, 32)
    found = once("translation", image, 0.999, 0.001)  # 4 to the right, 2 up.
    expected = torch.zeros_like(image)
    expected[:, :14, 4:] = image[:, 2:, :28]
    assert torch.equal(found, expected)
    assert torch.equal(once("translation", image, 1 - 2**-24, 0.5), once("translation", image, 0.999, 0.5))
    places = torch.arange(1.0, 17).view(1, 1, 1, 16).expand(5000, 1, 4, 16)
    shifts = 8 - augment(places, uniforms(5000), ALWAYS, ("translation",))[:, 0, 2, 7].long()
    assert sorted(shifts.unique().tolist()) == [-2, -1, 0, 1, 2]
    for shift in range(-2, 3):
        assert (shifts == shift).float().mean().item() == pytest.approx(0.2, abs=0.02)


# Strength


@pytest.mark.parametrize("shape", [(6, 1, 4, 4), (6, 3, 16, 16), (6, 4, 12, 20), (6, 3, 37, 5)])
def test_without_strength_nothing_changes(shape: tuple[int, ...]) -> None:
    images, numbers = pictures(*shape), uniforms(6)
    numbers[0] = 0  # Even where the number is the least that can be drawn.
    for strength in (NEVER, NEVER.view(1)):
        assert torch.equal(augment(images, numbers, strength, AUGMENTATIONS), images)


@pytest.mark.parametrize("op", AUGMENTATIONS)
def test_an_operation_happens_to_the_share_of_images_that_the_strength_says(op: str) -> None:
    images, numbers = pictures(3, 8, 8).expand(4000, 3, 8, 8), uniforms(4000)
    # These leave a share of the images as they are though they happen: 1/2; 1/4; one shift of (1/4 + 1/2 + 1/4)².
    idle = {"flip": 1 / 2, "luma_flip": 1 / 2, "rotate90": 1 / 4, "translate": 1 / 4, "translation": 1 / 9}.get(op, 0)
    for p in (0.3, 1.0):
        found = augment(images, numbers, torch.tensor([p]), (op,))
        changed = (found != images).flatten(1).any(1).float().mean().item()
        assert changed == pytest.approx(p * (1 - idle), abs=0.025)


def test_quarter_turns_below_full_strength_mix_with_weights_that_can_be_undone() -> None:
    """p = .8: upright with 1 - .8 x 3/4 = .4, each turn with .2; a circulant of (.4, .2, .2, .2) is invertible. At p =
    1 all are .25 and which way is up is lost: that leaks."""
    image, numbers = pictures(1, 4, 4), uniforms(20_000)
    turned = torch.stack([image.rot90(k, (1, 2)) for k in range(4)])
    for p, weights in ((0.8, [0.4, 0.2, 0.2, 0.2]), (1.0, [0.25] * 4)):
        found = augment(image.expand(20_000, 1, 4, 4), numbers, torch.tensor(p), ("rotate90",))
        counts = [(found == one).flatten(1).all(1).float().mean().item() for one in turned]
        assert counts == pytest.approx(weights, abs=0.012)
        expected = (turned * torch.tensor(weights).view(4, 1, 1, 1)).sum(0)
        torch.testing.assert_close(found.mean(0), expected, atol=0.03, rtol=0)


def test_normal_numbers_are_normal_and_finite_at_the_ends() -> None:
    values = module._normal(torch.rand(200_000, generator=torch.Generator().manual_seed(2)))
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.std().item() == pytest.approx(1, abs=0.01)
    assert values.abs().gt(2).float().mean().item() == pytest.approx(0.0455, abs=0.002)
    ends = module._normal(torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == pytest.approx([-5.4, 5.3], abs=0.15)


# In a batch, differentiated, on the device


@pytest.mark.parametrize("ops", [(op,) for op in AUGMENTATIONS] + [AUGMENTATIONS])
def test_an_image_does_not_depend_on_the_others_of_its_batch(ops: Sequence[str]) -> None:
    images, numbers, strength = pictures(6, 3, 12, 12), uniforms(6), torch.tensor(0.7)
    alone = torch.cat([augment(images[i : i + 1], numbers[i : i + 1], strength, ops) for i in range(6)])
    torch.testing.assert_close(augment(images, numbers, strength, ops), alone, atol=1e-6, rtol=1e-6)


def test_an_operation_does_not_depend_on_what_else_is_listed_or_in_which_order() -> None:
    images, numbers = pictures(6, 3, 12, 12), uniforms(6)
    both = augment(images, numbers, ALWAYS, ("cutout", "brightness"))
    assert torch.equal(both, augment(augment(images, numbers, ALWAYS, ("brightness",)), numbers, ALWAYS, ("cutout",)))
    assert torch.equal(both, augment(images, numbers, ALWAYS, ("brightness", "cutout")))
    assert augment(images, numbers, ALWAYS, ()) is images


def test_layouts_in_memory_make_no_difference() -> None:
    images, numbers = pictures(6, 4, 12, 8), uniforms(6)
    last = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        augment(last, numbers, ALWAYS, AUGMENTATIONS), augment(images, numbers, ALWAYS, AUGMENTATIONS)
    )


@pytest.mark.parametrize("ops", [(op,) for op in AUGMENTATIONS] + [DIFFAUGMENT, ADA])
def test_gradients_of_first_and_second_order_are_exact(ops: Sequence[str]) -> None:
    images = pictures(2, 3, 4, 5).double().requires_grad_(True)
    numbers, strength = uniforms(2), torch.tensor(0.9)

    def bent(x: Tensor) -> Tensor:  # Augmentations are affine: only what is around them has a second derivative.
        return augment(x.sin(), numbers, strength, ops).square()

    assert torch.autograd.gradcheck(bent, (images,), atol=1e-5)
    assert torch.autograd.gradgradcheck(bent, (images,), atol=1e-5)


def test_a_penalty_through_the_augmentation_reaches_the_critic() -> None:
    """D(T x) = w . T x has the gradient T'w: the penalty's own gradient by w is 2 T T'w."""
    numbers = uniforms(1)
    unit = torch.eye(3 * 6 * 6).view(-1, 3, 6, 6)
    ops = tuple(op for op in AUGMENTATIONS if op != "brightness")  # A constant is no part of the matrix.
    numbers[:, module._FIRST["color"] + 1] = 0.5  # Nor is this.
    matrix = augment(unit, numbers.expand(len(unit), LENGTH), ALWAYS, ops).flatten(1).T  # T
    weight = pictures(108, seed=3).requires_grad_(True)
    images = pictures(1, 3, 6, 6).requires_grad_(True)
    score = augment(images, numbers, ALWAYS, ops).flatten() @ weight
    (gradient,) = torch.autograd.grad(score, images, create_graph=True)
    torch.testing.assert_close(gradient.flatten(), matrix.T @ weight, atol=1e-4, rtol=1e-4)
    gradient.square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * matrix @ (matrix.T @ weight.detach()), atol=1e-4, rtol=1e-4)


def test_nothing_is_read_back_to_the_host() -> None:
    images, numbers = pictures(4, 3, 8, 8).requires_grad_(True), uniforms(4)
    with CountReads() as counter:
        strength = adapted(torch.tensor([0.5]), torch.tensor(0.7), 0.6, 16, 500, 0.8)
        augment(images, numbers, strength, AUGMENTATIONS).square().sum().backward()
    assert counter.reads == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_nothing_waits_and_what_comes_out_is_as_on_the_cpu() -> None:
    cpu, numbers, strength = pictures(4, 3, 8, 8), uniforms(4), torch.tensor(0.9)
    images, on_gpu, at = cpu.cuda().requires_grad_(True), numbers.cuda(), strength.cuda()
    augment(images, on_gpu, at, AUGMENTATIONS).square().sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augment(images, on_gpu, at, AUGMENTATIONS)
        found.square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), augment(cpu, numbers, strength, AUGMENTATIONS), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_gradients_are_the_same_each_time_where_asked() -> None:
    images, numbers = pictures(8, 3, 64, 64).cuda().requires_grad_(True), uniforms(8).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        scores = [augment(images, numbers, ALWAYS.cuda(), AUGMENTATIONS).square().sum() for _ in range(2)]
        first, again = (torch.autograd.grad(score, images)[0] for score in scores)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, again)


# Control and configuration


def test_the_strength_follows_the_sign_of_overfitting_at_its_pace_and_within_its_bounds() -> None:
    def after(strength: float, sign: float, most: float = 1.0) -> float:
        return adapted(torch.tensor([strength]), torch.tensor(sign), 0.6, 256, 500, most).item()

    step = 256 / 500_000
    assert after(0.3, 0.7) == pytest.approx(0.3 + step, abs=1e-7)
    assert after(0.3, 0.5) == pytest.approx(0.3 - step, abs=1e-7)
    assert after(0.3, 0.6) == pytest.approx(0.3, abs=1e-7)
    assert after(0.3, math.nan) == pytest.approx(0.3, abs=1e-7)
    assert after(0.0, -1.0) == 0
    assert after(0.8, 1.0, most=0.8) == pytest.approx(0.8)
    strength = torch.tensor(0.0)
    for _ in range(500 * 1000 // 2500):
        strength = adapted(strength, torch.tensor(1.0), 0.6, 2500, 500)
    assert strength.item() == pytest.approx(1, abs=1e-5)  # From 0 to 1 in 500 kimg.


def test_the_two_usual_lists_have_names_and_others_are_refused() -> None:
    assert expanded(["ada", "cutout"]) == (*ADA, "cutout")
    assert expanded(["cutout", "diffaugment"]) == ("cutout", "color", "translation")
    assert set(AUGMENTATIONS) == set(module._DRAWS) - {"rotate_again"}
    with pytest.raises(ValueError, match="mosaic: no operation"):
        expanded(["flip", "mosaic"])


LOGISTIC = LossConfig("logistic")


def test_the_configuration_s_problems_are_named_with_what_is_near() -> None:
    def found(loss: LossConfig = LOGISTIC, **values: object) -> str:
        return "\n".join(problems(Config(loss=loss, augment=AugmentConfig(**values))))  # type: ignore[arg-type]

    assert found() == found(ops=["diffaugment"], strength=1.0) == found(ops=["ada", "cutout"], target=0.6) == ""
    assert "augment.ops: rotate45 is none of color," in found(ops=["rotate45"], strength=1.0)
    assert found(ops=["rotate45"], strength=1.0).endswith("; nearest: rotate")
    nothing = "augment.strength: 0 does nothing; nearest:"
    relativistic = LossConfig("relativistic", r1_gamma=1.0)
    assert found(ops=["ada"]) == found(relativistic, ops=["ada"]) == f"{nothing} augment.target: 0.6"
    assert found(relativistic, ops=["ada"], target=0.6) == ""
    wasserstein = LossConfig("wasserstein")
    assert "augment.target: 0.6, but under loss.kind wasserstein" in found(wasserstein, ops=["ada"], target=0.6)
    assert found(ops=["color", "cutout"]) == found(relativistic, ops=["diffaugment"]) == f"{nothing} 1"
    assert found(wasserstein, ops=["ada"]) == f"{nothing} ramp.augment: 0.3, with ramp.kimg"
    assert "augment.ops: empty" in found(target=0.6)
    assert "augment.strength: 1.5 is above the most, 1" in found(ops=["ada"], strength=1.5)
    assert "augment.strength: -0.5 is below the least, 0" in found(ops=["ada"], strength=-0.5)
    assert "augment.strength: 0.9 is above augment.most; nearest: 0.8" in found(ops=["ada"], strength=0.9, target=0.6)
    assert "augment.target: 2.0 is above the most, 1" in found(ops=["ada"], target=2.0)
    assert "augment.adapt_kimg: 0.0 must be above 0" in found(ops=["ada"], target=0.6, adapt_kimg=0.0)
    assert "augment.most: 1.5 is above the most, 1" in found(ops=["ada"], target=0.6, most=1.5)
