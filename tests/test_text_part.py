"""The text models of folders with encoders of images, against the classes of transformers that hold both, fed text."""

import copy
import functools
import json
import logging

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import lcx
from lcx import model as model_lib
from lcx.convert.hf import config as hf_config
from lcx.convert.hf import writer
from lcx.convert.hf.source import HfSource
from lcx.convert.peft import base, files, merged
from lcx.errors import UserError

T = 23
TEXT = dict(
    vocab_size=67, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=96, head_dim=8, pad_token_id=0,
)  # fmt: skip
IMAGES = dict(
    hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)  # fmt: skip
OF_LLAMA = dict(vision_output_dim=16, projector_input_dim=16, projector_output_dim=16)
MARKS = dict(boi_token_index=61, eoi_token_index=62, image_token_index=60)
MARKS_4 = dict(
    image_token_id=60, boi_token_id=61, eoi_token_id=62, video_token_id=63, audio_token_id=64, boa_token_id=65
)
ROWS = {
    "gemma3": dict(
        text_config=TEXT | dict(sliding_window=9, layer_types=["full_attention", "sliding_attention"]),
        vision_config=IMAGES, mm_tokens_per_image=4, **MARKS,
    ),
    "llama4": dict(
        text_config=TEXT | dict(
            intermediate_size_mlp=40, num_local_experts=2, attention_chunk_size=9, interleave_moe_layer_step=2,
        ),
        vision_config=IMAGES | OF_LLAMA, **MARKS,
    ),
    "mistral3": dict(
        text_config=TEXT | dict(model_type="mistral", sliding_window=9),
        vision_config=IMAGES | dict(model_type="pixtral"), image_token_index=60, tie_word_embeddings=False,
    ),
    "gemma4": dict(
        text_config=TEXT | dict(
            sliding_window=9, hidden_size_per_layer_input=0, global_head_dim=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config=IMAGES | dict(num_key_value_heads=2, head_dim=8, global_head_dim=8), audio_config=None, **MARKS_4,
    ),
}  # fmt: skip
LEFT = {
    "gemma3": "multi_modal_projector, vision_tower",
    "llama4": "multi_modal_projector, vision_model",
    "mistral3": "multi_modal_projector, vision_tower",
    "gemma4": "embed_vision, vision_tower",
}
IDS = np.random.default_rng(0).integers(4, 60, (1, T))


@functools.cache
def torch_model(name):
    torch.manual_seed(sum(name.encode()))
    model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.for_model(name, **ROWS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.2) * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def expected(name):
    with torch.no_grad():
        return torch_model(name)(input_ids=torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("name", ROWS)
def test_the_text_model_is_read_and_written_alone(name, tmp_path, caplog):
    torch_model(name).save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    with caplog.at_level(logging.WARNING):
        source = HfSource(tmp_path / "whole")
    (said,) = [text for text in caplog.messages if "left out" in text]
    assert said.endswith(f"tensors of {LEFT[name]}") and "\n" not in said
    (tmp_path / "text").mkdir()
    writer.write(tmp_path / "text", source)
    text, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(info.values()), info
    assert type(text).__name__.endswith("ForCausalLM")
    with torch.no_grad():
        np.testing.assert_allclose(text(torch.tensor(IDS)).logits.numpy(), expected(name), atol=1e-5, rtol=0)
    assert HfSource(tmp_path / "text").model == source.model


def test_logits_and_the_names_of_transformers_5(tmp_path):
    """The modules' own names, as some tools write them, and the published spelling, which leaves out what is usual."""
    model = torch_model("gemma3")
    tensors = {name: x.contiguous() for name, x in model.state_dict().items() if name != "lm_head.weight"}
    assert any(name.startswith("model.language_model.") for name in tensors)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    text, params = lcx.load(tmp_path, dtype="float32")
    np.testing.assert_allclose(lcx.logits(text, params, IDS), expected("gemma3"), atol=2e-4, rtol=0)


PUBLISHED = dict(
    architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", boi_token_index=255999,
    torch_dtype="bfloat16", eos_token_id=[1, 106], mm_tokens_per_image=256,
    vision_config=dict(model_type="siglip_vision_model"),
    text_config=dict(
        hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34, sliding_window=1024,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
    ),
)  # fmt: skip


#: Llama 4 Scout, of which the scaling has no band between the frequencies that are kept and those that are scaled.
SCOUT = dict(
    architectures=["Llama4ForConditionalGeneration"], model_type="llama4", image_token_index=200092,
    torch_dtype="bfloat16", tie_word_embeddings=False, vision_config=dict(model_type="llama4_vision_model"),
    text_config=dict(
        _attn_implementation_autoset=True, attention_chunk_size=8192, for_llm_compressor=False, hidden_size=5120,
        interleave_moe_layer_step=1, max_position_embeddings=10_485_760, model_type="llama4_text", no_rope_layers=[],
        num_attention_heads=40, num_hidden_layers=8, num_local_experts=16, rope_theta=500_000.0, vocab_size=202_048,
        rope_scaling=dict(
            factor=16.0, high_freq_factor=1.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
            rope_type="llama3",
        ),
    ),
)  # fmt: skip
#: Ministral 3 of 8B, whose rotary settings hold a temperature, and their type under two keys.
MINISTRAL = dict(
    architectures=["Mistral3ForConditionalGeneration"], model_type="mistral3", image_token_index=10, dtype="bfloat16",
    multimodal_projector_bias=False, spatial_merge_size=2, vision_config=dict(model_type="pixtral"),
    tie_word_embeddings=False, text_config=dict(
        head_dim=128, hidden_act="silu", hidden_size=4096, intermediate_size=14336, max_position_embeddings=262_144,
        model_type="ministral3", num_attention_heads=32, num_hidden_layers=34, num_key_value_heads=8,
        rms_norm_eps=1e-5, sliding_window=None, vocab_size=131_072, rope_parameters=dict(
            beta_fast=32.0, beta_slow=1.0, factor=16.0, llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0,
            original_max_position_embeddings=16384, rope_theta=1e6, rope_type="yarn", type="yarn",
        ),
    ),
)  # fmt: skip
#: A file of transformers 5, which numbers the layers with other sizes from "05" on where there are ten or more.
GEMMA4 = dict(
    TEXT, model_type="gemma4_text", num_hidden_layers=12, hidden_size_per_layer_input=0, global_head_dim=16,
    sliding_window=9,
)  # fmt: skip


def test_published_settings_are_those_that_transformers_reads():
    read = {"gemma3": transformers.Gemma3Config, "llama4": transformers.Llama4Config}
    read["mistral3"] = transformers.Mistral3Config
    for given in (PUBLISHED, SCOUT, MINISTRAL):
        theirs = read[given["model_type"]](**given)
        text = theirs.text_config.to_dict() | dict(architectures=None, tie_word_embeddings=theirs.tie_word_embeddings)
        assert hf_config.from_config(given) == hf_config.from_config(text)
    found = hf_config.from_config(PUBLISHED)
    assert found.tie_word_embeddings and found.vocab_size == 262_208
    ministral = hf_config.from_config(MINISTRAL)
    assert ministral == hf_config.from_config(transformers.Ministral3Config().to_dict())
    assert model_lib.layers(ministral)[0].block.mixer.temperature_floor == 16384
    saved = transformers.Gemma4TextConfig(**GEMMA4).to_dict()
    assert "05" in saved["per_layer_config"]
    assert hf_config.from_config(saved) == hf_config.from_config(GEMMA4)


def test_an_adapter_names_a_base_that_fits_it(tmp_path):
    model = hf_config.from_config(PUBLISHED)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    assert any("holds encoders beside the text model" in line for line in base.lines(base.Base(str(tmp_path), model)))
    (tmp_path / "config.json").write_text(json.dumps(hf_config.to_config(model, dtype="float32")))
    assert not any("encoders" in line for line in base.lines(base.Base(str(tmp_path), model)))


def random_adapter(folder, **settings):
    """An adapter of Gemma 3 with its encoder, as PEFT writes it: (the model with it, its tensors)."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(torch_model("gemma3")), peft.LoraConfig(lora_alpha=6, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model, safetensors.torch.load_file(folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spelling", ["of transformers 5", "of transformers 4"])
def test_an_adapter_of_the_text_part_of_a_model_with_encoders(spelling, tmp_path):
    """Its settings name modules as the model with encoders does: in a pattern, and in rank_pattern."""
    torch_model("gemma3").save_pretrained(tmp_path / "whole")
    model, tensors = random_adapter(
        tmp_path, r=3, rank_pattern={r"language_model\.layers\.1\.self_attn\.q_proj": 2},
        target_modules=r"model\.language_model\..*\.(q_proj|down_proj)|model\.language_model\.embed_tokens",
    )
    if spelling == "of transformers 4":
        old = "language_model.model."
        tensors = {name.replace("model.language_model.", old): x for name, x in tensors.items()}
        safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
        config = (tmp_path / "adapter_config.json").read_text()
        config = config.replace(r"model\\.language_model\\.", r"language_model\\.model\\.")
        config = config.replace(r"language_model\\.layers", r"language_model\\.model\\.layers")
        (tmp_path / "adapter_config.json").write_text(config)
    text, params = lcx.load(tmp_path / "whole", adapter=tmp_path, dtype="float32")
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(IDS)).logits.numpy()
    assert np.abs(theirs - expected("gemma3")).max() > 0.1
    np.testing.assert_allclose(lcx.logits(text, params, IDS), theirs, atol=2e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_the_encoder_too_is_refused(tmp_path):
    _, tensors = random_adapter(tmp_path, r=2, target_modules=["q_proj"])
    assert any("vision" in name for name in tensors)
    text = merged.known(hf_config.from_config(torch_model("gemma3").config.to_dict()))
    with pytest.raises(UserError, match="changes more than its text model, model.vision_tower") as error:
        files.read(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_a_saved_projector_is_refused_by_its_name(tmp_path):
    """A tensor of Gemma 3's projector is a parameter without a module of its own."""
    _, tensors = random_adapter(
        tmp_path, r=2, target_modules=r".*language_model.*\.q_proj", modules_to_save=["multi_modal_projector"]
    )
    assert any(name.endswith("multi_modal_projector.mm_input_projection_weight") for name in tensors)
    text = merged.known(hf_config.from_config(torch_model("gemma3").config.to_dict()))
    with pytest.raises(UserError, match="modules_to_save names multi_modal_projector, outside of the text") as error:
        files.read(tmp_path, text)
    assert "\n" not in str(error.value)


def test_weights_in_eight_bits_are_refused_in_one_line(tmp_path):
    """As Ministral 3 is published after its training for instructions: one scale for a matrix."""
    torch_model("gemma3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="fp8", activation_scheme="static", weight_block_size=None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantization_config: 'fp8'.*write it in 16 bits first") as error:
        HfSource(tmp_path)
    assert str(error.value).count(str(tmp_path)) == 1 and "\n" not in str(error.value)


REFUSED = {
    "another head": (
        dict(architectures=["Gemma3ForSequenceClassification"]), "expected ['Gemma3ForConditionalGeneration']",
    ),
    "no text": (dict(text_config=None), "text_config = None, expected the settings of the text model of 'gemma3'"),
    "an unknown text model": (dict(text_config=dict(model_type="gpt9")), "model_type 'gpt9', supported are"),
    "embeddings for each layer": (
        dict(model_type="gemma4", architectures=None, text_config=TEXT | dict(hidden_size_per_layer_input=8)),
        "hidden_size_per_layer_input 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        hf_config.from_config(PUBLISHED | changes)
    assert message in str(error.value) and "\n" not in str(error.value)
