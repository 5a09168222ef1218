"""`CVFM`: the operation with its parameters."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fila_kernels import dispatch
from fila_kernels.call import grid_side
from fila_kernels.functional import NAMES, crop_resize, cvfm
from fila_kernels.reference import gated
from fila_kernels.validation import check_integer, check_settings, check_tensors


class CVFM(nn.Module):
    """ConvNeXt-ViT deep fusion module: ``X + tanh(alpha * MLP([X ; resize(crop(F))]))``, see `fila_kernels.cvfm`.

    Args:
        token_width: D. feature_width: C. hidden_width: H, D if None (the paper says "a small MLP"; D is our choice).
        num_prefix_tokens: P class tokens that pass through.
        gate: "product" (as the paper writes it) or "scale".
        plan, backend, recompute: as in `fila_kernels.cvfm`.

    State dict: ``fc1.weight [H, D + C]``, ``fc1.bias``, ``fc2.weight [D, H]``, ``fc2.bias``, ``alpha [1]``. `alpha`
    starts at 0, so that a fresh module returns its tokens unchanged.

    `fc1` and `fc2` may be replaced (LoRA, quantised or sharded layers): the module then calls them instead of reading
    their weights, and says so in `fallback_reason`.

    Raises:
        ValueError: a width below 1, or a setting of another type or name than those of `fila_kernels.cvfm`.

    Example:
        >>> fuse = CVFM(token_width=8, feature_width=6)
        >>> tokens, features = torch.randn(1, 1 + 16, 8), torch.randn(1, 6, 12, 12)
        >>> boxes, image_index = torch.tensor([[0.0, 0.0, 12.0, 12.0]]), torch.tensor([0])
        >>> out = fuse(tokens, features.permute(0, 2, 3, 1), boxes, image_index)
        >>> torch.equal(out, tokens)
        True
    """

    def __init__(
        self,
        token_width: int,
        feature_width: int,
        hidden_width: int | None = None,
        *,
        num_prefix_tokens: int = 1,
        gate: str = "product",
        plan: str | None = None,
        backend: str | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_width = token_width if hidden_width is None else hidden_width
        check_integer("token_width", token_width, 1)
        check_integer("feature_width", feature_width, 1)
        check_integer("hidden_width", hidden_width, 1)
        check_integer("num_prefix_tokens", num_prefix_tokens, 0)
        check_settings(gate, plan, recompute)
        if backend is not None:
            dispatch.requested(backend)
        self.num_prefix_tokens, self.gate = num_prefix_tokens, gate
        self.plan, self.backend, self.recompute = plan, backend, recompute
        self.fc1: nn.Module = nn.Linear(token_width + feature_width, hidden_width, device=device, dtype=dtype)
        self.fc2: nn.Module = nn.Linear(hidden_width, token_width, device=device, dtype=dtype)
        self.alpha = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Start anew: a module made on the meta device and materialised by `to_empty` is then a fresh one."""
        for layer in (self.fc1, self.fc2):
            reset = getattr(layer, "reset_parameters", None)
            if reset is None:
                raise RuntimeError(f"a {type(layer).__name__} has no reset_parameters; reset before replacing layers")
            reset()
        nn.init.zeros_(self.alpha)

    @property
    def fallback_reason(self) -> str | None:
        """Why the fused operation cannot be used, or None where it is."""
        for name in ("fc1", "fc2"):
            layer = getattr(self, name)
            if type(layer) is not nn.Linear:
                return f"{name} is a {type(layer).__name__}, whose weight cannot stand for what it computes"
            if "forward" in vars(layer):
                return f"{name} has a forward of its own, which only a call runs"
            if hasattr(type(layer.weight), "__tensor_flatten__"):  # quantised or sharded: other tensors beneath
                return f"{name}.weight is a {type(layer.weight).__name__}, which only a call can read"
            if layer.bias is None:
                return f"{name} has no bias"
            if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
                return f"{name} has hooks, which only a call runs"
        return None

    def forward(self, tokens: Tensor, features: Tensor, boxes: Tensor, image_index: Tensor) -> Tensor:
        """[T, P + N, D] tokens, [B, h, w, C] maps, [T, 4] boxes in cells, [T] image of each tile: the fused tokens."""
        if self.fallback_reason is not None:
            return self._forward_by_layers(tokens, features, boxes, image_index)
        fc1, fc2 = cast(nn.Linear, self.fc1), cast(nn.Linear, self.fc2)
        return cvfm(
            tokens, features, boxes, image_index, fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.alpha,
            num_prefix_tokens=self.num_prefix_tokens, gate=self.gate, plan=self.plan, backend=self.backend,
            recompute=self.recompute,
        )  # fmt: skip

    def _forward_by_layers(self, tokens: Tensor, features: Tensor, boxes: Tensor, image_index: Tensor) -> Tensor:
        check_tensors(NAMES[:4], (tokens, features, boxes, image_index))
        if tokens.dim() != 3 or tokens.shape[0] != boxes.shape[0]:
            raise ValueError(
                f"tokens: expected shape [T, P + N, D] with T = {boxes.shape[0]} (as boxes), got {list(tokens.shape)}"
            )
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        size = grid_side(patches.shape[1])
        sampled = crop_resize(features, boxes, image_index, size, backend=self.backend).flatten(1, 2)
        branch = self.fc2(F.gelu(self.fc1(torch.cat([patches, sampled], dim=-1))))
        return torch.cat([prefix, patches + gated(branch, self.alpha, self.gate)], dim=1)

    def extra_repr(self) -> str:
        return f"num_prefix_tokens={self.num_prefix_tokens}, gate={self.gate!r}"
