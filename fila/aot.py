"""Compiles the hybrid encoder into a package that C++ runs without Python, by torch.export and AOTInductor.

    python -m fila.aot --out encoder.pt2                     # the shipped fila-nano
    python -m fila.aot --model FOLDER --out encoder.pt2 --picture page.png --inputs inputs.pt

`--inputs` writes the package's inputs for one picture, as a list of tensors that `torch::pickle_load` reads;
examples/cpp holds the program that runs both. Making the package takes a C++ compiler; running it takes
libfila_kernels.so, the library of the CVFM's operator.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fila.checkpoints.load import load
from fila.images import load_image
from fila.vision import FilaVisionModel, ViewGroup
from fila_kernels import aot as kernels_aot


class Encoder(nn.Module):
    """`FilaVisionModel` for pictures of one raster size; it takes and returns tensors only and looks at no value."""

    def __init__(self, model: FilaVisionModel) -> None:
        super().__init__()
        if model.convnext is None:
            raise ValueError("expected an encoder with fusion='deep', got one without a ConvNeXt")
        self.model = model

    def forward(self, views: Tensor, rasters: Tensor, boxes: Tensor, image_index: Tensor) -> Tensor:
        """T views of B pictures to their tokens.

        Args:
            views: [T, 3, tile, tile], in any order.
            rasters: [B, 3, h, w], h and w multiples of the last stage's stride.
            boxes: [T, 4] float32 y0, x0, y1, x1 of every view on its picture's raster, in raster pixels.
            image_index: [T] int32 or int64, the picture of every view.

        Returns: [T, 1 + N, D].
        """
        strides = self.model.config.convnext_strides
        group = ViewGroup(
            images=[],  # of a batch, which is all in this one group
            raster=(rasters.shape[2], rasters.shape[3]),
            boxes=[boxes / stride for stride in strides],
            image_index=image_index,
        )
        return self.model.encode(views, [rasters], [group])


def encoder_inputs(model: FilaVisionModel, pixels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs of `Encoder`, from the processor's tensors of pictures of one canvas.

    Args:
        pixels: `pixel_values`, `high_res_pixel_values` and `image_sizes` as `FilaImageProcessor` returns them.

    Raises:
        ValueError: pictures of several canvases.
    """
    layouts = model.layouts(pixels["pixel_values"], pixels["high_res_pixel_values"], pixels["image_sizes"])
    canvases = {layout.canvas for layout in layouts}
    if len(canvases) > 1:
        raise ValueError(f"expected pictures of one canvas, got {sorted(canvases)}")
    height, width = layouts[0].raster
    views = [pixels["pixel_values"][i, : layout.num_views] for i, layout in enumerate(layouts)]
    index = [i for i, layout in enumerate(layouts) for _ in range(layout.num_views)]
    return (
        torch.cat(views),
        pixels["high_res_pixel_values"][:, :, :height, :width].contiguous(),
        torch.tensor([box for layout in layouts for box in layout.boxes(1)], dtype=torch.float32),
        torch.tensor(index, dtype=torch.int32),
    )


def example_inputs(model: FilaVisionModel, pictures: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty pictures that fill the largest canvas, in the shapes and dtypes of `Encoder`'s arguments."""
    geometry = model.config.geometry()
    layout = geometry.layout(*max(geometry.canvases, key=lambda canvas: canvas[0] * canvas[1]))
    parameter = model.vit.embeddings.patch_embedding.weight
    return (
        parameter.new_zeros(pictures * layout.num_views, 3, geometry.tile, geometry.tile),
        parameter.new_zeros(pictures, 3, *layout.raster),
        torch.tensor(layout.boxes(1) * pictures, dtype=torch.float32),
        torch.arange(pictures, dtype=torch.int32).repeat_interleave(layout.num_views),
    )


def export_encoder(model: FilaVisionModel) -> ExportedProgram:
    """The encoder as a graph of ATen's and the native library's operators, on the CPU.

    Numbers of views and pictures and the rasters' sizes are free. The CVFM's plans are those that the planner chooses
    for two pictures of the largest canvas.

    Raises:
        ValueError: an encoder without fusion.
        RuntimeError: the native library is not there, or does not take the encoder's dtype or device.
    """
    tiles, pictures = Dim("tiles"), Dim("pictures")
    height, width = Dim.DYNAMIC, Dim.DYNAMIC
    with torch.no_grad():
        exported = torch.export.export(
            Encoder(model).eval(),
            example_inputs(model),
            dynamic_shapes=({0: tiles}, {0: pictures, 2: height, 3: width}, {0: tiles}, {0: tiles}),
            strict=False,
        )
    return exported.run_decompositions(kernels_aot.decompositions())


def compile_encoder(model: FilaVisionModel, package: Path) -> str:
    """Compile `export_encoder`'s graph into a package, which says in its metadata what its inputs have to be.

    The compiled code itself looks at no dtype, size or stride: whoever runs it has to, as examples/cpp does.
    """
    parameter = model.vit.embeddings.patch_embedding.weight
    metadata = {
        "fila_dtype": str(parameter.dtype).removeprefix("torch."),
        "fila_tile": str(model.config.geometry().tile),
        "fila_stride": str(model.config.convnext_strides[-1]),
    }
    return torch._inductor.aoti_compile_and_package(
        export_encoder(model), package_path=str(package), inductor_configs={"aot_inductor.metadata": metadata}
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fila.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="a checkpoint's folder; the shipped fila-nano if left out")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, required=True, help="the package, a file that ends in .pt2")
    parser.add_argument("--picture", type=Path, help="a picture to make --inputs of")
    parser.add_argument("--inputs", type=Path, help="where to write what the package takes for --picture")
    args = parser.parse_args(argv)
    if (args.picture is None) != (args.inputs is None):
        parser.error("--picture and --inputs go together")
    if args.out.suffix != ".pt2":
        parser.error(f"--out: expected a file that ends in .pt2, got {args.out}")
    model, processor = load(args.model, device="cpu", dtype=args.dtype)
    tower = model.model.vision_tower
    if args.inputs is not None:
        pixels = processor.image_processor(load_image(args.picture), return_tensors="pt")
        views, rasters, boxes, image_index = encoder_inputs(tower, pixels)
        torch.save([views.to(model.dtype), rasters.to(model.dtype), boxes, image_index], args.inputs)
    print(compile_encoder(tower, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
