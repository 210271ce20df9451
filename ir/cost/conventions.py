"""Named conventions: how published tables count a decoder's operations, bytes and seconds.

They are not exact and not meant to be: each keeps its source's oddities, so that its tables can be
reproduced and compared with `planner.ir.cost.price`. Both leave out the vision encoder, the
projector, embeddings and rotations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from planner.ir.cost.device_table import Device
from planner.ir.cost.price import Cost, roofline, total
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Operator

__all__ = ["Convention", "DynamicLlava", "LlmViewer", "Row", "convention", "conventions"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a convention's account; `Cost.flops` are operations as the convention counts."""

    name: str
    layer: int | None
    cost: Cost


class Convention(ABC):
    """A published way to count.

    Token counts are given layer by layer, since token stages change them on the way; 0 stands for
    a layer that is off. A graph specialised to a plan is counted as it is.
    """

    name: str
    source: str

    def prefill(
        self,
        graph: Graph,
        tokens_per_layer: Sequence[int],
        device: Device | None = None,
        batch: int = 1,
    ) -> Cost:
        """Cost of computing a prompt.

        Args:
            graph: lowered model; its structure alone is read.
            tokens_per_layer: tokens that each decoder layer computes, shape (layers,).
            device: for seconds.
            batch: samples.

        Raises:
            InputError: where the graph or the arguments are outside the convention.
        """
        rows = self.prefill_rows(graph, tokens_per_layer, device, batch)
        return total(row.cost for row in rows)

    @abstractmethod
    def prefill_rows(
        self,
        graph: Graph,
        tokens_per_layer: Sequence[int],
        device: Device | None = None,
        batch: int = 1,
    ) -> list[Row]:
        """The rows that `prefill` sums."""

    @abstractmethod
    def decode(
        self,
        graph: Graph,
        tokens_per_layer: Sequence[int],
        device: Device | None = None,
        batch: int = 1,
    ) -> Cost:
        """Cost of decoding; what `tokens_per_layer` means is the convention's."""


def _checked(graph: Graph, tokens_per_layer: Sequence[int]) -> Sequence[int]:
    if len(tokens_per_layer) != graph.layers:
        raise InputError(
            f"'{graph.name}' has {graph.layers} decoder layers, "
            f"but token counts are given for {len(tokens_per_layer)}"
        )
    return tokens_per_layer


class LlmViewer(Convention):
    """The roofline of LLM-Viewer (arXiv 2402.16363), behind AdaLLaVA's "prefill time".

    Per operator ``max(operations / peak, bytes / bandwidth)``, summed; elements of 2 bytes; no
    fused attention: scores are written and read back. Oddities that are kept: the queries read by
    q k^T are counted with the width of the keys, the activation and the product of an MLP with the
    hidden size instead of the MLP's width, and lm_head with one operation per multiply-add.
    """

    name = "llm-viewer"
    source = "LLM Inference Unveiled: Survey and Roofline Model Insights, arXiv 2402.16363"
    element_bytes = 2

    def prefill_rows(
        self,
        graph: Graph,
        tokens_per_layer: Sequence[int],
        device: Device | None = None,
        batch: int = 1,
    ) -> list[Row]:
        """The rows that `prefill` sums, operator by operator."""
        counts = [(tokens, tokens) for tokens in _checked(graph, tokens_per_layer)]
        return self._rows(graph, counts, device, batch)

    def decode(
        self,
        graph: Graph,
        tokens_per_layer: Sequence[int],
        device: Device | None = None,
        batch: int = 1,
    ) -> Cost:
        """Cost of one decoding step.

        Args:
            graph: lowered model.
            tokens_per_layer: tokens that the new one attends to in each layer, itself included.
            device: for seconds.
            batch: samples.
        """
        rows = self.decode_rows(graph, tokens_per_layer, device, batch)
        return total(row.cost for row in rows)

    def decode_rows(
        self,
        graph: Graph,
        tokens_per_layer: Sequence[int],
        device: Device | None = None,
        batch: int = 1,
    ) -> list[Row]:
        """The rows that `decode` sums: the prefill's with one query."""
        counts = [(min(1, tokens), tokens) for tokens in _checked(graph, tokens_per_layer)]
        return self._rows(graph, counts, device, batch)

    def _rows(
        self,
        graph: Graph,
        counts: Sequence[tuple[int, int]],
        device: Device | None,
        batch: int,
    ) -> list[Row]:
        by_layer: dict[int, list[Operator]] = {}
        for operator in graph:
            if operator.part == "decoder" and operator.layer is not None:
                by_layer.setdefault(operator.layer, []).append(operator)
        rows: list[Row] = []
        for layer, (queries, keys) in enumerate(counts):
            if queries and layer in by_layer:
                for part in _layer_parts(by_layer[layer], _hidden(graph), queries, keys):
                    rows.append(self._row(part, layer, device, batch))
        for operator in graph:
            if operator.part == "head":
                rows.append(self._row(_head_part(operator), None, device, batch))
        return rows

    def _row(self, part: _Part, layer: int | None, device: Device | None, batch: int) -> Row:
        operations = batch * part.operations
        moved = (part.weights + batch * part.activations) * self.element_bytes
        seconds, bound = roofline(operations, moved, device) if device else (0.0, "-")
        cost = Cost(
            flops=operations,
            bytes=moved,
            seconds=seconds,
            kv_bytes=batch * part.cached * self.element_bytes,
            parameters=part.weights,
            bound=bound,
        )
        return Row(part.name, layer, cost)


@dataclass(frozen=True, slots=True)
class _Part:
    """One row for one sample: operations, and elements moved or kept."""

    name: str
    operations: int
    activations: int
    weights: int = 0
    cached: int = 0


def _layer_parts(
    operators: Sequence[Operator], hidden: int, queries: int, keys: int
) -> Iterator[_Part]:
    """Rows of one decoder layer for one sample."""
    for operator in operators:
        if operator.kind in ("linear", "fused_linear", "norm_linear"):
            yield _linear_part(operator, queries)
        elif operator.kind == "attention":
            yield from _attention_parts(operator, queries, keys)
        elif operator.kind in ("experts", "scan", "matmul", "conv"):
            raise InputError(
                f"convention llm-viewer has no row for {operator.name}, of kind {operator.kind}"
            )
    width = queries * hidden
    for name in ("attention_norm", "mlp_norm"):
        yield _Part(name, 7 * width, 2 * width)
    for name in ("attention_add", "mlp_add"):
        yield _Part(name, width, 2 * width)
    yield _Part("mlp_activation", 2 * width, 3 * width)


def _linear_part(operator: Operator, rows: int) -> _Part:
    read, written = operator.integer("in"), operator.integer("out")
    weights = read * written
    return _Part(operator.name, 2 * weights * rows, (read + written) * rows, weights)


def _attention_parts(operator: Operator, queries: int, keys: int) -> Iterator[_Part]:
    head = operator.integer("head_dim")
    heads, kv_heads = operator.integer("heads"), operator.integer("kv_heads")
    products = 2 * queries * keys * heads * head
    scores = queries * keys * heads
    cached = keys * head * kv_heads
    read = queries * head * kv_heads  # sic: queries have as many heads as scores, not as keys
    yield _Part(f"{operator.name}.qk", products, read + cached + scores, cached=cached)
    written = queries * head * heads
    yield _Part(f"{operator.name}.sv", products, scores + cached + written, cached=cached)
    yield _Part(f"{operator.name}.softmax", 5 * scores, 2 * scores)


def _head_part(operator: Operator) -> _Part:
    read, written = operator.integer("in"), operator.integer("out")
    weights = read * written
    return _Part(operator.name, weights, read + written, weights)  # sic: not twice the weights


class DynamicLlava(Convention):
    """The FLOPs of Dynamic-LLaVA (arXiv 2412.00876, Table 10): image tokens alone.

    A layer costs ``32 N C^2 + 4 N^2 C`` for N tokens of hidden size C: an MLP four times as wide
    as the hidden state is assumed, whatever the model's, and lm_head is left out. FLOPs are all
    that it counts.
    """

    name = "dynamic-llava"
    source = "Dynamic-LLaVA, arXiv 2412.00876, Table 10"

    def prefill_rows(
        self,
        graph: Graph,
        tokens_per_layer: Sequence[int],
        device: Device | None = None,
        batch: int = 1,
    ) -> list[Row]:
        """The rows that `prefill` sums, one per layer; tokens are image tokens."""
        if device is not None:
            raise InputError("convention dynamic-llava counts FLOPs alone, so it takes no device")
        width = _hidden(graph)
        return [
            Row(f"layer.{layer}", layer, Cost(flops=batch * _layer_flops(tokens, width)))
            for layer, tokens in enumerate(_checked(graph, tokens_per_layer))
            if tokens
        ]

    def decode(
        self,
        graph: Graph,
        tokens_per_layer: Sequence[int],
        device: Device | None = None,
        batch: int = 1,
    ) -> Cost:
        """FLOPs of a whole answer: the prefill's formula over the generated tokens alone."""
        return self.prefill(graph, tokens_per_layer, device, batch)


def _layer_flops(tokens: int, width: int) -> int:
    return 32 * tokens * width**2 + 4 * tokens**2 * width


def _hidden(graph: Graph) -> int:
    return int(graph.properties["hidden_size"])


_CONVENTIONS: Mapping[str, Convention] = {c.name: c for c in (LlmViewer(), DynamicLlava())}


def conventions() -> Mapping[str, Convention]:
    """All conventions by name."""
    return _CONVENTIONS


def convention(name: str) -> Convention:
    """One convention by name; InputError lists the known ones."""
    if name not in _CONVENTIONS:
        raise InputError(f"unknown convention '{name}': choose one of {', '.join(_CONVENTIONS)}")
    return _CONVENTIONS[name]
