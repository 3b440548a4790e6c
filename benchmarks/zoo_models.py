"""Which architectures the zoo holds, and how each is built with an example input."""

from __future__ import annotations

from typing import Any

import torch

TORCHVISION = """alexnet vgg11 vgg16_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 googlenet inception_v3 squeezenet1_0
squeezenet1_1 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 shufflenet_v2_x0_5 shufflenet_v2_x1_5 efficientnet_b0
efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny vit_b_32 swin_t swin_v2_t maxvit_t""".split()
SEGMENTATION = "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large".split()
DETECTION = "ssdlite320_mobilenet_v3_large retinanet_resnet50_fpn fcos_resnet50_fpn fasterrcnn_mobilenet_v3_large_320_fpn ssd300_vgg16".split()
VIDEO = "r3d_18 mc3_18 r2plus1d_18 s3d swin3d_t mvit_v1_b".split()
TIMM = """resnet26d resnetv2_50 resnest14d resnext26ts seresnet50 skresnet18 ecaresnet50t res2net50_14w_8s dla34 dla60x densenet121
dpn48b efficientnet_lite0 efficientnet_b1 tf_efficientnetv2_b0 mixnet_s mnasnet_small fbnetc_100 fbnetv3_b spnasnet_100 hardcorenas_a
ghostnet_100 ghostnetv2_100 mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small lcnet_050 tinynet_e
regnetx_002 regnety_002 regnetz_005 rexnet_100 rexnetr_200 repvgg_a0 mobileone_s0 cspresnet50 cspdarknet53 darknet53 cs3darknet_s vovnet39a
ese_vovnet19b_dw hrnet_w18_small inception_resnet_v2 inception_v4 xception41 nf_resnet26 nfnet_l0 dm_nfnet_f0 eca_nfnet_l0 gernet_s
convnext_atto convnextv2_atto convmixer_768_32 hgnet_tiny hgnetv2_b0 selecsls42 tresnet_m legacy_senet154 legacy_seresnet18 vgg11_bn
botnet26t_256 halonet26t lambda_resnet26t bat_resnext26ts sebotnet33ts_256 edgenext_xx_small fastvit_t8 repvit_m0_9 starnet_s1 inception_next_tiny
efficientvit_b0 efficientvit_m0 efficientformer_l1 efficientformerv2_s0 mobilevit_xxs mobilevitv2_050 focalnet_tiny_srf pvt_v2_b0 poolformer_s12
poolformerv2_s12 caformer_s18 convformer_s18 vit_tiny_patch16_224 vit_relpos_small_patch16_224 deit_tiny_patch16_224 deit3_small_patch16_224
cait_xxs24_224 xcit_nano_12_p16_224 beit_base_patch16_224 eva02_tiny_patch14_224 twins_pcpvt_small twins_svt_small swin_tiny_patch4_window7_224
swinv2_tiny_window8_256
swinv2_cr_tiny_ns_224 coat_lite_tiny coatnet_nano_rw_224 maxvit_nano_rw_256 gcvit_xxtiny crossvit_tiny_240 convit_tiny levit_128s levit_conv_128s
pit_ti_224 tnt_s_patch16_224 nest_tiny visformer_tiny volo_d1_224 mixer_s16_224 gmixer_24_224 resmlp_12_224 gmlp_s16_224 sequencer2d_s
davit_tiny hiera_tiny_224 mvitv2_tiny tiny_vit_5m_224 nextvit_small rdnet_tiny mambaout_femto swiftformer_xs shvit_s1 hgnetv2_b2""".split()
TEXT = """bert roberta distilbert albert electra camembert deberta-v2 mpnet convbert layoutlm xlm-roberta squeezebert funnel nystromformer ernie
megatron-bert data2vec-text roformer modernbert fnet""".split()
CAUSAL = """gpt2 gpt_neo gpt_neox gptj opt bloom llama mistral mixtral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 falcon stablelm
starcoder2 olmo olmo2 cohere granite persimmon codegen mpt glm biogpt xglm smollm3 helium""".split()
SEQ2SEQ = "t5 bart mbart pegasus marian".split()
IMAGE = "vit deit levit beit convnext convnextv2 swin dinov2 mobilevit poolformer pvt segformer resnet regnet".split()
DIFFUSERS = "unet2d unet2d_condition vae vq dit".split()
SMP = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus".split()
YOLO = "yolov8n yolov5n yolov9t yolo11n yolov10n".split()


def names() -> list[str]:
    import timm

    known = set(timm.list_models())
    groups = {
        "torchvision": TORCHVISION,
        "segmentation": SEGMENTATION,
        "detection": DETECTION,
        "video": VIDEO,
        "timm": [name for name in TIMM if name in known],
        "transformers/text": TEXT,
        "transformers/causal": CAUSAL,
        "transformers/seq2seq": SEQ2SEQ,
        "transformers/image": IMAGE,
        "diffusers": DIFFUSERS,
        "smp": SMP,
        "ultralytics": YOLO,
    }
    return [f"{group}/{name}" for group, members in groups.items() for name in dict.fromkeys(members)]


def build(name: str) -> tuple[torch.nn.Module, tuple, dict[str, Any]]:
    """The model and its positional and keyword arguments."""
    group, _, rest = name.partition("/")
    return {"torchvision": _vision, "segmentation": _segmentation, "detection": _detection, "video": _video, "timm": _timm,
            "transformers": _transformers, "diffusers": _diffusers, "smp": _smp, "ultralytics": _ultralytics}[group](rest)  # fmt: skip


def _vision(name: str):
    from torchvision import models

    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    side = 299 if name == "inception_v3" else 224
    return models.get_model(name, weights=None, **extra), (torch.randn(1, 3, side, side),), {}


def _segmentation(name: str):
    from torchvision import models

    return models.get_model(name, weights=None, weights_backbone=None), (torch.randn(1, 3, 128, 128),), {}


def _detection(name: str):
    from torchvision import models

    return models.get_model(name, weights=None, weights_backbone=None), ([torch.rand(3, 128, 128)],), {}


def _video(name: str):
    from torchvision import models

    frames, side = (16, 224) if name.startswith(("mvit", "swin")) else (16, 64) if name == "s3d" else (8, 64)
    side = 224 if name == "s3d" else side
    return models.get_model(name, weights=None), (torch.randn(1, 3, frames, side, side),), {}


def _timm(name: str):
    import timm

    model = timm.create_model(name)
    return model, (torch.randn(1, *model.default_cfg["input_size"]),), {}


TINY = {"hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embedding_size": 64, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2,
        "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
        "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "hidden_dim": 128, "ffn_dim": 128, "d_ff": 128, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 128,
        "max_position_embeddings": 64, "n_positions": 64, "head_dim": 16, "d_kv": 16, "rotary_dim": 8, "word_embed_proj_dim": 64,
        "n_inner": 128, "query_pre_attn_scalar": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "num_local_experts": 4, "sep_token_id": 3, "cls_token_id": 1, "decoder_start_token_id": 1, "forced_eos_token_id": 2}  # fmt: skip


def _tiny(kind: str, **extra):
    from transformers import CONFIG_MAPPING

    chosen = CONFIG_MAPPING[kind]
    plain = chosen()
    mapped = set(plain.attribute_map.values())
    settings = {k: v for k, v in TINY.items() if (hasattr(plain, k) and (k in plain.to_dict() or k in mapped))}
    if kind == "gpt_neo":
        settings |= {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    if kind == "funnel":
        settings |= {"block_sizes": [1, 1], "d_head": 16, "d_inner": 128}
    if kind == "squeezebert":
        settings |= {"embedding_size": 64}
    if kind == "megatron-bert":
        settings |= {"intermediate_size": 128}
    return chosen(**settings, **extra)


def _transformers(name: str):
    import transformers as hf

    task, _, kind = name.partition("/")
    ids = torch.randint(4, 100, (1, 16))
    if task == "text":
        return hf.AutoModelForSequenceClassification.from_config(_tiny(kind, num_labels=5)), (), {"input_ids": ids}
    if task == "causal":
        return hf.AutoModelForCausalLM.from_config(_tiny(kind)), (), {"input_ids": ids, "use_cache": False}
    if task == "seq2seq":
        return hf.AutoModelForSeq2SeqLM.from_config(_tiny(kind)), (), {"input_ids": ids, "decoder_input_ids": ids[:, :8], "use_cache": False}
    config = hf.CONFIG_MAPPING[kind](num_labels=5)
    for key, value in (("hidden_size", 64), ("num_hidden_layers", 2), ("num_attention_heads", 4), ("intermediate_size", 128)):
        if isinstance(getattr(config, key, None), int) and kind in ("vit", "deit", "beit", "dinov2"):
            setattr(config, key, value)
    side = getattr(config, "image_size", 224)
    side = side if isinstance(side, int) else 224
    made = hf.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[kind]
    made = getattr(hf, made if isinstance(made, str) else made[0])  # some families have several heads
    return made(config), (), {"pixel_values": torch.randn(1, 3, side, side)}


def _diffusers(name: str):
    import diffusers as d

    small = {"block_out_channels": (32, 64), "norm_num_groups": 8, "sample_size": 32}
    noise, step = torch.randn(1, 3, 32, 32), torch.tensor([7])
    if name == "unet2d":
        blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
        return d.UNet2DModel(**small, **blocks, in_channels=3, out_channels=3), (noise, step), {}
    if name == "unet2d_condition":
        blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
        model = d.UNet2DConditionModel(**small, **blocks, cross_attention_dim=32, attention_head_dim=8)
        return model, (torch.randn(1, 4, 32, 32), step, torch.randn(1, 7, 32)), {}
    if name == "vae":
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        return d.AutoencoderKL(**small, **blocks, latent_channels=4), (noise,), {}
    if name == "vq":
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        return d.VQModel(**small, **blocks, latent_channels=4, num_vq_embeddings=32), (noise,), {}
    model = d.DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=16, in_channels=4)
    return model, (torch.randn(1, 4, 16, 16),), {"timestep": step, "class_labels": torch.tensor([3])}


def _smp(name: str):
    import segmentation_models_pytorch as smp

    return getattr(smp, name)("resnet18", encoder_weights=None, classes=3), (torch.randn(2, 3, 128, 128),), {}


def _ultralytics(name: str):
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(f"{name}.yaml", verbose=False), (torch.randn(1, 3, 128, 128),), {}
