"""examples/arguments.py: every layout that cannot be is refused before any rank waits for another."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def arguments(monkeypatch):
    """The companion module, imported as the script does: with examples/ first on sys.path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import arguments

    yield arguments
    for name in ("arguments", "text_data"):
        sys.modules.pop(name, None)


@pytest.fixture
def parse(arguments, monkeypatch):
    """parse(world_size, "--flags ...") as rank 0 of that many ranks."""

    def parse(world_size: int, flags: str = ""):
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}.items():
            monkeypatch.setenv(name, value)
        return arguments.parse_arguments(flags.split())

    return parse


@pytest.mark.parametrize(
    ("world_size", "flags", "expected"),
    [
        (1, "", (1, 1, 1)),
        (2, "", (2, 1, 1)),
        (2, "--tp 1", (1, 1, 2)),
        (2, "--pp 2", (1, 2, 1)),
        (3, "--global-batch-size 48", (1, 1, 3)),
        (8, "--pp 2 --global-batch-size 32", (2, 2, 2)),
    ],
)
def test_layout_fills_the_ranks(parse, world_size, flags, expected):
    """tp x pp x dp is the number of ranks; unset, tp is 2 where that divides them."""
    args = parse(world_size, flags)
    assert (args.tp, args.pp, args.dp) == expected


@pytest.mark.parametrize(
    ("world_size", "flags", "micro_batch", "validation"),
    [
        (2, "", 16, 256),
        (2, "--tp 1", 8, 256),
        (2, "--pp 2", 8, 256),
        (3, "--global-batch-size 48", 16, 288),
        (1, "--micro-batch-size 4 --validation-samples 9", 4, 12),
    ],
)
def test_batches_follow_from_the_layout(parse, world_size, flags, micro_batch, validation):
    """Unset, a microbatch is a rank's share, several of them in a pipeline; validation has whole batches."""
    args = parse(world_size, flags)
    assert (args.micro_batch_size, args.validation_samples) == (micro_batch, validation)


@pytest.mark.parametrize(("tp", "expected"), [(1, 256), (2, 256), (3, 258), (4, 256)])
def test_vocabulary_is_padded_for_tensor_parallelism(parse, tp, expected):
    """Each of the tp ranks holds the same number of rows, and none is missing."""
    args = parse(tp, f"--tp {tp} --heads 12 --hidden 96 --micro-batch-size 1")
    assert args.padded_vocab_size == expected


@pytest.mark.parametrize(
    ("world_size", "flags", "words"),
    [
        (2, "--tp 3", "--tp 3 x --pp 1 does not divide the 2 ranks"),
        (4, "--tp 4 --heads 2", "--tp 4 does not divide --heads 2"),
        (2, "--tp 1 --pp 2 --layers 3", "--pp 2 does not divide --layers 3"),
        (1, "--hidden 100 --heads 3", "--hidden 100 is not a multiple"),
        (1, "--tp 1 --sequence-parallel", "--sequence-parallel needs --tp 2"),
        (2, "--sequence-parallel --seq-length 63", "--tp 2 does not divide --seq-length 63"),
        (2, "--tp 1 --micro-batch-size 16", "--global-batch-size 16 is not a multiple of 32"),
        (3, "--global-batch-size 16", "--global-batch-size 16 is not a multiple of 15"),
        (1, "--finetune", "--finetune needs --load"),
        (1, "--steps -1", "--steps must not be negative"),
        (1, "--tp 0", "--tp must be above 0"),
        (1, "--pp 0", "--pp must be above 0"),
        (1, "--stepz 3", "--stepz"),
        (1, "--lr many", "--lr"),
    ],
)
def test_flags_that_do_not_fit_end_with_one_line(parse, capsys, world_size, flags, words):
    """Exit code 2, and one line that names the flags and the numbers."""
    with pytest.raises(SystemExit) as stop:
        parse(world_size, flags)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("pretrain_gpt.py: error:")
    assert words in printed
    assert printed.count("\n") == 1


def test_other_ranks_are_silent(arguments, monkeypatch, capsys):
    """The error stands on the screen once, not once a rank."""
    pauses = []
    monkeypatch.setattr(arguments.time, "sleep", pauses.append)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        arguments.end_with_error("wrong")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "")
    assert pauses == [2]


def test_without_a_launcher_the_error_says_how_to_start(arguments, monkeypatch, capsys):
    """Started with plain python there are no ranks, and the line says torchrun."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        arguments.parse_arguments([])
    assert "torchrun --nproc-per-node" in capsys.readouterr().err


def test_help_explains_every_flag(arguments, monkeypatch, capsys):
    """--help works without a launcher, and no flag is without an explanation."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        arguments.parse_arguments(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    actions = arguments.build_parser()._actions
    assert all(action.help for action in actions)
    for action in actions:
        assert action.option_strings[-1] in printed
