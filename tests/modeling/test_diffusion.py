"""Stable-Diffusion compensation, stage by stage against the authors' numbers on a tiny random Stable Diffusion."""

import numpy as np
import pytest
import torch

from arm_hf.modeling.decision import QueryMaps, decide
from arm_hf.modeling.diffusion import CompensationSettings, StableDiffusionCompensation
from arm_hf.modeling.trunk import Padding

SIZES = ("sq64", "sq96")
# Attention logits of a random UNet are large: the stored raw maps are up to 9.7e-5 away from the same computation in
# float64, so another processor's rounding may double that.
RAW_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "goldens"


@pytest.fixture(scope="module")
def inputs(folder):
    return np.load(folder / "fusion_and_proxies" / "inputs.npz")


def golden(folder, size):
    return {
        k: torch.from_numpy(v) for k, v in np.load(folder / f"fusion_and_proxies/cliper_sd128_{size}_voc21.npz").items()
    }


def compensation(folder, **settings):
    settings = CompensationSettings(image_size=128, **settings)
    return StableDiffusionCompensation.from_pretrained(str(folder / "tiny_sd"), settings=settings)


@pytest.mark.parametrize("size", SIZES)
def test_latent_and_attention_are_the_authors(folder, inputs, size):
    expected, step = golden(folder, size), compensation(folder)
    image = torch.from_numpy(inputs[f"rgb01_{size}"])
    torch.testing.assert_close(step.prompt_embeds(), expected["prompt_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(step.encode(image), expected["latent"], atol=1e-4, rtol=0)
    recorders = step.record(image, expected["noise"])
    raw = torch.cat([attention() for attention in step.heads(recorders)])
    torch.testing.assert_close(raw, expected["attn_raw"], atol=RAW_TOLERANCE, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_normalisation_and_product_are_the_authors(folder, size):
    """From the stored raw maps, because the threshold makes the product discontinuous."""
    expected, step = golden(folder, size), compensation(folder)
    normalised = step.normalise(expected["attn_raw"])
    torch.testing.assert_close(normalised, expected["attn_norm"], atol=1e-6, rtol=0)
    coarse = torch.nn.functional.interpolate(expected["seg_coarse"][None], size=(16, 16), mode="bilinear")
    columns = coarse.flatten(2)[0].T
    results = {
        "pred_SFSA": torch.linalg.multi_dot([*normalised, columns]),
        "pred_mean": normalised.mean(0) @ columns,
        "pred_selection": normalised[1] @ columns,
    }
    for name, result in results.items():
        torch.testing.assert_close(result.T.unflatten(1, (16, 16)), expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("mode", "name"), [("sfsa", "SFSA"), ("mean", "mean"), ("selection", "selection")])
def test_the_whole_step_is_the_authors(folder, inputs, size, mode, name):
    expected, step = golden(folder, size), compensation(folder, mode=mode)
    image = torch.from_numpy(inputs[f"rgb01_{size}"])
    refined = step.apply(expected["seg_coarse"][None], image, expected["noise"])[0]
    torch.testing.assert_close(refined, expected[f"pred_{name}"], atol=1e-4, rtol=0)


def test_the_scheduler_gives_the_authors_step(folder):
    step = compensation(folder)
    step.scheduler.set_timesteps(50)
    assert int(step.scheduler.timesteps[step.settings.timestep_index]) == int(golden(folder, "sq64")["timestep"])


def test_seeded_noise_repeats_and_a_batch_equals_single_images(folder, inputs):
    step = compensation(folder)
    images = torch.cat([torch.from_numpy(inputs["rgb01_sq64"]), torch.rand(1, 3, 64, 64, generator=_generator())])
    scores = torch.rand(2, 3, 4, 4, generator=_generator())
    together = step.apply(scores, images)
    assert torch.equal(together, step.apply(scores, images))
    for index in range(2):
        alone = step.apply(scores[index : index + 1], images[index : index + 1])[0]
        torch.testing.assert_close(together[index], alone, atol=1e-3, rtol=0)


def test_the_unet_is_left_as_it_was_and_frozen(folder, inputs):
    step = compensation(folder)
    before = dict(step.unet.attn_processors.items())
    step.record(torch.from_numpy(inputs["rgb01_sq64"]))
    assert step.unet.attn_processors == before
    assert not any(p.requires_grad for part in (step.unet, step.vae, step.text_encoder) for p in part.parameters())


def test_compensated_maps_can_be_decided_at_any_size(folder):
    step = compensation(folder)
    padding = Padding.to_multiple(60, 90, 16)
    scores = torch.rand(1, 4, 4, 6, generator=_generator())
    maps = QueryMaps(scores, None, None, "none", 1.0, padding, (64, 96))
    refined = step.compensate(maps, torch.rand(1, 3, 120, 180, generator=_generator()))
    assert refined.coarse.shape == (1, 4, 16, 16)
    decision = decide(refined, [(0, 0, 60, 90)], (60, 90), range(4), output_size=(120, 180))
    assert decision.labels.shape == (120, 180)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "best"}, "mode must be one of"),
        ({"attention_threshold": 1.0}, "attention_threshold"),
        ({"image_size": 100}, "multiple of 8"),
        ({"timestep_index": 50}, "timestep_index"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CompensationSettings(**settings)


def test_layers_that_do_not_exist_are_named(folder):
    with pytest.raises(ValueError, match=r"up_blocks\.9"):
        compensation(folder, layers=("up_blocks.9.attentions.0",))


def _generator():
    return torch.Generator().manual_seed(0)
