"""Small helpers, against hand arithmetic."""

import gc
import importlib.metadata
import json
import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import utils
from runs import plots


def test_learning_rate_falls_by_cosine_from_first_to_last_round():
    rates = [utils.cosine_learning_rate(number, 5, 4.0, 0.0) for number in range(1, 6)]
    # 2 * (1 + cos(pi * k / 4)) for k = 0..4
    assert rates == pytest.approx([4.0, 2 + 2**0.5 * 1.0, 2.0, 2 - 2**0.5 * 1.0, 0.0])
    assert utils.cosine_learning_rate(1, 1, 4.0, 1.0) == 4.0


def test_smoothing_has_no_start_up_bias_and_follows_the_values():
    assert plots.smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    # weight 1/2: first 1; then (1/2 * (1/2 * 1) + 1/2 * 4) / (1 - 1/4) = 3
    assert plots.smoothed([1.0, 4.0], weight=0.5) == pytest.approx([1.0, 3.0])
    assert plots.smoothed([1.0, 4.0, 2.0]) == [1.0, 4.0, 2.0]  # a short run is drawn as it is


@pytest.mark.parametrize(("count", "weight"), [(1, None), (10, None), (11, None), (100, None), (40, 0.3), (40, 0.99)])
def test_smoothing_is_the_average_with_weights_that_fall_by_a_factor_a_round(count, weight):
    values = np.random.default_rng(count).uniform(0, 5, count)
    past = max(0.0, 1 - 10 / count) if weight is None else weight
    expected = []
    for end in range(1, count + 1):
        weights = past ** np.arange(end - 1, -1, -1.0)  # 1 for the last value, which alone counts if `past` is 0
        expected.append(np.average(values[:end], weights=weights))
    np.testing.assert_allclose(plots.smoothed(list(values), weight), expected, rtol=1e-12)


def test_smoothing_hides_no_loss_that_is_no_number():
    assert np.isnan(plots.smoothed([2.0, float("nan"), 1.0], weight=0.5)).tolist() == [False, True, False]
    assert np.isnan(plots.smoothed([2.0, 1.0, float("nan")])[-1])


@pytest.mark.parametrize(
    ("losses", "held_out"),
    [
        ([1.0], {}),
        ([float("nan")], {"global": {"loss": 1.0}}),
        ([2.0, float("inf"), float("nan")], {"clients": {"loss": float("nan")}}),
    ],
)
def test_picture_of_any_losses_is_drawn(tmp_path, losses, held_out):
    metrics = [{"round": number, "train_loss": loss, "held_out": held_out} for number, loss in enumerate(losses, 1)]
    plots.plot_loss(metrics, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1e3, "1.0 kB"), (67_108_864, "67.1 MB"), (2e12, "2.0 TB")]
)
def test_bytes_are_written_in_decimal_units(count, text):
    assert utils.bytes_text(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(1.25, "1.2s"), (200, "3m 20s"), (3725, "1h 02m")])
def test_durations_are_written_for_people(seconds, text):
    assert utils.seconds_text(seconds) == text


def test_generators_differ_by_key_and_repeat_by_key():
    draws = {
        key: tuple(utils.generator(*key).integers(0, 2**31, 4))
        for key in [("a", 0, 1), ("a", 1, 0), ("a", 0, 1, 0), ("b", 0, 1)]
    }
    assert len(set(draws.values())) == 4
    assert draws["a", 0, 1] == tuple(utils.generator("a", 0, 1).integers(0, 2**31, 4))


def test_json_files_are_whole_or_absent(tmp_path):
    utils.write_json(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    with pytest.raises(TypeError):
        utils.write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_names_are_looked_up_where_the_user_is_and_then_in_the_suite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert utils.local_path("quickstart/model") == utils.SUITE_FOLDER / "quickstart/model"
    (tmp_path / "quickstart/model").mkdir(parents=True)
    assert utils.local_path("quickstart/model").resolve() == tmp_path / "quickstart/model"
    assert utils.local_path("openlm-research/open_llama_7b_v2") is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two  three", "one two three"),
        ("it is called open-llama-seven-billion", "it is called ..."),
        ("x" * 40, "x" * 20 + " ..."),
        ("", ""),
    ],
)
def test_long_text_is_cut_between_words(text, shown):
    assert utils.shortened(text, 24) == shown


def test_home_that_cannot_be_written_is_left_alone_and_any_other_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    utils.leave_unusable_home()
    assert os.environ["HOME"] == str(tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    utils.leave_unusable_home()
    assert Path(os.environ["HOME"]).is_dir()
    assert f"warning: the home folder {tmp_path / 'file' / 'home'} cannot be written" in capsys.readouterr().err


def test_path_that_leads_back_into_the_suite_is_not_one_that_it_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert utils.local_path("quickstart/model")
    assert utils.local_path(f"../{utils.SUITE_FOLDER.name}/quickstart/model") is None


def test_quick_imports_hide_what_is_slow_and_bring_it_back_whatever_happens(monkeypatch):
    monkeypatch.delitem(sys.modules, "scipy", raising=False)
    installed, look = find_spec("scipy"), importlib.metadata.packages_distributions
    with suppress(ZeroDivisionError), utils.quick_imports():
        assert find_spec("scipy") is None
        assert importlib.metadata.packages_distributions()["of-nobody"] == ["of-nobody"]
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert find_spec("scipy") == installed
    assert importlib.metadata.packages_distributions is look
    assert gc.isenabled()
    with utils.quick_imports():
        with utils.quick_imports():
            names = importlib.metadata.packages_distributions()
        assert find_spec("scipy") is None
    assert find_spec("scipy") == installed
    assert names.get("PIL") == ["pillow"]  # as transformers asks, maybe later
    assert names.get("of-nobody", []) == []
    monkeypatch.setitem(sys.modules, "scipy", known := ModuleType("scipy"))
    with utils.quick_imports():
        assert sys.modules["scipy"] is known
    assert sys.modules["scipy"] is known
