"""What public model libraries need to be imported where torchvision has no compiled operators: test support only."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) -> (Tensor, Tensor)",
    "ps_roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) -> (Tensor, Tensor)",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, SymInt pad_h, "
    "SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor",
)
_LIBRARY = None


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression; boxes are (x1, y1, x2, y2)."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order, keep = scores.argsort(descending=True), []
    while order.numel():
        first, order = order[0], order[1:]
        keep.append(first)
        low = torch.maximum(boxes[first, :2], boxes[order, :2])
        high = torch.minimum(boxes[first, 2:], boxes[order, 2:])
        inner = (high - low).clamp(min=0).prod(dim=1)
        order = order[inner / (area[first] + area[order] - inner) <= iou_threshold]
    return torch.stack(keep) if keep else torch.empty(0, dtype=torch.long)


def roi_align(x, rois, scale, height, width, ratio, aligned):
    """Bilinear samples at the centre of each bin (enough to run a detector's heads)."""
    out = []
    for roi in rois:
        x1, y1, x2, y2 = (roi[1:] * scale).unbind()
        xs = x1 + (torch.arange(width) + 0.5) / width * (x2 - x1)
        ys = y1 + (torch.arange(height) + 0.5) / height * (y2 - y1)
        grid = torch.stack(torch.meshgrid(xs / x.shape[3] * 2 - 1, ys / x.shape[2] * 2 - 1, indexing="xy"), dim=-1)
        out.append(torch.nn.functional.grid_sample(x[int(roi[0])][None], grid[None].to(x.dtype), align_corners=False)[0])
    return torch.stack(out) if out else x.new_zeros(0, x.shape[1], height, width)


def compiled() -> bool:
    """Whether torchvision brings operators that this torch can load."""
    spec = importlib.util.find_spec("torchvision")
    try:
        for path in Path(spec.submodule_search_locations[0]).glob("_C*.so") if spec else ():
            torch.ops.load_library(path)
            return True
    except OSError:
        pass
    return False


def declare_operators() -> None:
    """Declare torchvision's compiled operators where it has none, with small Python kernels where a detector needs them."""
    global _LIBRARY
    if _LIBRARY is None and not compiled():
        _LIBRARY = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            _LIBRARY.define(schema)
        _LIBRARY.impl("nms", nms, "CPU")
        _LIBRARY.impl("roi_align", roi_align, "CPU")
        import torchvision.extension

        torchvision.extension._has_ops = lambda: True


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter and statistic random, so that nothing is degenerate; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.is_meta:
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if "var" in name:
                tensor.copy_(1 + 0.2 * noise.abs())
            elif isinstance(tensor, torch.nn.Parameter) and tensor.ndim > 1:
                fan = tensor[0].numel()
                tensor.copy_(noise * fan**-0.5)
            elif isinstance(tensor, torch.nn.Parameter):
                tensor.copy_(1 + 0.2 * noise if tensor.mean() > 0.5 else 0.1 * noise)
            elif "mean" in name:
                tensor.copy_(0.1 * noise)
    return model.eval()
