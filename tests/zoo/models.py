"""The models of the zoo: torchvision's classifiers and segmenters, small members of timm's families."""

from __future__ import annotations

import torch
from torch import nn

# One small member of each family (hand-picked), by what the families are built of.
_TIMM = """
cs3darknet_s cs3edgenet_x cs3sedarknet_x cspdarknet53 cspresnet50 cspresnext50 darknet53 densenetblur121d
dla34 dla46x_c dla60_res2net dpn68b ecaresnet26t ese_vovnet19b_slim gcresnet33ts gcresnext26ts gernet_s
hgnet_tiny hgnetv2_b0 hrnet_w18_small inception_resnet_v2 inception_v4 legacy_seresnet18 nf_regnet_b0
nfnet_f0 dm_nfnet_f0 eca_nfnet_l0 nasnetalarge pnasnet5large rdnet_tiny regnetv_040 regnetz_b16 repvgg_a0
res2net50_14w_8s resnest14d resnet10t resnet51q resnet50_gn resnetaa50 resnetblur18 resnetrs50 resnetv2_50
resnetv2_50d_evos resnext26ts rexnet_100 selecsls42 seresnet18 skresnet18 tresnet_m vgg11_bn xception41
xception41p

efficientnet_b0 efficientnetv2_rw_t efficientvit_b0 fasternet_t0 fbnetc_100 fbnetv3_b ghostnet_050
ghostnetv2_100 hardcorenas_a lcnet_035 mixnet_s mnasnet_small mobilenetv1_100 mobilenetv2_035
mobilenetv3_rw mobilenetv4_conv_small mobileone_s0 repghostnet_050 semnasnet_075 spnasnet_100 starnet_s1
tf_efficientnet_lite0 tinynet_e

convmixer_768_32 convnext_atto convnext_zepto_rms convnextv2_atto convformer_s18 inception_next_atto
mambaout_femto poolformer_s12 poolformerv2_s12 repvit_m0_9 shvit_s1 swiftformer_xs

bat_resnext26ts botnet26t_256 halonet26t haloregnetz_b lambda_resnet26t lamhalobotnet50ts_256
sebotnet33ts_256

beit_base_patch16_224 caformer_s18 cait_xxs24_224 coat_tiny coatnet_nano_rw_224 convit_tiny
crossvit_tiny_240 csatv2 davit_tiny deit_tiny_patch16_224 deit3_small_patch16_224 edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_m0 eva02_tiny_patch14_224 fastvit_t8
flexivit_small focalnet_tiny_srf gcvit_xxtiny hiera_tiny_224 iformer_t levit_128s lowformer_b0
maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny
nextvit_small pit_ti_224 pvt_v2_b0 sequencer2d_s swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 twins_pcpvt_small twins_svt_small
visformer_tiny vit_tiny_patch16_224 vit_relpos_small_patch16_224 vitamin_small_224 volo_d1_224
xcit_nano_12_p16_224

gmixer_12_224 gmlp_ti16_224 mixer_s32_224 resmlp_12_224
"""
_SIZES = (32, 48, 64, 96, 128, 160, 192, 224, 240, 256, 299, 331, 512, 518)


def names() -> list[str]:
    """Every model of the zoo as ``torchvision:NAME`` or ``timm:NAME``."""
    import torchvision.models

    vision = torchvision.models.list_models(module=torchvision.models)
    segmentation = torchvision.models.list_models(module=torchvision.models.segmentation)
    return [f"torchvision:{n}" for n in (*vision, *segmentation)] + [f"timm:{n}" for n in _TIMM.split()]


def create(name: str) -> nn.Module:
    """The model with random weights, the same every time; nothing is downloaded."""
    torch.manual_seed(0)
    library, _, member = name.partition(":")
    if library == "timm":
        import timm

        model = timm.create_model(member, pretrained=False)
    else:
        import torchvision.models

        options = {"weights_backbone": None} if _segments(member) else {}
        options |= {"init_weights": True} if member in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(member, weights=None, **options)
    return enliven(model)


def _segments(member: str) -> bool:
    import torchvision.models

    return member in torchvision.models.list_models(module=torchvision.models.segmentation)


@torch.no_grad()
def enliven(model: nn.Module) -> nn.Module:
    """Give every scale, bias and running statistic a value of its own.

    Fresh models have layers that do nothing (zero scales at the end of residual branches, layer scales of
    1e-6); whatever stands before them could be wrong unseen.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.normal_(0, 0.1)
            elif name == "running_var":
                buffer.uniform_(0.5, 1.5)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() <= 1 or not bool(parameter.any()):
                few = "bias" in name or parameter.dim() > 1
                parameter.normal_(0, 0.05) if few else parameter.uniform_(0.5, 1.5)
    return model


def smallest_input(model: nn.Module) -> tuple[int, ...]:
    """``(2, 3, size, size)`` with the first of `_SIZES` at which the model runs, tried on fake tensors."""
    from splitfx.frontend.behaviour import observe

    model = model.eval()
    problem: Exception | None = None
    for size in _SIZES:
        shape = (2, 3, size, size)
        try:
            observe(model, (torch.zeros(shape, dtype=next(model.parameters()).dtype),), {})
        except Exception as error:  # too small: the next size is tried, the last error is raised
            problem = error
            continue
        return shape
    assert problem is not None
    raise problem
