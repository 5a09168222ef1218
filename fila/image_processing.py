"""Turns pictures into tensors: the ViT's views and the ConvNeXt's high-resolution raster, placed by `fila.geometry`.

Source: FILA (arXiv 2412.08378), section 3. Views, resampling and padding are LLaVA-NeXT's and equal those of
`transformers`' `LlavaNextImageProcessorPil` to within the tolerance of `fila.resampling`. The raster is resized from
the original picture, once, into the content rectangle times the scale. That is our choice: a second fit drifts by up to
a canvas pixel.
"""

import copy
import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.processing_utils import ImagesKwargs

from fila.geometry import LLAVA_NEXT_CANVASES, Geometry, Layout, shared_geometry
from fila.images import MAX_IMAGE_SIDE, Picture, load_picture
from fila.resampling import Pixels, normalize, place, place_normalized, resizer

# What transformers may ask of an image processor and this one always does.
ALWAYS = {"do_convert_rgb": True, "do_resize": True, "do_pad": True}
# Settings of the values, which may change per call; those of the geometry may not, since the model would not know.
PER_CALL = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample")
# Names that transformers leaves in saved settings.
GENERAL_NAMES = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}


class FilaImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """The fields of `FilaImageProcessor`, which documents them."""

    tile_size: int
    patch_size: int
    high_res_stride: int
    image_grid_pinpoints: list[list[int]]
    high_res_rule: str
    high_res_size: int
    high_res_image_mean: list[float] | None
    high_res_image_std: list[float] | None
    do_high_res: bool
    max_image_side: int


class FilaImageProcessor(BaseImageProcessor):
    """Cuts pictures into the views of the ViT and draws the raster of the ConvNeXt.

    PIL and NumPy are enough; torchvision is not needed.

    Args:
        tile_size: side of a tile and of the global view, canvas pixels.
        patch_size: side of a ViT patch, canvas pixels.
        high_res_stride: stride of the ConvNeXt's last stage, raster pixels.
        image_grid_pinpoints: allowed canvases, [height, width] in canvas pixels; by default LLaVA-NeXT's five.
        high_res_rule: "scaled", "fixed" or "direct", see `fila.geometry.Geometry`.
        high_res_size: side of the raster of the rules "fixed" and "direct", raster pixels.
        image_mean, image_std: of the views, per channel, for values in 0..1; by default CLIP's.
        high_res_image_mean, high_res_image_std: of the raster; by default those of the views.
        do_high_res: whether to draw the raster at all; a model without fusion does not read it.
        resample: PIL's filter, 3 is bicubic.
        do_rescale, rescale_factor: whether values in 0..255 are multiplied by the factor, by default 1/255, first.
        do_normalize: whether the mean is subtracted and the standard deviation divided by.
        max_image_side: largest height and width accepted, image pixels.

    Raises:
        ValueError: if the numbers do not fit together.

    Example:
        >>> processor = FilaImageProcessor()
        >>> inputs = processor(Image.new("RGB", (640, 480)), return_tensors="pt")
        >>> {name: tuple(value.shape) for name, value in inputs.items()}
        {'pixel_values': (1, 5, 3, 336, 336), 'image_sizes': (1, 2), 'high_res_pixel_values': (1, 3, 1536, 1536)}
    """

    model_input_names = ["pixel_values", "high_res_pixel_values", "image_sizes"]
    valid_kwargs = FilaImageProcessorKwargs
    backend = "pil"

    def __init__(
        self,
        tile_size: int = 336,
        patch_size: int = 14,
        high_res_stride: int = 32,
        image_grid_pinpoints: Sequence[Sequence[int]] = LLAVA_NEXT_CANVASES,
        high_res_rule: str = "scaled",
        high_res_size: int = 768,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        high_res_image_mean: Sequence[float] | None = None,
        high_res_image_std: Sequence[float] | None = None,
        do_high_res: bool = True,
        resample: int = Image.Resampling.BICUBIC,
        max_image_side: int = MAX_IMAGE_SIDE,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        self._refuse_unknown(kwargs)
        super().__init__(**kwargs)
        if not isinstance(rescale_factor, (int, float)) or not math.isfinite(rescale_factor) or not rescale_factor:
            raise ValueError(f"expected rescale_factor to be a number other than 0, got {rescale_factor!r}")
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.tile_size = tile_size
        self.patch_size = patch_size
        self.high_res_stride = high_res_stride
        # Lists, as they come back from JSON, so that a reloaded processor equals the one saved.
        self.image_grid_pinpoints = [list(canvas) for canvas in image_grid_pinpoints]
        self.high_res_rule = high_res_rule
        self.high_res_size = high_res_size
        self.image_mean = _three(image_mean, "image_mean")
        self.image_std = _three(image_std, "image_std", above=0)
        self.high_res_image_mean = _three(high_res_image_mean or image_mean, "high_res_image_mean")
        self.high_res_image_std = _three(high_res_image_std or image_std, "high_res_image_std", above=0)
        self.do_high_res = do_high_res
        if resample not in [filter.value for filter in Image.Resampling]:
            raise ValueError(f"expected resample to be one of PIL's filters, 0 to 5, got {resample!r}")
        self.resample = int(resample)
        if not isinstance(max_image_side, int) or isinstance(max_image_side, bool) or max_image_side < 1:
            raise ValueError(f"expected max_image_side to be a whole number of at least 1, got {max_image_side!r}")
        self.max_image_side = max_image_side
        _ = self.geometry  # so that numbers that do not fit fail here and not at the first picture

    @classmethod
    def from_geometry(cls, geometry: Geometry, **kwargs: Any) -> "FilaImageProcessor":
        """The processor that draws what `geometry` says; `kwargs` are the fields that geometry does not know."""
        return cls(
            tile_size=geometry.tile,
            patch_size=geometry.patch,
            high_res_stride=geometry.stride,
            image_grid_pinpoints=geometry.canvases,
            high_res_rule=geometry.rule,
            high_res_size=geometry.fixed_size,
            **kwargs,
        )

    @property
    def geometry(self) -> Geometry:
        """Canvas, tiles, raster and token count, as the model computes them too."""
        return shared_geometry(
            self.tile_size,
            self.patch_size,
            self.high_res_stride,
            tuple((height, width) for height, width in self.image_grid_pinpoints),
            self.high_res_rule,
            self.high_res_size,
        )

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Leaves sources as they are; `preprocess` reads them with every check of `fila.images`."""
        return image_url_or_urls

    def preprocess(
        self,
        images: Any,
        *,
        input_data_format: str | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Draws the views and rasters of one picture or of a nested or flat list of pictures.

        Args:
            images: anything `fila.images.read_picture` reads, or lists of it; an array of four dimensions is a list.
            input_data_format: "channels_first" or "channels_last"; needed where arrays are given.
            return_tensors: "pt" or "np"; NumPy arrays by default.
            kwargs: settings for this call: those of the values (`PER_CALL`) are applied, all others must repeat the
                processor's own. The geometry cannot change per call, since the model and the token count would not
                follow.

        Returns:
            `pixel_values` float32 [images, views, 3, tile, tile]: the global view, then the tiles row by row.
            `image_sizes` int64 [images, 2]: height and width of each picture, after EXIF rotation.
            `high_res_pixel_values` float32 [images, 3, height, width], unless `do_high_res` is off.
            Images with fewer views or a smaller raster than others are filled up with zeros, for transport only.

        Raises:
            ImageError: if a picture cannot be used.
            ValueError: if there is no picture, or a keyword asks for something else than this processor does.
        """
        drawer = self._with(kwargs)._in_one_step()
        sources = list(flatten_images(images))
        if not sources:
            raise ValueError("expected at least one image, got none")
        # One picture is decoded at a time: ten of the largest size would take 4 GB.
        drawn = [
            drawer._draw(load_picture(s, input_data_format=input_data_format, max_side=self.max_image_side))
            for s in sources
        ]
        sizes, views, rasters = zip(*drawn, strict=True)
        data = {"pixel_values": _stack(views), "image_sizes": np.array(sizes, dtype=np.int64)}
        if self.do_high_res:
            data["high_res_pixel_values"] = _stack(rasters)
        return BatchFeature(data, tensor_type=return_tensors)

    @classmethod
    def _settings(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]

    def to_dict(self) -> dict[str, Any]:
        """The settings. Marks that others have left on the processor are none, and would not load again."""
        names = {*self._settings(), *GENERAL_NAMES}
        return {name: value for name, value in super().to_dict().items() if name in names}

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        for name, value in kwargs.items():
            if name in GENERAL_NAMES or value is None:
                continue
            if name in ALWAYS and value == ALWAYS[name]:
                continue
            if name in ALWAYS:
                raise ValueError(f"expected {name} {ALWAYS[name]}, as {type(self).__name__} always does, got {value!r}")
            near = difflib.get_close_matches(name, self._settings(), 1, 0)[0]
            raise ValueError(f"expected a setting of {type(self).__name__}, got {name!r}; the nearest is {near!r}")

    def _with(self, kwargs: dict[str, Any]) -> "FilaImageProcessor":
        """This processor with the settings of one call."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        known = {*self.valid_kwargs.__required_keys__, *self.valid_kwargs.__optional_keys__, *ALWAYS}
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"expected a setting of {type(self).__name__}, got {name}={value!r}")
            own = ALWAYS.get(name, getattr(self, name, None))
            if own is None:
                raise ValueError(
                    f"{name} cannot be changed for one call: expected it left out, since nothing here depends on it, "
                    f"got {value!r}"
                )
            if name not in PER_CALL and _as_lists(value) != _as_lists(own):
                raise ValueError(
                    f"{name} cannot be changed for one call: expected {own!r}, got {value!r}; set it on the processor"
                )
        changed = {name: given[name] for name in PER_CALL if name in given}
        if all(_as_lists(value) == _as_lists(getattr(self, name)) for name, value in changed.items()):
            return self
        return type(self)(**{name: getattr(self, name) for name in self._settings()} | changed)

    def _in_one_step(self) -> "FilaImageProcessor":
        """This processor with rescaling and normalising as one step, `(value / 255 - mean) / std`."""
        factor = 255 * self.rescale_factor if self.do_rescale else 255.0
        if factor == 1 and self.do_normalize:
            return self
        one = copy.copy(self)
        for part in ("", "high_res_"):
            mean, std = f"{part}image_mean", f"{part}image_std"
            setattr(one, mean, [value / factor if self.do_normalize else 0.0 for value in getattr(self, mean)])
            setattr(one, std, [(value if self.do_normalize else 1.0) / factor for value in getattr(self, std)])
        return one

    def _draw(self, picture: Picture) -> tuple[tuple[int, int], np.ndarray, np.ndarray | None]:
        """Size, views [views, 3, tile, tile] and raster [3, height, width] of one picture."""
        layout = picture.layout(self.geometry)
        resize = resizer(picture, self.resample)
        views = self._draw_views(resize, layout)
        raster = self._draw_raster(resize, layout) if self.do_high_res else None
        return (layout.height, layout.width), views, raster

    def _draw_views(self, resize: Callable[[int, int], Pixels], layout: Layout) -> np.ndarray:
        side = self.tile_size
        views = torch.empty(layout.num_views, 3, side, side)
        normalize(resize(side, side)[0], self.image_mean, self.image_std, out=views[0])
        if layout.rows:
            canvas = place(resize, layout.canvas, layout.content)
            # Both as [channel, row, y, column, x]; the views hold the tiles row by row.
            tiles = canvas[0].unflatten(1, (layout.rows, side)).unflatten(3, (layout.columns, side))
            out = views[1:].unflatten(0, (layout.rows, layout.columns)).permute(2, 0, 3, 1, 4)
            normalize(tiles, self.image_mean, self.image_std, out=out)
        return views.numpy()

    def _draw_raster(self, resize: Callable[[int, int], Pixels], layout: Layout) -> np.ndarray:
        return place_normalized(
            resize, layout.raster, layout.raster_content, self.high_res_image_mean, self.high_res_image_std
        ).numpy()


def _three(values: Any, name: str, above: float = -math.inf) -> list[float]:
    # NaN, too, is above nothing.
    if not (
        isinstance(values, Sequence)
        and len(values) == 3
        and all(isinstance(value, (int, float, np.floating)) and above < value < math.inf for value in values)
    ):
        raise ValueError(f"expected {name} to be three numbers{' above 0' if above == 0 else ''}, got {values!r}")
    return list(values)


def _as_lists(value: Any) -> Any:
    """Tuples and arrays as lists, so that what holds the same is the same."""
    value = value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) else value
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def flatten_images(images: Any) -> Iterator[Any]:
    """The single pictures of a nested or flat list, in reading order."""
    if images is None:
        return
    if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4):
        for image in images:
            yield from flatten_images(image)
    else:
        yield images


def _stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One array [n, ...] of arrays whose sizes may differ, each in the low corner, zeros elsewhere."""
    shapes = {array.shape for array in arrays}
    if len(shapes) == 1:
        return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
    batch = np.zeros((len(arrays), *np.max(list(shapes), axis=0)), np.float32)
    for row, array in zip(batch, arrays, strict=True):
        row[tuple(slice(length) for length in array.shape)] = array
    return batch
