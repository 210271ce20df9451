"""One row of attention per sample, averaged over heads, by which tokens are ranked."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from typing_extensions import override

from planner.kernels.ops.score_tokens import ScoreTokens
from planner.kernels.triton.kernel import Case, Kernel, require, strides, tensor_bytes
from planner.kernels.triton.launch import Launch
from planner.kernels.triton.tiles import Target, power_of_two


@triton.jit(do_not_specialize=["tokens", "kv_heads"])
def score_tokens_kernel(
    queries,  # [batch, kv_heads * GROUP, 1, HEAD_DIM], strided
    keys,  # [batch, kv_heads, tokens, HEAD_DIM], strided
    visible,  # [batch, tokens] int8
    scores,  # [batch, kv_heads, tokens] float32
    tokens,
    kv_heads,
    query_sample,  # strides, in elements
    query_head,
    key_sample,
    key_head,
    key_token,
    scale,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """scores[h, t] = sum over the heads that share KV head h of softmax_t(scale q k_t).

    Two passes over the keys: softmax sums, then probabilities. bf16, fp16 or fp32 in, float32
    inside and out.
    """
    kv_head = tl.program_id(0)
    sample = tl.program_id(1)
    keys += sample.to(tl.int64) * key_sample + kv_head.to(tl.int64) * key_head
    visible += sample.to(tl.int64) * tokens
    member = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_D)
    real_lane = lane < HEAD_DIM
    real_member = member < GROUP
    mask = real_member[:, None] & real_lane[None, :]
    start = sample.to(tl.int64) * query_sample
    row = start + (kv_head * GROUP + member).to(tl.int64) * query_head
    q = tl.load(queries + row[:, None] + lane[None, :], mask=mask, other=0.0)
    factor = scale * 1.4426950408889634  # exponentials are in base 2
    highest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for n in range(0, tokens, BLOCK_N):
        index = n + tl.arange(0, BLOCK_N)
        present = tl.load(visible + index, mask=index < tokens, other=0) != 0
        cell = index.to(tl.int64)[:, None] * key_token + lane[None, :]
        k = tl.load(keys + cell, mask=present[:, None] & real_lane[None, :], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * factor  # [BLOCK_M, BLOCK_N]
        score = tl.where(present[None, :], score, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, axis=1))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        total = total * tl.exp2(highest - shift) + tl.sum(tl.exp2(score - shift[:, None]), axis=1)
        highest = new_highest
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    inverse = tl.where(real_member & (total > 0.0), 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
    for n in range(0, tokens, BLOCK_N):
        index = n + tl.arange(0, BLOCK_N)
        present = tl.load(visible + index, mask=index < tokens, other=0) != 0
        cell = index.to(tl.int64)[:, None] * key_token + lane[None, :]
        k = tl.load(keys + cell, mask=present[:, None] & real_lane[None, :], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        share = tl.exp2(score - shift[:, None]) * inverse[:, None]
        share = tl.where(present, tl.sum(share, axis=0), 0.0)
        out = (sample * kv_heads + kv_head).to(tl.int64) * tokens + index
        tl.store(scores + out, share, mask=index < tokens)


class ScoreTokensKernel(Kernel):
    """Launches `score_tokens_kernel`."""

    function = score_tokens_kernel
    computes = ScoreTokens

    @override
    def __call__(self, inputs: ScoreTokens) -> Tensor:
        query, key, visible = inputs.query, inputs.key, inputs.visible
        batch, heads, _, head_dim = query.shape
        kv_heads, tokens = key.shape[1:3]
        require(heads % kv_heads == 0, f"{heads} heads do not share {kv_heads} KV heads evenly.")
        seen = tuple(visible.shape)
        require(seen == (batch, tokens), f"{tokens} keys, and {seen} seen.")
        query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
        scores = torch.empty(batch, kv_heads, tokens, dtype=torch.float32, device=query.device)
        visible = visible.to(torch.int8).contiguous()
        tensors = {"queries": query, "keys": key, "visible": visible, "scores": scores}
        sizes = {"tokens": tokens, "kv_heads": kv_heads, "scale": inputs.scale}
        placed = strides("query", query, "sample", "head")
        placed |= strides("key", key, "sample", "head", "token")
        constants = {
            "HEAD_DIM": head_dim,
            "GROUP": heads // kv_heads,
            "BLOCK_D": max(16, power_of_two(head_dim)),
            "BLOCK_M": max(16, power_of_two(heads // kv_heads)),
            "BLOCK_N": 64,
        }
        self.start((kv_heads, batch), tensors | sizes | placed | constants, stages=2)
        return scores.sum(dim=1) / heads

    @override
    def seconds(self, launch: Launch, target: Target) -> float:
        return target.roofline(0, tensor_bytes(launch) + launch.arguments["keys"].nbytes)

    @override
    def cases(self) -> Iterator[Case]:
        for head_dim, group in ((16, 1), (20, 3)):
            visible = torch.rand(3, 75) < 0.7
            visible[2] = False
            key = torch.randn(3, 80, 4, head_dim).transpose(1, 2)[:, :, :75]
            key.transpose(1, 2)[~visible] = torch.nan
            query = torch.randn(3, 9, 4 * group, head_dim).transpose(1, 2)[:, :, 4:5]
            yield Case(f"{group} heads share", ScoreTokens(query, key, visible, 0.3))


score_tokens = ScoreTokensKernel()
