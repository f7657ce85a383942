"""DINO, DINOv2, CLIP-I and CLIP-T of images against PyTorch, from files to scores."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity is checked against PyTorch")
pytest.importorskip("transformers", reason="parity is checked against transformers")

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

from focusdpo_jax.errors import UserError  # noqa: E402
from focusdpo_jax.evaluation import scoring
from focusdpo_jax.evaluation.scenes import BenchmarkScene, BenchmarkSubject  # noqa: E402
from focusdpo_jax.models.tokenizer import write_vocabulary  # noqa: E402
from focusdpo_jax.vision import encoders
from tests.parity import oracles  # noqa: E402
from tests.shared import shared  # noqa: E402

IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
DINO_PROCESSOR = BitImageProcessorPil(size={"shortest_edge": 256}, **IMAGENET)
SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images of odd sizes: three photographs and a generated image."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for i, size in enumerate([(301, 417), (150, 97), (224, 260), (80, 80)]):
        small = Image.fromarray(draw.integers(0, 256, (6, 7, 3), np.uint8))
        small.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        paths.append(str(folder / f"{i}.png"))
    return paths


def measured(scorer, files, prompt=""):
    scene = BenchmarkScene(
        "a", prompt, (BenchmarkSubject("s", "s", files[0], tuple(files[:-1])),), 0, "s"
    )
    return scorer.score([scene], [np.asarray(Image.open(files[-1]).convert("RGB"))], [[None]])[0]


def cosines(vectors):
    """Mean cosine of the last with the others."""
    vectors = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return (vectors[:-1] @ vectors[-1]).mean().item()


def pixels(processor, files):
    return torch.cat(
        [
            processor(Image.open(f).convert("RGB"), return_tensors="pt")["pixel_values"]
            for f in files
        ]
    )


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_dino(name, files, tmp_path):
    sizes = SIZES | {"image_size": 224, "patch_size": 16}
    if name == "dino":
        model = oracles.randomised(
            transformers.ViTModel,
            transformers.ViTConfig(intermediate_size=40, **sizes),
            add_pooling_layer=False,
        )
    else:
        model = oracles.randomised(
            transformers.Dinov2Model, transformers.Dinov2Config(mlp_ratio=2, **sizes)
        )
    model.save_pretrained(tmp_path)
    whole, subject, _ = encoders.load_dino(name, tmp_path, batch_size=2)
    output = model(pixels(DINO_PROCESSOR, files), output_hidden_states=True)
    for encoder, theirs in ((whole, output.last_hidden_state), (subject, output.hidden_states[-2])):
        ours = measured(scoring.SimilarityScorer(encoder), files)[name]
        assert ours == pytest.approx(cosines(theirs[:, 0]), abs=1e-4)


def small_clip(folder):
    """A CLIPModel of random weights for a vocabulary of our making, which is written to a folder."""
    size = write_vocabulary(folder, ["a", "red", "dog"])
    tower = {"intermediate_size": 40, **SIZES}
    config = transformers.CLIPConfig(
        text_config=dict(
            vocab_size=size,
            max_position_embeddings=12,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            **tower,
        ),
        vision_config=dict(image_size=224, patch_size=32, **tower),
        projection_dim=16,
    )
    return oracles.randomised(transformers.CLIPModel, config)


@pytest.mark.parametrize(
    "dtype, shard",
    [
        (torch.float32, "1GB"),
        (torch.bfloat16, "1GB"),
        (torch.float16, "30KB"),
        (torch.bfloat16, "30KB"),
    ],
)
@pytest.mark.parametrize("tokens", ["pair", "whole"])
def test_clip_of_every_type_in_shards(dtype, shard, tokens, files, tmp_path):
    """As transformers 5 saves it: perhaps in shards, with tokenizer.json alone."""
    small_clip(tmp_path).to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard == "1GB"
    tokenizer = transformers.CLIPTokenizer(
        vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt")
    )
    if tokens == "whole":
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "vocab.json").unlink()
        (tmp_path / "merges.txt").unlink()
    model = transformers.CLIPModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    image, text = encoders.load_clip(tmp_path, batch_size=2)
    with torch.no_grad():
        vision = model.visual_projection(
            model.vision_model(pixels(CLIPImageProcessorPil(), files)).pooler_output
        )
        ids = tokenizer(["a red dog"], padding="max_length", max_length=12, return_tensors="pt")
        prompt = model.text_projection(model.text_model(**ids).pooler_output)
    assert measured(scoring.SimilarityScorer(image), files)["clip_i"] == pytest.approx(
        cosines(vision), abs=1e-4
    )
    assert measured(scoring.PromptScorer(image, text), files, "a red dog")[
        "clip_t"
    ] == pytest.approx(torch.nn.functional.cosine_similarity(prompt, vision[-1:]).item(), abs=1e-4)


def test_clip(files, tmp_path):
    """Both towers from one folder."""
    model = small_clip(tmp_path)
    model.save_pretrained(tmp_path)
    image, text = encoders.load_clip(tmp_path, batch_size=2)
    inputs = pixels(CLIPImageProcessorPil(), files)
    vision = model.visual_projection(model.vision_model(inputs).pooler_output)
    assert measured(scoring.SimilarityScorer(image), files)["clip_i"] == pytest.approx(
        cosines(vision), abs=1e-4
    )

    tokenizer = transformers.CLIPTokenizer(
        vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt")
    )
    ids = tokenizer(["a red dog"], padding="max_length", max_length=12, return_tensors="pt")
    prompt = model.text_projection(model.text_model(**ids).pooler_output)
    theirs = torch.nn.functional.cosine_similarity(prompt, vision[-1:]).item()
    ours = measured(scoring.PromptScorer(image, text), files, "a red dog")["clip_t"]
    assert ours == pytest.approx(theirs, abs=1e-4)

    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle"):
        encoders.load_clip(tmp_path)


def test_trained_dinov2_on_photographs():
    files = [str(shared(f"dreambench/dog6/0{i}.jpg")) for i in range(2)]
    folder = shared("dinov2-small")
    model = transformers.Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = cosines(model(pixels(DINO_PROCESSOR, files)).pooler_output)
    whole, *_ = encoders.load_dino("dinov2", folder, batch_size=2)
    ours = measured(scoring.SimilarityScorer(whole), files)["dinov2"]
    assert ours == pytest.approx(theirs, abs=1e-4) and ours > 0.5
