"""What a model can be called with: its forward pass's arguments, and random numbers for them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from armor_recipes.calibration.inputs import GRIDS, PIXELS, TOKENS, ModelInputs, arguments
from armor_recipes.calibration.random_inputs import RandomInput
from armor_recipes.errors import InputError
from armor_recipes.exhaustion import what_ran_out
from armor_recipes.model.facts import InputFacts, input_facts, model_facts

FEATURES, SOUND, VIDEO, ANSWER = "input_features", "input_values", "pixel_values_videos", "decoder_input_ids"
SIZES, RATIOS = "image_sizes", "aspect_ratio_ids"
#: Height and width of random images, samples of a frame of sound, frames of a video where a config names none.
_IMAGE, _STRIDE, _FRAMES = (224, 224), 320, 8
#: Frames of a spectrogram for each token, and most parts that an image is cut into.
_PER_TOKEN, _PARTS = 8, 5
#: Patches in a row of an image that a model takes as patches, for each that its merging makes one of.
_MERGED = 4


def model_inputs(model: nn.Module) -> ModelInputs:
    """What a model, on whatever device, can be called with."""
    facts = input_facts(model.config)
    pair = model_facts(model).encoder_decoder
    return ModelInputs(
        name=type(model).__name__,
        vocab_size=facts.vocab_size,
        arguments=_arguments(model),
        encoder_decoder=pair,
        decoder_start=facts.decoder_start,
        padding=facts.padding,
        closes=not _generates(model) and not pair,
        random=partial(random_inputs, model),
    )


def _generates(model: nn.Module) -> bool:
    return bool(getattr(model, "can_generate", lambda: True)())


def _arguments(model: nn.Module) -> tuple[str, ...]:
    """Names that the forward pass takes; where it hands others on, also those of the model inside."""
    models = [model]
    own = inspect.signature(type(model).forward).parameters
    inner = getattr(model, "base_model", model)
    if inner is not model and any(each.kind is each.VAR_KEYWORD for each in own.values()):
        models.append(inner)
    named = [inspect.signature(type(each).forward).parameters.values() for each in models]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [each.name for parameters in named for each in parameters if each.kind in kinds]
    return tuple(dict.fromkeys(name for name in names if name != "self"))


def random_inputs(model: nn.Module, length: int) -> tuple[RandomInput, ...]:
    """Random arguments of a model's forward pass, texts of `length` tokens, those that stand for an image not counted.

    Names and shapes are those that the config and the forward pass's arguments tell. Where layouts differ between architectures
    (spectrograms, images in parts), the first that the model, which had best be on the meta device, takes in a trial is meant.
    Raises InputError, with the reason, for a model whose inputs are not told.
    """
    maker = _Maker(model, input_facts(model.config), frozenset(_arguments(model)), length)
    found = tuple(maker.made())
    if not found:
        maker.refuse("its forward pass takes none of the inputs that its config.json tells of")
    return found


class _Trial(Enum):
    """How a trial ended that gave nothing."""

    FAILED = auto()
    UNDECIDED = auto()


@dataclass(frozen=True, slots=True, eq=False)
class _Maker:
    """Makes the arguments for one model."""

    model: nn.Module
    facts: InputFacts
    takes: frozenset[str]
    length: int

    def made(self) -> Iterator[RandomInput]:
        """All arguments, in the order in which they are drawn."""
        main = getattr(self.model, "main_input_name", TOKENS)
        first = main if isinstance(main, str) else main[0]
        if first not in (TOKENS, PIXELS, FEATURES, SOUND, VIDEO):
            self.refuse(f"its main input is {first!r}, of which config.json does not tell what it holds")
        words = TOKENS in self.takes and (first == TOKENS or self.facts.vocab_size is not None)
        images = self._images(words=words) if PIXELS in self.takes and first != VIDEO else ()
        text = tuple(self._text(images)) if words else ()
        video = (self._video(),) if first == VIDEO else ()
        answer = (self._answer(),) if ANSWER in self.takes and model_facts(self.model).encoder_decoder else ()
        sounds = self._sounds(first, words=words)
        beside = (*text, *images, *video, *answer)
        yield from (*text, *images, *(self._first(sounds, self._passes, beside) if sounds else ()), *video, *answer)

    def refuse(self, reason: str) -> NoReturn:
        """Raise InputError that says why no inputs can be made."""
        raise InputError(
            f"builtin:random-inputs cannot make inputs of {type(self.model).__name__}: {reason}; give a .safetensors file of inputs"
        )

    def _vocabulary(self) -> int:
        if self.facts.vocab_size is None:
            self.refuse("it reads tokens, and its config.json names no vocab_size")
        return self.facts.vocab_size

    def _ids(self, name: str, length: int, places: Iterable[tuple[int, int]]) -> RandomInput:
        size = self._vocabulary()
        special = self.facts.special if len(self.facts.special) < size else ()
        return RandomInput(name, (length,), "ids", size, special, tuple(places))

    def _text(self, images: tuple[RandomInput, ...]) -> Iterator[RandomInput]:
        """Tokens of text, those that stand for the images after the first, and what tells the two apart."""
        count = self._image_tokens(images) if images and self.facts.image_token is not None else 0
        total = self.length + count
        places = [
            (place, self.facts.image_token) for place in range(1, count + 1) if self.facts.image_token is not None
        ]
        closes = model_facts(self.model).encoder_decoder or not _generates(self.model)
        if closes and self.facts.end is not None and self.facts.end < self._vocabulary():
            places.append((total - 1, self.facts.end))
        yield self._ids(TOKENS, total, places)
        if count and "mm_token_type_ids" in self.takes:
            kinds = tuple(int(1 <= place <= count) for place in range(total))
            yield RandomInput("mm_token_type_ids", (total,), "fixed", constant=kinds)

    def _answer(self) -> RandomInput:
        start = self.facts.decoder_start
        return self._ids(ANSWER, self.length, () if start is None else ((0, start),))

    def _images(self, *, words: bool) -> tuple[RandomInput, ...]:
        """Images, and what says how large they are, for the models that ask."""
        grids = next((name for name in GRIDS if name in self.takes), None)
        if grids is not None:
            return self._patches(grids)
        height, width = self.facts.image_size or _IMAGE
        shape = (self.facts.channels or 3, height, width)
        if RATIOS in self.takes:
            return self._tiles(shape)
        shapes = [shape, *((parts, *shape) for parts in range(1, _PARTS + 1))]
        if self.facts.frames is not None:
            shapes = [(self.facts.frames, *shape), shape]
        sizes = RandomInput(SIZES, (2,), "fixed", constant=(height, width))
        pixels = [RandomInput(PIXELS, each, "normal") for each in shapes]
        candidates: list[tuple[RandomInput, ...]] = [(each,) for each in pixels]
        candidates += [(each, sizes) for each in pixels] if SIZES in self.takes else []
        if words and self.facts.image_token is not None and self._reader() is not None:
            return self._first(candidates, self._features)
        return self._first(candidates, self._passes, (self._ids(TOKENS, self.length, ()),) if words else ())

    def _tiles(self, shape: tuple[int, ...]) -> tuple[RandomInput, ...]:
        """One image of one tile, in the place of as many as there may be."""
        tiles = self.facts.tiles or 1
        return (
            RandomInput(PIXELS, (1, tiles, *shape), "normal"),
            RandomInput(RATIOS, (1,), "fixed", constant=(1,)),
            RandomInput("aspect_ratio_mask", (1, tiles), "fixed", constant=(1, *(0,) * (tiles - 1))),
        )

    def _patches(self, grids: str) -> tuple[RandomInput, ...]:
        """An image as a list of patches, and the grid in which they lie."""
        facts = self.facts
        if facts.patch is None:
            self.refuse("it takes images as patches, and its config.json names no patch_size")
        side = _MERGED * (facts.merge or 1)
        width = (facts.channels or 3) * (facts.patch_time or 1) * facts.patch**2
        return (
            RandomInput(PIXELS, (side * side, width), "normal"),
            RandomInput(grids, (3,), "fixed", constant=(1, side, side)),
        )

    def _image_tokens(self, images: tuple[RandomInput, ...]) -> int:
        """How many tokens stand for a sample's images in its text: as many as the model makes features of them, or patches."""
        if self._reader() is None:
            return 0
        found = self._features(images)
        if isinstance(found, int):
            return found
        facts, side = self.facts, (self.facts.merge or 1) * (self.facts.patch or 0)
        grid = next((each.constant for each in images if each.name in GRIDS), None)
        if grid is not None:
            return math.prod(grid) // (facts.merge or 1) ** 2
        if found is _Trial.UNDECIDED and facts.image_tokens is not None:
            return facts.image_tokens
        if found is _Trial.FAILED or not side or facts.image_size is None:
            self.refuse("how many tokens of its text stand for an image is not known")
        return (facts.image_size[0] // side) * (facts.image_size[1] // side)

    def _reader(self) -> Callable[..., Any] | None:
        """The method that makes features of images, of the model or the outermost one inside it that has one."""
        name = "get_image_features"
        return next((getattr(each, name) for each in self.model.modules() if hasattr(each, name)), None)

    def _features(self, images: tuple[RandomInput, ...]) -> int | _Trial:
        """Rows of features that the model makes of a sample's images in a trial."""
        method = self._reader()
        if method is None:
            return _Trial.FAILED
        takes = inspect.signature(method).parameters
        made = self._tried(method, [each for each in images if each.name in takes])
        if isinstance(made, _Trial):
            return made
        made = getattr(made, "pooler_output", made)
        rows = [made] if isinstance(made, Tensor) else made
        if not isinstance(rows, (list, tuple)) or not all(isinstance(each, Tensor) for each in rows):
            return _Trial.FAILED
        return sum(int(each.numel()) // int(each.shape[-1]) for each in rows)

    def _sounds(self, first: str, *, words: bool) -> list[tuple[RandomInput, ...]]:
        """Layouts in which the model may take sound; none where it takes none, or has a text to go with it."""
        name = first if first in (FEATURES, SOUND) else FEATURES
        if name not in self.takes or (words and name != first and _generates(self.model)):
            return []
        bins, frames = self.facts.mel_bins, self.facts.mel_frames
        if bins is None and name == FEATURES:
            self.refuse("it takes spectrograms, and its config.json does not name the values of a frame")
        if bins is not None and (name == FEATURES or frames is not None):
            short = _PER_TOKEN * self.length
            shapes: list[tuple[int, ...]] = [(short, bins), (1, short, bins), (bins, short)]
            if frames is not None:
                shapes = [(bins, 2 * frames), (frames, bins), *shapes]
        else:
            samples = (self.facts.audio_stride or _STRIDE) * (self.length + 1)
            channels = self.facts.audio_channels
            shapes = [(samples,), (1, samples)] if channels is None else [(channels, samples), (samples,)]
        return [(RandomInput(name, shape, "normal"),) for shape in shapes]

    def _video(self) -> RandomInput:
        size = self.facts.image_size or _IMAGE
        return RandomInput(VIDEO, (self.facts.frames or _FRAMES, self.facts.channels or 3, *size), "normal")

    def _first(
        self,
        candidates: Sequence[tuple[RandomInput, ...]],
        trial: Callable[[tuple[RandomInput, ...]], object],
        beside: tuple[RandomInput, ...] = (),
    ) -> tuple[RandomInput, ...]:
        """The first that passes a trial together with what is given beside; else the first that none can be made of, or at all."""
        undecided = []
        for each in candidates if len(candidates) > 1 else ():
            match trial((*each, *beside)):
                case _Trial.FAILED:
                    continue
                case _Trial.UNDECIDED:
                    undecided.append(each)
                case _:
                    return each
        return (undecided or candidates)[0]

    def _passes(self, inputs: tuple[RandomInput, ...]) -> object:
        """What a whole forward pass gives in a trial."""
        return self._tried(self.model, inputs)

    def _tried(self, method: Callable[..., Any], inputs: Iterable[RandomInput]) -> Any:
        """What a call gives for one sample, or how it ended. What is fixed has its values, all else is zero."""
        first = next(self.model.parameters())
        generator = torch.Generator()
        batch = {
            each.name: each.drawn(1, generator) if each.values == "fixed" else _zeros(each, first) for each in inputs
        }
        training = self.model.training
        self.model.eval()  # in training some models drop and mask at random
        try:
            with torch.no_grad():
                return method(**arguments(batch))
        except NotImplementedError:  # an operation that asks for values, which the meta device does not have
            return _Trial.UNDECIDED
        except Exception as error:  # the model's code raises what it likes for a layout that is not its own
            if what_ran_out(error):
                raise
            return _Trial.FAILED
        finally:
            self.model.train(training)


def _zeros(each: RandomInput, like: Tensor) -> Tensor:
    """Zeros for one sample, where the model is."""
    dtype = torch.int64 if each.values == "ids" else like.dtype
    return torch.zeros((1, *each.shape), dtype=dtype, device=like.device)
