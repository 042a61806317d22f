"""Training-time augmentation of uint8 images, with torchvision's v2 functions where they are fast.

Mosaic, zoom and shift are one step: the pictures lie on a plane, and a window of the images' proportions is
cut out of it. Pixels that do not appear in the result are never computed. All randomness comes from the
generator that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as v2

from sparse_exp.config.imgsz import Sides
from sparse_exp.config.schema import AugmentConfig
from sparse_exp.data.letterbox import PADDING

_MIN_SIDE = 2.0  # px; smaller boxes teach nothing
_MOST_COVERED = 0.3  # share of an object that a pasted one may cover
_MIN_VISIBLE = 0.15  # share of a box's area that must lie in the window
_GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision


class Example(NamedTuple):
    """One image with its boxes.

    Attributes:
        image: uint8 RGB ``(3, H, W)``.
        boxes: float32 ``(M, 4)``: x1, y1, x2, y2 in pixels.
        classes: float32 ``(M,)``: class ids.
        picture: left, top, right and bottom edge, px, of what is not the grey of the letterbox; None: all of
            it is picture.
    """

    image: Tensor
    boxes: Tensor
    classes: Tensor
    picture: tuple[int, int, int, int] | None = None

    def without_grey(self) -> Example:
        """The picture alone; its sides may differ."""
        if self.picture is None:
            return self
        left, top, right, bottom = self.picture
        boxes = self.boxes - torch.tensor([left, top, left, top])
        return Example(self.image[:, top:bottom, left:right], boxes, self.classes)


def augment_example(examples: Sequence[Example], config: AugmentConfig, draw: np.random.Generator) -> Example:
    """A random variant of one image, or of four in a mosaic.

    Args:
        examples: one image, or four for a mosaic; all of one size.
        config: probabilities and strengths.
        draw: source of all randomness.

    Returns:
        An image of the same size. Boxes are clipped to it; those that shrink below 2 px or keep
        less than 15 % of their area are dropped.
    """
    example = _flip(_random_window(examples, config, draw), config, draw)
    if config.degrees or config.shear:
        limits = np.array([config.degrees, config.shear, config.shear])
        example = turn(example, *draw.uniform(-limits, limits))
    if draw.random() < config.jitter:
        limits = np.array([config.brightness, config.contrast, config.saturation, config.hue])
        brightness, contrast, saturation, hue = draw.uniform(-limits, limits)
        image = jitter_colours(example.image, 1 + brightness, 1 + contrast, 1 + saturation, hue)
        example = example._replace(image=image)
    return example


def _random_window(examples: Sequence[Example], config: AugmentConfig, draw: np.random.Generator) -> Example:
    size = Sides(*examples[0].image.shape[-2:])
    half = np.array([size.width / 2, size.height / 2])
    zoom = draw.uniform(1 - config.scale, 1 + config.scale)
    window = Sides(*(max(1, round(side / zoom)) for side in size))
    if len(examples) == 1:
        places, centre = [(0, 0)], half
    else:
        # As in the mosaic of YOLOv5, four pictures, without grey, meet with a corner anywhere in the result.
        examples = [example.without_grey() for example in examples]
        shapes = [(example.image.shape[2], example.image.shape[1]) for example in examples]
        signs = [(-1, -1), (0, -1), (-1, 0), (0, 0)]
        places = [(a * width, b * height) for (a, b), (width, height) in zip(signs, shapes, strict=True)]
        centre = draw.uniform(-half, half)
    shift = draw.uniform(-config.translate, config.translate, 2) * (2 * half)
    middle = np.array([window.width / 2, window.height / 2])
    x, y = (int(edge) for edge in np.rint(centre + shift - middle))
    return crop_window(list(zip(examples, places, strict=True)), x, y, window, size)


def crop_window(
    pieces: Sequence[tuple[Example, tuple[int, int]]], x: int, y: int, window: Sides, size: Sides
) -> Example:
    """Cut a window out of a plane on which pictures lie, and scale it.

    Args:
        pieces: pictures with x, y of their upper left corner on the plane, px.
        x: left edge of the window, px.
        y: upper edge of the window, px.
        window: its height and width, px. Where it shows no picture it is grey.
        size: height and width of the result, px; of the window's proportions.

    Returns:
        The scaled window and the boxes that are visible in it.
    """
    canvas = torch.full((3, *window), PADDING, dtype=torch.uint8)
    boxes, classes = [], []
    for example, (left, top) in pieces:
        left, top = left - x, top - y
        _paste(canvas, example.image, left, top)
        boxes.append(example.boxes + torch.tensor([left, top, left, top]))
        classes.append(example.classes)
    kept, clipped = _clip(torch.cat(boxes), window, size)
    image: Tensor = canvas
    if window != size:
        image = v2.resize(canvas, list(size), antialias=window > size)
        scaled = tv_tensors.BoundingBoxes(clipped, format="XYXY", canvas_size=tuple(window))
        clipped = v2.resize(scaled, list(size)).as_subclass(Tensor)
    return Example(image, clipped, torch.cat(classes)[kept])


def _paste(canvas: Tensor, image: Tensor, left: int, top: int) -> None:
    """Copy an image into a canvas, cut where it reaches beyond the edges."""
    height, width = image.shape[-2:]
    lower, right = canvas.shape[-2:]
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + width, right), min(top + height, lower)
    if x1 < x2 and y1 < y2:
        canvas[:, y1:y2, x1:x2] = image[:, y1 - top : y2 - top, x1 - left : x2 - left]


def _clip(boxes: Tensor, window: Sides, size: Sides) -> tuple[Tensor, Tensor]:
    """Which boxes are kept (M,), and the kept ones clipped to the window (K, 4)."""
    limits = torch.tensor([window.width, window.height] * 2)
    scale = torch.tensor([size.width / window.width, size.height / window.height])
    clipped = boxes.clamp(min=0).minimum(limits)
    before, after = boxes[:, 2:] - boxes[:, :2], clipped[:, 2:] - clipped[:, :2]
    kept = ((after * scale).amin(1) >= _MIN_SIDE) & (after.prod(1) >= _MIN_VISIBLE * before.prod(1))
    return kept, clipped[kept]


def _flip(example: Example, config: AugmentConfig, draw: np.random.Generator) -> Example:
    image, boxes, classes, _ = example
    framed = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
    # All three numbers are always drawn, so that switching one flip off changes no other randomness.
    leftright, updown, swap = draw.random(3)
    if leftright < config.fliplr:
        image, framed = v2.horizontal_flip(image), v2.horizontal_flip(framed)
    if updown < config.flipud:
        image, framed = v2.vertical_flip(image), v2.vertical_flip(framed)
    boxes = framed.as_subclass(Tensor)
    if swap < config.transpose:
        image, boxes = image.transpose(-1, -2).contiguous(), boxes[:, [1, 0, 3, 2]]
    return Example(image, boxes, classes)


def turn(example: Example, degrees: float, shear_x: float = 0.0, shear_y: float = 0.0) -> Example:
    """Rotate and shear an image about its centre.

    Args:
        example: the image; where nothing of it is shown, the result is grey.
        degrees: from the x axis to the y axis, which points down.
        shear_x: degrees by which vertical edges lean.
        shear_y: degrees by which horizontal edges lean.

    Returns:
        An image of the same size. A box is what encloses the turned one; see `augment_example` for those
        that are dropped.
    """
    height, width = example.image.shape[-2:]
    half = torch.tensor([width / 2, height / 2])
    angle, lean, tilt = (math.radians(each) for each in (degrees, shear_x, shear_y))
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = rotation @ torch.tensor([[1.0, math.tan(lean)], [math.tan(tilt), 1.0]])
    back = torch.linalg.inv(matrix) * half / half[:, None]  # shares of the half sides
    grid = affine_grid(
        torch.cat([back, torch.zeros(2, 1)], 1)[None], [1, 3, height, width], align_corners=False
    )
    pixels = example.image[None].float() - PADDING  # beyond the edges grid_sample takes 0
    turned = (grid_sample(pixels, grid, align_corners=False)[0] + (PADDING + 0.5)).to(torch.uint8)
    corners = (example.boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].view(-1, 4, 2) - half) @ matrix.T + half
    size = Sides(height, width)
    kept, boxes = _clip(torch.cat([corners.amin(1), corners.amax(1)], 1), size, size)
    return Example(turned, boxes, example.classes[kept])


def mix(first: Example, second: Example, draw: np.random.Generator) -> Example:
    """Lay one image over another, as in mixup; the boxes of both stay.

    Args:
        first: an image.
        second: another of the same size.
        draw: source of the share of each, near a half: Beta(32, 32).
    """
    share = float(draw.beta(32.0, 32.0))
    image = first.image * share + second.image * (1 - share) + 0.5
    boxes, classes = torch.cat([first.boxes, second.boxes]), torch.cat([first.classes, second.classes])
    return Example(image.to(torch.uint8), boxes, classes)


def paste_objects(example: Example, other: Example, share: float, draw: np.random.Generator) -> Example:
    """Paste objects of another image, each as the content of its box, at its place there.

    Args:
        example: the image; it is not changed.
        other: another of the same size.
        share: of its objects that are tried, 0..1. One that would cover 30 % or more of any object, or does
            not lie within the picture, is left out.
        draw: source of the choice.
    """
    image, boxes, classes = example.image.clone(), example.boxes, example.classes
    height, width = image.shape[-2:]
    left, top, right, bottom = example.picture or (0, 0, width, height)
    for index in np.flatnonzero(draw.random(len(other.boxes)) < share):
        box = other.boxes[index]
        x1, y1, x2, y2 = (int(edge) for edge in (*box[:2].floor(), *box[2:].ceil()))
        inside = left <= x1 < x2 <= right and top <= y1 < y2 <= bottom
        if inside and not (_covered(boxes, torch.tensor([x1, y1, x2, y2])) >= _MOST_COVERED).any():
            image[:, y1:y2, x1:x2] = other.image[:, y1:y2, x1:x2]
            boxes, classes = torch.cat([boxes, box[None]]), torch.cat([classes, other.classes[index, None]])
    return Example(image, boxes, classes, example.picture)


def _covered(boxes: Tensor, by: Tensor) -> Tensor:
    """Share of the area of each box (M, 4) that another one covers (M,)."""
    overlap = (boxes[:, 2:].minimum(by[2:]) - boxes[:, :2].maximum(by[:2])).clamp(min=0).prod(1)
    return overlap / (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-9)


def jitter_colours(
    image: Tensor, brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0
) -> Tensor:
    """Change colours by one affine map of RGB.

    Brightness, contrast and saturation are those of torchvision's ``adjust_*``, in this order, without its
    rounding and clipping between the steps. The hue is changed by a rotation around the grey axis;
    torchvision's way through HSV would take ten times as long as everything else here.

    Args:
        image: uint8 RGB ``(3, H, W)``.
        brightness: factor; 1 changes nothing.
        contrast: factor; 1 changes nothing.
        saturation: factor; 1 changes nothing.
        hue: rotation as a share of the colour circle; 0 changes nothing.

    Returns:
        uint8 ``(3, H, W)``.
    """
    grey = torch.tensor(_GREY_WEIGHTS)
    pixels = image.reshape(3, -1).float()
    mean_grey = float(grey @ pixels.mean(1)) * brightness
    colour = saturation * torch.eye(3) + (1 - saturation) * grey.expand(3, 3)
    matrix = brightness * contrast * (_hue_rotation(hue) @ colour)
    bias = (1 - contrast) * mean_grey + 0.5  # half a step, because the cast to uint8 rounds down
    return (matrix @ pixels).add_(bias).clamp_(0, 255).to(torch.uint8).view_as(image)


def _hue_rotation(share: float) -> Tensor:
    """The rotation (3, 3) around the grey axis (1, 1, 1); a third of the circle turns red into green."""
    angle = 2 * math.pi * share
    along = torch.full((3, 3), 1 / 3)
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    return math.cos(angle) * torch.eye(3) + math.sin(angle) * across + (1 - math.cos(angle)) * along
