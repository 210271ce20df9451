"""MobileVLM's LDP-v2 (arXiv 2402.03766): a mean over squares, and a convolution for places."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from planner.models.projectors.projector import Projector, Sizes, tokens_of


class LdpV2(Projector):
    """LLaVA's MLP on every patch, the mean over squares, and a depthwise convolution beside it."""

    counts, default = "side", 12

    def __init__(self, sizes: Sizes, number: int) -> None:
        super().__init__(sizes, number)
        text_width = sizes.text_width
        self.first = nn.Linear(sizes.width, text_width)
        self.second = nn.Linear(text_width, text_width)
        self.mean = nn.AdaptiveAvgPool2d(number)
        self.places = nn.Conv2d(text_width, text_width, 3, padding=1, groups=text_width)

    @override
    def forward(self, features: Tensor) -> Tensor:
        patches = self.second(nn.functional.gelu(self.first(features)))
        image = self.mean(self.image_of(patches))
        return tokens_of(image) + tokens_of(self.places(image))
