"""The TFDS builder that writes preference records as ArrayRecord; `dataset` calls it.

Reading needs no code of this package: `tfds.builder_from_directory(path).as_data_source('train')`.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from focusdpo_jax.data.images import decode_png, encode_png
from focusdpo_jax.data.record import TRUTH, Source, check_record
from focusdpo_jax.progress import ItemProgress

VERSION = "1.0.0"  # Version of the format on disk.


def config(name: str, settings: Mapping[str, Any]) -> tfds.core.BuilderConfig:
    """Returns the TFDS config of a data set; `name` is part of its directory."""
    return tfds.core.BuilderConfig(name=name, description=json.dumps(settings, sort_keys=True))


class _Decoder(tfds.decode.Decoder):
    """Decodes images and masks directly to the arrays of a record, a third faster than TFDS."""

    def __init__(self, decode: bool = True):
        super().__init__()
        self._decode = decode_png if decode else bytes

    def decode_example(self, example: Any) -> Any:
        """Unsupported: TensorFlow tensors are not used."""
        raise NotImplementedError

    def decode_example_np(self, example: bytes) -> np.ndarray | bytes:
        return self._decode(example)

    def decode_batch_example_np(self, examples: Sequence[bytes]) -> list[np.ndarray | bytes]:
        return [self._decode(example) for example in examples]


def decoders(features: tfds.features.FeaturesDict) -> dict[str, Any]:
    """Returns the decoders of images and masks for `as_data_source`."""
    return _for_images(features, _Decoder())


def skipping_images(features: tfds.features.FeaturesDict) -> dict[str, Any]:
    """Returns decoders for `as_data_source` that leave images and masks as file contents."""
    return _for_images(features, _Decoder(decode=False))


def _for_images(features: tfds.features.FeaturesDict, decode: _Decoder) -> dict[str, Any]:
    names = ("chosen", "rejected", "prior_mask", "changed_mask")
    return {
        **{name: decode for name in names if name in features},
        "subjects": dict.fromkeys(("reference", "reference_mask", "mask"), decode),
    }


class PreferencePairs(tfds.core.GeneratorBasedBuilder):
    """Preference pairs for personalised generation: chosen and rejected image, references, masks."""

    VERSION = tfds.core.Version(VERSION)
    # Keeps TFDS from searching download checksums next to the source. There are none, and the
    # search needs importlib_resources, which tensorflow-datasets 4.9.10 does not declare as a
    # dependency.
    code_path = None

    def __init__(
        self,
        *,
        sources: Mapping[str, Source],
        settings: Mapping[str, Any],
        max_subjects: int,
        **kwargs: Any,
    ):
        """Initialises it with the records of every split and their settings, stored as metadata.

        A record may have its images and masks as the content of PNG files: these are stored
        unchanged and unchecked.
        """
        self._sources = sources
        self._settings = settings
        self._max_subjects = max_subjects
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        example = next(iter(self._sources.values()))[0]
        height, width = _shape(example["chosen"])
        image = tfds.features.Image(shape=(height, width, 3), encoding_format="png")
        mask = tfds.features.Image(shape=(height, width, 1), encoding_format="png")
        height, width = _shape(example["subjects"][0]["reference"])
        reference = tfds.features.Image(shape=(height, width, 3), encoding_format="png")
        reference_mask = tfds.features.Image(shape=(height, width, 1), encoding_format="png")
        subject = {
            "phrase": tfds.features.Text(),
            "reference": reference,
            "reference_mask": reference_mask,
            "mask": mask,
            "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
        }
        features = {
            "index": np.int64,
            "caption": tfds.features.Text(),
            "chosen": image,
            "rejected": image,
            "prior_mask": mask,
        }
        if "background" in example:
            features["background"] = np.int32
            features["changed_mask"] = mask
            subject["disrupted"] = np.bool_
            for name, dtype in TRUTH.items():
                subject |= {name: dtype, f"rejected_{name}": dtype}
        for name in ("original_size", "crop"):
            if name in example:
                features[name] = tfds.features.Tensor(shape=(2,), dtype=np.int32)
        features["subjects"] = tfds.features.Sequence(subject)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(self._settings),
            # Records keep their order, so that `index` is the position in the file; the loader
            # shuffles.
            disable_shuffling=True,
        )

    def _example_writer(self) -> tfds.core.writer.ExampleWriter:
        return _SortedWriter(self.info.file_format)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(source) for split, source in self._sources.items()}

    def _generate_examples(self, source: Source) -> Iterator[tuple[int, dict]]:
        progress = ItemProgress("records built", len(source))
        for position in range(len(source)):
            record = source[position]
            if not isinstance(record["chosen"], bytes):
                check_record(record, max_subjects=self._max_subjects)
            yield position, _with_png(record, self.info.features, position)
            progress.add(1)


class _SortedWriter(tfds.core.writer.ExampleWriter):
    """Writes the features of every record sorted by name.

    The map of a protocol buffer has another order in every process, and so would the bytes of a
    data set.
    """

    def write(self, path, examples):
        return super().write(path, ((key, _sorted(record)) for key, record in examples))


def _sorted(record: bytes) -> bytes:
    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


def _with_png(record: dict, features: tfds.features.FeaturesDict, position: int) -> dict:
    """Returns the stored fields of a record, with images as PNG streams."""
    stored = {name: record[name] for name in features if name != "index"}
    stored["index"] = position
    for name in stored.keys() & {"chosen", "rejected", "prior_mask", "changed_mask"}:
        stored[name] = _png(record[name])
    stored["subjects"] = []
    for subject in record["subjects"]:
        entry = {name: subject[name] for name in features["subjects"].feature}
        for name in ("reference", "reference_mask", "mask"):
            entry[name] = _png(subject[name])
        stored["subjects"].append(entry)
    return stored


def _png(image: np.ndarray | bytes) -> io.BytesIO:
    return io.BytesIO(image if isinstance(image, bytes) else encode_png(image))


def _shape(image: np.ndarray | bytes) -> tuple[int, int]:
    """Returns (height, width) of an image or of the content of a PNG file."""
    if isinstance(image, bytes):
        width, height = Image.open(io.BytesIO(image)).size
        return height, width
    height, width = image.shape[:2]
    return height, width
