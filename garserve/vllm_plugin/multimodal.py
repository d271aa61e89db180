"""The processor of requests that reach vLLM by themselves: a prompt, a picture and its regions as an option."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import BatchFeature
from vllm.config import ModelConfig
from vllm.inputs import MultiModalDataDict
from vllm.inputs.engine import MultiModalInput
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptUpdate,
    TimingContext,
)

from garserve.checkpoint import resolve
from garserve.config import read_config
from garserve.errors import RequestError
from garserve.inputs.images import load_image
from garserve.inputs.processor import PreparedRequest, Processor, draw_masks
from garserve.inputs.prompts import expand, region_preamble
from garserve.inputs.regions import Region, normalised_box
from garserve.vllm_plugin.items import MODALITY, engine_input, share_with_engine

IMAGE_TOKEN = "<|image|>"  # noqa: S105  (a token of the prompt, not a secret)


class PlainOptions(BaseModel):
    """`mm_processor_kwargs` of a request to plain vLLM: the regions of its one image.

    `form` "multi" names them `<Prompt0>`, `<Prompt1>`, …; "single" is the authors' form for one region (`<Prompt1>`).
    """

    model_config = ConfigDict(extra="forbid")
    regions: list[Any]
    form: Literal["multi", "single"] = "multi"
    max_num_tiles: int | None = Field(default=None, ge=1, le=36)


def engine_max_num_tiles(model_config: ModelConfig) -> int | None:
    """Return the `max_num_tiles` that the engine was started with; None where it is the checkpoint's own."""
    mm_config = model_config.multimodal_config
    return ((mm_config.mm_processor_kwargs if mm_config else None) or {}).get("max_num_tiles")


def checkpoint_folder(model_config: ModelConfig) -> Path:
    """Return the folder of what vLLM was told to run, in the revision that it was told. Raises CheckpointError."""
    return resolve(model_config.model, model_config.revision)


class GARProcessingInfo(BaseProcessingInfo):
    """What vLLM has to know before any request comes."""

    @cached_property
    def processor(self) -> Processor:
        """The checkpoint's processor, with the engine's own `max_num_tiles` where one is given."""
        model_config = self.ctx.model_config
        config = read_config(folder := checkpoint_folder(model_config))
        config = config.with_box_scale(self.ctx.get_hf_config().replay_box_scale)
        return Processor(folder, config, max_num_tiles=engine_max_num_tiles(model_config))

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """One image and its regions, all items of one modality."""
        return {MODALITY: 1 + self.processor.config.prompt_count}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """The largest item is an image with all its tiles and the thumbnail."""
        return {MODALITY: (1 + self.processor.max_num_tiles) * self.processor.config.tokens_per_tile}


class GARDummyInputs(BaseDummyInputsBuilder[GARProcessingInfo]):
    """The request with the most placeholders, for vLLM's memory profile."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return a prompt with the image token."""
        return IMAGE_TOKEN

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> MultiModalDataDict:
        """Return an image so wide that it gets every tile, of noise, because equal tiles are computed once."""
        size, tiles = self.info.processor.config.tile_size, self.info.processor.max_num_tiles
        return {MODALITY: [Image.effect_noise((size * tiles, size), 64).convert("RGB")]}


class GARMultiModalProcessor(BaseMultiModalProcessor[GARProcessingInfo]):
    """Processes requests that reach vLLM as a prompt, a picture and `mm_processor_kwargs={"regions": [...]}`.

    Both kinds of item and their hashes come from garserve's own processor, as in `garserve.load`; a client's item
    uuid is ignored, because the same picture with other regions is another item.
    """

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """Insert the regions' part of the prompt, expand the placeholders and build the items."""
        options = self._options(inputs)
        processor = self.info.processor
        if options.max_num_tiles and options.max_num_tiles != processor.max_num_tiles:
            processor = processor.variant(max_num_tiles=options.max_num_tiles)
        with timing_ctx.record("prepare_regions"):
            prepared = self._prepare(processor, inputs, options)
            result = engine_input(prepared)
        if inputs.cache is not None:
            share_with_engine(inputs.cache, result)
        return result

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> ProcessorInputs:
        """Add a region to the dummy request; there is no GAR prompt without one."""
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        inputs.hf_processor_mm_kwargs = {"regions": [{"box": [0, 0, 1, 1]}]}
        return inputs

    def _options(self, inputs: ProcessorInputs) -> PlainOptions:
        given = dict(self.info.ctx.get_mm_config().merge_mm_processor_kwargs(inputs.hf_processor_mm_kwargs))
        if "regions" not in given:
            raise RequestError("mm_processor_kwargs: regions: missing; a GAR request names the regions of its image")
        try:
            return PlainOptions.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RequestError(f"mm_processor_kwargs: {where}: {first['msg']}, got {first['input']!r:.80}") from None

    def _prepare(self, processor: Processor, inputs: ProcessorInputs, options: PlainOptions) -> PreparedRequest:
        data = inputs.mm_data_items.get(MODALITY)
        count = len(data) if data is not None else 0
        if data is None or count != 1:
            raise RequestError(f"image: a GAR request has one image, got {count}")
        picture = data[0]
        if picture is None:
            raise RequestError(
                "image: given by uuid only; garserve needs the picture, the same one may have other regions"
            )
        image = load_image(picture if isinstance(picture, Image.Image) else np.asarray(picture))
        for position, region in enumerate(options.regions):  # they come from clients: no file of this machine is theirs
            mask = region.get("mask") if isinstance(region, dict) else None
            if isinstance(mask, str) and not mask.startswith("data:"):
                raise RequestError(f"mm_processor_kwargs: regions[{position}]: mask: expected a PNG as a data URL")
        regions = [Region.parse(region) for region in options.regions]
        token_ids, listed = self._prompt(processor, list(inputs.prompt), len(regions), options.form)
        masks = draw_masks(regions, image.shape[0], image.shape[1])
        boxes = [normalised_box(mask) for mask in masks]
        items = processor.items(image, masks, [boxes[position] for position in listed])
        prompt = expand(token_ids, len(items[0].tiles), processor.config)
        return PreparedRequest(prompt.token_ids, items, [prompt.image_span, *prompt.region_spans], boxes)

    def _prompt(
        self, processor: Processor, token_ids: list[int], count: int, form: Literal["multi", "single"]
    ) -> tuple[list[int], list[int]]:
        """Return the prompt with the regions' part in it, and the positions of the regions that it lists.

        A prompt that holds crop tokens already is left as its author wrote it.
        """
        config, tokenizer = processor.config, processor.tokenizer
        single = form == "single"
        if not 1 <= count <= config.prompt_count or (single and count != 1):
            raise RequestError(f"regions: expected 1{'' if single else f' to {config.prompt_count}'}, got {count}")
        if token_ids.count(config.image_token_id) != 1:
            raise RequestError(
                f"prompt: expected {IMAGE_TOKEN} once, got {token_ids.count(config.image_token_id)} "
                "(chat requests need --chat-template-content-format openai)"
            )
        crops = [token for token in token_ids if token in config.crop_token_ids]
        if len(set(crops)) != len(crops):
            raise RequestError("prompt: expected each crop token at most once")
        place = token_ids.index(config.image_token_id) + 1
        if not crops:
            names = [min(1, config.prompt_count - 1)] if single else list(range(count))
            added = tokenizer.encode_parts(region_preamble(names, single, tokenizer, config))
            token_ids[place:place] = added
            crops = [config.crop_token_ids[name] for name in names]
        begin = tokenizer.special("<|begin_of_text|>")
        leading = next((i for i, token in enumerate(token_ids) if token != begin), len(token_ids))
        token_ids[:leading] = [begin, begin] if leading else []
        listed = [0] if count == 1 and len(crops) == 1 else [config.crop_token_ids.index(token) for token in crops]
        if max(listed) >= count:
            raise RequestError(f"prompt: names region {max(listed)}, but {count} regions are given")
        return token_ids, listed

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {}  # the items are built whole in `apply`

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        return []  # the prompt is expanded in `apply`
