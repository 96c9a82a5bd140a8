"""Learning rates against their definitions, and the configuration's words for them."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from pop3d_jax.schedules import make_schedule, warmup_cooldown, warmup_cosine


def rates(schedule, steps):
    return np.asarray(jax.vmap(schedule)(jnp.asarray(steps)))


def test_warmup_cosine_equals_the_definition_in_double_precision():
    base, total, warmup, final = 2e-3, 1000, 70, 1e-5
    steps = np.arange(total + 1)
    cosine = final / base + 0.5 * (1 - final / base) * (np.cos((steps - warmup) / (total - warmup) * np.pi) + 1)
    expected = base * np.where(steps < warmup, steps / warmup, cosine)
    found = rates(warmup_cosine(base, total_steps=total, warmup_steps=warmup, final=final), steps)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[0] == 0.0
    assert found[warmup] == np.float32(base)


def test_warmup_cosine_stays_at_the_end_and_takes_no_warmup():
    schedule = warmup_cosine(1.0, total_steps=10, warmup_steps=0, final=0.25)
    np.testing.assert_allclose(rates(schedule, [0, 10, 15, 20]), [1.0, 0.25, 0.25, 0.25])


def test_warmup_cooldown_by_hand():
    schedule = warmup_cooldown(1.0, total_steps=20, warmup_steps=4, cooldown_steps=8, timescale_steps=4.0)
    found = rates(schedule, [0, 1, 3, 4, 8, 12, 13, 16, 19, 20, 30])
    # The cooldown begins at 1 / sqrt(1 + 12 / 4) = 1/2, not at the curve's 1 / sqrt(1 + 8 / 4), as official.
    falling = [1 / 2**0.5, 1 / 3**0.5]
    cooling = [0.5 * 6 / 7, 0.5 * 3 / 7, 0.0, 0.0, 0.0]
    np.testing.assert_allclose(found, [0.0, 0.25, 0.75, 1.0, *falling, *cooling], rtol=1e-6)


@pytest.fixture
def config():
    return ml_collections.ConfigDict(
        {
            "warmup_steps": 5,
            "warmup_start": 0.1,
            "final_learning_rate": 0.0,
            "cooldown_steps": 5,
            "timescale_steps": 10.0,
        }
    )


def test_the_schedule_is_chosen_by_name_and_is_the_old_one_by_default(config):
    assert rates(make_schedule(config, 1.0, 20), [0])[0] == np.float32(0.1)
    for name, middle in (("warmup_cosine", 0.5), ("warmup_cooldown", 0.5**0.5)):
        with config.unlocked():
            config.schedule = name
        found = rates(make_schedule(config, 1.0, 25), [0, 15])
        np.testing.assert_allclose(found, [0.0, middle], atol=1e-6)


def test_errors_name_the_field(config):
    with config.unlocked():
        config.schedule = "linear"
    with pytest.raises(ValueError, match=r"config\.optim\.schedule is 'linear': choose one of"):
        make_schedule(config, 1.0, 20)
    config.schedule = "warmup_cosine"
    with pytest.raises(ValueError, match=r"config\.optim\.warmup_steps take 5 steps, the training has 4"):
        make_schedule(config, 1.0, 4)
    config.schedule = "warmup_cooldown"
    with pytest.raises(ValueError, match=r"cooldown_steps take 10 steps, the training has 9"):
        make_schedule(config, 1.0, 9)
    config.timescale_steps = 0.0
    with pytest.raises(ValueError, match=r"config\.optim\.timescale_steps is 0\.0: it must be above 0"):
        make_schedule(config, 1.0, 20)
