"""Settings of an RQ-VAE and the published ones."""

from dataclasses import asdict

import pytest

from genrec.quantizers.presets import PRESET_NOTES, PRESETS, RQVAESettings, preset


def test_published_settings():
    assert set(PRESETS) == {"default", "tiger", "lc-rec", "letter", "grid-rvq", "mender"}
    assert PRESETS["tiger"].codebook_sizes == (256,) * 3 and PRESETS["tiger"].latent_dim == 32
    assert PRESETS["lc-rec"].sinkhorn_epsilons == (0, 0, 0, 0.003)
    assert PRESETS["letter"].hidden_sizes == (2048, 1024, 512, 256, 128, 64)
    assert PRESETS["letter"].collaborative_weight > 0 and PRESETS["letter"].diversity_weight > 0
    assert PRESETS["grid-rvq"].latent_dim is None
    averaging = {name for name, settings in PRESETS.items() if settings.reduction == "mean"}
    assert averaging == {"lc-rec", "letter", "mender"}
    assert PRESETS["mender"].standardize == "standard" and PRESETS["mender"].weight_decay == 0.1


def test_presets_on_raw_vectors_carry_a_note():
    raw = {name for name, settings in PRESETS.items() if settings.standardize == "none"}
    assert raw <= set(PRESET_NOTES) <= set(PRESETS)
    assert "default" not in raw


def test_overrides():
    assert preset("tiger", epochs=3).epochs == 3
    assert preset("tiger", epochs=3).latent_dim == PRESETS["tiger"].latent_dim
    assert PRESETS["tiger"].epochs == 3000
    with pytest.raises(ValueError, match="'tigre' is none of default, tiger"):
        preset("tigre")
    with pytest.raises(ValueError, match="epoch: no such setting"):
        preset("tiger", epoch=3)
    with pytest.raises(ValueError, match="epochs=0"):
        preset("tiger", epochs=0)


def test_lists_become_tuples():
    settings = RQVAESettings(codebook_size=[4, 8, 16], hidden_sizes=[9], sinkhorn_epsilon=[0, 0, 1])
    assert settings.codebook_sizes == (4, 8, 16)
    assert settings.hidden_sizes == (9,) and settings.sinkhorn_epsilons == (0, 0, 1)
    assert RQVAESettings(**asdict(settings)) == settings
    assert RQVAESettings(n_levels=2, codebook_size=4).codebook_sizes == (4, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_levels": 0}, "n_levels=0"),
        ({"codebook_size": (4, 4)}, "2 values for n_levels=3"),
        ({"codebook_size": 1}, "codebook_size=1"),
        ({"codebook_size": 4.5}, "whole number"),
        ({"sinkhorn_epsilon": (0.1,)}, "1 values for n_levels=3"),
        ({"sinkhorn_epsilon": -1.0}, "negative"),
        ({"latent_dim": 0}, "latent_dim=0"),
        ({"hidden_sizes": (8, 0)}, "hidden_sizes="),
        ({"latent_dim": None}, "no encoder"),
        ({"latent_dim": None, "hidden_sizes": (), "gradient": "ema"}, "needs an encoder"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"commitment": -0.1}, "commitment=-0.1"),
        ({"commitment": float("nan")}, "commitment=nan"),
        ({"patience": -1}, "patience=-1"),
        ({"gradient": "gumbel"}, "gradient='gumbel' is none of straight-through, ema, rotation"),
        ({"standardize": "minmax"}, "standardize='minmax'"),
        ({"reduction": "max"}, "reduction='max' is none of sum, mean"),
        ({"lr_schedule": "cosine"}, "lr_schedule='cosine'"),
        ({"diversity_weight": 0.1, "gradient": "ema"}, "diversity_weight"),
        ({"diversity_weight": 0.1, "codebook_size": 16, "gradient": "rotation"}, "use at most 8"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RQVAESettings(**wrong)
