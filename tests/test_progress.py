"""What a person sees during a run."""

import io

import pytest
from rich.console import Console

from runs.progress import RunProgress, summary_line

ODD = "outputs/out[1] [bold]x[/bold] [/] :cat: " + "long " * 40 + "end"  # markup, an emoji, more than a line
ROUND = {
    "round": 2, "train_loss": 0.5, "learning_rate": 1e-3, "bytes_up": 3_000_000, "bytes_down": 3_100_000,
    "clients": [4, 9], "tokens": 14938, "seconds": {"wall": 44.6}, "held_out": {"global": {"loss": 0.25}},
}  # fmt: skip


def shown(terminal: bool, act) -> str:
    """What stands on a console after `act(progress)`."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=1000, highlight=False, color_system=None)
    with RunProgress(4, console) as progress:
        act(progress)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("act", [RunProgress.say, RunProgress.warn])
def test_messages_are_printed_as_they_are(act, terminal):
    assert ODD in shown(terminal, lambda progress: act(progress, ODD))


def test_round_is_a_line_for_people():
    expected = "round 2/4  loss 0.5000  held out 0.2500  clients 4,9  14938 tokens  6.1 MB  44.6s  left 1m 29s\n"
    assert shown(False, lambda progress: progress.round_done(ROUND)) == expected
    assert "2/4 loss 0.5000  held out 0.2500 lr 0.001" in shown(True, lambda progress: progress.round_done(ROUND))


@pytest.mark.parametrize("terminal", [False, True])
def test_resumed_run_says_where_it_resumes(terminal):
    text = shown(terminal, lambda progress: progress.resumed(3))
    assert "resumed after round 3\n" in text
    assert ("3/4" in text) == terminal


def test_end_of_a_run_is_told_in_words():
    summary = {
        "final_train_loss": 0.0588, "rounds": 12, "seconds": 41.4, "bytes_down": 31_700_000, "bytes_up": 31_700_000,
        "ended": None,
    }  # fmt: skip
    assert summary_line(summary) == "final loss 0.0588 after 12 rounds in 41.4s, 63.4 MB transferred"
    held_out = {"held_out_loss": 0.09, "held_out_loss_before": 1.4, "best_held_out_loss": 0.08, "best_round": 9}
    assert summary_line(summary | held_out | {"rounds": 1, "ended": "strategy.max_bytes=1"}) == (
        "final loss 0.0588 after 1 round in 41.4s, 63.4 MB transferred\n"
        "held-out loss 1.4000 before, 0.0900 after, lowest after round 9: 0.0800\n"
        "ended early by strategy.max_bytes=1"
    )
