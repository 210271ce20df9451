"""Named conventions: how published tables count a decoder's operations, bytes and seconds.

They are not meant to be exact: each keeps its source's oddities, so that its tables can be
reproduced. Both leave out the vision encoder, the projector, embeddings and rotations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from planner.ir.cost.device_table import Device
from planner.ir.cost.price import Cost, total
from planner.ir.cost.workload import Workload
from planner.ir.errors import InputError, check_known
from planner.ir.graph import Graph, Operator
from planner.ir.kinds import kind_of

_ELEMENT_BYTES = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a convention's account, for one sample."""

    name: str
    operations: int
    activations: int = 0  # elements read and written
    weights: int = 0  # elements read, whatever the number of samples
    once: int = 0  # elements of activations that are counted for one sample, however many there are
    cached: int = 0  # elements left in the KV cache
    layer: int | None = None  # decoder layer, None outside the stack

    def cost(self, device: Device | None = None, batch: int = 1) -> Cost:
        """Cost for a batch, with seconds where there is a device."""
        operations = batch * self.operations
        moved = (self.weights + self.once + batch * self.activations) * _ELEMENT_BYTES
        seconds, bound = device.roofline(operations, moved) if device else (0.0, "-")
        return Cost(
            flops=operations,
            bytes=moved,
            seconds=seconds,
            kv_bytes=batch * self.cached * _ELEMENT_BYTES,
            parameters=self.weights,
            bound=bound,
        )


class Convention(ABC):
    """A published way to count.

    Token counts are given layer by layer, since token stages change them on the way; 0 stands for
    a layer that is off. A graph specialised to a plan is counted as it is.
    """

    name: ClassVar[str]
    has_seconds: ClassVar[bool] = True

    @abstractmethod
    def rows(self, graph: Graph, tokens: Sequence[int], decodes: bool = False) -> Iterable[Row]:
        """What is counted, for one sample, of a prefill or of a step that `decodes`.

        Tokens are as for `cost`. InputError where the graph is outside the convention.
        """

    def tokens(
        self, graph: Graph, load: Workload, kept: Mapping[int, int] | None = None, step: int = 0
    ) -> list[int]:
        """Tokens of each decoder layer of a prefill, or of a decoding step from 1 on.

        `kept` are image tokens left after a token stage, by its layer.
        """
        running = {o.layer for o in graph if o.part == "decoder" and o.layer is not None}
        images, counts = load.image_tokens, []
        for layer in range(graph.layers):
            images = (kept or {}).get(layer, images)
            counts.append(self.counted(load, images, step) if layer in running else 0)
        return counts

    def counted(self, load: Workload, images: int, step: int) -> int:
        """Tokens of a layer to which so many image tokens are left."""
        return load.text_tokens + images + step

    def cost(
        self,
        graph: Graph,
        tokens: Sequence[int],
        device: Device | None = None,
        batch: int = 1,
        decodes: bool = False,
    ) -> Cost:
        """Cost of a prompt of so many tokens in each decoder layer, shape (layers,).

        Of a step that `decodes`, tokens are those that the new one attends to, and itself. The
        device is for seconds. InputError where the graph or the device is outside the convention.
        """
        if device is not None and not self.has_seconds:
            raise InputError(f"convention {self.name} counts FLOPs alone, so it takes no device")
        return total(row.cost(device, batch) for row in self.rows(graph, tokens, decodes))


def _check_layers(graph: Graph, tokens: Sequence[int]) -> None:
    if len(tokens) != graph.layers:
        raise InputError(
            f"'{graph.name}' has {graph.layers} decoder layers, "
            f"but token counts are given for {len(tokens)}"
        )


def _hidden(graph: Graph) -> int:
    return int(graph.properties["hidden_size"])


class LlmViewer(Convention):
    """The roofline of LLM-Viewer (arXiv 2402.16363), behind AdaLLaVA's "prefill time".

    Per operator ``max(operations / peak, bytes / bandwidth)``, summed; elements of 2 bytes; no
    fused attention: scores are written and read back. Oddities that are kept: the queries read by
    q k^T are counted with the width of the keys (not when decoding), the activation and the product
    of an MLP with the hidden size instead of the MLP's width, lm_head with one operation per
    multiply-add and with the activations of one sample, whatever the batch; and a decoding step
    behind P tokens attends to P, not to itself.
    """

    name = "llm-viewer"

    @override
    def rows(self, graph: Graph, tokens: Sequence[int], decodes: bool = False) -> Iterator[Row]:
        _check_layers(graph, tokens)
        keys = [max(0, count - decodes) for count in tokens]
        layers: dict[int, None] = {}
        running = {n: 1 if decodes else count for n, count in enumerate(tokens) if count}
        for operator in graph:
            layer = operator.layer
            if operator.part == "decoder" and layer is not None and layer in running:
                layers[layer] = None
                yield from _operator_rows(operator, running[layer], keys[layer], decodes)
            elif operator.part == "head" and operator.kind == "linear":
                read, written = operator.integer("in"), operator.integer("out")
                weights = read * written
                # sic: not twice the weights
                yield Row(operator.name, weights, weights=weights, once=read + written)
        for layer in layers:
            width = running[layer] * _hidden(graph)
            for name in ("attention_norm", "mlp_norm"):
                yield Row(name, 7 * width, 2 * width, layer=layer)
            for name in ("attention_add", "mlp_add"):
                yield Row(name, width, 2 * width, layer=layer)
            yield Row("mlp_activation", 2 * width, 3 * width, layer=layer)


def _operator_rows(operator: Operator, queries: int, keys: int, decodes: bool) -> Iterator[Row]:
    """Rows of one operator of a decoder layer."""
    kind, name, layer = operator.kind, operator.name, operator.layer
    if kind in ("linear", "fused_linear", "norm_linear"):
        read, written = operator.integer("in"), operator.integer("out")
        weights = read * written
        moved = (read + written) * queries
        yield Row(name, 2 * weights * queries, moved, weights, layer=layer)
    elif kind == "attention":
        head = operator.integer("head_dim")
        heads, kv_heads = operator.integer("heads"), operator.integer("kv_heads")
        products = 2 * queries * keys * heads * head
        scores = queries * keys * heads
        cached = keys * head * kv_heads
        # sic: queries have as many heads as scores, not as keys
        read = queries * head * (heads if decodes else kv_heads)
        written = queries * head * heads
        moved = read + cached + scores
        yield Row(f"{name}.qk", products, moved, cached=cached, layer=layer)
        moved = scores + cached + written
        yield Row(f"{name}.sv", products, moved, cached=cached, layer=layer)
        yield Row(f"{name}.softmax", 5 * scores, 2 * scores, layer=layer)
    elif kind_of(operator).flops and kind != "select_tokens":
        raise InputError(f"convention llm-viewer has no row for {name}, of kind {kind}")


class DynamicLlava(Convention):
    """The FLOPs of Dynamic-LLaVA (arXiv 2412.00876, Table 10): image tokens alone.

    A layer costs ``32 N C^2 + 4 N^2 C`` for N tokens of hidden size C: an MLP four times as wide
    as the hidden state is assumed, whatever the model's, and lm_head is left out. FLOPs are all
    that it counts.
    """

    name = "dynamic-llava"
    has_seconds = False

    @override
    def counted(self, load: Workload, images: int, step: int) -> int:
        return step or images

    @override
    def rows(self, graph: Graph, tokens: Sequence[int], decodes: bool = False) -> Iterator[Row]:
        """Of a step that decodes: of a whole answer, by the same formula over its tokens alone."""
        _check_layers(graph, tokens)
        width = _hidden(graph)
        for layer, count in enumerate(tokens):
            if count:
                flops = 32 * count * width**2 + 4 * count**2 * width
                yield Row(f"layer.{layer}", flops, layer=layer)


# Name -> convention.
CONVENTIONS: Mapping[str, Convention] = {c.name: c for c in (LlmViewer(), DynamicLlava())}


def convention(name: str) -> Convention:
    """One convention by name; InputError lists the known ones."""
    check_known("convention", name, CONVENTIONS)
    return CONVENTIONS[name]
